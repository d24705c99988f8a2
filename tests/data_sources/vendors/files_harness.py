"""A folder of people's own files for the tests, and what the program makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from data_sources.bars import MINUTE_NS, Bars
from data_sources.lake.lake import Lake
from data_sources.load import load
from data_sources.refresh import SourceReport, refresh
from data_sources.sources import DataRequest
from tests.data_sources.vendors.loopback import Notes, ns

START, NOW = ns("2026-03-02 14:30"), ns("2026-03-20 12:00")  # a Monday, 09:30 in New York


def bars_of(count: int = 390, start_ns: int = START, step_ns: int = MINUTE_NS, seed: int = 0) -> pd.DataFrame:
    """Draw valid bars of one session or more, at prices of two decimals."""
    random = np.random.default_rng(seed)
    close = np.round(100 + np.cumsum(random.normal(0, 0.05, count)), 2)
    opened = np.append(100.0, close[:-1])
    return pd.DataFrame(
        {
            "time": pd.to_datetime(start_ns + step_ns * np.arange(count)),
            "open": opened,
            "high": np.round(np.maximum(opened, close) + 0.02, 2),
            "low": np.round(np.minimum(opened, close) - 0.02, 2),
            "close": close,
            "volume": random.integers(1, 5000, count).astype(float),
        }
    )


class Own:
    """A folder, a lake, and what was reported."""

    def __init__(self, root: Path) -> None:
        self.folder, self.lake = root / "my_bars", Lake(root / "lake")
        self.folder.mkdir(exist_ok=True)
        self.notes = Notes()

    def request(self, timezone: str = "UTC", **changes: object) -> DataRequest:
        values = {"start_ns": ns("2026-01-01 00:00"), "end_ns": NOW, "min_bars": 1} | changes
        return DataRequest(("files",), {}, files_dir=str(self.folder), files_timezone=timezone, **values)

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def csv(self, name: str, frame: pd.DataFrame, **how: object) -> Path:
        return self.write(name, frame.to_csv(index=False, **how))

    def refresh(self, timezone: str = "UTC", **changes: object) -> SourceReport:
        self.notes = Notes()
        return refresh(self.lake, self.request(timezone, **changes), NOW, self.notes)["files"]

    def bars(self, **changes: object) -> dict[str, Bars]:
        return {bars.symbol: bars for bars in load(self.lake, self.request(**changes)).bars}

    def rejected(self, symbol: str) -> dict[str, int]:
        return {row.symbol: row.rejected for row in load(self.lake, self.request()).rows}[symbol]

    def about(self, name: str) -> list[str]:
        """What was said of a file."""
        return [warning for warning in self.notes.warnings if warning.startswith(name)]


def assert_same(bars: Bars, frame: pd.DataFrame) -> None:
    """Compare bars with a frame of ``bars_of``, to the last bit."""
    assert bars.open_time.tolist() == frame["time"].astype("int64").tolist()
    for name in ("open", "high", "low", "close", "volume"):
        assert getattr(bars, name).tolist() == frame[name].tolist(), name
