"""best.pt changes only by decision, once, atomically, with a ledger line; a kill in between loses nothing."""

from __future__ import annotations

import errno
import itertools
import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from continuous_training import Settings
from data_sources.bars import Bars
from evaluation import champion, ledger, record
from evaluation.examiner import Exam, Examiner
from evaluation.trained_policy import TrainedPolicy
from runtime import files
from runtime.control import STOP_NOW, Control
from tests.envs.markets import market_of, walk
from training import checkpoint
from training.checkpoint import Checkpoint
from training.checkpoint_writer import CheckpointWriter
from training.distributed import Ranks
from training.memory import plan_memory
from training.progress import TrainingProgress
from training.trainer import Trainer

DAY_NS = 86_400 * 10**9
LOGGER = "continuous_training"
SETTINGS = Settings(
    d_model=16,
    num_layers=1,
    num_heads=2,
    feature_encoding="linear",
    context_bars=4,
    horizon=8,
    episode_bars=16,
    envs_per_gpu=4,
    batch_size=16,
    micro_batch_segments=2,
    holdout_days=12,
)
POSITIONS = {"long": 2, "flat": 1, "short": 0}


def half_hours(symbol: str, drift: float, seed: int) -> Bars:
    """16 days of bars, one every 30 minutes, that rise by ``drift`` on average."""
    bars = walk(symbol, 16 * 48, seed=seed)
    rise = np.exp(np.arange(len(bars)) * drift)
    prices = {name: getattr(bars, name) * rise for name in ("open", "high", "low", "close")}
    start = bars.open_time[0] // DAY_NS * DAY_NS
    return replace(bars, open_time=start + (bars.open_time - bars.open_time[0]) * 30, **prices)


class Training:
    """A training without updates, whose policy always wants one position; its checkpoints are real."""

    def __init__(
        self,
        folder: Path,
        caplog: pytest.LogCaptureFixture | None = None,
        ranks: Ranks = Ranks(0, 1, torch.device("cpu")),  # noqa: B008 - frozen
        **changes: Any,
    ) -> None:
        self.folder, self._caplog, settings = folder, caplog, replace(SETTINGS, **changes)
        self.bars = [half_hours("AAA", 1e-3, 0), half_hours("BBB", 5e-4, 1)]
        self.trained_until_ns = int(self.bars[0].open_time[-1]) - 12 * DAY_NS
        market = market_of(*self.bars, holdout_start_ns=self.trained_until_ns, context_bars=4, horizon=8)
        plan = plan_memory(settings, market.num_bytes, ranks)
        self.progress = TrainingProgress(
            trained_until_ns=self.trained_until_ns, cutoff_ns=self.trained_until_ns
        )
        self.trainer = Trainer(market, settings, ranks, plan, self.progress)
        self.examiner = Examiner(folder, ranks, Control())

    def hold(self, position: str) -> None:
        with torch.no_grad():
            self.trainer.policy.head.logits.bias.zero_()[POSITIONS[position]] = 9.0

    def examine(self, data: str = "d") -> Exam:
        self.progress.tick(1)
        with self.writer() as writer:
            exam = self.examiner.examine(self.trainer, data, writer)
            writer.save(self.checkpoint(exam, data))
            writer.finish()
        for line in exam.lines:
            logging.getLogger(LOGGER).info(line)
        return exam

    def writer(self) -> CheckpointWriter:
        is_first, apply = self.trainer.ranks.is_first, partial(champion.apply_decision, pending=[])
        return CheckpointWriter(self.folder, 2, is_first, apply)

    def checkpoint(self, exam: Exam, data: str = "d") -> Checkpoint:
        saved = self.trainer.checkpoint(data, exam.figures, exam.record)
        return replace(saved, path=self.folder / saved.name)

    @property
    def ledger(self) -> list[dict[str, Any]]:
        return ledger.read(self.folder / ledger.NAME)

    @property
    def best(self) -> tuple[int, int] | None:
        path = self.folder / checkpoint.BEST
        if not path.exists():
            return None
        best = Checkpoint.read(path)
        return best.run, best.epoch

    @property
    def output(self) -> str:
        assert self._caplog is not None
        lines = [f"{record.levelname.title()}: {record.getMessage()}" for record in self._caplog.records]
        self._caplog.clear()
        return "\n".join(lines)


