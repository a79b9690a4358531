"""Sharded checkpoints, as FSDP has them: entry by entry, into what a new run has before its first ``fit``. No FSDP: it needs a GPU."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from composer.core import Callback, State
from composer.optim import CosineAnnealingScheduler

from composer_effalgos import AdaBatch, EfficiencyMonitor, InfoBatch, Pruning, SubsetSelection

ALGORITHMS = {
    'InfoBatch, AdaBatch': lambda: [InfoBatch(delta=1.0), AdaBatch(2, '12ba', lr='sqrt', beta2='rescale')],
    'a subset': lambda: [SubsetSelection('random', 0.5, '2ep', val_share=0.1)],
    'forgetting, a rule': lambda: [SubsetSelection('forgetting', 0.5, '1ep', kappa=0.5), Pruning('ucb', delta=1.0)],
}


class Save(Callback):
    """Saves as Composer does where checkpoints are sharded."""

    def __init__(self, folder, batches) -> None:
        self.folder, self.batches = folder, batches

    def batch_checkpoint(self, state, logger):
        if int(state.timestamp.batch) in self.batches:
            dcp.save({'state': state.state_dict()}, checkpoint_id=str(self.folder / str(int(state.timestamp.batch))))


@pytest.mark.parametrize('name', ALGORITHMS)
def test_a_run_resumed_from_one_goes_on_bit_by_bit(make_trainer, weights_of, monkeypatch, tmp_path, name):
    monkeypatch.setattr(State, 'fsdp_sharded_state_dict_enabled', True)

    def make(*callbacks):
        monitor = EfficiencyMonitor(save_folder=tmp_path / 'run')
        settings = {'schedulers': CosineAnnealingScheduler(), 'max_duration': '4ep', 'callbacks': [monitor, *callbacks]}
        return make_trainer(ALGORITHMS[name](), optimizer_of=lambda parameters: torch.optim.AdamW(parameters, lr=0.01), **settings)

    whole = make(Save(tmp_path, (6, 17, 21)))
    whole.fit()
    saved = sorted(int(folder.name) for folder in tmp_path.iterdir() if folder.name.isdigit())
    assert len(saved) >= 2
    for batch in saved:
        resumed = make()
        content = {'state': resumed.state.state_dict()}
        dcp.load(content, checkpoint_id=str(tmp_path / str(batch)))
        resumed.state.load_state_dict(content['state'], resumed.logger)
        resumed.fit()
        assert torch.equal(weights_of(whole), weights_of(resumed)), batch
        for one, other in zip(whole.state.algorithms, resumed.state.algorithms, strict=True):
            if isinstance(one, Pruning):
                assert one.samples_saved == other.samples_saved > 0
                assert torch.equal(one.scores, other.scores)
