"""The figures of a report. Each function draws what the results have settings for, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from launch.sweeps.drawing import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    SKY,
    STYLE,
    Drawing,
    LeftOutError,
    of_fastest,
)
from launch.sweeps.gamma_maps import gamma_maps
from launch.sweeps.medians import GAMMA1, GAMMA2, Point, Results, Series, differing, fastest, label_of, series_of
from orchestrator.round import Phase

MODE_AXIS = "decoding.mode"
"""The setting that names a baseline."""
MAX_LINES, MAX_BARS = 6, 12
X_LABELS = {
    "cache.retrieval.budget": "retrieval budget (tokens per layer and kv head)",
    "prompt.max_tokens": "context (prompt tokens)",
    "sampling.temperature": "temperature",
    "tiers.link.gb_per_s": "link to the device (GB/s, emulated)",
    GAMMA1: "γ1 (tokens drafted per inner step)",
    GAMMA2: "γ2 (tokens proposed per verification)",
}
DOUBLING = ("cache.retrieval.budget", "prompt.max_tokens", "tiers.link.gb_per_s", GAMMA1, GAMMA2)
LEVEL_TITLES = {"retrieval": "retrieval draft, judged by the target", "drafter": "drafter, judged by the level above"}
LEVEL_NAMES = {"retrieval": "retrieval draft", "drafter": "drafter"}
LEVEL_LINES: tuple[tuple[str, Literal["-", ":"]], ...] = (("retrieval", "-"), ("drafter", ":"))
PARTS = (
    (Phase.draft, "draft", SKY, ""),
    (Phase.retrieval, "retrieval draft", ORANGE, ""),
    (Phase.verify, "verify: compute", BLUE, ""),
    ("stall", "verify: waiting for the stream", "#9FC6DD", "////"),
    (Phase.refresh, "refresh of the retrieval cache", GREEN, ""),
    ("rest", "rest: messages, bookkeeping", "#BBBBBB", ""),
)
"""Parts of a round: name, legend, colour, hatch."""

# ---- Speed-up and acceptance along one setting. ----


def along(axis: str, results: Results) -> Drawing:
    """Speed-up (TBT where there is no baseline) and acceptance against one setting. Raises LeftOutError."""
    points = [point for point in results.speculating if _number(point.settings.get(axis)) is not None]
    if len({point.settings[axis] for point in points}) < 2:
        raise LeftOutError(f"it needs runs with several values of {axis}")
    if axis in (GAMMA1, GAMMA2) and {GAMMA1, GAMMA2} <= set(results.axes):
        raise LeftOutError("γ1 and γ2 both differ: the map shows them together")
    has_speedup = all(point.speedup is not None for point in points)
    lines, given_up = series_of(points, results.axes, (axis,), MAX_LINES)
    for line in lines:
        line.points.sort(key=lambda point: point.settings[axis])
    figure = Figure(figsize=(6.8, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, line in enumerate(lines):
        colour, marker = COLOURS[index], MARKERS[index]
        x = [_x(point, axis) for point in line.points]
        style: dict[str, Any] = {"color": colour, "marker": marker, "label": line.label or "speculating"}
        left.plot(x, [point.speedup if has_speedup else point.tbt_ms for point in line.points], **style)
        for point in line.points:
            _draw_runs(left, _x(point, axis), point, colour, has_speedup)
        for level, dashes in LEVEL_LINES:
            rates = [point.median(f"{level}_acceptance") for point in line.points]
            if any(rate is not None for rate in rates):
                right.plot(x, [float("nan") if r is None else r for r in rates], dashes, color=colour, marker=marker)
    if has_speedup:
        left.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
        left.annotate("autoregressive", (1, 1), xycoords=("axes fraction", "data"), xytext=(0, 2),
                      textcoords="offset points", ha="right", va="bottom", size=7, color=GREY)  # fmt: skip
    left.set(ylabel="speed-up over autoregressive" if has_speedup else "TBT (ms)")
    left.set_ylim(bottom=0)
    right.set(ylabel="acceptance rate", ylim=(0, 1.02))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    for ax in (left, right):
        _set_x(ax, axis, points)
    _draw_legends(figure, left, right, lines, results)
    caption = f"{'Speed-up of the median TBT' if has_speedup else 'Median TBT'} and acceptance rate"
    caption += f" against {X_LABELS[axis]}; small points are single runs."
    if not has_speedup:
        caption += " No speed-up: not every setting has a run of decoding.mode=autoregressive with the same others."
    return Drawing(figure=figure, caption=caption + of_fastest(given_up))


def _number(value: object) -> float | None:
    """A setting as a number; None where it is a text or nothing."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _x(point: Point, axis: str) -> float:
    """A point's place along a setting; of the context what the prompt has, not what it was cut to."""
    return (point.median("prompt_tokens") if axis == "prompt.max_tokens" else None) or float(point.settings[axis])


