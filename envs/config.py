"""EnvConfig: the settings of TradingEnv and their ranges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from continuous_training import Settings

# Equity after a loss of everything or more, so that its log stays finite (-13.8).
EQUITY_FLOOR = 1e-6
AT_LEAST_ONE = ("num_envs", "context_bars", "horizon", "episode_bars")
SHOWN = 200  # characters of a wrong value
ZERO_OR_MORE = (
    "stock_fee_bps",
    "crypto_fee_bps",
    "perpetual_fee_bps",
    "slippage_bps",
    "borrow_rate",
    "range_slippage",
    "volume_slippage",
    "account_value",
    "flat_before_close",
    "maintenance_margin",
)
FEES = ("stock_fee_bps", "crypto_fee_bps", "perpetual_fee_bps")
PAIR = 2  # symbols
FEATURE_GROUPS = ("symbol", "day", "flow", "panel")  # see docs/features.md
FIRST_FEATURES = ("symbol",)  # all that there was before there were groups


@dataclass(frozen=True)
class GroupConfig:
    """Accounts over a group of symbols: how many share one account, and the caps on their exposure."""

    size: int  # symbols of an account
    gross: float  # cap on the sum of all positions' sizes, as a fraction of equity
    net: float  # cap on longs less shorts, either way

    @staticmethod
    def from_settings(settings: Settings) -> GroupConfig | None:
        """Take ``group_size`` and the caps from the settings; None for single accounts."""
        if settings.account == "single":
            return None
        size = PAIR if settings.account == "pair" else settings.group_size
        return GroupConfig(size, settings.gross_exposure, settings.net_exposure)

    @staticmethod
    def of_record(config: Mapping[str, Any]) -> GroupConfig | None:
        """Return the same of the settings in a checkpoint, which may be older than groups."""
        if config.get("account", "single") == "single":
            return None
        size = PAIR if config["account"] == "pair" else config["group_size"]
        return GroupConfig(size, config["gross_exposure"], config["net_exposure"])

    @staticmethod
    def describe(group: GroupConfig | None) -> str:
        """Return it in words."""
        if group is None:
            return "an account per symbol"
        return f"groups of {group.size}, gross_exposure={group.gross:g}, net_exposure={group.net:g}"

    @property
    def share(self) -> float:
        """The weight of a symbol at position 1, as a fraction of equity, before the caps."""
        return self.gross / self.size


@dataclass(frozen=True)
class EnvConfig:
    """Settings of the environment; ``EnvConfig.from_settings(Settings())`` has the program's defaults.

    Raises:
        ValueError: a setting is out of range; the message has its name, value and rule.
    """

    num_envs: int
    context_bars: int
    horizon: int
    episode_bars: int  # a multiple of horizon
    positions: tuple[float, ...]  # targets, as fractions of equity; beyond 1 with leverage
    stock_fee_bps: float
    crypto_fee_bps: float
    perpetual_fee_bps: float
    slippage_bps: float
    borrow_rate: float  # per year, on borrowed shares (short) and on borrowed money (leverage)
    ruin_fraction: float  # of the start equity
    range_slippage: float  # fills are also worse by this fraction of the filling bar's high - low
    volume_slippage: float  # and by this for an order as large as the bar's volume, less for a smaller one
    account_value: float  # of an account at its start, in quote currency, compared with the volume
    maintenance_margin: float  # of the value of a perpetual position; with less equity it is liquidated
    flat_before_close: int  # minutes before the scheduled close in which stocks hold nothing; 0: off
    group: GroupConfig | None = None  # see GroupEnv; None: an account per symbol

    @staticmethod
    def from_settings(settings: Settings, num_envs: int | None = None) -> EnvConfig:
        """Take all fields from the settings of the same name, but ``num_envs``, by default ``envs_per_gpu``."""
        own = [f.name for f in fields(EnvConfig) if f.name not in ("num_envs", "group")]
        values = {name: getattr(settings, name) for name in own}
        num_envs = settings.envs_per_gpu if num_envs is None else num_envs
        return EnvConfig(num_envs, **values, group=GroupConfig.from_settings(settings))

    def __post_init__(self) -> None:
        for name in AT_LEAST_ONE:
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be 1 or more")
        multiple = max(1, round(self.episode_bars / self.horizon)) * self.horizon
        rule = f"must be a multiple of horizon={self.horizon}, such as {multiple}"
        require(self.episode_bars % self.horizon == 0, "episode_bars", self.episode_bars, rule)
        distinct = len(set(self.positions)) == len(self.positions) and 2 <= len(self.positions) < 255
        finite = all(map(math.isfinite, self.positions))
        rule = "must be two or more different fractions of equity, at most 254"
        require(distinct and finite, "positions", self.positions, rule)
        for name in ZERO_OR_MORE:
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "must be 0 or more")
        rule = f"must be {EQUITY_FLOOR:g} or more and below 1"
        require(EQUITY_FLOOR <= self.ruin_fraction < 1, "ruin_fraction", self.ruin_fraction, rule)
        most = 1 / self.largest_exposure
        rule = f"must be {most:.3g} or less, the equity of the largest position"
        require(self.maintenance_margin <= most, "maintenance_margin", self.maintenance_margin, rule)
        fee = max(FEES[::-1], key=lambda name: float(getattr(self, name)))
        rate = (getattr(self, fee) + self.slippage_bps) / 1e4 + self.volume_slippage
        rule = f"must be under {self.max_rate:g} of the traded value: lower {fee}, slippage_bps or volume_slippage"
        require(rate < self.max_rate, "fees and slippage", f"{rate:g}", rule)

    @property
    def num_account_features(self) -> int:
        """Number of account observations, see TradingEnv and GroupEnv."""
        return len(self.positions) + (6 if self.group is None else 7)

    @property
    def largest_exposure(self) -> float:
        """Of an account, as a fraction of equity: of its largest position, or all positions of a group."""
        return max(map(abs, self.positions)) if self.group is None else self.group.gross

    @property
    def max_rate(self) -> float:
        """Upper limit of a trade's cost, as a fraction of traded value.

        The trade that reaches a target after its own cost exists only while that cost is below all equity.
        """
        return 0.5 / self.largest_exposure

    def require_flat_costs(self, costs_bps: Iterable[float | None]) -> None:
        """Raise ``ValueError`` where a flat cost of traded value is below 0, or too high to be paid."""
        most = 1e4 * self.max_rate
        for cost in costs_bps:
            if cost is not None and not 0 <= cost < most:
                raise ValueError(f"a flat cost must be 0 or more and under {most:g} bps, was {cost:g}")


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise ``ValueError("name=value rule")``, one line, unless the rule holds."""
    if not holds:
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        message = f"{name}={shown} {rule}"
        raise ValueError("".join(character if character.isprintable() else "?" for character in message))
