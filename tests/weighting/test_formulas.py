"""The weights against straight-line implementations of the papers' formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_effalgos import functional as ef

losses_of = st.lists(st.floats(0, 20, width=32), min_size=1, max_size=40)


def paper_lin_upper(losses: list[float], r: float) -> list[float]:
    """Algorithm 1 and equation of LinUpper, number by number, times the number of samples."""
    low, high = min(losses), max(losses)
    scaled = [2 * loss / max(high - low, 1e-6) - (high + low) / max(high - low, 1e-6) for loss in losses]
    powers = [math.exp((min(h + 1, 1) - 1) / r) for h in scaled]
    return [len(losses) * power / sum(powers) for power in powers]


@given(losses_of, st.floats(0.05, 10))
def test_lin_upper_is_the_papers(losses, temperature):
    ours = ef.lin_upper(torch.tensor(losses, dtype=torch.float64), temperature)
    assert ours.tolist() == pytest.approx(paper_lin_upper(losses, temperature), rel=1e-6)
    assert ours.mean().item() == pytest.approx(1)


def test_lin_upper_by_hand():
    weights = ef.lin_upper(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), temperature=0.5)
    # from the middle of the range on all count the same, and e^2 times as much as the smallest
    assert weights[2:].tolist() == pytest.approx([weights[2].item()] * 3)
    assert (weights[2] / weights[0]).item() == pytest.approx(math.exp(2), rel=1e-5)
    assert (weights[2] / weights[1]).item() == pytest.approx(math.exp(1), rel=1e-5)
    assert ef.lin_upper(torch.full((7,), 3.0)).tolist() == pytest.approx([1.0] * 7)


def value_at_risk(scores: list[float], alpha: float) -> float:
    """``inf {t: P(S <= t) >= alpha}`` by trying every score."""
    return min(t for t in scores if sum(s <= t for s in scores) >= alpha * len(scores) - 1e-6)


@given(st.data(), losses_of, st.floats(0, 0.99))
def test_selected_tokens_are_those_at_and_above_the_value_at_risk(data, losses, alpha):
    counts = data.draw(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=len(losses), max_size=len(losses)))
    if not any(counts):
        return
    shares = [count / sum(counts) for count in counts]
    weights = ef.select_above_quantile(torch.tensor(losses), torch.tensor(shares), alpha).tolist()
    threshold = value_at_risk([loss for loss, share in zip(losses, shares, strict=True) if share], alpha)
    kept = [share > 0 and loss >= threshold for loss, share in zip(losses, shares, strict=True)]
    assert [weight > 0 for weight in weights] == kept
    # the weighted mean over all is the mean over the kept
    ours = sum(w * s * loss for w, s, loss in zip(weights, shares, losses, strict=True))
    theirs = sum(s * loss for s, loss, keep in zip(shares, losses, kept, strict=True) if keep) / sum(
        s for s, keep in zip(shares, kept, strict=True) if keep
    )
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_how_many_are_kept():
    scores, shares = torch.arange(10.0), torch.full((10,), 0.1)
    for quantile, kept in ((0, 10), (0.1, 10), (0.11, 9), (0.3, 8), (0.7, 4), (0.9, 2), (0.99, 1)):
        assert int((ef.select_above_quantile(scores, shares, quantile) > 0).sum()) == kept, quantile
    for size, quantile in ((90, 0.6), (20, 0.3), (20_000, 0.3)):  # in float32, 90 * 0.6 is above 54
        found = ef.select_above_quantile(torch.arange(float(size)), torch.full((size,), 1 / size), quantile)
        assert int((found > 0).sum()) == size - round(quantile * size) + 1
    tied = torch.tensor([1.0, 2.0, 2.0, 2.0])
    assert ef.select_above_quantile(tied, torch.full((4,), 0.25), 0.9).tolist() == pytest.approx([0, 4 / 3, 4 / 3, 4 / 3])
