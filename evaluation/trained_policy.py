"""A policy at work on bars: which position it wants now, whatever is held; for signals and exports alike.

Shapes: N = symbols, J = positions that can be held, K = target positions (J = K, since 0 is among them).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_sources.bars import MINUTE_NS, AssetClass, Bars
from data_sources.simulated import DAY_NS, simulated_bars
from envs.config import EnvConfig
from envs.features import CLIP, FEATURES, WARM_UP_BARS, FeatureStatistics, compute
from envs.latest import latest_decisions
from envs.market import Market
from models.exported import ExportError, read_card
from models.policy import Policy, uses_bf16
from training.checkpoint import Checkpoint, CheckpointError, same_version

if TYPE_CHECKING:
    from continuous_training import Settings

PROBE_TOLERANCE = 1e-2  # of raw features, whose spread is about 1
NEVER_NS = 2**62  # the year 2116: nothing is held out
SEGMENTS_AT_ONCE = 32  # bounds the memory of a forward


@dataclass(frozen=True)
class Decision:
    """What the policy wants of one symbol at the close of its newest bar; an order of it fills at the next open.

    ``probabilities[j][k]`` is that of target ``positions[k]`` for an account that holds ``positions[j]``.
    ``only_cash``: whatever it wants, nothing may be held so near the close (``flat_before_close``).
    """

    symbol: str
    asset_class: AssetClass
    open_time: int  # ns UTC, of the newest bar; it closed a minute later
    close: float
    positions: tuple[float, ...]
    probabilities: tuple[tuple[float, ...], ...]
    only_cash: bool

    @property
    def close_time(self) -> int:
        """When the bar was complete, ns UTC."""
        return self.open_time + MINUTE_NS

    def when_holding(self, position: float = 0.0) -> tuple[float, float]:
        """Return the target for an account that holds ``position``, and its probability.

        Raises:
            ValueError: the position is none that the policy knows.
        """
        if position not in self.positions:
            known = ", ".join(f"{each:g}" for each in self.positions)
            raise ValueError(f"{self.symbol}: the position held must be one of {known}, was {position:g}")
        row = self.probabilities[self.positions.index(position)]
        best = row.index(max(row))
        return (0.0 if self.only_cash else self.positions[best]), row[best]


@dataclass(frozen=True)
class Actor:
    """A policy with what it needs to act on bars: the scale of its features, and the accounts of its training."""

    policy: Policy
    statistics: FeatureStatistics
    config: EnvConfig

    @classmethod
    def with_card(cls, policy: Policy, path: str | Path) -> Actor:
        """Return the policy of an exported folder with what its card says.

        Raises:
            ExportError: the card cannot be read, or this program computes other features than the training did.
        """
        folder = Path(path)
        card = read_card(folder)
        told = card["features"]
        if told["schema_sha256"] != feature_schema():
            other = sorted(set(told["names"]) ^ set(FEATURES)) or ["their order or their limits"]
            raise ExportError(
                f"{folder} was trained on other features than this program computes: {', '.join(other)}"
            )
        # The same names could hide another computation: the figures of made-up bars tell.
        ours = torch.tensor(feature_probe())
        differs = (ours - torch.tensor(told["probe"])).abs() > PROBE_TOLERANCE
        if differs.any():
            changed = [
                name for name, is_other in zip(told["names"], differs.tolist(), strict=True) if is_other
            ]
            raise ExportError(
                f"{folder} was trained with another version of these features: {', '.join(changed)}; use the "
                f"program that exported it ({card['program']['version']})"
            )
        statistics = FeatureStatistics(
            tuple(told["names"]), torch.tensor(told["mean"]), torch.tensor(told["std"])
        )
        accounts = card["accounts"] | {"positions": tuple(card["accounts"]["positions"])}
        return cls(policy, statistics, EnvConfig(num_envs=1, **accounts))

    def decide(self, bars: Sequence[Bars]) -> tuple[list[Decision], dict[str, str]]:
        """Decide for every symbol at its newest bar.

        Args:
            bars: closed bars of each symbol, the newest included. Features look back over days (docs/features.md):
                with less history they are what they are near a symbol's first bar.

        Returns:
            The decisions, and of the symbols without one the reason.

        Raises:
            ValueError: no symbol has enough bars in a row.
        """
        needed = self.config.context_bars + 3  # of a market that has a place to play
        unavailable = {one.symbol: f"{len(one)} bars, needs {needed}" for one in bars if len(one) < needed}
        bars = [one for one in bars if one.symbol not in unavailable]
        if not bars:
            return [], unavailable
        device = next(self.policy.parameters()).device
        market = Market.from_bars(
            bars,
            device=device,
            holdout_start_ns=NEVER_NS,
            context_bars=self.config.context_bars,
            horizon=1,  # nothing is played: stretches of any length will do
            statistics=self.statistics,
        )
        now = latest_decisions(market, self.config)
        unavailable |= now.unavailable
        if not now.symbols:
            return [], unavailable
        log_policy = self.log_policy(now.bars, now.decision, now.accounts)
        of_symbol = {one.symbol: one for one in bars}
        rows = zip(now.symbols, log_policy.exp().tolist(), now.only_cash.tolist(), strict=True)
        decisions = []
        for symbol, odds, only_cash in rows:
            one = of_symbol[symbol]
            newest = int(one.open_time[-1]), float(one.close[-1])
            decisions.append(
                Decision(
                    symbol,
                    one.asset_class,
                    *newest,
                    self.config.positions,
                    tuple(map(tuple, odds)),
                    only_cash,
                )
            )
        return decisions, unavailable

    @torch.no_grad()
    def log_policy(self, bars: Tensor, decision: Tensor, accounts: Tensor) -> Tensor:
        """Return the log-probability of every target: as a rollout computes it, at one decision of each segment.

        Args:
            bars: (N, C + H + 1, F) normalised features.
            decision: (N,) which one of the H decisions.
            accounts: (N, J, A) account observations there.

        Returns:
            (N, J, K) float32.
        """
        parts = []
        for part, at, account in zip(
            *(each.split(SEGMENTS_AT_ONCE) for each in (bars, decision, accounts)), strict=True
        ):
            projected = self.policy.encode(part, self.config.horizon + 1)
            here = projected[torch.arange(len(at), device=at.device), at]
            logits, _ = self.policy.head.decide(here[:, None], account)
            parts.append(torch.log_softmax(logits, -1))
        return torch.cat(parts)


def feature_schema() -> str:
    """Return a digest of the features' names, order and limits, as SHA-256 in hex."""
    return hashlib.sha256(json.dumps([list(FEATURES), CLIP, WARM_UP_BARS]).encode()).hexdigest()


