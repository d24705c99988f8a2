"""A walk is the daemon's own life: its runs, exams and champions, and an account that nothing later touches."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands import walkforward
from commands.options import parse_costs
from commands.walkforward import Walk, WalkOptions, jobs, out_of_sample, training
from commands.walkforward.book import FIRST, Book
from commands.walkforward.schedule import Window, choose_windows
from continuous_training import Settings, train
from data_sources.bars import DAY_NS, MINUTE_NS
from envs.open_group_env import account_of
from evaluation import forecasts, ledger, plots, record
from evaluation.baselines import BUY_AND_HOLD
from evaluation.exam import POLICY
from evaluation.examiner import Exam, Examiner
from evaluation.forecasts import FITS, RIDGE, TREES, import_lightgbm
from evaluation.walk_summary import summarize
from monitoring.console import Console
from monitoring.tables import fit, lay_out
from runtime.control import ExitProgram
from runtime.locking import FolderLock
from tests.commands import hourly
from tests.envs.markets import config_of, market_of
from tests.envs.markets import walk as random_walk
from tests.evaluation.reports import Page
from training.checkpoint import Checkpoint

STRENGTH = 1.0
OPTIONS = WalkOptions(step=5, first_day="2026-01-17", costs_bps=(0.0, 2.0, 5.0))  # three windows


def settings_in(folder: Path, **changes: Any) -> Settings:
    folders = {f"{name}_dir": str(folder / name) for name in ("data", "log", "report", "checkpoint")}
    return Settings(**(hourly.SIZES | folders | changes))


def walk(
    folder: Path, settings: Settings | None = None, loop: Callable[..., None] = train, **changes: Any
) -> Book:
    """Walk in a folder; return what it has then."""
    options = replace(OPTIONS, output=folder / "walk", **changes)
    settings = settings or settings_in(folder)
    with Console(folder / "log") as console:
        walkforward.command(settings, loop, options, console)
        return Walk(settings, loop, options, console).book


def refused(folder: Path, settings: Settings | None = None, code: int | None = None, **changes: Any) -> str:
    """Return the one line with which a walk is refused, with this exit code; it leaves nothing new."""
    before = set(folder.rglob("*"))
    with pytest.raises(ExitProgram) as failure:
        walk(folder, settings, **changes)
    assert set(folder.rglob("*")) == before
    assert code in (None, failure.value.code)
    (line,) = str(failure.value).splitlines()
    return line


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "walk" / "windows").iterdir())}


@pytest.fixture(scope="module")
def planted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        hourly.plant(patch, strength=STRENGTH)
        yield


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time of a tiny walk: those of ``walked`` will do."""
    monkeypatch.setattr(plots, "as_png", lambda _: b"")
    monkeypatch.setattr(plots, "as_svg", lambda *_: "<svg/>")


@pytest.fixture(scope="module")
def walked(planted: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Book]:
    folder = tmp_path_factory.mktemp("walked")
    return folder, walk(folder)


# --- what is walked -----------------------------------------------------------------------------------------


def test_every_window_is_a_run_of_the_daemon_on_bars_up_to_its_start(walked: tuple[Path, Book]) -> None:
    folder, book = walked
    lines = ledger.read(folder / "walk" / "training" / ledger.NAME)
    assert [(line["run"], line["epoch"]) for line in lines] == list(itertools.product((1, 2, 3), (2, 4)))
    assert [row["exams"] for row in book.results] == [2, 2, 2]
    for row in book.results:
        start = np.datetime64(row["start_ns"], "ns")
        exams = [line for line in lines if line["run"] == row["number"]]
        assert {line["last"] for line in exams} <= {
            str(start - np.timedelta64(h, "h"))[:16] for h in range(1, 10)
        }
        assert row["champion_trained_until_ns"] <= row["start_ns"] - 9 * DAY_NS
        # The last bar of a window is settled in the next one, when its outcome is known.
        assert min(row["days"][POLICY]) >= str(start - np.timedelta64(1, "D"))[:10]
        crowned = [
            line["checkpoint"]
            for line in lines
            if line["decision"] == "promoted" and line["run"] <= row["number"]
        ]
        assert row["champion"] == crowned[-1]
    newest = training.newest_in(folder / "walk")
    assert newest is not None and newest.data_cutoff_ns == book.results[-1]["start_ns"]
    first = Checkpoint.read(folder / "walk" / FIRST)
    assert first.name == next(line["checkpoint"] for line in lines if line["decision"] == "promoted")


