import datetime
import itertools
import json
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import composer.trainer.trainer as composer_trainer
import numpy as np
import pytest
import torch
from composer import Callback, ComposerModel, DataSpec, Evaluator, Trainer
from composer.loggers import InMemoryLogger
from composer.metrics import CrossEntropy
from composer.models import ComposerClassifier
from composer.optim import ConstantScheduler, LinearScheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from composer_effalgos import AdaBatch, InfoBatch, SubsetSelection
from composer_effalgos.monitor import EfficiencyMonitor
from composer_effalgos.plan import EpochMetrics
from composer_effalgos.utils.errors import InputError

EPOCH_KEYS = [
    'epoch',
    'seconds',
    'samples',
    'batches',
    'batch_size',
    'lr',
    'train_loss',
    'eval_accuracy',
    'selection_seconds',
    'samples_full',
    'cpu_seconds',
    'eval_loss',
    'tokens',
]
TOTAL_KEYS = [
    'train_seconds',
    'train_cpu_seconds',
    'samples_seen',
    'samples_full',
    'samples_saved',
    'saved_fraction',
    'selection_seconds',
    'eval_accuracy',
    'eval_loss',
    'peak_memory_bytes',
    'tokens_seen',
    'tokens_full',
    'tokens_saved_fraction',
    'tokens_per_second',
]


class PrunedLoader(DataLoader):
    """A loader that says of itself what a planned one does."""

    full_samples = 40
    plan = SimpleNamespace(num_samples=30)


def dataset(samples: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(samples, 6, generator=generator), torch.randint(0, 3, (samples,), generator=generator))


def trainer(folder: Path, monitor: EfficiencyMonitor | None = None, loader: DataLoader | None = None, evaluate: bool = True, **options):
    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    callbacks = [monitor or EfficiencyMonitor(save_folder=folder), *options.pop('callbacks', [])]
    return Trainer(
        **{
            'model': ComposerClassifier(module, num_classes=3),
            'train_dataloader': loader or DataLoader(dataset(), batch_size=8),
            'eval_dataloader': DataLoader(dataset(12), batch_size=4) if evaluate else None,
            'optimizers': torch.optim.SGD(module.parameters(), lr=0.25),
            'schedulers': ConstantScheduler(),
            'max_duration': '3ep',
            'run_name': 'run',
            'seed': 5,
            'device': 'cpu',
            'progress_bar': False,
            'callbacks': callbacks,
            **options,
        }
    )


def summary(folder: Path, run_name: str = 'run') -> dict:
    return json.loads((folder / run_name / 'summary.json').read_text())


def test_summary_and_metrics_of_a_plain_run(tmp_path):
    log = InMemoryLogger()
    trainer(tmp_path, EfficiencyMonitor({'run_name': 'run', 'model': {'name': 'mlp'}}, tmp_path), loggers=log).fit()
    found = summary(tmp_path)
    assert list(found) == ['run_name', 'recipe', 'seed', 'world_size', 'device', 'versions', 'epochs', 'totals']
    assert [list(entry) for entry in found['epochs']] == [EPOCH_KEYS] * 3
    assert list(found['totals']) == TOTAL_KEYS
    assert found['run_name'] == 'run'
    assert found['recipe'] == {'run_name': 'run', 'model': {'name': 'mlp'}}
    assert (found['seed'], found['world_size'], found['device']) == (5, 1, 'cpu')
    assert found['versions']['torch'] == torch.__version__.split('+')[0]
    assert found['versions']['python'] == sys.version.split()[0]

    logged = {name: [float(value) for _, value in values] for name, values in log.data.items()}
    losses = np.array(logged['loss/train/total']).reshape(3, 3)
    assert [entry['train_loss'] for entry in found['epochs']] == pytest.approx(list(losses @ [8, 8, 4] / 20))
    assert [entry['eval_accuracy'] for entry in found['epochs']] == pytest.approx(logged['metrics/eval/MulticlassAccuracy'])
    for number, entry in enumerate(found['epochs']):
        assert entry['epoch'] == number
        assert (entry['samples'], entry['batches'], entry['batch_size'], entry['lr']) == (20, 3, 8, 0.25)
        assert entry['selection_seconds'] == 0
        assert entry['seconds'] > 0
    totals = found['totals']
    assert (totals['samples_seen'], totals['samples_full'], totals['samples_saved'], totals['saved_fraction']) == (60, 60, 0, 0)
    assert totals['train_seconds'] == pytest.approx(sum(entry['seconds'] for entry in found['epochs']))
    assert totals['eval_accuracy'] == found['epochs'][-1]['eval_accuracy']
    assert totals['peak_memory_bytes'] > 10e6  # torch alone is larger

    assert logged['efficiency/samples_seen'] == [20, 40, 60]
    assert logged['efficiency/saved_fraction'] == [0, 0, 0]
    assert logged['efficiency/batch_size'] == [8, 8, 8]
    assert logged['efficiency/epoch_seconds'] == [entry['seconds'] for entry in found['epochs']]
    assert list((tmp_path / 'run').iterdir()) == [tmp_path / 'run' / 'summary.json']


