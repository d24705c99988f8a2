"""The recorder: at each run's start the champion walks the bars that came since, once, for the record."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_sources.bars import DAY_NS, MINUTE_NS
from envs.config import EnvConfig
from envs.features import FeatureStatistics
from envs.market import Market, NoSegment
from envs.open_env import OpenAccount
from envs.open_group_env import AnyAccount
from evaluation import champion, record
from evaluation.baselines import BUY_AND_HOLD
from evaluation.exam import POLICY, Walk
from evaluation.measures import jsonable
from evaluation.open_walk import OpenWalks, walk_on
from evaluation.parts import Stopped
from evaluation.record_summary import accounts_of, describe, grown, pool_days, summarize
from evaluation.revision import SCORED
from models.policy import precision_on
from runtime.control import STOP_NOW, Control, heartbeat, heartbeat_while_waiting
from training.checkpoint import BEST, Checkpoint, CheckpointError
from training.distributed import Ranks

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

SEGMENTS_AT_ONCE = 16  # per forward of the trunk, to bound memory
REVISED_NS = 60 * DAY_NS  # older bars are not compared any more: vendors correct the newest weeks
SAME = 1e-6  # ratios of prices that agree so well were rescaled, by a split, and not revised
COSTS = (
    "stock_fee_bps",
    "crypto_fee_bps",
    "perpetual_fee_bps",
    "slippage_bps",
    "range_slippage",
    "volume_slippage",
    "account_value",
    "borrow_rate",
    "maintenance_margin",
    "ruin_fraction",
    "flat_before_close",
)


class Recorder:
    """Keeps the record of a checkpoint folder, on rank 0; the others wait. No failure ends a training."""

    def __init__(self, folder: Path, ranks: Ranks, control: Control, max_seconds: float = math.inf) -> None:
        """After ``max_seconds`` a walk ends where it is, and the next run's goes on from there."""
        self._folder, self._ranks, self._control, self._max_seconds = folder, ranks, control, max_seconds
        self.figures: dict[str, float] = {}  # of the record so far, as metrics

    def update(self, market: Market, settings: Settings, cutoff_ns: int, fingerprint: str) -> None:
        """Let the champion walk the bars that came since, and write what it earned (all ranks).

        Args:
            market: of the run that begins.
            settings: of the accounts, and the precision.
            cutoff_ns: the run's bars end here.
            fingerprint: of them.
        """
        if self._ranks.is_first:
            try:
                config = EnvConfig.from_settings(settings)
                precision = precision_on(market.device, settings.precision)
                self._update(market, config, cutoff_ns, fingerprint, precision)
            except Stopped:
                log.info("Nothing recorded: asked to stop")
            except OSError as error:
                place = error.filename or self._folder / record.NAME
                log.warning(f"Nothing recorded: {place}: {error.strerror}; the next run tries again")
            except CheckpointError as error:
                log.warning(f"Nothing recorded: {error}; move it away to let another one take its place")
            except torch.AcceleratorError:  # the GPU's, which computes nothing any more
                raise
            except Exception as error:  # noqa: BLE001 - a warning: no record is worth a training
                text = (str(error).splitlines() or [""])[0]
                log.warning(f"Nothing recorded: {type(error).__name__}: {text}; the next run tries again")
            if market.device.type == "cuda":
                torch.cuda.empty_cache()
        with heartbeat_while_waiting():
            self._ranks.any(False)

    def _update(
        self, market: Market, config: EnvConfig, cutoff_ns: int, fingerprint: str, precision: str
    ) -> None:
        kept = record.read(self._folder)
        if kept.faults:
            log.warning(
                f"Nothing recorded: {self._folder / record.NAME}: {kept.faults[0]}; put the right files back, or "
                f"move it and {record.HEAD} away to begin another record"
            )
            return
        kept.complete()
        self._show(kept.lines)
        if not (self._folder / BEST).exists():
            return
        if kept.lines and cutoff_ns <= kept.lines[-1]["until_ns"]:  # a restart of the same run
            return
        best = champion.read(self._folder / BEST, market.statistics, config)
        training = training_of(market.statistics, config)
        if kept.lines and kept.lines[0]["training"] != training:
            log.warning(
                f"Nothing recorded: {self._folder / record.NAME} is of another training: move it and "
                f"{record.HEAD} away to begin another record"
            )
            return
        until_ns = int(kept.lines[-1]["until_ns"]) if kept.lines else best.data_cutoff_ns
        if cutoff_ns <= max(until_ns, best.data_cutoff_ns):
            return
        found = self._walk(best, market, config, kept, cutoff_ns, precision)
        if found is None:
            return
        lines = _events(kept, best, market, training, until_ns, config)
        lines.append(_score(kept, best, market, config, found, cutoff_ns, fingerprint))
        lines[-1]["so_far"] = _so_far([*kept.lines, *lines])
        kept.append(lines, found.accounts)
        self._show(kept.lines)
        _log(kept, lines)

    def _walk(
        self,
        best: Checkpoint,
        market: Market,
        config: EnvConfig,
        kept: record.Record,
        cutoff_ns: int,
        precision: str,
    ) -> OpenWalks | None:
        """Walk on with all accounts; None without a new bar whose outcome is known."""
        deadline = time.monotonic() + self._max_seconds

        def check_stop() -> None:
            heartbeat()
            if self._control.stop_level >= STOP_NOW:
                raise Stopped

        try:
            return walk_on(
                best.policy(market.device, precision),
                market,
                config,
                market.symbols,
                kept.accounts,
                # The close of the last bar that it may have been chosen on: its fill is the first new price.
                decides_from_ns=best.data_cutoff_ns - MINUTE_NS,
                end_ns=cutoff_ns,
                chunk_segments=SEGMENTS_AT_ONCE,
                check_stop=check_stop,
                is_late=lambda: time.monotonic() > deadline,
            )
        except NoSegment:
            return None

    def _show(self, lines: Sequence[record.Line]) -> None:
        summary = summarize(lines)
        self.figures = summary.figures() if summary else {}


