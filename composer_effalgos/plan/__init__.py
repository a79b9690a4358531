"""The plan of each epoch: samples, weights and batch sizes. Independent of any particular algorithm."""

from composer_effalgos.plan.clock import EpochClock
from composer_effalgos.plan.epoch import BatchSize, EpochPlan, by_shard, check_seed, plan_epoch, resume_epoch, split_batches, stream_seed
from composer_effalgos.plan.horizon import Budget, Horizon, check_budget
from composer_effalgos.plan.loader import PlannedDataLoader, class_labels, tokens_per_sample
from composer_effalgos.plan.loss import PerSampleLoss, Weigher, WeightedLoss, per_sample_mean
from composer_effalgos.plan.per_sample import check_per_sample_loss
from composer_effalgos.plan.planner import EpochPlanner
from composer_effalgos.plan.ranks import Ranks
from composer_effalgos.plan.readers import BatchReader, Reading
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
    'Horizon',
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
    'Weigher',
    'WeightedLoss',
    'by_shard',
    'check_budget',
    'check_per_sample_loss',
    'check_seed',
    'class_labels',
    'per_sample_mean',
    'plan_epoch',
    'resume_epoch',
    'split_batches',
    'stream_seed',
    'tokens_per_sample',
]
