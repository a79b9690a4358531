"""LinUpper and ESLM in a Trainer, against loops in plain PyTorch and plain Composer."""

import copy

import pytest
import torch
from composer.algorithms import MixUp
from composer.core import Callback, DataSpec
from composer.models import ComposerClassifier, HuggingFaceModel
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from composer_effalgos import ESLM, AdaBatch, InfoBatch, InputError, LinUpper, Pruning, SubsetSelection
from composer_effalgos.plan.outputs import NotReadableError
from composer_effalgos.plan.token_loss import read_tokens
from tests.weighting.conftest import LENGTH, WORDS, Language, Sentences, net, shifted

transformers = pytest.importorskip('transformers')
BATCH, PART = 12, 6


def loader(data, batch_size=BATCH):
    return DataLoader(data, batch_size=batch_size)


def fit(make_trainer, algorithms, model, data, duration='2ep', **settings):
    trainer = make_trainer(algorithms, model=model, train_loader=loader(data), lr=0.3, max_duration=duration, **settings)
    trainer.fit()
    return trainer


def plain_loop(model, data, loss_of, epochs=2, part=BATCH):
    """Composer's own steps: microbatches weigh as many samples as they have, SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(epochs):
        for batch in loader(data):
            optimizer.zero_grad()
            size = len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])
            for start in range(0, size, part):
                rows = slice(start, start + part)
                micro = {k: v[rows] for k, v in batch.items()} if isinstance(batch, dict) else [v[rows] for v in batch]
                share = len(next(iter(micro.values())) if isinstance(micro, dict) else micro[0]) / size
                (loss_of(model, micro) * share).backward()
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


# ---------------------------------------------------------------------- LinUpper


def lin_upper_weights(losses, temperature):
    losses = losses.detach()
    h = 2 * (losses - (losses.max() + losses.min()) / 2) / (losses.max() - losses.min())
    powers = torch.exp(torch.minimum(h + 1, torch.ones(())) / temperature)
    return len(losses) * powers / powers.sum()


@pytest.mark.parametrize('part', [BATCH, PART])
def test_lin_upper_trains_as_a_plain_loop(make_trainer, weights_of, problem, part):
    def loss_of(model, batch):
        losses = cross_entropy(model.module(batch[0]), batch[1], reduction='none')
        return (lin_upper_weights(losses, 0.4) * losses).mean()

    def model():
        torch.manual_seed(0)
        return ComposerClassifier(torch.nn.Linear(8, 3), num_classes=3)

    data = torch.utils.data.Subset(problem, range(60))
    trainer = fit(make_trainer, [LinUpper(burn_in=None)], model(), data, device_train_microbatch_size=part)
    assert torch.allclose(weights_of(trainer), plain_loop(model(), data, loss_of, part=part), atol=1e-5)


def test_lin_upper_weighs_the_sequences_of_a_language_model(make_trainer, weights_of, sentences):
    """Of a mean over tokens each sequence has the share of its tokens."""

    def loss_of(model, batch):
        each = cross_entropy(model(batch)[:, :-1].transpose(1, 2), batch['labels'][:, 1:], reduction='none')
        counts = (batch['labels'][:, 1:] != -100).sum(dim=1)
        weights = lin_upper_weights(each.sum(dim=1) / counts, 0.4)
        return (weights * each.sum(dim=1)).sum() / counts.sum()

    trainer = fit(make_trainer, [LinUpper(burn_in=None)], Language(), sentences)
    assert torch.allclose(weights_of(trainer), plain_loop(Language(), sentences, loss_of), atol=1e-5)


def test_lin_upper_beside_a_weighted_subset_multiplies_weights(make_trainer):
    trainer = make_trainer([LinUpper(burn_in=None), SubsetSelection('craig', 0.5, '1ep')], max_duration='2ep')
    seen = []
    loss = trainer.state.model.loss
    original = loss._weigh_gradients
    loss._weigh_gradients = lambda outputs, weights: (seen.append((loss._weights[loss._window], weights)), original(outputs, weights))
    trainer.fit()
    assert len(seen) == 14
    for subset, both in seen:
        factors = both / subset
        assert not torch.equal(subset, torch.ones_like(subset))
        assert factors.mean().item() == pytest.approx(1, abs=1e-4)  # LinUpper's own
        assert factors.max() / factors.min() <= torch.tensor(2.5).exp() + 1e-3


# ---------------------------------------------------------------------- ESLM


def kept(scores, alpha):
    """At and above the smallest score that a share alpha of all does not exceed."""
    ascending = scores.sort().values
    place = next(k for k in range(1, len(scores) + 1) if k >= alpha * len(scores) - 1e-6)
    return scores >= ascending[place - 1]


def token_losses(logits, labels, **options):
    return cross_entropy(logits[:, :-1].reshape(-1, WORDS), labels[:, 1:].reshape(-1), reduction='none', **options)


def eslm_loss(alpha, score=lambda model, batch, losses, logits: losses, **options):
    def loss_of(model, batch):
        logits = model(batch)
        logits = logits['logits'] if isinstance(logits, dict) else logits
        real = batch['labels'][:, 1:].reshape(-1) != -100
        losses = token_losses(logits, batch['labels'], **options)[real]
        chosen = kept(score(model, batch, losses, logits).detach(), alpha)
        return losses[chosen].mean()

    return loss_of


def by_hand(logits, labels):
    """A mean over the tokens without a reduction of torch's."""
    losses = token_losses(logits, labels.clamp(min=0))
    mask = (labels[:, 1:] != -100).reshape(-1)
    return (losses * mask).sum() / mask.sum()