def training_of(statistics: FeatureStatistics, config: EnvConfig) -> str:
    """Return what tells one training from another, 16 hex digits: of its features, positions and groups."""
    known = statistics.names, config.positions, config.context_bars, *([config.group] if config.group else [])
    digest = hashlib.sha256(repr(known).encode())
    digest.update(statistics.mean.cpu().numpy().tobytes() + statistics.std.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _events(
    kept: record.Record, best: Checkpoint, market: Market, training: str, until_ns: int, config: EnvConfig
) -> list[record.Line]:
    """Return the lines of what happened since the last one, before the score."""
    common = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    lines: list[record.Line] = []
    if not kept.lines:
        costs = {name: getattr(config, name) for name in COSTS}
        positions = list(config.positions)
        lines.append(
            common
            | {"kind": "begin", "training": training, "positions": positions, "costs": costs}
            | ({"group": asdict(config.group)} if config.group else {})
            | {"until": _minute(best.data_cutoff_ns), "until_ns": best.data_cutoff_ns}
        )
    former = next((line["champion"] for line in reversed(kept.lines) if "champion" in line), None)
    if former != best.name:
        lines.append(
            common
            | {"kind": "champion", "champion": best.name, "before": former}
            | {"saved_with_bars_until": _minute(best.data_cutoff_ns), "until_ns": until_ns}
        )
    if kept.lines and best.data_cutoff_ns > until_ns:
        lines.append(
            common
            | {"kind": "missed", "from": _minute(until_ns), "until": _minute(best.data_cutoff_ns)}
            | {
                "reason": f"these bars were not walked while {former or 'another'} was the champion, and the new "
                "one was chosen with them: its accounts held what they had",
                "until_ns": best.data_cutoff_ns,
            }
        )
    changed = _revised(kept.lines, market)
    if changed:
        lines.append(common | {"kind": "revised", "symbols": changed, "until_ns": until_ns})
    return lines


def _score(
    kept: record.Record,
    best: Checkpoint,
    market: Market,
    config: EnvConfig,
    found: OpenWalks,
    cutoff_ns: int,
    fingerprint: str,
) -> record.Line:
    """Return the line of what was walked."""
    own = found.walks[POLICY]
    hold = {walk.symbol: walk for walk in found.walks[BUY_AND_HOLD]}
    before = {
        name: {
            symbol: math.exp(account.log_equity) for symbol, account in kept.accounts.get(name, {}).items()
        }
        for name in found.walks
    }
    return jsonable(
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "kind": "scored",
            "champion": best.name,
            "run": best.run,
            "epoch": best.epoch,
            "data": fingerprint,
            "first": str(min(walk.time[0] for walk in own))[:16],
            "last": str(max(walk.time[-1] for walk in own))[:16],
            "until_ns": cutoff_ns,
            "decisions": sum(len(walk.time) for walk in own) - found.held,
            "held": found.held,
            "is_whole": found.is_whole,
            "stocks_only": all(walk.asset_class == "stock" for walk in own),
            "fees_bps": {
                name.removesuffix("_bps"): getattr(config, name) for name in COSTS if name.endswith("_bps")
            },
            "costs": float(np.mean([walk.costs.sum() for walk in own])),
            "traded": float(np.mean([walk.traded.sum() for walk in own])),
            "days": {name: pool_days(walks, before[name]) for name, walks in found.walks.items()},
            "symbols": {
                walk.symbol: {
                    "decisions": len(walk.time),
                    "log_return": float(walk.log_returns.sum()),
                    "buy_and_hold": float(hold[walk.symbol].log_returns.sum()),
                    **_bars_of_walk(market, walk, found.accounts[POLICY][walk.symbol]),
                }
                for walk in own
            },
        }
    )


