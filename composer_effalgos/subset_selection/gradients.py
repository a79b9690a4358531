"""Per-sample gradients of the last linear layer, kept as the two factors they are made of."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from composer.algorithms.squeeze_excite import SqueezeExcite2d
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from composer_effalgos.utils.errors import InputError

__all__ = ['LastLayerGradients', 'find_final_linear', 'labels_of', 'last_layer_gradients', 'preserve_rng']

LABEL_KEYS = ('labels', 'label', 'targets', 'target', 'y')
NO_CLASS = torch.iinfo(torch.int64).min  # stands for the class of a sample that has several labels, or several numbers to predict
WITHOUT_GRADIENTS = (
    'for models that predict sequences or maps use strategy random, adaptive-random or file, or InfoBatch, which needs losses alone'
)


@dataclass(frozen=True)
class LastLayerGradients:
    """Gradients of N samples with respect to the last linear layer's bias and weight.

    With logits ``W h + b``, the gradient of sample ``i`` is ``[error_i, error_i (x) embedding_i]``: its bias part, then its weight part
    class by class, ``C + C D`` numbers in all. Inner products need only the factors,
    ``(error_i . error_j)(embedding_i . embedding_j + 1)``, so the ``N x (C + C D)`` matrix is never built.

    Args:
        error (Tensor): ``d loss_i / d logits_i``, float ``[N, C]``.
        embedding (Tensor | None): input of the last linear layer, float ``[N, D]``; ``None`` keeps the bias gradients alone, ``C`` numbers.

    Raises:
        InputError: if a factor is not a two-dimensional float tensor, or the two disagree in length or device.
    """

    error: Tensor
    embedding: Tensor | None = None

    def __post_init__(self) -> None:
        for name, factor in (('error', self.error), ('embedding', self.embedding)):
            if factor is None and name == 'embedding':
                continue
            if not isinstance(factor, Tensor) or factor.ndim != 2 or not factor.is_floating_point():
                found = f'{factor.dtype} {list(factor.shape)}' if isinstance(factor, Tensor) else type(factor).__name__
                raise InputError(f'gradients.{name}: expected a float tensor with one row a sample, [N, features], got {found}')
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
        """Numbers in one gradient: ``C + C D``, or ``C`` without an embedding."""
        classes = self.error.shape[1]
        return classes if self.embedding is None else classes * (1 + self.embedding.shape[1])

    def take(self, indices: Tensor | slice) -> 'LastLayerGradients':
        """The gradients of some samples, by position, mask or slice."""
        return LastLayerGradients(_rows(self.error, indices), None if self.embedding is None else _rows(self.embedding, indices))

    def to(self, device: torch.device | str) -> 'LastLayerGradients':
        """The same gradients on another device."""
        return LastLayerGradients(self.error.to(device), None if self.embedding is None else self.embedding.to(device))

    def without_embedding(self) -> 'LastLayerGradients':
        """The bias gradients alone."""
        return LastLayerGradients(self.error)

    def sum(self) -> Tensor:
        """Sum over the samples, float ``[dim]``."""
        bias = self.error.sum(dim=0)
        return bias if self.embedding is None else torch.cat([bias, (self.error.T @ self.embedding).flatten()])

    def mean(self) -> Tensor:
        """Mean over the samples, float ``[dim]``."""
        return self.sum() / len(self)

    def dot(self, vector: Tensor) -> Tensor:
        """Inner product of every gradient with one dense vector of ``[dim]``, float ``[N]``."""
        classes = self.error.shape[1]
        scores = vector[:classes].expand_as(self.error)
        if self.embedding is not None:
            scores = scores + self.embedding @ vector[classes:].view(classes, -1).T
        return (self.error * scores).sum(dim=1)

    def gram(self, other: 'LastLayerGradients | None' = None) -> Tensor:
        """Inner products with the gradients of ``other`` (or with themselves), float ``[N, M]``."""
        other = self if other is None else other
        products = self.error @ other.error.T
        if self.embedding is None or other.embedding is None:
            return products
        return products.mul_((self.embedding @ other.embedding.T).add_(1))

    def squared_norms(self) -> Tensor:
        """Squared length of every gradient, float ``[N]``."""
        norms = self.error.square().sum(dim=1)
        return norms if self.embedding is None else norms * (self.embedding.square().sum(dim=1) + 1)

    def squared_distances(self, other: 'LastLayerGradients | None' = None) -> Tensor:
        """Squared distances to the gradients of ``other`` (or to themselves), float ``[N, M]``, never below zero."""
        theirs = self if other is None else other
        distances = self.gram(theirs).mul_(-2).add_(self.squared_norms()[:, None]).add_(theirs.squared_norms())
        return distances.clamp_(min=0)

    def dense(self) -> Tensor:
        """The gradients written out, float ``[N, dim]``: for a few samples or a small layer only."""
        if self.embedding is None:
            return self.error
        return torch.cat([self.error, (self.error[:, :, None] * self.embedding[:, None, :]).flatten(1)], dim=1)


def _rows(factor: Tensor, indices: Tensor | slice) -> Tensor:
    if isinstance(indices, Tensor) and indices.dtype == torch.int64:
        return factor.index_select(0, indices)  # several times faster than factor[indices]
    return factor[indices]


def find_final_linear(module: nn.Module) -> nn.Linear:
    """The linear layer registered last, wherever it sits, also inside ``DistributedDataParallel``.

    The gates that Composer's SqueezeExcite adds are linear layers too; they are passed over.

    Args:
        module (nn.Module): a model; its forward pass is not run.

    Raises:
        InputError: if there is no linear layer.
    """
    gates = _gate_modules(module)
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and layer not in gates]
    if not linears:
        raise InputError(
            f'model: expected a linear layer, which last-layer gradients need, got {type(module).__name__} without one; '
            'end the model in torch.nn.Linear, or use strategy random'
        )
    return linears[-1]


def last_layer_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    per_sample_loss: Callable[[Any, Any], Tensor] | None,
    *,
    linear_layer: bool = True,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    device: torch.device | str | None = None,
) -> tuple[LastLayerGradients, Tensor]:
    """Gradients of every sample with respect to the last linear layer, in one forward pass and without a backward pass.

    The embedding is the input of the last linear layer, read by a hook. The error is the gradient of the summed loss at the layer's output,
    computed by autograd only over what follows that layer, so any loss with a per-sample form works. The last layer is the one called last;
    the first batch is passed through the model once more to find it.

    The model is in evaluation mode during the pass, and every module's mode is restored afterwards, and so are the generators of Python,
    NumPy and torch. ``DistributedDataParallel`` is unwrapped first, so that ranks may hold different numbers of batches.

    Args:
        model (nn.Module): called as ``model(batch)``, as a ``ComposerModel`` is.
        batches (Iterable): batches on the model's device: ``(inputs, labels)``, or a mapping with a key ``labels``.
        per_sample_loss (Callable | None): ``per_sample_loss(outputs, batch)`` gives the losses, float ``[B]``; ``None`` for errors of
            zero, where the embeddings alone are wanted.
        linear_layer (bool): ``False`` leaves the embedding out: the model's output is taken for the logits, and no linear layer is needed.
        context (Callable): makes the context of each forward pass, such as the run's autocast.
        device (torch.device | str | None): where the result is kept; ``None`` for where it was computed.

    Returns:
        tuple[LastLayerGradients, Tensor]: float32 gradients of N samples, in the order of ``batches``, and their labels as ``labels_of``
            gives them, int64 or float32 ``[N]``.

    Raises:
        InputError: if there is no final linear layer, no batch, or a batch, a loss or a layer without one row per sample.
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
    """Puts the generators of Python, NumPy and torch back as they were; seeds them first if asked to."""
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
    # Module by module: a model may keep frozen parts in evaluation mode while the rest trains.
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
    find_final_linear(model)  # raises where there is none at all
    gates = _gate_modules(model)
    called: list[nn.Module] = []
    own_parameters = [m for m in model.modules() if m not in gates and next(m.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_hook(lambda module, args, output: called.append(module)) for module in own_parameters]
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    position = max((i for i, module in enumerate(called) if isinstance(module, nn.Linear)), default=None)
    # a container with parameters of its own (a transformer's class token) is done after the layers it holds
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
        # In float32 whatever the run's precision, so that the error is not rounded on its way back.
        captured['logits'] = output.detach().float().requires_grad_()
        torch.set_grad_enabled(True)  # from here on what the model computes is recorded; the surrounding no_grad puts the mode back
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
            f'model: expected one row a sample in {name}, got shape {list(rows.shape)} for {batch_size} samples; {WITHOUT_GRADIENTS}'
        )


