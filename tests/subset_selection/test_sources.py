"""In training: where subsets come from, what is held out for validation, and what a resumed run knows."""

import itertools

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from composer.core import Callback, DataSpec, State
from composer.models import ComposerModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_effalgos import InfoBatch, InputError, SubsetSelection
from composer_effalgos import functional as ef
from composer_effalgos.plan import EpochPlanner
from composer_effalgos.subset_selection import last_layer_gradients, sources
from composer_effalgos.subset_selection.strategies.milo import importance
from composer_effalgos.subset_selection.subset_file import write_subset

STATIC = ['el2n', 'grand', 'forgetting', 'margin', 'entropy', 'least-confidence', 'herding', 'k-center', 'milo']


class Subsets(Callback):
    """What each epoch trained on."""

    def __init__(self):
        self.trained, self.orders, self.seconds = [], [], []

    def epoch_end(self, state, logger):
        loader = EpochPlanner.of(state).loader
        self.trained.append(loader.plan.order.sort().values)
        self.orders.append(loader.rank_order)
        self.seconds.append(loader.metrics.selection_seconds)


@pytest.fixture
def fit(make_trainer):
    def run(*algorithms, callbacks=(), **kwargs) -> Subsets:
        subsets = Subsets()
        trainer = make_trainer(algorithms, callbacks=[subsets, *callbacks], **kwargs)
        trainer.fit()
        subsets.trainer = trainer
        return subsets

    return run


@pytest.mark.parametrize('strategy', STATIC)
def test_every_strategy_trains_on_exactly_the_budget(fit, strategy):
    algorithm = SubsetSelection(strategy, 0.3, '2ep', kappa=0.25)
    subsets = fit(algorithm, max_duration='4ep')
    assert [len(set(t.tolist())) for t in subsets.trained] == [203, 61, 61, 61]
    assert torch.equal(subsets.trained[1], subsets.trained[2])
    assert (algorithm.weights == 1).all()
    assert [seconds > 0 for seconds in subsets.seconds] == [False, True, False, True]


# ---------------------------------------------------------------- a held-out share


@pytest.mark.parametrize('strategy', ['glister', 'gradmatch', 'random', 'adaptive-random', 'craig', 'milo', 'forgetting', 'margin'])
def test_what_is_held_out_is_never_trained_on(fit, strategy):
    algorithm = SubsetSelection(strategy, 0.3, '1ep', kappa=0.3, val_share=0.2)
    subsets = fit(algorithm, max_duration='4ep')
    held_out = set(algorithm.held_out.tolist())
    assert len(held_out) == round(0.2 * 203)
    assert [len(t) for t in subsets.trained] == [203 - len(held_out)] * 2 + [61] * 2
    for trained in subsets.trained:
        assert not held_out & set(trained.tolist())
    if strategy == 'random':
        assert torch.equal(subsets.trained[2], subsets.trained[3])


@pytest.mark.parametrize(('strategy', 'options'), [('glister', {'greedy': 'Naive'}), ('gradmatch', {'valid': True})])
def test_the_held_out_samples_are_the_validation_set(fit, problem, strategy, options):
    """The subset is what ``ef.select_subset`` picks with the gradients of the held-out samples, computed by hand."""
    algorithm, seen = SubsetSelection(strategy, 0.3, '1ep', val_share=0.2, **options), []

    class Check(Callback):
        def batch_start(self, state, logger):
            if int(state.timestamp.batch_in_epoch) > 0:  # before the first step the weights are those of the selection
                return
            batches = DataLoader(problem, batch_size=16)
            gradients, labels = last_layer_gradients(state.model, batches, cross_entropies)
            held_out = algorithm.held_out
            rest = torch.tensor([i for i in range(203) if i not in set(held_out.tolist())])
            validation = {'val_gradients': gradients.take(held_out), 'val_labels': labels[held_out]}
            positions, _ = ef.select_subset(strategy, gradients.take(rest), 61, labels=labels[rest], **validation, **options)
            seen.append((set(rest[positions].tolist()), set(algorithm.indices.tolist())))

    fit(algorithm, callbacks=[Check()], max_duration='2ep')
    assert len(seen) == 2
    for expected, found in seen:
        assert len(expected & found) >= 59  # GradMatch fills up at random