@pytest.fixture
def training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Training:
    caplog.set_level(logging.INFO, logger=LOGGER)
    return Training(tmp_path, caplog)


def test_only_a_challenger_that_beats_the_champion_replaces_it(training: Training) -> None:
    story = [("short", None), ("flat", None), ("long", 3), ("short", 3), ("long", 3), ("flat", 3)]
    for what, best in story:
        training.hold(what)
        training.examine()
        assert training.best == (None if best is None else (1, best)), what
    decisions = [(line["epoch"], line["champion"], line["decision"]) for line in training.ledger]
    assert decisions == [
        (1, None, "refused"),
        (2, None, "refused"),
        (3, None, "promoted"),
        (4, "run1_epoch3.pt", "refused"),
        (5, "run1_epoch3.pt", "refused"),
        (6, "run1_epoch3.pt", "refused"),
    ]
    reasons = [line["reason"] for line in training.ledger]
    assert reasons[1] == "against always flat, as there is no champion: both earned the same on every day"
    assert reasons[4] == "against run1_epoch3.pt: both earned the same on every day"
    assert [line["trials"] for line in training.ledger] == [1, 2, 3, 4, 5, 6]
    for line in training.ledger:
        assert np.datetime64(line["first"], "ns").astype(np.int64) > training.trained_until_ns
        assert (line["days"], line["symbols"]) == (12, 2)
        assert set(line["pooled"]) >= {"policy", "buy and hold", "always flat", "momentum"}
        assert ("champion" in line["pooled"]) == (line["champion"] is not None)
    # A policy that always holds is the market: better than cash, not better than buying and holding.
    assert training.ledger[2]["verdict_reason"].startswith("not above buy and hold")
    output = training.output
    assert (
        "Champion: run1_epoch3.pt from now on (the best so far, not proven), against always flat, " in output
    )
    assert "Champion: still run1_epoch3.pt (the best so far, not proven), against run1_epoch3.pt: -" in output
    assert "Power: 12 days after 6 trials show a true Sharpe of 5 in " in output


def test_a_champion_loses_its_title_when_its_record_says_so(training: Training) -> None:
    training.hold("long")
    training.examine()
    loss = {str(np.datetime64("2026-01-01") + day): 0.99 - 0.001 * (day % 5) for day in range(40)}
    kept = record.read(training.folder)
    kept.append([{"kind": "scored", "champion": "run1_epoch1.pt", "days": {"policy": loss}}], {})
    training.hold("short")
    exam = training.examine()
    assert training.best is None and (training.folder / champion.DETHRONED).exists()
    line = training.ledger[-1]
    assert (line["decision"], line["dethroned"], line["claim"]) == ("refused", "run1_epoch1.pt", None)
    assert "Champion: none from now on, against always flat, as run1_epoch1.pt lost the title, with " in (
        training.output
    )
    # Killed before the ledger had the line: the next start completes it.
    path = training.folder / ledger.NAME
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    champion.apply_decision(training.checkpoint(exam))
    assert path.read_bytes() == whole and training.best is None
    training.hold("long")
    training.examine()
    assert training.best == (1, 3) and training.ledger[-1]["dethroned"] is None


