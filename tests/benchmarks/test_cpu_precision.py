import json


def test_configurations_are_measured_side_by_side(script, tmp_path, monkeypatch):
    module = script('cpu_precision')
    two = [configuration for configuration in module.CONFIGURATIONS if configuration[0] in ('fp32', 'bf16, channels last')]
    monkeypatch.setattr(module, 'CONFIGURATIONS', two)  # each starts a process, and compiling takes half a minute
    module.main(['--cases', 'resnet20_cifar:8', '--batch-size', '4', '--turns', '1', '--steps', '1', '--out', str(tmp_path)])
    (case,) = json.loads((tmp_path / 'cpu_precision.json').read_text())['cases']
    assert [row['configuration'] for row in case['rows']] == ['fp32', 'bf16, channels last']
    assert case['rows'][0]['times_faster'] == 1
    assert (tmp_path / 'cpu_precision.md').read_text().count('resnet20_cifar') == 2
