"""Mixed precision on a CPU, where Composer allows fp32 only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor

__all__ = ['autocast_forward', 'has_bf16']


def has_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16 (AVX-512 BF16 or AMX); others emulate it, slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class _AutocastForward:
    """A model's forward pass under bfloat16 autocast; a plain tensor comes out in fp32, so that the loss is computed in it.

    Outputs with a loss of their own (Hugging Face) stay as they are: their loss was computed from these very tensors.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward  # a bound method: a deep copy of the model gets a deep copy of this that is bound to it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast('cpu', dtype=torch.bfloat16):
            outputs = self._forward(*args, **kwargs)
        return outputs.float() if isinstance(outputs, Tensor) else outputs


def autocast_forward(model: ComposerModel) -> None:
    """Runs a model's forward pass on the CPU in bfloat16 where that is safe, as ``amp_bf16`` does on a GPU.

    Weights, gradients and the optimizer stay in fp32. Call it before the Trainer wraps or compiles the model.

    Args:
        model: The model, changed in place.
    """
    model.forward = _AutocastForward(model.forward)  # type: ignore[method-assign]