def test_cpu_seconds_count_training_and_its_children_but_not_evaluation(tmp_path):
    class Burn(Callback):
        def after_forward(self, state, logger):
            if int(state.timestamp.batch) == 1:
                subprocess.run([sys.executable, '-c', 'import time\nwhile time.process_time() < 0.3: pass'], check=True)

        def eval_start(self, state, logger):
            stop = time.process_time() + 0.5
            while time.process_time() < stop:
                pass

    trainer(tmp_path, callbacks=[Burn()]).fit()
    first, *others = (entry['cpu_seconds'] for entry in summary(tmp_path)['epochs'])
    assert first > 0.3
    assert max(others) < 0.5
    assert summary(tmp_path)['totals']['train_cpu_seconds'] == first + sum(others)


def test_drop_last_counts_what_ran(tmp_path):
    trainer(tmp_path, loader=DataLoader(dataset(), batch_size=8, drop_last=True), max_duration='2ep').fit()
    totals = summary(tmp_path)['totals']
    assert (totals['samples_seen'], totals['samples_full'], totals['saved_fraction']) == (32, 32, 0)


def test_the_learning_rate_is_that_of_the_epochs_end(tmp_path):
    trainer(tmp_path, schedulers=LinearScheduler(alpha_i=1.0, alpha_f=0.0)).fit()
    # The last of an epoch's three steps sets the rate of batch 2, 5, 8 of 9.
    assert [entry['lr'] for entry in summary(tmp_path)['epochs']] == pytest.approx([0.25 * (1 - batch / 9) for batch in (2, 5, 8)])


def test_savings_and_metrics_of_a_planned_loader(tmp_path):
    log = InMemoryLogger()
    loader = PrunedLoader(dataset(30), batch_size=8)

    class Select(Callback):
        def epoch_start(self, state, logger):
            loader.metrics = EpochMetrics(selection_seconds=1.5 + int(state.timestamp.epoch), pruned_fraction=0.25)

        def epoch_end(self, state, logger):
            loader.metrics = EpochMetrics()

    trainer(tmp_path, loader=loader, loggers=log, max_duration='2ep', callbacks=[Select()]).fit()
    found = summary(tmp_path)
    assert [entry['selection_seconds'] for entry in found['epochs']] == [1.5, 2.5]
    totals = found['totals']
    assert (totals['samples_seen'], totals['samples_full'], totals['samples_saved'], totals['saved_fraction']) == (60, 80, 20, 0.25)
    assert totals['selection_seconds'] == 4
    assert [value for _, value in log.data['efficiency/selection_seconds']] == [1.5, 2.5]
    assert 'efficiency/pruned_fraction' not in log.data, 'the algorithm logs what it decided'
    assert [value for _, value in log.data['efficiency/saved_fraction']] == [0.25, 0.25]


