import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from composer_effalgos.subset_selection.gradients import LastLayerGradients


def softmax_gradients(n: int, classes: int, dim: int | None, seed: int = 0) -> tuple[LastLayerGradients, Tensor]:
    """Gradients of a cross-entropy at random logits, embeddings as after a ReLU, and the labels; every class has a sample if n allows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(n, generator=generator) % classes
    error = torch.softmax(2 * torch.randn(n, classes, generator=generator), dim=1) - one_hot(labels, classes)
    embedding = None if dim is None else torch.randn(n, dim, generator=generator).relu()
    return LastLayerGradients(error, embedding), labels


@pytest.fixture(autouse=True)
def interpreted_apricot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run apricot's functions as Python: it compiles them anew for every selection, 7 seconds, where these take milliseconds."""
    with contextlib.suppress(ImportError):
        import apricot  # noqa: F401  # compiles some functions when it is imported
        import numba

        monkeypatch.setattr(numba.config, 'DISABLE_JIT', True)


@pytest.fixture(scope='session')
def make_gradients() -> Callable[..., tuple[LastLayerGradients, Tensor]]:
    return softmax_gradients
