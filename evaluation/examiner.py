"""The examiner: scores every checkpoint on the held-out days and chooses the champion."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs.market import NoSegment
from evaluation import champion, ledger
from evaluation.baselines import ALWAYS_FLAT, BUY_AND_HOLD, MOMENTUM
from evaluation.exam import CHAMPION, POLICY, Contestants, Walk, examine
from evaluation.measures import Measures, measure
from evaluation.revision import Revision, revision_of
from evaluation.trained_policy import NEVER_NS
from evaluation.verdict import Verdict, beats, verdict
from models.policy import Policy
from runtime.control import STOP_NOW, Control, heartbeat, heartbeat_while_waiting
from training import checkpoint
from training.checkpoint_writer import CheckpointWriter
from training.distributed import Ranks
from training.progress import TrainingProgress
from training.trainer import Trainer

log = logging.getLogger("continuous_training")


@dataclass(frozen=True)
class Exam:
    """One checkpoint's exam; empty on all ranks but 0, and if no exam was possible."""

    figures: dict[str, float] = field(default_factory=dict)  # metrics; see docs/metrics.md
    # For the checkpoint: its ledger line, and the measures per symbol.
    record: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)  # for people


@dataclass(frozen=True)
class _Best:
    """The champion's walks and what they depend on; they are repeated only when that changes."""

    file: tuple[int, int, int]  # inode, modification time, size
    fingerprint: str  # of the bars
    start_ns: int
    name: str
    trained_until_ns: int
    walks: list[Walk]


class _Stopped(Exception):
    """The program was asked to stop now: the checkpoint is saved without an exam."""


class _TooLong(Exception):
    """The exam has used its time: the checkpoint is saved without one."""


