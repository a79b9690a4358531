"""The plan of each epoch: samples, weights and batch sizes. Independent of any particular algorithm."""

from composer_effalgos.plan.clock import EpochClock
from composer_effalgos.plan.epoch import BatchSize, EpochPlan, check_seed, plan_epoch, resume_epoch, split_batches, stream_seed
from composer_effalgos.plan.horizon import Budget, check_budget
from composer_effalgos.plan.loader import PlannedDataLoader, class_labels, tokens_per_sample
from composer_effalgos.plan.loss import WeightedLoss
from composer_effalgos.plan.per_sample import PerSampleLoss, check_per_sample_loss, per_sample_mean
from composer_effalgos.plan.planner import EpochPlanner
from composer_effalgos.plan.ranks import Ranks
from composer_effalgos.plan.readers import BatchReader, Reading
from composer_effalgos.plan.samples import full_dataset
from composer_effalgos.plan.selector import Choice, EpochMetrics, Selector, Selectors
from composer_effalgos.plan.shard import Shard
from composer_effalgos.plan.shard_table import ShardTable
from composer_effalgos.plan.table import SampleRows, SampleTable
from composer_effalgos.plan.token_loss import Tokens

__all__ = [
    'BatchReader',
    'BatchSize',
    'Budget',
    'Choice',
    'EpochClock',
    'EpochMetrics',
    'EpochPlan',
    'EpochPlanner',
    'PerSampleLoss',
    'PlannedDataLoader',
    'Ranks',
    'Reading',
    'SampleRows',
    'SampleTable',
    'Selector',
    'Selectors',
    'Shard',
    'ShardTable',
    'Tokens',
    'WeightedLoss',
    'check_budget',
    'check_per_sample_loss',
    'check_seed',
    'class_labels',
    'full_dataset',
    'per_sample_mean',
    'plan_epoch',
    'resume_epoch',
    'split_batches',
    'stream_seed',
    'tokens_per_sample',
]