def transposed(logits, labels):
    return cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])


KINDS = {
    'shifted': (shifted, {}),
    'smoothed': (lambda logits, labels: shifted(logits, labels, label_smoothing=0.1), {'label_smoothing': 0.1}),
    'by hand': (by_hand, {}),
    'classes second': (transposed, {}),
    'sum': (lambda logits, labels: shifted(logits, labels, reduction='sum') / (labels[:, 1:] != -100).sum(), {}),
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('part', [BATCH, PART])
def test_eslm_trains_as_a_plain_loop(make_trainer, weights_of, sentences, kind, part):
    function, options = KINDS[kind]
    trainer = fit(make_trainer, [ESLM(0.4)], Language(function), sentences, device_train_microbatch_size=part)
    assert torch.allclose(weights_of(trainer), plain_loop(Language(), sentences, eslm_loss(0.4, **options), part=part), atol=1e-5)


def test_a_microbatch_without_a_label_adds_nothing(make_trainer, weights_of, sentences):
    sentences.labels[::2] = -100

    def fixed(logits, labels):
        return shifted(logits, labels, reduction='sum') / 30

    def loss_of(model, batch):
        losses = token_losses(model(batch), batch['labels'])[batch['labels'][:, 1:].reshape(-1) != -100]
        chosen = kept(losses.detach(), 0.4) if len(losses) else losses > 0
        return (losses * chosen).sum() * (len(losses) / chosen.sum().clamp(min=1)) / 30

    trainer = fit(make_trainer, [ESLM(0.4)], Language(fixed), sentences, device_train_microbatch_size=1)
    assert torch.allclose(weights_of(trainer), plain_loop(Language(), sentences, loss_of, part=1), atol=1e-5)


def test_eslm_by_entropy(make_trainer, weights_of, sentences):
    def entropy(model, batch, losses, logits):
        probabilities = logits[:, :-1].softmax(dim=-1).reshape(-1, WORDS)
        return -(probabilities * probabilities.log()).sum(dim=1)[batch['labels'][:, 1:].reshape(-1) != -100]

    trainer = fit(make_trainer, [ESLM(0.4, 'entropy')], Language(), sentences)
    assert torch.allclose(weights_of(trainer), plain_loop(Language(), sentences, eslm_loss(0.4, entropy)), atol=1e-5)


def test_with_class_weights_it_is_their_mean_over_the_kept(make_trainer, weights_of, sentences):
    class_weights = torch.linspace(0.5, 2, WORDS)

    def loss_of(model, batch):
        real = batch['labels'][:, 1:].reshape(-1) != -100
        losses = token_losses(model(batch), batch['labels'])[real]
        counts = class_weights[batch['labels'][:, 1:].reshape(-1)[real]]
        chosen = kept(losses.detach(), 0.4)
        return (counts * losses)[chosen].sum() / counts[chosen].sum()

    trainer = fit(make_trainer, [ESLM(0.4)], Language(lambda o, t: shifted(o, t, weight=class_weights)), sentences)
    assert torch.allclose(weights_of(trainer), plain_loop(Language(), sentences, loss_of), atol=1e-5)


def test_a_reference_makes_it_rho_1(make_trainer, weights_of, sentences):
    reference = Language()
    with torch.no_grad():
        reference.net[2].weight.mul_(3)

    def excess(model, batch, losses, logits):
        with torch.no_grad():
            theirs = token_losses(reference(batch), batch['labels'])
        return losses - theirs[batch['labels'][:, 1:].reshape(-1) != -100]

    before = copy.deepcopy(reference.state_dict())
    trainer = fit(make_trainer, [ESLM(0.4, reference=reference)], Language(), sentences)
    assert torch.allclose(weights_of(trainer), plain_loop(Language(), sentences, eslm_loss(0.4, excess)), atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert not reference.training


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0,
                                     attn_pdrop=0, use_cache=False)  # fmt: skip
    return HuggingFaceModel(transformers.GPT2LMHeadModel(config))


def test_eslm_on_a_hugging_face_model(make_trainer, weights_of, sentences):
    trainer = fit(make_trainer, [ESLM(0.4, reference=gpt2())], gpt2(), sentences)
    assert torch.isfinite(weights_of(trainer)).all()
    trainer = fit(make_trainer, [ESLM(0.4)], gpt2(), sentences, '1ep')
    theirs = plain_loop(gpt2(), sentences, eslm_loss(0.4), epochs=1)
    ours = torch.cat([p.detach().flatten() for p in trainer.state.model.parameters()]).double()
    assert torch.allclose(ours, theirs, atol=1e-4)


class Half(Callback):
    """Runs the model in bfloat16, as on a GPU."""

    def before_forward(self, state, logger):
        self.context = torch.autocast('cpu', torch.bfloat16)
        self.context.__enter__()

    def after_loss(self, state, logger):
        self.context.__exit__(None, None, None)


def test_eslm_under_autocast(make_trainer, weights_of, sentences):
    trainer = fit(make_trainer, [ESLM(0.4)], Language(), sentences, callbacks=[Half()])
    assert (weights_of(trainer) - plain_loop(Language(), sentences, eslm_loss(0.4))).abs().max() < 0.2


# ---------------------------------------------------------------------- nothing weighed


@pytest.mark.parametrize('algorithm', [lambda: LinUpper(burn_in='1dur'), lambda: ESLM(0), lambda: ESLM(0.3, burn_in='1dur')])
@pytest.mark.parametrize('model', [Language, gpt2, lambda: Language(KINDS['smoothed'][0]), lambda: Language(by_hand)])
def test_without_weights_it_is_plain_composer_bit_by_bit(make_trainer, weights_of, sentences, algorithm, model):
    plain, ours = (fit(make_trainer, algorithms, model(), sentences) for algorithms in ([], [algorithm()]))
    assert torch.equal(weights_of(plain), weights_of(ours))


def test_the_burn_in_ends_at_its_batch(make_trainer, sentences):
    begun = []

    class Weights(Callback):
        def after_loss(self, state, logger):
            begun.append(bool(state.model.loss._hooked))

    fit(make_trainer, [LinUpper(burn_in='4ba')], Language(), sentences, callbacks=[Weights()])
    assert begun == [False] * 4 + [True] * 2


# ---------------------------------------------------------------------- loaders, resumption


class Stream(IterableDataset):
    """The same sequences without numbers."""

    def __iter__(self):
        data = Sentences()
        return (data[index] for index in range(len(data)))


ALGORITHMS = {
    'LinUpper': lambda: [LinUpper(burn_in='2ba')],
    'ESLM': lambda: [ESLM(0.4)],
    'LinUpper, AdaBatch': lambda: [LinUpper(burn_in='2ba'), AdaBatch(2, '3ba')],
    'ESLM, AdaBatch': lambda: [AdaBatch(2, '3ba'), ESLM(0.4, burn_in='1ba')],
    'ESLM, a subset': lambda: [ESLM(0.4), SubsetSelection('random', 0.7, '1ep')],
}


@pytest.mark.parametrize('name', ALGORITHMS)
@pytest.mark.parametrize('stream', [False, True])
def test_resumed_after_any_batch_it_ends_bit_identical(make_trainer, weights_of, tmp_path, name, stream):
    if stream and 'subset' in name:
        return

    def run(**settings):
        data = DataLoader(Stream() if stream else Sentences(), batch_size=5, shuffle=not stream, num_workers=0)
        tokens = DataSpec(data, get_num_tokens_in_batch=lambda batch: batch['input_ids'].numel())
        trainer = make_trainer(ALGORITHMS[name](), model=Language(), train_loader=tokens, lr=0.3, max_duration='14ba', **settings)
        trainer.fit()
        return trainer

    saved = {'save_folder': str(tmp_path), 'save_interval': '1ba', 'save_filename': 'ba{batch}.pt', 'save_num_checkpoints_to_keep': -1}
    whole = run(**saved)
    sizes = [size for sizes in whole.recorder.sizes for size in sizes]
    assert ('AdaBatch' in name) == (max(sizes) > 5)
    for batch in (1, 4, len(sizes) - 2):
        resumed = run(load_path=str(tmp_path / f'ba{batch}.pt'))
        assert torch.equal(weights_of(whole), weights_of(resumed)), batch


@pytest.mark.parametrize(
    ('duration', 'burn_in', 'first'), [('1ep', '0.05dur', 1), ('1ep', '0.5dur', 4), ('2ep', '0.5dur', 8), ('8ba', '0.25dur', 2)]
)
def test_burn_in_is_a_share_of_the_run_to_the_batch(make_trainer, problem, monkeypatch, duration, burn_in, first):
    class Batches(Callback):
        number = 0

        def batch_start(self, state, logger):
            self.number = int(state.timestamp.batch)

    batches, weighted = Batches(), set()
    weigh = LinUpper.weigh
    monkeypatch.setattr(LinUpper, 'weigh', lambda self, *given: (weighted.add(batches.number), weigh(self, *given))[1])
    data = torch.utils.data.Subset(problem, range(128))
    trainer = make_trainer([LinUpper(burn_in=burn_in)], dataset=data, batch_size=16, max_duration=duration, callbacks=[batches])
    trainer.fit()
    assert sorted(weighted) == list(range(first, {'1ep': 8, '2ep': 16, '8ba': 8}[duration]))


def test_on_a_streaming_data_loader(make_trainer, weights_of, tmp_path, sentences):
    streaming = pytest.importorskip('streaming')
    with streaming.MDSWriter(out=str(tmp_path / 'remote'), columns={'row': 'int'}, size_limit=64) as out:
        for row in range(len(sentences)):
            out.write({'row': row})

    class Rows(streaming.StreamingDataset):
        def __getitem__(self, at):
            return sentences[super().__getitem__(at)['row']]

    runs = []
    for kind, algorithm in (('plain', ESLM(0)), ('streamed', ESLM(0.4)), ('in memory', ESLM(0.4))):
        dataset = Rows(remote=str(tmp_path / 'remote'), local=str(tmp_path / kind), shuffle=False, batch_size=BATCH)
        data = loader(sentences) if kind == 'in memory' else streaming.StreamingDataLoader(dataset, batch_size=BATCH)
        runs.append(make_trainer([algorithm], model=Language(), train_loader=data, lr=0.3, max_duration='2ep'))
        runs[-1].fit()
    plain, streamed, in_memory = map(weights_of, runs)
    assert torch.equal(streamed, in_memory)
    assert not torch.equal(plain, streamed)


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ('algorithms', 'message'),
    [
        (lambda: [LinUpper(), InfoBatch()], '^algorithms: LinUpper and InfoBatch cannot be combined: both decide'),
        (lambda: [Pruning('random'), ESLM()], '^algorithms: ESLM and Pruning cannot be combined: both decide'),
        (lambda: [LinUpper(), ESLM()], '^algorithms: ESLM and LinUpper cannot be combined: a batch is weighed'),
        (lambda: [ESLM(), ESLM()], '^algorithms: ESLM is given twice'),
        (lambda: [ESLM(), SubsetSelection('craig', 0.5)], r"^algorithms: ESLM cannot be combined with SubsetSelection\('craig'\)"),
    ],
)
def test_combinations_that_are_refused(make_trainer, sentences, algorithms, message):
    with pytest.raises(InputError, match=message):
        fit(make_trainer, algorithms(), Language(), sentences)


