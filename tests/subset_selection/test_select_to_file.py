"""``effalgos select``: from a recipe and a checkpoint to a file, and from the file to a training."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from composer_effalgos import cli
from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.schema import load_recipe

RECIPE = """
run_name: small
seed: 3
max_duration: 3ep
dataset: {name: digits, batch_size: 32, limit: 160}
model: {name: resnet20_cifar}
optimizer: {name: sgd, lr: 0.05}
eval_interval: 0
progress_bar: false
save_interval: 1ep
algorithms:
  subset_selection: {strategy: gradmatch, fraction: 0.4, select_every: 1ep}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'small.yaml'
    path.write_text(RECIPE)
    return path


def select(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, 'argv', ['effalgos', 'select', *map(str, argv)])
    try:
        return cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)


def fit(recipe, *overrides):
    trainer = build_trainer(load_recipe(recipe, overrides))
    trainer.fit()
    trainer.close()
    return trainer


def test_selects_what_training_would_have_and_trains_on_it(recipe, tmp_path, monkeypatch, capsys):
    trainer = fit(recipe)
    checkpoints = tmp_path / 'runs' / 'small' / 'checkpoints'
    out = tmp_path / 'subset.parquet'
    before = sorted(tmp_path.rglob('*'))
    assert select(monkeypatch, recipe, '--checkpoint', checkpoints / 'ep2-ba4-rank0.pt', '--out', out) == 0
    assert sorted(tmp_path.rglob('*')) == sorted([*before, out])  # and nothing else is left behind
    assert capsys.readouterr().out.strip() == f'64 of 160 samples by gradmatch; {out}'
    table = pq.read_table(out)
    trained_on = trainer.state.algorithms[0]  # selected from the weights of the second epoch's end
    assert table['index'].to_pylist() == trained_on.indices.tolist()
    torch.testing.assert_close(torch.tensor(table['weight'].to_pylist()), trained_on.weights)
    facts = json.loads(table.schema.metadata[b'composer_effalgos.subset'])
    assert facts['num_samples'] == 160
    assert (facts['dataset'], facts['strategy'], facts['epoch']) == ('digits', 'gradmatch', 2)

    subset = ['run_name=again', 'algorithms.subset_selection={strategy: file, path: subset.parquet}', 'max_duration=1ep']
    again = fit(recipe, *subset)
    assert torch.equal(again.state.algorithms[0].indices, trained_on.indices)
    torch.testing.assert_close(again.state.algorithms[0].weights, trained_on.weights)


def test_selects_with_the_first_weights(recipe, tmp_path, monkeypatch):
    out = tmp_path / 'subset.parquet'
    assert select(monkeypatch, recipe, 'algorithms.subset_selection.strategy=k-center', '--out', out) == 0
    table = pq.read_table(out)
    assert len(set(table['index'].to_pylist())) == 64
    assert set(table['weight'].to_pylist()) == {1.0}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['algorithms=null'], 'algorithms.subset_selection: missing'),
        (['--out', 'none/subset.parquet'], '--out: expected a file in a folder that exists, got none/subset.parquet'),
        (['--checkpoint', 'none.pt'], '--checkpoint: no file none.pt'),
        (['--checkpoint', 'small.yaml'], '--checkpoint: small.yaml is not a readable weights file'),
        (['algorithms.subset_selection={strategy: file, path: none.parquet}'], 'none.parquet: no such file'),
        (['algorithms.subset_selection={strategy: forgetting, fraction: 0.4, kappa: 0.5}'], 'forgetting has counted nothing yet'),
        (['algorithms.subset_selection.fraction=0.1'], 'expected at least one batch'),
    ],
)
def test_refuses_in_one_line(recipe, tmp_path, monkeypatch, capsys, arguments, message):
    arguments = arguments if '--out' in arguments else [*arguments, '--out', 'subset.parquet']
    assert select(monkeypatch, recipe, *arguments) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / 'subset.parquet').exists()
    assert not list(tmp_path.glob('.subset*'))


def test_code_in_a_checkpoint_is_not_run_and_weights_of_another_network_are_refused(recipe, tmp_path, monkeypatch, capsys):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'was_run',)

    other = {'state': {'model': {'a': torch.zeros(2)}}}
    for content, message in (({'state': Code()}, 'not a readable weights file'), (other, 'of another model')):
        torch.save(content, tmp_path / 'other.pt')
        assert select(monkeypatch, recipe, '--out', 'subset.parquet', '--checkpoint', 'other.pt') == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / 'was_run').exists()
    assert not (tmp_path / 'subset.parquet').exists()
