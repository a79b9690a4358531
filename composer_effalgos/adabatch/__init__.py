"""AdaBatch: batch sizes that change during training."""

from composer_effalgos.adabatch.adabatch import AdaBatch
from composer_effalgos.adabatch.gradient_noise import NoiseScale, NormTest, noise_and_signal
from composer_effalgos.adabatch.policies import Every, LossPlateau, Milestones, Policy
from composer_effalgos.adabatch.schedules import SizePolicy, parse_steps, ramp
from composer_effalgos.adabatch.seesaw import Seesaw
from composer_effalgos.plan.progress import Progress

__all__ = [
    'AdaBatch',
    'Every',
    'LossPlateau',
    'Milestones',
    'NoiseScale',
    'NormTest',
    'Policy',
    'Progress',
    'Seesaw',
    'SizePolicy',
    'noise_and_signal',
    'parse_steps',
    'ramp',
]
