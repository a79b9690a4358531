"""Tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], left: Container[int] = (0,)) -> str:
    """A Markdown table, with a newline at the end; columns whose position is not in ``left`` are aligned to the right."""
    rules = ['---' if number in left else '---:' for number in range(len(header))]
    return ''.join(f'| {" | ".join(line)} |\n' for line in (_escaped(header), rules, *map(_escaped, rows)))


def _escaped(cells: Sequence[Any]) -> list[str]:
    """Cells on one line, in which only what would be read as markup or as the end of the cell is escaped: ``< 1`` and ``[0, 1]`` stay."""
    texts = [re.sub(r'([\\`*|~]|\](?=\())', r'\\\1', ' '.join(str(cell).split())) for cell in cells]
    return [re.sub('<(?=[A-Za-z/!?])', '&lt;', text.replace('&', '&amp;')) for text in texts]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Records with the same keys as CSV, the keys in the first line; empty without records."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
