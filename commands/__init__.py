"""The commands beside ``train``: each reads its options and calls the module of its name.

What a command computes with is imported when it runs: ``--help`` and a mistyped option answer at once, without
torch.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.options import (
    option,
    read_checkpoint,
    read_costs,
    read_count,
    read_day,
    read_holding,
    read_moment,
    read_number,
    read_output,
)
from runtime.control import (
    EXIT_ABORTED,
    EXIT_CRASH,
    EXIT_NO_DATA,
    EXIT_SETTING,
    ExitProgram,
    report_goes_on,
    report_plan,
)
from runtime.launch import Launch
from runtime.train_log import append_line
from training import validation

if TYPE_CHECKING:
    from continuous_training import Settings
    from evaluation.trained_policy import TrainedPolicy

log = logging.getLogger("continuous_training")


def preflight_command(settings: Settings) -> None:
    """Check devices, settings and folder before any process trains; one line says what training computes on.

    Where one process is to train, the supervisor hears that this one does.
    """
    try:
        world_size = Launch.from_environment(
            os.environ
        ).world_size  # where NPROC is not set, at least so many
    except ValueError as error:
        raise ExitProgram(EXIT_SETTING, str(error)) from error
    try:
        validation.check_start(settings, world_size)
    except ValueError as error:
        raise ExitProgram(EXIT_SETTING, f"Invalid setting: {error}") from error
    typer.echo("Settings are valid; loading PyTorch ...", err=True)
    from commands import check, companion
    from training.data_feed import data_request
    from training.own_parts import check_own_parts

    check_own_parts(settings)
    try:
        launch, found = check.plan_launch(settings, os.environ)
    except ValueError as error:
        raise ExitProgram(EXIT_SETTING, str(error)) from error
    # Of several machines that share the folder only the first writes, so only that one locks it.
    is_first = launch.node_rank in ("", "0")
    for line in check.check_folder(settings, launch.world_size, is_first):
        if line.code:
            raise ExitProgram(line.code, line.text)
    has_companion = is_first and companion.is_wanted(settings, os.environ)
    report_plan(launch.num_ranks, Path(settings.log_dir), has_companion)
    room = check.check_room(settings, data_request(settings, time.time_ns()), launch, found)
    # Not refused: memory is an estimate here, and a full disk has old checkpoints that make room.
    watchers = list(check.check_watchers(settings, os.environ, sends_test=False)) if has_companion else []
    notes = [f"{line.topic}: {line.text}" for line in watchers if line.level == "OK"]
    doubts = [f"{line.topic}: {line.text}" for line in [*room, *watchers] if line.level != "OK"]
    warnings = [f"Warning: {text}" for text in (*found.warnings, *doubts)]
    for text in (f"Trains {found.text}.", *notes, *warnings):
        typer.echo(text, err=True)
        if is_first:
            append_line(Path(settings.log_dir), text)
    if launch.world_size == 1:
        report_goes_on()


def companion_command(settings: Settings) -> None:
    """Serve the page and send the messages of a training, until standard input ends."""
    from commands import companion

    companion.run(settings, os.environ, sys.stdin)


def check_command(
    settings: Settings,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="contact no source")] = False,
    test_notify: Annotated[
        bool, typer.Option("--test-notify", help="send a message to every --notify URL")
    ] = False,
) -> None:
    """Check all that can be known before a start: settings, features, keys, sources, clock, GPUs, memory, disk."""
    from commands import check
    from monitoring.console import Console

    with Console(Path(settings.log_dir), to_stderr=as_json) as console:
        lines = check.check_all(settings, os.environ, offline, test_notify)
        code = check.print_report(lines, console, as_json)
    if code:
        raise ExitProgram(code)


def data_command(
    settings: Settings,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    no_refresh: Annotated[bool, typer.Option("--no-refresh", help="contact no source")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="re-read and check the whole lake first")] = False,
    flow: Annotated[
        bool, typer.Option("--flow", help="fetch again now what was kept before order flow was")
    ] = False,
    details: Annotated[
        bool, typer.Option("--details", help="a row for every source, with the reasons of rejected bars")
    ] = False,
    background: Annotated[bool, typer.Option("--background", hidden=True)] = False,
) -> None:
    """Refresh the data once and show what is there."""
    from commands import data
    from data_sources.errors import DataError
    from data_sources.lake.lake import Lake
    from data_sources.lake.quality import closed_before
    from monitoring.console import Console
    from training.data_feed import data_request

    now_ns = time.time_ns()
    with Console(None if background else Path(settings.log_dir), to_stderr=as_json) as console:
        lake, request = Lake(Path(settings.data_dir), console), data_request(settings, now_ns)
        try:
            if background:
                cutoff_ns = closed_before(now_ns)
                request = data_request(settings, cutoff_ns)
                data.in_background(lake, request, now_ns, cutoff_ns, console.emit)
            elif code := data.show(
                lake, request, now_ns, console, not no_refresh, verify, flow, as_json, details
            ):
                raise ExitProgram(code, "There are no bars." if code == EXIT_NO_DATA else "")
        except DataError as error:
            raise ExitProgram(EXIT_NO_DATA, str(error)) from error


def probe_command(
    settings: Settings,
    costs: Annotated[str, option("--costs", read_costs, "flat costs of a side, bp")] = "0,0.5,1,2,5",
    trees: Annotated[
        bool | None,
        typer.Option("--trees/--no-trees", help="boosted trees, too; default: where lightgbm is installed"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Fit plain models to the features of the lake: what the signal is worth, and at which costs; in seconds."""
    from commands import probe
    from monitoring.console import Console

    try:
        costs_bps, models = probe.parse_costs(costs), probe.chosen_models(trees)
    except ValueError as error:
        raise ExitProgram(EXIT_SETTING, f"Invalid setting: {error}") from error
    with Console(Path(settings.log_dir), to_stderr=as_json) as console:
        probe.command(settings, costs_bps, models, console, as_json)


