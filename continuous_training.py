"""Train a transformer trading policy with PPO, on every GPU, on fresh minute bars, for ever.

Start it with START_CONTINUOUS.sh (or .bat). Settings are the constants below: edit them here, or override
one for a single start, such as ``bash START_CONTINUOUS.sh --envs-per-gpu 256``.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

# The allocator reads this when torch is first imported, hence the imports below it.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")

import torch
import typer
from dotenv import load_dotenv

from commands import CHECKPOINT_COMMANDS, COMMANDS, HIDDEN, name_of
from commands.cli import checkpoint_command_from, command_from, exit_with
from data_sources.lake.lake import Lake
from envs.market import Market
from evaluation import champion
from evaluation.examiner import Exam, Examiner
from monitoring.console import Console
from runtime.control import (
    EXIT_ABORTED,
    EXIT_CRASH,
    EXIT_DOES_NOT_FIT,
    EXIT_LOCKED,
    EXIT_OK,
    EXIT_SETTING,
    STOP_AT_EPOCH_END,
    STOP_NOW,
    Control,
    ExitProgram,
    heartbeat_thread,
)
from training import checkpoint, distributed, validation
from training.assembly import (
    holdout_start_ns,
    market_on_device,
    memory_plan,
    unlike,
)
from training.checkpoint_writer import CheckpointWriter
from training.data_feed import Prefetch, fresh_bars, refresh_ahead
from training.distributed import Ranks, agreed_stop
from training.memory import DoesNotFit
from training.metrics import Phases, Stopwatch
from training.progress import Summary, TrainingProgress
from training.trainer import Trainer, compile_is_on

log = logging.getLogger("continuous_training")

MOST_ROLLBACKS = 3  # in one run
COMPILER_SECONDS = 3600.0  # a compiler that works for longer counts as hanging
STOCKS = tuple(
    "AAPL MSFT GOOGL AMZN NVDA META TSLA JPM BAC V MA WMT UNH PG DIS INTC CSCO ORCL ADBE CRM NFLX JNJ".split()
)
BINANCE_PAIRS = tuple(
    "BTCUSDT ETHUSDT BNBUSDT SOLUSDT XRPUSDT ADAUSDT DOGEUSDT TRXUSDT LINKUSDT AVAXUSDT DOTUSDT LTCUSDT "
    "BCHUSDT UNIUSDT AAVEUSDT ATOMUSDT NEARUSDT FILUSDT ETCUSDT ARBUSDT OPUSDT SHIBUSDT POLUSDT SUIUSDT "
    "ALGOUSDT XLMUSDT".split()
)
POLYGON_CRYPTO = tuple(
    "X:BTC-USD X:ETH-USD X:SOL-USD X:XRP-USD X:ADA-USD X:DOGE-USD X:AVAX-USD X:LINK-USD X:LTC-USD "
    "X:DOT-USD".split()
)


@dataclass(frozen=True)
class Settings:
    """Every setting. The comment of each is its --help; None means "not set"."""

    # --- data ---------------------------------------------------------------------------------------------
    sources: tuple[str, ...] = ("polygon", "binance", "yahoo")  # where bars come from; or: simulated
    stocks: tuple[str, ...] = STOCKS  # stocks, from Polygon and Yahoo; or top:500
    binance_pairs: tuple[str, ...] = BINANCE_PAIRS  # Binance spot pairs
    polygon_crypto: tuple[str, ...] = POLYGON_CRYPTO  # Polygon's global crypto pairs; or top:50
    history_days: int = 730  # days of bars up to the end, when start_date is not set
    start_date: str | None = None  # first day of bars, YYYY-MM-DD
    end_date: str | None = None  # last day of bars, YYYY-MM-DD; not set: up to now, anew for every run
    min_bars: int = 2_000  # symbols with fewer bars are dropped
    holdout_days: int = 14  # the newest days of bars, never trained on
    extended_hours: bool = False  # keep stock bars before 09:30 and after 16:00 New York
    simulated_symbols: int = 32  # symbols of the simulated market
    simulated_bars: int = 60_000  # minutes of each of them
    # --- accounts -----------------------------------------------------------------------------------------
    envs_per_gpu: int = 512  # accounts stepped at once on each GPU
    context_bars: int = 64  # bars of history in front of each segment
    horizon: int = 128  # bars on which an account acts per epoch
    episode_bars: int = 1_280  # bars of an episode, a multiple of horizon
    positions: tuple[float, ...] = (-1.0, 0.0, 1.0)  # target positions, as fractions of equity
    stock_fee_bps: float = 0.5  # fee on traded value, stocks
    crypto_fee_bps: float = 5.0  # fee on traded value, crypto
    slippage_bps: float = 1.0  # fills are worse than the open by this much
    range_slippage: float = 0.0  # and by this share of the filling bar's high - low
    volume_slippage: float = 0.0  # and by this when the order is as large as the bar's volume, else less
    account_value: float = 10_000.0  # money in an account at its start, against the volume
    flat_before_close: int = 0  # minutes before the scheduled close in which stocks hold nothing; 0: off
    borrow_rate: float = 0.05  # yearly cost of what is borrowed, shares or money
    ruin_fraction: float = 0.2  # an episode ends in ruin below this share of its first equity
    cost_ramp: float = 0.5  # share of the first run over which costs grow from nothing to all of the above
    # --- model --------------------------------------------------------------------------------------------
    d_model: int = 2_048  # width of the transformer
    num_layers: int = 12  # transformer blocks
    num_heads: int = 32  # attention heads
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the transformer; auto: bf16 on GPUs, else fp32
    compile: Literal["auto", "on", "off"] = "auto"  # compile the model and the accounts; auto: on GPUs
    parallel: Literal["ddp", "fsdp"] = "ddp"  # each GPU holds the whole model; fsdp: a share, for larger ones
    # --- optimisation -------------------------------------------------------------------------------------
    batch_size: int = 65_536  # transitions per optimizer step over all GPUs
    micro_batch_segments: int | None = None  # segments per forward and backward; not set: what fits in memory
    update_passes: int = 3  # passes over each rollout
    learning_rate: float = 1e-4  # at its highest
    warmup_steps: int = 30  # optimizer steps up to the full learning rate, once
    final_learning_rate_fraction: float = 0.1  # of learning_rate, at the end of each run
    weight_decay: float = 0.01  # of weight matrices
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    gamma: float = 0.99  # discount per bar
    gae_lambda: float = 0.95  # weight of longer returns in the advantages
    advantages: Literal["hindsight", "gae"] = "hindsight"  # value every position, or the drawn one only
    clip_coef: float = 0.2  # the ratio of new to old probability counts within 1 -/+ this
    entropy_coef: float = 0.01  # weight of the entropy bonus
    value_coef: float = 0.5  # weight of the value loss
    # --- runs ---------------------------------------------------------------------------------------------
    epochs: int = 200  # epochs per run; an epoch is one segment per account and its update
    runs: int | None = None  # stop after this many runs, earlier starts counted; not set: for ever
    checkpoint_every: int = 25  # epochs between checkpoints
    keep_checkpoints: int = 16  # newest checkpoints kept, beside the last one of every run
    seed: int = 0  # of weights, accounts and shuffles
    checkpoint_dir: str = "checkpoints"  # where checkpoints go, and where a start looks for the newest
    data_dir: str = "data_cache"  # the lake of downloaded bars
    log_dir: str = "logs"  # metrics.jsonl, and the same for TensorBoard
    report_dir: str = "reports"  # what selftest and evaluate write
    # --- what is shown ------------------------------------------------------------------------------------
    dashboard: bool = True  # a live dashboard where the output is a terminal
    log_level: Literal["debug", "info", "warning"] = "info"  # lines of this level and above are shown
    prometheus_port: int | None = None  # the newest metrics on this port of 127.0.0.1, for Prometheus

    def __post_init__(self) -> None:
        validation.check(self)


# Sizes, written down in one place. "full" is what the class says: the promised sizes.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    # One GPU of 8-24 GB; on two CPU cores an epoch takes seconds.
    "small": {
        "envs_per_gpu": 64,
        "d_model": 256,
        "num_layers": 4,
        "num_heads": 8,
        "batch_size": 8_192,
        "learning_rate": 3e-4,
    },
    # Offline, a minute or two on a laptop: a simulated market with something to find.
    "demo": {
        "sources": ("simulated",),
        "envs_per_gpu": 128,
        "d_model": 64,
        "num_layers": 2,
        "num_heads": 4,
        "batch_size": 4_096,
        "learning_rate": 1e-3,
        "warmup_steps": 20,
        "gamma": 0.95,
        "gae_lambda": 0.9,
        "entropy_coef": 0.003,
        "crypto_fee_bps": 1.0,
        "epochs": 50,
        "checkpoint_dir": "checkpoints/demo",
        "log_dir": "logs/demo",
    },
}


def train(settings: Settings, control: Control) -> None:
    """Train until asked to stop, or until ``settings.runs`` runs are done (all ranks run this)."""
    with ExitStack() as on_leaving:
        ranks = on_leaving.enter_context(distributed.start())
        on_leaving.enter_context(checkpoint.exclusive(Path(settings.checkpoint_dir), ranks.is_first))
        control.listen()
        console = on_leaving.enter_context(
            Console(
                Path(settings.log_dir) if ranks.is_first else None,
                log_level=settings.log_level,
                prometheus_port=settings.prometheus_port,
            )
        )
        phases = Phases(console.phase)
        prefetch = on_leaving.enter_context(Prefetch(refresh_ahead(settings, ranks)))
        progress, saved = restored(settings, ranks)
        writer = on_leaving.enter_context(
            CheckpointWriter(
                Path(settings.checkpoint_dir),
                settings.keep_checkpoints,
                ranks.is_first,
                partial(champion.apply_decision, pending=[]),
            )
        )
        examiner = Examiner(Path(settings.checkpoint_dir), ranks, control)
        summary = Summary(progress.transitions)
        trainer: Trainer | None = None
        stopping = progress.is_past(settings.runs)
        while not stopping:
            # once a run: new bars, same training (all ranks; rank 0 downloads)
            lake = Lake(Path(settings.data_dir), console)
            with phases.during("data"):
                data = fresh_bars(lake, settings, progress, ranks, control, console, prefetch)
                if data is None:
                    break  # asked to stop while bars were loading
                console.data(data)
                market = market_on_device(settings, data, trainer, saved, ranks)
            progress.trained_until_ns = max(progress.trained_until_ns, holdout_start_ns(settings, data.bars))
            if trainer is None:
                with heartbeat_thread(COMPILER_SECONDS):
                    trainer = new_trainer(settings, market, saved, ranks)
                saved = None  # gigabytes
            else:
                trainer.set_market(market)
            fingerprint, data = data.fingerprint, None  # the bars are on the device
            trainer.learner.rate_scale = progress.rate_scale
            log.info(f"Run {progress.run}: epochs {progress.epoch + 1} to {settings.epochs}")
            console.begin(settings, progress, f"{ranks.world_size} x {ranks.device.type}", control)
            exam = Exam()  # of the weights as they are

            while progress.epoch < settings.epochs and not stopping:
                watch = Stopwatch(ranks.device)
                cost_scale = progress.cost_scale(settings.cost_ramp, settings.epochs)
                phases.now("rollout")
                rollout = trainer.collect(cost_scale)  # one trunk forward, horizon steps
                watch.mark()
                stop_now = partial(agreed_stop, STOP_NOW, ranks, control)  # asked before every optimizer step
                phases.now("update")
                statistics = trainer.update(rollout, progress.epoch / settings.epochs, stop_now)
                if statistics is None:  # stopped between two steps: the next start takes the others
                    stopping = True
                    writer.save(trainer.checkpoint(progress, fingerprint, {}, exam.record))
                    break
                watch.mark()
                progress.tick(rollout.num_segments * rollout.horizon * ranks.world_size)

                # a signal to one rank stops all of them
                stopping = agreed_stop(STOP_AT_EPOCH_END, ranks, control)
                # the one place where the host waits for the GPU (all ranks)
                metrics = trainer.metrics(progress, statistics, watch)
                is_lost = trainer.has_diverged(metrics) and not stopping
                # once in a while, at the end, and when the last one failed: a checkpoint, with its exam
                due = progress.epoch % settings.checkpoint_every == 0 or progress.epoch == settings.epochs
                saving = not is_lost and (due or stopping or ranks.any(writer.last_save_failed))
                exam = Exam()
                if saving and not stop_now():
                    with phases.during("evaluation"):
                        exam = examiner.examine(trainer, progress, fingerprint, writer)
                    metrics |= exam.figures
                metrics |= phases.figures()
                console.epoch(metrics, settings.epochs)
                for line in exam.lines:
                    log.info(line)
                summary.count(metrics["rollout/reward_bps"])
                if is_lost:
                    progress, saved = rolled_back(settings, progress, writer, ranks)
                    trainer = None  # made anew from the checkpoint
                    break
                if saving:  # all ranks hand in their state
                    stopping = stopping or stop_now()  # one that came during the exam, which was broken off
                    with phases.during("checkpoint"):
                        writer.save(trainer.checkpoint(progress, fingerprint, metrics, exam.record))
                control.progressed()
                is_last = stopping or progress.run == settings.runs
                prefetch.after_epoch(0 if is_last else settings.epochs - progress.epoch)

            if progress.epoch == settings.epochs:
                log.info(f"Run {progress.run} is complete")
                progress.next_run()
                stopping = stopping or progress.is_past(settings.runs)
        for line in summary.lines(progress, writer.finish()):
            log.info(line)
        if ranks.any(writer.last_save_failed):
            raise ExitProgram(
                EXIT_DOES_NOT_FIT,
                f"The end of this training is not saved: make room in {settings.checkpoint_dir}; the next start "
                "goes on from the checkpoint before and trains it again",
            )


def restored(settings: Settings, ranks: Ranks) -> tuple[TrainingProgress, checkpoint.Checkpoint | None]:
    """Find where the training stands; rank 0 chooses the checkpoint, since ranks could see different ones.

    Every rank reads it from the disk; where one cannot, the folder is not shared, and rank 0 sends its own.

    Raises:
        ExitProgram: the checkpoint is of another model; nothing is overwritten.
    """
    saved = None
    if ranks.is_first:
        saved, warnings = checkpoint.newest(Path(settings.checkpoint_dir))
        for warning in warnings:
            log.warning(warning)
    name = ranks.broadcast(saved.path.name if saved else "")
    if not name:
        return TrainingProgress(), None
    if not ranks.is_first:
        saved = checkpoint.named(Path(settings.checkpoint_dir), name)
    if len(set(ranks.gather(saved.transitions if saved else None))) > 1:
        saved = ranks.broadcast(saved)
    assert saved is not None
    if reason := unlike(settings, saved):
        raise ExitProgram(EXIT_SETTING, reason)
    progress = TrainingProgress(saved.run, saved.epoch, saved.transitions)
    if saved.resume:
        progress = TrainingProgress(**saved.resume.clock)
    progress.trained_until_ns = max(progress.trained_until_ns, saved.trained_until_ns)
    if ranks.is_first:  # the last start may have ended between its checkpoint and the ledger
        champion.apply_decision(saved)
    if progress.epoch >= settings.epochs:
        progress.next_run()
    log.info(f"Going on from {saved.path}, {progress.transitions:,} transitions so far")
    if progress.is_past(settings.runs):
        log.info(f"All of --runs {settings.runs} are done: raise it, or use another --checkpoint-dir")
    return progress, saved


def rolled_back(
    settings: Settings, progress: TrainingProgress, writer: CheckpointWriter, ranks: Ranks
) -> tuple[TrainingProgress, checkpoint.Checkpoint | None]:
    """Return to the newest checkpoint, to go on at half the learning rate until the run ends (all ranks).

    Raises:
        ExitProgram: that was done MOST_ROLLBACKS times in this run already.
    """
    rollbacks = progress.rollbacks + 1
    lost = f"run {progress.run} epoch {progress.epoch}: most gradients are not finite"
    if rollbacks > MOST_ROLLBACKS:
        raise ExitProgram(EXIT_SETTING, f"{lost}, after {MOST_ROLLBACKS} rollbacks: lower learning_rate")
    log.warning(f"{lost}; back to the newest checkpoint, with {0.5**rollbacks:.3g} of the learning rate")
    writer.finish()
    progress, saved = restored(settings, ranks)
    progress.rollbacks = rollbacks
    return progress, saved


def new_trainer(
    settings: Settings, market: Market, saved: checkpoint.Checkpoint | None, ranks: Ranks
) -> Trainer:
    """Make this rank's environment and learner from the settings, and take back what a checkpoint saved.

    Raises:
        ExitProgram: they do not fit into the GPU's memory.
    """
    plan, others = memory_plan(settings, market.num_bytes, ranks)
    if others:
        log.warning(others)
    compiles = compile_is_on(settings, ranks.device)
    if compiles:
        log.info("Compiling the update and the accounts' steps, which takes a minute or two once")
    try:
        trainer = Trainer(market, settings, ranks, plan, saved)
    except DoesNotFit as error:
        raise ExitProgram(EXIT_DOES_NOT_FIT, f"This training does not fit: {error}") from error
    if trainer.memory_plan != plan:
        log.warning(f"the GPU's memory was full with {plan}; trains with {trainer.memory_plan}")
    elif plan.memory_bytes:
        log.info(f"GPU memory: {plan}")
    if compiles and trainer.not_compiled:
        log.warning(f"not all is compiled, so training is somewhat slower: {trainer.not_compiled}")
    step = trainer.learner.minibatch_segments * settings.horizon * ranks.world_size
    precision = "bf16" if trainer.policy.bf16 else "fp32"
    log.info(
        f"Policy: {trainer.policy.num_parameters():,} parameters, trunk in {precision}, on {ranks.world_size} x "
        f"{ranks.device.type}; {settings.envs_per_gpu * ranks.world_size:,} accounts; {step:,} transitions per "
        f"optimizer step, {trainer.learner.micro_batch_segments} segments per micro-batch; "
        f"{trainer.flops_per_transition() / 1e9:.3g} GFLOP per transition"
    )
    if ranks.device.type == "cpu" and trainer.policy.num_parameters() > 50_000_000:
        log.warning("no GPU was found: a model of this size takes hours per epoch; try --preset small")
    if step < settings.batch_size:
        log.warning(
            f"batch_size={settings.batch_size:,} is more than the {step:,} transitions of an epoch, which make "
            "one step; raise envs_per_gpu for a larger one"
        )
    return trainer


# --- command line -----------------------------------------------------------------------------------------


def train_command(settings: Settings) -> None:
    """Train for ever; the default command. Ctrl+C finishes the epoch, saves, and ends."""
    code, message = EXIT_OK, ""
    control = Control()
    try:
        validation.check_batch(settings, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        control.report_exit_code(EXIT_SETTING)
        exit_with(EXIT_SETTING, f"Invalid setting: {error}")
    try:
        train(settings, control)
    except ExitProgram as reason:
        code, message = reason.code, str(reason)
    except checkpoint.FolderInUse as reason:
        code, message = EXIT_LOCKED, str(reason)
    except checkpoint.CheckpointError as reason:
        code, message = EXIT_SETTING, str(reason)
    except torch.OutOfMemoryError as error:
        # It did fit: somebody else took the memory since, and the next start plans with what is left.
        code = EXIT_CRASH if control.has_progressed else EXIT_DOES_NOT_FIT
        message = f"The GPU's memory is full: lower envs_per_gpu, then d_model. {str(error).splitlines()[0]}"
    except KeyboardInterrupt:
        code, message = EXIT_ABORTED, "Aborted; the newest checkpoint on disk is intact"
    control.report_exit_code(code)
    if code != EXIT_OK:
        exit_with(code, message)


def main() -> None:
    """Run the named command, or ``train``."""
    try:
        load_dotenv()
    except (OSError, UnicodeDecodeError):
        typer.echo(
            "Invalid setting: .env must be a readable text file in UTF-8: save it again as one", err=True
        )
        sys.exit(EXIT_SETTING)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
    for run in (train_command, *COMMANDS, *CHECKPOINT_COMMANDS):
        of_checkpoint = run in CHECKPOINT_COMMANDS
        command = (
            checkpoint_command_from(Settings, run) if of_checkpoint else command_from(Settings, PRESETS, run)
        )
        app.command(name_of(run), help=inspect.getdoc(run), hidden=run in HIDDEN)(command)
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] != "--help"):
        arguments = ["train", *arguments]
    app(args=arguments)


if __name__ == "__main__":
    main()
