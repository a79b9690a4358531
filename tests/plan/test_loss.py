import copy
import warnings

import pytest
import torch
from composer.algorithms import CutMix, MixUp
from composer.core import Callback, DataSpec
from composer.loss import binary_cross_entropy_with_logits
from composer.models import ComposerClassifier, ComposerModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_effalgos import AdaBatch, InfoBatch, InputError, SubsetSelection
from composer_effalgos.plan import WeightedLoss


def classifier(**kwargs) -> ComposerClassifier:
    torch.manual_seed(0)
    return ComposerClassifier(nn.Linear(4, 3), num_classes=3, **kwargs)


BATCH = (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2]))


def test_transparent_outside_training_steps():
    model = classifier()
    loss = WeightedLoss(model)
    loss.subscribers.append(lambda *shown: pytest.fail('shown outside a training step'))
    outputs = model(BATCH)
    assert loss(outputs, BATCH).item() == model.loss(outputs, BATCH).item()
    assert loss(outputs, BATCH, reduction='none').shape == (6,)


def test_weighted_mean_by_hand_and_positions_by_event():
    model = classifier()
    loss, shown = WeightedLoss(model), []
    loss.subscribers.append(lambda losses, where, outputs, batch: shown.append((losses.tolist(), where)))
    weights = torch.arange(1.0, 11.0)
    loss.start_epoch(weights)
    outputs = model(BATCH)
    each = nn.functional.cross_entropy(outputs, BATCH[1], reduction='none')
    for _ in range(2):  # replayed, as after an out-of-memory error
        loss.start_batch(slice(3, 9))
        loss.start_microbatch()
        first = loss(outputs[:4], (BATCH[0][:4], BATCH[1][:4]))
        swapped = loss(outputs[:4], (BATCH[0][:4], BATCH[1][:4].flip(0)))  # MixUp's second call
        loss.end_microbatch()
        loss.end_microbatch()  # two algorithms may pass the same event on
        loss.start_microbatch()
        second = loss(outputs[4:], (BATCH[0][4:], BATCH[1][4:]))
        loss.end_microbatch()
        loss.end_batch()
        assert torch.isclose(first, (each[:4] * weights[3:7]).mean())
        assert torch.isclose(second, (each[4:] * weights[7:9]).mean())
        assert not torch.isclose(first, swapped)
    assert [where for _, where in shown] == [slice(3, 7), slice(7, 9)] * 2
    assert shown[0][0] == pytest.approx(each[:4].tolist())


def test_other_calls_in_a_training_step_get_the_original_loss_and_are_not_scored():
    """As of a callback that logs the loss of one class, or of a forward pass that computes it."""
    model, shown = classifier(), []
    loss = WeightedLoss(model)
    loss.subscribers.append(lambda losses, where, outputs, batch: shown.append((losses, where)))
    loss.start_epoch(torch.arange(1.0, 7.0))
    outputs = model(BATCH)
    each = nn.functional.cross_entropy(outputs, BATCH[1], reduction='none')
    part = (BATCH[0][:2], BATCH[1][:2])

    def others() -> None:
        assert torch.equal(loss(outputs[:2], part), nn.functional.cross_entropy(outputs[:2], part[1]))
        with torch.no_grad():
            assert torch.equal(loss(outputs, BATCH), nn.functional.cross_entropy(outputs, BATCH[1]))

    loss.start_batch(slice(0, 6))
    others()
    assert loss(outputs, BATCH) == nn.functional.cross_entropy(outputs, BATCH[1])
    loss.start_microbatch()
    own = loss(outputs, BATCH)
    others()
    own.backward()
    others()
    loss.end_microbatch()
    others()
    loss.end_batch()
    assert torch.isclose(own, (each * torch.arange(1.0, 7.0)).mean())
    assert len(shown) == 1
    assert torch.allclose(shown[0][0], each)


class DeeplySupervised(ComposerModel):
    """The loss of two outputs is the sum of their losses, computed by ``loss()`` itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, batch):
        return [head(batch[0]) for head in self.heads]

    def loss(self, outputs, batch):
        if isinstance(outputs, list):
            return sum(self.loss(output, batch) for output in outputs)
        return nn.functional.cross_entropy(outputs, batch[1])


class Normalised(ComposerModel):
    """Divides its loss by a moving average of it, which it updates in place."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.register_buffer('average', torch.ones(()))

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        loss = nn.functional.cross_entropy(outputs, batch[1])
        self.average.mul_(0.9).add_(0.1 * loss.detach())
        return loss / self.average


