"""launch/report.py: medians and speed-ups of a made-up table, and that each figure says what it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.schema import ConfigError
from launch import report
from launch.sweeps import figures as report_figures
from launch.sweeps.drawing import LeftOutError, save
from launch.sweeps.medians import fastest, load, results_of, series_of, where
from launch.sweeps.table import write_row, write_table
from tests.support import fake_run
from tests.support.made_up_sweep import made_up_row, made_up_rows

BOTH = ["autoregressive", "triforce"]
GAMMAS = {"mode": BOTH, "gamma1": [1, 2, 4], "gamma2": [4, 8]}
SWEEPS = {
    "gamma_map": GAMMAS,
    "by_budget": {"mode": BOTH, "budget": [512, 1024, 2048]},
    "by_context": {"mode": BOTH, "max_tokens": [4000, 8000, 16000]},
    "by_temperature": {"mode": BOTH, "temperature": [0.0, 0.6, 1.0]},
    "by_link": {"mode": BOTH, "gb_per_s": [0.5, 1.0, 2.0]},
    "by_gamma1": {"mode": BOTH, "gamma1": [1, 2, 4]},
    "by_gamma2": {"mode": BOTH, "gamma2": [4, 8, 16]},
    "per_position": {"mode": BOTH},
    "breakdown": {"mode": BOTH},
}


# ---- Medians. ----


def test_rows_of_one_setting_become_a_median_and_the_baseline_gives_the_speedup():
    rows = made_up_rows(3, **GAMMAS)
    results = results_of(rows)
    assert len(rows) == 21 and len(results.points) == 7
    assert results.axes == ["decoding.mode", "decoding.gamma1", "decoding.gamma2"]
    base = next(point for point in results.points if point.is_baseline)
    assert base.speedup == 1 and len(base.rows) == 3
    for point in results.speculating:
        times = sorted(row["tbt_ms"] for row in point.rows)
        assert len(times) == 3 and point.median("tbt_ms") == times[1]
        assert point.speedup == pytest.approx(base.median("tbt_ms") / times[1])


def test_a_baseline_of_another_workload_gives_no_speedup():
    """Context, tier, link and temperature are what a baseline shares."""
    for change in ({"max_tokens": 4000}, {"tier": "disk"}, {"gb_per_s": 2.0}, {"temperature": 0.0}):
        rows = [made_up_row(mode="autoregressive", **change), made_up_row(gamma2=4)]
        assert [point.speedup for point in results_of(rows).speculating] == [None], change
    rows = [made_up_row(mode="autoregressive"), made_up_row(gamma1=4, gamma2=4, budget=512, drafter="lookup")]
    assert [point.speedup for point in results_of(rows).speculating] != [None]


def test_seeds_are_repetitions_and_failed_jobs_are_told_apart():
    rows = [made_up_row(seed=seed) for seed in (1, 2, 3)] + [{"id": "x", "status": "failed", "message": "no room"}]
    results = results_of(rows)
    assert len(results.points) == 1 and len(results.points[0].rows) == 3 and results.axes == []
    assert [row["id"] for row in results.not_done] == ["x"]


def test_too_many_lines_leave_a_setting_to_the_fastest():
    results = results_of(made_up_rows(1, gamma1=[1, 2, 4], gamma2=[4, 8, 16, 32], budget=[512, 1024]))
    lines, given_up = series_of(results.points, results.axes, ["cache.retrieval.budget"], 6)
    assert given_up == ["decoding.gamma2"] and [line.label for line in lines] == ["γ1 = 1", "γ1 = 2", "γ1 = 4"]
    for line in lines:
        for point in line.points:
            same = ("decoding.gamma1", "cache.retrieval.budget")
            rivals = [p for p in results.points if all(p.settings[key] == point.settings[key] for key in same)]
            assert len(rivals) == 4 and point.median("tbt_ms") == min(p.median("tbt_ms") for p in rivals)


def test_each_workload_is_shown_with_its_baseline_and_its_fastest():
    results = results_of(made_up_rows(1, mode=BOTH, gamma2=[4, 8, 16], max_tokens=[4000, 32000]))
    shown = fastest(results.points, 4)
    assert [(p.is_baseline, p.settings["prompt.max_tokens"]) for p in shown] == [
        (True, 4000),
        (False, 4000),
        (True, 32000),
        (False, 32000),
    ]
    assert shown[3].median("tbt_ms") == min(
        p.median("tbt_ms") for p in results.speculating if p.settings["prompt.max_tokens"] == 32000
    )


# ---- Figures. ----


@pytest.mark.parametrize("name", SWEEPS)
def test_axes_have_labels_and_units_and_the_bytes_are_the_same_twice(name, tmp_path):
    results = results_of(made_up_rows(**SWEEPS[name]))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        drawing = report_figures.draw(name, results)
        for suffix in ("png", "svg"):
            save(drawing.figure, tmp_path / folder / f"{name}.{suffix}")
    for suffix in ("png", "svg"):
        first, second = ((tmp_path / folder / f"{name}.{suffix}").read_bytes() for folder in "ab")
        assert first == second and len(first) > 2000
    panels = [ax for ax in drawing.figure.axes if ax.get_label() != "<colorbar>"]
    assert len(panels) == 2 and drawing.caption.endswith(".")
    labels = [f"{ax.get_xlabel()}|{ax.get_ylabel()}|{ax.get_title()}" for ax in panels]
    assert all(ax.get_xlabel() for ax in panels), labels
    units = {"by_": "tokens|temperature|GB/s", "gamma_map": "ms", "per_position": "position", "breakdown": "(ms)"}
    wanted = next(words for prefix, words in units.items() if name.startswith(prefix))
    assert any(word in label for label in labels for word in wanted.split("|")), labels
    if name.startswith("by_"):
        assert [ax.get_ylabel() for ax in panels] == ["speed-up over autoregressive", "acceptance rate"]


@pytest.mark.parametrize("name", SWEEPS)
def test_what_the_table_has_no_axis_for_is_left_out_with_a_reason(name):
    alone = results_of([made_up_row()])
    if name in ("per_position", "breakdown"):
        assert report_figures.draw(name, alone)
    else:
        with pytest.raises(LeftOutError, match="several values of"):
            report_figures.draw(name, alone)


def test_without_a_baseline_the_time_itself_is_shown():
    drawing = report_figures.draw("by_budget", results_of(made_up_rows(budget=[512, 1024])))
    left, right = drawing.figure.axes
    assert (left.get_ylabel(), right.get_ylabel()) == (
        "TBT (ms)",
        "acceptance rate",
    ) and "No speed-up" in drawing.caption
    medians = [line.get_ydata() for line in left.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"]
    assert len(medians) == 1


def test_the_map_shows_each_cell_and_frames_the_fastest():
    results = results_of(
        [row for row in made_up_rows(**GAMMAS) if (row["decoding.gamma1"], row["decoding.gamma2"]) != (4, 4)]
    )
    times = report_figures.draw("gamma_map", results).figure.axes[0]
    shown = {tuple(text.get_position()): text.get_text() for text in times.texts}
    best = min(results.speculating, key=lambda point: point.median("tbt_ms"))
    gammas = best.settings["decoding.gamma1"], best.settings["decoding.gamma2"]
    x, y = [4, 8].index(gammas[1]), [1, 2, 4].index(gammas[0])
    assert len(shown) == 6 and shown[0, 2] == "–" and shown[x, y] == f"{best.median('tbt_ms'):.1f}"
    assert times.patches[0].get_xy() == (x - 0.5, y - 0.5)


def test_several_budgets_stand_side_by_side_on_one_scale():
    figure = report_figures.draw("gamma_map", results_of(made_up_rows(1, **GAMMAS, budget=[512, 1024]))).figure
    maps = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in maps] == ["budget = 512", "budget = 1024", "", ""]
    assert maps[0].images[0].norm.vmin == maps[1].images[0].norm.vmin


def test_the_parts_of_a_round_add_up_to_its_time():
    for point in results_of(made_up_rows(1, **GAMMAS)).points:
        parts, (row,) = report_figures.round_parts(point), point.rows
        assert set(parts) == {name for name, *_ in report_figures.PARTS} and min(parts.values()) >= 0
        assert sum(parts.values()) == pytest.approx(1000 * row["decode_s"] / row["verifications"])
        assert parts["stall"] + parts["verify"] == pytest.approx(1000 * row["verify_s"] / row["verifications"])
        assert (parts["stall"] > 0) and (parts["draft"] > 0) == (not point.is_baseline)


# ---- The program. ----


@pytest.fixture
def sweep_folder(tmp_path) -> Path:
    folder = tmp_path / "s"
    for index, row in enumerate([*made_up_rows(**GAMMAS), {"status": "failed", "message": "no room", "tbt_ms": None}]):
        (folder / f"jobs/{index}").mkdir(parents=True)
        write_row(folder / f"jobs/{index}", row | {"id": str(index)})
    return folder


def test_a_report_has_pictures_medians_and_what_is_missing(sweep_folder, capsys):
    assert report.main([str(sweep_folder)]) == 0
    files = {path.name for path in (sweep_folder / "report").iterdir()}
    drawn = {"gamma_map", "per_position", "breakdown"}
    assert files == {f"{name}.{suffix}" for name in drawn for suffix in ("png", "svg")} | {"report.md"}
    page = (sweep_folder / "report/report.md").read_text(encoding="utf-8")
    for part in (
        "(gamma_map.png)",
        "| mode | γ1 | γ2 | TBT ms",
        "| autoregressive | - | - |",
        "no room",
        "14 runs of 7",
    ):
        assert part in page
    assert "- by_budget: it needs runs with several values of cache.retrieval.budget" in page
    assert "left out by_context" in capsys.readouterr().out


def test_folder_csv_and_parquet_give_the_same_report(sweep_folder):
    rows = load(sweep_folder)
    pages = []
    for path in [sweep_folder, *write_table(sweep_folder, rows)]:
        output = sweep_folder / f"report-{path.name}"
        assert report.main([str(path), "--output", str(output), "--formats", "svg"]) == 0
        pages.append((output / "report.md").read_text(encoding="utf-8"))
    assert pages[0] == pages[1] == pages[2]


def test_a_folder_of_runs_is_a_table_too(tmp_path):
    for gamma2 in (4, 8):
        folder = tmp_path / f"2026/{gamma2}"
        folder.mkdir(parents=True)
        config = {"decoding": {"mode": "triforce", "gamma1": 2, "gamma2": gamma2}}
        (folder / "result.json").write_text(json.dumps(fake_run.result(config, None)))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/result.json").write_text("{")
    rows = load(tmp_path)
    assert [row["tbt_ms"] for row in rows] == [14, 10]
    assert report.main([str(tmp_path), "--formats", "png"]) == 0
    assert (tmp_path / "report/by_gamma2.png").exists()


def test_where_takes_a_part_and_keeps_baselines():
    rows = made_up_rows(1, **GAMMAS)
    assert {row["decoding.gamma1"] for row in where(rows, [("decoding.gamma1", "2")])} == {None, 2}
    for condition, words in ((("gamma", "2"), "no column gamma"), (("decoding.mode", "fast"), "no row")):
        with pytest.raises(ConfigError, match=words):
            where(rows, [condition])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], "neither a folder nor a table"),
        (["."], "has no runs"),
        (["notes.txt"], "no column"),
        (["t.csv"], "no run that is done"),
        (["t.csv", "--where", "gamma1"], "must be key=value"),
    ],
)
def test_what_cannot_be_drawn_is_one_message(tmp_path, monkeypatch, capfd, argv, words):
    monkeypatch.chdir(tmp_path)
    if argv != ["."]:
        Path("notes.txt").write_text("a note\nanother\n")
        Path("t.csv").write_text("id,status,tbt_ms,decoding.mode\nx,failed,,\n")
    assert report.main(argv) == 2
    err = capfd.readouterr().err
    assert err.startswith("tierforce: ") and err.count("\n") == 1 and words in err


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch, capfd):
    monkeypatch.setattr(report.util, "find_spec", lambda name: None)
    assert report.main(["x"]) == 2
    assert "pip install -e '.[report]'" in capfd.readouterr().err
