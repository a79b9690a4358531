"""What the package imports is what its dependencies declare, and the algorithms need no more than Composer."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'composer_effalgos'
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
WITHOUT_DEPENDENCIES = {'cords', 'ffcv', 'mosaicml-streaming'}  # installed with --no-deps, see README.md
ENTRANCES = ('composer_effalgos', 'composer_effalgos.functional', 'composer_effalgos.recipes.schedulers')

USE_EVERY_ALGORITHM = """
import sys
import composer, composer.algorithms
before = set(sys.modules)
import composer_effalgos
new = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new == {'composer_effalgos'}, new

import torch
from composer import Trainer
from composer.models import ComposerClassifier
from torch.utils.data import DataLoader, TensorDataset
from composer_effalgos import AdaBatch, EfficiencyMonitor, InfoBatch, InputError, SubsetSelection
from composer_effalgos import functional as ef

dataset = TensorDataset(torch.randn(64, 8), torch.arange(64) % 3)
for strategy in ('gradmatch', 'glister', 'craig', 'el2n', 'milo', 'random'):
    model = ComposerClassifier(torch.nn.Linear(8, 3), num_classes=3)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(dataset, batch_size=8, shuffle=True),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration='2ep',
        algorithms=[InfoBatch(delta=1.0), AdaBatch(2, '1ep'), SubsetSelection(strategy, 0.5)],
        callbacks=[EfficiencyMonitor()],
        device='cpu',
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
assert len(ef.prune(torch.rand(64), 0.5, torch.Generator())[0]) < 64
try:
    SubsetSelection('file', path='subset.parquet')
except InputError as error:
    print(error)
"""


DISTRIBUTIONS = metadata.packages_distributions()


def normalised(name: str) -> str:
    return re.sub('[-_.]+', '-', name).lower()


def distribution_of(module: str) -> str:
    return normalised(DISTRIBUTIONS.get(module, [module])[0])


def imported(path: Path, *, on_import: bool) -> Iterator[str]:
    """Modules that a file imports: those it imports when it is imported itself, or all."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for node in tree.body if on_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0, f'{path}: a relative import'
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def third_party(modules: Iterator[str]) -> set[str]:
    names = {module.partition('.')[0] for module in modules} - set(sys.stdlib_module_names) - {'composer_effalgos'}
    return {distribution_of(name) for name in names}


def declared(*extras: str) -> set[str]:
    """Distributions that the project asks for, with some of its extras."""
    lines = PROJECT['dependencies'] + [line for extra in extras for line in PROJECT['optional-dependencies'][extra]]
    return {normalised(Requirement(line).name) for line in lines}


def reached(entrances: tuple[str, ...]) -> set[Path]:
    """Files of the package that are read when these modules are imported."""
    found, todo = set(), list(entrances)
    while todo:
        parts = todo.pop().split('.')
        path = ROOT.joinpath(*parts)
        path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
        if path in found or not path.is_file():
            continue
        found.add(path)
        todo += ['.'.join(parts[:-1])] * (len(parts) > 1)
        todo += [module for module in imported(path, on_import=True) if module.startswith('composer_effalgos')]
    return found


def test_algorithms_import_what_the_base_installation_has():
    files = reached(ENTRANCES)
    assert PACKAGE / 'plan' / 'loader.py' in files
    assert PACKAGE / 'recipe.py' not in files
    for path in files:
        assert third_party(imported(path, on_import=True)) <= declared(), path


def test_everything_imported_is_declared():
    for path in PACKAGE.rglob('*.py'):
        known = declared('recipes', 'text', 'search', 'ffcv', 'streaming', 'cords') | WITHOUT_DEPENDENCIES
        assert third_party(imported(path, on_import=False)) <= known, path
        needed = declared('recipes') | ({'ffcv', 'numba'} if path.name == 'ffcv_parts.py' else set())
        assert third_party(imported(path, on_import=True)) <= needed, path  # the rest is imported where it is used


@pytest.fixture
def base_installation(tmp_path: Path) -> Path:
    """A folder with links to what the dependencies without extras bring, and nothing else."""
    folder, seen = tmp_path / 'site', set()
    todo = [(Requirement(line), '') for line in PROJECT['dependencies']]  # each with the extra for which it is asked
    folder.mkdir()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({'extra': extra}):
            continue
        for extra in ('', *requirement.extras):
            if (requirement.name, extra) in seen:
                continue
            seen.add((requirement.name, extra))
            distribution = metadata.distribution(requirement.name)
            todo += [(Requirement(line), extra) for line in distribution.requires or []]
            for top in {file.parts[0] for file in distribution.files or []} - {'..', '__pycache__'}:
                if not (folder / top).exists():
                    (folder / top).symlink_to(distribution.locate_file(top))
    return folder


def test_every_algorithm_works_without_the_extras(base_installation, tmp_path):
    done = subprocess.run(
        [sys.executable, '-S', '-c', USE_EVERY_ALGORITHM],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': f'{base_installation}{os.pathsep}{ROOT}'},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "path: expected pyarrow to be installed for subset files; pip install 'composer-effalgos[recipes]'"
