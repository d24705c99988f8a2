"""The command line: a setting is an option, and its comment in the class is the help."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import typer

from commands import CHECKPOINT_COMMANDS, COMMANDS, ENSEMBLE_COMMANDS, HIDDEN, name_of
from commands.version import program_version
from envs.feature_errors import FeatureError
from runtime import surroundings
from runtime.control import (
    CHECK_FIRST,
    EXIT_CRASH,
    EXIT_DOES_NOT_FIT,
    EXIT_SETTING,
    ExitProgram,
    preflight_goes_on,
)
from training.setting_types import KINDS, NOT_PASSED_ON, expand_path, shown
from training.urls import Url
from training.validation import is_folder

if TYPE_CHECKING:
    from continuous_training import Settings

KEYWORD = inspect.Parameter.KEYWORD_ONLY
# A line of the class body: the title of a section, or a setting with its comment.
CLASS_LINE = re.compile(r"^    (?:# --- (.+?) -+|(\w+): [^#\n]+  # (.+))$", re.MULTILINE)
CALLED_FROM = "CONTINUOUS_TRAINING_CALLED_FROM"  # set by the start scripts
_called_from = ""  # where relative paths on the command line start; "": the current folder
LONGEST_LIST = 4  # of a default that is shown in full
# The base class of all mistakes on a command line. Typer exports it under no name, and bundles its own click.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def application(
    settings_class: type[Settings],
    presets: Mapping[str, Mapping[str, Any]],
    train: Callable[..., None],
    help_text: str | None,
    others: Sequence[Callable[..., None]] = (),
    wanted: Collection[str] | None = None,
) -> typer.Typer:
    """Return the program with all its commands, and ``others`` that need the main loop; ``run`` runs it.

    Only the ``wanted`` ones have their options, as those of all take a third of a second; None: all have.
    """
    paragraphs = re.sub(r"(?<!\n)\n(?!\n)", " ", help_text or "")  # typer keeps line breaks
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=paragraphs)

    @app.callback()
    def _options(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
        ] = False,
    ) -> None:
        pass

    def is_wanted(command: Callable[..., None]) -> bool:
        return wanted is None or name_of(command) in wanted

    for command in (train, *others, *COMMANDS):
        app.command(name_of(command), help=inspect.getdoc(command), hidden=command in HIDDEN)(
            command_from(settings_class, presets, command) if is_wanted(command) else _not_wanted
        )
    for command in CHECKPOINT_COMMANDS:
        app.command(
            name_of(command),
            help=f"{inspect.getdoc(command)}\n\nSettings that are not given are those of its training.",
            rich_help_panel="Commands that use a checkpoint",
        )(checkpoint_command_from(settings_class, command) if is_wanted(command) else _not_wanted)
    return app


def _not_wanted() -> None:
    raise AssertionError("a command ran that was not wanted")


def with_command(arguments: Sequence[str]) -> list[str]:
    """Return the words of a command line with their command: ``train`` where none is named."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("--help", "--version")):
        return ["train", *arguments]
    return list(arguments)


def run(app: typer.Typer, arguments: Sequence[str]) -> NoReturn:
    """Run the named command, or ``train``, and exit; a mistake on the command line is one line, exit code 2."""
    arguments = with_command(arguments)
    try:
        if arguments[0] == "train" and os.environ.pop(CHECK_FIRST, ""):
            code = app(args=["preflight", *arguments[1:]], standalone_mode=False)
            if not preflight_goes_on():
                sys.exit(code)
        code = app(args=arguments, standalone_mode=False)
    except UsageError as error:
        exit_with(EXIT_SETTING, _usage_message(error))
    # A training goes on without its output, and ends well; of other commands the output may be all.
    is_training = arguments[0] in ("train", *map(name_of, HIDDEN))
    if not (code or is_training) and (reason := surroundings.lost_output()):
        exit_with(EXIT_CRASH, f"The output was not written: {reason}")
    sys.exit(code)


def exit_with(code: int, message: str = "") -> NoReturn:
    """End the program with an exit code; rank 0 alone prints the message, to standard error."""
    if message and os.environ.get("RANK", "0") == "0":
        typer.echo(message, err=True)
    sys.exit(code)


