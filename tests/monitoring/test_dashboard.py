"""The dashboard: fits every terminal, and shows the recorded metrics."""

from __future__ import annotations

import io
import itertools
import re
import time
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console as RichConsole

from monitoring import health, summary
from monitoring.dashboard import ASCII, UNICODE, Painter, render
from monitoring.figures import LEARNING, REWARD, SPEED
from monitoring.format import age, duration, size, sparkline
from monitoring.machine import Disk, Gauges, Machine
from monitoring.state import EXAM, DashboardState, Task
from tests.monitoring.nvml import Nvml
from tests.monitoring.test_health import HEALTHY
from tests.program import (
    CONTROL_SEQUENCE,
    ROOT,
)

SIZES = list(itertools.product((200, 100, 60, 33, 12, 1), (60, 40, 24, 13, 5, 1)))
NOW_NS = 1_767_225_600 * 10**9


def row(epoch: int, **changes: Any) -> dict[str, Any]:
    """Metrics of an epoch of 10 s: rollout 2, update 7, checkpoint 0.5, other 0.5."""
    times = {"epoch": 10.0, "data": 0.0, "rollout": 2.0, "update": 7.0, "evaluation": 0.0, "checkpoint": 0.5}
    figures = {
        **HEALTHY,
        "epoch": epoch,
        "transitions": 65_536 * epoch,
        "rollout/reward_bps": -1.0 + 0.1 * epoch,
        "rollout/episode_return_percent": -0.5,
        "perf/mfu": 0.41,
        "perf/episodes_per_second": 61.5,
        **{f"perf/{name}_seconds": seconds for name, seconds in times.items()},
    }
    return figures | changes


def full_state(epochs: int = 37) -> DashboardState:
    """A training with everything that can be shown."""
    state = DashboardState(epochs=200, checkpoint_every=25, keep_checkpoints=16, device="2 x cuda")
    state.begin(3, 0, 0)
    state.newest_ns = {"polygon": NOW_NS - 3_600 * 10**9, "binance": NOW_NS - 90 * 10**9}
    state.symbols = {"polygon": 32, "binance": 26}
    for epoch in range(1, epochs + 1):
        state.add_epoch(row(epoch, run=3), [])
    ill = row(epochs + 1, run=3, **{"ppo/approx_kl": 0.31, "exam/sharpe": 1.25})
    state.add_epoch(ill, health.findings([ill]))
    state.add_line("Saved checkpoints/run3_epoch25.pt")
    state.add_line(
        "Warning: yahoo: limits its rates for now, and this is a line that is very long indeed " * 3, True
    )
    state.add_line("\x1b[31mno colours\x07 of others")
    state.tasks["binance"] = Task("binance", "month files", 26, 12, 4_500_000)
    gpus = Gauges(Nvml()).read().gpus
    state.machine = Machine(gpus, cpu=0.5, num_cores=16, memory_used=9e9, memory_total=1e11)
    state.disk, state.phase = Disk(5e9, 21e9, 4, 5e9, 3e9), "update"
    return replace(state.snapshot(), now_ns=NOW_NS)


def text_of(state: DashboardState, width: int = 100, height: int = 50) -> list[str]:
    return [line.plain for line in render(state, width, height)]


def value_of(lines: list[str], label: str) -> str:
    """Return the value beside a label, without bar or curve."""
    (found,) = re.findall(rf"(?:^|  ) {re.escape(label)}  +(\S+(?: [%a-zA-Z]+)?)", "\n".join(lines), re.M)
    return found


# --- what is shown ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("glyphs", [UNICODE, ASCII])
@pytest.mark.parametrize("epochs", [0, 1, 37, 600])
def test_it_fits_every_terminal(epochs: int, glyphs: Any) -> None:
    state = full_state(epochs)
    for width, height in SIZES:
        lines = render(state, width, height, glyphs)
        assert 1 <= len(lines) <= height
        assert max(line.cell_len for line in lines) <= width, (width, height)


def test_it_fits_before_there_is_anything_to_show() -> None:
    state = DashboardState()
    for width, height in SIZES:
        lines = render(state, width, height)
        assert 1 <= len(lines) <= height and max(line.cell_len for line in lines) <= width
    assert "starting" in "\n".join(text_of(state))


