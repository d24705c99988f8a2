"""Turn the settings dataclass into command-line options: one per field, its comment as the help."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import typer

from runtime.control import EXIT_SETTING

if TYPE_CHECKING:
    from continuous_training import Settings

KEYWORD = inspect.Parameter.KEYWORD_ONLY
# A setting and its comment on one line of the class body: name, annotation and default, comment.
SETTING = re.compile(r"^    (\w+): [^#\n]+  # (.+)$", re.MULTILINE)


def helps_of(settings_class: type) -> dict[str, str]:
    """Return the comment of every setting, by name."""
    return dict(SETTING.findall(inspect.getsource(settings_class)))


def command_from(
    settings_class: type, presets: Mapping[str, Mapping[str, Any]], run: Callable[..., None]
) -> Callable[..., None]:
    """Return a function for typer whose options are the fields of ``settings_class``.

    What ``run`` takes beyond the settings are options (or arguments) of its own, as typer reads them.

    ``envs_per_gpu: int = 512  # accounts stepped at once on each GPU`` becomes ``--envs-per-gpu INTEGER``.
    Tuples are given with commas. What is not given comes from ``--preset``, then from the class. A
    ValueError of the class is told as one line, exit code 2.
    """
    types = get_type_hints(settings_class)
    hints = get_type_hints(run, localns={"Settings": settings_class}, include_extras=True)
    own = list(inspect.signature(run).parameters.values())[1:]

    def command(**given: Any) -> None:
        extra = {each.name: given.pop(each.name) for each in own}
        preset = "demo" if given.pop("demo") else given.pop("preset")
        given.pop("preset", None)
        try:
            if preset not in presets:
                raise ValueError(f"preset={preset!r} is unknown; use one of: {', '.join(presets)}")
            chosen = {name: _parsed(name, types[name], v) for name, v in given.items() if v is not None}
            settings = settings_class(**{**presets[preset], **chosen})
        except ValueError as error:
            exit_with(EXIT_SETTING, f"Invalid setting: {error}")
        else:
            run(settings, **extra)

    preset_option = typer.Option(help=f"a set of sizes: {', '.join(presets)}", show_default="full")
    demo_option = typer.Option("--demo", help="the same as --preset demo: simulated market, small model")
    return _with_options(
        command,
        [
            inspect.Parameter("preset", KEYWORD, default="full", annotation=Annotated[str, preset_option]),
            inspect.Parameter("demo", KEYWORD, default=False, annotation=Annotated[bool, demo_option]),
            *(each.replace(kind=KEYWORD, annotation=hints[each.name]) for each in own),
            *_setting_options(settings_class),
        ],
    )


def checkpoint_command_from(settings_class: type, run: Callable[..., None]) -> Callable[..., None]:
    """Return a function for typer that takes a checkpoint, and as options the settings to use it with.

    ``run`` is called with the TrainedPolicy, on the GPU where there is one, and with its own options. What is
    not given is as it was in the training. A checkpoint that cannot be used, or a ValueError of the settings or
    of ``run``, is told as one line, exit code 2.
    """
    types = get_type_hints(settings_class)
    hints = get_type_hints(run, localns={"Settings": settings_class}, include_extras=True)
    own = list(inspect.signature(run).parameters.values())[1:]

    def command(checkpoint: Path, **given: Any) -> None:
        from evaluation.trained_policy import TrainedPolicy, device_for_use
        from training.checkpoint import CheckpointError

        extra = {each.name: given.pop(each.name) for each in own}
        try:
            changes = {name: _parsed(name, types[name], v) for name, v in given.items() if v is not None}
            run(TrainedPolicy.read(checkpoint, settings_class, device_for_use(), **changes), **extra)
        except (ValueError, CheckpointError) as error:
            exit_with(EXIT_SETTING, str(error))

    path = inspect.Parameter("checkpoint", KEYWORD, annotation=Annotated[Path, typer.Argument()])
    rest = (each.replace(kind=KEYWORD, annotation=hints[each.name]) for each in own)
    return _with_options(command, [path, *rest, *_setting_options(settings_class, "as in the training")])


def _setting_options(settings_class: type, shown_default: str = "") -> list[inspect.Parameter]:
    helps, types = helps_of(settings_class), get_type_hints(settings_class)
    options = []
    for field in fields(settings_class):
        hint, default = types[field.name], field.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        option = typer.Option(help=helps[field.name], show_default=shown_default or shown)
        annotation = Annotated[bool | None, option] if hint is bool else Annotated[str | None, option]
        options.append(inspect.Parameter(field.name, KEYWORD, default=None, annotation=annotation))
    return options


def _with_options(command: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def flags_of(settings: Settings) -> list[str]:
    """Return the command-line options that give another process the same settings."""
    flags = []
    for field in fields(settings):
        value, option = getattr(settings, field.name), field.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{option}" if value else f"--no-{option}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            flags.append(f"--{option}={text}")
    return flags


def _parsed(name: str, hint: Any, value: Any) -> Any:
    """Read one option's text as the field's type."""
    if not isinstance(value, str):
        return value
    arguments = get_args(hint)
    if NoneType in arguments:
        if value.lower() == "none":
            return None
        hint = next(argument for argument in arguments if argument is not NoneType)
        arguments = get_args(hint)
    if get_origin(hint) is tuple:
        parts = [part.strip() for part in value.split(",")]
        return tuple(_parsed(name, arguments[0], part) for part in parts if part)
    if get_origin(hint) is Literal:
        return value  # the settings know the choices, and say them
    try:
        return hint(value)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}.get(hint, hint.__name__)
        raise ValueError(f"{name}={value!r} must be {kind}") from None


def exit_with(code: int, message: str = "") -> NoReturn:
    """End the program with an exit code; rank 0 alone prints the message, to standard error."""
    if message and os.environ.get("RANK", "0") == "0":
        typer.echo(message, err=True)
    raise typer.Exit(code)
