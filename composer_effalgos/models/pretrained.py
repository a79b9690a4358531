"""Loading pretrained weights into a model whose head may differ."""

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

# Non-tensor types in Composer's checkpoints (versions, times, numpy's random state); none runs code when unpickled
_HARMLESS: list[Any] = [TorchVersion, datetime.timedelta, np.ndarray, np.dtype, type(np.dtype('uint32')), np.empty(0).__reduce__()[0]]


def read_weights(path: str | Path, key: str = 'model.pretrained') -> dict[str, Tensor]:
    """Read a weights file without running any code in it.

    Args:
        path: A ``.safetensors`` file, or anything that ``torch.load(weights_only=True)`` reads: a state dict, bare or under
            ``state_dict`` or ``model``, or a Composer checkpoint.
        key: Recipe key or argument of the path; starts the error message.

    Returns:
        The state dict of the network, without the name prefixes of DistributedDataParallel and Composer.

    Raises:
        InputError: The file is missing or is not a weights file.
    """
    return _read(path, key, safetensors.torch.load_file if Path(path).suffix == '.safetensors' else _load_pickle)


def read_checkpoint(path: str | Path, key: str) -> dict[str, Tensor]:
    """Read the weights of a file that Composer or ``torch.load`` will load next, without running any code in it.

    Unlike :func:`read_weights`, this ignores the suffix. A file can be valid both as safetensors and as a pickle, and ``torch.load`` goes
    by content: reading it as safetensors would check one part of the file, and then the other would be unpickled.

    Args:
        path: A file for ``torch.load``, whatever its name.
        key: Recipe key or argument of the path; starts the error message.

    Returns:
        As for :func:`read_weights`.

    Raises:
        InputError: The file is missing, or ``torch.load(weights_only=True)`` cannot read it.
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
    except Exception as error:  # damaged bytes can raise anything
        reason = one_line(error).split('. ')[0][:200]
        raise InputError(f'{key}: {path} is not a readable weights file ({reason})') from error
    return _state_dict(content, path, key)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights into a model, in place. If the head has another shape, the model keeps its own initial head and logs a warning.

    Args:
        model: The model.
        weights: A state dict whose head (the last linear layer or convolution) may have another shape or be missing.
        source: Where the weights come from, for messages.

    Raises:
        InputError: A key outside the head is missing, unexpected or has another shape.
    """
    own = model.state_dict()
    head = {key for key in own if key.startswith(f'{_head_name(model)}.')}
    fitting = {key: value for key, value in weights.items() if not (key in head and own[key].shape != value.shape)}
    found = differences(own, fitting, optional=head)
    if found:
        raise InputError(f'model.pretrained: the weights in {source} are of another model ({found})')
    model.load_state_dict(fitting, strict=False)
    if not head <= fitting.keys():
        log.warning('The head in %s has another shape or is missing: %s keeps its random initialisation.', source, _head_name(model))


def differences(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], optional: Collection[str] = ()) -> str:
    """Compare two state dicts.

    Args:
        own: The network's state dict.
        weights: Another state dict.
        optional: Names that may be missing; batch norm counters always may.

    Returns:
        Missing and unexpected names and differing shapes, on one line; empty if the weights match.
    """
    wrong = {
        'missing': [key for key in own if key not in weights and key not in optional and not key.endswith('.num_batches_tracked')],
        'unexpected': [key for key in weights if key not in own],
        'of another shape': [key for key in weights if key in own and own[key].shape != weights[key].shape],
    }
    return '; '.join(f'{what}: {_abridged(keys)}' for what, keys in wrong.items() if keys)


def _state_dict(content: Any, path: str | Path, key: str) -> dict[str, Tensor]:
    """Unwrap a state dict from the containers that training scripts and Composer use."""
    for wrapping in ('state', 'model', 'state_dict'):
        if isinstance(content, Mapping) and isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
    if not (
        isinstance(content, Mapping)
        and content
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    ):
        raise InputError(f'{key}: {path} holds no state dict; expected names and tensors, alone or under `state_dict` or `model`')
    # DistributedDataParallel and ComposerClassifier each add one
    while all(name.startswith('module.') for name in content):
        content = {name.removeprefix('module.'): value for name, value in content.items()}
    return dict(content)


def _head_name(model: nn.Module) -> str:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]


def _abridged(keys: list[str]) -> str:
    return ', '.join(keys[:3]) + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')
