"""Tokens in the summary, held against a plain count."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from composer import Callback, ComposerModel
from composer.core import DataSpec
from composer.loggers import InMemoryLogger
from composer.metrics import LanguageCrossEntropy
from torch.utils.data import DataLoader, Dataset

from composer_effalgos import EfficiencyMonitor, InfoBatch, SubsetSelection

SAMPLES, LENGTH, VOCABULARY = 43, 6, 11
TOTALS = ('tokens_seen', 'tokens_full', 'tokens_saved_fraction', 'tokens_per_second')


class Sentences(Dataset):
    """Sequences in one length or several; the short ones are padded."""

    def __init__(self, padded: bool) -> None:
        rng = np.random.default_rng(0)
        self.tokens = torch.from_numpy(rng.integers(0, VOCABULARY, (SAMPLES, LENGTH)))
        lengths = torch.from_numpy(rng.integers(2, LENGTH + 1, SAMPLES)) if padded else torch.full((SAMPLES,), LENGTH)
        self.mask = (torch.arange(LENGTH) < lengths[:, None]).long()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = torch.where(self.mask[index] == 1, self.tokens[index], -100)
        return {'input_ids': self.tokens[index], 'attention_mask': self.mask[index], 'labels': labels}


class Bigrams(ComposerModel):
    """Predicts each token from the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, batch):
        return self.table(batch['input_ids'])

    def loss(self, outputs, batch):
        return torch.nn.functional.cross_entropy(outputs[:, :-1].flatten(0, 1), batch['labels'][:, 1:].flatten())

    def eval_forward(self, batch, outputs=None):
        return self(batch)

    def get_metrics(self, is_train=False):
        return {} if is_train else {'LanguageCrossEntropy': LanguageCrossEntropy()}

    def update_metric(self, batch, outputs, metric):
        metric.update(outputs[:, :-1].flatten(0, 1), batch['labels'][:, 1:].flatten())


class Count(Callback):
    """Counts the batches' positions and those that are no padding, by epoch."""

    def __init__(self) -> None:
        self.positions: dict[int, int] = {}
        self.real: dict[int, int] = {}

    def batch_start(self, state, logger):
        epoch = int(state.timestamp.epoch)
        for counts, tensor in ((self.positions, torch.ones_like(state.batch['input_ids'])), (self.real, state.batch['attention_mask'])):
            counts[epoch] = counts.get(epoch, 0) + int(tensor.sum())


def train(make_trainer, folder: Path, algorithms=(), padded=False, spec=False, **options) -> tuple[dict, Count]:
    count, data = Count(), Sentences(padded)
    loader = DataLoader(data, batch_size=8, shuffle=True)
    if spec:
        loader = DataSpec(loader, get_num_tokens_in_batch=lambda batch: int(batch['attention_mask'].sum()))
    callbacks = [EfficiencyMonitor(save_folder=folder), count, *options.pop('callbacks', [])]
    options = {'max_duration': '6ep', 'eval_dataloader': DataLoader(data, batch_size=8)} | options
    make_trainer(algorithms, model=Bigrams(), train_loader=loader, run_name='run', callbacks=callbacks, **options).fit()
    return json.loads((folder / 'run' / 'summary.json').read_text()), count


@pytest.mark.parametrize(
    'algorithm', [None, InfoBatch, lambda: SubsetSelection('random', 0.3, '2ep')], ids=['plain', 'infobatch', 'subset']
)
def test_sequences_of_one_length(make_trainer, tmp_path, algorithm):
    log = InMemoryLogger()
    found, count = train(make_trainer, tmp_path, [algorithm()] if algorithm else [], loggers=log)
    assert {entry['epoch']: entry['tokens'] for entry in found['epochs']} == count.positions
    assert [entry['tokens'] for entry in found['epochs']] == [LENGTH * entry['samples'] for entry in found['epochs']]
    totals = found['totals']
    seen = sum(count.positions.values())
    assert (totals['tokens_seen'], totals['tokens_full']) == (seen, 6 * SAMPLES * LENGTH)
    assert totals['tokens_saved_fraction'] == pytest.approx(totals['saved_fraction'])
    assert (totals['saved_fraction'] > 0) == (algorithm is not None)
    assert totals['tokens_per_second'] == pytest.approx(seen / totals['train_seconds'])
    logged = {name: [float(value) for _, value in log.data[f'efficiency/{name}']] for name in TOTALS if name != 'tokens_full'}
    assert logged['tokens_seen'] == list(np.cumsum(list(count.positions.values())))
    assert logged['tokens_saved_fraction'][-1] == totals['tokens_saved_fraction']
    assert logged['tokens_per_second'] == pytest.approx([entry['tokens'] / entry['seconds'] for entry in found['epochs']])


@pytest.mark.parametrize('spec', [False, True])
def test_padding_counts_unless_the_data_spec_leaves_it_out(make_trainer, tmp_path, spec):
    found, count = train(make_trainer, tmp_path, [InfoBatch()], padded=True, spec=spec)
    expected = count.real if spec else count.positions
    assert {entry['epoch']: entry['tokens'] for entry in found['epochs']} == expected
    a_full_epoch = int(Sentences(True).mask.sum()) if spec else SAMPLES * LENGTH
    totals = found['totals']
    assert (totals['tokens_seen'], totals['tokens_full']) == (sum(expected.values()), 6 * a_full_epoch)
    assert totals['tokens_saved_fraction'] == pytest.approx(1 - sum(expected.values()) / (6 * a_full_epoch))
    # the samples that are left out are not those of average length
    assert (totals['tokens_saved_fraction'] == pytest.approx(totals['saved_fraction'])) == (not spec)


def test_without_a_full_epoch_the_rest_is_in_proportion(make_trainer, tmp_path):
    found, count = train(make_trainer, tmp_path, [SubsetSelection('random', 0.5, '2ep')], padded=True, spec=True)
    samples = sum(entry['samples'] for entry in found['epochs'])
    a_sample = sum(count.real.values()) / samples
    assert found['totals']['tokens_full'] == 6 * round(a_sample * SAMPLES)


def test_an_epoch_cut_short_and_a_resumed_run(make_trainer, tmp_path):
    def run(folder, **options):
        return train(make_trainer, tmp_path / folder, [InfoBatch()], True, True, max_duration='15ba', **options)[0]

    saved = {'save_folder': str(tmp_path / 'ckpt'), 'save_interval': '1ba', 'save_filename': 'ba{batch}.pt'}
    whole = run('whole', **saved)
    assert whole['epochs'][-1]['tokens'] < whole['epochs'][0]['tokens']  # the last epoch was cut short
    resumed = run('resumed', load_path=str(tmp_path / 'ckpt' / 'ba9.pt'))
    for found in (whole, resumed):
        assert found['totals']['tokens_seen'] == sum(entry['tokens'] for entry in found['epochs'])
    assert [entry['tokens'] for entry in resumed['epochs']] == [entry['tokens'] for entry in whole['epochs']]
    assert resumed['totals']['tokens_full'] == whole['totals']['tokens_full']


def test_images_have_none(make_trainer, tmp_path):
    log = InMemoryLogger()
    monitor = EfficiencyMonitor(save_folder=tmp_path)
    make_trainer(max_duration='1ep', run_name='run', callbacks=[monitor], loggers=log).fit()
    found = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert [entry['tokens'] for entry in found['epochs']] == [None]
    assert {name: found['totals'][name] for name in TOTALS} == dict.fromkeys(TOTALS)
    assert not [name for name in log.data if 'token' in name]