def test_what_was_traded_is_to_the_bit_what_the_daemons_record_says(walked: tuple[Path, Book]) -> None:
    folder, book = walked
    kept = record.read(folder / "walk" / "training")
    scored = [line for line in kept.lines if line["kind"] == "scored"]
    assert not kept.faults and len(scored) == 2  # at the start of the second and of the third run
    for line, row in zip(scored, book.results[:2], strict=True):
        assert line["champion"] == row["champion"]
        for name in (POLICY, BUY_AND_HOLD):
            assert line["days"][name] == row["days"][name]
    accounts = book.results[1]["accounts"]
    for name in (POLICY, BUY_AND_HOLD):
        assert kept.accounts[name] == {s: account_of(a) for s, a in accounts[name].items()}


def test_one_curve_is_stitched_from_the_windows_and_judged_by_all_trials(walked: tuple[Path, Book]) -> None:
    folder, book = walked
    summary = summarize(book.results, OPTIONS.costs_bps)
    assert summary is not None
    accounts = book.results[-1]["accounts"]
    for name in (POLICY, BUY_AND_HOLD, "first champion", "momentum", "always flat"):
        pool = np.mean([np.exp(account["log_equity"]) for account in accounts[name].values()])
        assert summary.measures[name].total_return == pytest.approx(pool - 1, rel=1e-12)
    for bps, value in summary.ladder:
        pool = np.mean([np.exp(a["log_equity"]) for a in accounts[f"policy at {bps:g} bps"].values()])
        assert value == pytest.approx(pool - 1, rel=1e-12)
    assert accounts["policy at 2 bps"] == accounts[POLICY]  # its own fee and slippage
    by_symbol = {row.symbol: row.measures[POLICY].total_return for row in summary.symbols}
    assert by_symbol == {s: pytest.approx(np.expm1(a["log_equity"])) for s, a in accounts[POLICY].items()}
    assert len(summary.days) == 15 and summary.num_trials == 6
    assert summary.measures[POLICY].mean_daily_interval is not None and np.isfinite(summary.band).all()
    page = Page((folder / "report" / "walkforward_walk" / "walkforward.html").read_bytes())
    page.loads_nothing()
    content = json.loads((folder / "report" / "walkforward_walk" / "walkforward.json").read_text())
    assert content["headline"] == summary.headline == "An edge over 15 days out of sample."
    assert content["headline"] in page.text and summary.verdict.edge
    assert [row["number"] for row in content["windows"]] == [1, 2, 3]
    # All who traded stand in the table of windows; a terminal of 100 columns has room for them without the exams.
    beside = ["first champion", "buy and hold", "momentum"]
    _, columns, rows, spare = walkforward.table(summary)
    assert list(columns[3:-1]) == ["return", *beside] and list(summary.beside) == beside
    for row, returns in zip(rows, (window.returns for window in summary.windows), strict=True):
        assert row[4:7] == [f"{returns[name]:+.2%}" for name in beside]
        assert all(text in page.text for text in row[4:7])
    heads, lines = fit(columns, rows, 100, spare)
    assert heads == list(columns[:-1]) and max(map(len, lay_out(heads, lines))) <= 100
    pictures = {path.name for path in (folder / "report" / "walkforward_walk").glob("*.png")}
    assert pictures == {"equity.png", "windows.png", "costs.png"}


