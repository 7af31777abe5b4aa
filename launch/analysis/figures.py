"""Figures of what launch/analyze.py measured, as PNG and SVG; needs matplotlib (pip install -e '.[report]')."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from launch.analysis.config import AnalyzeConfig
from launch.analysis.summary import LABELS, LABELS_ONCE, Rows, Tables, bins, depths_of, mean_by_bin, mean_of

# Okabe and Ito's colours, told apart by colour-blind readers, and markers for those who print in grey.
STYLES: dict[str, dict[str, Any]] = {
    "top_k": {"color": "#000000", "marker": "o", "linestyle": "--"},
    "attention": {"color": "#0072B2", "marker": "s"},
    "mean_key": {"color": "#56B4E9", "marker": "D"},
    "heavy_hitter": {"color": "#E69F00", "marker": "^"},
    "recent_window": {"color": "#D55E00", "marker": "v"},
}
PANEL_INCHES = (5.2, 3.6)
MAX_COLUMNS = 3


def draw_all(folder: Path, config: AnalyzeConfig, tables: Tables) -> list[Path]:
    """Draws all figures as PNG and SVG; returns the PNG files."""
    made = [
        _save(folder, "sparsity", _by_budget(config, tables["attention"], "recovery", "attention in sight")),
        _save(folder, "layers", _by_layer(config, tables["attention"])),
        _save(folder, "locality", _by_distance(config, tables["locality"])),
        _save(folder, "acceptance", _by_budget(config, tables["acceptance"], "acceptance", "acceptance")),
    ]
    if tables["needle"]:
        made.append(_save(folder, "needle", _by_depth(config, tables["needle"])))
    return made


def _save(folder: Path, name: str, figure: Figure) -> Path:
    """Writes a figure as SVG and PNG; returns the PNG file."""
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=150)
    plt.close(figure)
    return folder / f"{name}.png"


def _panels(rows: int, columns: int, **options: Any) -> tuple[Figure, np.ndarray[Any, np.dtype[Any]]]:
    """A figure with axes [rows, columns], and room for a legend below."""
    size = PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.7
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    return figure, axes


def _legend(figure: Figure, axis: Axes) -> None:
    """Puts the legend of one panel below all of them."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _by_budget(config: AnalyzeConfig, rows: Rows, value: str, what: str) -> Figure:
    """Lines over the budgets, in a panel for each document."""
    documents = list(dict.fromkeys(row["document"] for row in rows))
    columns = min(MAX_COLUMNS, len(documents))
    figure, axes = _panels(-(-len(documents) // columns), columns, sharey=True)
    for axis in axes.flat[len(documents) :]:
        axis.set_visible(False)
    budgets = sorted(config.budgets)
    for axis, document in zip(axes.flat, documents, strict=False):
        of_document = [row for row in rows if row["document"] == document]
        for cache, label in LABELS.items():
            shares = [mean_of(of_document, value, cache=cache, budget=budget) for budget in budgets]
            axis.plot(budgets, shares, label=label, **STYLES[cache])
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda budget, _: f"{budget:,.0f}"))
        axis.set_title(f"{document}, {config.context:,} tokens", fontsize=10)
        axis.set_xlabel("budget, tokens")
    for axis in axes[:, 0]:
        axis.set_ylabel(f"{what}, mean of {config.new_tokens} tokens")
    _legend(figure, axes[0, 0])
    return figure


def _by_layer(config: AnalyzeConfig, rows: Rows) -> Figure:
    """Means over documents by layer, with bars from the least to the most of the kv heads."""
    figure, ((axis,),) = _panels(1, 1)
    figure.set_size_inches(8.0, 4.6)
    shown = [row for row in rows if row["budget"] == config.shown_budget]
    layers, heads = sorted({row["layer"] for row in shown}), sorted({row["kv_head"] for row in shown})
    for place, (cache, label) in enumerate(LABELS.items()):
        means, least, most = [], [], []
        for layer in layers:
            of_heads = (mean_of(shown, "recovery", cache=cache, layer=layer, kv_head=head) for head in heads)
            by_head = [mean for mean in of_heads if mean is not None]
            means.append(fmean(by_head))
            least.append(means[-1] - min(by_head))
            most.append(max(by_head) - means[-1])
        at = [layer + 0.09 * (place - 2) for layer in layers]
        axis.errorbar(at, means, yerr=[least, most], label=label, capsize=2, elinewidth=1, **STYLES[cache])
    axis.set_xticks(layers if len(layers) <= 16 else layers[::4])
    axis.set_xlabel("layer")
    axis.set_ylabel("attention in sight")
    axis.set_title(f"{config.shown_budget:,} of {config.context:,} tokens; bars span the kv heads", fontsize=10)
    _legend(figure, axis)
    return figure


def _by_distance(config: AnalyzeConfig, rows: Rows) -> Figure:
    """Lines over the distance from a choice: of the attention to the prompt alone, and of all attention."""
    figure, (axes,) = _panels(1, 2)
    at = [(first + last) / 2 for first, last in bins(config)]
    for axis, value, title in (
        (axes[0], "recovery_of_context", "of the attention to the prompt"),
        (axes[1], "recovery", "of all attention, later tokens being in sight"),
    ):
        for cache, label in LABELS_ONCE.items():
            axis.plot(at, mean_by_bin(config, rows, cache, value), label=label, markersize=4, **STYLES[cache])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("distance from the choice, tokens")
    axes[0].set_ylabel(f"in sight of {config.shown_budget:,} tokens chosen once")
    _legend(figure, axes[0])
    return figure


def _by_depth(config: AnalyzeConfig, rows: Rows) -> Figure:
    """Lines over the depth of the fact, in a row of panels for each form of facts."""
    forms = list(dict.fromkeys(row["form"] for row in rows))
    figure, axes = _panels(len(forms), 2, sharey=True)
    for panels, form in zip(axes, forms, strict=True):
        shown = [row for row in rows if row["form"] == form and row["budget"] == config.shown_budget]
        depths = depths_of(shown)
        for axis, value, title in (
            (panels[0], "acceptance", f"{form}: acceptance of the answer"),
            (panels[1], "recovery_of_fact", f"{form}: attention to the fact that is in sight"),
        ):
            for cache, label in LABELS.items():
                shares = [mean_of(shown, value, cache=cache, asked_depth=depth) for depth in depths]
                if None not in shares:
                    axis.plot(depths, shares, label=label, **STYLES[cache])
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("depth of the fact, share of the text before it")
            axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axis.set_ylim(-0.03, 1.03)
        right = [mean_of(shown, "target_probability", asked_depth=depth) for depth in depths]
        panels[0].plot(depths, right, color="#999999", linestyle=":", label="the target's probability of the answer")
        panels[0].set_ylabel(f"share, caches of {config.shown_budget:,} tokens")
    _legend(figure, axes[0, 0])
    return figure