@pytest.mark.parametrize(("width", "height"), [(100, 50), (60, 80), (200, 50)])
def test_the_figures_are_those_of_the_metrics(width: int, height: int) -> None:
    state = full_state()
    figures, lines = state.metrics, text_of(state, width, height)
    assert value_of(lines, "reward bp/bar") == f"{figures['rollout/reward_bps']:+.3f}"
    assert value_of(lines, "policy's change") == "0.3100"
    assert value_of(lines, "choices clipped") == "10.0%"
    assert value_of(lines, "indecision") == "0.700"
    assert value_of(lines, "critic explains") == "+5.0%"
    assert value_of(lines, "steps skipped") == "0"
    assert value_of(lines, "idle units") == "2.0%"
    assert value_of(lines, "decisions/s") == "10,000"
    assert value_of(lines, "episodes/s") == "61.5"
    assert value_of(lines, "of peak speed") == "41%"
    assert value_of(lines, "Sharpe, per year") == "+1.25"
    assert value_of(lines, "rollout") == "2.00 s"
    assert value_of(lines, "update") == "7.00 s"
    assert value_of(lines, "checkpoint") == "0.50 s"
    assert value_of(lines, "other") == "0.50 s"
    assert value_of(lines, "polygon") == "60 min"
    assert value_of(lines, "disk free") == "5 GB"
    assert value_of(lines, "checkpoints") == "21 GB"
    page = "\n".join(lines)
    assert "run 3" in page and "epoch 38/200" in page and f"{65_536 * 38:,} transitions" in page
    assert "4, up to 38 GB" in page  # 16 of 2 GB, two with 3 GB more
    assert "32 symbols" in page and "learning" in page and "12 of 26" in page


def test_every_gpu_has_its_line() -> None:
    lines = [line for line in text_of(full_state(), 200, 50) if "GPU " in line]
    assert len(lines) == 2
    assert "GPU 0 H200" in lines[0] and "62/141 GB" in lines[0] and "412 W" in lines[0] and "61 C" in lines[0]
    assert "98%" in lines[1] and "412 W" in lines[1] and not re.search(r"\d C\b", lines[1])


def test_findings_are_shown_in_words_and_in_yellow() -> None:
    state = full_state()
    for width in (100, 60):
        lines = render(state, width, 40)
        words = " ".join(line.plain for line in lines)
        assert "large policy update, approx_kl 0.31 is above 0.1" in re.sub(r"\s+", " ", words)
        yellow = [
            line.plain
            for line in lines
            if any("yellow" in str(span.style) for span in line.spans) or "yellow" in str(line.style)
        ]
        assert any("policy's change" in line for line in yellow)
        assert any("yahoo" in line for line in yellow)
    short = replace(state, disk=Disk(9e9, 21e9, 4, 5e9))
    assert "the disk is nearly full" in "\n".join(text_of(short))
    assert "Attention" not in "\n".join(text_of(replace(state, findings=(), lines=[], disk=Disk())))


@pytest.mark.parametrize("width", range(32, 110, 2))
def test_no_figure_is_cut(width: int) -> None:
    state = replace(full_state(), tasks={}, findings=(), lines=[])
    body = [line for line in text_of(state, width, 60) if not line.lstrip().startswith("run ")]
    assert not [line for line in body if "\u2026" in line]


def test_a_small_terminal_keeps_what_matters() -> None:
    page = "\n".join(text_of(full_state(), 80, 24))
    for word in ("epoch 38/200", "reward bp/bar", "policy's change", "Attention", "rollout", "Log"):
        assert word in page


def test_times_left_follow_from_the_pace() -> None:
    state = replace(full_state(), epoch_began=100.0, now=104.0)
    assert state.pace == 10.0
    page = "\n".join(text_of(state))
    assert "epoch 0:06 left" in page
    assert f"run {duration(6 + 161 * 10)} left" in page  # of 200 epochs 38 are done
    assert f"checkpoint in 12 epochs, {duration(6 + 11 * 10)}" in page
    late = replace(state, now=130.0)
    assert "epoch takes longer than usual" in "\n".join(text_of(late))
    last = replace(state, epoch=199)
    assert "checkpoint in 1 epoch, 0:06" in "\n".join(text_of(last))


