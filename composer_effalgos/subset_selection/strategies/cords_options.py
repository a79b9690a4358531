"""Options of strategies that only CORDS has, or whose options differ between CORDS and this package."""

from dataclasses import dataclass
from typing import Any, Literal

from composer_effalgos.subset_selection.strategies.craig import CraigOptions
from composer_effalgos.subset_selection.strategies.options import Count, Options, Positive
from composer_effalgos.subset_selection.strategies.submodular import SubmodularOptions
from composer_effalgos.utils.errors import InputError

ApricotOptimizer = Literal[
    'lazy', 'naive', 'stochastic', 'approximate-lazy', 'two-stage', 'modular', 'random', 'sample', 'greedi', 'bidirectional'
]


@dataclass(frozen=True, kw_only=True)
class CordsSubmodularOptions(SubmodularOptions):
    """Options of the submodular functions, maximised by apricot."""

    optimizer: ApricotOptimizer = 'lazy'  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class CordsCraigOptions(CraigOptions):
    """Options of CRAIG, maximised by apricot."""

    optimizer: ApricotOptimizer = 'lazy'  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class FixedWeightOptions(Options):
    """Options of greedy selection with equal weights.

    Attributes:
        eta: Required by CORDS but unused.
        valid: Whether to match the gradient of the validation set.
    """

    selection_type: Literal['PerClass', 'PerBatch', 'PerClassPerGradient'] | None = None
    eta: Positive = 0.01
    valid: bool = False


@dataclass(frozen=True, kw_only=True)
class AdapWeightsOptions(Options):
    """Options of least-squares weights for a given subset.

    Attributes:
        eta: Required by CORDS but unused.
        valid: Whether to match the gradient of the validation set.
        ss_indices: Positions of the subset; None for a random subset.
    """

    selection_type: Literal['Supervised'] | None = None
    eta: Positive = 0.01
    valid: bool = False
    ss_indices: Any = None


@dataclass(frozen=True, kw_only=True)
class SelconOptions(Options):
    """Options of SELCON.

    Attributes:
        delta: Bound on the validation loss; required.
        lam: Ridge penalty.
        lr: Learning rate of the multipliers and the layer.
        num_epochs: Epochs of its second loop.
    """

    selection_type: Literal['Supervised'] | None = None
    delta: Positive | None = None
    lam: Positive = 1e-5
    lr: Positive = 0.01
    num_epochs: Count = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delta is None:
            raise InputError('delta: missing; strategy selcon needs a bound on the validation loss')
