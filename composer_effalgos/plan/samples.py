"""The samples that a loader reads in an epoch, by index."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from composer_effalgos.utils.errors import InputError

_WAY_OUT = (
    'use shuffle=True or composer.utils.dist.get_sampler, which draw every sample once per epoch, and torch.utils.data.Subset to train on '
    'some samples only'
)


@dataclass(frozen=True)
class Samples:
    """The samples that a loader reads in an epoch, each of them once.

    Attributes:
        dataset: Sample ``i`` is ``dataset[i]``.
        size: Number of samples; ``None`` if unknown.
        batch_size: Samples per rank and batch.
        drop_last: Whether an incomplete last batch is dropped.
        indices: Indices of the samples in the loader's dataset, int64, ascending; ``None`` if they are the same.
        shuffle: Whether each epoch has a new order.
        shard_starts: First sample of each shard, int64 ``[S]``, if a shuffled order should go shard by shard.
        shuffle_block: Number of samples that such an order shuffles together, at least a shard.
    """

    dataset: Dataset
    size: int | None
    batch_size: int
    drop_last: bool
    indices: Tensor | None = None
    shuffle: bool = False
    shard_starts: Tensor | None = None
    shuffle_block: int = 1


class StreamedSamples(Dataset):
    """Map-style access to a ``StreamingDataset``, which itself is iterable and has the length of one rank's share.

    Args:
        dataset: The ``StreamingDataset``. Its attributes are available here too.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.size

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # during unpickling, to prevent infinite recursion
            raise AttributeError(name)
        return getattr(self.dataset, name)


def samples_of(loader: Any, *, rank: int = 0, world_size: int = 1) -> Samples:
    """Determines the samples that a loader reads in an epoch, the same on every rank.

    Raises:
        InputError: If the samples have no indices, or if it is unknown which of them the loader reads; with the reason and a workaround.
    """
    if not isinstance(loader, DataLoader):
        raise InputError(f'train_dataloader: expected a torch.utils.data.DataLoader to be planned, got {type(loader).__name__}')
    if not iterates_as_usual(loader):
        raise InputError(
            f'train_dataloader: expected a DataLoader that iterates as PyTorch does, got {type(loader).__name__}, whose __iter__ '
            'the plan would replace; use a torch.utils.data.DataLoader, with collate_fn or a DataSpec for what it does to batches'
        )
    if is_streaming(loader.dataset):
        return _streamed(loader)
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, '__len__') or not hasattr(loader.dataset, '__getitem__'):
        raise InputError(
            'train_dataloader: expected a map-style dataset with __getitem__ and __len__ or a StreamingDataset, as pruning and selection '
            f'need sample numbers, got {type(loader.dataset).__name__}'
        )
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        raise InputError(
            f'train_dataloader: expected batch_size, got batch_sampler {type(batches).__name__}, which the plan would replace; '
            'give batch_size instead of it'
        )
    if hasattr(loader, 'read_batches') and isinstance(batches.sampler, DistributedSampler):  # a BatchReader reads what it is told to
        rank, world_size = batches.sampler.rank, batches.sampler.num_replicas
    indices, shuffle = _sampled(batches.sampler, len(loader.dataset), rank, world_size)  # type: ignore[arg-type]
    dataset, starts = loader.dataset, getattr(loader.dataset, 'shard_starts', None)
    if indices is not None:
        dataset = Subset(dataset, indices.tolist())
        starts = None if starts is None else torch.searchsorted(indices, starts)
    return Samples(dataset, len(dataset), batches.batch_size, batches.drop_last, indices, shuffle, starts)  # type: ignore[arg-type]


def full_dataset(dataset: Any) -> Any:
    """The dataset of which this is a ``Subset``, through all levels; ``dataset`` itself if it is none."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def length_of(given: Any) -> int | None:
    """The length of a loader, sampler or dataset; ``None`` if it has none."""
    try:
        return len(given)
    except (TypeError, NotImplementedError):
        return None


def is_streaming(dataset: Any) -> bool:
    """Whether a dataset is a ``StreamingDataset`` with the standard iteration."""
    streaming = sys.modules.get('streaming.base.dataset')  # a user who has such a dataset has imported the module
    return (
        streaming is not None
        and isinstance(dataset, streaming.StreamingDataset)
        and type(dataset).__iter__ is streaming.StreamingDataset.__iter__
    )


def iterates_as_usual(loader: DataLoader) -> bool:
    """Whether a loader's batches are determined by its dataset, samplers and collate function."""
    if hasattr(loader, 'read_batches'):  # a BatchReader
        return True
    streaming = sys.modules.get('streaming.base.dataloader')
    known = (DataLoader,) if streaming is None else (DataLoader, streaming.StreamingDataLoader)
    return type(loader).__iter__ in [kind.__iter__ for kind in known] and type(loader)._get_iterator is DataLoader._get_iterator


