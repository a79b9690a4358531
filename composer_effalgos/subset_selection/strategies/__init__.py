"""Registry of the selection strategies."""

import functools
from dataclasses import dataclass

from composer_effalgos.subset_selection.problem import Solver
from composer_effalgos.subset_selection.strategies.cords_options import (
    AdapWeightsOptions,
    CordsCraigOptions,
    CordsSubmodularOptions,
    FixedWeightOptions,
    SelconOptions,
)
from composer_effalgos.subset_selection.strategies.craig import CraigOptions, craig
from composer_effalgos.subset_selection.strategies.el2n import el2n
from composer_effalgos.subset_selection.strategies.forgetting import ForgettingOptions, forgetting
from composer_effalgos.subset_selection.strategies.glister import GlisterOptions, glister
from composer_effalgos.subset_selection.strategies.gradmatch import GradMatchOptions, gradmatch
from composer_effalgos.subset_selection.strategies.grand import grand
from composer_effalgos.subset_selection.strategies.herding import herding
from composer_effalgos.subset_selection.strategies.k_center import k_center
from composer_effalgos.subset_selection.strategies.milo import MiloOptions, milo
from composer_effalgos.subset_selection.strategies.options import Options, selection_types
from composer_effalgos.subset_selection.strategies.points import PointOptions
from composer_effalgos.subset_selection.strategies.random import RandomOptions, random_subset
from composer_effalgos.subset_selection.strategies.ranking import RankingOptions
from composer_effalgos.subset_selection.strategies.submodular import FUNCTIONS, SubmodularOptions, submodular
from composer_effalgos.subset_selection.strategies.uncertainty import MEASURES, uncertainty

__all__ = ['BACKENDS', 'STRATEGIES', 'Strategy']

BACKENDS = ('torch', 'cords')


@dataclass(frozen=True)
class Strategy:
    """A strategy: its options, implementation and requirements.

    Attributes:
        options: Dataclass of its options.
        solver: This package's implementation; None if only CORDS has it.
        cords: Dataclass of its options with ``backend='cords'``; None if CORDS does not have it.
        weighted: Whether its weights can differ from one.
        validation: Whether it uses validation gradients.
        softmax: Whether the errors must be ``softmax(logits) - onehot(label)``, regardless of the training loss.
        targets: Whether ``labels`` are regression targets instead of classes.
    """

    options: type[Options]
    solver: Solver | None
    cords: type[Options] | None = None
    weighted: bool = False
    validation: bool = False
    softmax: bool = False
    targets: bool = False

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that implement it."""
        has = {'torch': self.solver is not None, 'cords': self.cords is not None}
        return tuple(name for name in BACKENDS if has[name])

    @property
    def selection_types(self) -> tuple[str, ...]:
        """The selection types it supports, the default first."""
        return selection_types(self.options)


def _only_in_cords(options: type[Options], *, weighted: bool = False, targets: bool = False) -> Strategy:
    return Strategy(options, None, options, weighted=weighted, validation=True, targets=targets)


def _submodular(name: str) -> Strategy:
    return Strategy(SubmodularOptions, functools.partial(submodular, function=name), CordsSubmodularOptions, weighted=True)


STRATEGIES: dict[str, Strategy] = {  # may be extended
    'glister': Strategy(GlisterOptions, glister, GlisterOptions, validation=True),
    'gradmatch': Strategy(GradMatchOptions, gradmatch, GradMatchOptions, weighted=True, validation=True),
    'craig': Strategy(CraigOptions, craig, CordsCraigOptions, weighted=True),
    **{name: _submodular(name) for name in FUNCTIONS},
    'random': Strategy(RandomOptions, random_subset, RandomOptions),
    'adaptive-random': Strategy(RandomOptions, random_subset, RandomOptions),
    'el2n': Strategy(RankingOptions, el2n, softmax=True),
    'grand': Strategy(RankingOptions, grand),
    'forgetting': Strategy(ForgettingOptions, forgetting),
    **{name: Strategy(RankingOptions, functools.partial(uncertainty, measure=name), softmax=True) for name in MEASURES},
    'herding': Strategy(PointOptions, herding),
    'k-center': Strategy(PointOptions, k_center),
    'milo': Strategy(MiloOptions, milo),
    'fixedweight': _only_in_cords(FixedWeightOptions, weighted=True),
    'adapweights': _only_in_cords(AdapWeightsOptions, weighted=True),
    'selcon': _only_in_cords(SelconOptions, targets=True),
}