def two(logits, labels):
    return shifted(logits, labels) + shifted(2 * logits, labels)


def z_loss(logits, labels):
    return shifted(logits, labels) + 1e-4 * logits.logsumexp(dim=-1).square().mean()


def soft(logits, labels):
    return -(logits.log_softmax(dim=-1) * 0.1).sum(dim=-1).mean()


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        (two, 'its graph shows 2 terms'),
        (z_loss, 'a further term in it reads the outputs'),
        (soft, 'does not show one cross-entropy over tokens'),
        (lambda logits, labels: (shifted(logits, labels), shifted(logits, labels)), 'does not show one cross-entropy over tokens'),
        (lambda logits, labels: shifted(logits, labels).square(), 'more than a weighted mean'),
    ],
)
def test_losses_that_cannot_be_read_token_by_token_are_refused_in_the_first_batch(make_trainer, sentences, function, message):
    with pytest.raises(InputError, match=rf'^Language.loss: .*{message}.*; use torch.nn.functional.cross_entropy') as said:
        fit(make_trainer, [ESLM(burn_in='1ep')], Language(function), sentences)
    assert '\n' not in str(said.value)


def test_a_compiled_loss_is_refused(make_trainer, sentences):
    with pytest.raises(InputError, match=r'^HuggingFaceModel.loss: its graph does not show one .* in a loss\(\) that is not compiled$'):
        fit(make_trainer, [ESLM()], gpt2(), sentences, compile_config={'backend': 'aot_eager'})


