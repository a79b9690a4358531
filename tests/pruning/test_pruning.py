"""Pruning with rules as part of a run."""

import sys
from pathlib import Path

import pytest
import torch
from algorithm_settings import RULE_OPTIONS
from composer.algorithms import SelectiveBackprop
from composer.core import Callback
from torch import nn
from torch.utils.data import DataLoader

from composer_effalgos import InfoBatch, InputError, Pruning, PruningRule, SubsetSelection
from composer_effalgos.plan import EpochPlanner
from composer_effalgos.pruning import RULES
from composer_effalgos.pruning.irreducible import irreducible_losses
from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.schema import load_recipe
from composer_effalgos.report.page import write_report
from composer_effalgos.report.runs import read_runs

ROOT = Path(__file__).parents[2]


class Kept(Callback):
    """What each epoch trained on."""

    def __init__(self):
        self.samples, self.weights = [], []

    def epoch_end(self, state, logger):
        plan = EpochPlanner.of(state).loader.plan
        self.samples.append(plan.order.sort().values)
        self.weights.append(plan.weights)


@pytest.fixture
def trained(make_trainer):
    def train(*algorithms, **kwargs) -> Kept:
        kept = Kept()
        trainer = make_trainer(algorithms, callbacks=[kept], **kwargs)
        trainer.fit()
        kept.trainer = trainer
        return kept

    return train


class Seen(PruningRule):
    """Keeps all but the first sample, and notes what it was shown."""

    def __init__(self, history=1):
        self.history, self.tables, self.epochs, self.steps = history, [], [], []

    def score(self, step):
        self.steps.append(step)
        return step.losses

    def keep(self, table, epoch):
        self.tables.append(table.clone())
        self.epochs.append(epoch)
        return torch.arange(1, len(table)), None


def test_a_rule_sees_what_the_design_says(trained, problem):
    rule = Seen(history=3)
    kept = trained(Pruning(rule, prune_ratio=[(0, 0.2), (1, 0.6)], delta=1.0, labels=problem.tensors[1]), max_duration='4ep', lr=0.0)
    samples = torch.cat([step.samples for step in rule.steps[:13]])
    assert torch.equal(samples.sort().values, torch.arange(203))
    with torch.no_grad():
        losses = nn.functional.cross_entropy(kept.trainer.state.model.module(problem.tensors[0]), problem.tensors[1], reduction='none')
    assert torch.allclose(rule.steps[0].losses, losses[rule.steps[0].samples], atol=1e-6)
    for number, (table, epoch) in enumerate(zip(rule.tables, rule.epochs, strict=True), 1):
        assert (epoch.number, epoch.total, epoch.progress) == (number, 4, number / 4)
        assert epoch.prune_ratio == pytest.approx(0.2 + 0.1 * number)
        assert torch.equal(epoch.labels, problem.tensors[1])
        assert torch.allclose(table.scores, losses, atol=1e-6)
        assert table.scored.all()
        assert table.trained.tolist() == [1] + [number] * 202
        for age in range(3):  # the newest first
            there = (table.trained > age).float()
            assert torch.allclose(table.history[age], losses * there, atol=1e-6)
        assert kept.samples[number].tolist() == list(range(1, 203))


def test_a_rule_sees_the_coarse_selectors_samples_alone(trained):
    rule = Seen()
    kept = trained(SubsetSelection('gradmatch', 0.5, '9ep'), Pruning(rule, delta=1.0), max_duration='3ep')
    subset = kept.trainer.state.algorithms[0].indices
    assert [len(table) for table in rule.tables] == [102, 102]
    assert torch.equal(kept.samples[1], subset[1:])
    weights = kept.trainer.state.algorithms[0].weights
    assert sorted(kept.weights[1].tolist()) == pytest.approx(sorted(weights[1:].tolist()))


def test_samples_without_a_score_are_kept_and_hidden_from_rules(make_trainer, problem):
    rule, kept = Seen(), Kept()
    loader = DataLoader(problem, batch_size=20, drop_last=True)  # in order: the last three are dropped
    trainer = make_trainer([Pruning(rule, delta=1.0)], train_loader=loader, callbacks=[kept], max_duration='2ep')
    trainer.fit()
    assert [len(table) for table in rule.tables] == [200]
    assert EpochPlanner.of(trainer.state).loader.plan.kept.tolist() == list(range(1, 203))


@pytest.mark.parametrize('name', RULES)
def test_every_rule_prunes_and_resumes_within_this_process(make_trainer, tmp_path, weights_of, name):
    def pruning():
        options = RULE_OPTIONS[name](203) if name in RULE_OPTIONS else {}
        return Pruning({'name': name, **options}, prune_ratio=0.3)

    save = {'save_folder': str(tmp_path), 'save_interval': '7ba', 'save_filename': '{batch}.pt'}
    whole = make_trainer([pruning()], max_duration='8ep', **save)
    whole.fit()
    assert 0 < whole.state.algorithms[0].samples_saved == 8 * 203 - int(whole.state.timestamp.sample)
    resumed = make_trainer(
        [pruning()], max_duration='8ep', load_path=str(sorted(tmp_path.glob('[0-9]*.pt'), key=lambda path: int(path.stem))[3])
    )
    resumed.fit()
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert resumed.state.algorithms[0].samples_saved == whole.state.algorithms[0].samples_saved


