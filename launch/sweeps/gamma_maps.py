"""Maps of a sweep over γ1 and γ2: the time between tokens, and the acceptance of the retrieval draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from launch.sweeps.drawing import LIGHT_GREY, Drawing, LeftOutError, of_fastest
from launch.sweeps.medians import GAMMA1, GAMMA2, Point, Results, Series, series_of
from launch.sweeps.table import sort_key

MAX_MAPS = 3


@dataclass(frozen=True)
class MapMeasure:
    """A measurement in a map: its column of the table, what it is called, its colours, and the form of its numbers."""

    metric: str
    name: str
    colours: str
    form: str


MEASURES = (
    MapMeasure("tbt_ms", "TBT (ms)", "viridis_r", "{:.1f}"),
    MapMeasure("retrieval_acceptance", "acceptance of the retrieval draft", "viridis", "{:.2f}"),
)


def gamma_maps(results: Results) -> Drawing:
    """Maps of TBT and acceptance over γ1 and γ2. Raises LeftOutError."""
    points = [point for point in results.speculating if None not in _place(point)]
    sizes = [len({point.settings[axis] for point in points}) for axis in (GAMMA1, GAMMA2)]
    if min(sizes) < 2:
        raise LeftOutError("it needs runs with several values of decoding.gamma1 and of decoding.gamma2")
    maps, given_up = series_of(points, results.axes, (GAMMA1, GAMMA2), MAX_MAPS)
    rows, columns = (sorted({_place(p)[i] for p in points}, key=sort_key) for i in (0, 1))
    width = 1.3 + 0.55 * len(columns)
    across = len(maps) if len(maps) > 1 else 2
    size = (across * (width + 0.7), (1.1 + 0.42 * len(rows)) * (2 if len(maps) > 1 else 1))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(2, len(maps), squeeze=False) if len(maps) > 1 else figure.subplots(1, 2, squeeze=False).T
    for measure, line in zip(MEASURES, grid, strict=True):
        _draw_maps(line, maps, measure, rows, columns)
    for ax in grid[1] if len(maps) > 1 else ():
        ax.set_title("")  # it stands above
    caption = "Median time between tokens (TBT) and acceptance of the retrieval draft; framed: the fastest setting."
    return Drawing(figure=figure, caption=caption + of_fastest(given_up))


def _place(point: Point) -> tuple[int | None, int | None]:
    """γ1 and γ2 of a point."""
    return point.settings.get(GAMMA1), point.settings.get(GAMMA2)


def _draw_maps(
    axes: Sequence[Axes],
    maps: Sequence[Series],
    measure: MapMeasure,
    rows: Sequence[int | None],
    columns: Sequence[int | None],
) -> None:
    """One measure over all maps, on one scale; `rows` and `columns` are all values of γ1 and of γ2."""
    metric, everything = measure.metric, [point for one in maps for point in one.points]
    values = [value for point in everything if (value := point.median(metric)) is not None]
    if not values:
        raise LeftOutError(f"no run has {metric}")
    scale = Normalize(min(values), max(values) if max(values) > min(values) else min(values) + 1)
    palette = matplotlib.colormaps[measure.colours]
    for ax, one in zip(axes, maps, strict=True):
        cells = {_place(point): point.median(metric) for point in one.points}
        best = _place(min(one.points, key=lambda point: point.tbt_ms))
        numbers = [[cells.get((row, column)) for column in columns] for row in rows]
        shown = [[float("nan") if value is None else value for value in line] for line in numbers]
        image = ax.imshow(shown, cmap=palette, norm=scale, origin="lower", aspect="auto")
        ax.set_facecolor(LIGHT_GREY)
        for y, line in enumerate(numbers):
            for x, value in enumerate(line):
                text = "–" if value is None else measure.form.format(value)
                ax.text(x, y, text, ha="center", va="center", size=8, color=_ink(palette, scale, value))
        corner = (columns.index(best[1]) - 0.5, rows.index(best[0]) - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=2, clip_on=False))
        ax.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set(xlabel="γ2 (tokens per verification)", title=one.label or measure.name)
    axes[0].set(ylabel="γ1 (tokens per inner step)")
    bar = axes[0].figure.colorbar(image, ax=list(axes), label=measure.name if maps[0].label else None)
    bar.outline.set_visible(False)


def _ink(palette: Colormap, scale: Normalize, value: float | None) -> str:
    """The colour of a number in a cell: white on dark ones."""
    if value is None:
        return "black"
    red, green, blue, _ = palette(scale(value))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