class Examiner:
    """Examines policies on rank 0 while the others wait; changes nothing that training depends on.

    If no exam is possible, the reason is logged, and training continues.
    """

    def __init__(self, folder: Path, ranks: Ranks, control: Control, max_seconds: float = math.inf) -> None:
        """``folder`` holds the checkpoints; an exam that takes longer than ``max_seconds`` is given up."""
        self._max_seconds = max_seconds
        self._deadline = math.inf
        self._folder = folder
        self._ranks = ranks
        self._control = control
        self._logged: set[str] = set()
        self._best: _Best | None = None

    def examine(self, trainer: Trainer, fingerprint: str, writer: CheckpointWriter) -> Exam:
        """Score the trainer's policy on the bars that it was never trained on (all ranks).

        Args:
            trainer: has the policy and the market.
            fingerprint: digest of the run's bars.
            writer: is waited for, so that the previous exam is in the ledger.
        """
        policy = trainer.full_policy()
        if not self._ranks.is_first:
            with heartbeat_while_waiting():
                self._ranks.any(False)
            return Exam()
        writer.finish()
        exam = Exam()
        try:
            exam = self._examine(trainer, policy, fingerprint)
        except _Stopped:
            log.info("No exam: asked to stop")
        except _TooLong:
            minutes = self._max_seconds / 60
            log.warning(
                f"No exam: not done after exam_minutes={minutes:g}; raise that, or lower holdout_days"
            )
        except OSError as error:
            log.warning(f"No exam: {error.filename or self._folder} cannot be read: {error.strerror}")
        self._ranks.any(False)
        return exam

    def _check_stop(self) -> None:
        heartbeat()
        if self._control.stop_level >= STOP_NOW:
            raise _Stopped
        if time.monotonic() > self._deadline:
            raise _TooLong

    def _examine(self, trainer: Trainer, policy: Policy, fingerprint: str) -> Exam:
        began = time.monotonic()
        self._deadline = began + self._max_seconds
        progress, market = trainer.progress, trainer.env.market
        path = self._folder / checkpoint.BEST
        file = _identity(path)
        champion_read = None
        obstacle = ""
        start_ns = progress.trained_until_ns
        policies = {POLICY: policy}
        best = self._best if self._best and self._best.file == file else None
        if best:
            start_ns = max(start_ns, best.trained_until_ns)
            if (best.fingerprint, best.start_ns) != (fingerprint, start_ns):
                best = None
        try:
            if file and not best:
                try:
                    champion_read = champion.read(path, market.statistics, trainer.env.config)
                    policies[CHAMPION] = champion_read.policy(market.device, policy.bf16)
                    start_ns = max(start_ns, champion_read.trained_until_ns)
                except checkpoint.CheckpointError as error:
                    champion_read = None
                    obstacle = f"{error}; move it away to let another one take its place"
            walks = examine(
                policies,
                market,
                trainer.env.config,
                market.symbols,
                start_ns,
                NEVER_NS,
                chunk_segments=min(trainer.learner.micro_batch_segments, trainer.env.config.num_envs),
                check_stop=self._check_stop,
            )
        except (NoSegment, torch.OutOfMemoryError) as error:
            self._log_once(_reason_for_none(error, start_ns, trainer))
            return Exam()
        if champion_read and file:
            best = self._best = _Best(
                file,
                fingerprint,
                start_ns,
                champion_read.name,
                champion_read.trained_until_ns,
                walks[CHAMPION],
            )
        if best:
            walks = {POLICY: walks[POLICY], CHAMPION: best.walks} | walks
        revision = revision_of(market, start_ns, progress.cutoff_ns)
        return self._judge(walks, progress, fingerprint, revision, best.name if best else "", obstacle, began)

    def _judge(
        self,
        walks: Contestants,
        progress: TrainingProgress,
        fingerprint: str,
        revision: Revision,
        champion_name: str,
        obstacle: str,
        began: float,
    ) -> Exam:
        """Turn walks into figures, a verdict, and a decision about the champion."""
        challenger = checkpoint.name_of(progress.run, progress.epoch)
        key = {"run": progress.run, "epoch": progress.epoch, "data": fingerprint}
        earlier = ledger.read(self._folder / ledger.NAME)
        recorded = set(map(ledger.key_of, earlier))
        revised = revision.days_changed_since(earlier)
        num_trials = len(recorded | {ledger.key_of(key)})
        pooled = {name: measure(own) for name, own in walks.items()}
        others = {name: measures for name, measures in pooled.items() if name != POLICY}
        judgement = verdict(pooled[POLICY], others, num_trials)
        promoted, reason = False, obstacle
        if not obstacle:
            # The first champion has only cash to beat.
            promoted, reason = beats(walks[POLICY], walks[CHAMPION if champion_name else ALWAYS_FLAT])
            reason = f"against {champion_name or 'always flat, as there is no champion'}: {reason}"
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **key,
            "checkpoint": challenger,
            "champion": champion_name or None,
            "first": str(min(walk.time[0] for walk in walks[POLICY]))[:16],
            "last": str(max(walk.time[-1] for walk in walks[POLICY]))[:16],
            "days": pooled[POLICY].num_days,
            "symbols": len(walks[POLICY]),
            "revision": revision.digest,
            "bars": revision.days,
            "revised": revised,
            "trials": num_trials,
            "verdict": "edge" if judgement.edge else "no edge",
            "verdict_reason": judgement.reason,
            "sharpe_bar": judgement.sharpe_bar,
            "decision": champion.PROMOTED if promoted else champion.REFUSED,
            "reason": reason,
            "pooled": {name: asdict(measures) for name, measures in pooled.items()},
        }
        symbols = {walk.symbol: asdict(measure([walk])) for walk in walks[POLICY]}
        seconds = time.monotonic() - began
        decision = f"{challenger} from now on" if promoted else f"still {champion_name or 'none'}"
        if ledger.key_of(key) in recorded:
            decision, reason = "decided before", "this exam is already in the ledger"
        lines = [
            f"Exam: {_summary(pooled, len(symbols))}, {judgement} ({seconds:.1f} s, bars {revision.digest})",
            f"Champion: {decision}, {reason}",
        ]
        if revised:
            lines.append(
                f"Bars: those of {', '.join(revised)} are others than an earlier exam scored, whose line in the "
                "ledger stays: another source's by now, or corrected"
            )
        figures = _figures(pooled, judgement, num_trials, promoted)
        figures |= {"exam/symbols": len(symbols), "exam/seconds": seconds, "exam/revised_days": len(revised)}
        return Exam(figures, {"line": line, "symbols": symbols}, lines)

    def _log_once(self, text: str) -> None:
        if text not in self._logged:
            log.info(text)
            self._logged.add(text)


