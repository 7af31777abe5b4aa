"""orchestrator/display.py: consoles that record; a clock that is an argument."""

import io
import re

import pytest
from rich.console import Console

from orchestrator.display import STYLES, Display, harmless, summary_table
from orchestrator.metrics import Metrics
from orchestrator.round import Round
from orchestrator.text_stream import TextStream
from workers.messages import DRAFTER, RETRIEVAL, TARGET

RESULT = {
    "prompt_tokens": 8192,
    "token_ids": list(range(256)),
    "finish_reason": "length",
    "timing": {"ttft_s": 3.21, "tokens_per_s": 45.67, "tbt_ms": {"mean": 21.9, "p50": 20.0, "p95": 30.0}},
    "speculation": {
        "tokens_per_verification": 6.5,
        "levels": [
            {"name": DRAFTER, "proposed": 200, "accepted": 120, "acceptance_rate": 0.6},
            {"name": RETRIEVAL, "proposed": 300, "accepted": 276, "acceptance_rate": 0.92},
        ],
    },
    "memory": {
        "device": {"planned_bytes": 3 << 20, "peak_bytes": 5 << 30},
        "host": {"planned_bytes": 0, "peak_bytes": 1},
    },
    "streaming": {
        "bytes": 2_500_000_000,
        "seconds": 1.0,
        "gb_per_s": 2.5,
        "stall_s": 0.25,
        "overlap": 0.5,
        "emulated_link_gb_per_s": None,
    },
}


def plain_console(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=False)


def terminal_console(width: int = 80, record: bool = False) -> Console:
    return Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor", record=record, _environ={}
    )


def shown(display: Display, texts: list[str], **round_fields) -> None:
    """One round whose tokens have these texts."""
    round_ = Round(index=1, tokens=list(range(len(texts))), seconds={}, **round_fields)
    metrics = Metrics(uses_drafter=True, uses_retrieval=True)
    metrics.add(round_, 1.0)
    metrics.add(round_, 1.0)
    display.add_round(round_, list(enumerate(texts)), metrics)


ALL_ORIGINS = {"proposed": [0, 1, 8, 8], "origins": [DRAFTER, RETRIEVAL, DRAFTER, DRAFTER], "num_accepted": 2}


def test_plain_output_is_the_text_line_by_line_without_escape_codes():
    console = plain_console()
    with Display(console) as display:
        shown(display, ["one", " two\nth", "ree"], **ALL_ORIGINS)
        assert console.file.getvalue() == "one two\n"
    assert console.file.getvalue() == "one two\nthree\n"


def test_plain_lines_are_not_wrapped():
    console = plain_console(width=20)
    with Display(console) as display:
        shown(display, ["x" * 50 + "\n"], proposed=[], origins=[], num_accepted=0)
    assert console.file.getvalue() == "x" * 50 + "\n"


def test_colour_tells_who_proposed_a_token():
    console = terminal_console(record=True)
    with Display(console) as display:
        shown(display, ["dd", "rr", "tt\n"], **ALL_ORIGINS)
    html = console.export_html(inline_styles=True)
    assert re.search(rf'color: {STYLES[DRAFTER]}[^>]*">dd<', html)
    assert re.search(rf'color: {STYLES[RETRIEVAL]}[^>]*">rr<', html)
    assert re.search(r'font-weight: bold[^>]*">tt<', html)


def test_the_live_part_has_legend_and_figures():
    console = terminal_console(width=200)
    with Display(console) as display:
        shown(display, ["dd", "rr", "tt"], **ALL_ORIGINS)
        live = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "the target's own" in live and "proposed by the drafter" in live
    assert "3.0 tokens/s" in live and "2 rejected" in live and "3.00 tokens/verification" in live
    assert "retrieval 50% accepted" in live


def test_a_line_wider_than_the_terminal_scrolls_up_and_keeps_all_its_words():
    console = terminal_console(width=40, record=True)
    words = [f"word{index} " for index in range(40)]
    with Display(console) as display:
        shown(display, words, proposed=list(range(39)), origins=[RETRIEVAL] * 39, num_accepted=39)
    text = console.export_text()
    assert [word for word in text.split() if re.fullmatch(r"word\d+", word)][-1] == "word39"
    assert all(f"word{index}" in text for index in range(40))


def test_a_terminal_is_restored_when_the_run_fails():
    console = terminal_console()
    with pytest.raises(RuntimeError), Display(console) as display:
        display.reading(100, 0.0)
        assert "\x1b[?25l" in console.file.getvalue()
        raise RuntimeError
    assert console.file.getvalue().rindex("\x1b[?25h") > console.file.getvalue().rindex("\x1b[?25l")


def test_refreshes_are_limited_by_the_clock():
    now = [0.0]
    console = terminal_console()
    with Display(console, clock=lambda: now[0]) as display:
        display.reading(100, 0.0)
        before = len(console.file.getvalue())
        for _ in range(50):
            display.reading(100, 0.5)
        assert len(console.file.getvalue()) == before
        now[0] = 1.0
        display.reading(100, 0.5)
        assert len(console.file.getvalue()) > before
        assert "50%, 50 tokens/s, 1 s left" in console.file.getvalue()


