import csv
import io
import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from composer_effalgos import cli
from composer_effalgos.report import load_sweep, read_runs, show_frontier, write_report
from composer_effalgos.report.charts import charts, family, numbered
from composer_effalgos.report.frontier import frontier, is_finished, is_plain, plain_lengths
from composer_effalgos.report.frontier_figure import chart
from composer_effalgos.report.frontier_table import header, markdown, terminal, write_frontier
from composer_effalgos.report.runner import FINISHED, TARGET
from composer_effalgos.report.table import table_rows
from composer_effalgos.train import train
from composer_effalgos.utils.errors import InputError


@pytest.fixture
def write_frontier_runs(write_run, tmp_path):
    """Plain runs of 2, 4 and 8 epochs and a method of 4 on 70 of 100 samples; accuracies rise by 5 points a doubling."""

    def write(seeds=(17, 18, 19), lengths=(2, 4, 8), factor=1.0, loss=False, **changes):
        def one(name, seed, epochs, samples, accuracy, algorithms):
            settings = {'max_duration': f'{epochs}ep', 'algorithms': algorithms} | changes.get('settings', {})
            accuracies = (0.1,) * (epochs - 1) + (accuracy,)
            folder = write_run(f'{name}_seed{seed}', seed, accuracies, samples, samples / 50, **{**changes, 'settings': settings})
            path = folder / 'summary.json'
            summary = json.loads(path.read_text())
            summary['totals']['train_cpu_seconds'] = samples * epochs / 60
            for epoch in summary['epochs']:
                epoch['batch_size'] = 10
            summary['epochs'][-1]['lr'] = 1e-5
            if loss:
                summary['totals'] |= {'eval_loss': 3 - accuracy, 'eval_accuracy': None}
            path.write_text(json.dumps(summary))

        for number, seed in enumerate(seeds):
            noise = 1e-3 * (number - 1)
            for epochs in lengths:
                one(f'baseline+{epochs}ep', seed, epochs, 100, 0.6 + 0.05 * math.log2(epochs) + noise, {})
            accuracy = 0.6 + 0.05 * math.log2(0.7 * 4 * factor) + noise
            one('infobatch+4ep', seed, 4, 70, accuracy, {'infobatch': {}})
        return tmp_path / 'runs'

    return write


def found(folder, by=None):
    return frontier(read_runs(folder)[0], 'runs', by)


@pytest.mark.parametrize('loss', [False, True])
def test_the_factor_by_each_budget(write_frontier_runs, tmp_path, loss):
    result = found(write_frontier_runs(factor=1.3, loss=loss))
    assert (result.by, result.units, result.is_loss, result.notes) == (
        'cpu_seconds',
        ['cpu_seconds', 'samples', 'steps'],
        loss,
        ['Only 3 plain lengths: the curve between them is uncertain; train 4 or more.'],
    )
    assert [(point.method, point.plain) for point in result.points] == [
        *((f'baseline+{epochs}ep', True) for epochs in (2, 4, 8)),
        ('infobatch+4ep', False),
    ]
    own = result.points[-1]
    for unit in result.units:  # straight in the logarithm, so the curve is exact
        assert own.factors[unit].value == pytest.approx(1.3, rel=1e-3)
        assert own.factors[unit].low < 1.3 < own.factors[unit].high
    assert own.budgets == pytest.approx({'cpu_seconds': 280 / 60, 'samples': 280, 'steps': 28})
    assert own.low < own.quality < own.high
    assert found(tmp_path / 'runs', 'samples').by == 'samples'


def test_what_is_plain():
    assert is_plain({})
    assert is_plain({'algorithms': {'blurpool': {}, 'channels_last': None}})
    for name in ('infobatch', 'InfoBatch', 'pruning', 'adabatch', 'subset_selection', 'selective_backprop', 'of_another_version'):
        assert not is_plain({'algorithms': {'blurpool': {}, name: {}}})


