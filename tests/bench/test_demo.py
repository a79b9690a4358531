import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from composer_effalgos.bench import demo
from composer_effalgos.bench.demo import run_demo
from composer_effalgos.cli import main
from composer_effalgos.errors import InputError

RECIPE = """# One epoch of digits
max_duration: 1ep
dataset: {{name: digits, batch_size: 256}}
model: {{name: resnet20_cifar}}
optimizer: {{name: sgd, lr: 0.1}}
{more}
"""


@pytest.fixture
def recipes(tmp_path) -> Path:
    """Recipes in a folder whose name YAML would read as a mapping, if it were not quoted."""
    folder = tmp_path / 'my: recipes'
    folder.mkdir()
    (folder / 'tiny_baseline.yaml').write_text(RECIPE.format(more=''))
    (folder / 'tiny_broken.yaml').write_text(RECIPE.format(more='load_path: no_such_checkpoint.pt'))
    return folder


def test_a_run_that_fails_is_named_and_the_others_go_on(recipes, tmp_path, monkeypatch):
    out = tmp_path / 'out: put'
    stale = out / 'tiny_broken_seed1'
    stale.mkdir(parents=True)
    (stale / 'summary.json').write_text('{"left by": "an earlier demo"}')
    text = io.StringIO()
    monkeypatch.chdir(tmp_path)
    failures = run_demo(
        out, recipes={'tiny_baseline': (1, 2), 'tiny_broken': (1,)}, folder=recipes, console=Console(file=text, width=160, no_color=True)
    )
    assert len(failures) == 1
    assert failures[0].startswith('tiny_broken_seed1: ')
    assert 'no_such_checkpoint.pt' in failures[0]
    assert '\n' not in failures[0]
    assert not (stale / 'summary.json').exists()

    accuracies = []
    for seed in (1, 2):
        summary = json.loads((out / f'tiny_baseline_seed{seed}' / 'summary.json').read_text())
        assert (summary['seed'], summary['recipe']['seed'], len(summary['epochs'])) == (seed, seed, 1)
        accuracies.append(summary['totals']['eval_accuracy'])
    assert accuracies[0] != accuracies[1], 'the seed reaches the run'
    line = next(line for line in text.getvalue().splitlines() if 'tiny_baseline ' in line)
    assert f'{50 * sum(accuracies):.2f} ±' in line
    assert f'Report: {out}/report.html' in text.getvalue()
    assert (out / 'report.html').is_file()


def test_every_recipe_is_checked_before_the_first_run(recipes, tmp_path):
    with pytest.raises(InputError, match=r'missing\.yaml'):
        run_demo(tmp_path / 'out', recipes={'tiny_baseline': (1,), 'missing': (1,)}, folder=recipes)
    with pytest.raises(InputError, match='max_duration'):
        run_demo(tmp_path / 'out', recipes={'tiny_baseline': (1,)}, folder=recipes, overrides=['max_duration=3ba'])
    assert not (tmp_path / 'out').exists()


def test_the_projects_own_demo_recipes_are_valid():
    folder = Path(__file__).parents[2] / 'yamls' / 'digits'
    for name in demo.DEMO:
        assert demo._epochs(folder / f'{name}.yaml', []) > 0


def test_the_command_line_prints_one_error_line_and_its_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['effalgos', 'report', str(tmp_path)])
    assert main() == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    assert captured.err.startswith(f'error: {tmp_path}: no summary.json')
    assert captured.err.count('\n') == 1

    monkeypatch.setattr('composer_effalgos.cli.run_demo', lambda out: [f'{out}: run one failed', 'run two failed'])
    monkeypatch.setattr('sys.argv', ['effalgos', 'demo', '--out', 'there'])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == 'error: there: run one failed\nerror: run two failed\n'
