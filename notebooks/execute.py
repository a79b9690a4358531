"""Runs the notebooks from a clean kernel and stores their outputs: ``python notebooks/execute.py [NOTEBOOK ...]``, or ``make notebooks``.

A notebook that fails, or that would store an error, a warning or a path of this machine, is left as it was.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def run(path: Path, parameters: dict[str, Any] | None = None) -> nbformat.NotebookNode:
    """Runs a notebook in an empty folder.

    Args:
        path: The notebook.
        parameters: Values in place of those that the cell with the tag ``parameters`` sets.

    Returns:
        The notebook with its outputs.

    Raises:
        KeyError: A parameter that the notebook does not have.
        CellExecutionError: A cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        cell = next(cell for cell in notebook.cells if 'parameters' in cell.metadata.get('tags', []))
        namespace: dict[str, Any] = {}
        exec(cell.source, namespace)
        if unknown := parameters.keys() - namespace.keys():
            raise KeyError(f'{path.name} has no parameters {sorted(unknown)}')
        cell.source += '\n' + '\n'.join(f'{name} = {value!r}' for name, value in parameters.items())
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=1800,
            record_timing=False,
            coalesce_streams=True,
            resources={'metadata': {'path': folder}},
            extra_arguments=['--log-level=ERROR'],
        )
        client.execute()
    notebook.metadata['language_info'] = {'name': 'python'}
    return notebook


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """What must not be stored: cells that were not run, errors, warnings, progress bars, and paths of a machine."""
    found = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != 'code':
            continue
        if cell.execution_count is None:
            found.append(f'cell {number} was not run')
        for output in cell.outputs:
            text = str(output.get('text', '')) + str(output.get('data', {}).get('text/plain', '')) + str(output.get('traceback', ''))
            if output.output_type == 'error' or output.get('name') == 'stderr':
                found.append(f'cell {number} fails or writes to stderr: {text[:300]}')
            elif re.search(r'(?<![\w.])/(home|root|tmp|usr|var|work|Users)/|\r', text):
                found.append(f'cell {number} shows a path of this machine or a progress bar: {text[:300]}')
    return found


def main(arguments: list[str]) -> int:
    """Runs and stores the notebooks that are named, or all."""
    failed = False
    for path in [Path(argument) for argument in arguments] or sorted(FOLDER.glob('*.ipynb')):
        print(path.name, flush=True)
        notebook = run(path)
        if found := faults(notebook):
            failed = True
            print('\n'.join(f'error: {path.name}: {fault}' for fault in found), file=sys.stderr)
            continue
        part = path.with_suffix('.part')
        nbformat.write(notebook, part)
        part.replace(path)
    return int(failed)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
