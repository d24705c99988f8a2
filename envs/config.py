"""EnvConfig: the settings of TradingEnv, and what they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from envs.account import EQUITY_FLOOR

if TYPE_CHECKING:
    from continuous_training import Settings


@dataclass(frozen=True)
class EnvConfig:
    """Settings of the environment.

    Raises:
        ValueError: a setting is out of its range; names it and the range.
    """

    num_envs: int
    context_bars: int = 64
    horizon: int = 128
    episode_bars: int = 1280  # a multiple of horizon
    positions: tuple[float, ...] = (-1.0, 0.0, 1.0)  # targets, as fractions of equity; leverage may be over 1
    stock_fee_bps: float = 0.5
    crypto_fee_bps: float = 5.0
    slippage_bps: float = 1.0
    borrow_rate: float = 0.05  # per year, on borrowed shares (short) and on borrowed money (leverage)
    ruin_fraction: float = 0.2  # of the start equity
    range_slippage: float = 0.0  # fills are worse by this share of the filling bar's high - low, too
    volume_slippage: float = 0.0  # and by this when the order is as large as the bar's volume, else less
    account_value: float = 10_000.0  # of an account at its start, in quote currency, against the volume
    flat_before_close: int = 0  # minutes before the scheduled close in which stocks hold nothing; 0: off

    @staticmethod
    def from_settings(settings: Settings, num_envs: int) -> EnvConfig:
        """Take every field but ``num_envs`` from attributes of the same name."""
        names = [field.name for field in fields(EnvConfig) if field.name != "num_envs"]
        return EnvConfig(num_envs, **{name: getattr(settings, name) for name in names})

    def __post_init__(self) -> None:
        for name in ("num_envs", "context_bars", "horizon", "episode_bars"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be 1 or more")
        multiple = max(1, round(self.episode_bars / self.horizon)) * self.horizon
        rule = f"must be a multiple of horizon={self.horizon}, such as {multiple}"
        require(self.episode_bars % self.horizon == 0, "episode_bars", self.episode_bars, rule)
        distinct = len(set(self.positions)) == len(self.positions) and 2 <= len(self.positions) < 255
        finite = all(map(math.isfinite, self.positions))
        rule = "must be two or more different fractions of equity, at most 254"
        require(distinct and finite, "positions", self.positions, rule)
        for name in (
            "stock_fee_bps crypto_fee_bps slippage_bps borrow_rate range_slippage volume_slippage "
            "account_value flat_before_close"
        ).split():
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "must be 0 or more")
        rule = f"must be {EQUITY_FLOOR:g} or more and below 1"
        require(EQUITY_FLOOR <= self.ruin_fraction < 1, "ruin_fraction", self.ruin_fraction, rule)
        fee = "stock_fee_bps" if self.stock_fee_bps > self.crypto_fee_bps else "crypto_fee_bps"
        rate = (getattr(self, fee) + self.slippage_bps) / 1e4 + self.volume_slippage
        rule = f"must be under {self.max_rate:g} of the traded value: lower {fee}, slippage_bps or volume_slippage"
        require(rate < self.max_rate, "fees and slippage", f"{rate:g}", rule)

    @property
    def num_account_features(self) -> int:
        """Figures of an account in an observation; see TradingEnv."""
        return len(self.positions) + 6

    @property
    def max_rate(self) -> float:
        """Most that a trade may cost, as a fraction of traded value.

        The trade that reaches a target after its own cost exists only while it takes less than all equity.
        """
        return 0.5 / max(map(abs, self.positions))


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Tell a setting that is out of its range in one line.

    Raises:
        ValueError: ``holds`` is False; names the setting, its value and the rule.
    """
    if not holds:
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        raise ValueError(f"{name}={shown} {rule}")