def feature_probe() -> list[float]:
    """Return every raw feature of the last of some made-up bars: the same wherever they are computed alike."""
    (bars,) = simulated_bars(1, 3_000, seed=0, end_ns=20_000 * DAY_NS)
    values: list[float] = compute(bars, torch.device("cpu"))[-1].tolist()
    return values


@dataclass(frozen=True)
class TrainedPolicy:
    """A checkpoint ready for use."""

    checkpoint: Checkpoint
    settings: Settings
    policy: Policy
    statistics: FeatureStatistics

    @classmethod
    def read(
        cls,
        path: Path,
        settings_class: type[Settings],
        device: torch.device | str = "cpu",
        **changes: Any,
    ) -> TrainedPolicy:
        """Read a checkpoint; on a CPU in float32, on a GPU in the precision of its settings.

        Args:
            path: a file that the training wrote.
            settings_class: the settings dataclass; settings that it no longer has are left out.
            device: where the policy is to be.
            **changes: settings that differ from those of the training.

        Raises:
            CheckpointError: it is missing or damaged, of another format or version, or of other features than
                this program computes.
            ValueError: a changed setting is wrong, or one that the weights depend on.
        """
        device = torch.device(device)
        checkpoint = Checkpoint.read(path, device)
        config = checkpoint.config
        with same_version(path):
            for name in ("d_model", "num_layers", "num_heads", "positions", "context_bars"):
                if changes.get(name, config[name]) != config[name]:
                    raise ValueError(
                        f"{name}={changes[name]}, but {path} was trained with {name}={config[name]}"
                    )
            known = {field.name for field in fields(settings_class)}
            settings = settings_class(**{k: v for k, v in config.items() if k in known} | changes)
        statistics = checkpoint.statistics
        if statistics.names != tuple(FEATURES):
            other = sorted(set(statistics.names) ^ set(FEATURES)) or ["their order"]
            raise CheckpointError(
                f"{path} was trained on other features than this program computes: {', '.join(other)}"
            )
        longest = checkpoint.max_length - settings.context_bars - 1
        if settings.horizon > longest:
            raise ValueError(f"horizon={settings.horizon} must be at most {longest} with {path}")
        policy = checkpoint.policy(device, uses_bf16(settings.precision, device))
        return cls(checkpoint, settings, policy, statistics)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.policy.parameters()).device

    def env_config(self, num_envs: int) -> EnvConfig:
        """Say what the accounts are like, as they were in training unless the settings were changed."""
        return EnvConfig.from_settings(self.settings, num_envs)

    @property
    def actor(self) -> Actor:
        """The policy at work on the newest bars."""
        return Actor(self.policy, self.statistics, self.env_config(1))

    def market(self, bars: Sequence[Bars]) -> Market:
        """Put bars on the policy's device, scaled as in training; none of them is held out.

        Raises:
            ValueError: no symbol has enough bars for a segment.
        """
        return Market.from_settings(bars, self.settings, self.device, NEVER_NS, self.statistics)


def device_for_use() -> torch.device:
    """Return where a policy is used: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
