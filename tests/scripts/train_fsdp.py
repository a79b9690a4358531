"""Trains a small GPT-2 with InfoBatch and AdaBatch under Composer's FSDP and resumes it; run by tests through the launcher.

Composer's FSDP is for GPUs, but needs one in a single place. With ``--device cpu`` that place is patched, and gloo stands in for NCCL.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Callback
from composer.models import HuggingFaceModel
from composer.optim import CosineAnnealingScheduler
from composer.utils import dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from composer_effalgos import AdaBatch, EfficiencyMonitor, InfoBatch
from composer_effalgos.plan import EpochPlanner

WORDS, LENGTH, SAMPLES = 64, 16, 200


class Sequences(Dataset):
    """Numbers that count upwards, every third sequence with errors."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = (torch.arange(SAMPLES)[:, None] + torch.arange(LENGTH)) % WORDS
        wrong = torch.rand(SAMPLES, LENGTH, generator=generator) < 0.5 * (torch.arange(SAMPLES)[:, None] % 3 == 0)
        self.tokens[wrong] = torch.randint(WORDS, (int(wrong.sum()),), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {'input_ids': self.tokens[index], 'labels': self.tokens[index]}


class Watch(Callback):
    """Notes each epoch's samples, and the size and rate of each batch."""

    def __init__(self) -> None:
        self.kept: dict[int, list[int]] = {}
        self.batches: list[tuple[int, float]] = []

    def batch_start(self, state, logger):
        plan = EpochPlanner.of(state).loader.plan
        self.kept[int(state.timestamp.epoch)] = plan.order.sort().values.tolist()
        self.batches.append((len(state.batch['labels']), state.optimizers[0].param_groups[0]['lr']))


def train(folder: Path, device: str, fsdp: str | None, lr: float = 0.01, load: str | None = None) -> dict[str, Any]:
    """What was trained on, the scores and the parameters at the end, the same on every rank."""
    torch.manual_seed(0)
    size = {'n_positions': LENGTH, 'n_embd': 32, 'n_layer': 2, 'n_head': 2}
    body = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0, **size))
    model, data, watch = HuggingFaceModel(body, shift_labels=True), Sequences(), Watch()
    infobatch = InfoBatch(0.5, 0.8)
    sharding = {'fsdp': {'sharding_strategy': 'FULL_SHARD', 'state_dict_type': fsdp}}
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=8, sampler=dist.get_sampler(data, shuffle=True)),
        optimizers=torch.optim.AdamW(model.parameters(), lr=lr),
        schedulers=CosineAnnealingScheduler(),
        max_duration='5ep',
        algorithms=[infobatch, AdaBatch(2, '2ep', lr='sqrt', beta2='rescale')],
        callbacks=[watch, EfficiencyMonitor(save_folder=folder)],
        parallelism_config=None if fsdp is None else sharding,
        device=device,
        seed=1,
        run_name='fsdp',
        progress_bar=False,
        save_folder=str(folder / 'saved'),
        save_interval='5ba',
        save_filename='ba{batch}' + ('' if fsdp == 'sharded' else '.pt'),
        save_latest_filename=None,
        load_path=load,
    )
    trainer.fit()
    with FullyShardedDataParallel.summon_full_params(trainer.state.model, writeback=False):
        parameters = torch.cat([value.detach().float().cpu().flatten() for value in trainer.state.model.parameters()])
    trainer.close()
    for kept, batches in dist.all_gather_object((watch.kept, watch.batches)):
        assert kept == watch.kept
        if fsdp is not None:
            assert batches == watch.batches  # as many samples on every rank
    return {'kept': watch.kept, 'batches': watch.batches, 'scores': infobatch.scores, 'saved': infobatch.samples_saved, 'end': parameters}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--device', default='gpu')
    parser.add_argument('--state-dicts', choices=('full', 'sharded'), default='sharded', help="FSDP's; torch's full ones crash on a CPU")
    parser.add_argument('--resume', type=int, nargs='*', default=[10, 25], help='batches to resume after')
    options = parser.parse_args()
    if options.device == 'cpu':
        torch.cuda.current_device = lambda: torch.device('cpu')  # type: ignore[assignment,return-value]  # all that Composer asks CUDA for
    dist.initialize_dist(options.device)
    folder = Path(dist.all_gather_object(tempfile.mkdtemp())[0])
    runs = itertools.count()

    def run(fsdp: str | None, **more: Any) -> dict[str, Any]:
        return train(folder / str(next(runs)), options.device, fsdp, **more)

    whole = run(options.state_dicts)
    assert {size for size, _ in whole['batches']} >= {8, 16}
    assert whole['saved'] > 0
    saved = {int(path.name.partition('ba')[2].removesuffix('.pt')): path for path in (folder / '0' / 'saved').glob('*ba*')}
    for batch in options.resume:
        resumed = run(options.state_dicts, load=str(saved[batch]))
        assert torch.equal(resumed['end'], whole['end']), batch
        assert torch.equal(resumed['scores'], whole['scores']), batch
        assert resumed['saved'] == whole['saved']
        assert resumed['batches'] == whole['batches'][batch:], batch
        assert all(kept == whole['kept'][epoch] for epoch, kept in resumed['kept'].items())
    # where nothing is learnt the scores are those without FSDP; in step, up to one sample a rank is left out of an epoch
    plain, sharded = run(None, lr=0.0), run(options.state_dicts, lr=0.0)
    assert torch.allclose(plain['scores'], sharded['scores'], atol=1e-5)
    for epoch, kept in plain['kept'].items():
        assert len(set(kept) ^ set(sharded['kept'][epoch])) < dist.get_world_size(), epoch
    if dist.get_global_rank() == 0:
        print({epoch: len(kept) for epoch, kept in whole['kept'].items()}, sorted({size for size, _ in whole['batches']}))


if __name__ == '__main__':
    main()