def test_a_loss_that_changes_a_tensor_of_its_graph_in_place_is_refused():
    model = Normalised()
    loss = WeightedLoss(model)
    loss.start_epoch(torch.arange(1.0, 7.0))
    loss.start_batch(slice(0, 6))
    loss.start_microbatch()
    with pytest.raises(InputError, match=r'^Normalised.loss: it gives a different value each time'):
        loss(model(BATCH), BATCH)


def test_a_loss_that_calls_itself_is_scored_as_a_whole():
    model, shown, weights = DeeplySupervised(), [], torch.arange(1.0, 7.0)
    loss = WeightedLoss(model)
    model.loss = loss
    loss.subscribers.append(lambda losses, where, outputs, batch: shown.append(losses))
    loss.start_epoch(weights)
    loss.start_batch(slice(0, 6))
    loss.start_microbatch()
    outputs = model(BATCH)
    own = model.loss(outputs, BATCH)
    own.backward()
    each = sum(nn.functional.cross_entropy(head(BATCH[0]), BATCH[1], reduction='none') for head in model.heads)
    assert len(shown) == 1
    assert torch.allclose(shown[0], each)
    assert torch.isclose(own, (weights * each).mean())
    gradients = [head.weight.grad.clone() for head in model.heads]
    model.zero_grad()
    (weights * each).mean().backward()
    assert all(torch.allclose(ours, head.weight.grad, atol=1e-6) for ours, head in zip(gradients, model.heads, strict=True))


def test_dimensions_beyond_the_batch_are_averaged():
    model = classifier()
    loss = WeightedLoss(model, per_sample_loss=lambda outputs, batch: outputs.square())
    outputs = torch.arange(6.0).view(2, 3)
    assert loss.per_sample(outputs, None).tolist() == pytest.approx([5 / 3, 50 / 3])


def test_another_number_of_samples_is_refused():
    model = classifier()
    loss = WeightedLoss(model)
    loss.start_epoch(torch.ones(20))
    outputs = model(BATCH)
    loss.start_batch(slice(0, 5))
    loss.start_microbatch()
    with pytest.raises(InputError, match='5 samples in this batch, the loss saw 6'):
        loss(outputs, BATCH)
    loss.start_batch(slice(0, 7))
    loss.start_microbatch()
    loss(outputs, BATCH)
    loss.end_microbatch()
    loss.start_microbatch()
    with pytest.raises(InputError, match='7 samples in this batch, the loss saw 6'):
        loss.end_batch()


def test_a_loss_module_is_left_as_it_was(make_trainer):
    loss_fn = nn.CrossEntropyLoss()
    make_trainer([InfoBatch()], loss_fn=loss_fn, max_duration='2ep').fit()
    assert loss_fn.reduction == 'mean'


class Norm(ComposerModel):
    """Its loss takes no reduction, and its graph does not show the samples' losses."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 3)

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        return (outputs - nn.functional.one_hot(batch[1], 3)).norm()


def squares(outputs, batch):
    return (outputs - nn.functional.one_hot(batch[1], 3)).square()


def test_a_loss_without_per_sample_form_is_refused_unless_one_is_given(make_trainer):
    with pytest.raises(InputError, match=r"^Norm.loss: it takes no reduction='none'.*; pass InfoBatch\(per_sample_loss"):
        make_trainer([InfoBatch()], model=Norm()).fit()
    with pytest.raises(InputError, match=r'Norm.*pass SubsetSelection\(per_sample_loss'):
        make_trainer([SubsetSelection('gradmatch', 0.5)], model=Norm()).fit()
    algorithm = InfoBatch(per_sample_loss=squares)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='per_sample_loss')
        make_trainer([algorithm], model=Norm(), max_duration='2ep').fit()
    assert not algorithm.scores.isnan().any()
    make_trainer([AdaBatch(2, '1ep'), SubsetSelection('random', 0.5)], model=Norm(), max_duration='2ep').fit()


def test_weights_with_class_weights_by_hand():
    class_weights = torch.tensor([0.5, 1.0, 3.0])
    model = classifier(loss_fn=nn.CrossEntropyLoss(weight=class_weights))
    loss = WeightedLoss(model)
    weights = torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0, 1.0])
    loss.start_epoch(weights)
    loss.start_batch(slice(0, 6))
    loss.start_microbatch()
    outputs = model(BATCH)
    raw = nn.functional.cross_entropy(outputs, BATCH[1], weight=class_weights, reduction='none')
    assert torch.isclose(loss(outputs, BATCH), (weights * raw).sum() / class_weights[BATCH[1]].sum())


class Regularised(ComposerClassifier):
    """Returns more than its samples' losses."""

    def loss(self, outputs, batch, reduction='mean'):
        losses = nn.functional.cross_entropy(outputs, batch[1], reduction='none')
        return losses if reduction == 'none' else losses.mean() + outputs.square().mean()


