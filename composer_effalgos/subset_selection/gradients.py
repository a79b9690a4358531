"""Per-sample gradients of the last linear layer, stored as two factors."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from composer.algorithms.squeeze_excite import SqueezeExcite2d
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from composer_effalgos.plan.classes import labels_of
from composer_effalgos.utils.errors import InputError

WITHOUT_GRADIENTS = (
    'for models that predict sequences or maps use strategy random, adaptive-random or file, or InfoBatch, which only needs losses'
)


@dataclass(frozen=True)
class LastLayerGradients:
    """Gradients of N samples with respect to the last linear layer's bias and weight.

    With logits ``W h + b``, the gradient of sample ``i`` is ``[error_i, error_i (x) embedding_i]``: the bias part, then the weight part
    class by class, ``C + C D`` numbers. Inner products need only the factors, ``(error_i . error_j)(embedding_i . embedding_j + 1)``, so
    the ``N x (C + C D)`` matrix is never built.

    Args:
        error (Tensor): ``d loss_i / d logits_i``, float ``[N, C]``.
        embedding (Tensor | None): input of the last linear layer, float ``[N, D]``; ``None`` for bias gradients only, ``C`` numbers.

    Raises:
        InputError: if a factor is not a two-dimensional float tensor, or the factors differ in length or device.
    """

    error: Tensor
    embedding: Tensor | None = None

    def __post_init__(self) -> None:
        for name, factor in (('error', self.error), ('embedding', self.embedding)):
            if factor is None and name == 'embedding':
                continue
            if not isinstance(factor, Tensor) or factor.ndim != 2 or not factor.is_floating_point():
                found = f'{factor.dtype} {list(factor.shape)}' if isinstance(factor, Tensor) else type(factor).__name__
                raise InputError(f'gradients.{name}: expected a float tensor with one row per sample, [N, features], got {found}')
        if self.embedding is not None:
            if len(self.embedding) != len(self.error):
                raise InputError(f'gradients: expected as many rows in embedding as in error, {len(self.error)}, got {len(self.embedding)}')
            if self.embedding.device != self.error.device:
                raise InputError(
                    f'gradients: expected one device, got error on {self.error.device} and embedding on {self.embedding.device}'
                )

    def __len__(self) -> int:
        return len(self.error)

    @property
    def device(self) -> torch.device:
        """Device of both factors."""
        return self.error.device

    @property
    def dim(self) -> int:
        """Length of one gradient: ``C + C D``, or ``C`` without an embedding."""
        classes = self.error.shape[1]
        return classes if self.embedding is None else classes * (1 + self.embedding.shape[1])

    def take(self, indices: Tensor | slice) -> 'LastLayerGradients':
        """Returns the gradients of some samples, by position, mask or slice."""
        return LastLayerGradients(_rows(self.error, indices), None if self.embedding is None else _rows(self.embedding, indices))

    def to(self, device: torch.device | str) -> 'LastLayerGradients':
        """Returns the gradients on another device."""
        return LastLayerGradients(self.error.to(device), None if self.embedding is None else self.embedding.to(device))

    def without_embedding(self) -> 'LastLayerGradients':
        """Returns the bias gradients only."""
        return LastLayerGradients(self.error)

    def sum(self) -> Tensor:
        """Sum over the samples, float ``[dim]``."""
        bias = self.error.sum(dim=0)
        return bias if self.embedding is None else torch.cat([bias, (self.error.T @ self.embedding).flatten()])

    def mean(self) -> Tensor:
        """Mean over the samples, float ``[dim]``."""
        return self.sum() / len(self)

    def dot(self, vector: Tensor) -> Tensor:
        """Inner product of every gradient with a dense vector ``[dim]``, float ``[N]``."""
        classes = self.error.shape[1]
        scores = vector[:classes].expand_as(self.error)
        if self.embedding is not None:
            scores = scores + self.embedding @ vector[classes:].view(classes, -1).T
        return (self.error * scores).sum(dim=1)

    def gram(self, other: 'LastLayerGradients | None' = None) -> Tensor:
        """Inner products with the gradients of ``other`` (default: ``self``), float ``[N, M]``."""
        other = self if other is None else other
        products = self.error @ other.error.T
        if self.embedding is None or other.embedding is None:
            return products
        return products.mul_((self.embedding @ other.embedding.T).add_(1))

    def squared_norms(self) -> Tensor:
        """Squared norm of every gradient, float ``[N]``."""
        norms = self.error.square().sum(dim=1)
        return norms if self.embedding is None else norms * (self.embedding.square().sum(dim=1) + 1)

    def squared_distances(self, other: 'LastLayerGradients | None' = None) -> Tensor:
        """Squared distances to the gradients of ``other`` (default: ``self``), float ``[N, M]``, non-negative."""
        theirs = self if other is None else other
        distances = self.gram(theirs).mul_(-2).add_(self.squared_norms()[:, None]).add_(theirs.squared_norms())
        return distances.clamp_(min=0)

    def dense(self) -> Tensor:
        """The full gradient matrix, float ``[N, dim]``; only for a few samples or a small layer."""
        if self.embedding is None:
            return self.error
        return torch.cat([self.error, (self.error[:, :, None] * self.embedding[:, None, :]).flatten(1)], dim=1)


def _rows(factor: Tensor, indices: Tensor | slice) -> Tensor:
    if isinstance(indices, Tensor) and indices.dtype == torch.int64:
        return factor.index_select(0, indices)  # several times faster than factor[indices]
    return factor[indices]


def last_layer_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    per_sample_loss: Callable[[Any, Any], Tensor] | None,
    *,
    linear_layer: bool = True,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    device: torch.device | str | None = None,
) -> tuple[LastLayerGradients, Tensor]:
    """Computes the gradient of every sample with respect to the last linear layer, with forward passes only.

    A hook reads the embedding, the input of the last linear layer. The error is the gradient of the summed loss with respect to the layer's
    output; autograd only records what follows that layer, so any loss with a per-sample form works. The last layer is the one called last;
    an extra forward pass of the first batch finds it.

    The model is in evaluation mode during the pass. Afterwards the mode of every module and the generators of Python, NumPy and torch are
    restored. ``DistributedDataParallel`` is unwrapped, so ranks may have different numbers of batches.

    Args:
        model (nn.Module): called as ``model(batch)``, as a ``ComposerModel`` is.
        batches (Iterable): batches on the model's device: ``(inputs, labels)``, or a mapping with a key ``labels``.
        per_sample_loss (Callable | None): ``per_sample_loss(outputs, batch)`` returns the losses, float ``[B]``; ``None`` if only the
            embeddings are needed: the errors are then zero.
        linear_layer (bool): ``False`` omits the embedding: the model's output is used as the logits, and no linear layer is needed.
        context (Callable): returns the context manager for each forward pass, such as the run's autocast.
        device (torch.device | str | None): device of the result; ``None`` for the device of the computation.

    Returns:
        tuple[LastLayerGradients, Tensor]: float32 gradients of N samples, in the order of ``batches``, and their labels as returned by
            ``labels_of``, int64 or float32 ``[N]``.

    Raises:
        InputError: if there is no final linear layer or no batch, or if a batch, loss or layer does not have one row per sample.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    errors: list[Tensor] = []
    embeddings: list[Tensor] = []
    labels: list[Tensor] = []
    linear: nn.Linear | None = None
    with preserve_rng(), _evaluation_mode(model):
        for batch in batches:
            batch_labels = labels_of(batch)
            if linear_layer and linear is None:
                with torch.no_grad(), context():
                    linear = _last_called_linear(model, batch)
            error, embedding = _batch_gradients(model, linear, batch, per_sample_loss, context, len(batch_labels))
            errors.append(error if device is None else error.to(device))
            labels.append(batch_labels if device is None else batch_labels.to(device))
            if embedding is not None:
                embeddings.append(embedding if device is None else embedding.to(device))
    if not errors:
        raise InputError('batches: expected at least one, got none')
    return LastLayerGradients(torch.cat(errors), torch.cat(embeddings) if linear_layer else None), torch.cat(labels)


