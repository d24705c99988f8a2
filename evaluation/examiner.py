"""The examiner: scores every checkpoint on the held-out days and chooses the champion."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
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
from evaluation.forecast_exam import forecast_figures
from evaluation.group_exam import examine_groups, groups_of
from evaluation.measures import Margin, Measures, margin, measure
from evaluation.parts import Part, PartFailed, Stopped, TooLong, join, on_every_rank, symbols_of
from evaluation.revision import Revision, revision_of
from evaluation.stale_opens import stale_opens
from evaluation.title import Title, claim_of, title_of
from evaluation.trained_policy import NEVER_NS
from evaluation.verdict import Verdict, beats, describe_power, verdict
from models.policy import Policy
from runtime.control import (
    STOP_AT_EPOCH_END,
    STOP_NOW,
    Control,
    heartbeat,
    heartbeat_while_others_work,
    heartbeat_while_waiting,
)
from runtime.files import identity_of
from runtime.wording import count_of
from training import checkpoint
from training.checkpoint import Checkpoint
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


@dataclass(frozen=True)
class _Plan:
    """What rank 0 finds before an exam."""

    start_ns: int  # of the walks
    file: tuple[int, int, int] | None  # of the champion
    best: _Best | None = None  # its walks, where they need not be repeated
    champion: Checkpoint | None = None  # that walks again
    policy: Policy | None = None  # of it, on the host
    obstacle: str = ""  # why the champion cannot be compared


class Examiner:
    """Examines policies, every rank on some of the symbols; changes nothing that training depends on.

    Rank 0 decides when the walks begin and whether the champion walks, and judges. If no exam is possible, the
    reason is logged, and training continues.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        control: Control,
        max_seconds: float = math.inf,
        holds_on_stop: bool = False,
        on_segment: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """``folder`` holds the checkpoints; an exam is given up after ``max_seconds``, or when asked to stop.

        With ``holds_on_stop`` only a request to stop at once ends it. ``on_segment`` hears how many of this rank's
        segments are done, and of how many.
        """
        self._on_segment = on_segment
        self._max_seconds = max_seconds
        self.ends_at = STOP_NOW if holds_on_stop else STOP_AT_EPOCH_END
        self._deadline = math.inf
        self._folder = folder
        self._ranks = ranks
        self._control = control
        self._logged: set[str] = set()
        self._best: _Best | None = None
        self._may_compile = True

    def examine(self, trainer: Trainer, fingerprint: str, writer: CheckpointWriter) -> Exam:
        """Score the trainer's policy on the bars that it was never trained on (all ranks).

        Args:
            trainer: has the policy and the market.
            fingerprint: digest of the run's bars.
            writer: is waited for, so that the previous exam is in the ledger.
        """
        began = time.monotonic()
        plan = None
        if self._ranks.is_first:
            writer.finish()
            plan = self._plan(trainer, fingerprint)
        with heartbeat_while_waiting():
            sizes = plan.policy.sizes if plan and plan.policy else None
            found = self._ranks.broadcast((plan.start_ns, sizes) if plan else None)
        if found is None:
            return Exam()
        start_ns, sizes = found
        parts = self._walk(trainer, start_ns, sizes, plan.policy if plan else None)
        if plan is None:
            with heartbeat_while_waiting():
                self._ranks.any(False)
            return Exam()
        exam = self._conclude(trainer, fingerprint, plan, parts, began)
        if exam.figures:
            exam.figures.update(forecast_figures(trainer, plan.start_ns))
        self._ranks.any(False)
        return exam

    def _plan(self, trainer: Trainer, fingerprint: str) -> _Plan | None:
        path = self._folder / checkpoint.BEST
        start_ns = trainer.progress.trained_until_ns
        try:
            file = _identity(path)
            best = self._best if self._best and self._best.file == file else None
            if best:
                start_ns = max(start_ns, best.trained_until_ns)
                if (best.fingerprint, best.start_ns) == (fingerprint, start_ns):
                    return _Plan(start_ns, file, best)
            if not file:
                return _Plan(start_ns, file)
            try:
                saved = champion.read(path, trainer.env.market.statistics, trainer.env.config)
                policy = saved.policy(torch.device("cpu"), trainer.policy.precision)
            except checkpoint.CheckpointError as error:
                obstacle = f"{error}; move it away to let another one take its place"
                return _Plan(start_ns, file, obstacle=obstacle)
        except OSError as error:
            self._warn_of(error)
            return None
        return _Plan(max(start_ns, saved.trained_until_ns), file, None, saved, policy)

    def _walk(
        self, trainer: Trainer, start_ns: int, sizes: Mapping[str, Any] | None, best: Policy | None
    ) -> list[Part]:
        """Walk this rank's symbols; return the parts of all ranks on rank 0 (all ranks take part)."""
        self._deadline = time.monotonic() + self._max_seconds
        failure, policies = "", {}
        try:
            policies[POLICY] = trainer.full_policy()
        except torch.OutOfMemoryError as error:
            failure = _describe(error)
        has_failed = self._ranks.any(bool(failure))  # in what follows the others would wait for this rank
        if sizes and not has_failed:
            try:
                policies[CHAMPION] = on_every_rank(best, sizes, self._ranks, trainer.policy.precision)
            except torch.OutOfMemoryError as error:
                failure, has_failed = _describe(error), True
        part = Part(failure=failure) if has_failed else self._own_part(trainer, policies, start_ns)
        left = max(0.0, self._deadline - time.monotonic())
        with heartbeat_while_others_work(left):
            return self._ranks.gather_to_first(part)

    def _own_part(self, trainer: Trainer, policies: dict[str, Policy], start_ns: int) -> Part:
        market, config = trainer.env.market, trainer.env.config
        compiled = trainer.env.compiled and self._may_compile
        if compiled:
            # As many accounts as with a champion: the steps are compiled for their number.
            policies.setdefault(CHAMPION, policies[POLICY])
        chunk_segments = min(trainer.learner.micro_batch_segments, config.num_envs)
        terms: dict[str, Any] = {"chunk_segments": chunk_segments, "check_stop": self._check_stop}
        terms["on_segment"] = self._on_segment
        try:
            if config.group:
                groups = groups_of(market, config.group.size)[self._ranks.rank :: self._ranks.world_size]
                return Part(examine_groups(policies, market, config, groups, start_ns, NEVER_NS, **terms))
            symbols = symbols_of(self._ranks, market, start_ns)
            terms["compiled"] = compiled
            return Part(examine(policies, market, config, symbols, start_ns, NEVER_NS, **terms))
        except NoSegment:
            return Part()
        except Stopped:
            return Part(is_stopped=True)
        except TooLong:
            return Part(is_late=True)
        except torch.AcceleratorError:  # the GPU's, which computes nothing any more
            raise
        except Exception as error:  # noqa: BLE001 - a warning on rank 0: no exam is worth a training
            self._may_compile = False  # in case that it was the compiler
            return Part(failure=_describe(error))

    def _check_stop(self) -> None:
        heartbeat()
        if self._control.stop_level >= self.ends_at:
            raise Stopped
        if time.monotonic() > self._deadline:
            raise TooLong

    def _conclude(
        self, trainer: Trainer, fingerprint: str, plan: _Plan, parts: Sequence[Part], began: float
    ) -> Exam:
        """Judge what the ranks have walked, or log why there is no exam."""
        progress, market, best = trainer.progress, trainer.env.market, plan.best
        try:
            group = trainer.env.config.group
            groups = groups_of(market, group.size) if group else []
            walks = join(parts, [group.name for group in groups] or market.symbols)
            own = walks.pop(CHAMPION, [])
            if plan.champion and plan.file:
                name, until_ns = plan.champion.name, plan.champion.trained_until_ns
                best = self._best = _Best(plan.file, fingerprint, plan.start_ns, name, until_ns, own)
            if best:
                walks = {POLICY: walks.pop(POLICY), CHAMPION: best.walks} | walks
            revision = revision_of(market, plan.start_ns, progress.cutoff_ns)
            name = best.name if best else ""
            walked = [walk.symbol for walk in walks[POLICY]]
            self._warn_of_stale_opens(trainer, market.symbols if group else walked, plan.start_ns)
            noun = "group" if group else "symbol"
            is_simulated = "simulated" in trainer.settings.sources
            known = progress, fingerprint, revision, is_simulated
            return self._judge(walks, *known, name, plan.obstacle, began, noun)
        except Stopped:
            log.info("No exam: asked to stop")
        except TooLong:
            minutes = self._max_seconds / 60
            log.warning(
                f"No exam: not done after exam_minutes={minutes:g}; raise that, or lower holdout_days"
            )
        except PartFailed as error:
            log.warning(f"No exam: {error}")
        except NoSegment:
            self._log_once(_reason_for_none(plan.start_ns, trainer))
        except OSError as error:
            self._warn_of(error)
        return Exam()

    def _warn_of_stale_opens(self, trainer: Trainer, symbols: Sequence[str], start_ns: int) -> None:
        # By the simulated market's rules, every open is the close before.
        if "simulated" not in trainer.settings.sources:
            self._log_once(stale_opens(trainer.env.market, symbols, start_ns, NEVER_NS), logging.WARNING)

    def _warn_of(self, error: OSError) -> None:
        log.warning(f"No exam: {error.filename or self._folder} cannot be read: {error.strerror}")

    def _judge(
        self,
        walks: Contestants,
        progress: TrainingProgress,
        fingerprint: str,
        revision: Revision,
        is_simulated: bool,
        champion_name: str,
        obstacle: str,
        began: float,
        noun: str,
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
        trades = margin(walks[POLICY])
        title = title_of(champion_name, self._folder) if champion_name else Title(False, "")
        promoted, reason = False, obstacle
        if not obstacle:
            # The first champion has only cash to beat, and so has one after a champion that lost its title.
            is_rival = champion_name and not title.loss
            promoted, reason = beats(walks[POLICY], walks[CHAMPION if is_rival else ALWAYS_FLAT])
            against = f"always flat, as {title.loss or 'there is no champion'}"
            reason = f"against {champion_name if is_rival else against}: {reason}"
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **key,
            "checkpoint": challenger,
            "simulated": is_simulated,
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
            "probability": judgement.probability,
            "power": judgement.power,
            "decision": champion.PROMOTED if promoted else champion.REFUSED,
            "dethroned": champion_name if title.loss and not obstacle else None,
            "reason": reason,
            "pooled": {name: asdict(measures) for name, measures in pooled.items()},
            "margin": asdict(trades),
        }
        symbols = {walk.symbol: asdict(measure([walk])) for walk in walks[POLICY]}
        seconds = time.monotonic() - began
        claim = None
        if promoted:
            decision, claim = f"{challenger} from now on", claim_of(judgement.edge, title)
        elif line["dethroned"] or not champion_name:
            decision = "none from now on" if line["dethroned"] else "still none"
        else:
            decision = f"still {champion_name}"
            claim = claim_of(ledger.is_proven(champion_name, earlier), title)
        line["claim"] = claim
        decision += f" ({claim})" if claim else ""
        if ledger.key_of(key) in recorded:
            decision, reason = "decided before", "this exam is already in the ledger"
        lines = [
            f"Exam: {_summary(pooled, count_of(len(symbols), noun))}, {trades}, {judgement} ({seconds:.1f} s, "
            f"bars {revision.digest})",
            f"Champion: {decision}, {reason}",
            f"Power: {describe_power(pooled[POLICY], num_trials)}",
        ]
        if revised:
            lines.append(
                f"Bars: those of {', '.join(revised)} are others than an earlier exam scored, whose line in the "
                "ledger stays: another source's by now, or corrected"
            )
        figures = _figures(pooled, trades, judgement, num_trials, promoted)
        figures |= {"exam/symbols": len(symbols), "exam/seconds": seconds, "exam/revised_days": len(revised)}
        return Exam(figures, {"line": line, "symbols": symbols}, lines)

    def _log_once(self, text: str, level: int = logging.INFO) -> None:
        if text and text not in self._logged:
            log.log(level, text)
            self._logged.add(text)