def cross_entropies(outputs, batch):
    return nn.functional.cross_entropy(outputs, batch[1], reduction='none')


def test_holding_out_needs_room(make_trainer):
    with pytest.raises(
        InputError,
        match=r'fraction: expected at most the 162 samples .*, got 183 \(0.9 of 203\); use a fraction of at most 0.798',
    ):
        make_trainer([SubsetSelection('glister', 0.9, val_share=0.2)]).fit()


def test_validation_loaders_are_not_read_for_nothing(fit, problem):
    class Unread(TensorDataset):
        def __getitem__(self, index):
            raise AssertionError('read')

    unread = DataLoader(Unread(*problem.tensors), batch_size=16)
    fit(SubsetSelection('craig', 0.3, val_dataloader=unread), max_duration='1ep')
    fit(SubsetSelection('gradmatch', 0.3, val_dataloader=unread), max_duration='1ep')


# ---------------------------------------------------------------- DataSpec


def test_batches_go_through_the_transforms_of_their_data_spec(make_trainer, problem):
    """Inputs that only the transforms put right give the selection of inputs that were right from the start."""
    inputs, labels = problem.tensors
    validation = TensorDataset(inputs[:50], labels[:50])

    def spec(tensors, batch_size, **transforms):
        return DataSpec(DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=len(tensors[0]) > 50), **transforms)

    def fit(train, val):
        algorithm = SubsetSelection('glister', 0.3, '1ep', val_dataloader=val)
        trainer = make_trainer([algorithm], max_duration='2ep')
        trainer.fit(train_dataloader=train)
        return algorithm.indices

    plain = fit(spec((inputs, labels), 16), spec(validation.tensors, 16))
    transforms = {
        'batch_transforms': lambda batch: [batch[0] * 2, batch[1]],
        'microbatch_transforms': lambda batch: [batch[0] + 1, batch[1]],
    }
    transformed = fit(
        spec(((inputs - 1) / 2, labels), 16, **transforms),
        spec(((validation.tensors[0]) * 4, validation.tensors[1]), 16, batch_transforms=lambda batch: [batch[0] / 4, batch[1]]),
    )
    assert len(set(plain.tolist()) & set(transformed.tolist())) >= 0.9 * len(plain)  # (x - 1) / 2 * 2 + 1 is x but for the last bits


def test_the_data_spec_is_the_trainers(make_trainer, problem):
    """Neither that of the evaluation data nor that of another Trainer with the same loader."""
    loader = DataLoader(problem, batch_size=16, shuffle=True)
    calls = []

    def batch_transforms(batch):
        calls.append(len(batch[1]))
        return batch

    def fit(train, **arguments):
        calls.clear()
        trainer = make_trainer([SubsetSelection('glister', 0.3, '1ep')], train_loader=train, max_duration='1ep', **arguments)
        trainer.fit()
        return trainer

    transformed = fit(DataSpec(loader, batch_transforms=batch_transforms), eval_dataloader=loader, eval_interval=0)
    assert sum(calls) == 203 + 61  # one selection and one epoch
    fit(loader)
    assert not calls
    transformed.fit(duration='1ep')
    assert sum(calls) == 203 + 61
    calls.clear()
    transformed.fit(train_dataloader=DataLoader(problem, batch_size=16), duration='1ep')
    assert not calls


# ---------------------------------------------------------------- forgetting


class Presentations(Callback):
    """Whether each sample was right each time it was trained on, from a second forward pass."""

    def __init__(self, problem):
        self.problem, self.right = problem, {i: [] for i in range(len(problem))}

    def batch_start(self, state, logger):
        loader = EpochPlanner.of(state).loader
        where = loader.batch_slice(int(state.timestamp.batch_in_epoch))
        indices = loader.rank_order[where]
        with torch.no_grad():
            right = state.model.module(self.problem.tensors[0][indices]).argmax(dim=1) == self.problem.tensors[1][indices]
        for index, correct in zip(indices.tolist(), right.tolist(), strict=True):
            self.right[index].append(correct)