def test_neither_a_stop_nor_bars_that_come_later_change_a_window(
    walked: tuple[Path, Book], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, epochs = files_of(walked[0]), 0

    def stops(settings: Settings, control: Any, **given: Any) -> None:
        def count() -> None:
            nonlocal epochs
            epochs += 1
            if epochs == 7:  # in the second run, after its first exam
                raise KeyboardInterrupt

        monkeypatch.setattr(control, "_on_epoch", count)
        train(settings, control, **given)

    with pytest.raises(ExitProgram, match="Stopped in window 2 of 3; the same command goes on") as stop:
        walk(tmp_path, loop=stops)
    assert stop.value.code == 130
    assert files_of(tmp_path) == {"0001.json": reference["0001.json"]}
    later = hourly.Hourly(STRENGTH, changes_on=int(walked[1].results[2]["start_ns"]) // DAY_NS)
    monkeypatch.setitem(hourly.SOURCES, "simulated", later)
    walk(tmp_path)
    now = files_of(tmp_path)
    assert now["0002.json"] == reference["0002.json"]
    third, before = (json.loads(files["0003.json"]) for files in (now, reference))
    assert third["champion"] == before["champion"] and third["days"] != before["days"]


def test_a_walk_that_is_done_only_writes_its_page(walked: tuple[Path, Book]) -> None:
    folder, _ = walked
    before = files_of(folder)
    shutil.rmtree(folder / "report")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    walk(folder, loop=never, first_day="")
    assert files_of(folder) == before and (folder / "report" / "walkforward_walk").is_dir()


def test_a_walk_of_an_older_program_goes_on_with_settings_that_it_did_not_know(
    walked: tuple[Path, Book], tmp_path: Path
) -> None:
    shutil.copytree(walked[0] / "walk", tmp_path / "walk")
    path = tmp_path / "walk" / "walk.json"
    plan = json.loads(path.read_text())
    del plan["ensemble"], plan["settings"]["feature_noise"], plan["settings"]["feature_encoding"]
    path.write_text(json.dumps(plan))
    assert "feature_noise=0.0 there, 0.5 here" in refused(tmp_path, settings_in(tmp_path, feature_noise=0.5))
    piecewise = settings_in(tmp_path, feature_encoding="piecewise")
    assert "feature_encoding=linear there, piecewise here" in refused(tmp_path, piecewise)
    # It is understood, and the edit is found all the same.
    assert "0001.json does not follow walk.json, which was edited" in refused(tmp_path)


def test_exams_may_end_a_windows_training_early(
    planted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examine = Examiner.examine

    def examine_ever_worse(self: Examiner, trainer: Any, *given: Any) -> Exam:
        exam = examine(self, trainer, *given)
        exam.figures["exam/net_bps"] = -float(trainer.progress.epoch)
        return exam

    monkeypatch.setattr(Examiner, "examine", examine_ever_worse)
    settings = settings_in(tmp_path, epochs=8, exam_patience=2, cost_ramp=0.0)
    book = walk(tmp_path, settings, last_day="2026-01-26")
    assert [row["newest"] for row in book.results] == ["run1_epoch6.pt", "run2_epoch6.pt"]
    log = (tmp_path / "walk" / "logs" / "train.log").read_text()
    assert "Run 2 begins with the weights of run1_epoch2.pt" in log


def test_fresh_windows_know_nothing_of_each_other_and_keep_no_weights(
    planted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warns(*given: Any, **named: Any) -> None:
        logging.getLogger("continuous_training").warning("SIM000 stands still")
        train(*given, **named)

    monkeypatch.setattr("monitoring.console.PLAIN_PROGRESS_SECONDS", 0.0)
    settings = settings_in(tmp_path, seed=1)  # with which both windows have a champion
    book = walk(tmp_path, settings, loop=warns, fresh=True, first_day="2026-01-22")
    for number in (1, 2):
        own = tmp_path / "walk" / f"{number:04d}"
        assert {line["run"] for line in ledger.read(training.training_in(own) / ledger.NAME)} == {1}
        assert not list(own.rglob("*.pt"))
    assert (tmp_path / "walk" / FIRST).exists()
    output = capsys.readouterr().out  # progress and windows, and of the trainings nothing but warnings
    assert "walk: 8 of 8 epochs" in output and "Window 2 of 2, 2026-01-27 to 2026-01-31: run1_epoch" in output
    assert " epoch " not in output and "Exam: " not in output
    # What is so in every window is shown once.
    assert re.findall(r"Warning: (window \d: SIM000 .*)", output) == ["window 1: SIM000 stands still"]
    rows = [row["days"] for row in book.results]
    assert rows[0][POLICY] == rows[0]["first champion"] and rows[1][POLICY] != rows[1]["first champion"]


def test_boosted_trees_are_fitted_to_what_was_known(
    walked: tuple[Path, Book], monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = FITS[TREES if import_lightgbm() else RIDGE]  # which takes their place where they are not installed
    seen = []

    def fit(market: Any, rows: Any, targets: Any) -> Any:
        seen.append(int(market.open_time[rows].max()))
        return fits(market, rows, targets)

    monkeypatch.setattr(forecasts, "NUM_TREES", 20)
    monkeypatch.setitem(FITS, TREES, fit)
    folder, _ = walked
    own, newest = settings_in(folder), training.newest_in(folder / "walk")
    assert newest is not None
    with Console(folder / "log") as console:
        whole = Walk(own, train, OPTIONS, console)
    window, cpu = whole.windows[1], torch.device("cpu")
    who = out_of_sample.Contestants(newest, None, None)
    row, accounts = out_of_sample.trade(window, who, whole._lake, own, cpu, {}, (), trees=True)
    again, _ = out_of_sample.trade(window, who, whole._lake, own, cpu, {}, (), trees=True)
    assert row == again  # a walk that is killed fits them again
    assert set(row["days"][TREES].values()) != {1.0}
    assert seen and seen[0] < window.start_ns - 11 * DAY_NS
    assert row["days"][TREES].keys() == row["days"][POLICY].keys() == row["days"]["momentum"].keys()
    assert set(row["days"][POLICY].values()) == {1.0}  # no champion: in cash
    idle = summarize([row | {"exams": 1}], ())
    assert idle is not None and idle.pictures().keys() == {"equity", "windows"}
    assert idle.measures[TREES].total_return > 0
    assert idle.headline.endswith(" days out of sample, of which at least 10 are needed.")
    assert "No exam crowned a champion, so nothing was traded" in idle.result
    units = {name: {account.units for account in accounts[name].values()} for name in (POLICY, BUY_AND_HOLD)}
    assert units[POLICY] == {0.0} and 0.0 not in units[BUY_AND_HOLD]


def test_boosted_trees_choose_their_rule_on_the_newest_days_even_months_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FITS, TREES, FITS[RIDGE])
    bars = random_walk(num_bars=30 * 1_440, gaps={24 * 1_440: 40 * 1_440})
    window_ns = int(bars.open_time[24 * 1_440])
    window = Window(1, window_ns, window_ns + DAY_NS)
    (traded,) = out_of_sample.trade_by_trees(market_of(bars), config_of(), window, 10)
    # It decides after the window's first bar, since nothing fills across the hole.
    assert traded.time[0] == np.datetime64(window_ns + MINUTE_NS, "ns") < traded.time[-1]
    before_all = Window(1, int(bars.open_time[0]), int(bars.open_time[0]) + DAY_NS)
    assert out_of_sample.trade_by_trees(market_of(bars), config_of(), before_all, 10) == []


# --- what cannot be walked ----------------------------------------------------------------------------------


def test_windows_lie_within_the_bars() -> None:
    days = np.arange(20_000, 20_100)
    settings = Settings(holdout_days=14)

    def windows(known: Any = days, step: int = 7, first: str = "", last: str = "") -> list[tuple[int, int]]:
        found = choose_windows(known, settings, step, first, last)
        assert [window.number for window in found] == list(range(1, len(found) + 1))
        return [(window.start_ns // DAY_NS, window.end_ns // DAY_NS) for window in found]

    assert windows() == [(20_050 + 7 * n, 20_057 + 7 * n) for n in range(7)]  # the newer half
    assert len(windows(np.arange(18_000, 20_000))) == 52  # a year at most
    assert windows(first="2024-11-29", last="2024-12-20") == [
        (20_056, 20_063),
        (20_063, 20_070),
        (20_070, 20_077),
    ]
    assert windows(np.arange(20_000, 20_023)) == [(20_015, 20_022)]
    # A week without a bar is left out.
    holes = windows(np.delete(days, range(57, 64)), first="2024-11-23")
    assert [start for start, _ in holes] == [20_050, *range(20_064, 20_093, 7)]


@pytest.mark.parametrize(
    ("changes", "options", "text"),
    [
        ({}, {"step": 11}, "--step 11 must be at most holdout_days=10"),
        (
            {"holdout_days": 9},
            {},
            "holdout_days=9 must be at least 10: no exam of fewer days crowns a champion",
        ),
        (
            {},
            {"first_day": "2026-01-29"},
            "too few bars for one window: 3 days from 2026-01-29 to 2026-01-31",
        ),
        ({}, {"first_day": "2025-11-15"}, "--from 2025-11-15 must be 2025-"),
        ({}, {"first_day": "soon"}, "--from soon must be a day such as"),
        ({}, {"costs_bps": (0.0, 5e3)}, "a flat cost must be 0 or more and under 5000 bps, was 5000"),
        ({}, {"max_hours": 1e-6}, "more than --max-hours 1e-06: raise that, lower epochs or the model"),
    ],
)
def test_what_cannot_be_walked_is_one_line(
    planted: None, tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], text: str
) -> None:
    assert text in refused(tmp_path, settings_in(tmp_path, **changes), **options)
    assert not (tmp_path / "walk" / "walk.json").exists()


def test_a_walk_without_bars_ends_as_every_command_does(planted: None, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, min_bars=9_999, simulated_bars=10**6)
    assert refused(tmp_path, settings, code=3).startswith("No symbol has 9,999 bars: fetch them with")


def test_options_that_do_not_go_together() -> None:
    for changes, text in (
        ({"jobs": 2}, "--jobs 2 needs --fresh: a training that is carried from window to window has to wait"),
        ({"fresh": True, "start_from": Path("x.pt")}, "--start-from cannot go with --fresh"),
        ({"costs_bps": (-1.0,)}, "--costs must be basis points of 0 or more"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            replace(OPTIONS, **changes)
    with pytest.raises(ValueError, match="--costs 1,x must be"):
        parse_costs("1,x")


def test_a_folder_is_walked_by_one_and_of_one_walk(walked: tuple[Path, Book], tmp_path: Path) -> None:
    folder, _ = walked
    with FolderLock(folder / "walk").hold():
        assert re.search(r"walk is being walked by process \d+: wait for it, or use another", refused(folder))
    text = refused(folder, settings_in(folder, epochs=6))
    assert text.endswith(
        "has another walk: epochs=4 there, 6 here; give what it was begun with, or another --output"
    )
    assert "its windows are others (--from, --to, --step)" in refused(folder, first_day="2026-01-22")
    copy = tmp_path / "walk"
    shutil.copytree(folder / "walk", copy)
    path = copy / "windows" / "0001.json"
    path.write_bytes(path.read_bytes().replace(b'"exams": 2', b'"exams": 1'))
    assert "0002.json does not follow 0001.json, which was edited: put the right one back" in refused(
        tmp_path
    )
    path.write_bytes(b"{")
    assert "0001.json is damaged" in refused(tmp_path)
    (copy / "walk.json").unlink()
    assert "walk.json is missing: put it back" in refused(tmp_path)


def test_a_checkpoint_that_has_seen_the_days_is_refused_unless_the_page_is_stamped(
    walked: tuple[Path, Book], tmp_path: Path
) -> None:
    folder, _ = walked
    newest = training.newest_in(folder / "walk")
    assert newest is not None
    with Console(folder / "log") as console:  # it knows bars up to then, and no day that is walked
        allowed = replace(OPTIONS, start_from=newest.path, first_day="2026-01-27", output=tmp_path / "later")
        assert Walk(settings_in(folder), train, allowed, console).book.plan["stamp"] == ""
    given: dict[str, Any] = {"start_from": newest.path, "first_day": "2026-01-26"}
    text = refused(tmp_path, **given)
    assert "trained or chosen on bars up to 2026-01-27 00:00 UTC, and the walk begins on 2026-01-26" in text
    book = walk(tmp_path, **given, allow_overlap=True)
    assert [row["newest"] for row in book.results] == ["run4_epoch4.pt"]
    page = Page((tmp_path / "report" / "walkforward_walk" / "walkforward.html").read_bytes())
    assert "Not out of sample: it began with run3_epoch4.pt" in page.text


def test_a_full_disk_is_one_line_and_nothing_is_lost(
    planted: None, walked: tuple[Path, Book], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walkforward, "free_in", lambda _: 1e3)
    assert "and 1e-06 GB are free: make room" in refused(tmp_path, first_day="2026-01-27")
    monkeypatch.setattr(walkforward, "free_in", lambda _: math.inf)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "walk/windows/0001.json")

    with monkeypatch.context() as patch:
        patch.setattr("commands.walkforward.book.write_atomically", full)
        patch.setattr(Book, "begin", lambda _: None)
        text = "walk/windows/0001.json: No space left on device; nothing is lost, the same command goes on"
        with pytest.raises(ExitProgram, match=text):
            walk(tmp_path, first_day="2026-01-27")
    # All of the training is there.
    newest = training.newest_in(tmp_path / "walk")
    assert newest is not None and newest.name == "run1_epoch4.pt"


@pytest.mark.drill  # a process of its own imports torch
def test_windows_that_fail_in_a_process_end_the_walk_with_its_code(tmp_path: Path) -> None:
    window = choose_windows(np.arange(20_000, 20_023), Settings(), 7, "", "")[0]
    counted: list[int] = []
    given = (fails, Settings(), [window], lambda _: tmp_path, 2, ["cpu"], counted.append)
    with (
        jobs.Jobs(*given) as running,
        pytest.raises(ExitProgram, match="of window 1 ended with code 3") as failure,
    ):
        running.wait_for(window)
    assert failure.value.code == 3


def fails(*_: Any, **__: Any) -> None:
    """Train in a process of its own, and fail."""
    raise ExitProgram(3, "there is nothing")