def command_from(
    settings_class: type[Settings], presets: Mapping[str, Mapping[str, Any]], run: Callable[..., None]
) -> Callable[..., None]:
    """Return a function for typer whose options are the fields of ``settings_class``.

    ``envs_per_gpu: int = 512  # accounts stepped at once on each GPU`` becomes ``--envs-per-gpu <int>``; tuples
    are comma-separated. A setting that is not given comes from ``--preset``, then from the class. Parameters of
    ``run`` beyond the settings become options (or arguments) of their own. An invalid setting is one line, exit
    code 2.
    """
    types = get_type_hints(settings_class)
    own = _own_parameters(settings_class, run)

    def command(preset: str | None, demo: bool, **given: Any) -> None:
        options = {parameter.name: _locate(given.pop(parameter.name)) for parameter in own}
        try:
            name = _preset_name(presets, preset, demo)
            if unknown := presets[name].keys() - types.keys():
                raise ValueError(f"preset {name} has {', '.join(sorted(unknown))}, which is no setting")
            settings = settings_class(**{**presets[name], **_parse_given(settings_class, types, given)})
        except ValueError as error:
            exit_with(EXIT_SETTING, f"Invalid setting: {error}")
        _call(run, settings, options)

    name = typer.Option(
        help="a set of sizes [dim]\\[default: full][/dim]", parser=str, metavar=f"<{'|'.join(presets)}>"
    )
    demo = typer.Option("--demo", help="the same as --preset demo: a simulated market and a small model")
    return _with_options(
        command,
        [
            inspect.Parameter(
                "preset", KEYWORD, default=None, annotation=_annotation("|".join(presets), name)
            ),
            inspect.Parameter("demo", KEYWORD, default=False, annotation=Annotated[bool, demo]),
            *own,
            *_setting_options(settings_class, show_defaults=True),
        ],
    )


def checkpoint_command_from(settings_class: type[Settings], run: Callable[..., None]) -> Callable[..., None]:
    """Return a function for typer that takes a checkpoint, and the settings to use it with as options.

    ``run`` is called with the TrainedPolicy, on --device, and with its own options; one of ``ENSEMBLE_COMMANDS``
    takes several checkpoints. A setting that is not given is that of the training. An unusable checkpoint, or a
    ValueError of the settings or of ``run``, is one line, exit code 2.
    """
    types = get_type_hints(settings_class)
    own = _own_parameters(settings_class, run)
    takes_several = run in ENSEMBLE_COMMANDS

    def command(checkpoint: Path | list[Path], **given: Any) -> None:
        options = {parameter.name: _locate(given.pop(parameter.name)) for parameter in own}
        try:
            changes = _parse_given(settings_class, types, given)
        except ValueError as error:
            exit_with(EXIT_SETTING, f"Invalid setting: {error}")
        typed_paths = checkpoint if isinstance(checkpoint, list) else [checkpoint]
        for path in map(_locate, typed_paths):  # "best" is looked for later
            if path.suffix and not os.path.lexists(path):
                exit_with(EXIT_SETTING, f"{path} cannot be read: No such file or directory")
        if sys.stderr.isatty():
            typer.echo("Loading PyTorch ...", err=True)
        import torch

        from evaluation import ensemble
        from evaluation.champion import find_champion
        from models.exported import ExportError
        from training import devices
        from training.checkpoint import CheckpointError

        try:
            device = devices.of_rank(changes.pop("device", "auto"), local_rank=0)
            paths = []
            for typed in typed_paths:
                path = _locate(typed)
                if str(typed) == "best" and not path.exists():  # the champion, wherever it is kept
                    default = next(f.default for f in fields(settings_class) if f.name == "checkpoint_dir")
                    path = find_champion(Path(changes.get("checkpoint_dir", default)))
                paths.append(path)
            trained = ensemble.read(paths, settings_class, device, **changes)
            _call(run, trained, options)
        except (CheckpointError, ExportError, FeatureError) as error:
            exit_with(EXIT_SETTING, str(error))
        except torch.OutOfMemoryError:
            fix = "use --device cpu, or another GPU, such as --device cuda:1"
            exit_with(EXIT_DOES_NOT_FIT, f"The GPU's memory is full, perhaps with a training's: {fix}")
        except ValueError as error:
            exit_with(EXIT_SETTING, f"Invalid setting: {error}")

    argument = typer.Argument(
        metavar="CHECKPOINT..." if takes_several else "CHECKPOINT",
        help="a file such as checkpoints/run1_epoch25.pt, or best: the champion"
        + ("; of several the probabilities are averaged" if takes_several else ""),
    )
    kind: Any = list[Path] if takes_several else Path
    path = inspect.Parameter("checkpoint", KEYWORD, annotation=Annotated[kind, argument])
    return _with_options(command, [path, *own, *_setting_options(settings_class, show_defaults=False)])


