import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composer.algorithms import SAM, GradientClipping
from composer.core import Callback, DataSpec, Precision
from composer.loggers import InMemoryLogger
from composer.models import ComposerModel
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from composer_effalgos import AdaBatch, InfoBatch, InputError
from composer_effalgos.adabatch import NoiseScale, NormTest, Progress, gradient_noise, noise_and_signal


class Measurements(Callback):
    """Notes what a policy measures, and what per-sample gradients say about the same batch."""

    def __init__(self, policy: NoiseScale, start: torch.Tensor) -> None:
        self.policy, self.start = policy, start
        self.found: list[tuple[float, float]] = []
        self.expected: list[tuple[float, float]] = []

    def before_train_batch(self, state, logger):
        self.part = state.device_train_microbatch_size
        self.batch = state.batch[0]

    def batch_end(self, state, logger):
        before = getattr(self, 'before', torch.zeros(2))
        after = torch.zeros(2) if self.policy._averages is None else self.policy._averages
        if not torch.equal(before, after):
            self.before = after
            self.found.append(tuple(((after - self.policy.decay * before) / (1 - self.policy.decay)).tolist()))
            gradients = (self.start - self.batch).double()
            parts, mean = [part.mean(dim=0) for part in gradients.split(self.part)], gradients.mean(dim=0)
            sizes = [len(part) for part in gradients.split(self.part)]
            noise = sum(b * (g - mean).square().sum().item() for b, g in zip(sizes, parts, strict=True)) / (len(parts) - 1)
            self.expected.append((noise, mean.square().sum().item() - noise / len(gradients)))


def measure(make_trainer, distance, dataset, start, policy=None, algorithms=(), loss_scale=1.0, **arguments):
    policy = policy or NoiseScale(ratio=1e9, measure_every=1, decay=0.0)
    watch = Measurements(policy, start)
    arguments = {'lr': 0.0, 'max_duration': '1ep'} | arguments
    trainer = make_trainer(
        [*algorithms, AdaBatch(policy=policy)], model=distance(start, loss_scale), dataset=dataset, callbacks=[watch], **arguments
    )
    trainer.state.callbacks.append(trainer.state.callbacks.pop(trainer.state.callbacks.index(watch)))  # after the policy
    trainer.fit()
    return watch


