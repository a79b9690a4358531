import json
from importlib import metadata


def test_both_files_say_how_the_numbers_came_about(script, tmp_path, monkeypatch):
    record = script('record')
    monkeypatch.setattr('sys.argv', ['/somewhere/benchmarks/thing.py', '--out', 'a b'])
    target = record.write(tmp_path / 'new', 'thing', {'answer': [1, 2.5]}, record.table(['a', 'b'], [[1, 2]]), title='Thing')
    written = json.loads((tmp_path / 'new' / 'thing.json').read_text())
    assert written['answer'] == [1, 2.5]
    assert written['command'] == "python benchmarks/thing.py --out 'a b'"
    assert written['versions']['torch'] == metadata.version('torch')
    assert written['hardware']['cores'] >= 1
    text = target.read_text()
    assert target == tmp_path / 'new' / 'thing.md'
    assert text.startswith('# Thing\n')
    for part in (written['command'], written['date'], written['versions']['mosaicml'], '| a | b |\n| --- | --- |\n| 1 | 2 |\n'):
        assert part in text
