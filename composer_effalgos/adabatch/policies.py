"""Growth policies: when the batch grows.

A policy is any function of how far the run is, ``policy(progress) -> growths``: how often the batch should have grown by now. It is asked
before every batch, and at the start of an epoch about its later batches too, so it must not count its calls, and every rank must come to
the same answer. One that has to see the training is a Composer ``Callback`` with ``__call__`` as well; AdaBatch adds it to the run, whose
events it gets and whose checkpoints hold its ``state_dict``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from composer.core import Callback, Precision, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from composer_effalgos.checks import LARGEST, check_number
from composer_effalgos.errors import InputError
from composer_effalgos.plan import Plan

UNITS = (TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.TOKEN, TimeUnit.DURATION)


class Progress(NamedTuple):
    """How far a run is before a batch.

    Attributes:
        epoch: Epochs that are over.
        batch: Batches trained.
        sample: Samples trained, over all ranks.
        token: Tokens trained, over all ranks; 0 where the batches have none. About later batches not known yet: those trained now.
        share: Share of the run that is over, in [0, 1]; in whole epochs where the run's length is in epochs.
    """

    epoch: int
    batch: int
    sample: int
    token: int = 0
    share: float = 0.0

    def of(self, unit: TimeUnit) -> float:
        """The progress in a unit of :data:`UNITS`."""
        return self[UNITS.index(unit)]


Policy = Callable[[Progress], int]
"""``progress -> growths``: how often the batch should have grown by now. AdaBatch never shrinks it."""


def parse_time(name: str, value: str | int | Time, units: Sequence[TimeUnit] = UNITS) -> Time:
    """Reads a time string.

    Args:
        name: The argument's name, for messages.
        value: A Composer time string (``'20ep'``), a :class:`composer.core.Time`, or a number of epochs.
        units: The units that are allowed.

    Returns:
        The time, greater than 0.

    Raises:
        InputError: Where it is not a time, not positive, or in another unit.
    """
    allowed = ', '.join(f"'{unit.value}'" for unit in units)
    try:
        time = Time(value, TimeUnit.EPOCH) if isinstance(value, int) and not isinstance(value, bool) else Time.from_input(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: must be a time such as '20ep' (units {allowed}), got {value!r}") from error
    if time.unit not in units or time.value <= 0:
        raise InputError(f'{name}: must be a positive time in one of the units {allowed}, got {value!r}')
    return time


def _passed(progress: Progress, time: Time) -> int:
    """How often ``time`` has passed: 0.6 of a run holds 0.2 three times, whatever floats say."""
    return math.floor(progress.of(time.unit) / time.value + 1e-9)


class Every:
    """Grows at regular intervals.

    Args:
        interval: Time between growths: epochs (``'20ep'``), batches (``'2000ba'``), samples (``'1000000sp'``), tokens (``'50000000tok'``)
            or a share of the run (``'0.2dur'``).

    Raises:
        InputError: Where it is not such a time.
    """

    def __init__(self, interval: str | int | Time) -> None:
        self.times = [parse_time('interval', interval)]

    def __call__(self, progress: Progress) -> int:
        return _passed(progress, self.times[0])


class Milestones:
    """Grows at given times.

    Args:
        milestones: Times as for :class:`Every`, in any order and mixture of units.

    Raises:
        InputError: Where they are not a list of such times.
    """

    def __init__(self, milestones: Sequence[str | int | Time]) -> None:
        if isinstance(milestones, str | Time) or not isinstance(milestones, Sequence):
            raise InputError(f"milestones: must be a list of times such as ['20ep', '40ep'], got {milestones!r}")
        self.times = [parse_time(f'milestones[{i}]', milestone) for i, milestone in enumerate(milestones)]

    def __call__(self, progress: Progress) -> int:
        return sum(_passed(progress, time) > 0 for time in self.times)


class _Watching(Callback):
    """A policy that looks at the training in windows of time and decides at the end of each."""

    def __init__(self, window: str | int | Time) -> None:
        self.times = [parse_time('window', window)]
        self._reset()

    def _reset(self) -> None:
        self.growths = 0
        self._windows = 0  # that are over

    def __call__(self, progress: Progress) -> int:
        return self.growths

    def state_dict(self) -> dict[str, Any]:
        return {'growths': self.growths, 'windows': self._windows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.growths, self._windows = state['growths'], state['windows']

    def fit_start(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == 0:  # the same object may have been in another run
            self._reset()

    def batch_end(self, state: State, logger: Logger) -> None:
        self._look(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._look(state, logger)

    def _look(self, state: State, logger: Logger) -> None:
        windows = _passed(progress_of(state), self.times[0])
        if windows > self._windows:
            self._windows = windows
            self._decide(state, logger)

    def _decide(self, state: State, logger: Logger) -> None:
        raise NotImplementedError


class LossPlateau(_Watching):
    """Grows when the training loss does not fall any more.

    The mean training loss of each window is held against the best one so far; after more than ``patience`` windows in a row that were not
    better by the share ``threshold``, the batch grows and the count begins anew. This is the rule of
    ``torch.optim.lr_scheduler.ReduceLROnPlateau`` (``mode='min'``, ``threshold_mode='rel'``). Composer has brought the loss of all ranks
    to the host already, so looking at it costs nothing.

    Args:
        patience: Windows without progress that are borne, at least 0.
        threshold: By what share of itself the best loss must fall to be progress, at least 0.
        window: Time over which the loss is averaged: epochs, batches, samples, tokens or a share of the run.

    Raises:
        InputError: For an argument outside its range.
    """

    def __init__(self, patience: int = 2, threshold: float = 0.01, window: str | int | Time = '1ep') -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 0:
            raise InputError(f'patience: must be a whole number of windows, at least 0, got {patience!r}')
        check_number('threshold', threshold, least=0, most=LARGEST)
        self.patience, self.threshold = patience, threshold
        super().__init__(window)

    def _reset(self) -> None:
        super()._reset()
        self._best, self._bad_windows = math.inf, 0
        self._loss_sum, self._samples = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        own = {'best': self._best, 'bad_windows': self._bad_windows, 'loss_sum': self._loss_sum, 'samples': self._samples}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._best, self._bad_windows = state['best'], state['bad_windows']
        self._loss_sum, self._samples = state['loss_sum'], state['samples']

    def batch_end(self, state: State, logger: Logger) -> None:
        assert state.previous_timestamp is not None
        if 'loss/train/total' in state.total_loss_dict:
            samples = int(state.timestamp.sample - state.previous_timestamp.sample)
            self._loss_sum += state.total_loss_dict['loss/train/total'] * samples
            self._samples += samples
        super().batch_end(state, logger)

    def _decide(self, state: State, logger: Logger) -> None:
        if not self._samples:
            return
        loss = self._loss_sum / self._samples
        self._loss_sum, self._samples = 0.0, 0
        if loss < self._best - self.threshold * abs(self._best) or self._best == math.inf:
            self._best, self._bad_windows = loss, 0
        else:
            self._bad_windows += 1
        if self._bad_windows > self.patience:
            self._bad_windows = 0
            self.growths += 1


def noise_and_signal(
    weighted_squares: Tensor | float, square: Tensor | float, num_parts: Tensor | int, batch_size: float
) -> tuple[Any, Any]:
    """Unbiased estimates of the gradient's noise and signal from a batch that was split into parts.

    With the mean gradient ``g_i`` of part ``i``, of ``b_i`` samples, and ``G`` that of the batch, of ``B`` samples,
    ``S = (sum_i b_i |g_i|^2 - B |G|^2) / (k - 1)`` estimates the trace of the covariance of one sample's gradient and ``|G|^2 - S / B``
    the squared norm of the true gradient. For parts of one size these are the equations A.2 of McCandlish et al., arXiv 1812.06162; their
    ratio is the noise scale.

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


