"""The program on a terminal: the dashboard stays within its bounds, and neither end of it stops the training."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

from continuous_training import Settings
from monitoring.console import Console
from monitoring.metrics_file import read_metrics
from monitoring.screen import Screen
from runtime.control import ENTER, LEAVE, Control
from tests.monitoring.test_dashboard import row
from tests.program import (
    ALONE,
    CONTROL_SEQUENCE,
    PATIENCE,
    ROOT,
    SUPERVISED,
    Start,
    environment,
    is_same,
    metrics,
    tiny_flags,
    written_to,
)
from training.progress import TrainingProgress

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")


def frames(raw: str) -> list[str]:
    """Return each line that was drawn on the alternate screen, colours left out."""
    drawn = []
    for shown in raw.split(ENTER)[1:]:
        for part in re.split(r"\x1b\[\d+;1H", shown.split(LEAVE)[0])[1:]:
            drawn.append(CONTROL_SEQUENCE.sub("", part.split("\x1b[K")[0]))
    return drawn


def test_a_screen_that_ctrl_c_kept_from_starting_is_closed() -> None:
    taken: list[bool] = []

    def interrupt(is_taken: bool) -> None:
        taken.append(is_taken)
        if is_taken:
            raise KeyboardInterrupt

    screen = Screen(sys.__stdout__, lambda width, height: [], interrupt)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        screen.open()
    screen.close()
    assert taken == [True, False]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Start]:
    """A supervised training on a terminal of 100 x 40, ended with Ctrl+C."""
    folder = tmp_path_factory.mktemp("watched")
    start = Start(
        folder / "out",
        [*SUPERVISED, *tiny_flags(folder, checkpoint_every=4)],
        environment(COLUMNS="100", LINES="40", TERM="xterm-256color"),
        terminal=True,
    )
    try:
        start.wait_for("steps skipped").wait_for("Time per epoch").wait_for("run1_epoch8.pt")
        assert start.process.stdin is not None
        start.process.stdin.write(b"\x03")
        start.process.stdin.flush()
        start.ends()
        yield folder, start
    finally:
        start.kill()


@POSIX
def test_on_a_terminal_the_dashboard_is_drawn_within_its_bounds(watched: tuple[Path, Start]) -> None:
    # What the supervisor prints on a stop is not the dashboard's.
    drawn = frames(watched[1].raw.split("\x03")[0].split("^C")[0])
    assert any("Continuous Training" in line for line in drawn)
    assert max(map(cell_len, drawn)) <= 100
    assert {int(number) for number in re.findall(r"\x1b\[(\d+);1H", watched[1].raw)} == set(range(1, 41))


@POSIX
def test_ctrl_c_on_the_dashboard_finishes_the_epoch_and_restores_the_terminal(
    watched: tuple[Path, Start],
) -> None:
    folder, start = watched
    assert start.process.returncode == 0, start.output
    assert start.raw.count(ENTER) == start.raw.count(LEAVE) == 1
    assert start.raw.rindex("\x1b[?25h") > start.raw.rindex("\x1b[?25l")  # the cursor is shown
    after = CONTROL_SEQUENCE.sub("", start.raw.split(LEAVE)[-1])
    assert "Saved " in after and "Summary: " in after and "Newest checkpoint: " in after
    assert metrics(folder)


@POSIX
def test_the_dashboard_changes_no_weight_and_redirected_there_are_plain_ascii_lines(
    watched: tuple[Path, Start], tmp_path: Path
) -> None:
    words = [*ALONE, *tiny_flags(tmp_path, runs=1, checkpoint_every=4, log_level="debug")]
    start = Start(tmp_path / "out", words).ends_well()
    assert start.raw.isascii() and "\x1b" not in start.raw
    assert "run 1 epoch 8/8" in start.output and "perf/checkpoint_seconds=" in start.output
    with_it, without = (
        torch.load(folder / "checkpoints" / "run1_epoch8.pt", weights_only=True)["model"]
        for folder in (watched[0], tmp_path)
    )
    assert is_same(with_it, without)


@POSIX
def test_a_terminal_that_goes_away_does_not_end_the_training(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    words = [sys.executable, *ALONE, *tiny_flags(tmp_path, runs=1, epochs=20, checkpoint_every=1000)]
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(TERM="xterm"),
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""
    while ENTER.encode() not in seen:
        seen += os.read(ours, 65_536)
    os.close(ours)
    assert process.wait(timeout=PATIENCE) == 0
    assert metrics(tmp_path)[-1]["epoch"] == 20
    assert (tmp_path / "checkpoints" / "run1_epoch20.pt").exists()


@POSIX
@pytest.mark.parametrize("wanted", [True, False])
def test_a_terminal_without_dashboard_gets_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    ours, theirs = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with Console(tmp_path) as console:
            settings = Settings(dashboard=wanted, checkpoint_dir=str(tmp_path))
            console.begin_run(settings, TrainingProgress(), "1 x cpu", Control())
            console.show_epoch(row(1), 200)
    written = written_to(ours)
    os.close(ours)
    assert (ENTER in written) == (LEAVE in written) == wanted
    assert ("run 1 epoch   1/200" in written) != wanted


@POSIX
def test_a_terminal_stopped_with_ctrl_s_blocks_neither_the_training_nor_its_end(tmp_path: Path) -> None:
    code = (
        "import logging, sys, termios, time\n"
        "from pathlib import Path\n"
        "from continuous_training import Settings\n"
        "from monitoring import screen\n"
        "from monitoring.console import Console\n"
        "from runtime.control import Control\n"
        "from tests.monitoring.test_dashboard import row\n"
        "from training.progress import TrainingProgress\n"
        "screen.CLOSE_SECONDS = 1.0\n"
        "folder = Path(sys.argv[1])\n"
        "with Console(folder) as console:\n"
        "    console.begin_run(Settings(checkpoint_dir=str(folder)), TrainingProgress(), '1 x cpu', Control())\n"
        "    time.sleep(1.0)\n"
        "    termios.tcflow(1, termios.TCOOFF)\n"
        "    for epoch in range(1, 200):\n"
        "        console.show_epoch(row(epoch), 200)\n"
        "        logging.getLogger('continuous_training').warning(f'warning {epoch}')\n"
        "        time.sleep(0.01)\n"
        "(folder / 'ended').touch()\n"
    )
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=environment(TERM="xterm"),
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    _, errors = process.communicate(timeout=PATIENCE)  # nothing reads the terminal meanwhile
    os.close(ours)
    assert (process.returncode, errors) == (0, b"")
    assert (tmp_path / "ended").exists() and read_metrics(tmp_path, 1, 10**9)[-1]["epoch"] == 199


@pytest.mark.parametrize(("level", "lines", "figures"), [("debug", 1, 1), ("info", 1, 0), ("warning", 0, 0)])
def test_log_level_selects_the_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], level: str, lines: int, figures: int
) -> None:
    with Console(tmp_path, log_level=level) as console:
        console.show_epoch(row(1, **{"ppo/approx_kl": 0.3}), 200)
        console.show_epoch(row(2, **{"ppo/approx_kl": 0.3}), 200)
        logging.getLogger("continuous_training").info("\u2192 \u00e9")
    output = capsys.readouterr().out
    assert output.isascii() and "\x1b" not in output
    assert output.count("run 1 epoch   2/200") == lines
    assert output.count("perf/checkpoint_seconds=") == 2 * figures
    assert output.count("Warning: large policy update") == 1  # not again in the next epoch
