import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from composer_effalgos import InputError
from composer_effalgos import functional as ef


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_by_hand():
    # mean 3.5; below it are 0, 1, 2, 3, 4, 6, 7: seven samples, of which floor(0.5 * 7) = 3 are kept with weight 2
    scores = torch.tensor([1.0, 2.0, 3.0, 0.5, 1.5, 9.0, 2.5, 3.0, 8.0, 4.5])
    kept, weights = ef.prune(scores, 0.5, generator())
    assert scores.mean() == 3.5
    assert len(kept) == 6
    assert {5, 8, 9} <= set(kept.tolist())
    assert weights.tolist() == [1.0 if i in (5, 8, 9) else 2.0 for i in kept.tolist()]
    assert kept.tolist() == sorted(kept.tolist())


def test_a_score_at_the_mean_is_not_pruned():
    kept, weights = ef.prune(torch.ones(10), 0.9, generator())
    assert kept.tolist() == list(range(10))
    assert weights.tolist() == [1.0] * 10


def test_ratios_that_floats_cannot_hold():
    scores = torch.tensor([0.0] * 10 + [100.0])
    kept, weights = ef.prune(scores, 0.9, generator())  # (1 - 0.9) * 10 is 0.9999999999999998
    assert len(kept) == 2
    assert weights.tolist() == pytest.approx([10.0, 1.0])


def test_matches_the_published_rule():
    # InfoBatch.prune of the authors' code: the candidates, the number kept and the weights, on the same scores
    scores = torch.rand(1000, generator=generator(3))
    for ratio in (0.25, 0.5, 0.75):
        well_learned = scores < scores.mean()
        kept, weights = ef.prune(scores, ratio, generator())
        of_those = well_learned[kept]
        assert int(of_those.sum()) == int((1 - ratio) * int(well_learned.sum()))
        assert int((~of_those).sum()) == int((~well_learned).sum())
        assert (weights[of_those] == 1 / (1 - ratio)).all()
        assert (weights[~of_those] == 1).all()


def test_not_finite_scores_are_kept_and_do_not_move_the_mean():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, math.nan, math.inf, -math.inf])
    for seed in range(20):
        kept, weights = ef.prune(scores, 0.5, generator(seed))
        assert {2, 3, 4, 5, 6} <= set(kept.tolist())
        assert len(kept) == 6
        assert weights[kept >= 2].tolist() == [1.0] * 5
    kept, _ = ef.prune(torch.full((4,), math.nan), 0.5)
    assert kept.tolist() == [0, 1, 2, 3]


@given(
    st.lists(st.floats(0, 100, width=32) | st.just(math.nan), min_size=1, max_size=200),
    st.floats(0, 0.99),
    st.integers(0, 100),
)
@example([0.0, 1.401298464324817e-45], 0.5, 0)
def test_properties(values, ratio, seed):
    scores = torch.tensor(values)
    kept, weights = ef.prune(scores, ratio, generator(seed))
    assert kept.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert kept.tolist() == sorted(set(kept.tolist()))
    finite = scores[torch.isfinite(scores)]
    # both in double precision: beside a float32 vector torch would round the mean, down to 0 in the example
    prunable = torch.isfinite(scores) & (scores.double() < finite.double().mean())
    assert set((~prunable).nonzero().flatten().tolist()) <= set(kept.tolist())
    assert (weights[~prunable[kept]] == 1).all()
    # the weights sum to N within one weight
    assert abs(weights.double().sum().item() - len(scores)) <= 1 / (1 - ratio) + 1e-3
    again, same = ef.prune(scores, ratio, generator(seed))
    assert torch.equal(kept, again)
    assert torch.equal(weights, same)


def test_every_candidate_is_kept_equally_often():
    scores = torch.cat([torch.zeros(8), torch.full((2,), 10.0)])
    counts = torch.zeros(10)
    draws = 4000
    for seed in range(draws):
        counts[ef.prune(scores, 0.5, generator(seed))[0]] += 1
    deviation = 5 * math.sqrt(draws * 0.25)
    assert (counts[8:] == draws).all()
    assert (counts[:8] - draws / 2).abs().max() < deviation


def test_the_weighted_gradient_is_unbiased():
    torch.manual_seed(0)
    inputs, targets = torch.randn(60, 5), torch.randint(3, (60,))
    weight = torch.randn(3, 5, requires_grad=True)

    def losses():
        return torch.nn.functional.cross_entropy(inputs @ weight.T, targets, reduction='none')

    gradients = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten() for loss in losses()])
    full = gradients.sum(dim=0)
    draws = torch.stack(
        [
            (gradients[kept] * weights[:, None]).sum(dim=0)
            for kept, weights in (ef.prune(losses().detach(), 0.5, generator(s)) for s in range(3000))
        ]
    )
    error = draws.std(dim=0) / math.sqrt(len(draws))
    # an odd number of candidates keeps floor(m / 2) of them: a bias of at most one sample's share
    below = int((losses() < losses().mean()).sum())
    bias = gradients[losses() < losses().mean()].sum(dim=0).abs() * (1 - 2 * (below // 2) / below)
    assert ((draws.mean(dim=0) - full).abs() <= 5 * error + bias + 1e-6).all()
    assert (draws.std(dim=0) > 0).all()


@pytest.mark.parametrize('ratio', [0.5, 0.9])
def test_with_small_classes_every_sample_still_counts_once_on_average(ratio):
    scores, labels, draws = torch.rand(90, generator=generator(1)), torch.arange(90) % 30, 2000
    counted = torch.zeros(90)
    for seed in range(draws):
        kept, weights = ef.prune(scores, ratio, generator(seed), labels=labels)
        counted[kept] += weights
    deviation = math.sqrt(draws * ratio / (1 - ratio))  # of a sample kept with probability 1 - ratio, with weight 1 / (1 - ratio)
    assert ((counted - draws).abs() <= 5 * deviation).all()


@pytest.mark.parametrize('ratio', [1, 1.0, -0.1, 2, 'half', None, True, math.nan])
def test_refuses_ratios(ratio):
    with pytest.raises(InputError, match='prune_ratio'):
        ef.prune(torch.rand(5), ratio)


def test_refuses_a_matrix():
    with pytest.raises(InputError, match='scores'):
        ef.prune(torch.rand(5, 2), 0.5)