class NoiseScale(_Watching):
    """Grows while the gradient's noise scale is larger than the batch.

    The noise scale is the batch size at which the noise of the gradient is as large as the gradient itself: below it a twice as large
    batch takes half as many steps, above it larger batches hardly help. Every ``measure_every`` batches the squared norms of the gradients
    of the batch's parts (microbatches, ranks) and of the whole batch give unbiased estimates of noise and signal; both are averaged
    exponentially, and at the end of each window the batch grows once if their ratio is at least ``ratio`` times the global batch.

    A batch that has one part only, on one rank without microbatches, is trained on in two halves when it is measured. The norms stay on
    the device: nothing waits for it but the decision at the end of a window. They are taken from the gradients before gradients are
    clipped and without the loss scale of mixed precision.

    Args:
        ratio: The noise scale must be at least so many times the global batch, greater than 0. With 2, doubling never passes it.
        window: Time between decisions: epochs, batches, samples, tokens or a share of the run.
        measure_every: Batches between measurements, at least 1.
        decay: Weight of the old average, in [0, 1). No decision is taken before ``1 / (1 - decay)`` measurements.

    Raises:
        InputError: For an argument outside its range; in ``fit``, for a run whose gradients it cannot see.

    Source: McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A.1.
    """

    def __init__(self, ratio: float = 2.0, window: str | int | Time = '1ep', measure_every: int = 10, decay: float = 0.95) -> None:
        check_number('ratio', ratio, above=0, most=LARGEST)
        check_number('decay', decay, least=0, below=1)
        if isinstance(measure_every, bool) or not isinstance(measure_every, int) or measure_every < 1:
            raise InputError(f'measure_every: must be a whole number of batches, at least 1, got {measure_every!r}')
        self.ratio, self.measure_every, self.decay = ratio, measure_every, decay
        self._hooks: list[Any] = []  # on the parameters, while a batch is measured
        super().__init__(window)

    def _reset(self) -> None:
        super()._reset()
        self._averages: Tensor | None = None  # of noise and signal, float32 [2], on the training device; both begin at 0
        self._measured = 0

    @property
    def noise_scale(self) -> float:
        """The estimate, in samples; NaN before the first measurement, infinite where the noise hides the signal."""
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
        if state.fsdp_enabled:
            raise InputError('policy: NoiseScale needs whole gradients, FSDP shards them; use DDP, or another policy')

    def batch_start(self, state: State, logger: Logger) -> None:
        """Begins a measurement."""
        if int(state.timestamp.batch) % self.measure_every:
            return
        loader = Plan.of(state).loader
        batch = int(state.timestamp.batch_in_epoch)
        assert loader.plan is not None
        size = loader.plan.sizes[batch - loader.plan.first_batch]  # over all ranks, which may have different shares of it
        part = state.device_train_microbatch_size
        assert part is not None
        mine = loader.batch_slice(batch)
        self._rank_samples, self._batch_size = mine.stop - mine.start, size
        self._halved = self._given = part
        if size == self._rank_samples <= part:  # one part
            if size < 2:
                return
            self._halved = state.device_train_microbatch_size = (size + 1) // 2
        self._measurement: Tensor | None = None
        self._hooks = [p.register_hook(self._see) for p in state.model.parameters() if p.requires_grad]

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Begins it anew where a batch is replayed."""
        self._norms: list[Tensor] = []
        self._seen = self._parts = 0
        self._weighted_squares: Any = 0.0

    def _see(self, gradient: Tensor) -> None:
        """One parameter's gradient of this microbatch on this rank, before it is accumulated or summed over the ranks."""
        self._norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))

    def after_backward(self, state: State, logger: Logger) -> None:
        """Takes the norms of a microbatch, and after the last one those of the batch."""
        if not self._hooks:
            return
        part = min(int(state.device_train_microbatch_size), self._rank_samples - self._seen)  # type: ignore[arg-type]
        self._seen += part
        self._parts += 1
        # Composer weights a microbatch's loss by its share of the ranks' mean batch: this makes its gradient a mean over samples again
        weight = (self._batch_size / dist.get_world_size()) ** 2 / part
        self._weighted_squares = self._weighted_squares + _sum_of_squares(self._norms) * weight
        self._norms = []
        model = state.model
        if self._seen < self._rank_samples or (isinstance(model, DistributedDataParallel) and not model.require_backward_grad_sync):
            return
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in model.parameters() if p.grad is not None]
        self._measurement = torch.stack([self._weighted_squares, _sum_of_squares(norms)]) / _loss_scale(state) ** 2

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            if state.device_train_microbatch_size == self._halved:  # else it did not fit on the device
                state.device_train_microbatch_size = self._given
            self._average()
        super().batch_end(state, logger)

    def _average(self) -> None:
        if self._measurement is None:
            raise InputError("policy: NoiseScale saw no gradient summed over the ranks; use ddp_sync_strategy 'single_auto_sync'")
        weighted_squares, square = self._measurement
        over_ranks = torch.stack([weighted_squares, torch.full_like(weighted_squares, self._parts)])
        dist.all_reduce(over_ranks)
        measured = torch.stack(noise_and_signal(over_ranks[0], square, over_ranks[1], self._batch_size))
        before = torch.zeros_like(measured) if self._averages is None else self._averages.to(measured.device)
        # mixed precision overflows now and then
        self._averages = torch.where(measured.isfinite().all(), self.decay * before + (1 - self.decay) * measured, before)
        self._measured += 1

    def _decide(self, state: State, logger: Logger) -> None:
        if self._averages is None or self._measured < 1 / (1 - self.decay) - 1e-9:
            return
        noise, signal = self._averages.tolist()
        batch_size = Plan.of(state).loader.batch_size * dist.get_world_size()
        logger.log_metrics({'adabatch/noise_scale': self.noise_scale})
        if noise > 0 and noise >= self.ratio * batch_size * signal:
            self.growths += 1


