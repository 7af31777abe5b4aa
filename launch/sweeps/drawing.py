"""A look, a caption and a way to be written that all figures of a report share.

Colours are Okabe and Ito's and viridis, told apart with any colour vision and in grey; the same results give the same
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
COLOURS, MARKERS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY), "osD^vP"
GREY, LIGHT_GREY = "#666666", "#DDDDDD"
STYLE: dict[RcKeyType, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.hashsalt": "tierforce",
    "svg.fonttype": "none",
}


class LeftOutError(Exception):
    """The results lack what a figure shows; the text says what."""


@dataclass(kw_only=True)
class Drawing:
    """A figure and what to write under it."""

    figure: Figure
    caption: str


def of_fastest(axes: Sequence[str]) -> str:
    """A caption's words on the settings that were left to the fastest point."""
    return f" Of {', '.join(axes)} the fastest value at each place." if axes else ""


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in the format that the ending of `path` names; without a date or a version.

    So nothing but the results changes the file.
    """
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=200, metadata=metadata)