def test_the_rule_infobatch_is_infobatch(make_trainer, weights_of):
    trainers = [make_trainer([algorithm], max_duration='4ep') for algorithm in (InfoBatch(0.4), Pruning('infobatch', prune_ratio=0.4))]
    for trainer in trainers:
        trainer.fit()
    assert torch.equal(*map(weights_of, trainers))


def test_random_needs_no_score(trained):
    class Batchwise(nn.Module):
        def forward(self, outputs, targets):
            return nn.functional.cross_entropy(outputs, targets) + outputs.var()

    kept = trained(Pruning('random', delta=1.0), loss_fn=Batchwise().forward, max_duration='2ep')
    assert [len(samples) for samples in kept.samples] == [102, 102]
    assert len(set(torch.cat(kept.samples).tolist())) == 203  # without replacement
    assert kept.trainer.state.algorithms[0].scores.isnan().all()
    beside = trained(SelectiveBackprop(0.0, 0.1), Pruning('random', delta=1.0), max_duration='2ep')
    assert all(map(torch.equal, beside.samples, kept.samples))


def test_the_pruned_fraction_over_the_run(trained):
    kept = trained(Pruning('random', prune_ratio={0: 0.0, 1: 0.5}, delta=0.75), max_duration='4ep')
    assert [len(samples) for samples in kept.samples] == [203, round(203 * 0.875), round(203 * 0.75), 203]


@pytest.mark.parametrize(('batch_size', 'least'), [(16, 16), (64, 64), (150, 101), (512, 101)])
def test_an_epoch_of_less_than_a_batch_trains_on_everything_and_says_so(trained, batch_size, least):
    class First(PruningRule):
        def keep(self, table, epoch):
            return torch.arange([0, 4, least - 1, least][epoch.number - 1]), None

    with pytest.warns(
        UserWarning, match=f'the rule keeps 0 of 203 samples in epoch 1, fewer than {least} .*: such an epoch trains on every'
    ):
        kept = trained(Pruning(First(), delta=1.0), max_duration='5ep', batch_size=batch_size)
    assert [len(samples) for samples in kept.samples] == [203, 203, 203, 203, least]
    assert kept.trainer.state.algorithms[0].samples_saved == 203 - least


def test_a_model_that_is_sure_is_not_trained_on_a_handful_of_samples(trained):
    """Progressive Data Dropout on data that are learned at once kept 1 to 9 of 203 samples in the later epochs."""
    kept = trained(Pruning('pdd', delta=1.0), max_duration='16ep', lr=0.5)
    sizes = [len(samples) for samples in kept.samples]
    assert min(sizes) >= 16
    assert sizes.count(203) > 1


EXPECTED = r'expected \(positions, weights\), an int64 tensor \[k\] and a float tensor \[k\] or None, got '


@pytest.mark.parametrize(
    ('answer', 'message'),
    [
        (torch.ones(203, dtype=torch.bool), EXPECTED + r'a tensor of bool \[203\]; for a mask, return \(mask.nonzero'),
        (torch.arange(2), EXPECTED + r'a tensor of int64 \[2\]'),
        ((torch.tensor([1]), None, None), EXPECTED + 'a tuple of 3'),
        (7, EXPECTED + 'int'),
        (
            (torch.ones(203, dtype=torch.bool), None),
            r'expected positions as an int64 tensor \[k\], got a tensor of bool \[203\]; for a mask',
        ),
        ((torch.tensor([1.0]), None), r'expected positions as an int64 tensor \[k\], got a tensor of float32 \[1\]'),
        ((torch.ones(203, dtype=torch.bool).nonzero(), None), r'expected positions .* got a tensor of int64 \[203, 1\]'),
        (([1, 2], None), 'expected positions .* got a list of 2'),
        ((torch.tensor([3, 2]), None), r'expected positions from 0 to 202, ascending, without duplicates, got \[3, 2\]'),
        ((torch.tensor([2, 2]), None), 'expected positions from 0 to 202, ascending'),
        ((torch.tensor([203]), None), 'expected positions from 0 to 202, ascending'),
        ((torch.tensor([-1, 4]), None), 'expected positions from 0 to 202, ascending'),
        ((torch.tensor([1, 2]), torch.ones(3)), r'expected weights as 2 finite numbers or None, got a tensor of float32 \[3\]'),
        ((torch.tensor([1, 2]), [1.0, 1.0]), 'expected weights as 2 finite numbers or None, got a list of 2'),
        ((torch.tensor([1, 2]), torch.tensor([1.0, torch.nan])), 'expected weights as 2 finite numbers .* some not finite'),
    ],
)
def test_refuses_answers_that_name_no_samples(trained, answer, message):
    class Wrong(PruningRule):
        def keep(self, table, epoch):
            return answer

    with pytest.raises(InputError, match=f'^Wrong.keep: {message}') as caught:
        trained(Pruning(Wrong(), delta=1.0), max_duration='2ep')
    assert '\n' not in str(caught.value)


