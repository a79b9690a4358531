"""Composer's own methods beside the rows of the table: both do what they do alone, or are refused in one line.

Some rows are tried with every method, and every other row with each fourth of them, in turn, and with those that refuse it.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from algorithm_settings import SETTINGS, classes
from composer import Trainer
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
from composer.core import Algorithm
from composer.optim import LinearScheduler
from torch.utils.data import TensorDataset
from torchvision.models.resnet import Bottleneck, ResNet

from composer_effalgos import AdaBatch, InfoBatch, InputError, LinUpper, Pruning, SubsetSelection

SAMPLES, EPOCHS = 96, 4
ROWS = [row for row, setting in SETTINGS.items() if setting.problem is classes]  # the others are of tokens
METHODS: dict[str, Callable[[], Algorithm]] = {
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
SECOND_LOSS = 'LinUpper cannot be combined with a second loss for the same microbatch'
REFUSED = {
    ('mixup_interpolate', 'lin_upper'): SECOND_LOSS,
    ('cutmix_interpolate', 'lin_upper'): SECOND_LOSS,
    ('sam', 'seesaw'): "lr: expected 'sqrt', 'linear' or 'none' with the optimizer SAMOptimizer",
}


def small_network() -> torch.nn.Module:
    """Two convolutions, wide and strided enough for every method."""

    def layer(inputs: int, outputs: int) -> list[torch.nn.Module]:
        return [torch.nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), torch.nn.BatchNorm2d(outputs), torch.nn.ReLU()]

    return torch.nn.Sequential(*layer(3, 8), *layer(8, 16), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 3))


@pytest.fixture
def fit(make_trainer: Callable[..., Trainer]) -> Callable[..., Trainer]:
    """Trains a small convolutional network on small images with some algorithms."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(SAMPLES) % 3
    images = torch.randn(SAMPLES, 3, 16, 16, generator=generator) * 0.5 + labels[:, None, None, None] * 0.5

    def run(algorithms: list[Algorithm], **arguments: Any) -> Trainer:
        torch.manual_seed(0)
        blocks = any(isinstance(algorithm, StochasticDepth) for algorithm in algorithms)  # it takes torchvision's alone
        module = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3, width_per_group=8) if blocks else small_network()
        arguments = {'lr': 0.02, 'max_duration': f'{EPOCHS}ep', 'schedulers': LinearScheduler(), **arguments}
        trainer = make_trainer(algorithms, dataset=TensorDataset(images, labels), module=module, **arguments)
        trainer.fit()
        return trainer

    return run


WITH_ALL = ('infobatch', 'all')
PAIRS = [
    (method, row)
    for number, row in enumerate(ROWS)
    for place, method in enumerate(METHODS)
    if row in WITH_ALL or (place + number) % 8 == 0 or (method, row) in REFUSED
]


@pytest.mark.parametrize(
    ('method', 'row'),
    [pytest.param(*pair, id=' beside '.join(pair)) for pair in PAIRS],
)
def test_every_method_beside_ours(fit, weights_of, row, method):
    algorithms = SETTINGS[row].algorithms(SAMPLES)
    if (method, row) in REFUSED:
        with pytest.raises(InputError, match=re.escape(REFUSED[method, row])):
            fit([*algorithms, METHODS[method]()])
        return
    trainer = fit([*algorithms, METHODS[method]()])
    assert torch.isfinite(weights_of(trainer)).all()
    sizes = trainer.recorder.sizes
    trained = [sum(epoch) for epoch in sizes]
    if all(isinstance(algorithm, AdaBatch | LinUpper) for algorithm in algorithms):
        assert trained == [SAMPLES] * EPOCHS
    elif row != 'rule ies':  # which has no second difference of the losses in so few epochs
        assert sum(trained) < EPOCHS * SAMPLES
    for algorithm in algorithms:
        if isinstance(algorithm, SubsetSelection):
            assert trained[-1] <= len(algorithm.indices) < SAMPLES  # the first are a warm-up in some rows
        if isinstance(algorithm, InfoBatch):
            assert algorithm.samples_saved > 0
        if isinstance(algorithm, Pruning) and len(algorithms) == 1:
            assert algorithm.samples_saved == EPOCHS * SAMPLES - sum(trained)


@pytest.mark.parametrize('method', ['label_smoothing', 'mixup', 'mixup_interpolate', 'cutmix', 'ema', 'squeeze_excite', 'channels_last'])
def test_the_order_of_the_list_does_not_matter(fit, weights_of, method):
    results = []
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 7):
        algorithms = [*SETTINGS['all'].algorithms(SAMPLES), METHODS[method]()]
        results.append(weights_of(fit([algorithms[i] for i in order])))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize('row', ['infobatch', 'gradmatch', 'all'])
@pytest.mark.parametrize('first', [True, False])
def test_selective_backprop_is_refused_where_positions_name_samples(fit, row, first):
    algorithms = [SelectiveBackprop(0.0, 1.0), *SETTINGS[row].algorithms(SAMPLES)]
    with pytest.raises(InputError, match=r'SelectiveBackprop cannot be combined with (InfoBatch|SubsetSelection)'):
        fit(algorithms if first else algorithms[::-1])


@pytest.mark.parametrize('row', ['adabatch', 'glister'])
def test_selective_backprop_beside_the_others(fit, row):
    trainer = fit([SelectiveBackprop(0.0, 1.0, 0.5, interrupt=0), *SETTINGS[row].algorithms(SAMPLES)])
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