@contextlib.contextmanager
def preserve_rng(seed: int | None = None) -> Iterator[None]:
    """Restores the generators of Python, NumPy and torch on exit; seeds them on entry if ``seed`` is given."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cuda_devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=cuda_devices):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # Saved per module: a model may keep frozen parts in evaluation mode while the rest trains.
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _gate_modules(model: nn.Module) -> set[nn.Module]:
    return {inner for gate in model.modules() if isinstance(gate, SqueezeExcite2d) for inner in gate.modules()}


def _last_called_linear(model: nn.Module, batch: Any) -> nn.Linear:
    gates = _gate_modules(model)
    if not any(isinstance(layer, nn.Linear) and layer not in gates for layer in model.modules()):
        raise InputError(
            f'model: expected a linear layer, which last-layer gradients need, got {type(model).__name__} without one; '
            'end the model in torch.nn.Linear, or use strategy random'
        )
    called: list[nn.Module] = []
    own_parameters = [m for m in model.modules() if m not in gates and next(m.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_hook(lambda module, args, output: called.append(module)) for module in own_parameters]
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    position = max((i for i, module in enumerate(called) if isinstance(module, nn.Linear)), default=None)
    # the hook of a container with its own parameters (a transformer's class token) fires after those of its children
    after = called if position is None else [m for m in called[position + 1 :] if called[position] not in set(m.modules())]
    if position is None or after:
        found = type(after[-1]).__name__ if after else 'no layer'
        raise InputError(
            f'model: expected a forward pass that ends in a linear layer, got one that ends in {found}; '
            'end the model in torch.nn.Linear, pass linear_layer=False, or use strategy random'
        )
    linear = called[position]
    assert isinstance(linear, nn.Linear)
    return linear


def _batch_gradients(
    model: nn.Module,
    linear: nn.Linear | None,
    batch: Any,
    per_sample_loss: Callable[[Any, Any], Tensor] | None,
    context: Callable[[], contextlib.AbstractContextManager[Any]],
    batch_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Error float32 ``[B, C]`` and embedding float32 ``[B, D]`` (``None`` without a linear layer) of one batch."""
    captured: dict[str, Tensor] = {}

    def cut(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        captured['embedding'] = args[0].detach().float()
        # Always float32, so that the error is not rounded to the run's precision.
        captured['logits'] = output.detach().float().requires_grad_()
        torch.set_grad_enabled(True)  # record everything after this layer; the surrounding no_grad restores the mode
        return captured['logits']

    handle = None if linear is None else linear.register_forward_hook(cut)
    try:
        with context():
            with torch.no_grad():
                outputs = model(batch)
            if linear is None:
                if not isinstance(outputs, Tensor):
                    raise InputError(f'model: expected a tensor of logits with linear_layer=False, got {type(outputs).__name__}')
                outputs = captured['logits'] = outputs.detach().float().requires_grad_()
            logits, embedding, losses = captured['logits'], captured.get('embedding'), None
            _check_rows('the logits', logits, 2, batch_size)
            _check_rows('the input of the last linear layer', embedding, 2, batch_size)
            if per_sample_loss is not None:
                with torch.enable_grad():
                    losses = per_sample_loss(outputs, batch)
                _check_rows('the loss', losses, 1, batch_size)
    finally:
        if handle is not None:
            handle.remove()
    if losses is None:
        return torch.zeros_like(logits, requires_grad=False), embedding
    if not losses.requires_grad:
        raise InputError("per_sample_loss: expected a function of the last linear layer's output, got a value without a gradient")
    (error,) = torch.autograd.grad(losses.sum(), logits)
    return error, embedding


def _check_rows(name: str, rows: Tensor | None, ndim: int, batch_size: int) -> None:
    if rows is not None and (rows.ndim != ndim or len(rows) != batch_size):
        raise InputError(
            f'model: expected one row per sample in {name}, got shape {list(rows.shape)} for {batch_size} samples; {WITHOUT_GRADIENTS}'
        )
