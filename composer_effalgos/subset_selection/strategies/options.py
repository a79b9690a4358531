"""Strategy options: one dataclass per strategy, checked against its field types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import torch

from composer_effalgos.utils.checks import LARGEST, Range
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.type_hints import check_fields

Positive = Annotated[float, Range(least=0, most=LARGEST)]
Count = Annotated[int, Range(least=1)]
ByClass = Literal['PerClass', 'Supervised']

OptionsT = TypeVar('OptionsT', bound='Options')


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every strategy. Subclasses add their own and restrict the selection types.

    Attributes:
        selection_type: How the problem is split. None for the first type that the subclass lists, or ``Supervised`` without labels.
        linear_layer: Whether to use the weight gradients of the last layer; if not, only its bias gradients.
        val_gradients: ``LastLayerGradients`` of a validation set; None to use the candidates instead.
        val_labels: Labels of the validation set.
        batch_size: Rows per batch, for ``PerBatch``.
        num_classes: Number of classes; None for the number of outputs, at least 2.
        class_balance: Split of the budget: proportional to the class sizes, or equal up to the class size.
        seed: Seeds the selection; None for 0.
        generator: A CPU generator, instead of a seed.
    """

    selection_type: Literal['PerClass', 'PerBatch', 'PerClassPerGradient', 'Supervised'] | None = None
    linear_layer: bool = True
    val_gradients: Any = None
    val_labels: Any = None
    batch_size: Count | None = None
    num_classes: Count | None = None
    class_balance: Literal['proportional', 'equal'] = 'proportional'
    seed: Annotated[int, Range(least=0, below=2**63)] | None = None
    generator: Any = None

    def __post_init__(self) -> None:
        if self.class_balance == 'equal' and not (self.selection_type or 'PerClass').startswith('PerClass'):
            raise InputError(f'class_balance: expected selection_type=PerClass beside equal shares, got {self.selection_type!r}')
        generator = self.generator
        if generator is not None and (
            not isinstance(generator, torch.Generator) or generator.device.type != 'cpu' or self.seed is not None
        ):
            raise InputError(f'generator: expected a torch.Generator on the CPU without seed, got {generator!r} and seed={self.seed}')


def check(kind: type[OptionsT], options: Mapping[str, Any], owner: str) -> OptionsT:
    """Checks a strategy's options against the types of their fields.

    Args:
        kind: The strategy's dataclass.
        options: Values by name.
        owner: Owner of the options, for messages.

    Returns:
        The options, with the defaults filled in.

    Raises:
        InputError: A name is unknown, or a value does not match the type of its field.
    """
    hints = get_type_hints(kind, include_extras=True)
    check_fields('', options, hints, what=f'option of {owner}')
    return kind(**options)


def selection_types(kind: type[Options]) -> tuple[str, ...]:
    """Returns the selection types of a strategy, the default first."""
    literal, _ = get_args(get_type_hints(kind)['selection_type'])
    return get_args(literal)
