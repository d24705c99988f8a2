"""benchmarks/epoch.py measures every part of an epoch, whatever the parts are called now."""

import re
from typing import Any

import pytest

from benchmarks import env_throughput, epoch
from continuous_training import PRESETS, Settings


@pytest.mark.parametrize("account", ["single", "pair"])
def test_the_parts_add_up_to_the_epoch(
    account: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def few_bars(_bars: int, _symbols: int, *sizes: Any) -> Any:
        return env_throughput.market_of(1_000, 4, *sizes)

    monkeypatch.setattr(epoch, "market_of", few_bars)
    sizes = {
        "d_model": 16,
        "num_heads": 2,
        "envs_per_gpu": 8,
        "context_bars": 8,
        "horizon": 8,
        "batch_size": 32,
    }
    others: dict[str, Any] = {"episode_bars": 16, "device": "cpu", "account": account}
    epoch.measure(Settings(**{**PRESETS["demo"], **sizes, **others}), measured_epochs=2)
    printed = capsys.readouterr().out
    shares = [
        float(share) for share in re.findall(r"^\| (?:rollout|update): .* ([-\d.]+)% \|$", printed, re.M)
    ]
    assert len(shares) == 7 and sum(shares) == pytest.approx(100.0, abs=0.5) and min(shares) >= 0.0
    assert "| transitions per second |" in printed