def helps_of(settings_class: type[Settings]) -> dict[str, str]:
    """Return the comment of every setting, by name."""
    return {name: comment for _, name, comment in _read_comments(settings_class)}


def flags_of(settings: Settings) -> list[str]:
    """Return the command-line options that give another process the same settings."""
    flags = []
    for field in fields(settings):
        value, option = getattr(settings, field.name), field.name.replace("_", "-")
        if field.name in NOT_PASSED_ON:
            continue
        if isinstance(value, bool):
            flags.append(f"--{option}" if value else f"--no-{option}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            flags.append(f"--{option}={text}")
    return flags


# --- options --------------------------------------------------------------------------------------------------


def _setting_options(settings_class: type[Settings], *, show_defaults: bool) -> Iterator[inspect.Parameter]:
    types = get_type_hints(settings_class)
    defaults = {field.name: field.default for field in fields(settings_class)}
    for section, name, comment in _read_comments(settings_class):
        # Markup of ours, as typer puts its own in a column beside the help, where long ones are cut off.
        default = f" [dim]\\[default: {_format_default(defaults[name])}][/dim]" if show_defaults else ""
        annotation: Any
        if types[name] is bool:
            option = typer.Option(help=comment + default, rich_help_panel=section)
            annotation = Annotated[bool | None, option]
        else:
            label = _type_label(types[name])
            option = typer.Option(
                help=comment + default, rich_help_panel=section, parser=str, metavar=f"<{label}>"
            )
            annotation = _annotation(label, option, is_repeatable=types[name] == tuple[Url, ...])
        yield inspect.Parameter(name, KEYWORD, default=None, annotation=annotation)


def _annotation(label: str, option: Any, is_repeatable: bool = False) -> Any:
    """Return an annotation that typer shows as ``<label>``; the value stays text, for ``_parse`` to read.

    Typer's own conversion would refuse a bad value in words, and in a box, of its own. What it shows as the type
    is the annotation's name, or in older releases the option's metavar.
    """
    kind: Any = type(label, (), {})
    return Annotated[(list[kind] if is_repeatable else kind) | None, option]


def _read_comments(settings_class: type[Settings]) -> Iterator[tuple[str, str, str]]:
    """Yield section, name and comment of every setting, read from the source of the class."""
    section = ""
    for title, name, comment in CLASS_LINE.findall(inspect.getsource(settings_class)):
        if title:
            section = title.capitalize()
        else:
            yield section, name, comment


def _type_label(hint: Any) -> str:
    """Return how a type is shown: ``int``, ``float,...`` for a list, ``on|off`` for choices."""
    arguments = [argument for argument in get_args(hint) if argument is not NoneType]
    if get_origin(hint) is tuple:
        return "URL" if arguments[0] is Url else f"{arguments[0].__name__},..."
    if get_origin(hint) is Literal:
        return "|".join(arguments)
    return arguments[0].__name__ if arguments else hint.__name__


def _format_default(default: Any, separator: str = ", ") -> str:
    """Return a default as people read it, a long list shortened."""
    if default is None:
        return "not set"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, float):
        return f"{default:g}"
    if not isinstance(default, tuple):
        return str(default)
    parts = [_format_default(part) for part in default]
    if len(parts) > LONGEST_LIST:
        return f"{separator.join(parts[:3])} and {len(parts) - 3} more"
    return separator.join(parts)


def _own_parameters(settings_class: type[Settings], run: Callable[..., None]) -> list[inspect.Parameter]:
    """Return the parameters of ``run`` beyond its first, with the options that they are annotated with."""
    # Of the first one only its place counts.
    hints = get_type_hints(
        run, localns={"Settings": settings_class, "TrainedPolicy": object}, include_extras=True
    )
    _, *own = inspect.signature(run).parameters.values()
    return [parameter.replace(kind=KEYWORD, annotation=hints[parameter.name]) for parameter in own]


