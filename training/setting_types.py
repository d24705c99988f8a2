"""The types of settings. People edit the constants: whatever they write there, a wrong type is one line."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Hashable
from dataclasses import asdict, field, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from training.urls import Url

if TYPE_CHECKING:
    from continuous_training import Settings

Class = TypeVar("Class", bound=type)

KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text in quotes",
    Url: "a URL in quotes",
}
TUPLES = {
    str: 'a tuple of texts, such as ("AAPL", "MSFT")',
    float: "a tuple of numbers, such as (0.0, 1.0)",
    Url: 'a tuple of URLs, such as ("https://host/path",)',
}
# Of how a training is looked at, with secrets in them: neither other processes nor checkpoints get them.
NOT_PASSED_ON = ("notify",)
LARGEST = 2**63  # beyond it arrays and tensors overflow
DEVICES = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
DEVICE_RULE = "must be auto, cpu, cuda, or one GPU such as cuda:1"


def allow_any_default(settings_class: Class) -> Class:
    """Let every constant become a field: ``dataclass`` alone refuses a list by a traceback, before any check."""
    for name, value in list(vars(settings_class).items()):
        if not name.startswith("__") and not isinstance(value, Hashable):
            setattr(settings_class, name, field(default_factory=lambda value=value: value))  # type: ignore[misc]
    return settings_class


def convert_all(settings: Settings) -> dict[str, Any]:
    """Return the settings by name, each of its type: lists become tuples, whole numbers floats, paths texts.

    Raises:
        ValueError: a value is of another type; names the setting, the value, the type and a value that would do.
    """
    hints = get_type_hints(type(settings))
    converted: dict[str, Any] = {}
    for setting in fields(settings):
        name, value = setting.name, getattr(settings, setting.name)
        try:
            converted[name] = convert(name, hints[name], value)
        except ValueError as error:
            given = "..." if name in NOT_PASSED_ON else shown(value)
            raise ValueError(f"{name}={given} must be {error}") from None
    for name, value in vars(type(settings)).items():
        if not name.startswith("_") and name not in converted and not callable(value):
            kind = type(value).__name__
            raise ValueError(
                f"{name} must have a type to be a setting, such as {name}: {kind} = {shown(value)}"
            )
    return converted


def convert(name: str, hint: Any, value: Any) -> Any:
    """Return the value of a setting as its type hint says.

    Raises:
        ValueError: it is something else; says what it must be.
    """
    arguments = get_args(hint)
    if NoneType in arguments:
        if value is None:
            return None
        (hint,) = (argument for argument in arguments if argument is not NoneType)
    if get_origin(hint) is Literal:  # training/validation.py checks the choice
        if isinstance(value, str):
            return value
        raise ValueError(f"one of: {', '.join(get_args(hint))}")
    if get_origin(hint) is tuple:
        (kind, *_) = arguments
        if isinstance(value, list | tuple):
            try:
                return tuple(convert(name, kind, part) for part in value)
            except ValueError:
                pass
        raise ValueError(TUPLES[kind])
    if hint is Url and isinstance(value, str):
        return Url(value)
    if hint is float and type(value) is int and abs(value) < LARGEST:
        return float(value)
    if hint is str and name.endswith("_dir") and isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) is int is hint and abs(value) >= LARGEST:
        raise ValueError(f"{KINDS[int]} of at most {len(str(LARGEST)) - 1} digits")
    if type(value) is not hint:
        raise ValueError(KINDS[hint] + (", or None" if arguments else ""))
    if hint is str and "\0" in value:
        raise ValueError(f"{KINDS[str]} without null characters")
    return value


def recorded(settings: Settings) -> dict[str, Any]:
    """Return the settings as a checkpoint has them, by name."""
    return {name: value for name, value in asdict(settings).items() if name not in NOT_PASSED_ON}


def expand_path(path: str) -> str:
    """Return a path with ``~`` and set variables such as ``$HOME`` filled in, as a shell does."""
    return os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111 - Path would drop "./"


def shown(value: object) -> str:
    """Return a value of any type as a short text on one line."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # a number with thousands of digits
        return f"({type(value).__name__})"