def test_a_loss_that_is_more_than_its_samples_is_refused(make_trainer):
    with pytest.raises(
        InputError, match=r'^Regularised.loss: its per-sample losses have another gradient at the outputs .*; pass InfoBatch'
    ):
        make_trainer([InfoBatch()], model=Regularised(nn.Linear(8, 3), num_classes=3)).fit()


def test_segmentation(make_trainer):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 2, 6, 6, generator=generator)
    labels = (images[:, 0] > 0).long()
    labels[:, 0] = -100  # an ignored row of pixels
    algorithm = InfoBatch(delta=1.0)
    trainer = make_trainer(
        [algorithm],
        dataset=TensorDataset(images, labels),
        module=nn.Conv2d(2, 3, 1),
        loss_fn=nn.functional.cross_entropy,
        max_duration='3ep',
    )
    trainer.fit()
    assert algorithm.scores.shape == (60,)
    assert algorithm.samples_saved > 0
    with torch.no_grad():
        outputs = trainer.state.model.module(images)
    frozen = make_trainer(
        [InfoBatch(prune_ratio=0)], dataset=TensorDataset(images, labels), module=trainer.state.model.module, lr=0.0,
        loss_fn=nn.functional.cross_entropy, max_duration='1ep',
    )  # fmt: skip
    frozen.fit()
    expected = nn.functional.cross_entropy(outputs, labels, reduction='none').flatten(1).mean(dim=1)
    assert torch.allclose(frozen.state.algorithms[0].scores, expected, atol=1e-5)


def test_regression(make_trainer, problem):
    data = TensorDataset(problem.tensors[0], problem.tensors[0][:, :3] * 2)
    algorithm = InfoBatch()
    trainer = make_trainer([algorithm], dataset=data, loss_fn=nn.functional.mse_loss, lr=0.02, max_duration='4ep')
    trainer.fit()
    assert algorithm.scores.shape == (203,)
    assert algorithm.samples_saved > 0


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_interpolated_losses_take_scores_from_the_first_call(mix, make_trainer, problem):
    images = TensorDataset(problem.tensors[0].view(-1, 2, 2, 2), problem.tensors[1])
    module = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    algorithm, seen = InfoBatch(prune_ratio=0), []
    trainer = make_trainer([mix(interpolate_loss=True), algorithm], dataset=images, module=module, max_duration='1ep')
    original = algorithm._observe
    trainer.state.model.loss.subscribers[:] = [lambda *shown: (seen.append(shown[1]), original(*shown))]
    trainer.fit()
    assert [w.stop - w.start for w in seen] == trainer.recorder.sizes[0]
    assert not algorithm.scores.isnan().any()


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]), r'^per_sample_loss: must give a tensor .* got shape \(\)$'),
        (lambda outputs, batch: None, '^per_sample_loss: must give a tensor .* got NoneType$'),
        (lambda outputs, batch: outputs[:3], 'the loss saw 3; .*per_sample_loss adds or drops samples'),
    ],
    ids=['one number', 'nothing', 'some samples'],
)
def test_what_is_not_one_loss_a_sample_is_refused(make_trainer, given, message):
    with pytest.raises(InputError, match=message):
        make_trainer([InfoBatch(per_sample_loss=given)], loss_fn=nn.functional.cross_entropy).fit()