def _sampled(sampler: Any, size: int, rank: int, world_size: int) -> tuple[Tensor | None, bool]:
    """The indices that a sampler yields over all ranks, ascending (``None`` for all), and whether it shuffles them."""
    name = type(sampler).__name__
    if type(sampler) not in (RandomSampler, SequentialSampler, DistributedSampler, SubsetRandomSampler):
        raise InputError(f'train_dataloader: expected a sampler of PyTorch, got {name}, which the plan would replace; {_WAY_OUT}')
    if isinstance(sampler, SubsetRandomSampler):
        return _checked(sampler.indices, size), True
    source = len(sampler.dataset if isinstance(sampler, DistributedSampler) else sampler.data_source)  # type: ignore[arg-type]
    if source > size:
        raise InputError(f'train_dataloader: expected a sampler over the {size} samples, got {name} over {source}; {_WAY_OUT}')
    if isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != source):
        raise InputError(f'train_dataloader: expected a RandomSampler without replacement or num_samples, got one with; {_WAY_OUT}')
    shuffle = isinstance(sampler, RandomSampler)
    if isinstance(sampler, DistributedSampler):
        if (sampler.num_replicas, sampler.rank) != (world_size, rank):
            raise InputError(
                f'train_dataloader: expected the DistributedSampler of rank {rank} of {world_size}, got that of rank {sampler.rank} '
                f'of {sampler.num_replicas}; {_WAY_OUT}'
            )
        shuffle = sampler.shuffle
        if sampler.drop_last and not shuffle:
            source -= source % world_size  # it never reads the remaining samples
    return None if source == size else torch.arange(source), shuffle


def _checked(indices: Sequence[int], size: int) -> Tensor | None:
    """The indices of a ``SubsetRandomSampler``, ascending."""
    ascending = torch.as_tensor(indices, dtype=torch.int64).flatten().sort().values
    if not len(ascending) or ascending[0] < 0 or ascending[-1] >= size or bool((ascending.diff() == 0).any()):
        raise InputError(
            f'train_dataloader: expected a SubsetRandomSampler of distinct numbers from 0 to {size - 1}, got others; {_WAY_OUT}'
        )
    return None if len(ascending) == size else ascending


def _streamed(loader: DataLoader) -> Samples:
    """The samples of a ``StreamingDataset`` that reads each of them once per epoch."""
    dataset: Any = loader.dataset
    name = type(dataset).__name__
    if loader.batch_size is None:
        raise InputError(f'train_dataloader: expected a DataLoader with batch_size around {name}, got batch_size=None')
    if [stream.choose for stream in dataset.streams] != dataset.samples_per_stream.tolist():
        raise InputError(
            f'train_dataloader: expected a {name} that reads every sample once an epoch, got one with proportion, repeat, choose or '
            'epoch_size, which the plan would replace; leave these out'
        )
    for option, usual in (('replication', (None, 1)), ('batching_method', ('random',))):
        if getattr(dataset, option) not in usual:
            raise InputError(
                f'train_dataloader: expected {name} without {option}, got {option}={getattr(dataset, option)!r}, which the plan would '
                f'replace; leave {option} out'
            )
    starts = torch.from_numpy(np.asarray(dataset.sample_offset_per_shard, dtype=np.int64))
    nodes = dataset.num_canonical_nodes
    block = dataset.shuffle_block_size or max(4_000_000 // nodes if nodes else 0, 1 << 18)  # StreamingDataset's own default
    return Samples(
        StreamedSamples(dataset), dataset.size, loader.batch_size, loader.drop_last, None, dataset.shuffle, starts, shuffle_block=block
    )