def test_plain_runs_are_alike_but_for_their_length():
    def recipe(epochs, batch=128, **more):
        scheduler = {'name': 'one_cycle', 'max_lr': 0.1, 't_warmup': f'{epochs}ba'}
        return {'max_duration': f'{epochs}ep', 'dataset': {'batch_size': batch}, 'scheduler': scheduler, **more}

    methods = [
        ('small', recipe(4, 16)),
        ('short', recipe(2)),
        ('random', recipe(4, algorithms={'pruning': {}})),
        ('long', recipe(8, run_name='long')),
        ('baseline_of_large_batches', recipe(4, 512)),
    ]
    assert plain_lengths(methods, 's') == [1, 3]
    # the name decides between two groups of as many lengths
    assert plain_lengths([*methods, ('baseline+2', recipe(2, 512))], 's') == [4, 5]


@pytest.mark.parametrize(
    'other',
    [
        {'load_path': 'pretrained.pt', 'load_weights_only': True},
        {'train_subset_num_batches': 3},
        {'scale_schedule_ratio': 0.5},
        {'device_train_microbatch_size': 16},
        {'compile_config': {}},
        {'scheduler': {'name': 'one_cycle', 'max_lr': 0.1, 'anneal_strategy': 'linear', 't_warmup': '3ep'}},
        {'scheduler': {'name': 'one_cycle', 'max_lr': 0.1, 'anneal_strategy': 'cos', 't_warmup': '3ep', 'gammas': [1, 2]}},
    ],
)
def test_a_run_of_other_training_is_no_length_of_the_baseline(other):
    def recipe(epochs, **more):
        scheduler = {'name': 'one_cycle', 'max_lr': 0.1, 'anneal_strategy': 'cos', 't_warmup': f'{epochs}ba'}
        return {'max_duration': f'{epochs}ep', 'scheduler': scheduler, **more}

    short, long = ('baseline+10', recipe(10)), ('baseline+20', recipe(20))
    assert plain_lengths([short, ('other', recipe(12, **other)), long], 's') == [0, 2]


def test_seeds_with_checkpoints_and_files_of_their_own_are_one_method(write_run, tmp_path):
    for seed in (17, 18):
        shared = {'load_path': f'pretrained/seed{seed}/ep4.pt', 'max_duration': '4ep'}
        for epochs in (2, 4, 8):
            write_run(f'baseline+{epochs}ep_seed{seed}', seed, (0.1 * epochs,) * epochs, settings={**shared, 'max_duration': f'{epochs}ep'})
        rho = {'rule': {'name': 'rho', 'irreducible': f'irreducible_{seed}.npy'}, 'start': '4ep'}
        write_run(f'rho+4ep_seed{seed}', seed, (0.4,) * 4, settings={**shared, 'algorithms': {'pruning': rho}})
    points = found(tmp_path / 'runs').points
    assert [(point.method, point.seeds) for point in points] == [
        (method, [17, 18]) for method in ('baseline+2ep', 'baseline+4ep', 'baseline+8ep', 'rho+4ep')
    ]


def test_defaults_that_are_written_out_make_no_other_run():
    defaults = {'train_subset_num_batches': -1, 'scale_schedule_ratio': 1.0, 'load_weights_only': False, 'compile_config': None}
    times = [{'name': 'multistep', 'milestones': milestones, 'gamma': 0.1} for milestones in (['2ep', '3ep'], ['4ep', '60ba'])]
    methods = [
        ('short', {'max_duration': '4ep', 'scheduler': times[0]}),
        ('long', {'max_duration': '8ep', 'scheduler': times[1], **defaults}),
        ('random', {'max_duration': '8ep', 'algorithms': {'pruning': {}}}),
    ]
    assert plain_lengths(methods, 's') == [0, 1]


@pytest.mark.parametrize(
    ('methods', 'message'),
    [
        ([('a', {'algorithms': {'infobatch': {}}, 'max_duration': 4})], 'expected a baseline, runs without an algorithm.*got none'),
        ([('a', {'algorithms': {'infobatch': {}}, 'max_duration': 4}), ('b', {'max_duration': 4})], 'at least two lengths, got b alone'),
        ([('a', {'max_duration': 4}), ('b', {'max_duration': 8})], 'methods beside the baseline, got plain runs alone'),
        (
            [('a', {'max_duration': 4}), ('b', {'max_duration': '4ep'}), ('c', {'max_duration': 8})],
            'one plain run per length, got a and b',
        ),
    ],
)
def test_what_is_no_frontier_is_named(methods, message):
    with pytest.raises(InputError, match=f'^sweep: .*{message}'):
        plain_lengths(methods, 'sweep')