class BreaksOff(Callback):
    def before_backward(self, state, logger):
        if int(state.timestamp.epoch) == 1:  # whose batches are weighted
            raise KeyboardInterrupt


def test_a_model_whose_run_broke_off_trains_on_without_us(make_trainer, weights_of):
    model = ComposerClassifier(nn.Linear(8, 3), num_classes=3)
    with pytest.raises(KeyboardInterrupt):
        make_trainer([InfoBatch()], model=model, callbacks=[BreaksOff()]).fit()
    fresh = ComposerClassifier(nn.Linear(8, 3), num_classes=3)
    fresh.load_state_dict(model.state_dict())
    runs = []
    for each in (model, fresh):
        runs.append(make_trainer(model=each, max_duration='1ep'))
        runs[-1].fit()
    assert torch.equal(*map(weights_of, runs))


class OutOfMemory(nn.Linear):
    """Runs out of memory at microbatches above 5, as a GPU would."""

    def forward(self, inputs):
        if self.training and len(inputs) > 5:
            raise RuntimeError('CUDA out of memory')
        return super().forward(inputs)


def test_replays_after_running_out_of_memory_leave_scores_and_weights_right(make_trainer, weights_of):
    runs = []
    for microbatch, module in ((None, OutOfMemory(8, 3)), (4, nn.Linear(8, 3))):
        with torch.no_grad():
            module.weight.copy_(torch.linspace(-1, 1, 24).view(3, 8))
            module.bias.zero_()
        algorithm = InfoBatch(delta=1.0)
        trainer = make_trainer([algorithm], module=module, device_train_microbatch_size=microbatch, max_duration='3ep')
        trainer.state.auto_microbatching = microbatch is None  # Composer offers it on GPUs only
        trainer.fit()
        assert trainer.state.device_train_microbatch_size == 4  # 16, 8, 4
        runs.append((weights_of(trainer), algorithm.scores, algorithm.samples_saved))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2] > 0


def test_copies_of_the_model_have_the_plain_loss(make_trainer):
    trainer = make_trainer([InfoBatch()], max_duration='1ep')
    trainer.fit()
    assert isinstance(trainer.state.model.loss, WeightedLoss)
    twin = copy.deepcopy(trainer.state.model)
    assert not isinstance(twin.loss, WeightedLoss)
    outputs = twin((torch.zeros(2, 8), None))
    assert torch.isfinite(twin.loss(outputs, (None, torch.tensor([0, 1]))))


def test_a_model_trained_twice_is_wrapped_once(make_trainer):
    model = ComposerClassifier(nn.Linear(8, 3), num_classes=3)
    for _ in range(2):
        algorithm = InfoBatch()
        make_trainer([algorithm], model=model, max_duration='1ep').fit()
        assert not isinstance(model.loss.original, WeightedLoss)
        assert not algorithm.scores.isnan().any()


def test_models_are_saved_with_their_plain_loss(make_trainer, tmp_path):
    trainer = make_trainer([InfoBatch()], max_duration='1ep')
    trainer.fit()
    torch.save(trainer.state.model, tmp_path / 'model.pt')
    loaded = torch.load(tmp_path / 'model.pt', weights_only=False)
    outputs = loaded((torch.zeros(2, 8), None))
    assert torch.isfinite(loaded.loss(outputs, (None, torch.tensor([0, 1]))))


def twice_as_sharp(outputs, batch):
    return nn.functional.cross_entropy(2 * outputs, batch[1], reduction='none')


def test_a_per_sample_loss_that_is_not_the_models_own_is_said_once_and_enters_as_a_correction(make_trainer):
    with pytest.warns(UserWarning, match=r'^per_sample_loss: its losses have another gradient .*; training uses .*\.loss plus') as caught:
        make_trainer([InfoBatch(per_sample_loss=twice_as_sharp)]).fit()
    assert sum('per_sample_loss' in str(one.message) for one in caught) == 1
    model = classifier()
    loss = WeightedLoss(model, twice_as_sharp)
    weights = torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0, 1.0])
    loss.start_epoch(weights)
    loss.start_batch(slice(0, 6))
    loss.start_microbatch()
    with pytest.warns(UserWarning, match='per_sample_loss'):
        loss(model(BATCH), BATCH).backward()
    ours = model.module.weight.grad.clone()
    model.zero_grad()
    outputs = model(BATCH)
    (nn.functional.cross_entropy(outputs, BATCH[1]) + ((weights - 1) * twice_as_sharp(outputs, BATCH)).mean()).backward()
    assert torch.allclose(ours, model.module.weight.grad, atol=1e-6)


