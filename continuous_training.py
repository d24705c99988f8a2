"""Train a transformer trading policy with PPO, on every GPU, on fresh minute bars, until stopped.

Start it with START_CONTINUOUS.sh (or .bat). Settings are constants at the top of continuous_training.py: edit
them there, or override one for a single start: bash START_CONTINUOUS.sh --envs-per-gpu 256
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

if __name__ == "__main__" and (folder := str(Path(__file__).resolve().parent)) not in sys.path:
    sys.path.insert(0, folder)  # with PYTHONSAFEPATH Python leaves out the script's folder

from runtime import surroundings

if __name__ == "__main__":
    surroundings.require_packages()
    surroundings.prepare_process()
# The allocator reads this when torch is first imported, hence the imports below it.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")

import typer
from dotenv import load_dotenv

from commands.cli import application, enter_program_folder, exit_with, run, with_command
from commands.options import (
    option,
    parse_costs,
    read_checkpoint,
    read_costs,
    read_count,
    read_day,
    read_number,
)
from envs.feature_errors import FeatureError
from runtime.control import (
    EXIT_ABORTED,
    EXIT_CRASH,
    EXIT_DOES_NOT_FIT,
    EXIT_LOCKED,
    EXIT_OK,
    EXIT_SETTING,
    Control,
    ExitProgram,
)
from runtime.train_log import append_line, keep_log
from training import setting_types, validation
from training.urls import Url

STOCKS = tuple(
    "AAPL MSFT GOOGL AMZN NVDA META TSLA JPM BAC V MA WMT UNH PG DIS INTC CSCO ORCL ADBE CRM NFLX JNJ".split()
)
BINANCE_PAIRS = tuple(
    "BTCUSDT ETHUSDT BNBUSDT SOLUSDT XRPUSDT ADAUSDT DOGEUSDT TRXUSDT LINKUSDT AVAXUSDT DOTUSDT LTCUSDT "
    "BCHUSDT UNIUSDT AAVEUSDT ATOMUSDT NEARUSDT FILUSDT ETCUSDT ARBUSDT OPUSDT SHIBUSDT POLUSDT SUIUSDT "
    "ALGOUSDT XLMUSDT".split()
)
BINANCE_PERPETUALS = tuple(
    "BTCUSDT.P ETHUSDT.P BNBUSDT.P SOLUSDT.P XRPUSDT.P ADAUSDT.P DOGEUSDT.P LINKUSDT.P AVAXUSDT.P "
    "LTCUSDT.P".split()
)
POLYGON_CRYPTO = tuple(
    "X:BTC-USD X:ETH-USD X:SOL-USD X:XRP-USD X:ADA-USD X:DOGE-USD X:AVAX-USD X:LINK-USD X:LTC-USD "
    "X:DOT-USD".split()
)


@dataclass(frozen=True)
@setting_types.allow_any_default
class Settings:
    """Every setting. Its comment is its --help; None means "not set"."""

    # --- data ---------------------------------------------------------------------------------------------
    sources: tuple[str, ...] = ("polygon", "binance", "yahoo")  # also binance_futures, files, simulated
    stocks: tuple[str, ...] = STOCKS  # stocks, from Polygon and Yahoo; or top:500
    binance_pairs: tuple[str, ...] = BINANCE_PAIRS  # Binance spot pairs
    binance_perpetuals: tuple[str, ...] = BINANCE_PERPETUALS  # Binance USD-M perpetual futures
    polygon_crypto: tuple[str, ...] = POLYGON_CRYPTO  # Polygon's global crypto pairs; or top:50
    history_days: int = 730  # days of bars up to the end, when start_date is not set
    start_date: str | None = None  # first day of bars, YYYY-MM-DD
    end_date: str | None = None  # last day of bars, YYYY-MM-DD; not set: now, at the start of every run
    min_bars: int = 2_000  # symbols with fewer bars are dropped
    holdout_days: int = 14  # the newest days of bars, never trained on
    extended_hours: bool = False  # keep stock bars before 09:30 and after 16:00 New York
    features: tuple[str, ...] = ("symbol",)  # groups of what the policy sees: symbol, day, flow, panel
    keep_pegged: bool = False  # keep symbols whose price hardly moves, such as stablecoins
    files_dir: str | None = None  # folder with CSV or Parquet files of your own, for the source files
    files_timezone: str = "UTC"  # of times without one in those files, such as America/New_York
    missing_symbols: Literal["stop", "continue"] = "stop"  # when a resumed run has fewer than it began with
    simulated_symbols: int = 32  # symbols of the simulated market
    simulated_bars: int = 60_000  # minutes of bars of each simulated symbol
    # --- accounts -----------------------------------------------------------------------------------------
    envs_per_gpu: int = 512  # accounts stepped at once on each GPU
    context_bars: int = 64  # bars of history before each segment
    horizon: int = 128  # bars on which an account acts in an epoch
    episode_bars: int = 1_280  # bars of an episode, a multiple of horizon
    positions: tuple[float, ...] = (-1.0, 0.0, 1.0)  # target positions, as fractions of equity
    account: Literal["single", "pair", "group"] = "single"  # one per symbol, or over two or more
    group_size: int = 8  # symbols of an account, where account is group
    gross_exposure: float = 1.0  # of a group: cap on longs and shorts together, as a fraction of equity
    net_exposure: float = 0.0  # of a group: cap on longs less shorts, either way; 0: market-neutral
    allow_spot_shorts: bool = False  # of a training of spot pairs alone: coins are borrowed on margin
    stock_fee_bps: float = 0.5  # fee on traded value, stocks
    crypto_fee_bps: float = 5.0  # fee on traded value, crypto
    perpetual_fee_bps: float = 4.5  # fee on traded value, perpetual futures
    slippage_bps: float = 1.0  # fills are worse than the open by this much
    range_slippage: float = 0.0  # plus this fraction of the filling bar's high - low
    volume_slippage: float = 0.0  # plus this for an order as large as the bar's volume, less if smaller
    account_value: float = 10_000.0  # initial money of an account, compared with the volume
    flat_before_close: int = 0  # minutes before the scheduled close in which no stock is held; 0: off
    borrow_rate: float = 0.05  # yearly interest on borrowed shares and money
    maintenance_margin: float = 0.01  # equity per value of a perpetual position where it is liquidated
    ruin_fraction: float = 0.2  # an episode ends in ruin below this fraction of its initial equity
    cost_ramp: float = 0.5  # fraction of the first run over which costs grow from zero to the above
    reward: Literal["log equity", "less market"] = "log equity"  # or less market: without the market's part
    # --- model --------------------------------------------------------------------------------------------
    d_model: int = 2_048  # width of the transformer
    num_layers: int = 12  # transformer blocks
    num_heads: int = 32  # attention heads
    feature_encoding: Literal["piecewise", "linear"] = "piecewise"  # piecewise: tails apart from the middle
    precision: Literal["auto", "fp8", "bf16", "fp32"] = "auto"  # of the transformer; auto: bf16, on CPUs fp32
    compile: Literal["auto", "on", "off"] = "auto"  # compile the model and the accounts; auto: on GPUs
    parallel: Literal["ddp", "fsdp"] = "ddp"  # whole model on each GPU; fsdp: a shard, for larger models
    device: str = "auto"  # auto: every GPU, else the CPU; cpu; cuda; or one GPU, such as cuda:1
    # --- optimisation -------------------------------------------------------------------------------------
    batch_size: int = 65_536  # transitions per optimizer step over all GPUs
    micro_batch_segments: int | None = None  # segments per forward and backward; not set: what fits in memory
    feature_noise: float = 0.0  # deviation of noise on every feature in training; 1 is a feature's own
    stochastic_depth: float = 0.0  # chance that a segment skips the last block in training; less in others
    update_passes: int = 3  # passes over each rollout
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon moves matrices between hidden units, adamw the rest
    learning_rate: float = 1e-4  # peak learning rate
    warmup_steps: int = 30  # optimizer steps up to the peak learning rate, once
    final_learning_rate_fraction: float = 0.1  # fraction of learning_rate at the end of each run
    weight_decay: float = 0.01  # of weight matrices
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    gamma: float = 0.99  # discount per bar
    gae_lambda: float = 0.95  # weight of longer returns in the advantages
    advantages: Literal["hindsight", "gae"] = "hindsight"  # value every position, or only the drawn one
    clip_coef: float = 0.2  # the ratio of new to old probability counts within 1 -/+ this
    entropy_coef: float = 0.01  # weight of the entropy bonus
    value_coef: float = 0.5  # weight of the value loss
    forecast_coef: float = 0.0  # weight of the loss of auxiliary forecasts of the market ahead; 0: none
    # --- runs ---------------------------------------------------------------------------------------------
    epochs: int = 200  # epochs per run; an epoch is one segment per account and its update
    runs: int | None = None  # stop after this many runs, including those of earlier starts; not set: never
    checkpoint_every: int = 25  # epochs between checkpoints
    checkpoint_minutes: float = 60.0  # minutes after which one is due as well, whichever comes first
    exam_minutes: float = 60.0  # an exam that takes longer is given up, and training continues
    exam_patience: int | None = None  # exams in a row below the run's best that end it, at its best weights
    exam_on_stop: bool = False  # after Ctrl+C, hold or finish the exam of the last checkpoint
    keep_checkpoints: int = 16  # newest checkpoints to keep, of any run
    keep_runs: int = 8  # newest runs of which to keep the last checkpoint; older: one a day, then one a week
    mirror: str | None = None  # folder or URL to copy checkpoints to, and to fetch one from if none is here
    seed: int = 0  # of weights, accounts and shuffles
    checkpoint_dir: str = "checkpoints"  # where checkpoints are written, and training resumes from the newest
    data_dir: str = "data_cache"  # the lake of downloaded bars
    log_dir: str = "logs"  # train.log, metrics.jsonl, and event files for TensorBoard
    report_dir: str = "reports"  # what selftest and evaluate write
    # --- display ------------------------------------------------------------------------------------------
    dashboard: bool = True  # a live dashboard where the output is a terminal
    log_level: Literal["debug", "info", "warning"] = "info"  # lines of this level and above are shown
    prometheus_port: int | None = None  # the newest metrics on this port of 127.0.0.1, for Prometheus
    web_port: int | None = None  # a page that shows how training goes, on this port
    web_host: str = "127.0.0.1"  # address of that page; one that others can reach needs WEB_TOKEN in .env
    telemetry: tuple[str, ...] = ()  # trackers that get every epoch's figures, too: wandb, mlflow, trackio
    notify: tuple[Url, ...] = ()  # URLs to send messages to; secret ones are better in NOTIFY_URLS in .env

    def __post_init__(self) -> None:
        for name, value in setting_types.convert_all(self).items():
            object.__setattr__(self, name, value)
        for name, folder in validation.folders(self):
            object.__setattr__(self, name, setting_types.expand_path(folder))
        validation.check(self)


# Named sets of sizes. "full" is the defaults of the class.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    # One GPU of 8-24 GB; on two CPU cores an epoch takes seconds.
    "small": {
        "envs_per_gpu": 64,
        "d_model": 256,
        "num_layers": 4,
        "num_heads": 8,
        "batch_size": 4_096,
        "update_passes": 1,  # of new bars more is learnt than of the same once more (docs/LOG.md)
        "learning_rate": 1e-3,
    },
    # Offline, a minute or two on a laptop: a simulated market with an edge to find.
    "demo": {
        "sources": ("simulated",),
        "envs_per_gpu": 128,
        "d_model": 64,
        "num_layers": 1,
        "num_heads": 4,
        "feature_encoding": "linear",  # its edge is nearly linear in its features
        "context_bars": 32,
        "horizon": 256,
        "batch_size": 4_096,
        "update_passes": 1,
        "optimizer": "muon",  # which finds a known edge sooner; on real bars it is no better (docs/LOG.md)
        "learning_rate": 3e-3,
        "warmup_steps": 20,
        "gamma": 0.95,
        "gae_lambda": 0.9,
        "entropy_coef": 0.003,
        "crypto_fee_bps": 1.0,
        "epochs": 50,
        "runs": 1,
        "checkpoint_dir": "checkpoints/demo",
        "log_dir": "logs/demo",
    },
}


def train(settings: Settings, control: Control, **given: Any) -> None:
    """Train until asked to stop, or until ``settings.runs`` runs are done (every rank runs this)."""
    from commands.train import Job  # imports torch, which takes seconds

    surroundings.collect_as_usual()
    with Job(
        settings, control, **given
    ) as job:  # ranks, folder lock, console, checkpoint writer, prefetch, examiner
        # once per run: fresh bars, same weights and optimizer (all ranks; rank 0 downloads)
        while job.begin_run():
            while not (job.stopping or job.progress.is_over(settings)):
                rollout = job.trainer.collect()  # one trunk forward, then `horizon` account steps
                losses = job.trainer.update(rollout, job.stop_now)  # asks before every optimizer step
                del rollout  # the next one needs its memory
                if losses is None:  # stopped between two steps: the next start takes the others
                    if not job.is_corrupt():
                        job.save(metrics={})
                    break
                job.agree_on_stop()  # a signal to one rank stops all of them
                metrics = job.trainer.metrics(losses)  # the one place where the host waits for the GPU

                # rare: most gradients were not finite
                if job.trainer.has_diverged(metrics) and not job.stopping:
                    job.log(metrics)
                    job.roll_back()
                    break

                # once in a while: exam on held-out days, then a checkpoint (all ranks take part)
                is_due = job.checkpoint_is_due()
                if is_due and job.is_corrupt():  # a silent error of a GPU or a host
                    job.log(metrics)
                    job.return_to_checkpoint()
                    break
                if is_due:
                    metrics |= job.examine()
                job.log(metrics)
                if is_due:
                    job.save(metrics)
                job.end_epoch()

            job.end_run()
        job.finish()  # wait for the last checkpoint; summary


# --- command line -----------------------------------------------------------------------------------------


def train_command(settings: Settings) -> None:
    """Train until stopped (the default command). Ctrl+C finishes the epoch, saves a checkpoint and exits."""
    code, message = EXIT_OK, ""
    log_dir = Path(settings.log_dir) if os.environ.get("RANK", "0") == "0" else None
    control = Control()
    try:
        validation.check_start(settings, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        control.report_exit_code(EXIT_SETTING)
        exit_with(EXIT_SETTING, f"Invalid setting: {error}")

    import torch  # takes seconds; a mistake was reported before

    from commands.companion import beside
    from training import checkpoint, devices
    from training.memory import DoesNotFit
    from training.own_parts import check_own_parts

    try:
        if control.folder is None:  # else the supervisor's preflight has compared them
            devices.find(settings, os.environ)
        check_own_parts(settings)
        is_alone = control.folder is None and log_dir is not None  # else the supervisor has one beside it
        with keep_log(log_dir, settings.log_level), beside(settings) if is_alone else nullcontext():
            train(settings, control)
    except devices.DeviceError as reason:
        code, message = EXIT_SETTING, str(reason)
    except ExitProgram as reason:
        code, message = reason.code, str(reason)
    except checkpoint.FolderInUse as reason:
        code, message = EXIT_LOCKED, str(reason)
    except (checkpoint.CheckpointError, FeatureError) as reason:
        code, message = EXIT_SETTING, str(reason)
    except DoesNotFit as error:
        code, message = EXIT_DOES_NOT_FIT, f"This training does not fit: {error}"
    except torch.OutOfMemoryError as error:
        # It did fit: another program has taken memory since, and the next start plans with the rest.
        code = EXIT_CRASH if control.has_progressed else EXIT_DOES_NOT_FIT
        message = f"The GPU's memory is full: lower envs_per_gpu, then d_model. {str(error).splitlines()[0]}"
    except torch.AcceleratorError as error:
        code = EXIT_CRASH
        message = f"The GPU failed: {str(error).splitlines()[0]}. Look for Xid in the kernel's log (dmesg)"
    except KeyboardInterrupt:
        code, message = EXIT_ABORTED, "Aborted; the newest checkpoint on disk is intact"
    control.report_exit_code(code)
    if code != EXIT_OK:
        append_line(log_dir, message, logging.ERROR)
        exit_with(code, message)


def walkforward_command(
    settings: Settings,
    step: Annotated[int, option("--step", read_count, "days from one training to the next", "int")] = 7,
    first_day: Annotated[
        str,
        option("--from", read_day, "first day to trade on, UTC; default: the newer half, a year at most"),
    ] = "",
    last_day: Annotated[str, option("--to", read_day, "last day; default: the newest in the lake")] = "",
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="train every window from nothing; default: go on with the one before"),
    ] = False,
    jobs: Annotated[int, option("--jobs", read_count, "windows at once; needs --fresh", "int")] = 1,
    ensemble: Annotated[
        int,
        option("--ensemble", read_count, "newest champions that decide together, by their average", "int"),
    ] = 1,
    costs: Annotated[str, option("--costs", read_costs, "flat costs to compare, bps")] = "0,1,2,5,10",
    trees: Annotated[bool, typer.Option("--trees", help="boosted trees, too; needs lightgbm")] = False,
    start_from: Annotated[
        Path | None,
        option(
            "--start-from", read_checkpoint, "a checkpoint to begin with; default: random weights", "path"
        ),
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="although it has seen days to be walked; stamps the page")
    ] = False,
    max_hours: Annotated[
        float,
        option("--max-hours", read_number, "refuse what would take longer", "float"),
    ] = 24.0,
    output: Annotated[
        Path | None, typer.Option("--output", help="the walk's folder; default: walkforward")
    ] = None,
    fetch: Annotated[bool, typer.Option("--refresh", help="fetch new bars first")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Live a training's life over stored bars, and let the champion of each moment trade what came after it."""
    from commands import walkforward
    from monitoring.console import Console

    try:
        options = walkforward.WalkOptions(
            step=step,
            first_day=first_day,
            last_day=last_day,
            fresh=fresh,
            jobs=jobs,
            ensemble=ensemble,
            costs_bps=parse_costs(costs),
            trees=trees,
            start_from=start_from,
            allow_overlap=allow_overlap,
            max_hours=max_hours,
            output=output or Path("walkforward"),
            refresh=fetch,
            as_json=as_json,
        )
    except ValueError as error:
        raise ExitProgram(EXIT_SETTING, f"Invalid setting: {error}") from error
    with Console(Path(settings.log_dir), to_stderr=as_json) as console:
        walkforward.command(settings, train, options, console)


def main() -> None:
    """Run the named command, or ``train``, in the program's folder."""
    enter_program_folder(Path(__file__).resolve().parent)
    try:
        load_dotenv(Path(__file__).with_name(".env"))  # not one of a folder above
    except (OSError, UnicodeDecodeError):
        exit_with(EXIT_SETTING, "Invalid setting: .env must be a readable text file in UTF-8: save it as one")
    words = with_command(sys.argv[1:])
    if "--help" in words:
        from commands.help_layout import keep_names_whole

        keep_names_whole()
    wanted = {words[0], *(["preflight"] if words[0] == "train" else [])}
    run(application(Settings, PRESETS, train_command, __doc__, [walkforward_command], wanted), words)


if __name__ == "__main__":
    main()
