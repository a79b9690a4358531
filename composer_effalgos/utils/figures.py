"""Files of matplotlib figures."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from composer_effalgos.utils.files import whole_file


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> Path:
    """Writes a figure atomically, in the format of the path's extension. Equal figures give equal SVG files, with text as text.

    The file's name without extension seeds the identifiers in an SVG; ``dpi`` is the resolution of a PNG, in pixels per inch.
    """
    ending = path.suffix[1:]
    with matplotlib.rc_context({'svg.hashsalt': path.stem, 'svg.fonttype': 'none'}), whole_file(path) as unfinished:
        figure.savefig(unfinished, format=ending, dpi=dpi, metadata={'Date': None} if ending == 'svg' else {})
    return path
