"""The sample table against a loop over samples."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composer.core import Callback
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from composer_effalgos import AdaBatch, InfoBatch
from composer_effalgos.plan import EpochPlan, EpochPlanner, SampleTable


def run(table: SampleTable, plan: SimpleNamespace, draw: np.random.Generator, size: int, epochs: int, batch: int = 7):
    """Trains ``epochs`` random epochs; gives the losses of each sample, the oldest first."""
    losses: list[list[float]] = [[] for _ in range(size)]
    for _ in range(epochs):
        kept = torch.from_numpy(np.sort(draw.choice(size, draw.integers(1, size + 1), replace=False)))
        permutation = torch.from_numpy(draw.permutation(len(kept)))
        epoch = EpochPlan(kept, None, (len(kept),), permutation)
        plan.loader = SimpleNamespace(plan=epoch, rank_order=epoch.order, rank_orders=lambda order=epoch.order: [order])
        seen = torch.from_numpy(draw.choice([0.5, 1.0, 2.0, np.nan, np.inf], len(kept))).float()
        for start in range(0, len(kept), batch):
            table.note(seen[start : start + batch], slice(start, min(start + batch, len(kept))))
        for sample, loss in zip(epoch.order.tolist(), seen.tolist(), strict=True):
            losses[sample].append(loss if math.isfinite(loss) else math.inf)
        before = table.of_this_rank()
        table.end_epoch(None)
        assert torch.equal(before.history, table.rows.history)
        assert not table.noted
    return losses


@given(st.integers(1, 30), st.integers(0, 6), st.integers(1, 4), st.integers(0, 50))
def test_history_flags_and_counts(size, epochs, history, seed):
    plan = SimpleNamespace()
    table = SampleTable(plan, history)
    table.reset(size)
    losses = run(table, plan, np.random.default_rng(seed), size, epochs)
    rows = table.rows
    for sample, past in enumerate(losses):
        newest_first = past[::-1][:history]
        assert rows.history[:, sample].tolist() == newest_first + [0.0] * (history - len(newest_first))
        assert (bool(rows.scored[sample]), int(rows.trained[sample])) == (len(past) > 0, len(past))
    assert not rows.history.isnan().any()
    assert torch.equal(rows.scores, rows.history[0])


@pytest.mark.parametrize('decay', [0.5, 0.9])
def test_a_moving_average_of_the_finite_scores(decay):
    plan = SimpleNamespace()
    table = SampleTable(plan, decay=decay)
    table.reset(20)
    losses = run(table, plan, np.random.default_rng(0), 20, 6)
    for sample, past in enumerate(losses):
        if not past:
            continue
        average = past[0]
        for loss in past[1:]:
            average = decay * average + (1 - decay) * loss if math.isfinite(average) and math.isfinite(loss) else loss
        assert table.rows.scores[sample].item() == pytest.approx(average)


def test_what_is_saved_within_an_epoch_is_loaded_and_does_not_change():
    plan = SimpleNamespace()
    table = SampleTable(plan, 2)
    table.reset(12)
    draw = np.random.default_rng(1)
    run(table, plan, draw, 12, 2)
    table.offer(torch.arange(5))
    kept = torch.arange(12)
    epoch = EpochPlan(kept, None, (12,))
    plan.loader = SimpleNamespace(plan=epoch, rank_order=kept, rank_orders=lambda: [kept])
    table.note(torch.full((4,), 3.0), slice(2, 6))
    saved = table.state_dict(SimpleNamespace())
    copies = {name: value.clone() for name, value in saved.items()}
    again = SampleTable(plan, 2)
    again.load_state_dict(saved)
    table.end_epoch(None)
    assert all(torch.equal(saved[name], value) for name, value in copies.items())
    assert torch.equal(again.rows.history, table.rows.history)
    assert again.rows.offered.tolist() == [True] * 5 + [False] * 7
    assert torch.equal(again.rows.trained + 1, table.rows.trained)
    assert again.rows.take(torch.tensor([2, 5])).scores.tolist() == [3.0, 3.0]


def test_a_batch_size_that_changes_within_the_epoch_drops_its_last_samples(make_trainer, problem):
    class Count(Callback):
        batches = 0

        def batch_end(self, state, logger):
            self.batches += 1

    count, infobatch = Count(), InfoBatch()
    trainer = make_trainer(
        [infobatch, AdaBatch(2, policy=lambda progress: int(count.batches >= 3))],
        dataset=TensorDataset(*(t[:128] for t in problem.tensors)),
        batch_size=12,
        max_duration='1ep',
        callbacks=[EpochPlanner(tail='half'), count],
    )
    trainer.fit()
    assert trainer.recorder.sizes == [[12] * 3 + [24] * 3 + [12]]  # planned: ten of 12 and one of 6
    rows = infobatch._table.rows
    assert int(rows.scored.sum()) == int(rows.trained.sum()) == 120
    assert torch.equal(rows.scored, rows.trained == 1)