def test_times_left_count_the_exams_ahead_and_a_long_phase_says_for_how_long() -> None:
    rows = [row(epoch) for epoch in range(1, 38)]
    rows[24] |= {"perf/epoch_seconds": 130.0, "perf/evaluation_seconds": 120.0}
    state = replace(full_state(), history=rows, epoch=38, epoch_began=100.0, now=104.0)
    assert (state.pace, state.exam_seconds) == (10.0, 120.0)
    # Of 200 epochs exams follow after 50, 75, ..., 200.
    assert state.seconds_for(162) == 6 + 161 * 10 + 7 * 120
    assert state.seconds_for(11) == 6 + 10 * 10 and state.seconds_for(12) == 6 + 11 * 10 + 120
    examined = replace(state, epoch=49, now=200.0, phase="evaluation", phase_began=105.0)
    page = "\n".join(text_of(examined))
    assert "examining for 1:35" in page and "epoch 0:30 left" in page and "0:00 left" not in page
    uneven = replace(state, epochs=190, epoch=180)
    assert uneven.seconds_for(10) == 6 + 9 * 10 + 120


def test_an_exam_under_way_says_how_long_it_takes_itself() -> None:
    exam = Task(EXAM, "segments", 400, done=100, began=time.monotonic() - 60.0)
    rows = [row(epoch) for epoch in range(1, 25)]  # none of them has held an exam
    state = replace(full_state(), history=rows, epoch=24, epoch_began=100.0, now=200.0, phase="evaluation")
    words = " ".join(" ".join(text_of(state)).split())
    assert "epoch takes longer than usual" in words and "0:00 left" not in words  # nothing is known of it
    state.tasks = {EXAM: exam}
    words = " ".join(" ".join(text_of(state)).split())
    # A busy machine draws it a little later.
    assert re.search(r"epoch 3:[012]\d left", words), words
    assert "exam 25% 100 of 400 seg" in words
    assert 179 < state.seconds_for(1) < 210 and "examining (25%)" in summary.facts(state)[0].text


def test_the_last_epoch_of_a_run_never_says_that_nothing_is_left() -> None:
    state = replace(full_state(), epoch=199, epoch_began=100.0, now=400.0, phase="evaluation", tasks={})
    words = " ".join(" ".join(text_of(state)).split())
    assert "epoch takes longer than usual" in words and "checkpoint in 1 epoch" in words
    assert "0:00 left" not in words and "epoch, 0:00" not in words and "? left" not in words


def test_the_bar_counts_exams() -> None:
    rows = [row(epoch) for epoch in range(1, 25)]
    state = replace(full_state(), history=rows, epochs=100, epoch=50, epoch_began=100.0, now=100.0, tasks={})
    assert state.share_done == pytest.approx(0.5)
    rows[-1] |= {"perf/epoch_seconds": 1_010.0, "perf/evaluation_seconds": 1_000.0}
    late = replace(state, epoch=98)
    assert late.share_done == pytest.approx(1 - (2 * 10 + 1_000) / (100 * 10 + 4 * 1_000))
    assert 0 < late.share_done < 98 / 100


def test_every_label_is_explained() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for figure in (*REWARD, *LEARNING, *SPEED):
        assert f"{figure.label} (`{figure.metric}`" in text, figure.label


def test_of_a_training_that_is_gone_nothing_is_foretold() -> None:
    gone = replace(full_state(), silence=300.0)
    for width in (100, 60):
        page = text_of(gone, width, 40)
        words = " ".join(" ".join(page).split())
        assert re.search(r"not running: its last sign of life was \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", words)
        assert " left" not in words and "learning for" not in words


def test_the_reward_says_which_share_of_the_costs_it_bears() -> None:
    early = replace(full_state(), history=[row(1, **{"rollout/cost_scale": 0.29})])
    assert "Reward, at 29% of the costs" in "\n".join(text_of(early))
    assert "of the costs" not in "\n".join(text_of(full_state()))


def test_the_verdict_is_said_in_full_on_every_width() -> None:
    measures = {"total_return": 0.021, "sharpe": 1.9, "sharpe_interval": [-0.2, 3.1]}
    exam = {
        "run": 1,
        "epoch": 25,
        "verdict": "no edge",
        "verdict_reason": "its mean day is not surely above 0",
    }
    exam |= {"pooled": {"policy": measures, "buy and hold": {"total_return": 0.087}}}
    exam |= {"checkpoint": "run1_epoch25.pt", "decision": "promoted", "time": "2026-11-25T10:00:00+00:00"}
    state = replace(full_state(), exams=[exam])
    for width in (100, 80, 60):
        words = " ".join(" ".join(text_of(state, width, 50)).split())
        assert "No edge: its mean day is not surely above 0" in words
        assert "policy +2.1%, buy and hold +8.7%, Sharpe 1.9 [-0.2, 3.1]" in words
        assert "Champion: run1_epoch25.pt since 2026-11-25 10:00 UTC" in words


