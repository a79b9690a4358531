"""Pruning rules, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer_effalgos.pruning.rules.epsilon_greedy import EpsilonGreedyRule
from composer_effalgos.pruning.rules.ies import IesRule
from composer_effalgos.pruning.rules.infobatch import InfoBatchRule
from composer_effalgos.pruning.rules.pdd import PddRule
from composer_effalgos.pruning.rules.random import RandomRule
from composer_effalgos.pruning.rules.rcap import RcapRule
from composer_effalgos.pruning.rules.rho import RhoRule
from composer_effalgos.pruning.rules.rule import Epoch, Kept, PruningRule, Step, check_kept
from composer_effalgos.pruning.rules.seta import SetaRule
from composer_effalgos.pruning.rules.ucb import UcbRule
from composer_effalgos.utils.checks import name_and_options
from composer_effalgos.utils.errors import InputError

__all__ = ['RULES', 'Epoch', 'Kept', 'PruningRule', 'Step', 'check_kept', 'check_shard', 'find_rule']

RULES: dict[str, type[PruningRule]] = {
    'infobatch': InfoBatchRule,
    'random': RandomRule,
    'seta': SetaRule,
    'pdd': PddRule,
    'ucb': UcbRule,
    'epsilon_greedy': EpsilonGreedyRule,
    'ies': IesRule,
    'rho': RhoRule,
    'rcap': RcapRule,
}


def check_shard(shard: Any, rule: PruningRule, name: str, labels: Any) -> None:
    """Checks that ``shard=True`` is only used if ranks can decide on their own parts of the samples.

    Raises:
        InputError: If they cannot, or if ``shard`` is not a bool.
    """
    if not isinstance(shard, bool):
        raise InputError(f'shard: expected True or False, got {shard!r}')
    if not shard:
        return
    if labels is not None or rule.needs_labels:
        what = 'class_balanced=True' if rule.needs_labels and labels is None else 'labels'
        raise InputError(f'shard: {name}(shard=True) cannot be combined with {what}, which needs every class on every rank; leave one out')
    if not _in_parts(type(rule)) or not (rule.pointwise or rule.takes_unscored or not rule.history):
        names = ', '.join(known for known, kind in RULES.items() if _in_parts(kind))
        raise InputError(
            f'shard: expected a rule that each rank can apply to its own part of the samples ({names}, or one of your own with pointwise '
            f'or keep_part), got {type(rule).__name__}; leave shard out'
        )


def _in_parts(kind: type[PruningRule]) -> bool:
    return kind.pointwise or kind.keep_part is not PruningRule.keep_part


def find_rule(given: PruningRule | str | Mapping[str, Any]) -> PruningRule:
    """Finds a rule by name.

    Args:
        given: A rule, or one of :data:`RULES` by name: ``'seta'``, or ``{'name': 'seta', 'groups': 5}``.

    Raises:
        InputError: For an unknown name or option, or another type.
    """
    if isinstance(given, PruningRule):
        return given
    name, options = name_and_options('rule', given, RULES, 'a PruningRule')
    known = getattr(RULES[name], '__dataclass_fields__', {})
    unknown = next((option for option in options if option not in known), None)
    if unknown is not None:
        raise InputError(f'rule.{unknown}: unknown option of {name!r}; known: {", ".join(known) or "none"}')
    return RULES[name](**options)
