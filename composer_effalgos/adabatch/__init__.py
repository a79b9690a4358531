"""AdaBatch: batch sizes that grow during training."""

from composer_effalgos.adabatch.adabatch import AdaBatch
from composer_effalgos.adabatch.policies import Every, LossPlateau, Milestones, NoiseScale, Policy, Progress, noise_and_signal

__all__ = ['AdaBatch', 'Every', 'LossPlateau', 'Milestones', 'NoiseScale', 'Policy', 'Progress', 'noise_and_signal']
