import json
import math


def write_run(folder, method, seed, accuracy, epochs, algorithms):
    """A finished run of ``epochs`` epochs of 100 samples."""
    name = f'{method}_seed{seed}'
    entry = {'seconds': 2.0, 'samples': 100, 'batches': 10, 'batch_size': 10, 'selection_seconds': 0.0, 'eval_accuracy': None}
    totals = {'train_seconds': 2.0 * epochs, 'train_cpu_seconds': 1.0 * epochs, 'samples_seen': 100 * epochs, 'samples_full': 100 * epochs}
    totals |= {'samples_saved': 0, 'saved_fraction': 0.0, 'selection_seconds': 0.0, 'eval_accuracy': accuracy, 'peak_memory_bytes': 1}
    summary = {
        'run_name': name,
        'recipe': {'max_duration': f'{epochs}ep', 'algorithms': algorithms},
        'seed': seed,
        'world_size': 1,
        'device': 'cpu',
        'versions': {},
        'epochs': [entry | {'epoch': epoch, 'lr': 1 - epoch / epochs} for epoch in range(epochs)],
        'totals': totals,
    }
    (folder / name).mkdir(parents=True)
    (folder / name / 'summary.json').write_text(json.dumps(summary))


def test_finished_runs_of_several_folders_are_recorded(script, tmp_path, capsys):
    for seed in (17, 18, 19):
        for epochs in (8, 16, 32, 64):
            write_run(tmp_path / 'a', f'baseline+{epochs}ep', seed, 0.1 * math.log2(epochs) + 0.001 * (seed - 18), epochs, {})
        write_run(tmp_path / 'b', 'method+16ep', seed, 0.5 + 0.001 * (seed - 18), 16, {'infobatch': {}})
    arguments = [str(tmp_path / 'a'), str(tmp_path / 'b'), '--name', 'record', '--out', str(tmp_path), '--note', 'A note.']
    assert script('frontier').main(arguments) == 0
    content = json.loads((tmp_path / 'record.json').read_text())
    own = content['points'][-1]
    # as accurate as plain runs of twice the budget
    assert [round(own[f'factor_{unit}_value'], 2) for unit in ('cpu_seconds', 'samples', 'steps')] == [2.0] * 3
    assert len(content['runs']) == 15
    text = (tmp_path / 'record.md').read_text()
    assert own['factor_samples'] in text
    assert 'A note.' in text
    assert 'last learning rate is above 10% of the highest (for the same batch size) in baseline+8ep:' in text  # an eighth
    assert (tmp_path / 'record.svg').exists()
    assert capsys.readouterr().err == ''


def test_runs_without_a_baseline_are_refused_in_one_line(script, tmp_path, capsys):
    module = script('frontier')
    assert module.main([str(tmp_path), '--name', 'x', '--out', str(tmp_path)]) == 2
    write_run(tmp_path / 'a', 'method+16ep', 17, 0.5, 16, {'infobatch': {}})
    assert module.main([str(tmp_path / 'a'), '--name', 'x', '--out', str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert 'expected a baseline' in lines[1]