def test_an_unknown_unit_and_mixed_runs_are_named(write_frontier_runs, write_run):
    folder = write_frontier_runs()
    with pytest.raises(InputError, match=r"--by: expected one of cpu_seconds, seconds, samples, steps, got 'hours'"):
        found(folder, 'hours')
    write_run('other_seed17', dataset='cifar10')
    with pytest.raises(InputError, match=r'one dataset, got name=digits \(.*\); name=cifar10 \(other\)'):
        found(folder)


def test_the_same_run_twice_is_named_and_where_it_was_saved_does_not_count(write_frontier_runs, write_run):
    folder = write_frontier_runs(seeds=(17, 18))
    cells = len(found(folder).points)
    path = next(path for path in folder.glob('*/summary.json') if 'baseline+4ep_seed18' in path.read_text())
    summary = json.loads(path.read_text())
    summary['recipe'] |= {'save_interval': '2ep', 'eval_interval': '4ep'}
    path.write_text(json.dumps(summary))
    assert len(found(folder).points) == cells
    summary['recipe']['seed'] = summary['seed'] = 17
    path.write_text(json.dumps(summary | {'run_name': 'baseline+4ep_seed17'}))
    with pytest.raises(InputError, match=r'each run once, got two of baseline\+4ep with seed 17'):
        found(folder)


def test_mixed_machines_are_named(write_frontier_runs, write_run):
    folder = write_frontier_runs()
    write_run('other_seed17', device='NVIDIA H100')
    with pytest.raises(InputError, match=r'one kind of machine, got cpu with 1 rank\(s\) .*NVIDIA H100'):
        found(folder)


def test_what_makes_a_frontier_weak_is_said(write_frontier_runs, write_run):
    folder = write_frontier_runs(seeds=(17, 18))
    write_run('flat+3ep_seed17', settings={'max_duration': '3ep', 'algorithms': {'pruning': {}}})
    write_run('blind+3ep_seed17', accuracies=(None, None), settings={'max_duration': '3ep', 'algorithms': {'pruning': {}}})
    notes = found(folder).notes
    assert notes[0] == 'Left out, without accuracy (not evaluated at its end, or not a finite number): blind+3ep_seed17.'
    few = {'baseline+2ep', 'baseline+4ep', 'baseline+8ep', 'flat+3ep', 'infobatch+4ep'}
    assert set(notes[2].removeprefix('Fewer than 3 seeds: ').rstrip('.').split(', ')) == few
    assert len(notes) == 3  # the batch of the fixture's runs grows fourfold as the learning rate falls to a third
    path = next(folder.glob('*/summary.json'))
    summary = json.loads(path.read_text())
    summary['epochs'][-1]['lr'] = 0.05
    path.write_text(json.dumps(summary))
    assert 'The last learning rate is above 10% of the highest' in found(folder).notes[-1]


def test_a_method_of_which_a_seed_has_no_accuracy_gets_no_verdict(write_frontier_runs, write_run):
    folder = write_frontier_runs(factor=1.5)
    assert found(folder).points[-1].factors['samples'].verdict == 'pays'
    write_run('infobatch+4ep_seed20', 20, (0.1, 0.1, 0.1, None), settings={'max_duration': '4ep', 'algorithms': {'infobatch': {}}})
    own = found(folder).points[-1]
    assert own.seeds == [17, 18, 19]
    assert own.factors['samples'].verdict == 'not resolved: a seed has no accuracy'