def test_a_given_loss_that_does_not_read_the_outputs_is_refused(make_trainer):
    with pytest.raises(InputError, match=r'^per_sample_loss: its losses do not depend on the outputs'):
        make_trainer([InfoBatch(per_sample_loss=lambda outputs, batch: batch[1].float())]).fit()


class Drifting(ComposerClassifier):
    """Its loss becomes another after some batches."""

    calls = 0

    def forward(self, batch):
        self.calls += 1
        return super().forward(batch)

    def loss(self, outputs, batch, reduction='mean'):
        return nn.functional.cross_entropy(
            outputs, batch[1], reduction=reduction, label_smoothing=0.1 * (self.calls > 5 and reduction == 'mean')
        )


def test_checks_come_again_at_powers_of_two(make_trainer):
    model = Drifting(nn.Linear(8, 3), num_classes=3)
    with pytest.raises(InputError, match='another gradient'):
        make_trainer([InfoBatch()], model=model).fit()
    assert model.calls == 8


def test_a_batch_without_a_finite_loss_postpones_the_check():
    model = Regularised(nn.Linear(4, 3), num_classes=3)
    loss = WeightedLoss(model)
    loss.subscribers.append(lambda *shown: None)
    nans = (BATCH[0] * torch.nan, BATCH[1])
    loss.start_batch(slice(0, 6))
    loss.start_microbatch()
    assert loss(model(nans), nans).isnan()
    loss.start_batch(slice(6, 12))
    loss.start_microbatch()
    loss.start_batch(slice(12, 18))
    loss.start_microbatch()
    with pytest.raises(InputError, match='another gradient'):
        loss(model(BATCH), BATCH)


def test_gradients_that_are_mostly_rounding_are_no_mismatch():
    """All samples are learnt: what is left of softmax minus targets is some units in the last place."""
    model = classifier(loss_fn=nn.functional.cross_entropy)
    soft = nn.functional.one_hot(BATCH[1], 3).float()
    soft = 0.9 * soft + 0.1 * soft.roll(1, dims=0)
    outputs = (soft.log().clamp(min=-20) + torch.linspace(-1e-6, 1e-6, 18).view(6, 3)).requires_grad_()
    loss = WeightedLoss(model)
    loss.start_epoch(torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0, 1.0]))
    loss.start_batch(slice(0, 6))
    loss.start_microbatch()
    loss(outputs, (BATCH[0], soft))
    assert loss._read == [0]


def test_half_precision_is_compared_as_it_rounds():
    model = classifier()
    for precision in (torch.bfloat16, torch.float16):
        loss = WeightedLoss(model)
        loss.start_epoch(torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0, 1.0]))
        loss.start_batch(slice(0, 6))
        loss.start_microbatch()
        with torch.autocast('cpu', precision):
            outputs = model(BATCH)
            assert outputs.dtype == precision
            loss(outputs, BATCH).backward()
        assert model.module.weight.grad.isfinite().all()


