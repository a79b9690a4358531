"""Hashes of what runs train on, to show that a change of the code changes no number.

Every recipe of ``yamls/digits``, shortened, and the small runs of ``tests/scripts/train_small.py`` on one rank, on two ranks, and killed
and resumed: of each the kept samples in their order, their weights, the learning rate of every batch, and the final weights. ``--check``
trains again and compares with the stored file. The numbers behind the hashes depend on the machine and on the versions: write the file
before a change, and check after it, on the same machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback
from torch import Tensor
from torch.utils._pytree import tree_leaves

from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.schema import load_recipe

REPOSITORY = Path(__file__).resolve().parent.parent
STORED = Path(__file__).resolve().parent / 'results' / 'plan_hashes.json'
SETTINGS = ['max_duration=6ep', 'dataset.limit=512', 'progress_bar=false', 'run_name=hashes']
SMALL = {
    'one rank': ([], 1),
    'two ranks': (['--batch-size', '4', '--workers', '1'], 2),
    'forgetting on two ranks': (['--subset', 'forgetting', '--kappa', '0.5', '--val-share', '0.1', '--batch-size', '4'], 2),
    'milo': (['--subset', 'milo', '--kappa', '0.1'], 1),
}
RESUMED = {'one rank': 29, 'two ranks': 29}
"""The small runs that are killed and resumed, and the batch at which."""


def digest(values: Any) -> str:
    """A short hash of tensors and numbers, however nested, bit by bit."""
    found = hashlib.sha256()
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            found.update(str((leaf.dtype, tuple(leaf.shape))).encode())
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()[:16]


class Watch(Callback):
    """Notes the samples, their weights and the learning rates of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self._lrs: list[float] = []

    def batch_start(self, state, logger):
        self._lrs.append(state.optimizers[0].param_groups[0]['lr'])

    def epoch_end(self, state, logger):
        plan = getattr(state.dataloader, 'plan', None)  # the baseline has none
        entry = {'lr': digest(self._lrs), 'batches': len(self._lrs)}
        if plan is not None:
            entry |= {'samples': digest(plan.order), 'weights': digest(plan.weights), 'kept': len(plan.order)}
        self.epochs.append(entry)
        self._lrs = []


def of_recipe(path: Path, folder: str) -> dict[str, Any]:
    """Trains a recipe in this process, and writes to a folder."""
    trainer = build_trainer(load_recipe(path, [*SETTINGS, f'save_folder={folder}']))
    watch = Watch()
    trainer.state.callbacks.append(watch)
    trainer.fit()
    trainer.close()
    return {'epochs': watch.epochs, 'final_weights': digest(trainer.state.model.state_dict())}


def of_small_run(folder: str, arguments: list[str], ranks: int, kill_at: int | None = None) -> dict[str, Any]:
    """Trains the small network of the tests in ``ranks`` processes of its own, killed at a batch and resumed if that is given."""
    script = [str(REPOSITORY / 'tests' / 'scripts' / 'train_small.py'), '--folder', folder, *arguments]
    launcher = [] if ranks == 1 else ['-m', 'composer.cli', '-n', str(ranks)]
    environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY)}
    for extra in ([],) if kill_at is None else (['--kill-at', str(kill_at)], []):
        command = [sys.executable, *launcher, *script, *extra]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPOSITORY, check=False)
        if done.returncode and not extra:
            raise RuntimeError(f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}')
    run = torch.load(Path(folder) / 'final.pt', weights_only=False)
    shown = {'final_weights': digest(run['model']), 'optimizer': digest(run['optimizer']), 'scores': digest(run['scores'].nan_to_num(-1))}
    shown['samples_saved'] = run['saved']
    if kill_at is None:
        shown['epochs'] = [{name: digest(rank[name]) for name in ('order', 'weights')} for rank in run['epochs'][0].values()]
    return shown


def machine() -> dict[str, str]:
    """What the last bits of every number depend on."""
    return {'torch': torch.__version__, 'cpu': torch.backends.cpu.get_cpu_capability()}


def measure() -> dict[str, Any]:
    """Everything, as the stored file has it."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {**machine(), 'recipes': {}, 'small': {}}
    for path in sorted((REPOSITORY / 'yamls' / 'digits').glob('*.yaml')):
        with tempfile.TemporaryDirectory() as folder:
            found['recipes'][path.stem] = of_recipe(path, folder)
    for name, (arguments, ranks) in SMALL.items():
        with tempfile.TemporaryDirectory() as folder:
            found['small'][name] = of_small_run(folder, arguments, ranks)
    for name, kill_at in RESUMED.items():
        with tempfile.TemporaryDirectory() as folder:
            found['small'][f'{name}, resumed'] = of_small_run(folder, *SMALL[name], kill_at)
    return found


def differences(before: Any, after: Any, at: str = '') -> list[str]:
    """The entries that differ, each as ``place: before -> after``."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [line for key in {**before, **after} for line in differences(before.get(key), after.get(key), f'{at}/{key}')]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [line for number, pair in enumerate(zip(before, after, strict=True)) for line in differences(*pair, f'{at}/{number}')]
    return [] if before == after else [f'{at}: {before} -> {after}']


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='compare with the stored file, and leave it as it is')
    parser.add_argument('--out', type=Path, default=STORED)
    options = parser.parse_args()
    if not options.check:
        options.out.write_text(json.dumps(measure(), indent=1) + '\n', encoding='utf-8')
        return 0
    stored = json.loads(options.out.read_text(encoding='utf-8'))
    if other := {key: stored.get(key) for key, value in machine().items() if stored.get(key) != value}:
        wanted = 'write it at the earlier commit first (--out)'
        print(f'error: {options.out}: written with {other}, this machine has {machine()}; {wanted}', file=sys.stderr)
        return 2
    lines = differences(stored, measure())
    print('\n'.join(lines) or f'the same as in {options.out.name}')
    return 1 if lines else 0


if __name__ == '__main__':
    sys.exit(main())
