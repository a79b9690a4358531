"""Finds the Trainer of a run, to which Composer's state does not refer."""

from __future__ import annotations

import gc
import weakref

from composer import Trainer
from composer.core import DataSpec, State

_TRAINERS: weakref.WeakKeyDictionary[State, weakref.ref[Trainer]] = weakref.WeakKeyDictionary()  # a search takes a tenth of a second


def training_data_spec(state: State) -> DataSpec | None:
    """The ``DataSpec`` whose transforms the Trainer applies to training batches; ``None`` if no Trainer has this state."""
    trainer = trainer_of(state)
    return None if trainer is None else next((value for value in vars(trainer).values() if isinstance(value, DataSpec)), None)


def trainer_of(state: State) -> Trainer | None:
    """The Trainer of a state, or ``None``.

    Composer gives algorithms the state, which does not refer to the Trainer, so this searches the live objects for the Trainer with this
    state.
    """
    trainer = _TRAINERS[state]() if state in _TRAINERS else None
    if trainer is None:
        # issubclass(type()): on lazy modules, isinstance() triggers an import
        found = (item for item in gc.get_objects() if issubclass(type(item), Trainer))
        trainer = next((item for item in found if getattr(item, 'state', None) is state), None)
        if trainer is not None:
            _TRAINERS[state] = weakref.ref(trainer)
    return trainer
