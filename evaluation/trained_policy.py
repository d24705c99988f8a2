"""A policy at work, of checkpoints or of an export: the position that it wants after the newest closed bar.

Shapes: N = symbols, J = positions that can be held, K = target positions (J = K, since 0 is among them).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_sources.bars import DAY_NS, MINUTE_NS, AssetClass, Bars
from data_sources.simulated import simulated_bars
from data_sources.universe import top_of
from data_sources.vendors import ADVISERS
from envs.config import FIRST_FEATURES, EnvConfig, GroupConfig
from envs.features import (
    CLIP,
    GROUPS,
    WARM_UP_BARS,
    FeatureFunction,
    FeatureStatistics,
    chosen_features,
    compute,
    panel_of,
    registered_features,
)
from envs.latest import latest_decisions
from envs.market import Market
from envs.panel import Panel
from models.ensemble import Decider
from models.exported import ExportError, read_card
from models.policy import precision_on
from runtime.files import identity_of
from training.checkpoint import WEIGHTS_DEPEND_ON, Checkpoint, CheckpointError, same_version

if TYPE_CHECKING:
    from continuous_training import Settings

PROBED = ("SOLUSDT", "ETHUSDT", "BTCUSDT")  # the first one's features are compared
PROBE_TOLERANCE = 1e-2  # of raw features, whose spread is about 1
# Of EnvConfig, in folders that were exported before there were such futures: no decision of theirs rests on them.
BEFORE_PERPETUALS = {"perpetual_fee_bps": 4.5, "maintenance_margin": 0.01}
NEVER_NS = 2**62  # the year 2116: nothing is held out
LONGEST_STEM = 80  # characters: file systems allow 255 bytes with dates and suffixes
SEGMENTS_AT_ONCE = 32  # bounds the memory of a forward


@dataclass(frozen=True)
class TrainedPolicy:
    """A checkpoint ready for use, or several that decide together, with the settings to use it with.

    ``evaluation.ensemble.read`` reads one or more.
    """

    checkpoints: tuple[Checkpoint, ...]
    settings: Settings
    policy: Decider
    statistics: FeatureStatistics
    file: tuple[int, int, int] = (0, 0, 0)  # what it was read from, by ``identity_of``; not of an ensemble
    changes: Mapping[str, Any] = field(
        default_factory=dict
    )  # settings that differ from those of the training
    members: tuple[TrainedPolicy, ...] = ()  # of an ensemble: two or more

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
            settings_class: the settings dataclass; settings that it no longer has are ignored.
            device: for the policy.
            **changes: settings that differ from those of the training.

        Raises:
            CheckpointError: it is missing or damaged, of another format or version, or of other features than
                this program computes.
            FeatureError: envs/own_features.py cannot be run.
            ValueError: a changed setting is wrong, or the weights depend on it.
        """
        device = torch.device(device)
        file = identity_of(path) if path.is_file() else (0, 0, 0)
        checkpoint = Checkpoint.read(path, device)
        config = checkpoint.config
        with same_version(path):
            fixed = {name: config[name] for name in WEIGHTS_DEPEND_ON}
            fixed |= {"account": config.get("account", "single")}
            for name, value in (fixed | {"features": checkpoint.feature_groups}).items():
                if changes.get(name, value) != value:
                    raise ValueError(f"{name}={changes[name]}, but {path} was trained with {name}={value}")
            # What the training computed on may not exist here, or be busy with it.
            known = {setting.name for setting in fields(settings_class)} - {"device"}
            values = {k: v for k, v in config.items() if k in known} | changes
            values["features"] = checkpoint.feature_groups
            for name in ADVISERS.keys() & config.keys() - changes.keys():
                # Written before spellings were checked: such a symbol had no bars.
                values[name] = tuple(s for s in values[name] if top_of((s,)) or not ADVISERS[name](s))
            settings = settings_class(**values)
        statistics = checkpoint.statistics
        names = tuple(chosen_features(checkpoint.feature_groups))
        if statistics.names != names:
            other = sorted(set(statistics.names) ^ set(names)) or ["their order"]
            raise CheckpointError(
                f"{path} was trained on other features than this program computes: {', '.join(other)}"
            )
        longest = checkpoint.max_length - settings.context_bars - 1
        if settings.horizon > longest:
            raise ValueError(f"horizon={settings.horizon} must be at most {longest} with {path}")
        policy = checkpoint.policy(device, precision_on(device, settings.precision))
        return cls((checkpoint,), settings, policy, statistics, file, changes)

    @property
    def checkpoint(self) -> Checkpoint:
        """The only one; what is asked of it has no answer for an ensemble."""
        (checkpoint,) = self.checkpoints
        return checkpoint

    @property
    def parts(self) -> tuple[TrainedPolicy, ...]:
        """The members of an ensemble; else itself alone."""
        return self.members or (self,)

    @property
    def names(self) -> list[str]:
        """The name of each file, with its folders where that tells it from others."""
        return _apart([checkpoint.path for checkpoint in self.checkpoints])

    @property
    def name(self) -> str:
        """All names."""
        return " + ".join(self.names)

    @property
    def titles(self) -> list[str]:
        """The same, but a champion goes by its name in the series, not as best.pt."""
        return _apart([checkpoint.path.with_name(checkpoint.name) for checkpoint in self.checkpoints])

    @property
    def title(self) -> str:
        """All titles."""
        return " + ".join(self.titles)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols of the training, which members of an ensemble share."""
        return tuple(self.checkpoints[0].symbols)

    @property
    def newest(self) -> Checkpoint:
        """The checkpoint that was trained on the newest bars: what it has not seen, none has."""
        return max(self.checkpoints, key=lambda checkpoint: checkpoint.trained_until_ns)

    @property
    def newest_name(self) -> str:
        """Its name."""
        return self.names[self.checkpoints.index(self.newest)]

    @property
    def data_cutoff_ns(self) -> int:
        """The end of the newest bars that a training had, those held out included."""
        return max(checkpoint.data_cutoff_ns for checkpoint in self.checkpoints)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.policy.parameters()).device

    @property
    def actor(self) -> Actor:
        """The policy for decisions on the newest bars."""
        return Actor(self.policy, self.statistics, self.env_config(1), self.symbols)

    def env_config(self, num_envs: int) -> EnvConfig:
        """Return accounts as in training, except for changed settings."""
        return EnvConfig.from_settings(self.settings, num_envs)

    def market(self, bars: Sequence[Bars], others: Sequence[Bars] = ()) -> Market:
        """Put bars on the policy's device, scaled as in training, with nothing held out.

        Args:
            bars: of the symbols to act on.
            others: of symbols that features only look at; those of the training among all of them count.

        Raises:
            ValueError: no symbol has enough bars for a segment.
        """
        panel = training_panel(bars, others, self.device, self.symbols)
        return Market.from_settings(bars, self.settings, self.device, NEVER_NS, self.statistics, panel)


@dataclass(frozen=True)
class Actor:
    """A policy with what it needs to act on bars: scale of its features, accounts and symbols of its training."""

    policy: Decider
    statistics: FeatureStatistics
    config: EnvConfig
    symbols: tuple[str, ...] = ()

    @classmethod
    def with_card(cls, policy: Decider, path: str | Path) -> Actor:
        """Combine the policy of an exported folder with the folder's card.

        Raises:
            ExportError: the card cannot be read, or this program computes other features than the training did.
        """
        folder = Path(path)
        card = read_card(folder)
        features = card["features"]
        names = chosen_features(card.get("members", [card])[0]["settings"].get("features", FIRST_FEATURES))
        if features["schema_sha256"] != feature_schema(names):
            other = sorted(set(features["names"]) ^ set(names)) or ["their order or their limits"]
            raise ExportError(
                f"{folder} was trained on other features than this program computes: {', '.join(other)}"
            )
        # The same names could hide another computation, which shows on made-up bars.
        differences = (torch.tensor(feature_probe(names)) - torch.tensor(features["probe"])).abs().tolist()
        rows = zip(features["names"], differences, strict=True)
        changed = [name for name, difference in rows if difference > PROBE_TOLERANCE]
        if changed:
            raise ExportError(
                f"{folder} was trained with another version of these features: {', '.join(changed)}; use the "
                f"program that exported it ({card['program']['version']})"
            )
        statistics = FeatureStatistics(
            tuple(features["names"]), torch.tensor(features["mean"]), torch.tensor(features["std"])
        )
        accounts = BEFORE_PERPETUALS | card["accounts"]
        accounts["positions"] = tuple(accounts["positions"])
        if "group" in accounts:
            accounts["group"] = GroupConfig(**accounts["group"])
        return cls(policy, statistics, EnvConfig(num_envs=1, **accounts), tuple(card["symbols"]))

    def decide(
        self, bars: Sequence[Bars], others: Sequence[Bars] = ()
    ) -> tuple[list[Decision], dict[str, str]]:
        """Decide for every symbol at its newest bar.

        Args:
            bars: closed bars of each symbol, up to the newest. Features look back over days (docs/features.md):
                with a shorter history they have the values that they have near a symbol's first bar.
            others: closed bars of more symbols of the training, which features of the panel look at. One that is
                missing, or has no bar of the newest minute yet, counts as a quiet or halted one does in training.

        Returns:
            The decisions, and for each symbol without one the reason.

        Raises:
            ValueError: no symbol has enough bars in a row, or accounts are over groups.
        """
        if self.config.group:
            raise ValueError("accounts over groups: decide with evaluation.group_decisions.decide_groups")
        needed = self.config.context_bars + 3  # the least that a market accepts
        unavailable = {
            series.symbol: f"{len(series)} bars, needs {needed}" for series in bars if len(series) < needed
        }
        by_symbol = {series.symbol: series for series in bars if series.symbol not in unavailable}
        if not by_symbol:
            return [], unavailable
        device = next(self.policy.parameters()).device
        panel = training_panel(bars, others, device, self.symbols)
        market = Market.from_bars(
            list(by_symbol.values()),
            device=device,
            holdout_start_ns=NEVER_NS,
            context_bars=self.config.context_bars,
            horizon=1,  # nothing is played, so stretches may be of any length
            statistics=self.statistics,
            features=self.features,
            panel=panel,
        )
        if panel.is_used:
            given = {series.symbol for series in (*bars, *others)}
            absent = "no bars of it, so the others are seen as if it were halted"
            unavailable |= {symbol: absent for symbol in self.symbols if symbol not in given}
        latest = latest_decisions(market, self.config)
        unavailable |= latest.unavailable
        if not latest.symbols:
            return [], unavailable
        log_policy = self.log_policy(latest.bars, latest.decision, latest.accounts)
        decisions = [
            Decision(
                symbol,
                by_symbol[symbol].asset_class,
                int(by_symbol[symbol].open_time[-1]),
                float(by_symbol[symbol].close[-1]),
                self.config.positions,
                tuple(map(tuple, probabilities)),
                only_cash,
            )
            for symbol, probabilities, only_cash in zip(
                latest.symbols, log_policy.exp().tolist(), latest.only_cash.tolist(), strict=True
            )
        ]
        return decisions, unavailable

    @property
    def features(self) -> dict[str, FeatureFunction]:
        """The features that it sees, by name, in the order of their columns."""
        known = registered_features()
        return {name: known[name] for name in self.statistics.names}

    @property
    def sees_others(self) -> bool:
        """Whether a feature may look at other symbols: those of the panel do, and those of one's own may."""
        alone = {name for group in GROUPS if group != "panel" for name in GROUPS[group]}
        return not alone.issuperset(self.statistics.names)

    @torch.no_grad()
    def log_policy(self, bars: Tensor, decision: Tensor, accounts: Tensor) -> Tensor:
        """Return the log-probability of every target at one decision per segment, as a rollout computes it.

        Args:
            bars: (N, C + H + 1, F) normalised features.
            decision: (N,) index of the decision among the H of its segment.
            accounts: (N, J, A) account observations there.

        Returns:
            (N, J, K) float32.
        """
        chunks = zip(*(whole.split(SEGMENTS_AT_ONCE) for whole in (bars, decision, accounts)), strict=True)
        parts = []
        for segments, index, account in chunks:
            projected = self.policy.encode(segments, self.config.horizon + 1)
            here = projected[torch.arange(len(index), device=index.device), index]
            logits, _ = self.policy.head.decide(here[:, None], account)
            parts.append(torch.log_softmax(logits, -1))
        return torch.cat(parts)


