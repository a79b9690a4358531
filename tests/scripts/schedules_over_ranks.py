"""Trains under batch schedules on several ranks and holds every step against their own rules; run by tests through the launcher."""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from composer import Trainer
from composer.core import Callback, DataSpec
from composer.models import ComposerClassifier
from composer.optim import CosineAnnealingScheduler
from composer.utils import dist
from torch.utils.data import DataLoader, TensorDataset

from composer_effalgos import AdaBatch
from composer_effalgos.adabatch import NormTest

torch.set_num_threads(1)
SAMPLES, TOKENS = 402, 10


class Sizes(Callback):
    """Notes every step's batch size over all ranks, and its learning rate."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.rates: list[float] = []

    def batch_start(self, state, logger):
        self.sizes.append(sum(dist.all_gather_object(len(state.batch[1]))))
        self.rates.append(state.optimizers[0].param_groups[0]['lr'])


def run(algorithm: AdaBatch, workers: int, duration: str = '1ep', **arguments):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(2)), torch.arange(SAMPLES) % 3)
    loader = DataLoader(data, batch_size=4, sampler=dist.get_sampler(data, shuffle=True), num_workers=workers)
    model, watch = ComposerClassifier(torch.nn.Linear(8, 3), num_classes=3), Sizes()
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(loader, get_num_tokens_in_batch=lambda batch: TOKENS * len(batch[1])),
        optimizers=torch.optim.AdamW(model.parameters(), lr=0.01),
        max_duration=duration,
        algorithms=[algorithm],
        callbacks=[watch],
        device='cpu',
        seed=1,
        progress_bar=False,
        **arguments,
    )
    trainer.fit()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    trainer.close()
    return watch, weights


def megatron(samples: int) -> int:
    """0:8 40:16 120:32 in samples."""
    return 8 if samples < 40 else 16 if samples < 120 else 32


def modernbert(samples: int) -> int:
    """From 2 to 10 samples a rank by 2, equally many updates at each, over 600 tokens a rank; over all ranks."""
    world_size = dist.get_world_size()
    tokens, before = samples * TOKENS // world_size, 0
    for size in (1, 2, 3, 4):
        before += size
        if tokens < math.ceil(600 / 10 * before):
            return 2 * size * world_size
    return 10 * world_size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--workers', type=int, default=0)
    workers = parser.parse_args().workers
    dist.initialize_dist('cpu')
    world_size = dist.get_world_size()
    ramp = {'start': 2, 'stop': 10, 'increment': 2, 'over': f'{600 * world_size}tok', 'equal': 'updates'}
    saved = {'save_interval': '1ba', 'save_filename': 'ba{batch}.pt', 'save_num_checkpoints_to_keep': -1}
    runs = {
        'megatron': (lambda: AdaBatch(schedule='0:8 400tok:16 1200tok:32', global_sizes=True), megatron, {}),
        'modernbert': (lambda: AdaBatch(schedule=ramp, lr='auto'), modernbert, {}),
        'seesaw': (lambda: AdaBatch(policy='seesaw', max_batch_size=24), None, {'schedulers': CosineAnnealingScheduler()}),
        'norm_test': (lambda: AdaBatch(policy=NormTest(0.7, '3ba', measure_every=1, decay=0.0), max_batch_size=40), None, {}),
    }
    for name, (algorithm, rule, arguments) in runs.items():
        folder = Path(dist.all_gather_object(tempfile.mkdtemp())[0])
        watch, weights = run(algorithm(), workers, save_folder=str(folder), **saved, **arguments)
        assert sum(watch.sizes) == SAMPLES, name
        assert len(set(watch.sizes[:-2])) > 2, (name, watch.sizes)
        seen = 0
        for size, rate in list(zip(watch.sizes, watch.rates, strict=True))[:-2]:
            if rule is not None:
                assert size == rule(seen), (name, seen, watch.sizes)
            if name == 'modernbert':
                assert math.isclose(rate, 0.01 * math.sqrt(size / (4 * world_size))), (name, seen)
            seen += size
        for batch in range(1, len(watch.sizes), 5):
            resumed, again = run(algorithm(), workers, load_path=str(folder / f'ba{batch}.pt'), **arguments)
            assert resumed.sizes == watch.sizes[batch:], (name, batch, resumed.sizes, watch.sizes)
            assert torch.equal(again, weights), (name, batch)


if __name__ == '__main__':
    main()