def events_by_definition(right):
    if not any(right):
        return float('inf') if right else -1.0
    return float(sum(before and not after for before, after in itertools.pairwise(right)))


@pytest.mark.parametrize('microbatch', [None, 5])
def test_forgetting_counts_what_was_lost_again(fit, problem, microbatch, monkeypatch):
    presentations, given = Presentations(problem), []
    select = sources.select_subset

    def spy(*arguments, **options):
        given.append(options['scores'].clone())
        return select(*arguments, **options)

    monkeypatch.setattr(sources, 'select_subset', spy)
    algorithm = SubsetSelection('forgetting', 0.3, '2ep', kappa=0.6)
    fit(algorithm, callbacks=[presentations], max_duration='10ep', lr=1.0, device_train_microbatch_size=microbatch)
    warm_up = [events_by_definition(right[:6]) for right in presentations.right.values()]
    assert given[0].tolist() == warm_up
    assert len(set(warm_up)) > 3
    in_subset = set(algorithm.indices.tolist())
    later = [events_by_definition(right[:8]) for right in presentations.right.values()]
    assert given[1].tolist() == later  # goes on within the subset
    assert min(later[i] for i in in_subset) >= sorted(later)[-61 - 10]


def test_forgetting_beside_pruning(fit):
    algorithm = SubsetSelection('forgetting', 0.3, '2ep', kappa=0.6)
    subsets = fit(InfoBatch(0.5, delta=1.0), algorithm, max_duration='5ep')
    assert len(algorithm.indices) == 61
    assert len(subsets.trained[1]) < 203
    assert set(subsets.trained[4].tolist()) < set(algorithm.indices.tolist())


@pytest.mark.parametrize('keep', ['highest', 'lowest'])
def test_samples_never_trained_on_are_chosen_last(fit, keep):
    algorithm = SubsetSelection('forgetting', 0.9, kappa=0.5, selection_type='Supervised', keep=keep)
    subsets = fit(algorithm, max_duration='2ep', drop_last=True)  # 192 of 203 samples in 12 batches of 16
    order = subsets.orders[0]
    assert len(order) == 192
    assert set(algorithm.indices.tolist()) < set(order.tolist())


# ---------------------------------------------------------------- MILO


def test_milo_goes_through_both_phases_after_one_pass(fit, problem, monkeypatch):
    algorithm = SubsetSelection('milo', 0.2, '1ep', exploration=0.5)
    read, before = [], sources.DataPass.gradients
    monkeypatch.setattr(sources.DataPass, 'gradients', lambda self, **looks: read.append(looks) or before(self, **looks))
    subsets = fit(algorithm, max_duration='6ep')
    assert len(read) == 1
    prepared = algorithm.state_dict()['source']['prepared']
    assert prepared['subsets'].shape == (3, 41)
    for trained, subset in zip(subsets.trained[:3], prepared['subsets'], strict=True):
        assert trained.tolist() == sorted(subset.tolist())
    assert len({tuple(trained.tolist()) for trained in subsets.trained}) == 6
    for trained in subsets.trained:  # in proportion to the classes
        shares = torch.bincount(problem.tensors[1][trained]) - 41 * torch.bincount(problem.tensors[1]) / 203
        assert shares.abs().max() < 1


def test_milo_prepares_from_the_first_embeddings(fit, problem):
    algorithm, seen = SubsetSelection('milo', 0.2, '1ep'), []

    class Check(Callback):
        def epoch_start(self, state, logger):
            if not seen:
                gradients, labels = last_layer_gradients(state.model, DataLoader(problem, batch_size=16), cross_entropies)
                seen.append(importance(gradients, labels))

    fit(algorithm, callbacks=[Check()], max_duration='3ep')
    assert torch.equal(algorithm.state_dict()['source']['prepared']['importance'], seen[0])


# ---------------------------------------------------------------- files


@pytest.fixture
def subset_file(tmp_path, problem):
    path = tmp_path / 'subset.parquet'
    write_subset(path, torch.arange(0, 200, 4), torch.arange(50) + 1.0, dataset=problem, facts={})
    return path


