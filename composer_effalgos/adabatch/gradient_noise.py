"""Policies based on gradient noise, measured from the gradients of parts of a batch without an extra backward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from composer.core import Precision, State, Time
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from composer_effalgos.adabatch.schedules import SizePolicy
from composer_effalgos.adabatch.watching import Watching
from composer_effalgos.plan import EpochPlanner
from composer_effalgos.plan.progress import Progress
from composer_effalgos.plan.trainer import trainer_of, training_data_spec
from composer_effalgos.utils.checks import LARGEST, check_number, check_whole
from composer_effalgos.utils.errors import InputError


def noise_and_signal(
    weighted_squares: Tensor | float, square: Tensor | float, num_parts: Tensor | int, batch_size: float
) -> tuple[Any, Any]:
    """Unbiased estimates of the gradient's noise and signal from a batch that was split into parts.

    Let ``g_i`` be the mean gradient of part ``i`` with ``b_i`` samples, and ``G`` that of the batch with ``B`` samples. Then
    ``S = (sum_i b_i |g_i|^2 - B |G|^2) / (k - 1)`` estimates the trace of the covariance of a single sample's gradient, and
    ``|G|^2 - S / B`` the squared norm of the true gradient. For parts of equal size these are equations A.2 of McCandlish et al., arXiv
    1812.06162; their ratio is the noise scale.

    Args:
        weighted_squares: ``sum_i b_i |g_i|^2``.
        square: ``|G|^2``.
        num_parts: ``k``, at least 2.
        batch_size: ``B``.

    Returns:
        Noise ``S`` and signal.
    """
    noise = (weighted_squares - batch_size * square) / (num_parts - 1)
    return noise, square - noise / batch_size


class GradientNoise(Watching):
    """Measures the noise and the signal of the gradient during training, without an extra backward pass.

    Every ``measure_every`` batches, the squared norms of the gradients of the batch's parts (microbatches, ranks) and of the whole batch
    give unbiased estimates of noise and signal, which are averaged exponentially. Subclasses decide at the end of each window.

    A measured batch with only one part (one rank without microbatches) is trained in two halves. With FSDP, where each rank holds a shard
    of the gradient, a part is a microbatch over all ranks, and a copy of the shard is kept while a batch is measured. The norms stay on the
    device; only the decision at the end of a window synchronises with the host. They are computed before gradient clipping, and the loss
    scale of mixed precision is divided out. With ``Trainer(accumulate_train_batch_on_tokens=True)`` a part counts by its tokens.

    Args:
        window: Time between decisions: epochs, batches, samples, tokens or a fraction of the run.
        measure_every: Batches between measurements, at least 1.
        decay: Weight of the old average, in [0, 1). No decision is made before ``1 / (1 - decay)`` measurements.

    Raises:
        InputError: For an argument outside its range; in ``fit``, for a run whose gradients cannot be measured.
    """

    def __init__(self, window: str | int | Time, measure_every: int, decay: float) -> None:
        check_number('decay', decay, least=0, below=1)
        check_whole('measure_every', measure_every, least=1, what='a whole number of batches')
        self.measure_every, self.decay = measure_every, decay
        self._hooks: list[Any] = []  # on the parameters, while a batch is measured
        self._measuring = False
        super().__init__(window)

    def _reset(self) -> None:
        super()._reset()
        self._averages: Tensor | None = None  # noise and signal, float32 [2], on the training device; both start at 0
        self._measured = 0

    @property
    def noise_scale(self) -> float:
        """The estimated noise scale, in samples; NaN before the first measurement, infinite if the signal estimate is not positive."""
        if self._averages is None:
            return math.nan
        noise, signal = self._averages.tolist()
        return noise / signal if signal > 0 else math.inf

    def state_dict(self) -> dict[str, Any]:
        averages = None if self._averages is None else self._averages.cpu()
        return super().state_dict() | {'averages': averages, 'measured': self._measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._averages, self._measured = state['averages'], state['measured']

    def fit_start(self, state: State, logger: Logger) -> None:
        super().fit_start(state, logger)
        trainer = trainer_of(state)
        on_tokens = trainer is not None and trainer.accumulate_train_batch_on_tokens
        spec = training_data_spec(state) if on_tokens else None
        self._tokens_in = None if spec is None else partial(spec.get_num_tokens_in_batch, token_type='loss_generating')
        strategy = str(getattr(state.fsdp_config, 'sharding_strategy', '')) if state.fsdp_enabled else 'FULL_SHARD'
        if strategy not in ('FULL_SHARD', 'SHARD_GRAD_OP'):
            raise InputError(
                f"policy: {type(self).__name__} expected FULL_SHARD or SHARD_GRAD_OP as FSDP's strategy, got {strategy}; use DDP"
            )

    def batch_start(self, state: State, logger: Logger) -> None:
        """Starts a measurement."""
        if int(state.timestamp.batch) % self.measure_every:
            return
        loader = EpochPlanner.of(state).loader
        batch = int(state.timestamp.batch_in_epoch)
        assert loader.plan is not None
        size = loader.plan.sizes[batch - loader.plan.first_batch]  # over all ranks, whose shares may differ
        part = state.device_train_microbatch_size
        assert part is not None
        mine = loader.batch_slice(batch)
        self._rank_samples, self._batch_size = mine.stop - mine.start, size
        self._halved = self._given = part
        one_part = self._rank_samples <= part and (size == self._rank_samples or state.fsdp_enabled)
        if one_part and self._rank_samples < 2:
            return
        if one_part:
            self._halved = state.device_train_microbatch_size = (self._rank_samples + 1) // 2
        self._measurement: Tensor | None = None
        self._measuring = True
        if not state.fsdp_enabled:
            self._hooks = [p.register_hook(self._see) for p in state.model.parameters() if p.requires_grad]

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Restarts the measurement when a batch is replayed."""
        self._norms: list[Tensor] = []
        self._shards: list[Tensor | None] = []  # this rank's shards of the gradient before this microbatch
        self._seen = 0
        self._squares: list[Tensor] = []  # of the gradient of each microbatch, as Composer weights it
        self._sizes: list[float] = []  # of each microbatch, as Composer counts it: in samples or tokens

    def _see(self, gradient: Tensor) -> None:
        """Receives a parameter's gradient of one microbatch on this rank, before accumulation and reduction over ranks."""
        self._norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))

    def after_backward(self, state: State, logger: Logger) -> None:
        """Computes the norms of a microbatch, and after the last one those of the batch."""
        if not self._measuring:
            return
        part = min(int(state.device_train_microbatch_size), self._rank_samples - self._seen)  # type: ignore[arg-type]
        self._seen += part
        self._sizes.append(float(self._tokens_in(state.batch)) if self._tokens_in is not None else part)
        if state.fsdp_enabled:
            self._see_shards(state)
            return
        self._squares.append(_sum_of_squares(self._norms))
        self._norms = []
        model = state.model
        if self._seen < self._rank_samples or (isinstance(model, DistributedDataParallel) and not model.require_backward_grad_sync):
            return
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in model.parameters() if p.grad is not None]
        self._measurement = torch.stack([*self._squares, _sum_of_squares(norms)]) / _loss_scale(state) ** 2

    def _see_shards(self, state: State) -> None:
        """This rank's part of the norms of a microbatch over all ranks, from the change of the sharded gradient."""
        gradients = [p.grad for p in state.model.parameters()]
        before = self._shards or [None] * len(gradients)
        added = [g if b is None else g - b for g, b in zip(gradients, before, strict=True) if g is not None]
        device = next(state.model.parameters()).device
        self._squares.append(_sum_of_squares([torch.linalg.vector_norm(g, dtype=torch.float32) for g in added], device))
        if self._seen < self._rank_samples:
            self._shards = [None if g is None else g.clone() for g in gradients]
            return
        square = _sum_of_squares([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients if g is not None], device)
        self._measurement = torch.stack([*self._squares, square]) / _loss_scale(state) ** 2
        self._shards = []

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._measuring:
            for hook in self._hooks:
                hook.remove()
            self._hooks, self._measuring = [], False
            if state.device_train_microbatch_size == self._halved:  # otherwise the microbatch did not fit on the device
                state.device_train_microbatch_size = self._given
            self._average(sharded=state.fsdp_enabled)
        super().batch_end(state, logger)

    def _average(self, *, sharded: bool) -> None:
        if self._measurement is None:
            raise InputError(
                f"policy: {type(self).__name__} saw no gradient summed over the ranks; use ddp_sync_strategy 'single_auto_sync'"
            )
        squares, square, ranks = self._measurement[:-1], self._measurement[-1], dist.get_world_size()
        # Composer weights a microbatch by its size over the ranks' mean size of a batch, and averages the ranks' gradients
        sizes = torch.tensor(self._sizes, dtype=squares.dtype, device=squares.device)
        divisors = sizes * ranks**2
        if sharded:  # a part is a microbatch over all ranks
            dist.all_reduce(divisors := sizes.clone())
        over_ranks = torch.stack([(squares / divisors).sum(), torch.full_like(square, len(squares)), square, sizes.sum()])
        dist.all_reduce(over_ranks)
        weighted_squares, parts = over_ranks[0] * self._batch_size * over_ranks[3], over_ranks[1]
        if sharded:
            parts, square = parts / ranks, over_ranks[2]
        measured = torch.stack(noise_and_signal(weighted_squares, square, parts, self._batch_size))
        before = torch.zeros_like(measured) if self._averages is None else self._averages.to(measured.device)
        # with mixed precision a gradient may overflow: skip the measurement
        self._averages = torch.where(measured.isfinite().all(), self.decay * before + (1 - self.decay) * measured, before)
        self._measured += 1

    def _decide(self, state: State, logger: Logger) -> None:
        if self._averages is None or self._measured < 1 / (1 - self.decay) - 1e-9:
            return
        logger.log_metrics({'adabatch/noise_scale': self.noise_scale})
        noise, signal = self._averages.tolist()
        self._judge(noise, signal, EpochPlanner.of(state).loader.batch_size * dist.get_world_size())

    def _judge(self, noise: float, signal: float, batch_size: int) -> None:
        """Decides at the end of a window, from the averages.

        Args:
            noise: Trace of the covariance of a single sample's gradient.
            signal: Squared norm of the true gradient.
            batch_size: Current global batch size.
        """
        raise NotImplementedError