@dataclass(frozen=True)
class Decision:
    """What the policy wants of one symbol at the close of its newest bar; its order fills at the next open.

    ``probabilities[j][k]`` is that of target ``positions[k]`` for an account that holds ``positions[j]``.
    ``only_cash``: so near the close nothing may be held, whatever the policy wants (``flat_before_close``).
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
            ValueError: the policy does not know the position.
        """
        if position not in self.positions:
            known = ", ".join(f"{value:g}" for value in self.positions)
            raise ValueError(f"{self.symbol}: the position held must be one of {known}, was {position:g}")
        row = self.probabilities[self.positions.index(position)]
        best = row.index(max(row))
        return (0.0 if self.only_cash else self.positions[best]), row[best]


def stem_of(names: Sequence[str]) -> str:
    """Return a name for a folder of the checkpoints with these names, or titles."""
    stems = [name.removesuffix(".pt").replace("/", "-") for name in names]
    if len(joined := "+".join(stems)) <= LONGEST_STEM:
        return joined
    return f"{stems[0]}+{len(stems) - 1}-more-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"


def _apart(paths: Sequence[Path]) -> list[str]:
    """Return as much of each path's end as tells it from the others."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def training_panel(
    bars: Sequence[Bars], others: Sequence[Bars], device: torch.device, symbols: Sequence[str]
) -> Panel:
    """Return the panel of some bars and of ``others`` without them, in which the training's symbols count.

    Where none of those is there, as in another vendor's spelling, all count.
    """
    own = {series.symbol for series in bars}
    known = [*bars, *(series for series in others if series.symbol not in own)]
    members = {series.symbol for series in known} & set(symbols)
    return panel_of(known, device, members=members or None)


def feature_schema(names: Iterable[str]) -> str:
    """Return a digest of the features' names, order and limits, as SHA-256 in hex."""
    return hashlib.sha256(json.dumps([list(names), CLIP, WARM_UP_BARS]).encode()).hexdigest()


def feature_probe(names: Iterable[str]) -> list[float]:
    """Return raw features at the last of some made-up bars, to compare two versions' computations."""
    draw, market = np.random.default_rng(0).random, []
    for bars, symbol in zip(simulated_bars(3, 3_000, 0, 20_000 * DAY_NS), PROBED, strict=True):
        trades, taker = np.ceil(90 * draw(3_000)), bars.volume * draw(3_000)
        market.append(replace(bars, symbol=symbol, trades=trades, taker_buy_volume=taker))
    known, cpu = registered_features(), torch.device("cpu")
    functions = {name: known[name] for name in names}
    values: list[float] = compute(market[0], cpu, functions, panel_of(market, cpu))[-1].tolist()
    return values
