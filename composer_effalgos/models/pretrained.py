"""Loading weights into a model whose head may differ."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import one_line

log = logging.getLogger(__name__)

# What Composer's checkpoints hold beside tensors (versions, times, numpy's random state); none of it runs code when unpickled
_HARMLESS: list[Any] = [TorchVersion, datetime.timedelta, np.ndarray, np.dtype, type(np.dtype('uint32')), np.empty(0).__reduce__()[0]]


def load_file(model: nn.Module, path: str) -> None:
    """Load a local file of weights into a model, in place.

    Args:
        model: The model.
        path: A file for :func:`read_weights`.

    Raises:
        InputError: The file cannot be read, or its weights are not this model's.
    """
    load_weights(model, read_weights(path), path)


def read_weights(path: str | Path, key: str = 'model.pretrained') -> dict[str, Tensor]:
    """Read a file of weights; nothing in it is run.

    Args:
        path: A ``.safetensors`` file, or anything that ``torch.load(weights_only=True)`` reads: a state dict, alone or under
            ``state_dict`` or ``model``, or a Composer checkpoint.
        key: Where the path was given; begins the error message.

    Returns:
        The state dict of the network, without what DistributedDataParallel and Composer put before its names.

    Raises:
        InputError: No such file, or no file of weights.
    """
    return _read(path, key, safetensors.torch.load_file if Path(path).suffix == '.safetensors' else _load_pickle)


def read_checkpoint(path: str | Path, key: str) -> dict[str, Tensor]:
    """Read the weights in a file that Composer or ``torch.load`` will read next; nothing in it is run.

    :func:`read_weights` reads ``.safetensors`` files in their own way. ``torch.load`` goes by the content, and one file can be both: the
    harmless one of the two would be checked, and the other one unpickled.

    Args:
        path: A file for ``torch.load``, whatever its name.
        key: Where the path was given; begins the error message.

    Returns:
        As for :func:`read_weights`.

    Raises:
        InputError: No such file, or one that ``torch.load(weights_only=True)`` does not read.
    """
    return _read(path, key, _load_pickle)


def _load_pickle(file: Path) -> Any:
    with torch.serialization.safe_globals(_HARMLESS):
        return torch.load(file, map_location='cpu', weights_only=True)


def _read(path: str | Path, key: str, load: Callable[[Path], Any]) -> dict[str, Tensor]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f'{key}: no file {path}; expected a .pt, .pth or .safetensors file of weights')
    try:
        content = load(file)
    except Exception as error:  # there is no end to what damaged bytes lead to
        reason = one_line(error).split('. ')[0][:200]
        raise InputError(f'{key}: {path} is no readable file of weights ({reason})') from error
    return _state_dict(content, path, key)


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
    found = differences(own, fitting, optional=head)
    if found:
        raise InputError(f'model.pretrained: the weights in {source} are of another model ({found})')
    model.load_state_dict(fitting, strict=False)
    if not head <= fitting.keys():
        log.warning('The head of the weights in %s has another shape or is missing: %s starts anew.', source, _head_name(model))


def differences(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], optional: Collection[str] = ()) -> str:
    """Check weights against a network's own.

    Args:
        own: The network's state dict.
        weights: Another state dict.
        optional: Names that may be missing; batch norms' counters always may.

    Returns:
        What is missing, unexpected and of another shape, on one line; empty where the weights fit.
    """
    wrong = {
        'missing': [key for key in own if key not in weights and key not in optional and not key.endswith('.num_batches_tracked')],
        'unexpected': [key for key in weights if key not in own],
        'of another shape': [key for key in weights if key in own and own[key].shape != weights[key].shape],
    }
    return '; '.join(f'{what}: {_abridged(keys)}' for what, keys in wrong.items() if keys)


def _state_dict(content: Any, path: str | Path, key: str) -> dict[str, Tensor]:
    """Unwrap what training scripts and Composer put around a state dict."""
    for wrapping in ('state', 'model', 'state_dict'):
        if isinstance(content, Mapping) and isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
    if not (
        isinstance(content, Mapping)
        and content
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    ):
        raise InputError(f'{key}: {path} holds no state dict; expected names and tensors, alone or under `state_dict` or `model`')
    # DistributedDataParallel's and ComposerClassifier's
    while all(name.startswith('module.') for name in content):
        content = {name.removeprefix('module.'): value for name, value in content.items()}
    return dict(content)


def _head_name(model: nn.Module) -> str:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]


def _abridged(keys: list[str]) -> str:
    return ', '.join(keys[:3]) + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')
