"""Trains a small network with all three algorithms; run by tests in processes of its own, on one rank or several, and killed by them."""

import argparse
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
from composer import Trainer
from composer.algorithms import EMA, BlurPool, LayerFreezing, SqueezeExcite
from composer.core import Callback
from composer.models import ComposerClassifier
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import dist
from own_rule import HardOrRising  # beside this script
from torch import nn
from torch.utils.data import DataLoader, Dataset

from composer_effalgos import AdaBatch, EfficiencyMonitor, InfoBatch, Pruning, SubsetSelection
from composer_effalgos.datasets.beton import beton
from composer_effalgos.datasets.images import ImageArray, small_image_transform
from composer_effalgos.datasets.mds import mds
from composer_effalgos.loaders import DeviceDataLoader
from composer_effalgos.loaders.ffcv import FfcvDataLoader
from composer_effalgos.plan import EpochPlanner

torch.set_num_threads(1)


class Augmented(Dataset):
    """90 noisy images whose augmentation draws from all generators."""

    def __init__(self, augment: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(90) % 3
        self.images = torch.randn(90, 3, 8, 8, generator=generator) + self.labels[:, None, None, None] * 0.5
        self.augment = augment

    def __len__(self) -> int:
        return 90

    def __getitem__(self, index: int):
        image = self.images[index]
        if self.augment:
            image = image.roll(int(torch.randint(3, ())), dims=1) * random.uniform(0.8, 1.2)
        return image, self.labels[index]


def small_images() -> ImageArray:
    """90 noisy 8x8 images with crop and flip."""
    generator = np.random.default_rng(0)
    labels = np.arange(90) % 3
    images = np.clip(generator.normal(100, 40, (90, 8, 8, 3)) + 30 * labels[:, None, None, None], 0, 255).astype(np.uint8)
    transform = small_image_transform(
        size=8, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3, padding=1, padding_mode='reflect', flip=True, cutout=2
    )
    return ImageArray(images, torch.from_numpy(labels), ['a', 'b', 'c'], transform)


class Watch(Callback):
    """Notes which samples each epoch trains on, and kills the process when told to."""

    def __init__(self, kill_at: int | None, shard: bool = False) -> None:
        self.kill_at, self.shard = kill_at, shard
        self.epochs: dict[int, dict] = {}

    def batch_end(self, state, logger):
        if int(state.timestamp.batch) == self.kill_at and dist.get_global_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def epoch_end(self, state, logger):
        loader = EpochPlanner.of(state).loader
        weights = loader.plan.rank_weights(loader.rank, loader.world_size)
        self.epochs[int(state.timestamp.epoch) - 1] = {
            'order': loader.rank_order.tolist(),
            'weights': [1.0] * len(loader.rank_order) if weights is None else weights.tolist(),
            'batches': len(loader),
            'start': loader.plan.start,
            'kept': loader.plan.num_samples if self.shard else len(loader.plan.kept),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--folder', type=Path, required=True)
    parser.add_argument('--kill-at', type=int)
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--microbatch', type=int)
    parser.add_argument('--save-interval', default='3ba')
    parser.add_argument('--lr', type=float, default=0.05)
    parser.add_argument('--simple', action='store_true', help='no layer or augmentation whose result depends on the ranks')
    parser.add_argument('--loader', choices=['workers', 'device', 'ffcv', 'mds'], default='workers')
    parser.add_argument('--packed', type=Path, help='what effalgos convert wrote of the digits, for ffcv and mds')
    parser.add_argument('--images', action='store_true', help='images and augmentation that either loader can read')
    parser.add_argument('--rule', help="a pruning rule in InfoBatch's place; 'own' is that of own_rule.py")
    parser.add_argument('--shard', action='store_true', help='each rank keeps the scores of its own samples')
    parser.add_argument('--subset', default='gradmatch')
    parser.add_argument('--backend', default='torch')
    parser.add_argument('--unused', action='store_true', help='with an algorithm that makes DDP look for unused parameters')
    parser.add_argument('--kappa', type=float, default=0.0)
    parser.add_argument('--val-share', type=float, default=0.0)
    parser.add_argument('--duration', default='6ep')
    parser.add_argument('--tag', default='final')
    options = parser.parse_args()

    torch.manual_seed(0)
    classes = 3 if options.packed is None else 10
    middle = [] if options.simple else [nn.BatchNorm2d(8), nn.Dropout(0.1)]
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        *middle,
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, classes),
    )
    if options.packed is not None:
        dataset = {'ffcv': beton, 'mds': mds}[options.loader]('train', str(options.packed))
    else:
        dataset = small_images() if options.images else Augmented(augment=not options.simple)
    if options.rule is None:
        pruning = InfoBatch(0.5, 0.9, shard=options.shard)
    else:
        pruning = Pruning(HardOrRising() if options.rule == 'own' else options.rule, prune_ratio=0.4, delta=0.9, shard=options.shard)
    algorithms = [pruning, AdaBatch(2, '25ba' if not options.simple else '2ep', lr_factor=0.75)]
    if options.subset != 'none':
        subset = {'backend': options.backend, 'kappa': options.kappa, 'val_share': options.val_share}
        algorithms.append(SubsetSelection(options.subset, 0.8, '2ep', **subset))
    if not options.simple:
        algorithms += [BlurPool(min_channels=1), SqueezeExcite(latent_channels=2, min_channels=4), EMA(half_life='10ba')]
    if options.unused:
        algorithms.append(LayerFreezing(freeze_start=1.0, freeze_level=0.0))
    watch = Watch(options.kill_at, options.shard)
    drop_last = options.simple  # a last batch that is not full is shared out differently over different ranks
    if options.loader in ('device', 'ffcv'):
        make = DeviceDataLoader if options.loader == 'device' else FfcvDataLoader
        loader = make(dataset, batch_size=options.batch_size, shuffle=True, drop_last=drop_last)
    else:
        loader = DataLoader(
            dataset,
            batch_size=options.batch_size,
            num_workers=options.workers,
            sampler=dist.get_sampler(dataset, shuffle=True),
            drop_last=drop_last,
        )
    trainer = Trainer(
        model=ComposerClassifier(network, num_classes=classes),
        train_dataloader=loader,
        eval_dataloader=DataLoader(dataset, batch_size=30, sampler=dist.get_sampler(dataset)),
        optimizers=torch.optim.SGD(network.parameters(), lr=options.lr, momentum=0.9),
        schedulers=CosineAnnealingWithWarmupScheduler('1ep', '1dur'),
        max_duration=options.duration,
        algorithms=algorithms,
        callbacks=[watch, EfficiencyMonitor(save_folder=options.folder / 'runs')],
        device='cpu',
        device_train_microbatch_size=options.microbatch,
        seed=1,
        progress_bar=False,
        run_name='small',
        save_folder=str(options.folder / 'checkpoints'),
        save_interval=options.save_interval,
        save_num_checkpoints_to_keep=3,
        autoresume=dist.get_world_size() == dist.get_local_world_size(),  # Composer's cannot share a folder among nodes
    )
    trainer.fit()
    scores = algorithms[0].scores
    if options.shard:
        parts, scores = dist.all_gather_object(scores), torch.empty(len(dataset))
        for rank, part in enumerate(parts):
            scores[rank :: len(parts)] = part
    everyone = dist.all_gather_object(watch.epochs)
    if dist.get_global_rank() == 0:
        torch.save(
            {
                'model': network.state_dict(),
                'optimizer': trainer.state.optimizers[0].state_dict(),
                'scores': scores,
                'saved': algorithms[0].samples_saved,
                'epochs': everyone,
                'batches': int(trainer.state.timestamp.batch),
                'samples': int(trainer.state.timestamp.sample),
            },
            options.folder / f'{options.tag}.pt',
        )
    trainer.close()


if __name__ == '__main__':
    main()