def _bars_of_walk(market: Market, walk: Walk, account: AnyAccount) -> dict[str, Any]:
    """Return what tells whether its bars change: ``bars`` of a symbol, ``members`` of a group, by symbol."""
    first_ns, last_ns = _ns(walk.time[0]), _ns(walk.time[-1])
    if isinstance(account, OpenAccount):
        return {"bars": _bars_of(market, walk.symbol, first_ns, last_ns)}
    return {"members": {symbol: _bars_of(market, symbol, first_ns, last_ns) for symbol in account.symbols}}


def _so_far(lines: Sequence[record.Line]) -> dict[str, Any]:
    summary = summarize(lines)
    assert summary is not None
    return jsonable({name: asdict(measures) for name, measures in summary.measures.items()})


def _bars_of(market: Market, symbol: str, first_ns: int, last_ns: int) -> list[Any]:
    """Return what tells whether a symbol's bars of [first_ns, last_ns] change: both, a digest, three prices."""
    number = market.symbols.index(symbol)
    begin, end = market.offsets[number : number + 2].tolist()
    time = market.open_time[begin:end].contiguous()
    edges = torch.tensor([first_ns, last_ns + 1], device=time.device)
    low, high = torch.searchsorted(time, edges).tolist()
    quotes = market.quotes[begin + low : begin + high].cpu().numpy()
    quotes = np.ascontiguousarray(quotes[:, SCORED[: market.quotes.shape[1] - 1]])
    digest = hashlib.sha256(time[low:high].cpu().numpy().tobytes() + quotes.tobytes()).hexdigest()[:12]
    if not len(quotes):
        return [first_ns, last_ns, digest, 0.0, 0.0, 0.0]
    prices = float(quotes[0, 0]), float(quotes[-1, 1]), float(quotes[:, :2].astype(np.float64).sum())
    return [first_ns, last_ns, digest, *prices]


def _revised(lines: Sequence[Mapping[str, Any]], market: Market) -> dict[str, list[int]]:
    """Return the symbols whose scored bars are others now, with the numbers of those lines; each is reported once.

    Bars that are gone from the lake, and prices that were all rescaled alike, by a split, are no revision.
    """
    reported = {
        (symbol, number)
        for line in lines
        if line["kind"] == "revised"
        for symbol, numbers in line["symbols"].items()
        for number in numbers
    }
    offsets = market.offsets.tolist()
    since_ns = int(market.open_time.max()) - REVISED_NS
    changed: dict[str, list[int]] = {}
    for line in lines:
        if line["kind"] != "scored":
            continue
        known = {
            symbol: bars
            for name, row in line["symbols"].items()
            for symbol, bars in row.get("members", {name: row.get("bars")}).items()
        }
        for symbol, bars in known.items():
            if symbol not in market.symbols or (symbol, line["number"]) in reported:
                continue
            first_ns, last_ns, digest, *prices = bars
            if last_ns < since_ns or int(market.open_time[offsets[market.symbols.index(symbol)]]) > first_ns:
                continue
            _, _, now, *prices_now = _bars_of(market, symbol, first_ns, last_ns)
            if now != digest and not _is_rescaled(prices, prices_now):
                changed.setdefault(symbol, []).append(line["number"])
    return changed


def _is_rescaled(prices: Sequence[float], now: Sequence[float]) -> bool:
    if not all(prices) or not all(now):
        return False
    ratios = [ours / theirs for ours, theirs in zip(now, prices, strict=True)]
    return abs(ratios[0] - 1) > SAME and max(ratios) / min(ratios) - 1 < SAME


def _log(kept: record.Record, lines: Sequence[Mapping[str, Any]]) -> None:
    """Log what was added."""
    score, summary = kept.lines[-1], summarize(kept.lines)
    assert summary is not None
    for line in lines:
        if line["kind"] in ("revised", "missed"):
            log.warning(f"Record: {describe(line)}")
    whole = "" if score["is_whole"] else "; stopped by exam_minutes, the next run goes on from there"
    log.info(
        f"Record: {score['champion']} on {score['decisions']:,} new bars of {accounts_of(score)}, "
        f"{score['first']} to {score['last']} UTC: {grown(score, POLICY):+.2%} (buy and hold "
        f"{grown(score, BUY_AND_HOLD):+.2%}){whole}"
    )
    log.info(f"Record: {summary.headline}; line {len(kept.lines)}, {kept.hash[:16]}")


def _minute(time_ns: int) -> str:
    return str(np.datetime64(time_ns, "ns"))[:16]


def _ns(time_: np.datetime64) -> int:
    return int(time_.astype("datetime64[ns]").astype(np.int64))