def status_command(
    settings: Settings,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show how a training goes, on one screen: one that runs elsewhere on this machine, or has run."""
    from commands import status

    if code := status.show(status.find(settings), typer.secho, as_json):
        raise ExitProgram(code)


def dashboard_command(
    settings: Settings,
    attach: Annotated[bool, typer.Option("--attach", help="to a training of this machine; always so")] = True,
) -> None:
    """Show the live dashboard of a training that runs elsewhere on this machine, until Ctrl+C."""
    from commands import status

    status.watch(status.find(settings))


def selftest_command(
    settings: Settings,
    seeds: Annotated[int, option("--seeds", read_count, "number of trainings per market", "int")] = 1,
) -> None:
    """Prove on markets with a known best policy that training works and nothing looks ahead; takes a while."""
    from commands.selftest import TRIALS, Sizes, lookahead, report, run_trials
    from monitoring.console import Console
    from training import distributed

    with distributed.start(wanted=settings.device) as ranks, Console(Path(settings.log_dir)):
        failures = lookahead.run(settings, ranks)
        seed_list = range(settings.seed, settings.seed + seeds)
        results = run_trials(settings, TRIALS, Sizes(), seed_list, ranks)
        for path in report.write(Path(settings.report_dir) / "selftest", TRIALS, results):
            log.info(f"Wrote {path}")
    failures += [
        f"{result.trial}, seed {result.seed}: {result.failure}" for result in results if result.failure
    ]
    if failures:
        raise ExitProgram(EXIT_CRASH, "\n".join(failures))


def record_command(
    settings: Settings,
    verify: Annotated[bool, typer.Option("--verify", help="check that no line was edited")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show what the champions earned on bars that came after them, as a table and a page."""
    from commands import record
    from monitoring.console import Console

    try:
        with Console(Path(settings.log_dir), to_stderr=as_json) as console:
            (record.verify if verify else record.show)(settings, console, as_json)
    except OSError as error:
        raise ExitProgram(EXIT_CRASH, f"{error.filename}: {error.strerror}") from error


def history_command(
    settings: Settings,
    has_all: Annotated[
        bool, typer.Option("--all", help="every exam in the table, not the newest alone")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show all exams, champions and records of a training, as tables and a page."""
    from commands import history
    from monitoring.console import Console

    try:
        with Console(Path(settings.log_dir), to_stderr=as_json) as console:
            history.show(settings, console, as_json, has_all)
    except OSError as error:
        raise ExitProgram(EXIT_CRASH, f"{error.filename}: {error.strerror}") from error


def episode_command(
    trained: TrainedPolicy,
    symbol: Annotated[str, typer.Option("--symbol", help="default: the checkpoint's first")] = "",
    start: Annotated[str, option("--start", read_moment, "UTC; default: the newest whole episode")] = "",
    output: Annotated[Path, option("--output", read_output, "the PNG to write", "path")] = Path(
        "episode.png"
    ),
) -> None:
    """Draw one episode of a checkpoint on bars from the lake; downloads nothing."""
    from commands import episode

    typer.echo(episode.command(trained, symbol, start, output))


def evaluate_command(
    trained: TrainedPolicy,
    first_day: Annotated[
        str, option("--from", read_day, "first day, UTC; default: the first that was never trained on")
    ] = "",
    last_day: Annotated[
        str,
        option("--to", read_day, "last day; default: the newest of the training's bars, or of --refresh"),
    ] = "",
    symbols: Annotated[
        str, typer.Option("--symbols", help="comma-separated; default: the checkpoint's")
    ] = "",
    costs: Annotated[str, option("--costs", read_costs, "flat costs to compare, bps")] = "0,1,2,5,10",
    plot_symbols: Annotated[
        str, typer.Option("--plot-symbols", help="to draw one by one; default: the best and worst three")
    ] = "",
    refresh: Annotated[bool, typer.Option(help="fetch new bars first")] = False,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="allow days that were trained on, and mark the report")
    ] = False,
    against: Annotated[
        Path | None,
        option(
            "--against", read_checkpoint, "another checkpoint to compare it with, day by day; or best", "path"
        ),
    ] = None,
) -> None:
    """Run the exam on bars in the lake and write a report: HTML, PNGs and JSON in report_dir."""
    from commands import evaluate
    from monitoring.console import Console

    options = evaluate.EvaluateOptions.parse(
        first_day, last_day, symbols, costs, plot_symbols, allow_overlap, refresh, against
    )
    try:
        with Console(Path(trained.settings.log_dir)) as console:
            evaluate.command(trained, options, console)
    except OSError as error:
        raise ExitProgram(EXIT_CRASH, f"The report was not written: {error}") from error
    except KeyboardInterrupt:
        raise ExitProgram(EXIT_ABORTED, "Aborted; no report was written") from None


def signals_command(
    trained: TrainedPolicy,
    symbols: Annotated[
        str, typer.Option("--symbols", help="comma-separated; default: all of the training")
    ] = "",
    holding: Annotated[
        list[str] | None,
        option("--holding", read_holding, "a position you hold, SYMBOL=POSITION; repeatable; default: none"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="repeat after every minute, until Ctrl+C")] = False,
    no_refresh: Annotated[bool, typer.Option("--no-refresh", help="contact no source")] = False,
    details: Annotated[
        bool, typer.Option("--details", help="also what it wants from every position that you could hold")
    ] = False,
) -> None:
    """Show the position that a checkpoint wants in each symbol now; sends no orders."""
    from commands import signals
    from data_sources.errors import DataError
    from monitoring.console import Console

    options = signals.SignalOptions.parse(
        symbols, holding or (), not no_refresh, as_json, trained.settings.positions, details
    )
    with Console(Path(trained.settings.log_dir), to_stderr=as_json) as console:
        try:
            if watch:
                signals.watch(trained, options, console)
            elif not signals.run(trained, options, console, time.time_ns(), console, indent=1):
                raise ExitProgram(EXIT_NO_DATA, "There is no signal.")
        except DataError as error:
            raise ExitProgram(EXIT_NO_DATA, str(error)) from error


def paper_command(
    trained: TrainedPolicy,
    symbols: Annotated[
        str, typer.Option("--symbols", help="comma-separated; default: all of the training")
    ] = "",
    output: Annotated[
        Path | None, typer.Option("--output", help="the accounts' folder; default: paper/NAME")
    ] = None,
    portfolio: Annotated[
        bool, typer.Option("--portfolio", help="beside them one account over all symbols")
    ] = False,
    gross: Annotated[
        float,
        option("--gross", read_number, "cap on its exposure, in equities", "float"),
    ] = 1.0,
    minutes: Annotated[
        int | None, option("--minutes", read_count, "end after so many; default: at Ctrl+C", "int")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a minute")] = False,
) -> None:
    """Trade on paper: accounts on live bars, once a minute, until Ctrl+C; sends no orders."""
    from commands import paper
    from monitoring.console import Console

    wanted = tuple(dict.fromkeys(name.strip() for name in symbols.split(",") if name.strip()))
    options = paper.PaperOptions(wanted, output, minutes, as_json, gross if portfolio else None)
    with Console(Path(trained.settings.log_dir), to_stderr=as_json) as console:
        try:
            paper.run(trained, options, console)
        except OSError as error:
            raise ExitProgram(EXIT_CRASH, f"{error.filename}: {error.strerror}") from error


def _read_push(_name: str, text: str) -> str:
    from commands.push import check_push

    check_push(text, os.environ)
    return text


def export_command(
    trained: TrainedPolicy,
    output: Annotated[Path | None, typer.Option("--output", help="default: exports/NAME")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="also write graphs for torch.export and ONNX")] = False,
    push_to: Annotated[
        str, option("--push", _read_push, "then upload it to the Hugging Face Hub, as OWNER/NAME")
    ] = "",
    public: Annotated[bool, typer.Option("--public", help="with --push, a new repository is public")] = False,
) -> None:
    """Export a checkpoint's policy: safetensors, a card that describes it, and an example."""
    from commands import export, push

    folder = export.command(trained, output, onnx, typer.echo)
    typer.echo(f"Wrote {folder}")
    if push_to:
        typer.echo(f"Pushed {push.push(folder, push_to, public, os.environ)}")


# A hidden one is for other processes of the program.
COMMANDS: tuple[Callable[..., None], ...] = (
    data_command,
    check_command,
    probe_command,
    status_command,
    dashboard_command,
    selftest_command,
    record_command,
    history_command,
    preflight_command,
    companion_command,
)
CHECKPOINT_COMMANDS: tuple[Callable[..., None], ...] = (
    evaluate_command,
    episode_command,
    signals_command,
    paper_command,
    export_command,
)
# They take several checkpoints, too.
ENSEMBLE_COMMANDS = tuple(command for command in CHECKPOINT_COMMANDS if command is not episode_command)
HIDDEN = (preflight_command, companion_command)


def name_of(command: Callable[..., None]) -> str:
    """Return the name that runs a command."""
    return command.__name__.removesuffix("_command")
