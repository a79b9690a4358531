"""A resumed run saves what the run that was never stopped saves, entry by entry, as Composer's own test of resumption compares them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from algorithm_settings import SETTINGS
from composer.core import Event, State
from composer.optim import LinearScheduler

from composer_effalgos import EfficiencyMonitor, InfoBatch
from composer_effalgos.utils.errors import CheckpointError

SAMPLES = 203
# of the clock on the wall, of the process, or of the folder
TIMES = {
    'total_wct',
    'iteration_wct',
    'epoch_wct',
    'batch_wct',
    'seconds',
    'cpu_seconds',
    'selection_seconds',
    'peak_memory',
    'run_name',
    'CheckpointSaver',
}


def differences(one: Any, other: Any, at: str = '') -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        missing = [f'{at}.{key}: in one alone' for key in {*one} ^ {*other}]
        return missing + [
            line for key in one if key in other and key not in TIMES for line in differences(one[key], other[key], f'{at}.{key}')
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f'{at}: {len(one)} and {len(other)} entries']
        return [line for number, (a, b) in enumerate(zip(one, other, strict=True)) for line in differences(a, b, f'{at}[{number}]')]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [f'{at}: {one} and {other}']
    if isinstance(one, np.ndarray):
        return [] if np.array_equal(one, other) else [f'{at}: {one} and {other}']
    return [] if type(one) is type(other) and one == other else [f'{at}: {one!r} and {other!r}']


def every_batch_and_epoch(state: State, event: Event) -> bool:
    # one of the two at a time: Composer saves once after a batch
    last = int(state.timestamp.batch_in_epoch) == state.dataloader_len
    return event == Event.EPOCH_CHECKPOINT or (event == Event.BATCH_CHECKPOINT and not last)


@pytest.mark.parametrize('row', SETTINGS)
def test_a_resumed_runs_checkpoints_are_those_of_the_unbroken_run(start, tmp_path, row):
    def run(folder: str, **arguments) -> dict[tuple[int, ...], Path]:
        trainer = start(
            row,
            SAMPLES,
            callbacks=[EfficiencyMonitor(save_folder=tmp_path / folder)],
            schedulers=LinearScheduler(),
            max_duration='4ep',
            save_folder=str(tmp_path / folder / 'saved'),
            save_interval=every_batch_and_epoch,
            save_filename='{epoch}-{batch_in_epoch}.pt',
            save_latest_filename=None,
            run_name='run',
            **arguments,
        )
        trainer.fit()
        trainer.close()
        return {tuple(map(int, path.stem.split('-'))): path for path in (tmp_path / folder / 'saved').glob('*.pt')}

    whole = run('whole')
    for point in ((2, 0), (2, 1)):  # at an epoch's end, and within one
        resumed = run(f'resumed at {point}', load_path=str(whole[point]))
        assert set(resumed) == {later for later in whole if later > point}
        for later in {*sorted(resumed)[:2], *((epoch, within) for epoch, within in resumed if within == 0), max(resumed)}:
            states = [torch.load(runs[later], weights_only=False) for runs in (whole, resumed)]
            assert not differences(states[0]['rng'], states[1]['rng'])
            assert not differences(states[0]['state'], states[1]['state'])


def test_a_checkpoint_without_the_planner_is_refused(make_trainer, tmp_path):
    """As an earlier version saved it, under another name: the clock of a pruned run cannot be told from the timestamp."""
    make_trainer(
        [InfoBatch(delta=1.0)], max_duration='4ep', save_folder=str(tmp_path), save_interval='1ba', save_filename='{batch}.pt'
    ).fit()
    content = torch.load(tmp_path / '26.pt', weights_only=False)
    content['state']['callbacks']['Plan'] = content['state']['callbacks'].pop('EpochPlanner')
    torch.save(content, tmp_path / 'old.pt')
    resumed = make_trainer([InfoBatch(delta=1.0)], max_duration='4ep', load_path=str(tmp_path / 'old.pt'))
    with pytest.raises(CheckpointError, match=r'state\.callbacks: expected the state of EpochPlanner'):
        resumed.fit()
