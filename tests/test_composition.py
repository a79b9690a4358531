"""Every stock method beside each of the three algorithms, and beside all three together."""

import itertools

import pytest
import torch
from composer.algorithms import (
    EMA,
    SAM,
    SWA,
    AugMix,
    BlurPool,
    ChannelsLast,
    ColOut,
    CutMix,
    CutOut,
    GradientClipping,
    LabelSmoothing,
    LayerFreezing,
    MixUp,
    ProgressiveResizing,
    RandAugment,
    SelectiveBackprop,
    SqueezeExcite,
    StochasticDepth,
)
from torch.utils.data import TensorDataset
from torchvision.models.resnet import Bottleneck, ResNet

from composer_effalgos import AdaBatch, InfoBatch, InputError, SubsetSelection

OURS = {
    'infobatch': lambda: [InfoBatch(delta=1.0)],
    'adabatch': lambda: [AdaBatch(2, '1ep', lr_factor=0.75)],
    'glister': lambda: [SubsetSelection('glister', 0.5, '2ep')],
    'gradmatch': lambda: [SubsetSelection('gradmatch', 0.5, '2ep')],
    'all': lambda: [InfoBatch(delta=1.0), AdaBatch(2, '1ep', lr_factor=0.75), SubsetSelection('gradmatch', 0.5, '2ep')],
}
THEIRS = {
    'blurpool': lambda: BlurPool(min_channels=1),
    'squeeze_excite': lambda: SqueezeExcite(latent_channels=4, min_channels=16),
    'channels_last': ChannelsLast,
    'label_smoothing': lambda: LabelSmoothing(0.1),
    'mixup': MixUp,
    'mixup_interpolate': lambda: MixUp(interpolate_loss=True),
    'cutmix': CutMix,
    'cutmix_interpolate': lambda: CutMix(interpolate_loss=True),
    'cutout': CutOut,
    'ema': lambda: EMA(half_life='5ba'),
    'sam': lambda: SAM(rho=0.05, interval=2),
    'swa': lambda: SWA(swa_start='1ep', swa_end='2ep', update_interval='1ep'),
    'progressive_resizing': lambda: ProgressiveResizing(initial_scale=0.5, finetune_fraction=0.3, delay_fraction=0.2),
    'gradient_clipping': lambda: GradientClipping('norm', 1.0),
    'layer_freezing': lambda: LayerFreezing(0.0, 0.5),
    'stochastic_depth': lambda: StochasticDepth('ResNetBottleneck', drop_rate=0.1),
}


@pytest.fixture
def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 3
    return TensorDataset(torch.randn(96, 3, 16, 16, generator=generator) * 0.5 + labels[:, None, None, None] * 0.5, labels)


@pytest.fixture
def fit(make_trainer, images):
    def run(algorithms, **kwargs):
        torch.manual_seed(0)
        arguments = {'dataset': images, 'batch_size': 16, 'lr': 0.02, 'max_duration': '3ep', **kwargs}
        trainer = make_trainer(algorithms, module=ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3, width_per_group=16), **arguments)
        trainer.fit()
        return trainer

    return run


@pytest.mark.parametrize('ours', OURS)
@pytest.mark.parametrize('theirs', THEIRS)
def test_every_method_beside_ours(fit, ours, theirs, weights_of):
    trainer = fit([*OURS[ours](), THEIRS[theirs]()])
    weights = weights_of(trainer)
    assert torch.isfinite(weights).all()
    trained = [sum(sizes) for sizes in trainer.recorder.sizes]
    if ours == 'adabatch':
        assert trained == [96] * 3
        assert [sizes[0] for sizes in trainer.recorder.sizes] == [16, 32, 64]
        return
    assert sum(trained) < 3 * 96
    infobatch = next((a for a in trainer.state.algorithms if isinstance(a, InfoBatch)), None)
    subset = next((a for a in trainer.state.algorithms if isinstance(a, SubsetSelection)), None)
    if subset is not None:
        assert len(subset.indices) == 48
        assert trained[0] == 48
    if infobatch is not None:
        seen = torch.arange(96) if subset is None else subset.indices
        assert torch.isfinite(infobatch.scores[seen]).all() or subset is not None
        assert infobatch.samples_saved > 0


@pytest.mark.parametrize('theirs', ['label_smoothing', 'mixup', 'mixup_interpolate', 'cutmix', 'ema', 'squeeze_excite', 'channels_last'])
def test_the_order_of_the_list_does_not_matter(fit, theirs, weights_of):
    results = []
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 7):
        algorithms = [*OURS['all'](), THEIRS[theirs]()]
        results.append(weights_of(fit([algorithms[i] for i in order])))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize('ours', ['infobatch', 'gradmatch', 'all'])
@pytest.mark.parametrize('first', [True, False])
def test_selective_backprop_is_refused_where_positions_name_samples(fit, ours, first):
    algorithms = [SelectiveBackprop(0.0, 1.0), *OURS[ours]()]
    with pytest.raises(InputError, match=r'SelectiveBackprop cannot be combined with (InfoBatch|SubsetSelection)'):
        fit(algorithms if first else algorithms[::-1])


@pytest.mark.parametrize('ours', ['adabatch', 'glister'])
def test_selective_backprop_beside_the_others(fit, ours):
    trainer = fit([SelectiveBackprop(0.0, 1.0, 0.5, interrupt=0), *OURS[ours]()])
    assert {size for sizes in trainer.recorder.sizes for size in sizes} <= {8, 16, 32}


@pytest.mark.parametrize(
    'theirs', [lambda: ColOut(batch=False), RandAugment, lambda: AugMix(width=1)], ids=['colout', 'randaugment', 'augmix']
)
@pytest.mark.parametrize('first', [True, False])
def test_methods_that_change_the_data_set(make_trainer, theirs, first):
    from PIL import Image
    from torchvision.datasets import VisionDataset
    from torchvision.transforms import ToTensor

    class Pictures(VisionDataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return self.transform(Image.new('RGB', (16, 16), (index * 20, 100, 200 - index))), index % 3

    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 3))
    algorithms = [theirs(), InfoBatch(delta=1.0)]
    dataset = Pictures('.', transform=ToTensor())
    trainer = make_trainer(
        algorithms if first else algorithms[::-1], dataset=dataset, module=module, max_duration='2ep', num_workers=1, batch_size=4
    )
    trainer.fit()
    trainer.fit(duration='1ep')  # the planned loader is found again, by them and by us
    assert type(dataset.transform).__name__ == 'Compose'  # with theirs in it
    assert len(trainer.recorder.sizes) == 3
