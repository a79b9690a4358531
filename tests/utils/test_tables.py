import csv

import pytest

from composer_effalgos.utils.tables import csv_text, markdown_table


def test_columns_are_aligned_and_cells_stay_on_their_line():
    text = markdown_table(['run', 'n', 'verdict'], [['a\nb', 1, ''], ['c', 0.5, '< 0.50 (> 1.20)']], left=(0, 2))
    assert text == '| run | n | verdict |\n| --- | ---: | --- |\n| a b | 1 |  |\n| c | 0.5 | < 0.50 (> 1.20) |\n'


@pytest.mark.parametrize(
    ('cell', 'written'),
    [
        ('a|b', r'a\|b'),
        ('`x` *y* ~z~', r'\`x\` \*y\* \~z\~'),
        ('<script>', '&lt;script>'),
        ('</b> &amp;', '&lt;/b> &amp;amp;'),
        ('![a](b)', r'![a\](b)'),
        ('+0.03 [+0.02, +0.04]', '+0.03 [+0.02, +0.04]'),
        ('infobatch_17+16ep', 'infobatch_17+16ep'),
    ],
)
def test_only_markup_is_escaped(cell, written):
    assert markdown_table(['name'], [[cell]]).splitlines()[2] == f'| {written} |'


def test_records_are_read_back_and_none_are_an_empty_file():
    rows = [{'name': 'a,"b"\nc', 'value': 1.5}, {'name': '', 'value': None}]
    assert list(csv.DictReader(csv_text(rows).splitlines(keepends=True))) == [
        {'name': 'a,"b"\nc', 'value': '1.5'},
        {'name': '', 'value': ''},
    ]
    assert csv_text([]) == ''
