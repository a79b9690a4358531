"""The heart of the package: which samples, with which weight, in batches of which size, each epoch. Nothing here knows an algorithm."""

from composer_effalgos.plan.clock import EpochClock
from composer_effalgos.plan.epoch import BatchSize, EpochPlan, by_shard, check_seed, plan_epoch, resume_epoch, split_batches, stream_seed
from composer_effalgos.plan.loader import DataPath, PlannedDataLoader, Reading, class_labels
from composer_effalgos.plan.loss import PerSampleLoss, WeightedLoss, per_sample_mean
from composer_effalgos.plan.plan import Plan
from composer_effalgos.plan.record import EpochRecord

__all__ = [
    'BatchSize',
    'DataPath',
    'EpochClock',
    'EpochPlan',
    'EpochRecord',
    'PerSampleLoss',
    'Plan',
    'PlannedDataLoader',
    'Reading',
    'WeightedLoss',
    'by_shard',
    'check_seed',
    'class_labels',
    'per_sample_mean',
    'plan_epoch',
    'resume_epoch',
    'split_batches',
    'stream_seed',
]
