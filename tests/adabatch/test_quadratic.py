"""SGD with growing batches against its closed form."""

import math

import pytest
import torch
from composer.core import Callback

from composer_effalgos import AdaBatch
from composer_effalgos.adabatch import Progress

COUNT, DIMENSIONS, RATE, START = 240, 400, 0.2, 1.5


class Watch(Callback):
    """Notes the excess loss of each coordinate, ``w^2 / 2`` (the points' mean is 0), at the end of every epoch."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []

    def epoch_end(self, state, logger):
        self.losses.append(0.5 * state.model.weights.detach().double() ** 2)


def predicted(epochs: list[list[int]], rates: list[list[float]], start: float) -> list[float]:
    """Expected excess loss of a coordinate after each epoch.

    A step is ``w <- (1 - a) w + a m`` with the mean ``m`` of the batch. Batches of ``b`` out of ``N`` points of unit variance, drawn
    without replacement, have means of variance ``(N - b) / (b (N - 1))`` and covariance ``-1 / (N - 1)`` within an epoch, none across
    epochs. So the second moment of ``w``, which is linear in all the means, is ``prod(1 - a)^2 w_0^2 + c' Cov(m) c``.
    """
    losses, second_moment = [], start**2
    for sizes, learning_rates in zip(epochs, rates, strict=True):
        a, b = torch.tensor(learning_rates, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
        shrunk = (1 - a).flip(0).cumprod(0).flip(0)
        coefficients = a * torch.cat([shrunk[1:], torch.ones(1, dtype=torch.float64)])  # how much of each mean is left at the end
        covariance = torch.full((len(b), len(b)), -1 / (COUNT - 1), dtype=torch.float64)
        covariance += torch.diag((COUNT - b) / (b * (COUNT - 1)) + 1 / (COUNT - 1))
        second_moment = (shrunk[0] ** 2 * second_moment + coefficients @ covariance @ coefficients).item()
        losses.append(0.5 * second_moment)
    return losses


def unforeseen(times):
    class Policy(Callback):
        growths = 0

        def __call__(self, progress: Progress) -> int:
            return self.growths

        def batch_end(self, state, logger):
            self.growths = sum(int(state.timestamp.batch) >= time for time in times)

    return Policy()


# Sizes and rates by hand: 240 points, first batch 8; growths within the second epoch (after 45 batches: 15 of its own) and at the fourth
GROWN = [[8] * 30, [8] * 15 + [24] * 5, [24] * 10, [72] * 2 + [48] * 2]
SCALES = [[1.0] * 30, [1.0] * 15 + [0.5] * 5, [0.5] * 10, [0.25] * 4]
RUNS = {
    'fixed': (lambda: AdaBatch(2, '99ep'), [[8] * 30] * 4, [[1.0] * 30] * 4),
    'foreseen': (lambda: AdaBatch(3, milestones=['45ba', '3ep'], lr_factor=0.5), GROWN, SCALES),
    'unforeseen': (lambda: AdaBatch(3, policy=unforeseen([45, 60]), lr_factor=0.5), GROWN, SCALES),
}


@pytest.mark.parametrize('run', RUNS)
def test_follows_the_predicted_loss(make_trainer, distance, points, run):
    algorithm, sizes, scales = RUNS[run]
    watch = Watch()
    trainer = make_trainer(
        [algorithm()],
        model=distance(torch.full((DIMENSIONS,), START)),
        dataset=points(COUNT, DIMENSIONS),
        batch_size=8,
        lr=RATE,
        max_duration='4ep',
        callbacks=[watch],
    )
    for group in trainer.state.optimizers[0].param_groups:
        group['momentum'] = 0.0
    trainer.fit()
    assert trainer.recorder.sizes == sizes
    expected = predicted(sizes, [[RATE * scale for scale in epoch] for epoch in scales], START)
    for found, loss in zip(watch.losses, expected, strict=True):
        assert abs(found.mean().item() - loss) < 4 * found.std().item() / math.sqrt(DIMENSIONS)
    if run != 'fixed':  # and the growth is what the prediction is about: without it the loss would be another
        fixed = predicted(*RUNS['fixed'][1:2], [[RATE] * 30] * 4, START)
        assert watch.losses[-1].mean().item() < fixed[-1] / 3
