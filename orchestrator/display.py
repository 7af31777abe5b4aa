"""The terminal's view of a run: the text as it is accepted, coloured by the level that proposed it; then a table.

On a terminal finished lines scroll up and a live part below holds the line being written, the legend and running
figures. Anywhere else the same text comes as plain lines, without escape codes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.metrics import Metrics
from orchestrator.round import Round
from workers.messages import DRAFTER, RETRIEVAL, TARGET

# Okabe and Ito's sky blue and orange, told apart with any colour vision; the target's own tokens are bold besides.
STYLES = {DRAFTER: "#56b4e9", RETRIEVAL: "#e69f00", TARGET: "bold"}
LEGEND = {
    DRAFTER: "proposed by the drafter, accepted",
    RETRIEVAL: "proposed by the retrieval draft, accepted",
    TARGET: "the target's own",
}
SECONDS_BETWEEN_REFRESHES = 0.08
# C0 and C1 controls but for newline and tab, and what reverses the direction of text.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """Model text that cannot act on the terminal: control characters become \\x1b and the like."""
    return CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


class Display:
    """Shows a run on the terminal as it goes on; leaving its `with` restores the terminal."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self._console, self._clock = console, clock
        self._owners: list[str] = []
        self._line = Text()
        self._status = Text()
        self._num_rejected = 0
        self._refreshed_at = float("-inf")
        self._reading_since = 0.0
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_line()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, line: str) -> None:
        """A line about the run, such as what an `auto` was resolved to."""
        self._print(Text(harmless(line), style="dim"))

    def locking(self, done_bytes: int, total_bytes: int) -> None:
        """Progress of page-locking host memory."""
        self._status = Text(f"locking host memory… {_bytes(done_bytes)} of {_bytes(total_bytes)}")
        self._refresh()

    def reading(self, num_tokens: int, share: float) -> None:
        """Progress of the prefill: `share` of the work is done."""
        if not share:
            self._reading_since = self._clock()
        if self._live is None:
            if not share:
                self._print(Text(f"reading {num_tokens:,} tokens…"))
            return
        figures, seconds = "", self._clock() - self._reading_since
        if share and seconds:
            rate, left = share * num_tokens / seconds, seconds / share - seconds
            figures = f" {share:.0%}, {rate:,.0f} tokens/s, {left:.0f} s left"
        self._status = Text(f"reading {num_tokens:,} tokens…{figures}")
        self._refresh(force=not share)

    def add_round(self, round_: Round, pieces: list[tuple[int, str]], metrics: Metrics) -> None:
        """Shows what a round made certain: `pieces` are (index of the generated token, its text)."""
        owners = [*round_.origins[: round_.num_accepted], TARGET]
        self._owners += owners[: len(round_.tokens)]
        self._num_rejected += len(round_.proposed) - round_.num_accepted
        self.add_text(pieces)
        self._status = self._running_figures(metrics)
        self._refresh()

    def add_text(self, pieces: list[tuple[int, str]]) -> None:
        for token, text in pieces:
            # Of a round that was broken off nobody told who proposed its tokens.
            owner = self._owners[token] if token < len(self._owners) else TARGET
            self._line.append(harmless(text), style=STYLES[owner])
        self._print_finished_lines()

    def finish(self, result: dict[str, Any], path: str) -> None:
        """The table of a finished run and where its files are."""
        self._end_line()
        self._status = Text()
        self._refresh(force=True)
        self._console.print()
        self._console.print(summary_table(result))
        self._print(Text(f"{result['finish_reason']} after {len(result['token_ids']):,} tokens; {harmless(path)}"))

    def _print_finished_lines(self) -> None:
        """Keeps the line being written; lines wider than the terminal are broken where they would be anyway."""
        lines = list(self._line.split("\n", allow_blank=True))
        if self._live is not None and len(lines[-1]):
            lines[-1:] = lines[-1].wrap(self._console, self._console.width)
        self._line = lines.pop() if lines else Text()
        for line in lines:
            self._print(line)

    def _end_line(self) -> None:
        if self._line:
            self._print(self._line)
        self._line = Text()

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True, highlight=False)

    def _refresh(self, force: bool = False) -> None:
        """Drawing costs time that decoding could use: a few times a second is enough."""
        now = self._clock()
        if self._live is None or (not force and now - self._refreshed_at < SECONDS_BETWEEN_REFRESHES):
            return
        self._refreshed_at = now
        parts = [part for part in (self._line, self._status) if part]
        self._live.update(Group(*parts), refresh=True)

    def _running_figures(self, metrics: Metrics) -> Text:
        figures = [f"{metrics.num_tokens:,} tokens"]
        for measured, form in (
            (metrics.tokens_per_s, "{:.1f} tokens/s"),
            (metrics.tbt_mean_s and 1000 * metrics.tbt_mean_s, "TBT {:.1f} ms"),
            (metrics.tokens_per_verification, "{:.2f} tokens/verification"),
        ):
            if measured is not None:
                figures.append(form.format(measured))
        for level in metrics.levels:
            if level.acceptance_rate is not None:
                figures.append(f"{level.name} {level.acceptance_rate:.0%} accepted")
        if self._num_rejected:
            figures.append(f"{self._num_rejected:,} rejected")
        legend = [(f"■ {LEGEND[name]}  ", STYLES[name]) for name in (*(level.name for level in metrics.levels), TARGET)]
        return Text.assemble(*legend, "\n", " · ".join(figures), overflow="ellipsis", no_wrap=False)


def summary_table(result: dict[str, Any]) -> Table:
    """The figures of result.json that matter at a glance."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _summary_rows(result):
        table.add_row(name, value)
    return table


def _summary_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    timing, speculation, streaming = result["timing"], result["speculation"], result["streaming"]
    tbt = timing["tbt_ms"]
    rows = [("tokens/s", _number(timing["tokens_per_s"], ".1f"))]
    if tbt["mean"] is not None:
        rows.append(("TBT", f"{tbt['mean']:.1f} ms mean, {tbt['p50']:.1f} p50, {tbt['p95']:.1f} p95"))
    rows.append(("TTFT", f"{_number(timing['ttft_s'], '.2f')} s for {result['prompt_tokens']:,} prompt tokens"))
    rows.append(("tokens per verification", _number(speculation["tokens_per_verification"], ".2f")))
    for level in speculation["levels"]:
        counts = f"{level['accepted']:,} of {level['proposed']:,}"
        rows.append((f"acceptance rate, {level['name']}", f"{_number(level['acceptance_rate'], '.1%')} ({counts})"))
    if ahead := speculation.get("ahead"):
        hits = f"{ahead['hits']:,} of {ahead['verifications']:,}"
        rows.append(("drafted ahead", f"{_number(ahead['hit_rate'], '.1%')} of outcomes ({hits})"))
    for tier, memory in result["memory"].items():
        planned, peak = _bytes(memory["planned_bytes"]), _bytes(memory["peak_bytes"])
        rows.append((f"{tier} memory", f"{planned} planned, {peak} peak"))
    if streaming.get("bytes"):
        rate, stall = _number(streaming["gb_per_s"], ".2f"), _number(streaming["stall_s"], ".2f")
        link = streaming["emulated_link_gb_per_s"]
        emulated = "" if link is None else f" (emulated link of {link:g} GB/s)"
        behind = _number(streaming["overlap"], ".0%")
        figures = f"{streaming['bytes'] / 1e9:.2f} GB at {rate} GB/s, {stall} s stalled, {behind} behind computation"
        rows.append(("streamed", figures + emulated))
    return rows


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