def test_a_compiled_model_whose_loss_is_not_compiled(make_trainer, weights_of, sentences):
    plain = fit(make_trainer, [ESLM(0.4)], Language(), sentences)
    compiled = fit(make_trainer, [ESLM(0.4)], Language(), sentences, compile_config={'backend': 'aot_eager'})
    assert torch.allclose(weights_of(plain), weights_of(compiled), atol=1e-6)


def test_a_second_loss_for_a_microbatch_is_refused(make_trainer):
    with pytest.raises(InputError, match=r'^algorithms: LinUpper cannot be combined with a second loss .* set it to False$'):
        make_trainer([LinUpper(), MixUp(interpolate_loss=True)]).fit()


def test_other_references_are_refused(make_trainer, sentences):
    class Unshifted(Language):
        def loss(self, outputs, batch):
            return cross_entropy(outputs.flatten(0, 1), batch['labels'].flatten())

    class Other(Language):
        def loss(self, outputs, batch):
            return shifted(outputs, batch['labels'].flip(0))

    class Nothing(Language):
        def loss(self, outputs, batch):
            return outputs.mean()

    for reference, message in (
        (Unshifted(), '72 tokens, got 84 others of Unshifted'),
        (Other(), 'got 72 others of Other'),
        (Nothing(), 'Nothing.loss: it computes 0 cross-entropies'),
    ):
        with pytest.raises(InputError, match=rf'^reference: .*{message}'):
            fit(make_trainer, [ESLM(reference=reference)], Language(), sentences)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: LinUpper(0), 'temperature'),
        (lambda: LinUpper(burn_in='five'), 'burn_in'),
        (lambda: LinUpper(global_batch='yes'), 'global_batch'),
        (lambda: LinUpper(per_sample_loss=3), 'per_sample_loss'),
        (lambda: ESLM(1), 'quantile'),
        (lambda: ESLM(score='margin'), 'score'),
        (lambda: ESLM(reference=net()), 'reference: expected a ComposerModel, got Sequential'),
        (lambda: ESLM(score='entropy', reference=Language()), 'score'),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(InputError, match=f'^{message}'):
        make()


def test_reading_without_a_graph():
    with pytest.raises(NotReadableError):
        read_tokens(torch.tensor(1.0), torch.zeros(2, 3))


def test_they_say_what_they_are():
    assert repr(LinUpper()) == "LinUpper(temperature=0.4, burn_in='0.05dur', global_batch=False)"
    assert repr(ESLM()) == "ESLM(quantile=0.1, score='loss', reference=None, global_batch=False)"
    assert 'reference=Language' in repr(ESLM(reference=Language()))
