"""A walk of accounts over groups: the daemon's record says the same, and a stop changes no window."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import exp
from pathlib import Path
from typing import Any

import pytest

from commands.walkforward import training
from commands.walkforward.book import Book
from continuous_training import Settings, train
from evaluation import plots, record
from evaluation.baselines import BUY_AND_HOLD
from evaluation.exam import POLICY, at_flat_cost
from evaluation.record_summary import describe
from evaluation.walk_summary import summarize
from runtime.control import ExitProgram
from tests.commands import hourly
from tests.commands.test_walkforward import OPTIONS, STRENGTH, files_of, settings_in, walk
from tests.evaluation.reports import Page


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    hourly.plant(monkeypatch, strength=STRENGTH)
    monkeypatch.setattr(plots, "as_png", lambda _: b"")
    monkeypatch.setattr(plots, "as_svg", lambda *_: "<svg/>")


def pairs_in(folder: Path) -> Settings:
    return settings_in(folder, account="pair", simulated_symbols=3, net_exposure=0.5, epochs=2)


def test_what_was_traded_is_to_the_bit_what_the_daemons_record_says(tmp_path: Path) -> None:
    book = walk(tmp_path, pairs_in(tmp_path), first_day="2026-01-22")
    kept = record.read(training.training_in(tmp_path / "walk"))
    (scored,) = [line for line in kept.lines if line["kind"] == "scored"]  # at the start of the second run
    assert not kept.faults and scored["champion"] == book.results[0]["champion"]
    assert kept.lines[0]["group"] == {"size": 2, "gross": 1.0, "net": 0.5}
    for name in (POLICY, BUY_AND_HOLD):
        assert scored["days"][name] == book.results[0]["days"][name]
        accounts = json.loads(json.dumps({key: asdict(own) for key, own in kept.accounts[name].items()}))
        assert accounts == book.results[0]["accounts"][name]
    assert "on 2 groups by run1_epoch" in describe(scored)
    assert sum(row["traded"] for result in book.results for row in result["symbols"].values()) > 1
    # Stitched from windows, the accounts are those that stand at the end.
    summary = summarize(book.results, OPTIONS.costs_bps)
    assert summary is not None and len(summary.ladder) == 3
    final = book.results[-1]["accounts"]
    assert {key: own["symbols"] for key, own in final[POLICY].items()} == {
        "group 1": ["SIM0", "SIM1"],
        "group 2": ["SIM2", "SIM0"],
    }
    assert summary.measures[POLICY].total_return == pytest.approx(_mean_growth(final[POLICY]))
    assert dict(summary.ladder)[2.0] == pytest.approx(_mean_growth(final[at_flat_cost(POLICY, 2.0)]))
    page = Page((tmp_path / "report" / "walkforward_walk" / "walkforward.html").read_bytes())
    assert "Group 2: SIM2, SIM0." in page.text


def _mean_growth(accounts: dict[str, Any]) -> float:

    return sum(exp(account["log_equity"]) for account in accounts.values()) / len(accounts) - 1


@pytest.mark.drill
def test_a_stop_changes_no_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(tmp_path / "whole", pairs_in(tmp_path / "whole"))
    reference, epochs = files_of(tmp_path / "whole"), 0

    def stops(settings: Settings, control: Any, **given: Any) -> None:
        def count() -> None:
            nonlocal epochs
            epochs += 1
            if epochs in (1, 5):  # in the first run, which begins again, and in the second one after its exam
                raise KeyboardInterrupt

        monkeypatch.setattr(control, "_on_epoch", count)
        train(settings, control, **given)

    for window in (1, 2):
        with pytest.raises(ExitProgram, match=f"Stopped in window {window} of 3"):
            walk(tmp_path / "stopped", pairs_in(tmp_path / "stopped"), loop=stops)
    book = walk(tmp_path / "stopped", pairs_in(tmp_path / "stopped"))
    assert isinstance(book, Book) and files_of(tmp_path / "stopped") == reference
