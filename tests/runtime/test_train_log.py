"""train.log holds what people saw, in order, whoever wrote it, and a disk that is full ends nothing."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from runtime import files
from runtime.train_log import NOT_KEPT, TrainLog, append_line, keep_log

log = logging.getLogger("continuous_training")


@pytest.fixture(autouse=True)
def no_warnings_yet(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(files, "_warned", set())
    caplog.set_level(logging.DEBUG, log.name)  # as the console does


def lines(folder: Path, name: str = "train.log") -> list[str]:
    return (folder / name).read_text().splitlines()


def test_lines_of_the_trainer_and_the_supervisor_are_in_order_with_time_and_level(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "logs"
    append_line(folder, "before\n")
    with keep_log(folder, "info"):
        log.info("one")
        append_line(folder, "\nrestarted", logging.WARNING)
        log.warning("a symbol: \N{SNOWMAN}")
        log.debug("not shown, not kept")
    log.info("after it was closed")
    append_line(None, "nowhere")
    shapes = [re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (\w+) +(.*)", line) for line in lines(folder)]
    assert [shape.groups() for shape in shapes if shape] == [
        ("INFO", "before"),
        ("INFO", "one"),
        ("WARNING", "restarted"),
        ("WARNING", "a symbol: \N{SNOWMAN}"),
    ]


def test_it_rotates_and_loses_no_line_while_another_process_appends(tmp_path: Path) -> None:
    log_file = TrainLog(tmp_path, most_bytes=1_000)
    for number in range(100):
        log_file.handle(logging.LogRecord("", logging.INFO, "", 0, f"line {number}", None, None))
        append_line(tmp_path, f"other {number}")
    log_file.close()
    names = ["train.log", *(f"train.log.{age}" for age in range(1, 6))]
    kept = [line.split("INFO    ")[1] for name in reversed(names) for line in lines(tmp_path, name)]
    assert kept == [f"{who} {number}" for number in range(100) for who in ("line", "other")][-len(kept) :]
    assert len(kept) > 100 and sorted(path.name for path in tmp_path.iterdir()) == names


def test_lines_that_cannot_be_written_are_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train.log").mkdir()  # open() refuses it, also for root
    with keep_log(tmp_path, "info"):
        for number in range(3):
            log.info(f"line {number}")
        append_line(tmp_path, "other")
        assert [record.getMessage() for record in caplog.records].count(f"{tmp_path}: {NOT_KEPT}") == 1
        (tmp_path / "train.log").rmdir()
        log.info("room again")
    assert len(lines(tmp_path)) == 1
