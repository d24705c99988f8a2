"""What is worth a message is found once, when it happens, and not when it was there before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from monitoring.events import TITLES, Event, Watcher
from monitoring.machine import Disk
from monitoring.state import DashboardState
from tests.monitoring.published_training import exam

BEFORE = DashboardState(epochs=200, run=2, epoch=10, exams=[exam(25)], newest_ns={"yahoo": 10**18})
SHORT = Disk(free=1e9, checkpoints=5e9, num_checkpoints=5, newest=1e9)
EDGE: dict[str, Any] = {"verdict": "edge", "verdict_reason": "surely above 0"}


def events(before: DashboardState, *after: DashboardState) -> list[Event]:
    watcher = Watcher(before)
    return [event for state in after for event in watcher.new(state)]


@pytest.mark.parametrize(
    ("changes", "kinds", "words"),
    [
        ({}, [], ""),
        ({"exams": [exam(25), exam(50)]}, [], ""),
        ({"exams": [exam(25), exam(50, decision="promoted")]}, ["champion"], "run1_epoch50.pt"),
        ({"exams": [exam(25), exam(50, **EDGE)]}, ["edge_found"], "surely above 0"),
        ({"days_late": {"yahoo": 1.5}}, ["source_dead"], "yahoo: newest bar"),
        ({"days_late": {"yahoo": 0.5}}, [], ""),
        ({"disk": SHORT}, ["disk_short"], "lower keep_checkpoints"),
        ({"rollbacks": 1}, ["rollback"], "0.5 of the learning rate"),
        ({"epoch": 200}, ["run_complete"], "Run 2 of 200 epochs. No edge: its mean day"),
        ({"run": 3, "epoch": 1}, ["run_complete"], "Run 2"),
    ],
)
def test_it_is_found_once(changes: dict[str, Any], kinds: list[str], words: str) -> None:
    state = replace(BEFORE, **changes)
    found = events(BEFORE, BEFORE, state, state)
    assert [event.kind for event in found] == kinds
    assert all(words in event.text and event.title == TITLES[event.kind] for event in found)
    assert events(state, state) == []  # known when the watch began


def test_a_run_is_complete_once_and_so_is_the_next() -> None:
    states = [replace(BEFORE, run=run, epoch=epoch) for run, epoch in ((2, 200), (3, 0), (3, 200), (4, 1))]
    found = events(BEFORE, *states)
    assert [(event.kind, event.text[:5]) for event in found] == [
        ("run_complete", "Run 2"),
        ("run_complete", "Run 3"),
    ]


@pytest.mark.parametrize(("run", "epoch"), [(1, 0), (3, 0), (3, 7)])
def test_a_training_that_begins_or_goes_on_brings_no_news(run: int, epoch: int) -> None:
    published_first = DashboardState(epochs=200)
    begun = replace(BEFORE, run=run, epoch=epoch, rollbacks=1, exams=[exam(25, decision="promoted", **EDGE)])
    assert events(published_first, published_first, begun) == []
    assert [
        event.kind
        for event in events(published_first, begun, replace(begun, run=run + 1, epoch=0, rollbacks=0))
    ] == ["run_complete"]


def test_an_edge_that_is_lost_and_a_rollback_of_the_next_run() -> None:
    had = replace(BEFORE, exams=[exam(25, **EDGE)], rollbacks=2)
    lost = replace(had, exams=[exam(25, **EDGE), exam(50)])
    assert [event.kind for event in events(had, lost)] == ["edge_lost"]
    found = events(
        had, replace(had, rollbacks=3), replace(had, run=3, rollbacks=0), replace(had, run=3, rollbacks=1)
    )
    assert [(event.kind, event.count) for event in found] == [
        ("rollback", 3),
        ("run_complete", 1),
        ("rollback", 1),
    ]


def test_a_source_that_comes_back_may_die_again() -> None:
    dead, alive = replace(BEFORE, days_late={"yahoo": 2.0}), BEFORE
    assert [event.kind for event in events(BEFORE, dead, alive, dead)] == ["source_dead"] * 2
