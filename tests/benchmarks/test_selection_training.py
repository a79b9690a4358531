import json


def test_the_stopwatch_leaves_evaluation_out(script):
    now = [0.0]
    watch = script('selection_training').Stopwatch(lambda: now[0])

    def then(seconds, event):
        now[0] += seconds
        getattr(watch, event)(None, None)

    for seconds, event in ((5, 'fit_start'), (1, 'epoch_start'), (10, 'eval_start'), (100, 'eval_end'), (2, 'epoch_end')):
        then(seconds, event)
    then(3, 'eval_start')
    then(100, 'eval_end')
    then(1, 'fit_end')
    assert watch.seconds['batches'] == 12
    assert watch.seconds['total'] == 1 + 12 + 3 + 1


def run(strategy, fraction, seconds, accuracy):
    return {'strategy': strategy, 'fraction': fraction, 'seconds': {'total': seconds}, 'accuracy': accuracy}


def test_the_verdict_names_what_is_slow_and_what_random_beats(script):
    runs = [run('full', 1.0, 100, 0.9), run('craig', 0.1, 14, 0.5), run('glister', 0.1, 13, 0.7), run('random', 0.1, 10, 0.6)]
    text = script('selection_training').verdict(runs)
    assert '- 10% of the samples, at most 13% of the time: above it: craig.' in text
    assert 'better than both random subsets (60.00 % at best): glister; not better: craig.' in text


def test_end_to_end(script, tmp_path):
    data = ['dataset.name=synthetic', 'dataset.num_samples=64', 'dataset.eval_samples=32', 'dataset.image_size=8']
    tiny = ['--model', 'resnet20_cifar', '--batch-size', '8', '--epochs', '2', '--select-every', '1', '--fractions', '0.3']
    arguments = ['--data', str(tmp_path), *tiny, '--strategies', 'gradmatch', 'random', '--out', str(tmp_path / 'out'), '--set', *data]
    script('selection_training').main(arguments)
    full, gradmatch, random = json.loads((tmp_path / 'out' / 'selection_training_cpu.json').read_text())['runs']
    assert full['samples'] == 2 * 64
    assert gradmatch['samples'] == random['samples'] == 2 * 19
    assert gradmatch['seconds']['forward pass'] > 0
    assert gradmatch['seconds']['strategy'] > 0
    for found in (full, gradmatch, random):
        assert 0 < found['seconds']['batches'] < found['seconds']['total']
        assert found['seconds']['rest'] > 0