def test_the_first_epoch_of_a_start_sets_no_pace() -> None:
    slow_first = [row(1, **{"perf/epoch_seconds": 300.0, "perf/data_seconds": 200.0}), row(2), row(3)]
    assert replace(full_state(), history=slow_first).pace == 10.0
    assert replace(full_state(), history=slow_first[:1]).pace == 9.0  # at least rollout and update


def test_a_long_exam_shows_its_main_metrics() -> None:
    figures = {f"exam/figure_{number}": 1.0 for number in range(20)}
    examined = row(3, **figures, **{"exam/sharpe": 0.5, "exam/return_percent": -1.5})
    lines = text_of(replace(full_state(), history=[examined, row(4)]), 100, 60)
    assert value_of(lines, "return, %") == "-1.5" and value_of(lines, "Sharpe, per year") == "+0.5"
    assert sum(" figure " in line for line in lines) == 6


def test_a_stop_request_is_shown() -> None:
    state = DashboardState(stopping="Stopping after this epoch")
    assert "Stopping after this epoch" in "\n".join(text_of(state))


def test_epochs_done_again_are_not_shown_twice() -> None:
    state = DashboardState()
    for epoch in (1, 2, 3, 2, 3):
        state.add_epoch(row(epoch), [])
    assert [metrics["epoch"] for metrics in state.history] == [1, 2, 3]


def test_missing_metrics_have_no_row_and_broken_ones_are_not_finite() -> None:
    broken = row(4, **{"loss/entropy": float("nan"), "ppo/approx_kl": None})
    del broken["perf/mfu"], broken["perf/epoch_seconds"]
    lines = text_of(replace(full_state(), history=[row(3), broken]))
    assert value_of(lines, "policy's change") == value_of(lines, "indecision") == "not finite"
    assert not [line for line in lines if "of peak speed" in line]


def test_what_is_measured_now_and_then_keeps_its_row_in_between() -> None:
    measured = row(3, **{"plasticity/weight_norm": 12.5})
    lines = text_of(replace(full_state(), history=[measured, *map(row, range(4, 13))]))
    assert value_of(lines, "weights' size") == "12.5"


def test_without_unicode_all_of_it_is_ascii() -> None:
    terminal = RichConsole(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), force_terminal=True)
    lines = Painter(terminal)(full_state(), 100, 50)
    assert all(line.isascii() for line in lines)
    terminal = RichConsole(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), force_terminal=True)
    assert not all(line.isascii() for line in Painter(terminal)(full_state(), 100, 50))


def test_painted_lines_are_those_that_were_laid_out() -> None:
    terminal = RichConsole(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), force_terminal=True)
    painted = Painter(terminal)(full_state(), 100, 50)
    assert [CONTROL_SEQUENCE.sub("", line).rstrip() for line in painted] == [
        line.rstrip() for line in text_of(full_state())
    ]
    assert not any("\x07" in line or "\x1b[31mno" in line for line in painted)


def test_curves_run_from_lowest_to_highest() -> None:
    levels = "01234567"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 20, levels) == "01234567"
    assert sparkline([1, 1, 1], 20, levels) == "000"
    assert sparkline([0, None, 7], 20, levels) == "0 7"
    assert sparkline([0, 2, 12, 16], 2, levels) == "07"  # means 1 and 14
    assert (
        sparkline([None, None], 20, levels) == sparkline([], 20, levels) == sparkline([1.0], 0, levels) == ""
    )


def test_durations_ages_and_sizes() -> None:
    assert [duration(s) for s in (None, 0, 59.6, 3_599, 3_600, 90_061)] == [
        "?",
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "1 d 01:01",
    ]
    assert [age(s) for s in (-5, 119, 120, 7_199, 7_200, 172_800)] == [
        "0 s",
        "119 s",
        "2 min",
        "120 min",
        "2 h",
        "2 days",
    ]
    assert [size(b) for b in (0, 999, 1_000, 12_345_678, 5e9, 1.5e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "12.3 MB",
        "5 GB",
        "1.5 TB",
    ]
