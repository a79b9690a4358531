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
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import did_you_mean

__all__ = ['RULES', 'Epoch', 'Kept', 'PruningRule', 'Step', 'check_kept', 'find_rule']

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


def find_rule(given: PruningRule | str | Mapping[str, Any]) -> PruningRule:
    """A rule from what a recipe can say.

    Args:
        given: A rule, or one of :data:`RULES` by name: ``'seta'``, or ``{'name': 'seta', 'groups': 5}``.

    Raises:
        InputError: For an unknown name or option, or something else.
    """
    if isinstance(given, PruningRule):
        return given
    options = {'name': given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
    name = options.pop('name', None)
    if not isinstance(name, str) or name not in RULES:
        raise InputError(
            f'rule: expected a PruningRule, or the name of one, alone or with its options, got {given!r}; {did_you_mean(name, RULES)}'
        )
    known = getattr(RULES[name], '__dataclass_fields__', {})
    unknown = next((option for option in options if option not in known), None)
    if unknown is not None:
        raise InputError(f'rule.{unknown}: not an option of {name!r}; known: {", ".join(known) or "none"}')
    return RULES[name](**options)