def _draw_runs(ax: Axes, x: float, point: Point, colour: str, has_speedup: bool) -> None:
    """Each run by itself, where there are several."""
    times = point.values("tbt_ms")
    if len(times) > 1:
        y = [point.speedup * point.tbt_ms / value for value in times] if has_speedup and point.speedup else times
        ax.plot([x] * len(y), y, ".", color=colour, markersize=3, alpha=0.6)


def _set_x(ax: Axes, axis: str, points: Sequence[Point]) -> None:
    """Ticks at the values that a setting has, on a logarithmic axis where they double."""
    ticks = sorted({_x(point, axis) for point in points})
    if axis in DOUBLING and ticks[0] > 0 and ticks[-1] / ticks[0] >= 4:
        ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(ticks, [f"{tick:,.0f}" if tick >= 10 else f"{tick:g}" for tick in ticks])
    ax.set(xlabel=X_LABELS[axis])
    ax.margins(x=0.06)


def _draw_legends(figure: Figure, left: Axes, right: Axes, lines: Sequence[Series], results: Results) -> None:
    """One for the lines, where there are several, and one for the levels."""
    if len(lines) > 1:
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=min(3, len(lines)))
    levels = [
        Line2D([], [], color=GREY, linestyle=dashes, label=LEVEL_NAMES[level])
        for level, dashes in LEVEL_LINES
        if any(point.median(f"{level}_acceptance") is not None for point in results.speculating)
    ]
    if len(levels) > 1:
        right.legend(handles=levels, loc="best")


# ---- Per position. ----