def _with_options(command: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"continuous_training {program_version()}")
        raise typer.Exit


# --- values ---------------------------------------------------------------------------------------------------


def _preset_name(presets: Mapping[str, Any], name: str | None, demo: bool) -> str:
    if demo and name not in (None, "demo"):
        raise ValueError(f"preset={name} cannot go with --demo, which is --preset demo; drop one of the two")
    name = "demo" if demo else "full" if name is None else name
    if name not in presets:
        raise ValueError(f"preset={name} must be one of: {', '.join(presets)}")
    return name


def _parse_given(
    settings_class: type[Settings], types: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings among the options that were given.

    Raises:
        ValueError: a value is of another type; names the setting and a value that would do.
    """
    defaults = {field.name: field.default for field in fields(settings_class)}
    parsed = {}
    for name, value in given.items():
        if value is None or value == []:
            continue
        try:
            parsed[name] = _parse(types[name], value)
            if is_folder(name, parsed[name]):
                parsed[name] = locate(parsed[name])
        except ValueError as error:
            default = defaults[name]
            example = ", or none" if default is None else f", such as {_format_default(default, ',')}"
            raise ValueError(f"{name}={shown(value)} must be {error}{example}") from None
    return parsed


def _parse(hint: Any, value: Any) -> Any:
    """Read the text of an option as its field's type.

    Raises:
        ValueError: the text is something else; says what it must be.
    """
    arguments = get_args(hint)
    if isinstance(value, list):  # of an option that can be repeated
        return tuple(arguments[0](text) for text in value if text.lower() != "none")
    if not isinstance(value, str):
        return value
    if NoneType in arguments:
        if value.lower() == "none":
            return None
        (hint,) = (argument for argument in arguments if argument is not NoneType)
    if get_origin(hint) is tuple:
        return tuple(_parse(arguments[0], part.strip()) for part in value.split(",") if part.strip())
    if get_origin(hint) is Literal:
        return value  # training/validation.py checks the choice
    try:
        return hint(value)
    except ValueError:
        raise ValueError(KINDS[hint]) from None


def _locate(value: Any) -> Any:
    return Path(locate(str(value))) if isinstance(value, Path) else value


def locate(path: str) -> str:
    """Return a path as it was typed, seen from the program's folder, where the program runs.

    ``~`` is the home folder, which no shell expands within quotes or after ``--flag=``; other relative paths start
    in the folder from which the program was called.
    """
    path = expand_path(path)
    # training/validation.py reports what is invalid.
    is_invalid = not path.strip() or path.startswith("~") or "://" in path
    return path if is_invalid else os.path.join(_called_from, path)  # noqa: PTH118


def enter_program_folder(folder: Path) -> None:
    """Make the program's folder the current one: relative constants, such as "checkpoints", are in it.

    Call it once, before a path is located. The start scripts, which change the folder themselves, pass on the
    former one.
    """
    global _called_from
    called_from = os.environ.pop(CALLED_FROM, "")
    with contextlib.suppress(FileNotFoundError):  # the current folder was removed
        called_from = called_from or os.getcwd()  # noqa: PTH109
    os.chdir(folder)
    _called_from = "" if Path(called_from) == folder else called_from


def environment_of_child() -> dict[str, str]:
    """Return the environment of another process of the program that gets the same words on its command line."""
    return {**os.environ, CALLED_FROM: _called_from or os.getcwd()}  # noqa: PTH109


# --- running --------------------------------------------------------------------------------------------------


def _call(run: Callable[..., None], subject: Any, options: Mapping[str, Any]) -> None:
    try:
        run(subject, **options)
    except ExitProgram as reason:
        exit_with(reason.code, str(reason))
    except FeatureError as error:
        exit_with(EXIT_SETTING, str(error))


def _usage_message(error: Any) -> str:
    if "Did you mean" in error.message:
        return error.message
    if possibilities := getattr(error, "possibilities", None):
        return f"{error.message.rstrip('.')}. Did you mean {' or '.join(possibilities)}?"
    text = error.format_message().rstrip(".").replace("Invalid value for ", "Invalid setting: ")
    path = error.ctx.command_path if error.ctx else ""  # where the preflight reads the words of a training
    return f"{text}; see: {re.sub('preflight$', 'train', path)} --help" if path else text
