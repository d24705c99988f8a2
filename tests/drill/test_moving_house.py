"""A training that is resumed on another machine, without its lake: ``make drill``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.program import ALONE, Start, checkpoint, environment, is_same, tiny_flags
from tests.vendors import BinanceNow

long = pytest.mark.drill


@long
def test_a_training_moves_house_without_its_lake_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Begun on one machine; resumed there, and on another one that has only the checkpoints."""
    here, there = tmp_path / "here", tmp_path / "there"
    changes = {
        "sources": "binance",
        "binance_pairs": "BTCUSDT,ETHUSDT",
        "positions": "0,1",
        "end_date": "none",
        "history_days": 2,
    }
    with BinanceNow(0, ("BTCUSDT", "ETHUSDT")) as binance:
        env = environment(BINANCE_API_URL=binance.url, BINANCE_ARCHIVE_URL=binance.url)

        def start(folder: Path, *command: str, **more: Any) -> Start:
            words = tiny_flags(folder, **changes, batch_size=64, runs=1, **more)
            return Start(folder / "out" / str(more), [*ALONE, *command, *words], env)

        start(here, epochs=2).ends_well()
        shutil.copytree(here / "checkpoints", there / "checkpoints")
        report = start(there, "check", epochs=4)
        report.ends()
        assert "warning  bars        " in report.output and "of 2 symbols such as BTCUSDT" in report.output
        starts = [start(folder, epochs=4) for folder in (here, there)]
        for begun in starts:
            begun.ends_well()
    assert "no copy of the bars" not in starts[0].output and "no copy of the bars" in starts[1].output
    models = [checkpoint(folder, "run1_epoch4.pt")["model"] for folder in (here, there)]
    assert is_same(*models)
    assert not is_same(models[0], checkpoint(here, "run1_epoch2.pt")["model"])
