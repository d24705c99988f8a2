"""Each run's start: the champion walks the bars that came since, once, and nothing chosen afterwards enters."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands import record as record_command
from data_sources.bars import Bars
from envs.market import Market
from evaluation import record
from evaluation.exam import examine
from evaluation.examiner import Exam
from evaluation.group_exam import Group, examine_groups
from evaluation.record_summary import headline_beside, summarize
from evaluation.recorder import Recorder
from monitoring.console import Console
from runtime.control import STOP_NOW, Control, ExitProgram
from tests.envs.markets import market_of
from tests.evaluation.reports import Page
from tests.evaluation.test_champion import DAY_NS, LOGGER, SETTINGS, Training
from training.checkpoint import BEST
from training.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
LEAST = {"context_bars": 4, "horizon": 8}
MINUTE_NS = 60 * 10**9


class Stopping(Control):
    stop_level = property(lambda self: STOP_NOW)  # type: ignore[assignment]


class Life:
    """Runs of a training on bars that grow; its champions always want one position."""

    def __init__(self, folder: Path, caplog: pytest.LogCaptureFixture, **changes: Any) -> None:
        self.training = Training(folder, caplog, **changes)
        self.settings = replace(SETTINGS, **changes)
        self.folder, self.bars = folder, self.training.bars
        self.statistics = self.training.trainer.env.market.statistics
        self.first_cutoff_ns = self.training.progress.cutoff_ns
        self.control = Control()

    def crown(self, position: str, cutoff_ns: int) -> None:
        """Save a champion, chosen on bars up to a time."""
        training = self.training
        training.hold(position)
        training.progress.cutoff_ns = cutoff_ns
        training.progress.tick(1)
        saved = replace(training.checkpoint(Exam()), data_cutoff_ns=cutoff_ns)
        saved.save(keep=9)
        shutil.copyfile(saved.path, self.folder / BEST)

    def market(self, cutoff_ns: int, bars: list[Bars] | None = None) -> Market:
        known = [series.between(0, cutoff_ns) for series in bars or self.bars]
        return market_of(*known, holdout_start_ns=cutoff_ns - DAY_NS, statistics=self.statistics, **LEAST)

    def run(self, cutoff_ns: int, bars: list[Bars] | None = None, **given: Any) -> list[dict[str, Any]]:
        """Begin a run; return the new lines of the record."""
        before = len(record.read(self.folder).lines)
        recorder = Recorder(self.folder, ALONE, self.control, **given)
        recorder.update(self.market(cutoff_ns, bars), self.settings, cutoff_ns, "0123456789abcdef")
        self.figures = recorder.figures
        kept = record.read(self.folder)
        assert not kept.faults
        return kept.lines[before:]

    def day(self, days: float) -> int:
        return self.first_cutoff_ns + int(days * DAY_NS)


@pytest.fixture
def life(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Life:
    caplog.set_level(logging.INFO, logger=LOGGER)
    life = Life(tmp_path, caplog)
    life.crown("long", life.first_cutoff_ns)
    return life


def test_without_a_champion_or_without_new_bars_nothing_is_written(life: Life) -> None:
    assert life.run(life.day(0)) == []
    (life.folder / BEST).unlink()
    assert life.run(life.day(1)) == []
    assert not (life.folder / record.NAME).exists()
    assert life.training.output == ""


def test_every_new_bar_is_scored_once_and_the_account_goes_on(life: Life) -> None:
    begin, champion, first = life.run(life.day(1.3))
    assert [line["kind"] for line in (begin, champion, first)] == ["begin", "champion", "scored"]
    assert life.run(life.day(1.3)) == []  # a restart of the same run
    rest = [line for cutoff in (2.0, 4.5, 10.9) for line in life.run(life.day(cutoff))]
    assert [line["kind"] for line in rest] == ["scored"] * 3
    scored = [first, *rest]
    # To the bit what one exam of all these bars says.
    whole = examine(
        life.training.trainer.full_policy(),
        life.market(life.day(10.9)),
        life.training.trainer.env.config,
        ["AAA", "BBB"],
        life.first_cutoff_ns - MINUTE_NS,
        life.day(10.9),
    )
    accounts = record.read(life.folder).accounts
    for name in ("policy", "buy and hold"):
        for walked in whole[name]:
            key = "log_return" if name == "policy" else "buy_and_hold"
            total = sum(line["symbols"][walked.symbol][key] for line in scored)
            assert total == pytest.approx(accounts[name][walked.symbol].log_equity, abs=1e-12)
            left = sum(line["symbols"][walked.symbol]["decisions"] for line in scored) - len(walked.time)
            assert 0 <= left < SETTINGS.horizon
        pool = np.mean([math.exp(account.log_equity) for account in accounts[name].values()])
        days = [line["days"][name] for line in scored]
        assert math.prod(factor for row in days for factor in row.values()) == pytest.approx(pool, abs=1e-12)
        total_return = scored[-1]["so_far"][name]["total_return"]
        assert total_return == pytest.approx(pool - 1, abs=1e-12)
    first_fill = np.datetime64(scored[0]["first"], "ns").astype(np.int64)
    assert life.first_cutoff_ns <= first_fill <= life.first_cutoff_ns + 30 * MINUTE_NS
    summary = summarize(record.read(life.folder).lines)
    assert summary is not None and summary.measures["policy"].mean_daily_interval is not None
    assert life.figures["record/days"] == summary.measures["policy"].num_days == 11
    assert "Record: 11 days since " in life.training.output
    assert summary.hash[:16] in headline_beside(life.folder)


def test_a_new_champion_takes_the_account_over_and_decides_on_nothing_that_it_was_chosen_on(
    life: Life,
) -> None:
    life.run(life.day(2))
    life.crown("short", life.day(2))
    champion, scored = life.run(life.day(4))
    assert (champion["kind"], champion["champion"], champion["before"]) == (
        "champion",
        "run1_epoch2.pt",
        "run1_epoch1.pt",
    )
    assert scored["champion"] == "run1_epoch2.pt" and scored["held"] <= 2 * 2
    assert scored["symbols"]["AAA"]["log_return"] < 0 < scored["symbols"]["AAA"]["buy_and_hold"]


def test_bars_that_nobody_walked_are_missed_and_said(life: Life) -> None:
    life.run(life.day(2))
    life.crown("short", life.day(4))  # chosen on two days that no champion has walked
    champion, missed, scored = life.run(life.day(6))
    assert missed["kind"] == "missed" and missed["until"] == str(np.datetime64(life.day(4), "ns"))[:16]
    assert 2 * 96 - 4 <= scored["held"] <= 2 * 96 + 4
    assert "Warning: Record: " in life.training.output
    assert champion["kind"] == "champion"


def test_revised_bars_are_told_once_and_the_score_stays_but_a_split_is_none(life: Life) -> None:
    life.run(life.day(2))
    kept = (life.folder / record.NAME).read_bytes()
    aaa, bbb = life.bars
    split = replace(
        bbb, **{n: getattr(bbb, n) / 4 for n in ("open", "high", "low", "close")}, volume=bbb.volume * 4
    )
    at = int(np.searchsorted(aaa.open_time, life.day(1)))
    close = aaa.close.copy()
    close[at] *= 1.0001
    revised = [replace(aaa, close=close, high=np.maximum(aaa.high, close)), split]
    event, _ = life.run(life.day(4), revised)
    assert event["kind"] == "revised" and event["symbols"] == {"AAA": [3]}
    assert [line["kind"] for line in life.run(life.day(5), revised)] == ["scored"]
    assert (life.folder / record.NAME).read_bytes().startswith(kept)


def test_accounts_over_groups_have_a_record_that_knows_each_of_their_symbols(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER)
    life = Life(tmp_path, caplog, account="pair", net_exposure=1.0)
    life.crown("long", life.first_cutoff_ns)
    scored = [line for days in (1.3, 2.0, 4.5) for line in life.run(life.day(days))][2:]
    (whole,) = examine_groups(
        life.training.trainer.full_policy(),
        life.market(life.day(4.5)),
        life.training.trainer.env.config,
        [Group("group 1", ("AAA", "BBB"))],
        life.first_cutoff_ns - MINUTE_NS,
        life.day(4.5),
    )["policy"]
    assert 0 <= sum(line["decisions"] for line in scored) - len(whole.time) < SETTINGS.horizon
    total = sum(line["symbols"]["group 1"]["log_return"] for line in scored)
    account = record.read(tmp_path).accounts["policy"]["group 1"]
    assert total == pytest.approx(account.log_equity, abs=1e-12) and all(account.units)
    assert "new bars of 1 group, " in life.training.output
    at = int(np.searchsorted(life.bars[0].open_time, life.day(1)))
    close = np.where(np.arange(len(life.bars[0])) == at, life.bars[0].close * 1.0001, life.bars[0].close)
    revised = [replace(life.bars[0], close=close, high=np.maximum(life.bars[0].high, close)), life.bars[1]]
    event, _ = life.run(life.day(5), revised)
    assert event["kind"] == "revised" and event["symbols"] == {"AAA": [3]}


def test_a_walk_that_takes_too_long_ends_where_it_is_and_goes_on_with_the_next_run(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.open_walk.ENCODED_SEGMENTS", 2)
    *_, first = life.run(life.day(3), max_seconds=0.0)
    assert not first["is_whole"]
    (second,) = life.run(life.day(4))
    assert second["is_whole"]
    walked = first["decisions"] + second["decisions"]
    assert 2 * (4 * 48 - 2) <= walked <= 2 * 4 * 48
    assert "stopped by exam_minutes" in life.training.output


def test_what_goes_wrong_is_one_line_and_the_training_goes_on(life: Life) -> None:
    life.run(life.day(2))
    path, best = life.folder / record.NAME, life.folder / BEST
    content, weights = path.read_bytes(), best.read_bytes()

    def warns(text: str, cutoff: float = 3) -> None:
        life.training.output  # noqa: B018 - forget earlier lines
        recorder = Recorder(life.folder, ALONE, life.control)
        recorder.update(life.market(life.day(cutoff)), SETTINGS, life.day(cutoff), "d")
        (line,) = life.training.output.splitlines()
        assert line.startswith("Warning: Nothing recorded: ") and text in line, line

    path.write_bytes(content.replace(b'"held": ', b'"held": 1'))
    warns("line 3 was edited")
    path.write_bytes(content)
    best.write_bytes(weights[:1000])
    warns("best.pt")
    best.write_bytes(weights)
    other = replace(life.statistics, mean=life.statistics.mean + 1)
    life.statistics, kept = other, life.statistics
    warns("was trained with other features")
    life.statistics = kept
    path.unlink()
    path.mkdir()
    warns("Is a directory")
    path.rmdir()
    path.write_bytes(content)
    life.control = Stopping()
    assert life.run(life.day(3)) == []
    assert "asked to stop" in life.training.output


def test_a_record_of_another_training_is_left_alone(life: Life, tmp_path: Path) -> None:
    life.run(life.day(2))
    other = Training(tmp_path / "other")
    other.bars = other.bars[:1]
    for name in (record.NAME, record.HEAD):
        (tmp_path / "other").mkdir(exist_ok=True)
        shutil.copyfile(life.folder / name, tmp_path / "other" / name)
    statistics = replace(life.statistics, mean=life.statistics.mean * 2)
    saved = replace(
        life.training.checkpoint(Exam()), features=statistics.state_dict(), path=tmp_path / "other" / BEST
    )
    shutil.copyfile(life.folder / BEST, saved.path)
    saved.save(keep=1)
    life.folder, life.statistics = tmp_path / "other", statistics
    assert life.run(life.day(4)) == []
    assert "is of another training" in life.training.output


def test_the_command_shows_a_table_json_and_a_page_and_verifies(
    life: Life, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(SETTINGS, checkpoint_dir=str(life.folder), report_dir=str(tmp_path / "reports"))

    def run(verify: bool = False, as_json: bool = False) -> str:
        with Console(tmp_path / "logs", to_stderr=as_json) as console:
            (record_command.verify if verify else record_command.show)(settings, console, as_json)
        return capsys.readouterr().out

    for verify in (False, True):
        with pytest.raises(ExitProgram, match="There is no record in") as missing:
            run(verify)
        assert missing.value.code == 3
    life.run(life.day(2))
    life.crown("short", life.day(3))
    life.run(life.day(10.9))
    table = run()
    assert "run1_epoch2.pt is the champion, after run1_epoch1.pt" in table
    content = json.loads(run(as_json=True))
    assert content["headline"] in table and len(content["lines"]) == 6
    assert re.findall(r"^ *(\d) +\d{4}-\d\d-\d\d \d\d:\d\d ", table, re.M) == [
        *"123456"
    ]  # no column is cut off
    page = Page((tmp_path / "reports" / "record" / "record.html").read_bytes())
    page.loads_nothing()
    assert content["headline"] in page.text and content["hash"][:16] in page.text
    assert "6 lines, whole and in order" in run(verify=True)
    assert json.loads(run(verify=True, as_json=True)) == {
        "lines": 6,
        "hash": content["hash"],
        "is_whole": True,
    }
    path = life.folder / record.NAME
    path.write_bytes(path.read_bytes().replace(b"run1_epoch2.pt", b"run1_epoch9.pt", 1))
    for verify in (True, False):
        with pytest.raises(ExitProgram, match=r"record\.jsonl: line 4 was edited") as failure:
            run(verify=verify)
        assert failure.value.code == 1