def test_what_else_a_method_changes_is_said(write_frontier_runs, write_run):
    folder = write_frontier_runs()
    shared = {'max_duration': '3ep', 'algorithms': {'pruning': {}}}
    write_run('adam+3ep', 17, settings={**shared, 'optimizer': {'name': 'adam', 'lr': 0.1}, 'dataset': {'name': 'digits', 'batch_size': 8}})
    write_run(
        'blur+3ep', 17, settings={'max_duration': '3ep', 'algorithms': {'pruning': {}, 'blurpool': {}}, 'model': {'name': 'resnet20'}}
    )
    write_run('own+3ep', 17, settings=shared)
    said = next(note for note in found(folder).notes if note.startswith('Differs from the plain runs'))
    assert said == (
        'Differs from the plain runs not only in the algorithms of this package: '
        'adam+3ep (dataset.batch_size, optimizer.name, optimizer.lr), blur+3ep (model.name, algorithms.blurpool).'
    )


def test_what_a_file_took_to_make_is_in_the_budget(write_frontier_runs, write_run, tmp_path):
    folder = write_frontier_runs()
    file = tmp_path / 'irreducible.npy'  # it need not exist any more
    rule = {'name': 'rho', 'irreducible': str(file)}
    write_run('rho+3ep_seed17', samples=70, settings={'max_duration': '3ep', 'algorithms': {'pruning': {'rule': rule}}})

    def rho():
        result = found(folder, 'samples')
        return next(point for point in result.points if point.method == 'rho+3ep').budgets['samples'], result.notes

    samples, notes = rho()
    assert samples == 210
    missing = f'The cost of making {file} is not included in the budgets: there is no {file}.cost.json'
    assert any(note.startswith(missing) for note in notes)
    cost = tmp_path / 'irreducible.npy.cost.json'
    cost.write_text(json.dumps({'cpu_seconds': 9, 'seconds': 10, 'samples': 150, 'steps': 15}))
    samples, notes = rho()
    assert samples == 360
    assert f'The cost of making {file} is included in the budgets of the runs that read it.' in notes
    cost.write_text('{"samples": 3}')
    with pytest.raises(InputError, match=r'irreducible\.npy\.cost\.json: expected a number for each of cpu_seconds, seconds'):
        rho()


def test_a_run_is_finished_by_its_mark_or_its_epochs(write_run, tmp_path):
    write_run('whole_seed17', settings={'max_duration': '3ep'})
    write_run('part_seed17', settings={'max_duration': 4})
    write_run('marked_seed17', settings={'max_duration': '90ba'})
    folder = tmp_path / 'runs'
    runs = {run.method: run for run in read_runs(folder)[0]}
    (folder / runs['marked'].folder / FINISHED).touch()
    assert {name for name, run in runs.items() if is_finished(folder, run)} == {'whole', 'marked'}


@pytest.mark.parametrize('loss', [False, True])
def test_the_files_and_the_report_say_the_same(write_frontier_runs, loss):
    folder = write_frontier_runs(factor=1.3, loss=loss)
    result = found(folder)
    write_frontier(result, folder, {'sweep': 's.yaml'})
    with (folder / 'frontier.csv').open() as file:
        rows = list(csv.DictReader(file))
    content = json.loads((folder / 'frontier.json').read_text())
    text = markdown(result)
    assert (folder / 'frontier.md').read_text() == text
    assert [row['method'] for row in rows] == [point['method'] for point in content['points']]
    own = content['points'][-1]
    assert float(rows[-1]['factor_samples_value']) == own['factor_samples_value'] == pytest.approx(1.3, rel=1e-3)
    assert own['factor_samples'] in text
    assert own['verdict'] == 'pays'
    assert ('perplexity' in text) == loss
    ElementTree.parse(folder / 'frontier.svg')
    assert (folder / 'frontier.png').read_bytes()[1:4] == b'PNG'
    page = write_report(folder).read_text()
    assert own['factor_samples'] in page
    assert 'Does it pay?' in page
    odd = replace(result, points=[replace(result.points[-1], method='a|b')])
    assert markdown(odd).splitlines()[2].startswith(r'| a\|b | 3 | ')
    drawn = chart(result, {})
    assert [len(trace['x']) for trace in drawn['traces'][2:]] == [3, 1]
    scale = 1 if loss else 100
    assert drawn['traces'][3]['y'] == pytest.approx([scale * result.points[-1].quality], rel=1e-5)


