import subprocess
import sys

import pytest

from composer_effalgos import cli


def run(monkeypatch, *argv: str) -> int:
    monkeypatch.setattr(sys, 'argv', ['effalgos', *argv])
    try:
        return cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)


def test_recipes_has_one_line_a_recipe(monkeypatch, capsys, tmp_path):
    (tmp_path / 'one.yaml').write_text('# What it shows\nseed: 1\n')
    (tmp_path / 'two.yaml').write_text('# Another\nseed: 1\n')
    assert run(monkeypatch, 'recipes', str(tmp_path)) == 0
    assert capsys.readouterr().out.splitlines() == [f'{tmp_path}/one.yaml  What it shows', f'{tmp_path}/two.yaml  Another']


def test_recipes_lists_our_own_by_default(monkeypatch, capsys):
    assert run(monkeypatch, 'recipes') == 0
    assert 'digits_infobatch.yaml' in capsys.readouterr().out


@pytest.mark.parametrize('folder', ['none', '.'])
def test_a_folder_without_recipes_is_one_line(monkeypatch, capsys, tmp_path, folder):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, 'recipes', folder) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ')
    assert captured.err.count('\n') == 1
    assert captured.out == ''


def test_an_unknown_command_is_refused(monkeypatch, capsys):
    assert run(monkeypatch, 'recipies') == 2
    assert 'recipies' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('argv', 'named'),
    [
        (('bench', 'x.yaml', '--jobs', '0'), '--jobs'),
        (('search', 'x.yaml', '--trials', 'x'), '--trials'),
        (('check-data', 'x', '--workers', '-1'), '--workers'),
        (('bench',), 'sweep'),
        (('bench', 'x.yaml', '--job', '1'), '--job'),
    ],
)
def test_a_bad_option_is_one_line(monkeypatch, capsys, argv, named):
    assert run(monkeypatch, *argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ')
    assert named in captured.err.lower()
    assert captured.err.count('\n') == 1
    assert captured.out == ''


def test_help_is_help(monkeypatch, capsys):
    assert run(monkeypatch, '--help') == 0
    assert 'check-data' in capsys.readouterr().out
    run(monkeypatch)
    assert 'check-data' in ''.join(capsys.readouterr())


def test_the_module_is_the_console_script(tmp_path):
    result = subprocess.run(
        [sys.executable, '-m', 'composer_effalgos.cli', 'recipes', str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith('error: ')
