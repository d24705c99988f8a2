"""The background refresh: its result is used, its faults delay nothing, and it never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from data_sources.lake.quality import closed_before
from training import prefetch as prefetching
from training.prefetch import TOP_UP_SECONDS, Prefetch

ROOT = Path(__file__).resolve().parents[2]
ENTER = "import sys, time, json, os\nfrom runtime.background_process import be_background\nbe_background()\n"
TELL = (
    'print("noise")\n'
    'print(json.dumps({"now_ns": 42, "bars": "ab12", "warnings": ["Yahoo failed: no"]}), flush=True)\n'
)
HANG = "print('hangs', flush=True)\ntime.sleep(1000)\n"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def command(code: str) -> list[str]:
    return [sys.executable, "-c", ENTER + code]


@pytest.fixture
def start() -> Iterator[Callable[[str], Prefetch]]:
    made: list[Prefetch] = []

    def begin(code: str) -> Prefetch:
        made.append(Prefetch(command(code)))
        return made[-1]

    yield begin
    for prefetch in made:
        prefetch.__exit__()


def child_of(running: Prefetch) -> psutil.Process:
    assert running._child is not None
    return psutil.Process(running._child.pid)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_what_it_brought_is_taken_once_with_its_warnings(
    start: Callable[[str], Prefetch], caplog: pytest.LogCaptureFixture
) -> None:
    ahead = start(TELL)
    ahead.after_epoch(5)
    child_of(ahead).wait(60)
    assert ahead.take() == (42, "ab12")
    assert caplog.messages == ["Yahoo failed: no"]
    assert ahead.take() == (0, "")


def test_the_process_has_the_lowest_priority_and_a_session_of_its_own(
    start: Callable[[str], Prefetch],
) -> None:
    ahead = start("print(os.getpriority(os.PRIO_PROCESS, 0))\n" + HANG)
    ahead.after_epoch(5)
    child = child_of(ahead)
    while child.nice() != 19:
        time.sleep(0.01)
    assert os.getsid(child.pid) == child.pid != os.getsid(0)  # a terminal's Ctrl+C reaches our session only


def test_a_source_that_hangs_costs_the_next_run_seconds_and_is_said(
    start: Callable[[str], Prefetch], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetching, "PICK_UP_SECONDS", 0.2)
    ahead = start(HANG)
    ahead.after_epoch(5)
    child = child_of(ahead)
    before = time.time_ns()
    ready_ns, bars = ahead.take()
    assert closed_before(before) <= ready_ns <= time.time_ns() and bars == ""
    assert is_gone(child)
    assert caplog.messages == [
        "the background refresh is not done; this run takes the bars that have arrived"
    ]


LATER = 'print(json.dumps({"later_warning": "BTCUSDT 2026-09: odd"}), flush=True)\n'


def wait_for(true: Callable[[], bool]) -> None:
    while not true():  # the test's own time limit ends it
        time.sleep(0.01)


def test_a_process_that_goes_on_after_its_result_delays_no_run(
    start: Callable[[str], Prefetch], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetching, "PICK_UP_SECONDS", 60.0)
    ahead = start(TELL + LATER + HANG)
    ahead.after_epoch(5)
    child = child_of(ahead)
    began = time.monotonic()
    assert ahead.take() == (42, "ab12")  # as soon as it is told, without a wait for the process
    assert time.monotonic() - began < 30
    assert is_gone(child)
    assert caplog.messages[0] == "Yahoo failed: no"
    caplog.clear()

    ahead.after_epoch(5)
    wait_for(lambda: len(ahead._lines) == 4)
    assert ahead.take() == (42, "ab12")
    assert caplog.messages == ["Yahoo failed: no", "BTCUSDT 2026-09: odd"]


def test_what_goes_on_after_its_result_makes_room_for_the_next_refresh(
    start: Callable[[str], Prefetch], caplog: pytest.LogCaptureFixture
) -> None:
    ahead = start(TELL + LATER + HANG)
    now = 0.0
    ahead._clock = lambda: now
    ahead.after_epoch(20)
    first = child_of(ahead)
    wait_for(lambda: len(ahead._lines) == 4)
    now = TOP_UP_SECONDS
    ahead.after_epoch(1)
    assert is_gone(first)
    assert child_of(ahead).pid != first.pid
    ahead._command = command(HANG)
    assert ahead.take() == (42, "ab12")  # the first one's, if the second is not done
    assert caplog.messages == ["Yahoo failed: no", "BTCUSDT 2026-09: odd"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [("raise KeyError('x')", "KeyError: 'x'"), ("", "it printed nothing"), ("print('{}')", "{}")],
)
def test_a_failure_is_one_warning_and_the_caller_refreshes_itself(
    start: Callable[[str], Prefetch], caplog: pytest.LogCaptureFixture, code: str, expected: str
) -> None:
    ahead = start(code)
    ahead.after_epoch(5)
    child_of(ahead).wait(60)
    assert ahead.take() == (0, "")
    assert caplog.messages == [f"the background refresh failed: {expected}"]


def test_a_program_that_cannot_be_started_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with Prefetch(["/nowhere/python"]) as ahead:
        ahead.after_epoch(5)
        assert ahead.take() == (0, "")
    assert len(caplog.messages) == 1
    assert "No such file" in caplog.text


def test_leaving_ends_it(start: Callable[[str], Prefetch]) -> None:
    with start(HANG) as ahead:
        ahead.after_epoch(5)
        child = child_of(ahead)
    assert is_gone(child)


def test_it_dies_with_a_training_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom training.prefetch import Prefetch\n"
        "ahead = Prefetch(sys.argv[1:])\nahead.after_epoch(5)\n"
        "print(ahead._child.pid, flush=True)\ntime.sleep(1000)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, *command(HANG)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    child.wait(60)  # raises when it lives on


def test_it_starts_with_the_run_and_once_more_shortly_before_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    starts: list[float] = []
    ahead = Prefetch(["unused"], clock=lambda: now)
    monkeypatch.setattr(ahead, "_start", lambda at: (starts.append(at), ahead._starts.append(at)))
    for epoch in range(1, 201):
        now = epoch * 30.0  # a run of 100 minutes
        ahead.after_epoch(200 - epoch)
    assert starts == [30.0, 6000.0 - TOP_UP_SECONDS]
    assert ahead.take() == (0, "")
    ahead.after_epoch(0)  # the next run's bars are needed at once: nothing to fetch ahead
    assert len(starts) == 2


def test_other_ranks_and_the_simulated_market_fetch_nothing_ahead(caplog: pytest.LogCaptureFixture) -> None:
    with Prefetch(None) as ahead:
        ahead.after_epoch(5)
        assert ahead.take() == (0, "")
    assert caplog.messages == []
