"""What goes wrong within a feature of one's own, as one line: the place in the file, the error, what to do."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor  # the command line knows these errors without torch

PROGRAM = Path(__file__).parents[1]


class FeatureError(ValueError):
    """A feature cannot be used. The message is one line: file and line, what is wrong, what to do."""


def evaluate(name: str, function: Callable[[Any], Tensor], history: object, num_bars: int) -> Tensor:
    """Return a feature's values, (num_bars,) of any real type.

    Raises:
        FeatureError: it failed, returned something else, or changed its history.
    """
    import torch

    before = _versions(history)
    try:
        values = function(history)
    except (MemoryError, torch.OutOfMemoryError, FeatureError):
        raise
    except (Exception, SystemExit) as error:
        place = describe(error, Path(function.__code__.co_filename))
        raise FeatureError(f"feature {name} failed: {place}: correct it, or take the feature out") from error
    after = _versions(history)
    changed = [key for key, version in before.items() if after.get(key) != version]
    wanted = f"a tensor of real numbers of shape ({num_bars},), one for every bar"
    if not isinstance(values, torch.Tensor):
        fault = f"must return {wanted}, was {type(values).__name__}"
    elif values.shape != (num_bars,):
        fault = f"must have shape ({num_bars},), was {tuple(values.shape)}: return one value for every bar"
    elif values.is_complex() or values.is_quantized or values.layout is not torch.strided:
        fault = f"must return {wanted}, was {values.dtype}"
    elif changed:
        fault = (
            f"changes history.{changed[0]} in place, which others read: change a copy, such as its clone()"
        )
    else:
        return values.detach()
    raise FeatureError(f"{place_of(function)}: feature {name} {fault}")


def import_own(module: str, path: Path, what: str = "features of your own") -> None:
    """Import a file of one's own, if it exists; ``what`` it adds.

    Raises:
        FeatureError: whatever went wrong in it.
    """
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return
        advice = f"correct this file, or empty it to train without {what}"
        raise FeatureError(f"{describe(error, path)}: {advice}") from error


def _versions(history: object) -> dict[str, tuple[int, int]]:
    """Return the identity of every tensor that a history holds, and torch's count of its changes."""
    from torch import Tensor

    versions = {}
    for name, value in vars(history).items():
        if isinstance(value, Tensor):
            versions[name] = id(value), value._version
        elif isinstance(value, dict):
            for key, item in value.items():
                versions[f"{name.lstrip('_')}({key})"] = id(item), item._version
    return versions


def place_of(function: Callable[..., Any]) -> str:
    """Return the file and line of a function, such as ``envs/own_features.py:7``."""
    code = function.__code__
    return f"{_short(Path(code.co_filename))}:{code.co_firstlineno}"


def describe(error: BaseException, path: Path) -> str:
    """Return an error as one line, with its place in the file ``path`` where it went through there."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if Path(frame.filename) == path] or frames[-1:]
    text, file, line = str(error), path, None
    if isinstance(error, SyntaxError):  # of this file, or of one that it imports
        text, file, line = error.msg, Path(error.filename or path), error.lineno
    elif inside:
        file, line = Path(inside[-1].filename), inside[-1].lineno
    place = f"{_short(file)}:{line}" if line else _short(file)
    first = next(iter(text.splitlines()), "")
    return f"{place}: {type(error).__name__}: {first}"


def _short(path: Path) -> str:
    return (path.relative_to(PROGRAM) if path.is_relative_to(PROGRAM) else path).as_posix()