def test_runs_that_are_left_out_are_named_in_every_file(write_frontier_runs, capsys):
    folder = write_frontier_runs()
    paths = {run.summary['run_name']: folder / run.folder / 'summary.json' for run in read_runs(folder)[0]}
    unfinished, damaged = paths['infobatch+4ep_seed17'], paths['baseline+8ep_seed18']
    summary = json.loads(unfinished.read_text())
    summary['epochs'].pop()
    unfinished.write_text(json.dumps(summary))
    damaged.write_text(damaged.read_text()[:100])
    show_frontier(folder)
    out, err = capsys.readouterr()
    texts = {name: (folder / name).read_text() for name in ('frontier.md', 'frontier.json', 'report.md', 'report.html')}
    for text in (*texts.values(), ' '.join(out.split())):
        assert 'infobatch+4ep_seed17, not finished' in text
    for text in (*texts.values(), out.replace('\n', '')):
        assert str(damaged) in text
    assert not err


def test_a_method_has_one_colour_in_all_charts(write_frontier_runs, write_run):
    folder = write_frontier_runs()
    for name in ('adabatch', 'seta+4ep'):
        write_run(f'{name}_seed17', accuracies=(0.1,) * 4, settings={'max_duration': '4ep', 'algorithms': {'pruning': {'seed': len(name)}}})
    rows = table_rows(read_runs(folder)[0])
    drawn = charts(rows)[0]['traces']
    colors = {family(trace['name']): trace['line']['color'] for trace in drawn}
    beside = chart(found(folder), numbered(row.method for row in rows))['traces'][2:]
    assert {trace['name'].replace('plain training', 'baseline'): trace['line']['color'] for trace in beside} == colors
    assert len(set(colors.values())) == len(colors) == 4
    assert len({(trace['line']['color'], trace['line']['dash']) for trace in drawn}) == len(rows)


def test_runs_that_a_search_stopped_have_no_frontier(write_frontier_runs):
    folder = write_frontier_runs()
    assert 'Equal budgets:' in write_report(folder).with_suffix('.md').read_text()
    (folder / TARGET).write_text('0.9')
    text = write_report(folder).with_suffix('.md').read_text()
    assert 'Equal budgets:' not in text
    assert '| infobatch+4ep | 3 |' in text
    with pytest.raises(InputError, match=r'holds runs of effalgos search, which stops them early; .*best\.yaml'):
        show_frontier(folder)


def test_no_interval_of_an_accuracy_leaves_what_is_possible(write_frontier_runs, write_run):
    for rule, accuracies in (('seta', (0.0, 0.02, 0.3)), ('pdd', (1.0, 0.98, 0.7))):
        for seed, accuracy in zip((17, 18, 19), accuracies, strict=True):
            settings = {'max_duration': '3ep', 'algorithms': {'pruning': {'rule': rule}}}
            write_run(f'{rule}+3ep_seed{seed}', seed, (accuracy,) * 3, settings=settings)
    points = {point.method: point for point in found(write_frontier_runs(), 'samples').points}
    assert points['seta+3ep'].low == 0 < points['seta+3ep'].high
    assert points['pdd+3ep'].high == 1 > points['pdd+3ep'].low


def test_lengths_of_a_method_are_joined_and_combined_methods_are_not(write_frontier_runs, write_run):
    for name, epochs in (('glister+blurpool', 3), ('glister+mixup', 3), ('seta+3ep', 3), ('seta+5ep', 5)):
        settings = {'max_duration': f'{epochs}ep', 'algorithms': {'pruning': {'seed': len(name) + epochs}}}
        write_run(f'{name}_seed17', accuracies=(0.1,) * epochs, settings=settings)
    drawn = chart(found(write_frontier_runs(), 'samples'), {})
    assert [trace['name'] for trace in drawn['traces'][3:]] == ['glister+blurpool', 'glister+mixup', 'seta', 'infobatch']


