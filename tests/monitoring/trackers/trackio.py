"""A stand-in for the package of this name, with the calls that telemetry makes: it writes down what it gets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE = Path(os.environ["TRACKIO_DIR"]) / "got.jsonl"


def _write(**what: Any) -> None:
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\n")


class Run:
    """Of one training."""

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Take an epoch's figures."""
        _write(step=step, metrics=metrics)

    def finish(self) -> None:
        """Take the end."""
        _write(ended=True)


def init(
    project: str, name: str | None = None, config: dict[str, Any] | None = None, resume: str = "never"
) -> Run:
    """Begin a run."""
    _write(project=project, name=name, config=config, resume=resume)
    return Run()