def test_the_champion_is_an_ordinary_checkpoint_and_survives_pruning(training: Training) -> None:
    for what in ("long", "short", "short", "short"):
        training.hold(what)
        exam = training.examine()
    assert [path.name for path in checkpoint.existing(training.folder)] == [
        "run1_epoch4.pt",
        "run1_epoch3.pt",
    ]
    assert training.best == (1, 1)
    trained = TrainedPolicy.read(training.folder / checkpoint.BEST, Settings)
    assert trained.policy.head.logits.bias.tolist() == [0.0, 0.0, 9.0]
    saved, warnings = checkpoint.newest(training.folder)
    assert saved is not None and saved.path.name == "run1_epoch4.pt" and not warnings
    assert saved.exam["line"]["decision"] == "refused"
    assert set(saved.exam["symbols"]) == {"AAA", "BBB"}
    assert saved.trained_until_ns == training.trained_until_ns
    assert saved.metrics["exam/champion_percent"] == exam.figures["exam/champion_percent"] > 0


def test_an_exam_says_which_days_it_scores_on_other_bars_and_earlier_lines_stay(training: Training) -> None:
    training.progress.cutoff_ns = int(training.bars[0].open_time[-1]) + DAY_NS
    training.examine("yahoo")
    training.examine("yahoo")
    assert [line["revised"] for line in training.ledger] == [[], []]
    before = (training.folder / ledger.NAME).read_bytes()
    day = str(list(training.ledger[0]["bars"])[-2])  # Polygon's file of this day takes Yahoo's place
    bars = training.bars[0]
    is_new = bars.open_time.astype("datetime64[ns]").astype("datetime64[D]").astype(str) == day
    polygon = replace(bars, volume=np.where(is_new, bars.volume + 1, bars.volume))
    market = market_of(
        polygon, training.bars[1], holdout_start_ns=training.trained_until_ns, context_bars=4, horizon=8
    )
    training.trainer.set_market(market)
    exam = training.examine("polygon")
    first, _, third = training.ledger
    assert third["revised"] == [day] and exam.figures["exam/revised_days"] == 1
    assert third["revision"] != first["revision"] and third["bars"].keys() == first["bars"].keys()
    assert f"Bars: those of {day} are others than an earlier exam scored" in training.output
    assert f"bars {third['revision']})" in exam.lines[0]
    assert (training.folder / ledger.NAME).read_bytes().startswith(before)


def test_the_days_are_new_to_challenger_and_champion(training: Training) -> None:
    training.hold("long")
    training.examine()
    # Later ends of training: of the challenger, then of the champion.
    training.progress.trained_until_ns += 2 * DAY_NS
    training.examine()
    days = [line["days"] for line in training.ledger]
    assert days[1] == days[0] - 2
    path = training.folder / checkpoint.BEST
    contents = torch.load(path, weights_only=True)
    torch.save(contents | {"trained_until_ns": training.trained_until_ns + 3 * DAY_NS}, path)
    training.examine()
    assert training.ledger[2]["days"] == days[0] - 3
    torch.save(contents | {"trained_until_ns": training.trained_until_ns + 12 * DAY_NS}, path)
    assert training.examine() == training.examine() == Exam()
    assert training.output.count("No exam: no symbol has 10 bars in a row after") == 1
    assert len(training.ledger) == 3


