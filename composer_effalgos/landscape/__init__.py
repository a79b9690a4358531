"""The loss landscape around and between two solutions (Keskar et al., arXiv 1609.04836)."""

from composer_effalgos.landscape.curve import Point, alphas, evaluate, line, on_the_line, reestimate_batch_norm
from composer_effalgos.landscape.figure import draw
from composer_effalgos.landscape.sharpness import box_maximum, random_basis, sharpness, training_loss
from composer_effalgos.landscape.study import Settings, Study, interpolate

__all__ = [
    'Point',
    'Settings',
    'Study',
    'alphas',
    'box_maximum',
    'draw',
    'evaluate',
    'interpolate',
    'line',
    'on_the_line',
    'random_basis',
    'reestimate_batch_norm',
    'sharpness',
    'training_loss',
]