def per_position(results: Results) -> Drawing:
    """Acceptance at each position of a proposed block. Raises LeftOutError."""
    levels = [level for level in LEVEL_TITLES if any(p.per_position(level) for p in results.speculating)]
    if not levels:
        raise LeftOutError("no run proposed anything")
    shown = fastest(results.speculating, MAX_LINES)
    axes = differing(results.axes, shown)
    figure = Figure(figsize=(3.4 * len(levels), 2.9), layout="constrained")
    panels = figure.subplots(1, len(levels), squeeze=False)[0]
    for ax, level in zip(panels, levels, strict=True):
        for index, point in enumerate(shown):
            rates = point.per_position(level)
            style: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 4}
            ax.plot(range(1, len(rates) + 1), rates, **style, label=label_of(point, axes) or "median run")
        longest = max(len(point.per_position(level)) for point in shown)
        ax.set(title=LEVEL_TITLES[level], xlabel="position in the proposed block", ylabel="accepted", ylim=(0, 1.02))
        ax.set_xticks(range(1, longest + 1, -(-longest // 10)))
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    if len(shown) > 1:
        columns = 2 if len(levels) > 1 else 1
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)
    caption = "Of the blocks that reach a position, the share whose token there is accepted (and so all before it)."
    if len(results.speculating) > len(shown):
        caption += f" The fastest {len(shown)} of {len(results.speculating)} settings."
    return Drawing(figure=figure, caption=caption)


# ---- Where the time goes. ----


def breakdown(results: Results) -> Drawing:
    """The time of a round by phase, and its share of each token. Raises LeftOutError."""
    timed = [point for point in results.points if point.median("verifications")]
    if not timed:
        raise LeftOutError("no run has a round after the first token")
    shown = fastest(timed, MAX_BARS)
    axes = differing(results.axes, [point for point in shown if not point.is_baseline])
    figure = Figure(figsize=(7.2, 1.3 + 0.3 * len(shown)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    # The mode names a baseline, which has no part in most of what sets the others apart.
    names = [
        label_of(point, {MODE_AXIS: None, **dict.fromkeys(axes)} if point.is_baseline else axes) for point in shown
    ]
    for ax, unit in zip(panels, ("round", "token"), strict=True):
        starts = [0.0] * len(shown)
        for name, legend, colour, hatch in PARTS:
            widths = [round_parts(point)[name] / _num_per_round(point, unit) for point in shown]
            if any(widths) or name == "rest":
                style: dict[str, Any] = {
                    "color": colour,
                    "hatch": hatch,
                    "edgecolor": "white",
                    "linewidth": 0.5,
                    "label": legend,
                }
                ax.barh(range(len(shown)), widths, left=starts, height=0.7, **style)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        for y, end in enumerate(starts):
            ax.annotate(f"{end:.3g}", (end, y), xytext=(3, 0), textcoords="offset points", va="center", size=7)
        ax.set(xlabel=f"time per {unit} (ms)", yticks=range(len(shown)), yticklabels=names)
        ax.margins(x=0.1)
        ax.tick_params(axis="y", length=0)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    caption = "Mean time of a verification round by phase, and the same divided by the tokens that a round brings."
    if len(timed) > len(shown):
        caption += f" Baselines and the fastest: {len(shown)} of {len(timed)} settings."
    return Drawing(figure=figure, caption=caption)


def round_parts(point: Point) -> dict[str, float]:
    """Milliseconds of a mean round by part of PARTS; of several runs, of the one with the median time."""
    row = sorted(point.rows, key=lambda row: row["tbt_ms"])[(len(point.rows) - 1) // 2]
    rounds = row["verifications"]
    shown = (Phase.draft, Phase.retrieval, Phase.verify, Phase.refresh)
    ms: dict[str, float] = {name: 1000 * (row.get(f"{name}_s") or 0.0) / rounds for name in shown}
    ms[Phase.refresh] += 1000 * (row.get("reread_s") or 0.0) / rounds
    ms["rest"] = max(0.0, 1000 * row["decode_s"] / rounds - sum(ms.values()))
    # The stream is counted from the first token on, whose round is in no phase.
    ms["stall"] = min(ms[Phase.verify], 1000 * (row.get("stall_s") or 0.0) / (rounds + 1))
    ms[Phase.verify] -= ms["stall"]
    return ms


def _num_per_round(point: Point, unit: str) -> float:
    """Number of tokens, or, if the unit is `round`, one: as many of them a mean round brings."""
    if unit == "round":
        return 1.0
    num_tokens = point.median("tokens_per_verification")
    assert num_tokens is not None, "a run that has verifications has tokens per verification"
    return num_tokens


FIGURES: dict[str, Callable[[Results], Drawing]] = {
    "gamma_map": gamma_maps,
    "by_budget": partial(along, "cache.retrieval.budget"),
    "by_context": partial(along, "prompt.max_tokens"),
    "by_temperature": partial(along, "sampling.temperature"),
    "by_link": partial(along, "tiers.link.gb_per_s"),
    "by_gamma1": partial(along, GAMMA1),
    "by_gamma2": partial(along, GAMMA2),
    "per_position": per_position,
    "breakdown": breakdown,
}


def draw(name: str, results: Results) -> Drawing:
    """A figure of FIGURES. Raises LeftOutError."""
    with matplotlib.rc_context(STYLE):
        return FIGURES[name](results)