def test_the_champion_walks_again_only_when_something_changed(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    original = champion.read
    monkeypatch.setattr(champion, "read", lambda path, *others: read.append(path) or original(path, *others))
    training.hold("long")
    figures = [training.examine().figures for _ in range(4)]
    assert len(read) == 1
    assert figures[1]["exam/champion_percent"] == figures[3]["exam/champion_percent"]
    training.examine(data="other bars")
    assert len(read) == 2


def test_a_repeated_epoch_is_one_trial(training: Training) -> None:
    training.hold("long")
    training.examine()
    training.examine()
    before = (training.folder / ledger.NAME).read_bytes()
    training.progress.epoch -= 1  # its checkpoint was damaged
    training.hold("short")
    exam = training.examine()
    assert exam.figures["exam/trials"] == 2
    assert (training.folder / ledger.NAME).read_bytes() == before
    assert training.best == (1, 1)
    assert "decided before, this exam is already in the ledger" in training.output


def test_a_kill_between_the_checkpoint_and_the_ledger_loses_no_decision(training: Training) -> None:
    training.hold("long")
    saved = training.checkpoint(training.examine())
    path = training.folder / ledger.NAME
    whole = path.read_bytes()
    for on_disk, has_best in ((whole[:-40], True), (b"", True), (b"", False)):
        path.write_bytes(on_disk)
        if not has_best:
            (training.folder / checkpoint.BEST).unlink()
        for _ in range(2):
            champion.apply_decision(saved)
            assert path.read_bytes() == whole
            assert training.best == (1, 1)
    champion.apply_decision(replace(saved, exam={}))
    assert path.read_bytes() == whole
    assert "Warning" not in training.output


def test_a_file_system_without_links_gets_a_copy(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    training.hold("long")
    training.examine()
    assert training.best == (1, 1)
    assert (training.folder / checkpoint.BEST).stat().st_nlink == 1


def test_a_full_disk_is_a_warning_and_a_refusal(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    training.hold("long")
    with monkeypatch.context() as patch:
        patch.setattr(champion, "_put_in_place", full)
        training.examine()
    (line,) = training.ledger
    assert (line["decision"], line["reason"]) == (
        "refused",
        "best.pt was not written: No space left on device",
    )
    assert training.best is None
    output = training.output
    assert "Warning: run1_epoch1.pt should have become the champion, but best.pt was not written" in output
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "append", full)
        training.examine()
    assert "ledger.jsonl was not written: No space left on device" in training.output
    assert len(training.ledger) == 1


def test_lines_that_a_full_disk_refused_follow_in_order(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saved = []
    for what in ("long", "short"):
        training.hold(what)
        saved.append(training.checkpoint(training.examine()))
    path, pending = training.folder / ledger.NAME, []
    whole = path.read_bytes()
    path.unlink()
    (training.folder / checkpoint.BEST).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "append", full)
        for _ in range(2):
            champion.apply_decision(saved[0], pending)
    assert training.output.count("the next checkpoint tries again") == 2
    assert not path.exists() and training.best == (1, 1)
    champion.apply_decision(saved[1], pending)
    assert path.read_bytes() == whole
    assert pending == [] and "Warning" not in training.output


def test_removing_one_of_two_links_is_not_counted_as_freed_space(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    for what in ("long", "short"):
        training.hold(what)
        training.examine()
    before = sorted(path for path in training.folder.rglob("*.pt"))
    old_state = training.folder / checkpoint.RESUME / "run1_epoch1.pt"
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=0, total=1))
    with pytest.raises(OSError, match="the disk is full"):
        checkpoint._make_room(training.folder, old_state.stat().st_size + 1, None)
    assert sorted(path for path in training.folder.rglob("*.pt")) == before
    assert "Warning" not in training.output


def test_a_request_to_stop_now_aborts_an_exam(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    training.hold("long")
    monkeypatch.setattr(Control, "stop_level", STOP_NOW)
    assert training.examine() == Exam()
    assert "No exam: asked to stop" in training.output
    assert training.ledger == [] and training.best is None
    assert Checkpoint.read(training.folder / "run1_epoch1.pt").exam == {}


def test_an_exam_that_takes_too_long_is_given_up(training: Training) -> None:
    training.hold("long")
    training.examiner = Examiner(training.folder, training.trainer.ranks, Control(), max_seconds=0.0)
    assert training.examine() == Exam()
    assert "Warning: No exam: not done after exam_minutes=0; raise that, or lower" in training.output
    assert training.ledger == [] and Checkpoint.read(training.folder / "run1_epoch1.pt").exam == {}
    training.examiner = Examiner(training.folder, training.trainer.ranks, Control(), max_seconds=600.0)
    training.examine()
    assert training.best == (1, 2)


def test_a_ledger_that_cannot_be_read_is_a_warning(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    training.hold("long")
    monkeypatch.setattr(ledger, "read", refused)
    assert training.examine() == Exam()
    output = training.output
    assert "Warning: No exam: " in output and "ledger.jsonl cannot be read: Input/output error" in output
    assert "Saved " in output and training.best is None


def test_a_save_between_two_epochs_keeps_the_exam_and_one_within_an_epoch_has_none(
    training: Training,
) -> None:
    training.hold("long")
    exam = training.examine()
    asked = itertools.count()
    for step, kept in ((0, exam.record), (1, {})):
        if step:
            rollout = training.trainer.collect()
            assert training.trainer.update(rollout, lambda: next(asked) == 1) is None
        with training.writer() as writer:
            writer.save(training.checkpoint(exam))
        assert Checkpoint.read(training.folder / checkpoint.name_of(1, 1, step)).exam == kept


def test_a_champion_that_cannot_be_compared_is_left_alone(training: Training) -> None:
    training.hold("long")
    training.examine()
    best = training.folder / checkpoint.BEST
    contents = torch.load(best, weights_only=True)
    features = contents["features"] | {"mean": contents["features"]["mean"] + 1}
    for change, reason in (
        ({"features": features}, "was trained with other features"),
        ({"config": contents["config"] | {"context_bars": 5}}, "was trained with other context_bars"),
        ({"format": 0}, "has format 0"),
    ):
        torch.save(contents | change, best)
        before = best.read_bytes()
        training.examine()
        assert best.read_bytes() == before
        assert reason in training.ledger[-1]["reason"]
        assert "move it away to let another one take its place" in training.ledger[-1]["reason"]
    # Damaged after it was read: only other bars cause it to be read again.
    torch.save(contents, best)
    training.examine()
    status = best.stat()
    with best.open("r+b") as file:
        file.seek(status.st_size // 2)
        file.write(bytes(64))
    os.utime(best, ns=(status.st_atime_ns, status.st_mtime_ns))
    training.examine(data="other bars")
    assert "is damaged" in training.ledger[-1]["reason"]
    best.write_bytes(b"torn")
    training.examine()
    assert "is not a checkpoint of this program" in training.ledger[-1]["reason"]
    assert best.read_bytes() == b"torn"


def test_an_exam_draws_nothing_and_moves_no_account(training: Training) -> None:
    training.hold("long")
    training.examine()
    training.trainer.env.cost_scale = 0.25
    state, accounts = torch.get_rng_state(), training.trainer.env.state_dict()
    training.examine()
    assert torch.equal(torch.get_rng_state(), state)
    after = training.trainer.env.state_dict()
    assert torch.equal(after["generator"], accounts["generator"]) and after["symbols"] == accounts["symbols"]
    assert torch.equal(after["totals"], accounts["totals"])
    assert training.trainer.env.cost_scale == 0.25


def test_an_exam_says_what_its_trades_earn_and_which_opens_are_no_prices(
    training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    training.hold("long")
    exam = training.examine()
    assert ", gross +" in exam.lines[0] and "of equity traded a bar, break-even at " in exam.lines[0]
    margin, figures = exam.record["line"]["margin"], exam.figures
    assert figures["exam/gross_bps"] == margin["gross_bps"] > figures["exam/net_bps"] == margin["net_bps"]
    assert figures["exam/break_even_bps"] == margin["break_even_bps"] > 0
    assert "repeat the previous close" not in caplog.text
    quotes = training.trainer.env.market.quotes
    quotes[1:, 0] = quotes[:-1, 1]
    for data in ("e", "f"):
        training.examine(data)
    assert caplog.text.count("repeat the previous close") == 1


def test_nothing_held_out_is_one_line(training: Training) -> None:
    training.progress.trained_until_ns = int(training.bars[0].open_time[-1])
    assert training.examine() == training.examine() == Exam()
    assert training.output.count("No exam: ") == 1
    assert training.ledger == []
    assert Checkpoint.read(training.folder / "run1_epoch2.pt").exam == {}
