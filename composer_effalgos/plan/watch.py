"""Records the means and sums that a loss computes, with their inputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_REDUCTIONS = {torch.mean: 'mean', Tensor.mean: 'mean', torch.sum: 'sum', Tensor.sum: 'sum'}


class Reduced(NamedTuple):
    """A reduction: how it was computed, and from which elements."""

    elements: Callable[[], Tensor]  # float, of any shape, with its graph
    how: str  # 'mean', 'sum' or 'batchmean' of the elements


class ReductionRecorder(TorchFunctionMode):
    """Records every mean and sum over all elements of a tensor, including those within the losses of ``torch.nn.functional``.

    Attributes:
        seen: Reductions by the graph node of their result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, Reduced] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.ndim == 0 and result.grad_fn is not None:
            reduced = _reduced(func, args, kwargs)
            if reduced is not None:
                self.seen[result.grad_fn] = reduced
        return result


def _reduced(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reduced | None:
    how = _REDUCTIONS.get(func)
    if how is not None:
        reduced = args[0] if args else kwargs['input']
        return Reduced(lambda: reduced, how) if reduced.ndim else None
    signature = _signature(func)
    if signature is None:
        return None
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    how, old = bound.arguments['reduction'], [bound.arguments.get(name) for name in ('size_average', 'reduce')]
    if how not in ('mean', 'sum', 'batchmean') or any(value is not None for value in old):
        return None

    def elements() -> Tensor:
        bound.arguments['reduction'] = 'none'
        return func(*bound.args, **bound.kwargs)

    return Reduced(elements, how)


@functools.cache
def _signature(func: Any) -> inspect.Signature | None:
    """The signature of a loss in ``torch.nn.functional`` with a ``reduction`` argument; ``None`` for other functions."""
    if getattr(func, '__module__', None) != 'torch.nn.functional':
        return None
    signature = inspect.signature(func)
    return signature if 'reduction' in signature.parameters else None