class SeesThroughDDP(ComposerModel):
    """Its loss comes out of its forward pass."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, batch):
        logits = self.used(batch[0])
        return {'loss': nn.functional.cross_entropy(logits, batch[1]), 'logits': logits}

    def loss(self, outputs, batch):
        return outputs['loss']


def test_outputs_that_ddp_passes_on(tmp_path):
    weights, gradients = torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0, 1.0]), []
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/meet', rank=0, world_size=1)
    try:
        for wrap in (lambda model: model, lambda model: nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)):
            torch.manual_seed(0)
            model = SeesThroughDDP()
            loss = WeightedLoss(model)
            loss.start_epoch(weights)
            loss.start_batch(slice(0, 6))
            loss.start_microbatch()
            wrapped = wrap(model)
            loss(wrapped(BATCH), BATCH).backward()
            assert loss._read == [0]
            gradients.append(model.used.weight.grad)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(*gradients)


def test_a_loss_that_is_asked_for_twice_is_weighed_once():
    gradients = []
    for calls in (1, 2):
        torch.manual_seed(0)
        model = SeesThroughDDP()
        loss = WeightedLoss(model)
        loss.start_epoch(torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0, 1.0]))
        loss.start_batch(slice(0, 6))
        loss.start_microbatch()
        outputs = model(BATCH)
        losses = [loss(outputs, BATCH) for _ in range(calls)]
        losses[-1].backward()
        gradients.append(model.used.weight.grad)
    assert torch.equal(*gradients)


class Opaque(torch.autograd.Function):
    """A compiled model is such a function too: nobody may look inside, and its backward pass runs once."""

    @staticmethod
    def forward(ctx, logits, targets):
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = nn.functional.cross_entropy(leaf[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
            ctx.gradient = torch.autograd.grad(loss, leaf)[0]
        return logits.clone(), loss.detach()

    @staticmethod
    def backward(ctx, logits_gradient, loss_gradient):
        gradient, ctx.gradient = ctx.gradient, None
        return logits_gradient + loss_gradient * gradient, None


class Closed(ComposerModel):
    """A causal language model whose loss is computed where nobody can look."""

    def __init__(self, smoothing=0.0):
        super().__init__()
        self.net = nn.Linear(4, 5)
        self.smoothing = smoothing

    def forward(self, batch):
        logits, loss = Opaque.apply(self.net(batch['inputs']), batch['labels'])
        return {'loss': loss * (1 - self.smoothing), 'logits': logits}

    def loss(self, outputs, batch):
        return outputs['loss']


def test_a_loss_that_cannot_be_looked_into_gets_a_correction():
    generator = torch.Generator().manual_seed(0)
    batch = {'inputs': torch.randn(3, 6, 4, generator=generator), 'labels': torch.randint(5, (3, 6), generator=generator)}
    batch['labels'][0, 3:] = -100
    model, weights = Closed(), torch.tensor([2.0, 1.0, 3.0])
    loss = WeightedLoss(model)
    loss.start_epoch(weights)
    loss.start_batch(slice(0, 3))
    loss.start_microbatch()
    value = loss(model(batch), batch)
    value.backward()
    ours = model.net.weight.grad.clone()
    model.zero_grad()
    logits, labels = model.net(batch['inputs'])[:, :-1], batch['labels'][:, 1:]
    each = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction='none').view(3, 5).sum(dim=1)
    expected = (weights * each).sum() / (labels != -100).sum()
    expected.backward()
    assert torch.isclose(value, expected)
    assert torch.allclose(ours, model.net.weight.grad, atol=1e-6)
    other = WeightedLoss(Closed(smoothing=0.01))
    other.start_epoch(weights)
    other.start_batch(slice(0, 3))
    other.start_microbatch()
    with pytest.raises(InputError, match=r"Closed.loss: it takes no reduction='none', and neither"):
        other(other._model(batch), batch)


def sum_over(size):
    """A sum that a hyperparameter divides."""
    return lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction='sum') / size


class OfOutputs(ComposerModel):
    """Its loss is a function of outputs and targets."""

    def __init__(self, function, module=None):
        super().__init__()
        self.net, self.function = module or nn.Linear(8, 3), function

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        return self.function(outputs, batch[1])


@pytest.mark.parametrize(
    'function',
    [
        sum_over(16),
        lambda o, t: nn.functional.cross_entropy(o, t),
        lambda o, t: nn.functional.cross_entropy(o, t, reduction='sum') / len(o),
    ],
    ids=['constant', 'mean', 'size of the batch'],
)
def test_samples_of_a_short_batch_score_as_the_others(make_trainer, problem, function):
    torch.manual_seed(0)
    algorithm = InfoBatch(prune_ratio=0)
    trainer = make_trainer([algorithm], model=OfOutputs(function), lr=0.0, max_duration='1ep')
    trainer.fit()
    assert len(set(trainer.recorder.sizes[0])) > 1
    each = nn.functional.cross_entropy(trainer.state.model.net(problem.tensors[0]), problem.tensors[1], reduction='none')
    scale = algorithm.scores / each.detach()
    assert torch.allclose(scale, scale[0].expand(203), rtol=1e-4)


def test_composers_binary_cross_entropy_which_divides_by_the_batch(make_trainer, problem):
    hot = nn.functional.one_hot(problem.tensors[1], 3).float()
    algorithm = InfoBatch(prune_ratio=0)
    trainer = make_trainer(
        [algorithm], dataset=TensorDataset(problem.tensors[0], hot), loss_fn=binary_cross_entropy_with_logits, lr=0.0, max_duration='1ep'
    )
    trainer.fit()
    each = nn.functional.binary_cross_entropy_with_logits(trainer.state.model.module(problem.tensors[0]), hot, reduction='none').mean(dim=1)
    scale = algorithm.scores / each.detach()
    assert torch.allclose(scale, scale[0].expand(203), rtol=1e-4)


class TimeMajor(nn.Module):
    """Gives [T, B, V] as recurrent networks do by default."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.net(inputs).transpose(0, 1)


