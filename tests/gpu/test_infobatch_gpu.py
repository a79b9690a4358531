"""What only a GPU can show: no host synchronisation, reduced precision, automatic microbatches."""

import pytest
import torch
from composer import Trainer
from composer.algorithms import EMA, BlurPool, SqueezeExcite
from composer.models import ComposerClassifier
from composer.optim import CosineAnnealingScheduler
from torch.utils.data import DataLoader, TensorDataset

from composer_effalgos import AdaBatch, InfoBatch
from composer_effalgos.models import build_model
from composer_effalgos.plan import EpochPlanner

pytestmark = pytest.mark.gpu


def make(algorithms, precision='amp_bf16', **kwargs) -> Trainer:
    torch.manual_seed(0)
    labels = torch.arange(512) % 10
    data = TensorDataset(torch.randn(512, 3, 32, 32) + labels[:, None, None, None] * 0.1, labels)
    module = build_model('resnet20_cifar', 10)
    arguments = {'max_duration': '4ep', **kwargs}
    return Trainer(
        model=ComposerClassifier(module, num_classes=10),
        train_dataloader=DataLoader(data, batch_size=64, shuffle=True, num_workers=2),
        optimizers=torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9),
        schedulers=CosineAnnealingScheduler(),
        algorithms=algorithms,
        device='gpu',
        precision=precision,
        seed=1,
        deterministic_mode=True,
        progress_bar=False,
        **arguments,
    )


def test_no_host_synchronisation_in_a_step():
    algorithm = InfoBatch(delta=1.0)
    trainer = make([algorithm])
    loss = trainer.state.model.loss
    plan = EpochPlanner.of(trainer.state)
    watched = []

    def watch(function):
        def strict(*args, **kwargs):
            watched.append(function)
            if loss.check_due:  # some batches are checked against the model's own loss
                return function(*args, **kwargs)
            torch.cuda.set_sync_debug_mode('error')
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode('default')

        return strict

    trainer.state.model.loss = watch(loss)
    for name in ('before_train_batch', 'after_backward', 'after_train_batch', 'batch_end'):
        setattr(plan, name, watch(getattr(plan, name)))
    trainer.fit()
    assert len(watched) > 20
    assert algorithm.samples_saved > 0


@pytest.mark.parametrize('precision', ['fp32', 'amp_bf16', 'amp_fp16'])
def test_resuming_is_exact_in_every_precision(precision, tmp_path):
    def algorithms():
        return [InfoBatch(delta=1.0), AdaBatch(2, '2ep'), BlurPool(), SqueezeExcite(min_channels=16), EMA(half_life='10ba')]

    whole = make(algorithms(), precision, save_folder=str(tmp_path), save_interval='5ba', save_filename='{batch}.pt')
    whole.fit()
    resumed = make(algorithms(), precision, load_path=str(tmp_path / '10.pt'), save_folder=str(tmp_path / 'again'), save_interval='5ba')
    resumed.fit()
    for name, value in whole.state.model.state_dict().items():
        assert torch.equal(value, resumed.state.model.state_dict()[name]), name
    assert torch.equal(whole.state.algorithms[0].scores, resumed.state.algorithms[0].scores)


def test_scores_live_on_the_device_and_are_read_on_the_cpu():
    algorithm = InfoBatch()
    make([algorithm], max_duration='1ep').fit()
    assert algorithm.scores.device.type == 'cpu'
    assert not algorithm.scores.isnan().any()
