import inspect
import re
from collections.abc import Sequence
from typing import Any, Literal

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import pytest
import torch
from composer.core import Algorithm, Callback, Precision, Time
from composer.loggers import LoggerDestination
from composer.optim import ComposerScheduler

from composer_effalgos import AdaBatch, InfoBatch, SubsetSelection
from composer_effalgos.recipes import components
from composer_effalgos.recipes.arguments import check_arguments, parameters
from composer_effalgos.recipes.components import Component, find
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import did_you_mean
from composer_effalgos.utils.type_hints import check_type


def composers(module, base):
    return [item for name, item in sorted(vars(module).items()) if inspect.isclass(item) and issubclass(item, base) and item is not base]


def snake(name: str) -> str:
    return re.sub(r'(?<!^)(?=[A-Z][a-z])', '_', name).lower()


@pytest.mark.parametrize(
    ('module', 'base', 'registry'),
    [
        (composer.algorithms, Algorithm, components.algorithms),
        (composer.callbacks, Callback, components.callbacks),
        (composer.loggers, LoggerDestination, components.loggers),
        (composer.optim, ComposerScheduler, components.schedulers),
    ],
)
def test_everything_of_composers_is_found_by_file_name_class_name_and_snake_case(module, base, registry):
    classes = composers(module, base)
    assert len(classes) > 5
    for item in classes:
        names = [item.__name__, snake(item.__name__)]
        if module is not composer.optim:  # its schedules share one file
            names.append(item.__module__.rsplit('.', 1)[-1])
        for name in names:
            assert find('recipe', 'thing', name, registry()) is item


@pytest.mark.parametrize(
    ('name', 'target'),
    [('infobatch', InfoBatch), ('info_batch', InfoBatch), ('adabatch', AdaBatch), ('subset_selection', SubsetSelection)],
)
def test_our_algorithms_are_found(name, target):
    assert find('recipe', 'algorithm', name, components.algorithms()) is target


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('sgd', torch.optim.SGD),
        ('AdamW', torch.optim.AdamW),
        ('decoupled_sgdw', composer.optim.DecoupledSGDW),
        ('decoupled_adamw', composer.optim.DecoupledAdamW),
    ],
)
def test_torchs_and_composers_optimizers_come_before_timms(name, expected):
    assert find('recipe', 'optimizer', name, components.optimizers()) is expected


@pytest.mark.parametrize('name', ['lars', 'lamb', 'lion'])
def test_timms_optimizers_step(name):
    weight = torch.nn.Parameter(torch.ones(3, 3))
    target = find('recipe', 'optimizer', name, components.optimizers())
    optimizer = Component('optimizer', target, check_arguments('optimizer', target, {'lr': 0.1}, given=('params',))).build([weight])
    weight.square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, torch.ones(3, 3))


@pytest.mark.parametrize(
    'registry', [components.algorithms, components.callbacks, components.schedulers, components.loggers, components.optimizers]
)
def test_the_defaults_of_every_signature_pass_their_own_check(registry):
    for name, target in registry().items():
        plain = {
            key: parameter.default
            for key, parameter in inspect.signature(target).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and isinstance(parameter.default, (bool, int, float, str, tuple))
        }
        for key, value in plain.items():
            hint = parameters(target)[key].hint
            check_type(f'{name}.{key}', value, hint)


@pytest.mark.parametrize(
    ('value', 'hint', 'fits'),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (True, float, False),
        ('1', float, False),
        (None, int, False),
        (None, int | None, True),
        ('x', bool | str, True),
        (False, bool | str, True),
        (0, bool | str, False),
        ('10ep', str | Time, True),
        ('10epp', str | Time, False),
        (3, int | str | Time[int], True),
        (3.5, int | str | Time[int], False),
        (['1ep', '2ba'], list[str | Time], True),
        (['1ep', 'x'], list[str | Time], False),
        ([1, 2], tuple[float, float], True),
        ([1, 'a'], tuple[float, float], False),
        ('ab', Sequence[str], False),
        ({}, dict[str, int], True),
        ([], dict, False),
        ('a', Literal['a', 'b'], True),
        ('c', Literal['a', 'b'], False),
        ('amp_bf16', Precision, True),
        ('bf61', Precision, False),
        (1.0, torch.Tensor, False),
        (object(), Any, True),
    ],
)
def test_check_type(value, hint, fits):
    if fits:
        check_type('key', value, hint)
    else:
        with pytest.raises(InputError, match=r'^key: expected .+, got '):
            check_type('key', value, hint)


def test_arguments_of_a_base_class_that_ignores_them_are_refused():
    with pytest.raises(InputError, match=r'callbacks.nan_monitor.window: unknown argument'):
        check_arguments('callbacks.nan_monitor', composer.callbacks.NaNMonitor, {'window': 3})


def test_open_keyword_arguments_are_let_through():
    def target(first: int, **rest: Any) -> None: ...

    assert check_arguments('key', target, {'first': 1, 'other': 'x'}) == {'first': 1, 'other': 'x'}
    with pytest.raises(InputError, match=r'^key.given: unknown argument'):
        check_arguments('key', target, {'first': 1, 'given': 1}, given=('given',))
    with pytest.raises(InputError, match=r'^key.first: missing; expected an integer'):
        check_arguments('key', target, {})


@pytest.mark.parametrize('error', [ValueError('bad\nvalue'), TypeError('bad value'), ImportError('bad value')])
def test_what_a_constructor_refuses_is_bad_input_on_one_line(error):
    def target() -> None:
        raise error

    with pytest.raises(InputError, match=r'^recipe.yaml: thing: bad value$'):
        Component('recipe.yaml: thing', target, {}).build()


def test_a_fault_of_the_program_stays_one():
    source = 'def target():\n    return {}["x"]\n\ndef calls():\n    return target(1)'
    ours: dict[str, Any] = {'__name__': 'composer_effalgos.somewhere'}
    exec(source, ours)
    theirs: dict[str, Any] = {'__name__': 'composer.somewhere'}
    exec(source, theirs)
    with pytest.raises(KeyError):
        Component('thing', ours['target'], {}).build()
    with pytest.raises(TypeError):
        Component('thing', ours['calls'], {}).build()
    with pytest.raises(InputError, match=r"^thing: KeyError: 'x'$"):
        Component('thing', theirs['target'], {}).build()
    with pytest.raises(InputError, match=r'^thing: .*unexpected keyword'):  # the call itself does not fit
        Component('thing', ours['target'], {'x': 1}).build()


def test_did_you_mean():
    assert did_you_mean('Info-Bach', ['infobatch', 'adabatch']) == "did you mean 'infobatch'?"
    assert did_you_mean('zzz', ['b', 'a']) == 'known: a, b'
    assert did_you_mean('zzz', []) == 'known: none'