def test_score_histograms_are_those_of_infobatch_at_epochs_that_double_and_at_the_end(tmp_path):
    infobatch, seen = InfoBatch(), []

    class Look(Callback):
        def epoch_end(self, state, logger):
            seen.append(infobatch.scores)

    arguments = {
        'algorithms': [infobatch],
        'callbacks': [Look()],
        'save_folder': str(tmp_path / 'ckpt'),
        'save_interval': '3ep',
        'save_filename': 'ep{epoch}.pt',
    }
    trainer(tmp_path, max_duration='6ep', **arguments).fit()
    found = summary(tmp_path)['score_histograms']
    edges = np.array(found['edges'])
    assert len(edges) == 65
    assert (edges[0], edges[-1]) == pytest.approx((1e-6, 1e2))
    assert [entry['epoch'] for entry in found['epochs']] == [0, 1, 3, 5]
    for entry in found['epochs']:
        scores = seen[entry['epoch']].numpy()
        by_hand = [int(((scores >= low) & (scores < high)).sum()) for low, high in itertools.pairwise(edges)]
        assert entry['counts'] == by_hand
        assert sum(by_hand) == len(scores), 'losses of this problem lie within the edges'
        assert entry['mean'] == pytest.approx(scores.mean())

    whole = summary(tmp_path)
    infobatch, seen = InfoBatch(), []
    arguments |= {'algorithms': [infobatch], 'load_path': str(tmp_path / 'ckpt' / 'ep3.pt'), 'save_overwrite': True}
    trainer(tmp_path, max_duration='6ep', **arguments).fit()
    assert [entry['epoch'] for entry in summary(tmp_path)['score_histograms']['epochs']] == [0, 1, 3, 5]
    assert summary(tmp_path)['score_histograms']['epochs'][:2] == whole['score_histograms']['epochs'][:2]


def test_a_run_without_infobatch_has_no_histograms(tmp_path):
    trainer(tmp_path).fit()
    assert 'score_histograms' not in summary(tmp_path)


def test_an_epoch_cut_short_is_recorded_and_replaced_when_it_is_finished(tmp_path):
    run = trainer(tmp_path, loader=PrunedLoader(dataset(30), batch_size=10), max_duration='5ba')
    run.fit()
    cut = summary(tmp_path)
    assert [(entry['epoch'], entry['samples'], entry['batches']) for entry in cut['epochs']] == [(0, 30, 3), (1, 20, 2)]
    assert [entry['samples_full'] for entry in cut['epochs']] == [40, round(40 * 2 / 3)]
    assert cut['totals']['samples_full'] == 40 + round(40 * 2 / 3)
    # A run that ends in mid-epoch evaluates after FIT_END.
    assert cut['epochs'][1]['eval_accuracy'] is not None

    run.fit(duration='4ba')
    whole = summary(tmp_path)
    assert [(entry['epoch'], entry['samples']) for entry in whole['epochs']] == [(0, 30), (1, 30), (2, 30)]
    assert whole['totals']['samples_full'] == 120
    assert whole['epochs'][0] == cut['epochs'][0]


def test_reset_time_starts_a_new_list(tmp_path):
    run = trainer(tmp_path, max_duration='3ep')
    run.fit()
    run.fit(reset_time=True, duration='1ep')
    assert [entry['epoch'] for entry in summary(tmp_path)['epochs']] == [0]
    assert summary(tmp_path)['totals']['samples_seen'] == 20


@pytest.mark.parametrize('interval', ['1ep', '2ba', '1dur'])
def test_each_epoch_has_its_own_accuracy(tmp_path, interval):
    log = InMemoryLogger()
    trainer(tmp_path, loggers=log, eval_interval=interval).fit()
    # (epoch as the evaluation saw it, batch in it, accuracy), brought to the epoch that was under way or had just ended.
    last: dict[int, float] = {}
    for stamp, value in log.data['metrics/eval/MulticlassAccuracy']:
        last[int(stamp.epoch) - (int(stamp.batch_in_epoch) == 0)] = float(value)
    assert [entry['eval_accuracy'] for entry in summary(tmp_path)['epochs']] == [last.get(epoch) for epoch in range(3)]
    assert summary(tmp_path)['totals']['eval_accuracy'] == last[2]