def test_reading_is_said_once_where_there_is_no_terminal():
    console = plain_console()
    with Display(console) as display:
        display.reading(8192, 0.0)
        display.reading(8192, 0.5)
    assert console.file.getvalue() == "reading 8,192 tokens…\n"


@pytest.mark.parametrize("text", ["[bold]x[/bold]", "[/]", "[red", ":smile:", "a [link=http://x]b[/link]"])
def test_markup_in_the_text_is_text(text):
    console = plain_console()
    with Display(console) as display:
        shown(display, [text], proposed=[], origins=[], num_accepted=0)
        display.note(text)
    assert console.file.getvalue() == f"{text}\n" * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\0\x7f\x9b1m", "a\\x00\\x7f\\x9b1m"),
        ("x\r\ny\rz", "x\ny\\rz"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\udc80", "\\udc80"),
        ("tab\tnew\nline é🦉", "tab\tnew\nline é🦉"),
    ],
)
def test_control_characters_are_shown_not_obeyed(text, expected):
    assert harmless(text) == expected


@pytest.mark.parametrize("console", [plain_console(), terminal_console()], ids=["plain", "terminal"])
def test_escape_sequences_of_the_model_never_reach_the_terminal(console):
    with Display(console) as display:
        shown(display, ["\x1b]0;title\x07", "\x1b[31m", "\n"], **ALL_ORIGINS)
    assert "\x1b]0;" not in console.file.getvalue() and "\x1b[31m" not in console.file.getvalue()


def test_the_table_has_every_figure():
    console = plain_console(width=100)
    console.print(summary_table(RESULT))
    text = console.file.getvalue()
    for figure in (
        "45.7",
        "21.9 ms mean, 20.0 p50, 30.0 p95",
        "3.21 s for 8,192 prompt tokens",
        "6.50",
        "60.0% (120 of 200)",
        "92.0% (276 of 300)",
        "3.0 MiB planned, 5.0 GiB peak",
        "2.50 GB at 2.50 GB/s, 0.25 s stalled, 50% behind computation",
    ):
        assert figure in text, (figure, text)


def test_the_table_of_a_run_that_measured_nothing():
    nothing = {
        "timing": {"ttft_s": None, "tokens_per_s": None, "tbt_ms": {"mean": None, "p50": None, "p95": None}},
        "speculation": {"tokens_per_verification": None, "levels": []},
        "memory": {},
        "streaming": {},
    }
    console = plain_console()
    with Display(console) as display:
        display.finish(RESULT | nothing | {"token_ids": [], "finish_reason": "interrupted"}, "o/result.json")
    text = console.file.getvalue()
    assert "interrupted after 0 tokens; o/result.json" in text and "streamed" not in text


# ---- The text of each token, of which the display is the user. ----


def stream_of(*, stop: tuple[str, ...] = ()) -> TextStream:
    """Token ids are bytes."""
    return TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"), stop)


def test_pieces_are_by_token_and_come_once():
    stream = stream_of()
    for token in b"ab":
        stream.push(token)
    assert stream.take_pieces() == [(0, "a"), (1, "b")]
    assert stream.take_pieces() == []
    stream.push(ord("c"))
    assert stream.take_pieces() == [(2, "c")]


def test_a_character_belongs_to_the_token_that_completes_it():
    stream = stream_of()
    for token in "é!".encode():
        stream.push(token)
    assert stream.take_pieces() == [(1, "é"), (2, "!")]


def test_an_unfinished_character_comes_at_the_close():
    stream = stream_of()
    for token in (ord("a"), 0xC3):
        stream.push(token)
    assert stream.take_pieces() == [(0, "a")]
    stream.close()
    assert stream.take_pieces() == [(1, "\ufffd")]


def test_what_may_be_a_stop_string_is_held_back_and_a_stop_string_never_comes():
    stream = stream_of(stop=("END",))
    for token in b"aEN":
        stream.push(token)
    assert stream.take_pieces() == [(0, "a")]
    stream.push(ord("x"))
    assert stream.take_pieces() == [(1, "E"), (2, "N"), (3, "x")]
    for token in b"END":
        stream.push(token)
    stream.close()
    assert stream.take_pieces() == [] and stream.text == "aENx"


def test_pieces_make_up_the_text():
    for text in ("héllo 🦉 wörld", "aSTbSTOc", "STOSTOP rest"):
        stream, taken = stream_of(stop=("STOP",)), []
        for token in text.encode():
            if not stream.is_stopped:
                stream.push(token)
                taken += stream.take_pieces()
        stream.close()
        taken += stream.take_pieces()
        assert "".join(piece for _, piece in taken) == stream.text == text.partition("STOP")[0]
        assert [index for index, _ in taken] == sorted(index for index, _ in taken)


def test_target_tokens_are_bold_so_that_no_colour_is_needed():
    assert "bold" in STYLES[TARGET]