def test_refuses_scores_that_are_not_one_a_sample(trained):
    class Wrong(PruningRule):
        def score(self, step):
            return step.losses.mean()

    with pytest.raises(InputError, match=r'^Wrong.score: expected one number per sample, a float tensor \[16\], got one of \[\]'):
        trained(Pruning(Wrong()), max_duration='2ep')


def test_two_prunings_cannot_be_combined(make_trainer):
    for algorithms in ([Pruning('seta'), InfoBatch()], [InfoBatch(), Pruning('seta')]):
        with pytest.raises(InputError, match='cannot be combined: both decide which samples an epoch leaves out'):
            make_trainer(algorithms)
    with pytest.raises(InputError, match='SubsetSelection is given twice: both pick the subset'):
        make_trainer([SubsetSelection('random', 0.5), SubsetSelection('gradmatch', 0.5)])


def test_a_checkpoint_of_another_rule_is_refused(make_trainer, tmp_path):
    make_trainer([Pruning('ies')], max_duration='1ep', save_folder=str(tmp_path), save_filename='saved.pt').fit()
    with pytest.raises(InputError, match='the checkpoint keeps 5 scores of each sample, this rule needs 1'):
        make_trainer([Pruning('seta')], load_path=str(tmp_path / 'saved.pt'))


@pytest.mark.parametrize(
    'settings',
    [
        ['algorithms.pruning.rule=seta', 'algorithms.pruning.prune_ratio=0.1'],
        ['algorithms.pruning.rule={name: random, gamma: 0.9}'],
        ['algorithms.pruning.rule=random', 'algorithms.pruning.prune_ratio=[[0, 0.1], [1, 0.5]]'],
        ['algorithms.pruning.rule=random', 'algorithms.pruning.prune_ratio={0: 0.1, 0.5: 0.5}'],
    ],
)
def test_recipes(tmp_path, settings):
    common = ['max_duration=3ep', 'dataset.limit=128', f'save_folder={tmp_path}', 'progress_bar=false']
    trainer = build_trainer(load_recipe(ROOT / 'yamls/digits/digits_baseline.yaml', [*common, *settings]))
    trainer.fit()
    assert trainer.state.algorithms[0].samples_saved > 0
    trainer.close()


def test_a_recipe_with_an_unknown_rule(tmp_path):
    recipe = load_recipe(ROOT / 'yamls/digits/digits_baseline.yaml', [f'save_folder={tmp_path}', 'algorithms.pruning.rule=sita'])
    with pytest.raises(InputError, match=r"algorithms.pruning: rule: .*did you mean 'seta'"):
        build_trainer(recipe)


def test_irreducible_losses_are_those_of_the_model(make_trainer, problem):
    model = make_trainer([]).state.model
    losses = irreducible_losses(model, DataLoader(problem, batch_size=20), device='cpu')
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model.module(problem.tensors[0]), problem.tensors[1], reduction='none')
    assert torch.allclose(losses, expected, atol=1e-6)
    with pytest.raises(InputError, match='expected all 203 samples, got 200'):
        irreducible_losses(model, DataLoader(problem, batch_size=20, drop_last=True), device='cpu')
    with pytest.raises(InputError, match=r'^dataloader: expected the samples in their own order .shuffle=False., got RandomSampler'):
        irreducible_losses(model, DataLoader(problem, batch_size=20, shuffle=True), device='cpu')


def test_a_rule_of_ones_own_needs_few_lines(make_trainer, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tests/scripts'))
    from own_rule import HardOrRising

    source = Path(sys.modules['own_rule'].__file__).read_text()
    assert len([line for line in source.partition('class ')[2].splitlines() if line.strip()]) <= 15
    trainer = make_trainer([Pruning(HardOrRising(), delta=1.0)], max_duration='3ep')
    trainer.fit()
    assert trainer.state.algorithms[0].samples_saved > 0


@pytest.mark.distributed
def test_a_rule_of_ones_own_resumes_on_two_ranks_and_is_in_the_report(train_small, tmp_path):
    arguments = ['--rule', 'own', '--batch-size', '4']
    whole = train_small('whole', *arguments, ranks=2)
    train_small('killed', *arguments, '--kill-at', '29', ranks=2)
    resumed = train_small('killed', *arguments, ranks=2)
    assert whole['saved'] == resumed['saved'] > 0
    for name, value in whole['model'].items():
        assert torch.equal(value, resumed['model'][name])
    assert torch.equal(whole['scores'].nan_to_num(-1), resumed['scores'].nan_to_num(-1))
    page = write_report(tmp_path / 'whole' / 'runs', tmp_path / 'report.html')
    (run,), _ = read_runs(tmp_path / 'whole' / 'runs')
    row = next(line for line in page.with_suffix('.md').read_text().splitlines() if line.startswith('| small '))
    assert f'{run.summary["totals"]["samples_seen"]:,}'.replace(',', '') in row.replace(',', '')
    assert run.summary['totals']['samples_saved'] > 0
    assert run.summary['score_histograms']['epochs'][-1]['epoch'] == 5