def test_accuracy_is_none_without_evaluation(tmp_path):
    trainer(tmp_path, evaluate=False).fit()
    found = summary(tmp_path)
    assert {entry['eval_accuracy'] for entry in found['epochs']} == {None}
    assert found['totals']['eval_accuracy'] is None


def test_the_evaluator_named_eval_counts_and_a_later_trainer_eval_does_not(tmp_path):
    log = InMemoryLogger()
    evaluators = [
        Evaluator(label=label, dataloader=DataLoader(dataset(samples), batch_size=4), metric_names=['MulticlassAccuracy'])
        for label, samples in (('other', 9), ('eval', 17), ('third', 5))
    ]
    run = trainer(tmp_path, eval_dataloader=evaluators, loggers=log, max_duration='2ep')
    run.fit()
    before = summary(tmp_path)
    assert [entry['eval_accuracy'] for entry in before['epochs']] == [float(v) for _, v in log.data['metrics/eval/MulticlassAccuracy']]
    run.eval(DataLoader(TensorDataset(torch.zeros(4, 6), torch.arange(4) % 3), batch_size=4))
    run.fit(duration='1ep')
    assert summary(tmp_path)['epochs'][:2] == before['epochs']


def test_seconds_leave_evaluation_out(tmp_path, monkeypatch):
    """On a clock that moves 1 s a training step and 100 s an evaluation batch."""
    clock = SimpleNamespace(now=datetime.datetime(2020, 1, 1))

    class Tick(Callback):
        def batch_start(self, state, logger):
            clock.now += datetime.timedelta(seconds=1)

        def eval_batch_start(self, state, logger):
            clock.now += datetime.timedelta(seconds=100)

    shim = SimpleNamespace(datetime=SimpleNamespace(now=lambda: clock.now), timedelta=datetime.timedelta)
    monkeypatch.setattr(composer_trainer, 'datetime', shim)
    trainer(tmp_path, callbacks=[Tick()], eval_interval='2ba').fit()
    found = summary(tmp_path)
    assert [entry['seconds'] for entry in found['epochs']] == [3, 3, 3]
    assert found['totals']['train_seconds'] == 9


@pytest.mark.parametrize('checkpoint', ['ba4', 'ba6', 'ep1', 'ep2'])
def test_resume_neither_doubles_nor_loses_an_epoch(tmp_path, checkpoint):
    loader = PrunedLoader(dataset(), batch_size=8)

    class Select(Callback):
        def epoch_start(self, state, logger):
            loader.metrics = EpochMetrics(selection_seconds=1.0 + int(state.timestamp.epoch))

    def run(folder, **options):
        trainer(tmp_path, EfficiencyMonitor(save_folder=tmp_path / folder), loader=loader, callbacks=[Select()], **options).fit()
        return summary(tmp_path / folder)

    whole = run(
        'whole',
        save_folder=str(tmp_path / 'checkpoints'),
        save_interval='1ba' if 'ba' in checkpoint else '1ep',
        save_filename='ba{batch}.pt' if 'ba' in checkpoint else 'ep{epoch}.pt',
        save_latest_filename=None,
    )
    del loader.metrics  # a new process knows nothing of the selection before the checkpoint
    resumed = run('resumed', load_path=str(tmp_path / 'checkpoints' / f'{checkpoint}.pt'))
    for found in (whole, resumed):
        for entry in found['epochs']:
            del entry['seconds'], entry['cpu_seconds']
        del found['totals']['train_seconds'], found['totals']['train_cpu_seconds'], found['totals']['peak_memory_bytes']
    assert resumed == whole
    assert [entry['epoch'] for entry in resumed['epochs']] == [0, 1, 2]