def test_the_quality_of_a_plain_run_is_its_own_in_whatever_order_the_times_are(write_frontier_runs):
    folder = write_frontier_runs()
    for path in folder.glob('baseline+4ep*/summary.json'):  # slower than the run of 8 epochs
        summary = json.loads(path.read_text())
        summary['totals']['train_cpu_seconds'] *= 3
        path.write_text(json.dumps(summary))
    points = {point.method: point.quality for point in found(folder, 'cpu_seconds').points}
    assert [points[f'baseline+{epochs}ep'] for epochs in (2, 4, 8)] == pytest.approx([0.65, 0.7, 0.75])


def test_beyond_the_plain_runs_a_number_is_null_and_the_text_a_bound(write_frontier_runs, tmp_path):
    result = found(write_frontier_runs(factor=9.0))
    write_frontier(result, tmp_path, {})
    own = json.loads((tmp_path / 'frontier.json').read_text())['points'][-1]
    assert own['factor_samples_value'] is None
    assert own['factor_samples'].startswith('> 2.86')  # 800 / 280
    assert own['verdict'] == 'pays'


@pytest.mark.parametrize(('width', 'factors'), [(80, 1), (140, 3)])
def test_no_word_of_the_titles_is_broken_in_a_terminal(write_frontier_runs, width, factors):
    result = found(write_frontier_runs(), 'samples')
    console = Console(width=width, file=io.StringIO())
    console.print(terminal(result, width))
    head = ' '.join(console.file.getvalue().partition('──')[0].split())
    assert head.count('factor') == factors
    assert set(head.split()) <= {word for title in header(result) for word in title.split()}


SWEEP = """
recipe: digits/digits_baseline.yaml
settings:
  model: {name: resnet20_cifar, num_classes: 10}
  dataset: {batch_size: 48, limit: 96}
methods:
  baseline+1ep: {max_duration: 1ep, seeds: [17, 18]}
  baseline+2ep: {max_duration: 2ep}
  infobatch+2ep: {max_duration: 2ep, algorithms: {infobatch: {}}}
"""


def test_a_sweep_from_the_command_line(tmp_path, monkeypatch, capsys):
    path, out = tmp_path / 'tiny.yaml', tmp_path / 'out'
    path.write_text(SWEEP)
    monkeypatch.setenv('COLUMNS', '200')

    def run(*arguments):
        monkeypatch.setattr('sys.argv', ['effalgos', 'frontier', str(path), '--out', str(out), *arguments])
        try:
            status = cli.main()
        except SystemExit as exited:
            status = exited.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    status, text, error = run('--minutes', '0')
    assert (status, error) == (3, '')
    assert 'No frontier yet' in text
    for job in load_sweep(path).jobs(out):
        train(job.recipe)
        (job.recipe.run_folder / FINISHED).touch()
    status, text, _ = run()
    assert status == 0
    assert 'infobatch+2ep' in text
    assert 'Fewer than 3 seeds: baseline+1ep, baseline+2ep, infobatch+2ep.' in text
    points = json.loads((out / 'frontier.json').read_text())['points']
    assert [point['method'] for point in points] == ['baseline+1ep', 'baseline+2ep', 'infobatch+2ep']
    assert [point['samples'] for point in points[:2]] == [96, 192]
    assert 'Does it pay?' in (out / 'report.html').read_text()

    path.write_text(SWEEP.replace('infobatch: {}}', 'infobatch: {}}, dataset: {limit: 48}'))
    status, _, error = run()
    assert status == 2
    assert 'expected runs on one dataset, got limit=96, name=digits (baseline+1ep); limit=48, name=digits (infobatch+2ep)' in error
    path.write_text(SWEEP)
    status, _, error = run('--by', 'hours')
    assert (status, error.count('\n')) == (2, 1)
    monkeypatch.setattr('sys.argv', ['effalgos', 'frontier', str(out), '--jobs', '2'])
    assert cli.main() == 2
    assert 'expected a sweep, got a folder of runs' in capsys.readouterr().err
    path.write_text(SWEEP.replace('baseline+2ep: {max_duration: 2ep}', 'baseline+2ep: {max_duration: 1ep}'))
    status, _, error = run()
    assert status == 2
    assert 'expected one plain run per length, got baseline+1ep and baseline+2ep' in error