def test_trains_on_the_subset_of_a_file(fit, subset_file):
    algorithm = SubsetSelection('file', path=str(subset_file), kappa=0.3)
    subsets = fit(algorithm, max_duration='3ep')
    assert [len(t) for t in subsets.trained] == [203, 50, 50]
    assert subsets.trained[1].tolist() == list(range(0, 200, 4))
    torch.testing.assert_close(algorithm.weights, (torch.arange(50) + 1.0) / 25.5)


def test_files_of_others_need_no_weights_and_no_metadata(fit, tmp_path):
    path = tmp_path / 'mine.parquet'
    pd.DataFrame({'index': [5, 3, 9, *range(20, 60)]}).to_parquet(path)
    algorithm = SubsetSelection('file', path=str(path))
    fit(algorithm, max_duration='1ep')
    assert algorithm.indices.tolist() == [3, 5, 9, *range(20, 60)]
    assert (algorithm.weights == 1).all()


@pytest.mark.parametrize(
    ('columns', 'message'),
    [
        ({'idx': [1]}, r"expected columns index and weight, got no column 'index' \(found idx\)"),
        ({'index': pd.Series([], dtype=int)}, 'expected at least one sample, got no rows'),
        ({'index': [1.5]}, "column 'index': expected .*, got double"),
        ({'index': [1, None]}, "column 'index': expected .*, got double with 1 empty"),
        ({'index': [3, -1]}, 'row 1: expected a sample number from 0, got index -1'),
        ({'index': [3, 4, 3]}, 'expected every sample once, got index 3 2 times'),
        ({'index': [3], 'weight': ['a']}, "column 'weight': expected .*, got .*string"),
        ({'index': [3, 4], 'weight': [1.0, -1.0]}, r'row 1: weight: expected a number in .*, got -1.0'),
        ({'index': [3, 4], 'weight': [1.0, 1e300]}, r'row 1: weight: expected a number in .*, got 1e\+300'),
        ({'index': [3, 4], 'weight': [0.0, 0.0]}, 'expected at least one weight above 0, got zeros alone'),
    ],
)
def test_refuses_files(tmp_path, columns, message):
    path = tmp_path / 'subset.parquet'
    pd.DataFrame(columns).to_parquet(path)
    with pytest.raises(InputError, match=f'^path: .*subset.parquet: {message}') as caught:
        SubsetSelection('file', path=str(path))
    assert '\n' not in str(caught.value)


def test_refuses_what_is_no_file(tmp_path):
    with pytest.raises(InputError, match='no such file; effalgos select writes one'):
        SubsetSelection('file', path=str(tmp_path / 'none.parquet'))
    text = tmp_path / 'text.parquet'
    text.write_text('index,weight\n1,1\n')
    with pytest.raises(InputError, match='not a readable Parquet file'):
        SubsetSelection('file', path=str(text))
    with pytest.raises(InputError, match='path: missing'):
        SubsetSelection('file')
    with pytest.raises(InputError, match='eta: unknown option of file'):
        SubsetSelection('file', path=str(text), eta=0.1)


def test_refuses_a_subset_of_another_data_set(make_trainer, problem, subset_file, tmp_path):
    inputs, labels = problem.tensors
    for dataset, message in (
        (TensorDataset(inputs[:150], labels[:150]), 'is a subset of 203 samples, and this dataset has 150'),
        (TensorDataset(inputs, labels.flip(0)), 'of the same size, but with other labels'),
    ):
        with pytest.raises(InputError, match=message):
            make_trainer([SubsetSelection('file', path=str(subset_file))], dataset=dataset).fit()
    beyond = tmp_path / 'beyond.parquet'
    pd.DataFrame({'index': [*range(20), 203]}).to_parquet(beyond)
    with pytest.raises(InputError, match='expected 0 to 202, the samples of this dataset, got index 203'):
        make_trainer([SubsetSelection('file', path=str(beyond))]).fit()
    short = tmp_path / 'short.parquet'
    pd.DataFrame({'index': [1, 2]}).to_parquet(short)
    with pytest.raises(InputError, match='path: expected at least one batch of 16 samples, got 2'):
        make_trainer([SubsetSelection('file', path=str(short))]).fit()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, problem):
    with pytest.raises(InputError, match='cannot be written'):
        write_subset(tmp_path / 'none' / 'subset.parquet', torch.arange(3), torch.ones(3), dataset=problem, facts={})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- classes