class NoiseScale(GradientNoise):
    """Grows while the gradient noise scale is larger than the batch.

    The noise scale is the batch size at which the noise of the gradient is as large as the gradient itself. Far below it, doubling the
    batch halves the number of steps; far above it, larger batches hardly help. At the end of each window the batch grows once if the noise
    scale is at least ``ratio`` times the global batch size.

    Args:
        ratio: Smallest ratio of the noise scale to the global batch size for a growth, greater than 0. With 2, doubling never exceeds the
            noise scale.
        window: As for :class:`GradientNoise`, like the other arguments.
        measure_every: Batches between measurements.
        decay: Weight of the old average.

    Raises:
        InputError: As for :class:`GradientNoise`.

    Source: McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A.1.
    """

    def __init__(self, ratio: float = 2.0, window: str | int | Time = '1ep', measure_every: int = 10, decay: float = 0.95) -> None:
        check_number('ratio', ratio, above=0, most=LARGEST)
        self.ratio = ratio
        super().__init__(window, measure_every, decay)

    def _judge(self, noise: float, signal: float, batch_size: int) -> None:
        if noise > 0 and noise >= self.ratio * batch_size * signal:
            self.growths += 1


class NormTest(GradientNoise, SizePolicy):
    """Jumps to the batch size at which the gradient's noise passes the norm test.

    Let ``g`` be the gradient of a batch of ``b`` samples and ``S`` the trace of the covariance of a single sample's gradient. The test is
    ``S / b <= eta^2 |g|^2``. If it fails at the end of a window, the global batch size becomes ``ceil(S / (eta^2 |g|^2))``; it never
    shrinks. ``S`` and ``|g|^2`` are averages, unless ``decay`` is 0.

    In expectation ``|g|^2`` is ``|G|^2 + S / b`` with the true gradient ``G``. So the test passes for batches of at least ``1 / eta^2 - 1``
    times the noise scale ``S / |G|^2``, and a jump is at most a factor of ``1 / eta^2``.

    Args:
        eta: Largest allowed ratio of noise to gradient, in (0, 1). 0.5 stops at three times the noise scale.
        window: As for :class:`GradientNoise`, like the other arguments.
        measure_every: Batches between measurements.
        decay: Weight of the old average.

    Raises:
        InputError: As for :class:`GradientNoise`.

    Source: Lau et al., arXiv 2402.11215 and, for distributed training, arXiv 2412.21124; before them Byrd et al., "Sample size selection in
    optimization methods for machine learning", 2012.
    """

    def __init__(self, eta: float = 0.5, window: str | int | Time = '1ep', measure_every: int = 10, decay: float = 0.95) -> None:
        check_number('eta', eta, above=0, below=1)
        self.eta = eta
        super().__init__(window, measure_every, decay)

    def _reset(self) -> None:
        super()._reset()
        self.size: int | None = None  # over all ranks; None while no test has failed

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {'size': self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.size = state['size']

    def __call__(self, progress: Progress) -> int | None:  # type: ignore[override]
        """Samples per rank."""
        return None if self.size is None else -(-self.size // dist.get_world_size())

    def _judge(self, noise: float, signal: float, batch_size: int) -> None:
        allowed = self.eta**2 * (signal + noise / batch_size)  # the signal estimate may be negative, but not |g|^2
        if noise > batch_size * allowed > 0:
            self.size = math.ceil(min(noise / allowed, LARGEST))


def _sum_of_squares(norms: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
    return torch.stack(list(norms)).square().sum() if norms else torch.zeros((), device=device)


def _loss_scale(state: State) -> Tensor | float:
    """The loss scale of mixed precision, on the device."""
    if state.precision != Precision.AMP_FP16 or state.scaler is None:
        return 1.0
    scale = state.scaler.scale(torch.ones((), device=next(state.model.parameters()).device))
    assert isinstance(scale, Tensor)
    return scale
