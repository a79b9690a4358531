"""The tutorials run from a clean kernel, with small settings, and what is stored of them is presentable."""

import importlib.util
import json
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / 'notebooks'
SPEC = importlib.util.spec_from_file_location('execute_notebooks', FOLDER / 'execute.py')
execute = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(execute)

SMALL = {
    '1_infobatch': {'EPOCHS': 3, 'LIMIT': 320, 'SEEDS': (17,)},
    '2_adabatch': {'EPOCHS': 4, 'LIMIT': 320, 'SEEDS': (17,)},
    '3_subset_selection': {'EPOCHS': 2, 'LIMIT': 320, 'SEEDS': (17,)},
    '4_combining': {'EPOCHS': 2, 'LIMIT': 320, 'SEEDS': (17,)},
    '5_sharp_minima': {'EPOCHS': 2, 'LIMIT': 320, 'LARGE': 64, 'POINTS': 4, 'DIRECTIONS': 1, 'SAMPLES': 64},
    '6_bring_your_own': {'EPOCHS': 4, 'LIMIT': 320},
    '7_language_model': {'EPOCHS': 3, 'LIMIT': 96, 'HELD_OUT': 32},
}
NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))


def test_every_notebook_has_small_settings():
    assert [path.stem for path in NOTEBOOKS] == sorted(SMALL)


@pytest.fixture
def forked_kernels(forked, monkeypatch, tmp_path):
    """Kernels begin with Composer imported, but nothing of a notebook run."""
    spec = {'argv': forked.command('-m', 'ipykernel_launcher', '-f', '{connection_file}'), 'display_name': 'Python', 'language': 'python'}
    (tmp_path / 'kernels' / 'python3').mkdir(parents=True)
    (tmp_path / 'kernels' / 'python3' / 'kernel.json').write_text(json.dumps(spec))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_a_clean_kernel(path, monkeypatch, request):
    if path != NOTEBOOKS[0]:  # one imports all for itself
        request.getfixturevalue('forked_kernels')
    monkeypatch.setenv('PYTHONPATH', str(FOLDER.parent))
    notebook = execute.run(path, SMALL[path.stem])
    assert execute.faults(notebook) == []


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_with_outputs_and_pictures(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert execute.faults(notebook) == []
    pictures = [output for cell in notebook.cells for output in cell.get('outputs', []) if 'image/png' in output.get('data', {})]
    assert pictures
    assert '## What to take away' in notebook.cells[-1].source
    assert path.stat().st_size < 1_000_000


def test_unknown_parameters_are_refused():
    with pytest.raises(KeyError, match='NOT_THERE'):
        execute.run(NOTEBOOKS[0], {'NOT_THERE': 1})


@pytest.mark.parametrize(
    ('output', 'fault'),
    [
        ({'output_type': 'stream', 'name': 'stderr', 'text': 'UserWarning'}, 'stderr'),
        ({'output_type': 'stream', 'name': 'stdout', 'text': 'saved to /home/someone/runs'}, 'path'),
        ({'output_type': 'stream', 'name': 'stdout', 'text': '10%\r20%'}, 'progress'),
        ({'output_type': 'error', 'ename': 'E', 'evalue': '', 'traceback': ['E']}, 'stderr'),
    ],
)
def test_what_must_not_be_stored(output, fault):
    cell = nbformat.v4.new_code_cell('1', execution_count=1, outputs=[nbformat.from_dict(output)])
    (found,) = execute.faults(nbformat.v4.new_notebook(cells=[cell]))
    assert fault in found


def test_a_cell_that_was_not_run_is_a_fault():
    assert execute.faults(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('1')])) == ['cell 0 was not run']