def test_equal_shares_of_the_classes(fit, problem):
    for strategy in ('random', 'glister'):
        algorithm = SubsetSelection(strategy, 0.3, class_balance='equal')
        fit(algorithm, max_duration='1ep')
        assert sorted(torch.bincount(problem.tensors[1][algorithm.indices]).tolist()) == [20, 20, 21]


class NoTargets(torch.utils.data.Dataset):
    def __init__(self, problem):
        self.problem = problem

    def __len__(self):
        return len(self.problem)

    def __getitem__(self, index):
        return self.problem[index]


class Named(NoTargets):
    """Its targets are the names of the classes."""

    @property
    def targets(self):
        return [f'class {label}' for label in self.problem.tensors[1].tolist()]


class Asked(NoTargets):
    def labels(self):
        return self.problem.tensors[1].tolist()


def test_labels_are_read_where_the_data_set_carries_no_class_indices(fit, problem):
    chosen = []
    for dataset in (problem, NoTargets(problem), Named(problem), Asked(problem)):
        algorithm = SubsetSelection('random', 0.3, selection_type='PerClass')
        fit(algorithm, max_duration='1ep', dataset=dataset)
        chosen.append(algorithm.indices)
    assert all(torch.equal(indices, chosen[0]) for indices in chosen)


# ---------------------------------------------------------------- regression, several labels, sequences


def test_regression_selects_without_classes(fit, problem):
    targets = problem.tensors[0][:, :1] * 2 + 1
    module = nn.Linear(8, 1)

    def loss(outputs, labels, reduction='mean'):
        return nn.functional.mse_loss(outputs, labels, reduction=reduction)

    for strategy in ('gradmatch', 'craig', 'k-center'):
        algorithm = SubsetSelection(strategy, 0.3)
        fit(algorithm, max_duration='1ep', dataset=TensorDataset(problem.tensors[0], targets), module=module, loss_fn=loss)
        assert len(algorithm.indices) == 61
    with pytest.raises(InputError, match='strategy: expected a classifier'):
        fit(SubsetSelection('el2n', 0.3), dataset=TensorDataset(problem.tensors[0], targets), module=module, loss_fn=loss)


def several(problem, kind):
    """The same inputs with several labels or several numbers to predict, and the loss for them."""
    inputs = problem.tensors[0]
    targets = (inputs[:, :3] > 0).float() if kind == 'labels' else inputs[:, :3] * 2
    function = nn.functional.binary_cross_entropy_with_logits if kind == 'labels' else nn.functional.mse_loss
    return {
        'dataset': TensorDataset(inputs, targets),
        'loss_fn': lambda outputs, y, reduction='mean': function(outputs, y, reduction=reduction),
    }


@pytest.mark.parametrize('kind', ['labels', 'numbers'])
def test_several_labels_or_numbers_are_no_classes(fit, make_trainer, problem, kind):
    arguments = several(problem, kind)
    for strategy in ('gradmatch', 'craig', 'glister', 'grand', 'random'):
        algorithm = SubsetSelection(strategy, 0.3)
        fit(algorithm, max_duration='1ep', **arguments)
        assert len(algorithm.indices) == 61
        if strategy != 'gradmatch':
            continue
        module = make_trainer(**arguments).state.model  # as it was when the run selected
        x, y = arguments['dataset'].tensors
        per_sample = lambda outputs, batch: arguments['loss_fn'](outputs, batch[1], reduction='none').mean(dim=1)  # noqa: E731
        expected, _ = ef.select_subset(strategy, last_layer_gradients(module, [(x, y)], per_sample)[0], 61)
        assert torch.equal(algorithm.indices, expected.sort().values)


