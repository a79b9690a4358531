"""Checks that a batch keeps the order of its samples, because scores and weights are assigned by position."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec, State
from composer.core.data_spec import default_split_batch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import default_collate

from composer_effalgos.plan.outputs import leaves_of, num_rows, rows_of
from composer_effalgos.plan.randomness import RandomStream
from composer_effalgos.plan.trainer import training_data_spec
from composer_effalgos.utils.errors import InputError

_MOST = 13  # samples per check; an unusual length for any other dimension
_WRONG_ORDER = (
    'expected row i of each tensor to belong to sample i, got another order, or a fixed mixture of rows; keep the order of the samples '
    '(a model may sort them and undo it) and mix them only at random, since scores and weights are assigned by position'
)
_CLONED = 2**20  # elements up to which a tensor is cloned for comparison; for larger ones only a replacement is noticed
_COMPARED = 256  # rows of a microbatch that are looked for in its batch


def is_due(count: int) -> bool:
    """Whether to check the batch with this number, counted from 1: true for powers of two."""
    return count & (count - 1) == 0


def check_collate(collate: Callable[[list[Any]], Any], samples: Any, size: int, seed: int) -> None:
    """Checks that a collate function keeps the order of the samples, using samples that were read anyway.

    Args:
        collate: The function.
        samples: What the dataset returned. Anything but a list (from a dataset that makes batches itself) is not checked.
        size: The expected number of samples.
        seed: Seed of the random numbers that the function draws.

    Raises:
        InputError: If its batches have another order.
    """
    if collate is default_collate or not isinstance(samples, list) or len(samples) != size:
        return
    samples, size = samples[:_MOST], min(size, _MOST)
    collate = _copied(collate)  # the function may count its calls or have its own random generator
    if not keeps_order(collate, samples, size, lambda some, order: [some[index] for index in order], seed):
        raise InputError(f'collate_fn: {_WRONG_ORDER}')


def check_together(read: Callable[[list[int]], Any], collate: Callable[[Any], Any], indices: Sequence[int], seed: int) -> None:
    """Checks that a dataset's ``__getitems__`` returns the samples in the order in which it was asked for them.

    Args:
        read: The dataset's ``__getitems__``, called again for the first samples.
        collate: The collate function.
        indices: The samples of a batch.
        seed: Seed of the random numbers that both draw.

    Raises:
        InputError: If it returns another order.
    """
    some = list(indices[:_MOST])
    if not keeps_order(lambda chosen: collate(read(chosen)), some, len(some), lambda given, order: [given[index] for index in order], seed):
        raise InputError(f'dataset.__getitems__: {_WRONG_ORDER}')


class GivenBatch:
    """What the check needs of a batch as the loader made it, copied because transforms and algorithms may change it in place.

    Args:
        batch: The batch.
        due: Whether the batch may be checked; otherwise nothing is copied.

    Attributes:
        size: Number of samples; 0 if the batch is not checked.
        whole: Whether all rows are copied, not only the first.
        rows: The samples, or the first ones of a large batch; ``None`` if they cannot be copied.
        sums: A checksum of each row for each of the batch's leaves, float64 ``[size]``; ``None`` for other leaves than tensors with one row
            per sample.
    """

    def __init__(self, batch: Any, due: bool) -> None:
        self.size = num_rows(batch) if due else 0
        self.whole, self.rows, self.sums = False, None, []
        if self.size:
            self.whole = all(leaf.numel() <= _CLONED for leaf in leaves_of(batch) if isinstance(leaf, Tensor))
            kept = self.size if self.whole else min(self.size, _MOST)
            with contextlib.suppress(Exception):  # of types that cannot be indexed by row: their transforms are not checked
                self.rows = rows_of(batch, list(range(kept)), self.size)
            self.sums = _row_sums(batch, self.size, self.size)


class OrderCheck:
    """Checks that the transforms of the training ``DataSpec``, algorithms and the model keep the order of the samples.

    Runs in batches 1, 2, 4, ... of a fit. Without transforms it costs one comparison.

    Args:
        state: The trainer's state.
        seed: Seed of the random numbers that the transforms draw.
    """

    def __init__(self, state: State, seed: int) -> None:
        self._state, self._seed = state, seed
        self._batches = 0
        self._spec: DataSpec | None = None
        self._looked = False
        self._noted: list[tuple[Tensor, int, Tensor]] = []  # tensors of a batch with version and content before the forward pass
        self._given: GivenBatch | None = None  # of the batch whose microbatches are checked
        self._sums: list[Tensor | None] = []  # its checksums after the transforms
        self._rows = slice(0, 0)  # the rows of it that are in the microbatch
        self._microbatch_size: Any = None

    def before_forward(self, loader: Any) -> None:
        """Checks what transforms, ``split_batch`` and algorithms have made of a batch.

        Args:
            loader: The planned loader, which stores the batch it yielded until it is taken here.

        Raises:
            InputError: If one of them changes the order of the samples.
        """
        given, loader.given_batch = loader.given_batch, None
        if given is not None:  # the first microbatch of a batch
            self._batches += 1
            loader.check_next = is_due(self._batches + 1)
            due = is_due(self._batches)
            self._given, self._rows = given if due and given.size > 1 else None, slice(0, 0)
            leaves = leaves_of(self._state.batch) if due else []
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) > 1]
            self._noted = [(t, t._version, t.clone() if t.numel() <= _CLONED else t) for t in tensors]
        if self._given is None:
            return
        self._advance(self._given.size)
        if given is not None:
            self._sums = given.sums
            self._check(given)
        if self._rows.stop <= self._given.size and _has_other_rows(self._sums, self._microbatch_sums(self._given), self._rows):
            raise InputError(f'{self._culprit()}: {_WRONG_ORDER}')

    def after_forward(self) -> None:
        """Checks that the model left the rows of the batch, which its loss reads, in place.

        Raises:
            InputError: If it changed their order.
        """
        noted, self._noted = self._noted, []
        found = [leaf for leaf in leaves_of(self._state.batch) if isinstance(leaf, Tensor)] if noted else []
        kept = {id(leaf): leaf._version for leaf in found}
        for tensor, version, content in noted:
            if kept.get(id(tensor)) != version and any(_is_reordered(content, leaf) for leaf in found):
                raise InputError(
                    'model: expected forward() to keep the order of the rows of the batch, got another one; restore it before loss() is '
                    'called, since scores and weights are assigned by position'
                )

    def _advance(self, size: int) -> None:
        """Finds the rows of the batch that should be in this microbatch, which may be one of a repeated pass (SAM, out of memory)."""
        start = self._rows.stop
        if start >= size or self._microbatch_size != self._state.device_train_microbatch_size:
            start = 0
        self._microbatch_size = self._state.device_train_microbatch_size
        self._rows = slice(start, start + num_rows(self._state.batch))

    def _microbatch_sums(self, given: GivenBatch) -> list[Tensor | None]:
        return _row_sums(self._state.batch, self._rows.stop - self._rows.start, given.size)

    def _culprit(self) -> str:
        """The argument that names what has changed the order."""
        assert self._given is not None
        spec = self._find_spec()
        if spec is not None and spec.split_batch is not default_split_batch and self._rows != slice(0, self._given.size):
            return 'train_dataloader: split_batch of the DataSpec'
        ours = ('composer.', 'composer_effalgos.')
        names = [type(item).__name__ for item in self._state.algorithms if not type(item).__module__.startswith(ours)]
        return f'algorithms: {", ".join(names)}' if names else 'algorithms'

    def _find_spec(self) -> DataSpec | None:
        if not self._looked:
            self._looked, self._spec = True, training_data_spec(self._state)
        return self._spec

    def _check(self, given: GivenBatch) -> None:
        now = self._microbatch_sums(given)
        if len(now) == len(given.sums) and all(_is_begin(*pair) for pair in zip(given.sums, now, strict=True)):
            return
        spec = self._find_spec()  # a transform or an algorithm has changed the batch
        if given.rows is None or spec is None or (_is_default(spec.batch_transforms) and _is_default(spec.microbatch_transforms)):
            return

        def transformed(batch: Any, on_batch: Any = spec.batch_transforms, on_microbatch: Any = spec.microbatch_transforms) -> Any:
            return on_microbatch(self._state.device.batch_to_device(on_batch(batch)))

        kept = given.size if given.whole else min(given.size, _MOST)
        size = min(kept, _MOST)
        rows = rows_of(given.rows, list(range(size)), kept)
        if not keeps_order(transformed, rows, size, lambda batch, order: rows_of(batch, order, size), self._seed):
            raise InputError(f'train_dataloader: transforms of the DataSpec: {_WRONG_ORDER}')
        if given.whole:  # what split_batch and algorithms were given
            on_batch, on_microbatch = (
                transform if _is_default(transform) else _copied(transform)
                for transform in (spec.batch_transforms, spec.microbatch_transforms)
            )
            with _seeded(self._seed):
                self._sums = _row_sums(transformed(given.rows, on_batch, on_microbatch), given.size, given.size)


def keeps_order(function: Callable[[Any], Any], batch: Any, size: int, take: Callable[[Any, Sequence[int]], Any], seed: int) -> bool:
    """Whether a function makes row i of its result from sample i.

    The function is called on the samples in their order and in two permutations, a rotation and a transposition, which together generate
    all permutations. Consider a tensor with one row per sample. If it does not depend on the random numbers, its rows must move exactly as
    the samples did. Otherwise (masked tokens, randomly mixed images) the transposition must change the rows of its two samples. A tensor
    that no permutation changes is inconclusive if another one moves with the samples. Rows that are those of the samples alone, but in
    another order, are refused too: a shuffle that draws from a generator of its own looks random.

    Args:
        function: Maps samples to tensors in any structure.
        batch: The samples; the function receives copies.
        size: Number of samples.
        take: ``(batch, order)`` -> the samples in this order.
        seed: Seed of the function's random numbers. The random state of the process is not changed.
    """
    order = list(range(size))
    first = take(batch, [0])
    other = next((index for index in order[1:] if not _same(first, take(batch, [index]))), None)
    if other is None:
        return True
    rotation, exchange = [*order[1:], 0], order.copy()
    exchange[0], exchange[other] = other, 0

    def tensors(chosen: Sequence[int], stream: int) -> list[Tensor]:
        with _seeded(seed + stream):
            result = function(_copied(take(batch, chosen)))
        return [leaf.detach() for leaf in leaves_of(result) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == len(chosen)]

    even, rotated, exchanged = tensors(order, 0), tensors(rotation, 0), tensors(exchange, 0)
    others = [tensors(order, 1)]
    singles: list[list[Tensor]] | None = None  # what the function makes of each sample alone
    moves = unmoved = False
    for number, (ours, second, third) in enumerate(zip(even, rotated, exchanged, strict=False)):
        if ours.shape != second.shape or ours.shape != third.shape:
            continue
        if _moved(ours, second, rotation) and _moved(ours, third, exchange):
            moves |= not _near(ours, second)
        elif _near(ours, second) and _near(ours, third):
            unmoved |= not _near(ours, ours[rotation]) and len(others[0]) > number and _near(ours, others[0][number])
        else:
            if len(others) == 1:  # with few samples, two seeds may give the same random mixture by chance
                others += [tensors(order, stream) for stream in range(2, 10)]
            if all(len(found) > number and _near(ours, found[number]) for found in others):
                return False
            if singles is None:
                singles = [tensors([index], 0) for index in order]
            if _is_permutation(ours, [found[number] for found in singles if len(found) > number]):
                return False
            changed = {index for index in order if not _near(ours[index], third[index])}
            if changed and not changed <= {0, other} and not changed >= {0, other}:
                return False
    return moves or not unmoved


def _moved(before: Tensor, after: Tensor, order: list[int]) -> bool:
    """Whether the rows moved with the samples; or rows and columns, as in a mask over pairs of samples."""
    if _near(after, before[order]):
        return True
    return before.ndim > 1 and before.shape[1] == len(order) and _near(after, before[order][:, order])


def _is_permutation(together: Tensor, alone: Sequence[Tensor]) -> bool:
    """Whether a tensor has the rows that its samples give alone, all of them, in another order."""
    if len(alone) != len(together) or any(row.shape != together[:1].shape or row.dtype != together.dtype for row in alone):
        return False
    rows = torch.cat(list(alone))
    same = torch.tensor([[_near(ours, theirs) for theirs in rows] for ours in together])
    return not bool(same.diagonal().all()) and bool(same.any(dim=0).all()) and bool(same.any(dim=1).all())


def _is_reordered(before: Tensor, after: Tensor) -> bool:
    """Whether a tensor has the rows of another one in another order, by comparing sorted checksums of the rows."""
    if before.shape != after.shape or before.dtype != after.dtype or torch.equal(before, after):
        return False
    rows = [tensor.detach().flatten(1).double() if tensor.ndim > 1 else tensor.detach().double()[:, None] for tensor in (before, after)]
    factors = torch.linspace(1, 2, rows[0].shape[1], dtype=torch.float64, device=before.device)
    ours, theirs = ((found * factors).sum(dim=1).sort().values for found in rows)
    return torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def _near(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    if not ours.is_floating_point():
        return torch.equal(ours, theirs)
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6, equal_nan=True)  # a mean over the batch depends on the summation order


def _same(ours: Any, theirs: Any) -> bool:
    mine, others = leaves_of(ours), leaves_of(theirs)
    return tree_flatten(ours)[1] == tree_flatten(theirs)[1] and len(mine) == len(others) and all(map(_equal, mine, others))


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor):
        return isinstance(theirs, Tensor) and torch.equal(ours, theirs)
    if isinstance(ours, np.ndarray):
        return np.array_equal(ours, theirs)
    try:
        return bool(ours == theirs)
    except Exception:  # the == of objects that hold tensors has no truth value: inconclusive
        return True


def _copied(samples: Any) -> Any:
    try:
        return copy.deepcopy(samples)  # a collate function may modify its argument in place
    except Exception:  # cannot be copied: use the original
        return samples


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # in a worker process CUDA is never initialised
    with torch.random.fork_rng(devices), RandomStream(seed % 2**63):
        if devices:
            torch.cuda.manual_seed(seed % 2**63)
        yield


def _row_sums(batch: Any, size: int, of: int) -> list[Tensor | None]:
    """A checksum of each row, on the CPU, for each leaf of a batch.

    Args:
        batch: A batch or microbatch.
        size: Its number of samples.
        of: The number of samples of the whole batch. It determines which columns of a large tensor are read.

    Returns:
        Float64 ``[size]`` for tensors with one row per sample, ``None`` for other leaves.
    """

    def sums(leaf: Any) -> Tensor | None:
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided or leaf.is_quantized or leaf.is_nested:
            return None
        if not leaf.ndim or len(leaf) != size or not leaf.numel():
            return None
        rows = (torch.view_as_real(leaf.detach().resolve_conj()) if leaf.is_complex() else leaf.detach()).reshape(size, -1)
        rows = rows[:, :: 1 + rows.shape[1] * of // _CLONED]
        rows = (rows.cpu() if rows.device.type == 'mps' else rows).double()  # mps has no float64
        return (rows * torch.linspace(1, 2, rows.shape[1], dtype=torch.float64, device=rows.device)).sum(dim=1).cpu()

    return [sums(leaf) for leaf in leaves_of(batch)]


def _near_sums(ours: Tensor, theirs: Tensor) -> Tensor:
    return torch.isclose(ours, theirs, rtol=1e-9, atol=1e-12)  # summed in another order, on another device


def _is_begin(given: Tensor | None, now: Tensor | None) -> bool:
    """Whether a microbatch has the first rows of the batch, by their checksums."""
    if given is None or now is None:
        return given is now
    return len(now) <= len(given) and bool(_near_sums(given[: len(now)], now).all())


def _has_other_rows(given: Sequence[Tensor | None], now: Sequence[Tensor | None], rows: slice) -> bool:
    """Whether a microbatch consists of rows of the batch, but not of those in this place.

    A change of content is not a permutation: at least two tensors must have moved in the same way, or the only one. Exchanging the inputs
    alone, as ``CutMix`` may where images have a margin, leaves the labels in place.

    Args:
        given: Checksums of the batch's rows (:func:`_row_sums`).
        now: Those of the microbatch.
        rows: Where its rows should come from.
    """
    size = rows.stop - rows.start
    pairs = [(before, after) for before, after in zip(given, now, strict=False) if before is not None and after is not None]
    pairs = [(before, after[:_COMPARED]) for before, after in pairs if len(after) == size]
    places = slice(rows.start, rows.start + min(size, _COMPARED))
    in_place = [bool(_near_sums(before[places], after).all()) for before, after in pairs]
    if all(in_place):
        return False
    joint: Tensor | None = None
    moved = 0
    for (before, after), stays in zip(pairs, in_place, strict=True):
        same = _near_sums(after[:, None], before)
        if bool(same.any(dim=1).all()):  # otherwise it has other content
            moved += not stays
            joint = same if joint is None else joint & same
    if joint is None or not moved or moved < min(2, sum(before is not None for before in given)):
        return False
    found, first = joint.max(dim=1)
    uses = torch.bincount(first, minlength=joint.shape[1])[first]
    return bool(found.all()) and bool((uses <= joint.sum(dim=1)).all())


def _is_default(transform: Any) -> bool:
    return getattr(transform, '__func__', None) is DataSpec._default_transforms
