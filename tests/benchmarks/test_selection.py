import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from composer_effalgos import functional as ef
from composer_effalgos.subset_selection import LastLayerGradients


def test_the_gradients_are_those_of_a_classifier_that_is_mostly_right(script):
    module = script('selection')
    gradients, labels = module.make_gradients(module.Case('craig', 5000, 10, 0.1))
    assert gradients.error.shape == (5000, 10)
    assert gradients.embedding.shape == (5000, 512)
    torch.testing.assert_close(gradients.error.sum(dim=1), torch.zeros(5000), atol=1e-5, rtol=0)
    assert labels.bincount().tolist() == [500] * 10
    right = (gradients.error + torch.nn.functional.one_hot(labels, 10)).argmax(dim=1) == labels
    assert 0.5 < right.float().mean() < 0.99


def test_what_is_reached_by_definition(script):
    module = script('selection')
    gradients, labels = module.make_gradients(module.Case('craig', 60, 2, 0.2, features=6))
    rows, onehot = gradients.dense().double(), torch.nn.functional.one_hot(labels, 2)
    indices, weights = ef.select_subset('gradmatch', gradients, 12, labels=labels)
    matched = located = gained = whole = 0.0
    for label in (0, 1):
        part, chosen = rows[labels == label], rows[indices[labels[indices] == label]]
        w = weights[labels[indices] == label].double()
        matched += (w @ chosen - part.sum(dim=0)).square().sum() + 0.5 * w.square().sum()
        whole += part.sum(dim=0).square().sum()
        distances = torch.cdist(part, chosen).square()
        located += (torch.cdist(part, part).square().max() - distances.min(dim=1).values).sum()
        mine = labels == label
        logits, step = (gradients.error + onehot)[mine].double().log(), torch.zeros(rows.shape[1], dtype=torch.float64)
        features = gradients.embedding[mine].double()
        for pick in chosen:
            moved = logits - 0.01 * (step[:2] + features @ step[2:].view(2, -1).T)
            gained += pick @ LastLayerGradients(torch.softmax(moved, dim=1) - onehot[mine], features).mean()
            step += pick
    for method, expected in (('gradmatch', matched / whole), ('craig', located), ('glister', gained)):
        assert module.objective(method, gradients, labels, indices, weights) == pytest.approx(float(expected), rel=1e-4)


def found(method='craig', backend='torch', stopped=False, samples=100, cpu=1.0, peak=2**20, **axes):
    case = {'method': method, 'samples': samples, 'classes': 10, 'fraction': 0.1, 'backend': backend} | axes
    return case | {'seconds': 2 * cpu, 'cpu_seconds': cpu, 'peak_bytes': peak, 'stopped': stopped, 'objective': None if stopped else 5.0}


def results(**changes):
    settings = {'methods': ['craig'], 'samples': [100, 200], 'classes': [10], 'fraction': 0.1, 'features': 8, 'growth_samples': 200}
    settings |= {'cords': True, 'limit': 60, 'threads': 1}
    rows = [
        {'torch': found(), 'cords': found(backend='cords', stopped=True, cpu=40.0, peak=20 * 2**20)},
        {'torch': found(samples=200, cpu=4.0), 'cords': None},
    ]
    growth = [found(samples=200, classes=20, cpu=2.0), found(samples=200, fraction=0.3, cpu=36.0)]
    return {'settings': settings, 'rows': rows, 'growth': growth, 'figure': 'selection_cpu.svg'} | changes


def test_tables_say_what_was_stopped_and_what_not_tried(script, tmp_path):
    module = script('selection')
    text = module.markdown(results())
    assert '| craig | 100 | 10 | 2 (1) | > 80 (40) | > 40 | 1.0 | > 20 | < 5.0% | 5 | – |' in text
    assert '| craig | 200 | 10 | 8 (4) | – | – |' in text
    assert '| craig | 2.00 | -1.00 | 2.00 |' in text  # as N^2, classes^-1, budget^2
    module.draw(results(), tmp_path / 'figure.svg')
    assert 'stopped' in (tmp_path / 'figure.svg').read_text()


def test_a_case_over_the_limit_spares_the_larger_ones(script, monkeypatch):
    module = script('selection')
    asked = []

    def run(case, limit, threads):
        asked.append((case.backend, case.samples))
        return found(backend=case.backend, samples=case.samples, stopped=case.backend == 'cords' and case.samples >= 200)

    monkeypatch.setattr(module, 'run', run)
    args = module.argparse.Namespace(cords=True, limit=1.0, threads=1)
    rows = module.compare([module.Case('craig', n, 10, 0.1) for n in (100, 200, 300)], args)
    assert asked == [('cords', 100), ('torch', 100), ('cords', 200), ('torch', 200), ('torch', 300)]
    assert rows[2]['cords'] is None


def test_both_backends_end_to_end(script, forked, tmp_path, monkeypatch):
    pytest.importorskip('cords')
    module = script('selection')

    def run(command, **_):
        status, said = forked(*command[1:])
        assert status == 0, said
        return SimpleNamespace(stdout=said)

    monkeypatch.setattr(module, 'subprocess', SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    tiny = ['--samples', '120', '--classes', '2', '--features', '8', '--methods', 'gradmatch', '--threads', '1', '--growth-samples', '120']
    module.main([*tiny, '--growth-classes', '--growth-fractions', '0.3', '--out', str(tmp_path)])
    written = json.loads((tmp_path / 'selection_cpu.json').read_text())
    (row,) = written['rows']
    assert [row[backend]['stopped'] for backend in ('torch', 'cords')] == [False, False]
    assert row['torch']['objective'] <= 1.001 * row['cords']['objective']
    assert [case['fraction'] for case in written['growth']] == [0.3]
    assert (tmp_path / 'selection_cpu.svg').exists()
    stopped = module.run(module.Case('gradmatch', 20_000, 2, 0.1, 'cords'), limit=0.01, threads=1)
    assert stopped['stopped']
    assert stopped['objective'] is None
