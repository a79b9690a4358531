import json


def test_every_configuration_is_measured(script, tmp_path, monkeypatch):
    module = script('cpu_precision')
    eager = [configuration for configuration in module.CONFIGURATIONS if not configuration[-1]]  # compiling takes half a minute
    monkeypatch.setattr(module, 'CONFIGURATIONS', eager)
    module.main(['--cases', 'resnet20_cifar:8', '--batch-size', '4', '--turns', '1', '--steps', '1', '--out', str(tmp_path)])
    (case,) = json.loads((tmp_path / 'cpu_precision.json').read_text())['cases']
    assert [row['configuration'] for row in case['rows']] == ['fp32', 'fp32, channels last', 'bf16, channels last']
    assert case['rows'][0]['times_faster'] == 1
    assert (tmp_path / 'cpu_precision.md').read_text().count('resnet20_cifar') == 3
