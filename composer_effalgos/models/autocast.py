"""Mixed precision on the CPU, where Composer only allows fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor


def has_bf16() -> bool:
    """Whether the CPU has bfloat16 instructions (AVX-512 BF16 or AMX). Others emulate bfloat16, which is slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class _AutocastForward:
    """A forward pass under bfloat16 autocast. A tensor output is cast to fp32, so that the loss is computed in fp32.

    Outputs that contain their own loss (Hugging Face) are left alone, because that loss was computed from these tensors.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward  # a bound method, so deep-copying the model rebinds it to the copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast('cpu', dtype=torch.bfloat16):
            outputs = self._forward(*args, **kwargs)
        return outputs.float() if isinstance(outputs, Tensor) else outputs


class _EvalInFloat32:
    """The forward pass of an evaluation, with outputs in fp32, so that metrics are computed and summed in fp32."""

    def __init__(self, eval_forward: Callable[..., Any]) -> None:
        self._eval_forward = eval_forward  # bound, as above

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._eval_forward(*args, **kwargs)
        if isinstance(outputs, Mapping) and isinstance(outputs.get('logits'), Tensor):  # Hugging Face without use_logits
            return type(outputs)(**{**outputs, 'logits': outputs['logits'].float()})
        return outputs.float() if isinstance(outputs, Tensor) and outputs.is_floating_point() else outputs


def autocast_forward(model: ComposerModel) -> None:
    """Run a model's forward pass under bfloat16 autocast on the CPU, as ``amp_bf16`` does on a GPU.

    Weights, gradients, optimizer state and metrics stay in fp32. The model is changed in place.
    Call this before the Trainer wraps or compiles it.
    """
    model.forward = _AutocastForward(model.forward)  # type: ignore[method-assign]
    model.eval_forward = _EvalInFloat32(model.eval_forward)  # type: ignore[method-assign]
