"""The heart of the package: which samples, with which weight, in batches of which size, each epoch. Nothing here knows an algorithm."""

from composer_effalgos.plan.clock import EpochClock
from composer_effalgos.plan.epoch import BatchSize, EpochPlan, by_shard, check_seed, plan_epoch, resume_epoch, split_batches, stream_seed
from composer_effalgos.plan.loader import DataPath, PlannedDataLoader, Reading
from composer_effalgos.plan.loss import PerSampleLoss, WeightedLoss, per_sample_mean
from composer_effalgos.plan.plan import Plan

__all__ = [
    'BatchSize',
    'DataPath',
    'EpochClock',
    'EpochPlan',
    'PerSampleLoss',
    'Plan',
    'PlannedDataLoader',
    'Reading',
    'WeightedLoss',
    'by_shard',
    'check_seed',
    'per_sample_mean',
    'plan_epoch',
    'resume_epoch',
    'split_batches',
    'stream_seed',
]
