"""What the documents say holds: links lead somewhere, Python examples run, commands exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from composer import Callback
from composer.models import ComposerClassifier
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from composer_effalgos import AdaBatch
from composer_effalgos.cli import app
from composer_effalgos.datasets import build_dataset
from composer_effalgos.pruning import RULES
from composer_effalgos.recipes.schema import load_recipe
from composer_effalgos.subset_selection.strategies import STRATEGIES

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for pattern in ('*.md', 'docs/*.md', 'composer_effalgos/*/*.md', 'yamls/*.md', 'benchmarks/*.md') for path in ROOT.glob(pattern)
)
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', path.read_text(encoding='utf-8'), flags=re.MULTILINE | re.DOTALL)


def commands() -> Iterator[tuple[str, list[str]]]:
    """(document, words) of every command, comments and continued lines taken care of."""
    for path, name in zip(DOCUMENTS, IDS, strict=True):
        for block in blocks(path, 'bash'):
            for line in block.replace('\\\n', ' ').splitlines():
                if words := shlex.split(line, comments=True):
                    yield name, words


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a Markdown file."""
    text = re.sub(r'```.*?```', '', path.read_text(encoding='utf-8'), flags=re.DOTALL)
    headings = re.findall(r'^#+ (.*)$', text, flags=re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('path', DOCUMENTS, ids=IDS)
def test_relative_links_lead_somewhere(path):
    text = re.sub(r'```.*?```', '', path.read_text(encoding='utf-8'), flags=re.DOTALL)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if re.match(r'[a-z]+:', target):
            continue
        file, _, anchor = target.partition('#')
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


@pytest.mark.parametrize('name', RULES)
def test_every_pruning_rule_is_on_the_card_and_in_the_readme(name):
    assert name in anchors(ROOT / 'composer_effalgos/pruning/README.md')
    assert f'`{name}`' in (ROOT / 'README.md').read_text(encoding='utf-8').replace('`InfoBatch`', '`infobatch`')


def test_there_are_examples_and_commands_to_test():
    assert sum(len(blocks(path, 'python')) for path in DOCUMENTS) >= 6
    assert len(list(commands())) > 20


@pytest.fixture
def example() -> dict[str, Any]:
    """What the examples take for granted: data, loaders, a model, an optimizer, and names that the card has introduced."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    targets = (inputs[:, 0] > 0).long()
    dataset = TensorDataset(inputs, targets)
    model = ComposerClassifier(torch.nn.Linear(8, 2), num_classes=2)
    return {
        'dataset': dataset,
        'train_set': build_dataset('digits', 'train', limit=128),
        'eval_set': build_dataset('digits', 'eval'),
        'loader': DataLoader(dataset, batch_size=2),
        'train_dataloader': DataLoader(dataset, batch_size=2, shuffle=True),
        'eval_dataloader': DataLoader(dataset, batch_size=16),
        'model': model,
        'optimizer': torch.optim.SGD(model.parameters(), lr=0.01),
        'AdaBatch': AdaBatch,
        'Callback': Callback,
        'utilisation_of_the_last_epoch': lambda: 0.4,
        'epochs': 3,
        'batch_size': 16,
        'inputs_of': lambda indices: inputs[indices],
        'targets_of': lambda indices: targets[indices],
    }


@pytest.mark.parametrize(
    ('path', 'number'),
    [
        pytest.param(path, number, id=f'{name}-{number}')
        for path, name in zip(DOCUMENTS, IDS, strict=True)
        for number in range(len(blocks(path, 'python')))
    ],
)
def test_python_example_runs(path, number, example, tmp_path, monkeypatch):
    """As written, but for a tenth of the epochs."""
    monkeypatch.chdir(tmp_path)
    source = re.sub(r"'(\d+)0ep'", r"'\1ep'", blocks(path, 'python')[number])
    if 'ef.prune' in source:  # a loop of plain PyTorch
        example['model'] = torch.nn.Linear(8, 2)
        example['optimizer'] = torch.optim.SGD(example['model'].parameters(), lr=0.01)
    before = example['model'].state_dict()
    before = {name: value.clone() for name, value in before.items()}
    with patch.dict(STRATEGIES):  # an example adds one
        exec(compile(source, str(path), 'exec'), example)
    if 'fit()' in source or 'step()' in source:
        assert any(not torch.equal(value, before[name]) for name, value in example['model'].state_dict().items())


def test_training_commands_name_recipes_and_settings_that_exist():
    found = 0
    for name, words in commands():
        if 'composer_effalgos.train' in words:
            recipe, *overrides = words[words.index('composer_effalgos.train') + 1 :]
            assert words[:2] == ['composer', '-n'], name
            assert load_recipe(ROOT / recipe, overrides).dataset.batch_size % int(words[2]) == 0, (name, words)
            found += 1
    assert found > 10


def test_effalgos_commands_exist():
    for name, words in commands():
        if words[0] == 'effalgos':
            result = CliRunner().invoke(app, [words[1], '--help'])
            assert result.exit_code == 0, (name, words)
            for option in (word.partition('=')[0] for word in words[2:] if word.startswith('--')):
                assert option in result.output, (name, words)


def test_make_targets_and_scripts_exist():
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    for name, words in commands():
        if words[0] == 'make':
            for target in (word for word in words[1:] if '=' not in word):
                assert re.search(rf'^{target}:', makefile, flags=re.MULTILINE), (name, words)
        if words[0] == 'python' and words[1].endswith('.py'):
            assert (ROOT / words[1]).is_file(), (name, words)