def test_a_loss_that_is_not_a_number_still_gives_strict_json(tmp_path):
    class Diverged(ComposerModel):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 3)

        def forward(self, batch):
            return self.layer(batch[0])

        def loss(self, outputs, batch):
            return outputs.sum() * math.nan

    model = Diverged()
    options = {'model': model, 'optimizers': torch.optim.SGD(model.parameters(), lr=0.1)}
    trainer(tmp_path, evaluate=False, max_duration='1ep', **options).fit()
    assert summary(tmp_path)['epochs'][0]['train_loss'] is None
    assert 'NaN' not in (tmp_path / 'run' / 'summary.json').read_text()


def test_a_write_that_fails_leaves_the_last_summary_whole(tmp_path, monkeypatch):
    run = trainer(tmp_path, max_duration='1ep')
    run.fit()
    before = (tmp_path / 'run' / 'summary.json').read_bytes()

    def fail(self, target):
        raise OSError('disk full')

    monkeypatch.setattr(Path, 'replace', fail)
    with pytest.raises(OSError, match='disk full'):
        run.fit(duration='1ep')
    assert (tmp_path / 'run' / 'summary.json').read_bytes() == before


def test_another_accuracy_serves_where_there_is_no_multiclass_accuracy(tmp_path):
    module = torch.nn.Linear(6, 3)
    metrics = MetricCollection({'TopTwoAccuracy': MulticlassAccuracy(num_classes=3, average='micro', top_k=2)})
    model = ComposerClassifier(module, num_classes=3, val_metrics=metrics)
    log = InMemoryLogger()
    trainer(tmp_path, model=model, optimizers=torch.optim.SGD(module.parameters(), lr=0.1), max_duration='1ep', loggers=log).fit()
    assert summary(tmp_path)['totals']['eval_accuracy'] == float(log.data['metrics/eval/TopTwoAccuracy'][-1][1])


def test_the_cross_entropy_is_the_held_out_loss(tmp_path):
    module = torch.nn.Linear(6, 3)
    model = ComposerClassifier(module, num_classes=3, val_metrics=MetricCollection([CrossEntropy()]))
    log = InMemoryLogger()
    trainer(tmp_path, model=model, optimizers=torch.optim.SGD(module.parameters(), lr=0.1), max_duration='2ep', loggers=log).fit()
    found = summary(tmp_path)
    measured = [float(value) for _, value in log.data['metrics/eval/CrossEntropy']]
    assert [entry['eval_loss'] for entry in found['epochs']] == measured
    assert (found['totals']['eval_loss'], found['totals']['eval_accuracy']) == (measured[-1], None)


def test_neither_accuracy_nor_loss_among_the_metrics_is_said_once(tmp_path):
    module = torch.nn.Linear(6, 3)
    model = ComposerClassifier(module, num_classes=3, val_metrics=MetricCollection([MulticlassF1Score(num_classes=3)]))
    run = trainer(tmp_path, model=model, optimizers=torch.optim.SGD(module.parameters(), lr=0.1), max_duration='2ep')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        run.fit()
    said = [str(item.message) for item in caught if 'EfficiencyMonitor' in str(item.message)]
    assert said == [
        'EfficiencyMonitor: no metric of the evaluation has a name that ends in Accuracy or CrossEntropy (there are: MulticlassF1Score); '
        'eval_accuracy and eval_loss in summary.json stay null'
    ]
    totals = summary(tmp_path)['totals']
    assert (totals['eval_accuracy'], totals['eval_loss']) == (None, None)


def test_a_folder_that_cannot_be_made_is_refused_at_the_start(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match=r'save_folder: expected .*file'):
        trainer(tmp_path, EfficiencyMonitor(save_folder=tmp_path / 'file'))


def test_a_recipe_without_a_json_form_is_refused():
    with pytest.raises(InputError, match='recipe'):
        EfficiencyMonitor({'model': torch.nn.Linear(1, 1)})


