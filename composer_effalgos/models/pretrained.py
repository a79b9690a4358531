"""Loading weights into a model whose head may differ."""

from __future__ import annotations

import datetime
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from composer_effalgos.errors import InputError

log = logging.getLogger(__name__)

# What Composer's checkpoints hold beside tensors (versions, times, numpy's random state); none of it runs code when unpickled
_HARMLESS: list[Any] = [TorchVersion, datetime.timedelta, np.ndarray, np.dtype, type(np.dtype('uint32')), np.empty(0).__reduce__()[0]]


def load_file(model: nn.Module, path: str) -> None:
    """Load a local file of weights into a model, in place.

    Args:
        model: The model.
        path: A ``.safetensors`` file, or anything that ``torch.load(weights_only=True)`` reads: a state dict, alone or under
            ``state_dict`` or ``model``, or a Composer checkpoint.

    Raises:
        InputError: The file cannot be read, or its weights are not this model's.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f'model.pretrained: no file {path}; expected a .pt, .pth or .safetensors file of weights')
    try:
        if file.suffix == '.safetensors':
            content: Any = safetensors.torch.load_file(file)
        else:
            with torch.serialization.safe_globals(_HARMLESS):
                content = torch.load(file, map_location='cpu', weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        reason = str(error).split('\n')[0].split('. ')[0]
        raise InputError(f'model.pretrained: {path} is no readable file of weights ({reason})') from error
    load_weights(model, _state_dict(content, path), path)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights into a model, in place; a head of another shape keeps the model's own start, with a line in the log.

    Args:
        model: The model.
        weights: Its state dict, whose head (the last linear layer or convolution) may have another shape or be missing.
        source: Where the weights come from, for messages.

    Raises:
        InputError: A key other than the head's is missing, unknown or of another shape.
    """
    own = model.state_dict()
    head = {key for key in own if key.startswith(f'{_head_name(model)}.')}
    fitting = {key: value for key, value in weights.items() if not (key in head and own[key].shape != value.shape)}
    wrong = {
        'missing': [key for key in own if key not in fitting and key not in head and not key.endswith('.num_batches_tracked')],
        'unexpected': [key for key in fitting if key not in own],
        'of another shape': [key for key in fitting if key in own and own[key].shape != fitting[key].shape],
    }
    if any(wrong.values()):
        found = '; '.join(f'{what}: {_abridged(keys)}' for what, keys in wrong.items() if keys)
        raise InputError(f'model.pretrained: the weights in {source} are of another model ({found})')
    model.load_state_dict(fitting, strict=False)
    if not head <= fitting.keys():
        log.warning('The head of the weights in %s has another shape or is missing: %s starts anew.', source, _head_name(model))


def _state_dict(content: Any, path: str) -> dict[str, Tensor]:
    """Unwrap what training scripts and Composer put around a state dict."""
    for key in ('state', 'model', 'state_dict'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not (
        isinstance(content, Mapping)
        and content
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    ):
        raise InputError(
            f'model.pretrained: {path} holds no state dict; expected names and tensors, alone or under `state_dict` or `model`'
        )
    # DistributedDataParallel's and ComposerClassifier's
    while all(key.startswith('module.') for key in content):
        content = {key.removeprefix('module.'): value for key, value in content.items()}
    return dict(content)


def _head_name(model: nn.Module) -> str:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]


def _abridged(keys: list[str]) -> str:
    return ', '.join(keys[:3]) + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')
