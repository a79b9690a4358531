"""Interpolates between two checkpoints of a recipe: computes curve and sharpness, and writes figure and data files."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from composer.core import Event, State
from composer.devices import Device
from composer.loggers import Logger
from composer.models import ComposerClassifier
from composer.utils import get_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from composer_effalgos.landscape.curve import Batches, Point, alphas, evaluate, line
from composer_effalgos.landscape.figure import draw
from composer_effalgos.landscape.sharpness import as_vector, random_basis, sharpness, trainable, training_loss
from composer_effalgos.models.pretrained import differences, read_weights
from composer_effalgos.recipes.build import build_network, build_split, without_augmentation
from composer_effalgos.recipes.components import Component
from composer_effalgos.recipes.schema import Recipe
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.figures import save_figure
from composer_effalgos.utils.files import write_texts
from composer_effalgos.utils.tables import csv_text

NAME = 'interpolation'
_MOST_ITERATIONS = 10_000


@dataclass(frozen=True)
class Settings:
    """Settings of a study.

    Attributes:
        points: Number of equally spaced points from -1 to 2; see :func:`~composer_effalgos.landscape.alphas`.
        samples: Number of training samples for the loss and the batch norms, drawn once at random; None for all.
        sharpness_samples: Number of these samples used to measure sharpness; None for all, 0 for no sharpness.
        batch_size: Batch size, also for the batch norm statistics.
        epsilons: Sizes of the box.
        subspace: Dimension of the random subspace in which each sharpness is also measured; 0 for none.
        iterations: Iterations of L-BFGS-B.
        seed: Seed of the samples, the subspace and the starting point of the search.
    """

    points: int = 25
    samples: int | None = None
    sharpness_samples: int | None = None
    batch_size: int = 500
    epsilons: tuple[float, ...] = (1e-3, 5e-4)
    subspace: int = 100
    iterations: int = 10
    seed: int = 17


@dataclass(frozen=True)
class Study:
    """Results of a study.

    Attributes:
        points: The curve.
        sharpness: One row per solution, epsilon and space: ``solution`` (``'A'`` or ``'B'``), ``epsilon``, ``space`` (``'full'`` or
            ``'random 100'``) and ``sharpness`` in percent.
        as_saved: Evaluation loss and accuracy of each solution with the checkpoint's own batch norm statistics.
        distances: Euclidean norms over all trainable parameters: ``A``, ``B`` and ``B - A``.
        about: Recipe, checkpoints, settings and sample counts.
    """

    points: list[Point]
    sharpness: list[dict[str, Any]]
    as_saved: dict[str, dict[str, float]]
    distances: dict[str, float]
    about: dict[str, Any]

    def write(self, out: Path, names: tuple[str, str], name: str = NAME) -> list[Path]:
        """Writes the figure (``.png``, ``.svg``), the curve (``.csv``) and everything else (``.json``).

        Args:
            out: Output folder, created if missing.
            names: Names of the solutions in the figure.
            name: Name of the files, without extension.

        Returns:
            The paths of the files.

        Raises:
            InputError: The folder is not writable.
        """
        figure = draw(self.points, names, f'{self.about["model"]} on {self.about["dataset"]}')
        png, svg, curve, numbers = (out / f'{name}.{ending}' for ending in ('png', 'svg', 'csv', 'json'))
        content = json.dumps(self.numbers(), indent=2, allow_nan=False) + '\n'
        write_texts({curve: csv_text([asdict(point) for point in self.points]), numbers: content}, 'the study')
        try:
            save_figure(figure, png, dpi=160)
            save_figure(figure, svg)
        except OSError as error:
            raise InputError(f'{out}: the study cannot be written ({error.strerror})') from error
        return [png, svg, curve, numbers]

    def numbers(self) -> dict[str, Any]:
        """Everything but the curve, for JSON: ``about``, ``as_saved``, ``distances`` and ``sharpness``.

        Non-finite numbers become strings.
        """
        return _plain({'about': self.about, 'as_saved': self.as_saved, 'distances': self.distances, 'sharpness': self.sharpness})


def interpolate(
    a: Path, b: Path, recipe: Recipe, settings: Settings | None = None, *, progress: Callable[[str], None] = lambda _: None
) -> Study:
    """Computes the loss along the line through two solutions of a recipe, and the sharpness of each.

    Training and evaluation data are the recipe's, without random augmentation, held in memory (12 KB per 32x32 image). The network is the
    recipe's, after the model surgery of its Composer algorithms (BlurPool, SqueezeExcite, ...). The loss is cross-entropy, without label
    smoothing or mixed samples.

    Args:
        a: The checkpoint at alpha 0.
        b: The checkpoint at alpha 1.
        recipe: The recipe of both trainings; batch size and schedule may differ.
        settings: Settings of the study; None for the defaults.
        progress: Called with a line of text after each step.

    Returns:
        The curve and the sharpness.

    Raises:
        InputError: A file holds no weights or those of another network, a setting is out of range, or the recipe's data are missing.
    """
    settings = settings or Settings()
    places = _checked(settings)
    weights = {'A': read_weights(a, 'checkpoint A'), 'B': read_weights(b, 'checkpoint B')}
    device = Component(f'{recipe.source}: device', get_device, {'device': recipe.trainer.get('device')}).build()
    train_set, test_set = build_split(without_augmentation(recipe), 'train'), build_split(recipe, 'eval')
    model = device.module_to_device(_network(recipe, train_set, device))
    solutions = {
        label: device.batch_to_device(_fitting(f'checkpoint {label}: {path}', weights[label], model, recipe))
        for label, path in (('A', a), ('B', b))
    }

    def in_memory(dataset: Dataset[Any], samples: int | None) -> tuple[Tensor, Tensor]:
        return device.batch_to_device(_read(dataset, samples, settings, recipe.dataset.num_workers))

    train_data, test_data = in_memory(train_set, settings.samples), in_memory(test_set, None)
    train, test = _batches(*train_data, settings.batch_size), _batches(*test_data, settings.batch_size)

    as_saved, vectors = {}, {}
    for label, state in solutions.items():
        model.load_state_dict(state)
        vectors[label] = as_vector(trainable(model))
        loss, accuracy = evaluate(model, test)
        as_saved[label] = {'test_loss': loss, 'test_accuracy': accuracy}
        progress(f'{label} as saved: test loss {loss:.4g}, accuracy {accuracy:.4f}')

    points = []
    for point in line(model, solutions['A'], solutions['B'], train, test, places):
        points.append(point)
        progress(
            f'alpha {point.alpha:+.4f}: train loss {point.train_loss:.4g}, accuracy {point.train_accuracy:.4f}; '
            f'test loss {point.test_loss:.4g}, accuracy {point.test_accuracy:.4f}'
        )

    found = _sharpness(model, vectors, train_data, settings, device, progress) if settings.sharpness_samples != 0 else []
    distances = {label: float(vector.norm()) for label, vector in vectors.items()}
    distances['B - A'] = float((vectors['B'] - vectors['A']).norm())
    about = {
        'recipe': recipe.source,
        'checkpoints': {'A': str(a), 'B': str(b)},
        'dataset': recipe.dataset.name,
        'model': recipe.model.name,
        'parameters': len(vectors['A']),
        'train_samples': len(train_data[1]),
        'test_samples': len(test_data[1]),
        'sharpness_samples': len(train_data[1][: settings.sharpness_samples]),
        'device': device.name,
        'settings': asdict(settings),
    }
    return Study(points, found, as_saved, distances, about)


def _sharpness(
    model: nn.Module,
    vectors: dict[str, Tensor],
    data: tuple[Tensor, Tensor],
    settings: Settings,
    device: Device,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measures the sharpness of each solution, in the full space and in a random subspace."""
    found = []
    images, labels = (part[: settings.sharpness_samples] for part in data)
    loss_of = training_loss(model, _batches(images, labels, settings.batch_size))
    spaces: dict[str, Tensor | None] = {'full': None}
    if settings.subspace:
        basis = random_basis(len(vectors['A']), settings.subspace, settings.seed)
        spaces[f'random {settings.subspace}'] = device.tensor_to_device(basis)
    for label, space, epsilon in itertools.product(vectors, spaces, settings.epsilons):
        value = sharpness(loss_of, vectors[label], epsilon, basis=spaces[space], iterations=settings.iterations, seed=settings.seed)
        found.append({'solution': label, 'epsilon': epsilon, 'space': space, 'sharpness': value})
        progress(f'{label}: sharpness {value:.4g} % (epsilon {epsilon:g}, {space})')
    return found