@pytest.mark.parametrize(
    ('strategy', 'options', 'message'),
    [
        ('el2n', {}, '^labels: expected one class per sample .* got several labels; strategies gradmatch'),
        ('forgetting', {'kappa': 0.5}, '^labels: expected one class per sample .* got several labels, but strategy forgetting counts'),
        ('gradmatch', {'selection_type': 'PerClass'}, '^selection_type: expected one class per sample .* use selection_type=Supervised'),
        ('random', {'selection_type': 'PerClass'}, '^selection_type: expected one class per sample .* use selection_type=Supervised'),
        ('craig', {'class_balance': 'equal'}, '^selection_type: expected one class per sample .* use selection_type=Supervised'),
    ],
)
def test_what_needs_classes_refuses_several_labels(fit, problem, strategy, options, message):
    with pytest.raises(InputError, match=message):
        fit(SubsetSelection(strategy, 0.3, **options), max_duration='2ep', **several(problem, 'labels'))


class Language(ComposerModel):
    """Predicts the next of 11 tokens from each."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11))

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch, reduction='mean'):
        return nn.functional.cross_entropy(outputs.mT, batch[1], reduction=reduction)


@pytest.mark.parametrize('strategy', ['gradmatch', 'el2n', 'forgetting'])
def test_a_language_model_is_told_what_works(fit, strategy):
    tokens = torch.randint(11, (40, 6))
    dataset = TensorDataset(tokens, tokens.roll(-1, dims=1))
    with pytest.raises(InputError, match=r'random, adaptive-random or file, or InfoBatch') as refusal:
        fit(SubsetSelection(strategy, 0.5, '1ep', kappa=0.4), max_duration='3ep', dataset=dataset, model=Language())
    assert '\n' not in str(refusal.value)
    fit(SubsetSelection('adaptive-random', 0.5), max_duration='1ep', dataset=dataset, model=Language())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'val_share': 1.0}, '^val_share: expected'),
        (
            {'val_share': 0.1, 'val_dataloader': DataLoader([1])},
            '^val_share: cannot be combined with val_dataloader',
        ),
        ({'strategy': 'forgetting'}, '^kappa: expected a share above 0 with strategy forgetting'),
        ({'strategy': 'forgetting', 'kappa': 0.2, 'scores': [1, 2]}, '^scores: SubsetSelection counts the forgetting events itself'),
        ({'per_sample_loss': 3}, '^per_sample_loss: expected callable'),
        ({'strategy': 'milo', 'exploration': 2}, '^exploration: '),
        ({'strategy': 'milo', 'phase': 'weighted-random'}, '^phase: SubsetSelection goes through both'),
        ({'class_balance': 'equal', 'selection_type': 'Supervised'}, '^class_balance: expected selection_type=PerClass'),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        SubsetSelection(**arguments)


def test_milo_needs_epochs(make_trainer):
    with pytest.raises(InputError, match='max_duration: expected epochs with strategy milo'):
        make_trainer([SubsetSelection('milo', 0.3)], max_duration='20ba').fit()


class NoPerSample(ComposerModel):
    """A classifier whose loss is the batch's alone."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 3)

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1])


def same_loss(outputs, batch):
    return nn.functional.cross_entropy(outputs, batch[1], reduction='none')


@pytest.mark.parametrize(('strategy', 'options'), [('herding', {}), ('k-center', {}), ('milo', {}), ('el2n', {})])
def test_what_looks_at_embeddings_or_logits_needs_no_loss(fit, strategy, options):
    """The same subsets as with one."""
    kept = []
    for model_options in ({'model': NoPerSample()}, {'model': NoPerSample(), 'per_sample_loss': same_loss}):
        model = model_options.pop('model')
        model.load_state_dict({'net.weight': torch.arange(24.0).sin().view(3, 8), 'net.bias': torch.zeros(3)})
        algorithm = SubsetSelection(strategy, 0.3, '1ep', **options, **model_options)
        fit(algorithm, model=model, max_duration='2ep')
        kept.append(algorithm.indices)
    assert torch.equal(*kept)


class Unreadable(NoPerSample):
    """The graph of its loss does not show the loss of each sample."""

    def loss(self, outputs, batch):
        return (outputs - nn.functional.one_hot(batch[1], 3)).norm()


