import json
import math


def test_finished_runs_of_several_folders_are_recorded(script, write_run, tmp_path, capsys):
    for seed in (17, 18, 19):
        for epochs in (8, 16, 32, 64):
            write_run(tmp_path / 'a', f'baseline+{epochs}ep', seed, 0.1 * math.log2(epochs) + 0.001 * (seed - 18), epochs, {})
        write_run(tmp_path / 'b', 'method+16ep', seed, 0.5 + 0.001 * (seed - 18), 16, {'infobatch': {}})
    write_run(tmp_path / 'b', 'method+32ep', 17, 0.5, 16, {'infobatch': {}})
    summary = tmp_path / 'b/method+32ep_seed17/summary.json'
    summary.write_text(summary.read_text().replace('"16ep"', '"32ep"'))
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
    assert 'Left out: method+32ep_seed17, not finished.' in text
    assert 'last learning rate is above 10% of the highest (for the same batch size) in baseline+8ep:' in text  # an eighth
    assert (tmp_path / 'record.svg').exists()
    assert capsys.readouterr().err == ''


def test_a_record_is_continued_by_the_runs_of_another_day(script, write_run, tmp_path, capsys):
    for seed in (17, 18, 19):
        for epochs in (8, 16, 32, 64):
            write_run(tmp_path / 'a', f'baseline+{epochs}ep', seed, 0.1 * math.log2(epochs) + 0.001 * (seed - 18), epochs, {})
        for folder in ('a', 'b')[seed == 19 :]:
            write_run(tmp_path / folder, f'method{folder}+16ep', seed, 0.5 + 0.001 * (seed - 18), 16, {'infobatch': {}})
    module, record = script('frontier'), str(tmp_path / 'first.json')
    assert module.main([str(tmp_path / 'a'), '--name', 'first', '--out', str(tmp_path)]) == 0
    assert 'save_folder' not in json.loads((tmp_path / 'first.json').read_text())['runs'][0]['recipe']
    assert module.main([str(tmp_path / 'b'), record, '--name', 'second', '--out', str(tmp_path)]) == 0
    points = json.loads((tmp_path / 'second.json').read_text())['points']
    assert [point['method'] for point in points[4:]] == ['methodb+16ep', 'methoda+16ep']
    assert [point['seeds'] for point in points[4:]] == ['17 18 19', '17 18']
    untimed = [str(tmp_path / 'b'), record, '--name', 'untimed', '--untimed', '--out', str(tmp_path)]
    assert module.main(untimed) == 0
    assert 'seconds' not in (tmp_path / 'untimed.md').read_text().partition('| method')[2].partition('\n')[0]
    assert json.loads((tmp_path / 'untimed.json').read_text())['by'] == 'samples'
    assert module.main([*untimed, '--by', 'cpu_seconds']) == 2
    assert '--by: expected samples or steps' in capsys.readouterr().err
    assert module.main([str(tmp_path / 'a'), record, '--name', 'third', '--out', str(tmp_path)]) == 2  # each run twice
    assert 'expected each run once' in capsys.readouterr().err


def test_runs_without_a_baseline_are_refused_in_one_line(script, write_run, tmp_path, capsys):
    module = script('frontier')
    assert module.main([str(tmp_path), '--name', 'x', '--out', str(tmp_path)]) == 2
    write_run(tmp_path / 'a', 'method+16ep', 17, 0.5, 16, {'infobatch': {}})
    assert module.main([str(tmp_path / 'a'), '--name', 'x', '--out', str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert 'expected a baseline' in lines[1]


def test_the_map_has_a_cell_for_each_size_and_length(script, write_run, tmp_path, capsys):
    factors = {(100, 16): 1.5, (100, 32): 1.25, (400, 16): 0.8, (400, 32): 1.0}
    for seed in (17, 18, 19):
        noise = 1e-4 * (seed - 18)
        for size in (100, 400):
            folder = tmp_path / str(size)
            for epochs in (8, 16, 32, 64):
                write_run(folder, f'baseline+{epochs}ep', seed, 0.1 * math.log2(epochs) + noise, epochs, {}, samples=size)
            for epochs in (16, 32):
                accuracy = 0.1 * math.log2(epochs * factors[size, epochs]) + noise
                write_run(folder, f'infobatch+{epochs}ep', seed, accuracy, epochs, {'infobatch': {}}, samples=size)
    assert script('frontier').main([str(tmp_path / '100'), '--name', 'hundred', '--out', str(tmp_path)]) == 0
    folders = [str(tmp_path / 'hundred.json'), str(tmp_path / '400')]  # a record, and runs
    module = script('frontier_map')
    assert module.main([*folders, '--name', 'map', '--by', 'samples', '--out', str(tmp_path)]) == 0
    cells = json.loads((tmp_path / 'map.json').read_text())['cells']
    assert {(cell['size'], cell['epochs']): round(cell['value'], 2) for cell in cells} == factors
    assert [cell['verdict'] for cell in cells] == ['pays', 'pays', 'train shorter instead', 'not resolved']
    svg = (tmp_path / 'map.svg').read_text()
    assert all(cell['text'].split(' ')[0] in svg for cell in cells)
    assert module.main([*folders, '--method', 'seta', '--out', str(tmp_path)]) == 2
    assert '--method' in capsys.readouterr().err