def _sum_of_squares(norms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(norms)).square().sum()


def _loss_scale(state: State) -> Tensor | float:
    """What mixed precision has multiplied the loss by, on the device."""
    if state.precision != Precision.AMP_FP16 or state.scaler is None:
        return 1.0
    scale = state.scaler.scale(torch.ones((), device=next(state.model.parameters()).device))
    assert isinstance(scale, Tensor)
    return scale


def progress_of(state: State, batch: int | None = None, sample: int | None = None) -> Progress:
    """How far a run is.

    Args:
        state: The trainer's state.
        batch: Batches trained; ``None`` for now.
        sample: Samples trained, over all ranks; ``None`` for now.

    Returns:
        The progress, in this epoch and with the tokens of now.
    """
    now = state.timestamp
    progress = Progress(
        int(now.epoch), int(now.batch) if batch is None else batch, int(now.sample) if sample is None else sample, int(now.token)
    )
    length = state.max_duration
    assert length is not None
    done = progress.of(length.unit) if length.unit in UNITS else now.get(length.unit).value
    return progress._replace(share=done / length.value)


POLICIES: Mapping[str, Callable[..., Policy]] = {'loss_plateau': LossPlateau, 'noise_scale': NoiseScale}


def find_policy(given: Policy | str | Mapping[str, Any]) -> Policy:
    """A policy from what a recipe can say.

    Args:
        given: A policy, or one of :data:`POLICIES` by name: ``'noise_scale'``, or ``{'name': 'noise_scale', 'ratio': 1}``.

    Raises:
        InputError: For an unknown name or argument, or something else.
    """
    if callable(given):
        return given
    arguments = {'name': given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
    name = arguments.pop('name', None)
    if not isinstance(name, str) or name not in POLICIES:
        near = difflib.get_close_matches(str(name), POLICIES, n=1)
        hint = f'did you mean {near[0]!r}?' if near else f'known: {", ".join(POLICIES)}'
        raise InputError(
            f"policy: must be a function of the progress, or a policy's name, alone or with its arguments, got {given!r}; {hint}"
        )
    try:
        return POLICIES[name](**arguments)
    except TypeError as error:
        raise InputError(f'policy: {name}: {error}') from error
