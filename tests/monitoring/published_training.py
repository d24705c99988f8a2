"""A training as it looks from outside: the files that it would have written."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from monitoring import exams, metrics_file, published
from monitoring.state import DashboardState
from runtime.train_log import append_line
from tests.monitoring.test_dashboard import row


def exam(epoch: int = 25, **changes: Any) -> dict[str, Any]:
    """A line of the ledger."""
    measures = {"total_return": 0.021, "sharpe": 1.9, "sharpe_interval": [-0.2, 3.1]}
    line = {
        "time": f"2026-11-25T10:{epoch % 60:02d}:00+00:00",
        "run": 1,
        "epoch": epoch,
        "data": "abc",
        "checkpoint": f"run1_epoch{epoch}.pt",
        "champion": None,
        "days": 14,
        "symbols": 32,
        "trials": 1,
        "verdict": "no edge",
        "verdict_reason": "its mean day is between -0.21% and +0.35%, not surely above 0",
        "decision": "refused",
        "reason": "against always flat",
        "pooled": {"policy": measures, "buy and hold": {"total_return": 0.087}},
    }
    return line | changes


def publish(folder: Path, epochs: int = 3, lines: tuple[str, ...] = ("a line",), **changes: Any) -> Path:
    """Write what a training publishes, with changes to status.json; return the log_dir."""
    logs, checkpoints = folder / "logs", folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    (logs / metrics_file.NAME).unlink(missing_ok=True)
    for epoch in range(1, epochs + 1):
        metrics_file.append_metrics(logs, row(epoch, run=1))
    for line in lines:
        append_line(logs, line)
    state = DashboardState(epochs=200, runs=2, device="1 x cpu", run=1, epoch=epochs, phase="update")
    state.checkpoint_dir, state.report_dir = str(checkpoints), str(folder / "reports")
    state.newest_ns, state.symbols = {"binance": time.time_ns() - 3_600 * 10**9}, {"binance": 26}
    content = published.content_of(state.snapshot()) | changes
    (logs / published.NAME).write_text(json.dumps(content))
    return logs


def hold_exams(folder: Path, *lines: dict[str, Any]) -> None:
    """Write the ledger."""
    path = folder / "checkpoints" / exams.NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