def _checked(settings: Settings) -> list[float]:
    """Checks all settings and returns the positions on the line."""
    # With a batch size below 3, or fewer than 2 samples, there can be a batch of one sample, which has no unbiased variance
    least = {'samples': 2, 'batch_size': 3, 'iterations': 1, 'sharpness_samples': 0, 'subspace': 0, 'seed': 0}
    for name, lowest in least.items():
        value = getattr(settings, name)
        if value is not None:
            check_number(name, value, least=lowest, most=_MOST_ITERATIONS if name == 'iterations' else math.inf)
    if settings.sharpness_samples == 1:
        raise InputError('sharpness_samples: expected 0 (no sharpness) or at least 2, got 1')
    for epsilon in settings.epsilons:
        check_number('epsilon', epsilon, above=0)
    return alphas(settings.points)


def _network(recipe: Recipe, dataset: Any, device: Device) -> nn.Module:
    """Builds the network and applies the model surgery of the recipe's Composer algorithms; ours change no layer."""
    model = build_network(recipe, dataset)
    if not isinstance(model, ComposerClassifier):
        raise InputError(f'{recipe.source}: model.name: expected a classifier, got {recipe.model.name}')
    state = State(model=model, rank_zero_seed=recipe.seed, run_name=recipe.run_name, device=device)
    for component in recipe.algorithms:
        algorithm = component.build()
        if type(algorithm).__module__.startswith('composer.') and algorithm.match(Event.INIT, state):
            algorithm.apply(Event.INIT, state, Logger(state))
    return model.module