def time_major(outputs, labels):
    return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.t().flatten())


def batch_first(outputs, labels):
    return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    ('reduced', 'as_usual'),
    [
        (time_major, batch_first),
        (
            lambda o, t: (o - nn.functional.one_hot(t, 3).transpose(0, 1)).abs().mean(),
            lambda o, t: (o - nn.functional.one_hot(t, 3)).abs().mean(),
        ),
    ],
    ids=['cross-entropy', 'L1'],
)
def test_as_many_steps_as_samples(make_trainer, reduced, as_usual):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(48, 16, 4, generator=generator)
    data = TensorDataset(inputs, (inputs[..., 0] > 0).long())
    with pytest.raises(InputError, match=r'along their first dimension|along the first dimension'):
        make_trainer([InfoBatch()], dataset=data, model=OfOutputs(reduced, TimeMajor()), batch_size=16).fit()
    make_trainer([InfoBatch()], dataset=data, model=OfOutputs(as_usual, nn.Linear(4, 3)), batch_size=16, max_duration='1ep').fit()


class Kept(OfOutputs):
    """Keeps something of each sample from its forward pass."""

    def forward(self, batch):
        self.scale = batch[0].square().mean(dim=1)
        return super().forward(batch)

    def loss(self, outputs, batch):
        return (self.scale * nn.functional.cross_entropy(outputs, batch[1], reduction='none')).mean()


def test_a_loss_that_cannot_be_taken_of_a_part_of_the_batch(make_trainer):
    with pytest.raises(InputError, match=r'^Kept.loss: it fails on a part of the batch, .* \(RuntimeError: .*; pass InfoBatch') as said:
        make_trainer([InfoBatch()], model=Kept(None)).fit()
    assert '\n' not in str(said.value)
    each = lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1], reduction='none')  # noqa: E731
    make_trainer([InfoBatch(per_sample_loss=each)], model=Kept(None), max_duration='1ep').fit()


def test_outside_training_too_a_mask_over_the_batch_is_refused():
    model = OfOutputs(lambda o, t: nn.functional.cross_entropy(o, t, reduction='none').topk(4).values.mean(), nn.Linear(4, 3))
    with pytest.raises(InputError, match='a mean over 4 rows of 6 samples'):
        WeightedLoss(model).per_sample(model(BATCH), BATCH)
    model = OfOutputs(masked_by_median, nn.Linear(4, 3))
    with pytest.raises(InputError, match='depend on the rest of the batch'):
        WeightedLoss(model).per_sample(model(BATCH), BATCH)


def masked_by_median(outputs, targets):
    losses = nn.functional.cross_entropy(outputs, targets, reduction='none')
    return losses[losses > losses.median()].mean()


def test_targets_of_many_lengths_in_a_list(make_trainer):
    """As the boxes of a detector have them."""

    class Counts(OfOutputs):
        def loss(self, outputs, batch):
            return torch.stack(
                [(row - target.float().mean()).square().mean() for row, target in zip(outputs, batch[1], strict=True)]
            ).mean()

    def collate(samples):
        return torch.stack([inputs for inputs, _ in samples]), [torch.arange(2 + int(label)) for _, label in samples]

    data = TensorDataset(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3)
    algorithm = InfoBatch()
    loader = DataSpec(DataLoader(data, batch_size=8, collate_fn=collate), get_num_samples_in_batch=lambda batch: len(batch[0]))
    make_trainer([algorithm], train_loader=loader, model=Counts(None), max_duration='1ep').fit()
    assert algorithm.scores.isfinite().all()