def _summary(pooled: Mapping[str, Measures], num_symbols: int) -> str:
    """Put an exam into words: days, symbols, all returns, the policy's Sharpe ratio."""
    policy = pooled[POLICY]
    others = ", ".join(
        f"{name} {measures.total_return:+.1%}"
        for name, measures in pooled.items()
        if name not in (POLICY, ALWAYS_FLAT)
    )
    days = "1 day" if policy.num_days == 1 else f"{policy.num_days} days"
    symbols = "1 symbol" if num_symbols == 1 else f"{num_symbols:,} symbols"
    sharpe = "Sharpe none"
    if policy.sharpe is not None and policy.sharpe_interval is not None:
        low, high = policy.sharpe_interval
        sharpe = f"Sharpe {policy.sharpe:.1f} [{low:.1f}, {high:.1f}]"
    return f"{days}, {symbols}: {policy.total_return:+.1%} ({others}), {sharpe}"


def _figures(
    pooled: Mapping[str, Measures], judgement: Verdict, num_trials: int, promoted: bool
) -> dict[str, float]:
    # docs/metrics.md explains the names; figures without a value are NaN.
    policy = pooled[POLICY]
    sharpe_low, sharpe_high = policy.sharpe_interval or (math.nan, math.nan)
    low, high = policy.mean_daily_interval or (math.nan, math.nan)
    return {
        "exam/days": policy.num_days,
        "exam/return_percent": 100 * policy.total_return,
        "exam/buy_and_hold_percent": 100 * pooled[BUY_AND_HOLD].total_return,
        "exam/momentum_percent": 100 * pooled[MOMENTUM].total_return,
        "exam/champion_percent": 100 * pooled[CHAMPION].total_return if CHAMPION in pooled else math.nan,
        "exam/daily_bps": 1e4 * policy.mean_daily_return,
        "exam/daily_bps_low": 1e4 * low,
        "exam/daily_bps_high": 1e4 * high,
        "exam/sharpe": _or_nan(policy.sharpe),
        "exam/sharpe_low": sharpe_low,
        "exam/sharpe_high": sharpe_high,
        "exam/sharpe_bar": judgement.sharpe_bar,
        "exam/sortino": _or_nan(policy.sortino),
        "exam/max_drawdown_percent": 100 * policy.max_drawdown,
        "exam/turnover": policy.turnover,
        "exam/time_in_market": policy.time_in_market,
        "exam/hit_rate": policy.hit_rate,
        "exam/costs_percent": 100 * policy.costs,
        **({"exam/funding_percent": 100 * policy.funding} if any(m.funding for m in pooled.values()) else {}),
        "exam/trials": num_trials,
        "exam/edge": int(judgement.edge),
        "exam/promoted": int(promoted),
    }


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _reason_for_none(error: Exception, start_ns: int, trainer: Trainer) -> str:
    if not isinstance(error, NoSegment):
        return f"No exam: the GPU's memory is full. {str(error).splitlines()[0]}"
    bars = trainer.env.config.horizon + 2
    since = np.datetime64(start_ns, "ns").astype("datetime64[m]")
    return (
        f"No exam: no symbol has {bars} bars in a row after {since} UTC, up to where these weights or the best "
        "were trained; raise holdout_days, or wait for more bars"
    )


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