@pytest.mark.parametrize('strategy', ['grand', 'gradmatch', 'herding'])
def test_a_missing_per_sample_loss_names_this_algorithms_argument(fit, strategy):
    options = {'features': 'gradient'} if strategy == 'herding' else {}
    message = r"^Unreadable.loss: it takes no reduction='none'.*; pass SubsetSelection\(per_sample_loss=callable"
    with pytest.raises(InputError, match=message):
        fit(SubsetSelection(strategy, 0.3, **options), model=Unreadable(), max_duration='1ep')
    algorithm = SubsetSelection(strategy, 0.3, per_sample_loss=same_loss, **options)
    fit(algorithm, model=Unreadable(), max_duration='1ep')
    assert len(algorithm.indices) == 61


@pytest.mark.parametrize('strategy', ['grand', 'gradmatch'])
def test_a_loss_read_from_the_graph_selects_what_the_same_loss_given_selects(fit, strategy):
    kept = []
    for given in (None, same_loss):
        model = NoPerSample()
        model.load_state_dict({'net.weight': torch.arange(24.0).sin().view(3, 8), 'net.bias': torch.zeros(3)})
        algorithm = SubsetSelection(strategy, 0.3, '1ep', per_sample_loss=given)
        fit(algorithm, model=model, max_duration='1ep')
        kept.append(algorithm.indices)
    assert torch.equal(*kept)


def test_a_run_has_one_per_sample_loss(fit):
    def other(outputs, batch):
        return same_loss(outputs, batch)

    def pair(theirs):
        return [InfoBatch(per_sample_loss=same_loss), SubsetSelection('gradmatch', 0.3, per_sample_loss=theirs)]

    for algorithms, first in ((pair(other), 'InfoBatch and SubsetSelection'), (pair(other)[::-1], 'SubsetSelection.* and InfoBatch')):
        with pytest.raises(InputError, match=f'^per_sample_loss: {first}.* got different ones, but a run has one loss'):
            fit(*algorithms, max_duration='1ep')
    fit(*pair(same_loss), max_duration='1ep')


@pytest.mark.parametrize('option', ['generator', 'val_gradients', 'val_labels'])
def test_options_of_select_subset_alone(option):
    with pytest.raises(InputError, match=f'^{option}: an option of select_subset alone; give SubsetSelection (seed|val_dataloader)'):
        SubsetSelection('glister', 0.3, **{option: torch.zeros(3)})


@pytest.mark.parametrize('strategy', ['glister', 'milo'])
def test_a_pass_over_the_data_is_refused_under_fsdp(fit, monkeypatch, strategy):
    monkeypatch.setattr(State, 'fsdp_enabled', True)
    with pytest.raises(InputError, match=f'^strategy: {strategy} cannot be combined with FSDP'):
        fit(SubsetSelection(strategy, 0.3), max_duration='1ep')


def test_weights_near_the_end_of_float32(fit, tmp_path):
    path = tmp_path / 'subset.parquet'
    pd.DataFrame({'index': range(40), 'weight': np.array([3e38] * 20 + [1e38] * 20, np.float32)}).to_parquet(path)
    algorithm = SubsetSelection('file', path=str(path))
    fit(algorithm, max_duration='1ep')
    assert algorithm.weights.tolist() == pytest.approx([1.5] * 20 + [0.5] * 20)


@pytest.mark.parametrize('metadata', [b'{"num_samples": 20', b'[1]', b'\xff', b'[' * 100_000])
def test_a_file_with_damaged_metadata(tmp_path, metadata):
    path = tmp_path / 'subset.parquet'
    pq.write_table(pa.table({'index': [1, 2]}).replace_schema_metadata({b'composer_effalgos.subset': metadata}), path)
    with pytest.raises(
        InputError, match=r'^path: .*subset\.parquet: expected composer_effalgos\.subset in its metadata as effalgos select writes it'
    ):
        SubsetSelection('file', path=str(path))


@pytest.mark.parametrize('column', ['index', 'weight'])
def test_a_file_with_a_column_of_durations(tmp_path, column):
    path = tmp_path / 'subset.parquet'
    columns = {'index': pa.array([1, 2]), 'weight': pa.array([1.0, 2.0])} | {column: pa.array([1, 2], pa.duration('s'))}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(InputError, match=rf"^path: .*: column '{column}': expected .*numbers, none empty, got duration\[s\] with 0 empty"):
        SubsetSelection('file', path=str(path))
