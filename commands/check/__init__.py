"""The command ``check``: everything that can be known before a start, line by line, each fault with its fix.

It trains nothing and fetches nothing that is kept. The exit code is the one that a start would end with.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from commands.check import folder, machine, sources
from commands.check.line import Line
from data_sources import refresh
from monitoring.console import Console
from runtime.control import EXIT_OK
from runtime.launch import Launch
from training.data_feed import data_request

if TYPE_CHECKING:
    from continuous_training import Settings

__all__ = ["folder", "lines", "tell"]
STYLES = {"OK": "green", "warning": "yellow", "error": "red"}


def lines(settings: Settings, environment: Mapping[str, str], offline: bool) -> Iterator[Line]:
    """Check one thing after the other, in the order in which a start would meet them.

    Args:
        settings: already valid by themselves.
        environment: keys, NPROC and its like.
        offline: ask no source.
    """
    launch = Launch()
    try:
        launch = Launch.from_environment(environment)
    except ValueError as error:
        yield Line.setting(str(error))
    now_ns = time.time_ns()
    request = data_request(settings, now_ns)
    yield from folder.before_a_start(settings, launch.world_size, launch.node_rank in ("", "0"))
    yield from folder.newest_checkpoint(settings)
    yield from sources.keys(request, environment)
    if offline:
        yield Line("sources", "OK", "not asked, for --offline")
    elif request.needs_lake:
        answers = refresh.probe(request, now_ns)
        yield from sources.answered(answers, settings)
        yield sources.clock(answers)
    here = machine.Machine.read()
    yield from machine.devices(here, settings)
    yield machine.memory(here, settings, request, launch)
    yield from machine.disk(settings, request)
    yield from machine.versions()


def tell(found: Iterable[Line], console: Console, as_json: bool) -> int:
    """Print the lines as they come, or one JSON object at the end.

    Returns:
        The exit code: that of the first error.
    """
    told = []
    for line in found:
        told.append(line)
        if not as_json:
            console.line(f"{line.level:<8} {line.topic:<11} {line.text}", STYLES[line.level])
    code = next((line.code for line in told if line.level == "error"), EXIT_OK)
    if as_json:
        checks = [{"topic": line.topic, "level": line.level, "text": line.text} for line in told]
        console.emit(json.dumps({"ok": code == EXIT_OK, "exit_code": code, "checks": checks}, indent=1))
    else:
        counts = Counter(line.level for line in told)
        console.line(
            f"{counts['OK']} OK, {counts['warning']} to look at, {counts['error']} in the way of a start"
        )
    return code