def test_infobatch_and_adabatch_as_the_summary_has_them(tmp_path, make_trainer):
    infobatch = InfoBatch(0.5, 0.8)
    run = make_trainer(
        [infobatch, AdaBatch(2.0, '2ep')],
        max_duration='5ep',
        run_name='run',
        callbacks=[EfficiencyMonitor(save_folder=tmp_path)],
    )
    run.fit()
    found = summary(tmp_path)
    sizes = run.recorder.sizes  # of every batch, by epoch
    assert [entry['samples'] for entry in found['epochs']] == [sum(epoch) for epoch in sizes]
    assert [entry['batches'] for entry in found['epochs']] == [len(epoch) for epoch in sizes]
    assert [entry['batch_size'] for entry in found['epochs']] == [16, 16, 32, 32, 64]
    totals = found['totals']
    assert totals['samples_full'] == 5 * 203
    assert totals['samples_saved'] == infobatch.samples_saved == 5 * 203 - sum(map(sum, sizes)) > 0
    assert totals['saved_fraction'] == pytest.approx(totals['samples_saved'] / (5 * 203))


def test_selection_seconds_are_those_of_the_epochs_that_select(tmp_path, make_trainer):
    make_trainer(
        [SubsetSelection('adaptive-random', 0.25, '2ep')],
        max_duration='4ep',
        run_name='run',
        callbacks=[EfficiencyMonitor(save_folder=tmp_path)],
    ).fit()
    found = summary(tmp_path)
    assert [entry['selection_seconds'] > 0 for entry in found['epochs']] == [True, False, True, False]
    assert all(entry['selection_seconds'] < entry['seconds'] for entry in found['epochs'])
    assert found['totals']['samples_seen'] == 4 * round(0.25 * 203)


TWO_RANKS = """
import sys, torch
from composer import Trainer
from composer.models import ComposerClassifier
from composer.utils import dist
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from composer_effalgos.monitor import EfficiencyMonitor
from composer_effalgos.plan import EpochMetrics

torch.manual_seed(0)
data = TensorDataset(torch.randn(22, 6), torch.randint(0, 3, (22,)))
module = torch.nn.Linear(6, 3)
Trainer(
    model=ComposerClassifier(module, num_classes=3),
    train_dataloader=DataLoader(data, batch_size=4, sampler=dist.get_sampler(data, shuffle=True)),
    optimizers=torch.optim.SGD(module.parameters(), lr=0.1),
    max_duration='2ep', run_name='two', device='cpu', progress_bar=False, callbacks=[EfficiencyMonitor(save_folder=sys.argv[1])],
).fit()
"""


@pytest.mark.distributed
def test_two_ranks_write_one_global_summary(forked, tmp_path):
    script = tmp_path / 'two.py'
    script.write_text(TWO_RANKS)
    status, said = forked(str(script), str(tmp_path), ranks=2)
    assert status == 0, said
    found = summary(tmp_path, 'two')
    assert found['world_size'] == 2
    assert [(entry['samples'], entry['batches'], entry['batch_size']) for entry in found['epochs']] == [(22, 3, 8)] * 2
    assert found['totals']['samples_full'] == 44


class Endless(IterableDataset):
    def __iter__(self):
        return ((torch.full((8,), (number % 7) / 7), number % 3) for number in itertools.count())


def test_a_stream_of_unknown_length_has_nothing_to_save(make_trainer, tmp_path):
    data = DataSpec(DataLoader(Endless(), batch_size=4), get_num_tokens_in_batch=lambda batch: 5 * len(batch[1]))
    monitor = EfficiencyMonitor(save_folder=tmp_path)
    trainer = make_trainer([AdaBatch(2, '3ba')], train_loader=data, max_duration='6ba', callbacks=[monitor], run_name='stream')
    trainer.fit()
    totals = json.loads((tmp_path / 'stream' / 'summary.json').read_text())['totals']
    assert totals['samples_seen'] == totals['samples_full'] == 3 * 4 + 3 * 8
    assert totals['tokens_seen'] == totals['tokens_full'] == 5 * 36
    assert totals['saved_fraction'] == totals['tokens_saved_fraction'] == 0
