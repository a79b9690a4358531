"""What a user gets who installs the package without a checkout."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import composer_effalgos

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout without a network."""
    folder = tmp_path_factory.mktemp('wheel')
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--quiet', '-w', str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (path,) = folder.glob('*.whl')
    return path


def test_a_wheel_holds_the_package_and_the_recipes(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f'composer_effalgos/{path.relative_to(ROOT)}' for path in (ROOT / 'yamls').rglob('*.yaml')}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / 'composer_effalgos').rglob('*.py')}
    assert recipes
    assert recipes <= names
    assert sources <= names
    assert {'composer_effalgos/py.typed', 'composer_effalgos/pruning/infobatch.md', 'composer_effalgos/report/report.html.j2'} <= names
    assert not [name for name in names if name.startswith(('tests/', 'benchmarks/', 'notebooks/'))]


def test_recipes_are_listed_from_a_wheel_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
    (tmp_path / 'elsewhere').mkdir()
    done = subprocess.run(
        [sys.executable, '-m', 'composer_effalgos.cli', 'recipes'],
        cwd=tmp_path / 'elsewhere',
        env=os.environ | {'PYTHONPATH': str(tmp_path / 'site')},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert str(tmp_path / 'site' / 'composer_effalgos' / 'yamls' / 'digits' / 'digits_infobatch.yaml') in done.stdout


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    project = re.search(r'^version = "(.*)"$', (ROOT / 'pyproject.toml').read_text(encoding='utf-8'), flags=re.MULTILINE)
    assert citation['version'] == composer_effalgos.__version__ == project.group(1)
    assert {'cff-version', 'message', 'title', 'authors', 'references'} <= citation.keys()
