"""A report shows what was measured and whether there is an edge, loads nothing, and is written as a whole."""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import plots
from evaluation.measures import daily_growth, measure
from evaluation.page import headline, render_page
from evaluation.plots import bin_starts, lasts, means, minima
from evaluation.report import Report, json_bytes, write_folder
from tests.evaluation.reports import Page, files_of, report_of
from tests.evaluation.walks import of_daily

GAINS = (0.01, 0.012, 0.008, 0.015, 0.01, 0.012, 0.005, 0.009, 0.011, 0.01, 0.013, 0.008)
ROWS = [{"rollout/reward_bps": value, "loss/entropy": None} for value in np.sin(np.arange(40.0))]
HOSTILE = '<script>alert("x")</script>&\'</title>'


def edge(**given: object) -> Report:
    walks = [
        of_daily(*GAINS, symbol="AAA", traded=[0.5] * 12, costs=[1e-4] * 12),
        of_daily(*GAINS[::-1], symbol="BBB"),
    ]
    return report_of(walks, **({"num_trials": 1, "training": ROWS} | given))


def page_of(report: Report) -> Page:
    """Its page without the pictures, which take a second to draw."""
    return Page(render_page(report, dict.fromkeys(report.pictures(), ("", ""))))


def text_of(report: Report) -> str:
    return page_of(report).text


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return files_of(edge(ladder=[(0.0, edge().pooled["policy"]), (5.0, edge().pooled["always flat"])]))


# --- the page ---------------------------------------------------------------------------------------------


def test_the_page_loads_nothing(files: dict[str, bytes]) -> None:
    shown = Page(files["report.html"])
    shown.loads_nothing()
    assert shown.tags.count("svg") == 2 * len([name for name in files if name.endswith(".png")])
    assert "width=device-width, initial-scale=1" in shown.values


@pytest.mark.parametrize(
    "addition",
    [
        '<img src="data:,">',
        '<a href="https://example.com">',
        "<p style=\"background: url('x.png')\">",
        "<script>fetch('x')</script>",
        '<svg id="twice"></svg><svg id="twice"></svg>',
        '<use href="#nowhere"/>',
    ],
)
def test_a_page_that_loads_something_is_noticed(files: dict[str, bytes], addition: str) -> None:
    with pytest.raises(AssertionError):
        Page(files["report.html"] + addition.encode()).loads_nothing()


def test_every_picture_is_a_png_beside_the_page(files: dict[str, bytes]) -> None:
    pictures = {name for name in files if name.endswith(".png")}
    assert pictures == {
        "equity.png",
        "drawdown.png",
        "costs.png",
        "symbol1_AAA.png",
        "symbol2_BBB.png",
        "training.png",
        "rolling.png",
        "hours.png",
        "day.png",
    }
    assert all(files[name].startswith(b"\x89PNG\r\n\x1a\n") for name in pictures)


def test_what_comes_from_outside_is_escaped() -> None:
    report = report_of(
        [of_daily(*GAINS, symbol=HOSTILE)], checkpoint=HOSTILE, notes=[HOSTILE], made={HOSTILE: HOSTILE}
    )
    files = files_of(report)
    shown = Page(files["report.html"])
    shown.loads_nothing()
    assert shown.tags.count("script") == 1  # which sorts tables
    assert HOSTILE not in shown.source
    assert shown.text.count(HOSTILE) >= 5
    assert f"{HOSTILE}: price, position and return" in shown.values
    assert all(re.fullmatch(r"[\w.-]+", name) for name in files)


def test_the_page_sorts_symbols_by_contribution() -> None:
    losing = [of_daily(*[-gain for gain in GAINS], symbol="LOSER"), of_daily(*GAINS, symbol="WINNER")]
    report = report_of(losing)
    assert [row["symbol"] for row in report.symbols] == ["WINNER", "LOSER"]
    text = text_of(report)
    assert text.index("WINNER crypto") < text.index("LOSER crypto")
    total = sum(row["contribution"] for row in report.symbols)
    assert total == pytest.approx(report.pooled["policy"].total_return)


def test_figures_on_the_page_are_those_of_the_measures() -> None:
    report, text = edge(), text_of(edge())
    own = report.pooled["policy"]
    low, high = own.sharpe_interval or (0.0, 0.0)
    assert f"+{own.total_return:.2%} net return" in text
    assert f"{own.sharpe:.1f} Sharpe, {low:.1f} to {high:.1f}" in text
    assert f"{own.max_drawdown:.2%} max drawdown" in text
    assert "2 symbols, 12 days" in text
    assert "40 epochs up to this checkpoint" in text


def test_funding_is_on_the_page_where_there_is_any(files: dict[str, bytes]) -> None:
    assert "funding" not in Page(files["report.html"]).text.lower()
    funding = [1e-4, 0, -3e-4, *[0] * 9]
    report = report_of([of_daily(*GAINS, funding=funding), of_daily(*GAINS, symbol="BBB")])
    page = Page(files_of(report)["report.html"])
    assert "-0.01% funding, paid less received" in page.text
    assert "below 0 where received" in page.text
    assert report.as_json()["pooled"]["policy"]["funding"] == pytest.approx(-1e-4)
    assert report.pooled["policy"].costs == 0