def _fitting(source: str, weights: Mapping[str, Tensor], model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """Returns the weights as a complete state dict of the network, in its dtypes."""
    own = model.state_dict()
    found = differences(own, weights)
    if found:
        raise InputError(f'{source}: not weights of {recipe.model.name} as {recipe.source} has it ({found})')
    for name, value in weights.items():
        if not value.isfinite().all():
            raise InputError(f'{source}: {name} holds numbers that are not finite; the training had diverged')
    return {name: weights.get(name, value).to(value.dtype) for name, value in own.items()}


def _read(dataset: Dataset[Any], samples: int | None, settings: Settings, workers: int) -> tuple[Tensor, Tensor]:
    """Reads images and labels of a dataset, or of ``samples`` random samples, in random order."""
    count = len(dataset)  # type: ignore[arg-type]
    if samples is not None:
        check_number('samples', samples, least=1, most=count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))[:samples]
    loader = DataLoader(Subset(dataset, order.tolist()), batch_size=settings.batch_size, num_workers=workers)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def _batches(images: Tensor, labels: Tensor, batch_size: int) -> Batches:
    """Splits the data into batches of nearly equal size, at most ``batch_size``."""
    pieces = math.ceil(len(labels) / batch_size)
    return list(zip(images.tensor_split(pieces), labels.tensor_split(pieces), strict=True))


def _plain(content: Any) -> Any:
    """Makes ``content`` JSON-serialisable: non-finite numbers become strings."""
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content