def _summary(pooled: Mapping[str, Measures], symbols: str) -> str:
    """Put an exam into words: days, symbols, all returns, the policy's Sharpe ratio."""
    policy = pooled[POLICY]
    others = ", ".join(
        f"{name} {measures.total_return:+.1%}"
        for name, measures in pooled.items()
        if name not in (POLICY, ALWAYS_FLAT)
    )
    days = "1 day" if policy.num_days == 1 else f"{policy.num_days} days"
    sharpe = "Sharpe none"
    if policy.sharpe is not None and policy.sharpe_interval is not None:
        low, high = policy.sharpe_interval
        sharpe = f"Sharpe {policy.sharpe:.1f} [{low:.1f}, {high:.1f}]"
    return f"{days}, {symbols}: {policy.total_return:+.1%} ({others}), {sharpe}"


def _figures(
    pooled: Mapping[str, Measures], trades: Margin, judgement: Verdict, num_trials: int, promoted: bool
) -> dict[str, float]:
    # docs/metrics.md explains the names; figures without a value are NaN.
    policy = pooled[POLICY]
    sharpe_low, sharpe_high = policy.sharpe_interval or (math.nan, math.nan)
    low, high = policy.mean_daily_interval or (math.nan, math.nan)
    net_low, net_high = trades.net_interval or (math.nan, math.nan)
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
        "exam/sharpe_bar": _or_nan(judgement.sharpe_bar),
        "exam/deflated_probability": _or_nan(judgement.probability),
        "exam/power": _or_nan(judgement.power),
        "exam/sortino": _or_nan(policy.sortino),
        "exam/max_drawdown_percent": 100 * policy.max_drawdown,
        "exam/turnover": policy.turnover,
        "exam/net_bps": trades.net_bps,
        "exam/net_bps_low": net_low,
        "exam/net_bps_high": net_high,
        "exam/gross_bps": trades.gross_bps,
        "exam/turnover_per_bar": trades.turnover,
        "exam/break_even_bps": _or_nan(trades.break_even_bps),
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


def _describe(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full. {text}"
    return f"{type(error).__name__}: {text}"


def _reason_for_none(start_ns: int, trainer: Trainer) -> str:
    bars = trainer.env.config.horizon + 2
    since = np.datetime64(start_ns, "ns").astype("datetime64[m]")
    return (
        f"No exam: no symbol has {bars} bars in a row after {since} UTC, up to where these weights or the best "
        "were trained; raise holdout_days, or wait for more bars"
    )


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        return identity_of(path)
    except FileNotFoundError:
        return None