def test_a_report_without_training_curves_has_no_place_for_them() -> None:
    assert "training" in edge().pictures() and "training" not in edge(training=[]).pictures()
    assert " epochs up to this checkpoint" not in text_of(edge(training=[]))


# --- the verdict ------------------------------------------------------------------------------------------


def test_an_edge_is_reported() -> None:
    assert headline(edge()) == "An edge on these days. It earned 13.01% after costs."


def test_simulated_bars_are_said_in_the_headline() -> None:
    report = edge(is_simulated=True)
    assert headline(report) == "An edge on these days of a simulated market. It earned 13.01% after costs."
    assert "2026-01-16, UTC, simulated bars" in text_of(report)
    assert json.loads(json_bytes(report))["simulated"] is True


def test_a_report_is_named_by_run_and_epoch_whatever_the_file() -> None:
    page = page_of(edge(checkpoint="best.pt"))
    assert "<title>Run 1, epoch 25, 2026-01-05 to 2026-01-16</title>" in page.source
    assert "Evaluation of run 1, epoch 25, 2026-01-05 to 2026-01-16, UTC" in page.text


def test_no_edge_is_reported_with_its_reasons() -> None:
    report = report_of([of_daily(*[0.01, -0.02, 0.01, -0.01, 0.005, -0.002] * 2, traded=[1.0] * 12)])
    assert headline(report) == "No edge on these days. It lost 1.46% after costs."
    text = text_of(report)
    assert "not surely above 0." in text
    assert "Not above buy and hold, always flat, momentum." in text
    assert "Judged after 3 exams" in text
    assert "12 days after 3 trials show a true Sharpe of 5 in " in text


def test_a_gain_below_a_baseline_is_no_edge() -> None:
    report = edge(others={"buy and hold": [of_daily(*[0.05] * 12, symbol=name) for name in ("AAA", "BBB")]})
    assert not report.verdict.edge
    assert "Not above buy and hold." in text_of(report)


def test_few_days_are_reported() -> None:
    report = report_of([of_daily(0.01, 0.01)])
    assert headline(report).startswith("No edge")
    text = text_of(report)
    assert "2 days are too few to tell, 10 are needed" in text
    assert json.loads(json_bytes(report))["pooled"]["policy"]["sharpe"] is None


def test_a_policy_that_never_trades_is_reported() -> None:
    report = report_of([of_daily(*[0.0] * 7, position=[0.0] * 7)])
    assert headline(report) == "No edge on these days. It never traded."
    assert report.paid_bps == 0.0
    assert report.break_even == (None, "none: it never trades")


def test_the_break_even_cost_has_its_interval() -> None:
    days = np.random.default_rng(0).normal(0.002, 0.004, 40)
    rungs = [[of_daily(*(days - cost / 1e4))] for cost in (0.0, 50.0)]
    given = {
        "ladder": [(cost, measure(rung)) for cost, rung in zip((0.0, 50.0), rungs, strict=True)],
        "ladder_growth": [daily_growth(rung) for rung in rungs],
    }
    report = report_of([of_daily(*days, traded=[1.0] * 40)], **given)
    low, high = report.break_even_interval
    assert 0 < low < report.break_even[0] < high < 50
    assert f"break-even cost, {low:.2f} to {high:.2f}" in text_of(report)
    assert f"(95 % interval: {low:.2f} to {high:.2f})" in text_of(report)
    assert json.loads(json_bytes(report))["break_even_interval"] == [low, high]
    unbounded = report_of([of_daily(*days, traded=[1.0] * 40)])
    assert unbounded.break_even_interval is None and unbounded.break_even_range == ""


def test_an_overlap_is_stamped_before_anything_else() -> None:
    report = edge(overlaps=True)
    assert headline(report).startswith("Not an exam: it was trained on some of these days.")
    text = text_of(report)
    assert text.index("OVERLAPS TRAINING: these weights were trained on bars up to 2026-01-05 00:00 UTC") < (
        text.index("net return")
    )
    assert json.loads(json_bytes(report))["overlaps_training"] is True
    assert "OVERLAPS" not in text_of(edge())


def test_json_is_plain_and_strict(files: dict[str, bytes]) -> None:
    def refuse(name: str) -> float:
        raise AssertionError(name)

    content = json.loads(files["report.json"], parse_constant=refuse)
    assert content["format"] == 1
    assert content["verdict"]["edge"] is True
    assert content["pooled"]["always flat"]["sharpe"] is None
    assert [rung["bps"] for rung in content["cost_ladder"]] == [0.0, 5.0]
    assert [row["symbol"] for row in content["symbols"]] == [row["symbol"] for row in edge().symbols]
    # Half the equity is traded a day, for 1e-4 of equity.
    assert content["paid_bps"] == pytest.approx(2.0)


