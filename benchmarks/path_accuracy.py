"""Accuracy of the same weights on every data path, and how far their pixels are apart.

Trains a ResNet-20 on some of CIFAR-10, then evaluates it on all test images: from Parquet by worker processes (PIL decodes), from memory
(``loader: device``), from MDS shards, and by ffcv from a file that holds decoded pixels and from one that holds the JPEG files.

    python benchmarks/path_accuracy.py --data DIR     # DIR: train.parquet and test.parquet of CIFAR-10; two minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import record
import torch
from torch.utils.data import DataLoader

from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.convert import convert
from composer_effalgos.datasets.packed import DESCRIPTION
from composer_effalgos.loaders import DeviceDataLoader, FfcvDataLoader
from composer_effalgos.models import build_model
from composer_effalgos.utils.tables import markdown_table


def train(network: torch.nn.Module, dataset: Any, epochs: int) -> None:
    """A plain loop: SGD, one cycle."""
    loader = DataLoader(dataset, batch_size=64, shuffle=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(loader))
    network.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def evaluate(network: torch.nn.Module, loader: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, classes found and labels."""
    network.eval()
    parts = [(images, network(images).argmax(1), labels) for images, labels in loader]
    images, found, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return images, found, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True)
    parser.add_argument('--samples', type=int, default=5000)
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results')
    options = parser.parse_args()
    torch.manual_seed(17)
    network = build_model('resnet20_cifar', 10)
    train(network, build_dataset('cifar10', 'train', path=options.data, limit=options.samples), options.epochs)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in ('mds', 'pixels', 'jpeg')}
        few = [f'path={options.data}', 'limit=10']  # of the training images, which are of no use here
        convert('cifar10', few, 'mds', folders['mds'])
        convert('cifar10', few, 'ffcv', folders['pixels'])
        convert('image_parquet', few, 'ffcv', folders['jpeg'])
        description = folders['jpeg'] / DESCRIPTION  # small images, not cropped as ImageNet's
        description.write_text(json.dumps(json.loads(description.read_text()) | {'like': 'cifar10'}), encoding='utf-8')
        original = build_dataset('cifar10', 'eval', path=options.data)
        paths = {
            'workers, Parquet': DataLoader(original, batch_size=500, num_workers=1),
            'device': DeviceDataLoader(original, batch_size=500),
            'workers, MDS': DataLoader(build_dataset('mds', 'eval', path=str(folders['mds'])), batch_size=500),
            'ffcv, decoded pixels': FfcvDataLoader(build_dataset('beton', 'eval', path=str(folders['pixels'])), batch_size=500),
            'ffcv, JPEG files': FfcvDataLoader(build_dataset('beton', 'eval', path=str(folders['jpeg'])), batch_size=500),
        }
        std = torch.tensor((0.2470, 0.2435, 0.2616))[:, None, None]
        reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        for name, loader in paths.items():
            found = evaluate(network, loader)
            reference = reference or found
            levels = (found[0] - reference[0]).abs() * std * 255
            rows.append(
                {
                    'path': name,
                    'accuracy': (found[1] == found[2]).float().mean().item(),
                    'other_class': int((found[1] != reference[1]).sum()),
                    'pixels_apart': (levels > 0.5).float().mean().item(),
                    'mean_levels': levels.mean().item(),
                    'max_levels': levels.max().item(),
                    'identical': torch.equal(found[0], reference[0]),
                }
            )
    header = ['path', 'accuracy %', 'classified otherwise', 'pixels that differ %', 'mean difference', 'largest difference']
    cells = [
        [
            row['path'],
            f'{100 * row["accuracy"]:.2f}',
            row['other_class'],
            f'{100 * row["pixels_apart"]:.2f}',
            f'{row["mean_levels"]:.4f}',
            f'{row["max_levels"]:.1f}',
        ]
        for row in rows
    ]
    markdown = (
        f'ResNet-20 after {options.epochs} epochs on {options.samples:,} images, evaluated on the 10,000 test images. Differences are to '
        f'the first row, in levels of 0 to 255.\n\n{markdown_table(header, cells)}'
    )
    record.write(options.out, 'path_accuracy', {'rows': rows}, markdown, title='The same weights on every data path')


if __name__ == '__main__':
    main()
