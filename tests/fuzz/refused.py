"""What bad input may lead to: one line or a success, in time."""

import warnings
from collections.abc import Callable
from typing import Any

from composer_effalgos.recipes.faults import explain
from tests.fuzz.mutate import limit

SECONDS = 20  # far above what any case takes, on a busy machine too
SMALL = {
    'max_duration': '2ba',
    'progress_bar': False,
    'dataset': {'name': 'synthetic', 'batch_size': 8, 'num_samples': 32, 'eval_samples': 8, 'num_classes': 3, 'image_size': 8},
    'model': {'name': 'resnet20_cifar'},
    'optimizer': {'name': 'sgd', 'lr': 0.1, 'momentum': 0.9},
    'scheduler': {'name': 'one_cycle', 'max_lr': 0.1},
    'algorithms': {
        'infobatch': {'prune_ratio': 0.3, 'delta': 0.8},
        'adabatch': {'growth_factor': 2.0, 'interval': '1ba'},
        'label_smoothing': {'smoothing': 0.1},
        'ghost_batchnorm': {'ghost_batch_size': 4},
        'progressive_resizing': {'initial_scale': 0.5},
    },
    'callbacks': {'speed_monitor': {'window_size': 2}},
}


def one_line_or_none(case: Callable[[], Any], about: object) -> bool:
    """Whether the case succeeded; what it refuses must be one line."""
    try:
        with limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            case()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            assert not isinstance(cause, TimeoutError), f'a hang: {about!r:.2000}'
            cause = cause.__cause__ or cause.__context__
        explained = explain(error)
        if explained is None:
            raise AssertionError(f'{type(error).__name__} from {about!r:.2000}') from error
        line = explained[0]
        assert line, about
        assert '\n' not in line, about
        assert len(line) < 3000, about
        return False
    return True