# --- pictures ---------------------------------------------------------------------------------------------


def test_a_picture_in_the_page_has_its_colours_and_font() -> None:
    report = edge()
    svg = plots.as_svg(report.pictures()["symbol1_AAA"](8.6), "symbol1-wide")
    assert {"var(--accent)", "var(--ink)", "var(--muted)", "var(--faint)"} <= set(
        re.findall(r"var\(.*?\)", svg)
    )
    assert not set(re.findall(r"#[0-9a-f]{6}", svg)) - {"#000000"}  # of ticks without a length
    assert "figure text { font-family: inherit !important; }" in page_of(report).source


def test_labels_in_a_picture_keep_their_digits() -> None:
    rows = [{"loss": value} for value in (1.0912, 1.0945)]
    svg = plots.as_svg(plots.training(rows, [("loss", "loss")], 8.6), "training")
    labels = re.findall(r">(1\.\d+)</text>", svg)
    assert len(labels) > 2 and len(set(labels)) == len(labels)


def test_a_flat_policy_has_axes_of_numbers_that_mean_something() -> None:
    flat = of_daily(*[3e-17, -2e-17, 1e-17] * 3, symbol="AAA")
    report = report_of(
        [flat], num_trials=1, training=[{"loss/entropy": 1e-17 * (-1) ** number} for number in range(30)]
    )
    pictures = report.pictures()
    for name in ("equity", "drawdown", "symbol1_AAA", "training"):
        svg = plots.as_svg(pictures[name](8.6), name)
        labels = re.findall(r">([^<>]*)</text>", svg)
        assert labels and not any(re.search(r"e-\d|\N{MINUS SIGN}", label) for label in labels), labels


def test_there_is_one_minus(files: dict[str, bytes]) -> None:
    svg = plots.as_svg(edge().pictures()["drawdown"](8.6), "drawdown")
    assert re.search(r">-\d", svg)
    assert "\N{MINUS SIGN}" not in svg + files["report.html"].decode()


def test_a_png_is_on_white_for_dark_viewers_too() -> None:
    figure = edge().pictures()["drawdown"](8.6)
    assert Image.open(io.BytesIO(plots.as_png(figure, dpi=20))).getpixel((0, 0)) == (255, 255, 255, 255)


# --- curves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 5, 699, 700, 701, 5_000])
def test_curves_keep_first_last_lowest_and_mean(length: int) -> None:
    values = np.random.default_rng(length).normal(size=length)
    first = bin_starts(length)
    assert first[0] == 0 and len(first) == min(700, length) and (np.diff(first) > 0).all()
    assert lasts(values)[0] == values[0] and lasts(values)[-1] == values[-1]
    assert minima(values).min() == values.min()
    weights = np.diff(np.append(first, length))
    assert (means(values) * weights).sum() == pytest.approx(values.sum())
    assert len(lasts(values)) == len(minima(values)) == len(means(values)) + 1


# --- the folder -------------------------------------------------------------------------------------------


def listing(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def interrupted(error: BaseException) -> Iterator[tuple[str, bytes]]:
    yield "one.png", b"new"
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "full"), SystemExit(1)])
def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, error: BaseException) -> None:
    folder = tmp_path / "reports" / "one"
    with pytest.raises(type(error)):
        write_folder(folder, interrupted(error))
    assert not any(tmp_path.iterdir())
    write_folder(folder, [("one.png", b"old"), ("report.json", b"{}")])
    before = listing(tmp_path)
    with pytest.raises(type(error)):
        write_folder(folder, interrupted(error))
    assert listing(tmp_path) == before
    assert [path.name for path in folder.parent.iterdir()] == ["one"]


def test_a_new_report_replaces_all_files_of_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    write_folder(folder, [("symbol1_AAA.png", b"old"), ("report.json", b"{}")])
    write_folder(folder, [("report.json", b"[]")])
    assert listing(tmp_path) == {"one/report.json": b"[]"}


def test_leftovers_of_a_kill_are_cleaned_up(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    # Killed between the two renames: the old report is aside, a half new one hidden beside it.
    for name in (".one.old.tmp", ".one.12345678.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".one.old.tmp" / "report.json").write_bytes(b"old")
    (tmp_path / ".one.12345678.tmp" / "report.json").write_bytes(b"half")
    (tmp_path / ".other.12345678.tmp").mkdir()
    an_hour_ago = time.time() - 3_700
    os.utime(tmp_path / ".one.12345678.tmp", (an_hour_ago, an_hour_ago))
    (tmp_path / ".one.87654321.tmp").mkdir()  # of another process that is writing now
    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, interrupted(KeyboardInterrupt()))
    assert listing(tmp_path) == {"one/report.json": b"old"}
    assert (tmp_path / ".other.12345678.tmp").is_dir() and (tmp_path / ".one.87654321.tmp").is_dir()