def labels_of(batch: Any) -> Tensor:
    """The label of every sample of a batch, one number each.

    Args:
        batch (Any): ``(inputs, labels)``, or a mapping with a key ``labels``.

    Returns:
        Tensor: class indices, int64 ``[B]``: the labels themselves, or the largest class of soft labels, which are rows of ``[B, C]`` that
            are not negative and sum to 1; ``NO_CLASS`` for other rows, such as several positives or several numbers to predict. Where the
            labels are one number each that is not whole, as in a regression, float32 ``[B]``.

    Raises:
        InputError: if there are no labels, or labels of another shape.
    """
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    else:
        labels = batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else None
    if not isinstance(labels, Tensor):
        raise InputError("batch: expected (inputs, labels) or a mapping with a key 'labels', got no labels")
    labels = labels.detach()
    labels = labels.int() if labels.dtype == torch.bool else labels
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        return torch.where(_are_distributions(labels), labels.argmax(dim=1), NO_CLASS)
    if labels.ndim != 1:
        raise InputError(f'batch: expected class indices [B] or soft labels [B, C], got labels {labels.dtype} {list(labels.shape)}')
    return labels.float() if labels.is_floating_point() else labels.long()


def _are_distributions(rows: Tensor) -> Tensor:
    """Which rows are not negative and sum to 1, within what their precision allows."""
    tolerance = max(1e-3, torch.finfo(rows.dtype).eps) if rows.is_floating_point() else 0
    return (rows >= 0).all(dim=1) & ((rows.float().sum(dim=1) - 1).abs() <= tolerance)