@pytest.mark.parametrize('microbatch', [None, 16, 5, 8, 1], ids=lambda m: f'microbatch {m}')
def test_measures_what_the_samples_gradients_say(make_trainer, distance, points, microbatch):
    dataset, start = points(105, 6), torch.linspace(-1, 1, 6)
    watch = measure(make_trainer, distance, dataset, start, device_train_microbatch_size=microbatch)
    assert len(watch.found) == 7  # 6 batches of 16 and one of 9
    for found, expected in zip(watch.found, watch.expected, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert watch.part == {None: 5, 16: 5, 5: 5, 8: 8, 1: 1}[microbatch]  # one part is halved: 9 into 5 and 4


class TokenDistance(ComposerModel):
    """``|w - x|^2 / 2``, as a mean over the tokens of a batch, of which every sample has its own number."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, batch):
        return 0.5 * (self.weights - batch[0]).square().sum(dim=1)

    def loss(self, outputs, batch):
        return (outputs * batch[1]).sum() / batch[1].sum()


@pytest.mark.parametrize('microbatch', [None, 5])
def test_parts_count_by_their_tokens_if_the_trainer_accumulates_on_tokens(make_trainer, points, microbatch):
    class Check(Callback):
        checked = 0

        def batch_start(self, state, logger):
            self.batch, self.part = state.batch, microbatch or (len(state.batch[0]) + 1) // 2

        def batch_end(self, state, logger):
            x, tokens = (tensor.double() for tensor in self.batch)
            gradients = torch.linspace(-1, 1, 6).double() - x
            mean = (gradients * tokens[:, None]).sum(dim=0) / tokens.sum()
            parts = list(zip(gradients.split(self.part), tokens.split(self.part), strict=True))
            distances = [((g * t[:, None]).sum(dim=0) / t.sum() - mean).square().sum() * t.sum() for g, t in parts]
            noise = sum(distances) * len(x) / tokens.sum() / (len(parts) - 1)
            expected = torch.stack([noise, mean.square().sum() - noise / len(x)]).float()
            assert torch.allclose(policy._averages, expected, rtol=1e-3, atol=1e-3), (policy._averages, expected)
            self.checked += 1

    dataset = TensorDataset(points(60, 6).tensors[0], torch.arange(60) % 7 + 1)
    policy, check = NoiseScale(ratio=1e9, measure_every=1, decay=0.0), Check()
    loader = DataSpec(
        DataLoader(dataset, batch_size=16, shuffle=True),
        get_num_tokens_in_batch=lambda batch: {'total': 7 * len(batch[1]), 'loss_generating': int(batch[1].sum())},
    )
    trainer = make_trainer(
        [AdaBatch(policy=policy)], model=TokenDistance(), train_loader=loader, lr=0.0, max_duration='2ep',
        device_train_microbatch_size=microbatch, accumulate_train_batch_on_tokens=True,
    )  # fmt: skip
    trainer.state.callbacks.append(check)  # after the policy
    trainer.fit()
    assert check.checked == 8


def test_the_estimate_is_right_where_it_is_known_in_closed_form(make_trainer, distance, points):
    """Gradients w - x, with x of unit variance in 20 dimensions: noise 20, signal |w|^2, whatever batch they are measured with."""
    dataset, start = points(2000, 20), torch.full((20,), 0.3)
    noise, signal = 20 * 2000 / 1999, 20 * 0.09 - 20 / 1999  # the finite sample's
    for batch_size, microbatch in ((16, None), (40, 10), (16, 1)):
        watch = measure(make_trainer, distance, dataset, start, batch_size=batch_size, device_train_microbatch_size=microbatch)
        found = torch.tensor(watch.found[:-1], dtype=torch.float64)  # the last batch may be smaller
        error = found.std(dim=0) / math.sqrt(len(found))
        assert ((found.mean(dim=0) - torch.tensor([noise, signal])).abs() < 4 * error).all()
        assert error[0] / noise < 0.06
    policy = NoiseScale(ratio=1e9, measure_every=1, decay=0.99)
    measure(make_trainer, distance, dataset, start, policy, batch_size=16, device_train_microbatch_size=2)
    assert policy.noise_scale == pytest.approx(noise / signal, rel=0.3)


def test_grows_as_long_as_the_noise_scale_says(make_trainer, distance, points):
    """A noise scale of 20 / 1.8 = 11: with ratio 1 a batch of 4 grows to 8 and to 16, and then no more."""
    logger = InMemoryLogger()
    policy = NoiseScale(ratio=1.0, window='1ep', measure_every=1, decay=0.98)
    trainer = make_trainer(
        [AdaBatch(policy=policy)],
        model=distance(torch.full((20,), 0.3)),
        dataset=points(1000, 20),
        lr=0.0,
        batch_size=4,
        max_duration='6ep',
        loggers=[logger],
    )
    trainer.fit()
    assert [epoch[0] for epoch in trainer.recorder.sizes] == [4, 8, 16, 16, 16, 16]
    logged = [value for _, value in logger.data['adabatch/noise_scale']]
    assert logged == pytest.approx([20 / 1.8] * 6, rel=0.35)


def test_few_measurements_decide_nothing(make_trainer, distance, points):
    policy = NoiseScale(ratio=0.001, window='1ep', measure_every=1, decay=0.95)  # 20 are needed
    trainer = make_trainer([AdaBatch(policy=policy)], model=distance(torch.ones(3)), dataset=points(100, 3), lr=0.0, max_duration='4ep')
    trainer.fit()
    assert [epoch[0] for epoch in trainer.recorder.sizes] == [16, 16, 16, 32]  # 7 an epoch


def test_is_measured_before_clipping_and_without_the_loss_scale(make_trainer, distance, points, monkeypatch):
    dataset, start = points(100, 4), torch.ones(4)
    plain = measure(make_trainer, distance, dataset, start).found
    clipped = measure(make_trainer, distance, dataset, start, algorithms=[GradientClipping('norm', 0.01)]).found
    assert clipped == plain
    monkeypatch.setattr(gradient_noise, '_loss_scale', lambda state: torch.tensor(1024.0))
    scaled = measure(make_trainer, distance, dataset, start, loss_scale=1024.0).found
    assert torch.tensor(scaled) == pytest.approx(torch.tensor(plain), rel=1e-5)


def test_the_loss_scale_is_the_scalers():
    scaler = torch.amp.GradScaler('cpu', init_scale=512.0)
    model = torch.nn.Linear(1, 1)
    assert gradient_noise._loss_scale(SimpleNamespace(precision=Precision.AMP_FP16, scaler=scaler, model=model)) == 512
    assert gradient_noise._loss_scale(SimpleNamespace(precision=Precision.AMP_BF16, scaler=scaler, model=model)) == 1


def test_what_overflows_does_not_count(make_trainer, distance, points):
    policy = NoiseScale(measure_every=1, decay=0.9)
    measure(make_trainer, distance, points(100, 4), torch.ones(4), policy)
    before = policy._averages
    policy._measurement = torch.tensor([math.inf, 1.0])
    policy._average(sharded=False)
    assert torch.equal(policy._averages, before)


@pytest.mark.parametrize('algorithm', [lambda: InfoBatch(0.0), lambda: SAM(rho=0.05, interval=3)], ids=['InfoBatch', 'SAM'])
def test_measures_beside_algorithms_that_change_the_loss_or_the_step(make_trainer, algorithm):
    policy = NoiseScale(measure_every=2, decay=0.5)
    trainer = make_trainer([algorithm(), AdaBatch(policy=policy)], max_duration='2ep')
    trainer.fit()
    assert 0 < policy.noise_scale < math.inf
    assert not policy._hooks
    assert all(not p._backward_hooks for p in trainer.state.model.parameters())


def test_the_microbatch_is_given_back(make_trainer):
    for microbatch in (None, 16, 4):
        trainer = make_trainer([AdaBatch(2, policy=NoiseScale(1e9, measure_every=3))], device_train_microbatch_size=microbatch)
        seen = []
        trainer.state.callbacks[0].batch_checkpoint = lambda state, logger, seen=seen: seen.append(state.device_train_microbatch_size)
        trainer.fit()
        assert set(seen) == {microbatch or 16}


def test_a_batch_that_is_not_measured_is_trained_as_ever(make_trainer, weights_of):
    plain, measured = make_trainer([AdaBatch(2, '9ep')]), make_trainer([AdaBatch(policy=NoiseScale(1e9, measure_every=10**6))])
    plain.fit()
    measured.fit()
    assert torch.allclose(weights_of(plain), weights_of(measured), atol=1e-6)  # the very first batch is measured, in halves


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 10**6))
def test_the_equations_of_the_paper(sizes, seed):
    """Equal parts: equations A.2 of arXiv 1812.06162; any parts: the analysis of variance."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, 3, dtype=torch.float64, generator=generator) for size in sizes]
    means, mean, total = [part.mean(dim=0) for part in parts], torch.cat(parts).mean(dim=0), sum(sizes)
    weighted = sum(size * m.square().sum() for size, m in zip(sizes, means, strict=True))
    noise, signal = noise_and_signal(weighted, mean.square().sum(), len(sizes), total)
    between = sum(size * (m - mean).square().sum() for size, m in zip(sizes, means, strict=True)) / (len(sizes) - 1)
    assert noise.item() == pytest.approx(between.item(), abs=1e-9)
    assert signal.item() == pytest.approx((mean.square().sum() - between / total).item(), abs=1e-9)
    if len(set(sizes)) == 1:
        small, big = sizes[0], total
        g_small, g_big = sum(m.square().sum() for m in means) / len(means), mean.square().sum()
        assert noise.item() == pytest.approx(((g_small - g_big) / (1 / small - 1 / big)).item(), abs=1e-9)
        assert signal.item() == pytest.approx(((big * g_big - small * g_small) / (big - small)).item(), abs=1e-9)


def test_refuses_what_it_cannot_see():
    policy = NoiseScale()
    fsdp = SimpleNamespace(sharding_strategy='HYBRID_SHARD')
    state = SimpleNamespace(fsdp_enabled=True, fsdp_config=fsdp, timestamp=SimpleNamespace(batch=0))
    with pytest.raises(InputError, match=r"^policy: NoiseScale expected FULL_SHARD or SHARD_GRAD_OP as FSDP's strategy, got HYBRID_SHARD"):
        policy.fit_start(state, None)
    policy._measurement = None
    with pytest.raises(InputError, match='ddp_sync_strategy'):
        policy._average(sharded=False)


@pytest.mark.distributed
@pytest.mark.parametrize(
    'options',
    [[], ['--microbatch', '3'], ['--microbatch', '3', '--sync', 'multi_auto_sync', '--points', '102']],
    ids=['a part a rank', 'microbatches', 'summed at every microbatch'],
)
def test_measures_over_ranks(forked, options):
    script = Path(__file__).parents[1] / 'scripts' / 'noise_over_ranks.py'
    status, said = forked(str(script), *options, ranks=2)
    assert status == 0, said[-6000:]


# ---------------------------------------------------------------------- norm test


@given(st.floats(0.05, 0.95), st.floats(1e-6, 1e6), st.floats(-1e3, 1e6), st.integers(1, 4096))
def test_the_norm_test_is_the_papers(eta, noise, signal, batch_size):
    """b := ceil(S / (eta^2 |g|^2)) where S / b > eta^2 |g|^2, with |g|^2 of a batch as large as the signal and the noise make it."""
    policy = NormTest(eta)
    policy._judge(noise, signal, batch_size)
    square = signal + noise / batch_size
    if square > 0 and noise / batch_size > eta**2 * square * (1 + 1e-9):
        assert policy.size == pytest.approx(math.ceil(min(noise / (eta**2 * square), 1e12)), abs=1)
        assert batch_size < policy.size <= math.ceil(batch_size / eta**2) + 1 or signal < 0
        assert policy(Progress(0, 0, 0)) == policy.size
    elif square <= 0 or noise / batch_size < eta**2 * square * (1 - 1e-9):
        assert policy.size is None


def test_the_norm_test_jumps_to_the_size_that_passes(make_trainer, distance, points):
    """Gradients w - x with noise 20 and |G|^2 = 1.8: with eta = 0.5 the test passes from 3 * 20 / 1.8 = 33 samples on."""
    policy = NormTest(eta=0.5, window='1ep', measure_every=1, decay=0.98)
    trainer = make_trainer(
        [AdaBatch(policy=policy, lr='sqrt')],
        model=distance(torch.full((20,), 0.3)),
        dataset=points(2000, 20),
        lr=1e-9,
        batch_size=4,
        max_duration='8ep',
    )
    trainer.fit()
    sizes = [epoch[0] for epoch in trainer.recorder.sizes]
    noise, signal = 20 * 2000 / 1999, 1.8 - 20 / 1999
    assert sizes[0] == 4
    assert sizes[1] == pytest.approx(noise / (0.25 * (signal + noise / 4)), rel=0.25)  # one jump, by less than 1 / eta^2
    assert sizes == sorted(sizes)
    assert sizes[-1] == pytest.approx(3 * noise / signal, rel=0.35)
    assert trainer.recorder.lrs[-1][0] == pytest.approx(1e-9 * math.sqrt(sizes[-1] / 4))


def test_the_norm_test_of_a_single_batch_is_the_papers_on_its_own_gradients(make_trainer, distance, points):
    """Without averaging, noise and gradient are those of the last batch of the window."""
    dataset, start = points(112, 6), torch.linspace(-0.2, 0.2, 6)
    policy = NormTest(eta=0.5, window='1ep', measure_every=1, decay=0.0)
    watch = Measurements(policy, start)
    trainer = make_trainer(
        [AdaBatch(policy=policy)],
        model=distance(start),
        dataset=dataset,
        callbacks=[watch],
        lr=0.0,
        max_duration='2ep',
        device_train_microbatch_size=4,
    )
    trainer.state.callbacks.append(trainer.state.callbacks.pop(trainer.state.callbacks.index(watch)))
    trainer.fit()
    noise, signal = watch.expected[6]  # of the first epoch's last batch
    square = signal + noise / 16
    assert noise / 16 > 0.25 * square
    assert trainer.recorder.sizes[1][0] == pytest.approx(noise / (0.25 * square), abs=1)


@pytest.mark.parametrize('workers', [0, 1])
def test_the_norm_test_resumes(make_trainer, weights_of, tmp_path, workers):
    def run(**more):
        policy = NormTest(0.7, '4ba', measure_every=2, decay=0.5)
        trainer = make_trainer([AdaBatch(policy=policy, lr='auto')], max_duration='3ep', num_workers=workers, **more)
        trainer.fit()
        return trainer

    whole = run(save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt', save_num_checkpoints_to_keep=-1)
    sizes = [size for epoch in whole.recorder.sizes for size in epoch]
    grown = next(batch for batch, size in enumerate(sizes) if size > 16)
    for batch in (grown - 1, grown, grown + 1):
        resumed = run(load_path=str(tmp_path / f'ba{batch}.pt'))
        assert [size for epoch in resumed.recorder.sizes for size in epoch] == sizes[batch:]
        assert torch.equal(weights_of(resumed), weights_of(whole))


def test_refuses_an_eta_that_no_test_can_have():
    for eta in (0, 1, -1, math.nan):
        with pytest.raises(InputError, match=r'^eta: expected a number'):
            NormTest(eta)
