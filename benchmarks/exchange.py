"""What the algorithms exchange between ranks: calls and bytes an epoch, counted while they train.

Counts the collective calls of ``composer.utils.dist`` that come from this package, by what a rank hands in and what it gets from the
others. The gradients that DistributedDataParallel exchanges in every step are set beside them, computed from the number of parameters.

    python benchmarks/exchange.py            # 2 and 4 processes, some minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from composer import Trainer
from composer.models import ComposerClassifier
from composer.utils import dist
from torch.utils.data import DataLoader, TensorDataset

from composer_effalgos import AdaBatch, InfoBatch, SubsetSelection
from composer_effalgos.utils.tables import markdown_table

FEATURES, EMBEDDING, CLASSES, BATCH = 16, 64, 10, 64
EPOCHS = 3
ALGORITHMS: dict[str, Callable[[], list[Any]]] = {
    'InfoBatch': lambda: [InfoBatch(0.5, 1.0)],
    'AdaBatch': lambda: [AdaBatch(2, '1ep')],
    'SubsetSelection, gradmatch': lambda: [SubsetSelection('gradmatch', 0.2, '1ep')],
    'SubsetSelection, random': lambda: [SubsetSelection('random', 0.2, '1ep')],
}


class Count:
    """Notes collective calls from this package while it is entered."""

    def __init__(self) -> None:
        self.calls = self.sent = self.received = 0

    def _from_us(self) -> bool:
        caller = sys._getframe(2).f_globals.get('__name__', '')
        return caller.startswith('composer_effalgos')

    def __enter__(self) -> Count:
        self._before = {name: getattr(dist, name) for name in ('all_gather', 'all_reduce', 'broadcast_object_list')}
        others = dist.get_world_size() - 1

        def all_gather(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._from_us():
                self.calls, self.sent, self.received = self.calls + 1, self.sent + tensor.nbytes, self.received + tensor.nbytes * others
            return self._before['all_gather'](tensor, *args, **kwargs)

        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._from_us():
                self.calls, self.sent, self.received = self.calls + 1, self.sent + tensor.nbytes, self.received + tensor.nbytes
            return self._before['all_reduce'](tensor, *args, **kwargs)

        def broadcast_object_list(objects: list[Any], *args: Any, **kwargs: Any) -> Any:
            ours = self._from_us()
            result = self._before['broadcast_object_list'](objects, *args, **kwargs)
            if ours:
                size = len(pickle.dumps(objects))
                first = dist.get_global_rank() == 0
                self.calls, self.sent, self.received = self.calls + 1, self.sent + size * first, self.received + size * (not first)
            return result

        dist.all_gather, dist.all_reduce, dist.broadcast_object_list = all_gather, all_reduce, broadcast_object_list
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._before.items():
            setattr(dist, name, function)


def train(algorithms: list[Any], num_samples: int) -> dict[str, float]:
    """Trains and counts on this rank."""
    torch.manual_seed(0)
    inputs = torch.randn(num_samples, FEATURES)
    dataset = TensorDataset(inputs, inputs[:, :CLASSES].argmax(1))
    network = torch.nn.Sequential(torch.nn.Linear(FEATURES, EMBEDDING), torch.nn.ReLU(), torch.nn.Linear(EMBEDDING, CLASSES))
    trainer = Trainer(
        model=ComposerClassifier(network, num_classes=CLASSES),
        train_dataloader=DataLoader(dataset, batch_size=BATCH, sampler=dist.get_sampler(dataset, shuffle=True)),
        optimizers=torch.optim.SGD(network.parameters(), lr=0.1),
        max_duration=f'{EPOCHS}ep',
        algorithms=algorithms,
        device='cpu',
        seed=1,
        progress_bar=False,
    )
    with Count() as count:
        trainer.fit()
    steps, trained = int(trainer.state.timestamp.batch), int(trainer.state.timestamp.sample)
    trainer.close()
    gradients = 4 * sum(parameter.numel() for parameter in network.parameters()) * steps
    return {
        'calls_an_epoch': count.calls / EPOCHS,
        'sent_an_epoch': count.sent / EPOCHS,
        'received_an_epoch': count.received / EPOCHS,
        'received_a_sample': count.received / EPOCHS / num_samples,
        'trained_an_epoch': trained / EPOCHS,
        'gradients_an_epoch': gradients / EPOCHS,
    }


def count_here(sizes: list[int], out: Path) -> None:
    """Counts every algorithm and size on this rank; the largest of the ranks is written by rank 0."""
    rows = []
    for name, make in ALGORITHMS.items():
        for size in sizes:
            ranks = dist.all_gather_object(train(make(), size))
            worst = max(ranks, key=lambda found: found['received_an_epoch'])
            rows.append({'algorithm': name, 'ranks': dist.get_world_size(), 'samples': size, **worst})
    if dist.get_global_rank() == 0:
        out.write_text(json.dumps(rows), encoding='utf-8')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ranks', type=int, nargs='+', default=[2, 4])
    parser.add_argument('--samples', type=int, nargs='+', default=[2000, 8000])
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results')
    parser.add_argument('--here', type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.here is not None:
        dist.initialize_dist('cpu')
        count_here(options.samples, options.here)
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for ranks in options.ranks:
            found = Path(place) / f'{ranks}.json'
            arguments = ['--here', str(found), '--samples', *map(str, options.samples)]
            subprocess.run([sys.executable, '-m', 'composer.cli', '-n', str(ranks), __file__, *arguments], check=True)
            rows += json.loads(found.read_text(encoding='utf-8'))
    columns = {
        'algorithm': ('algorithm', ''),
        'ranks': ('ranks', ''),
        'samples': ('samples', ',d'),
        'trained an epoch': ('trained_an_epoch', ',.0f'),
        'calls an epoch': ('calls_an_epoch', '.1f'),
        'sent, bytes': ('sent_an_epoch', ',.0f'),
        'received, bytes': ('received_an_epoch', ',.0f'),
        'received a sample, bytes': ('received_a_sample', '.2f'),
        'gradients, bytes': ('gradients_an_epoch', ',.0f'),
    }
    cells = [[format(row[key], form) for key, form in columns.values()] for row in rows]
    markdown = (
        f'{CLASSES} classes, embeddings of {EMBEDDING}, {EPOCHS} epochs, a network of '
        f'{FEATURES * EMBEDDING + EMBEDDING + EMBEDDING * CLASSES + CLASSES:,} parameters. Bytes are those of one rank and epoch, of the '
        'rank that receives most; `received` from all the others together. `gradients` is what DistributedDataParallel hands in for all '
        f'steps of an epoch, computed: 4 bytes a parameter and step.\n\n{markdown_table(list(columns), cells)}'
    )
    record.write(options.out, 'exchange', {'rows': rows}, markdown, title='What ranks exchange')


if __name__ == '__main__':
    main()
