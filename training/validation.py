"""The rules for settings; an error names the value, the rule and a valid value, in one line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

from data_sources import universe
from data_sources.calendar import parse_day
from data_sources.vendors import RULE_SETTINGS, SOURCES, SYMBOL_SETTINGS
from envs.config import EnvConfig, require

if TYPE_CHECKING:
    from continuous_training import Settings

FIRST_DATE = date(2003, 1, 1)  # no source has earlier bars

# EnvConfig checks the settings of the environment.
AT_LEAST_ONE = (
    "history_days",
    "min_bars",
    "simulated_symbols",
    "simulated_bars",
    "envs_per_gpu",
    "d_model",
    "num_layers",
    "num_heads",
    "batch_size",
    "update_passes",
    "epochs",
    "checkpoint_every",
    "keep_checkpoints",
)
ZERO_OR_MORE = ("holdout_days", "warmup_steps", "weight_decay", "entropy_coef", "value_coef")


def folders(settings: Settings) -> list[tuple[str, str]]:
    """Return name and value of every setting that is a folder."""
    values = ((field.name, getattr(settings, field.name)) for field in fields(settings))
    return [(name, value) for name, value in values if name.endswith("_dir") and isinstance(value, str)]


def check(settings: Settings) -> None:
    """Check every setting by itself and against the others.

    Raises:
        ValueError: names the setting, its value, the rule, and a value that would do.
    """
    for name, holds, rule in _rules(settings):
        require(holds, name, getattr(settings, name), rule)


def check_batch(settings: Settings, world_size: int) -> None:
    """Check what depends on the number of processes.

    Raises:
        ValueError: the batch cannot be divided into whole segments.
    """
    batch, envs = settings.batch_size, settings.envs_per_gpu
    step = settings.horizon * world_size  # one segment from each process
    if batch % step:
        raise ValueError(
            f"batch_size={batch} must be a multiple of horizon x processes = {settings.horizon} x {world_size} "
            f"= {step}, so that segments stay whole; use {max(1, round(batch / step)) * step}"
        )
    segments = batch // step
    if segments < envs and envs % segments:
        fitting = next(count for count in range(segments, 0, -1) if envs % count == 0)
        raise ValueError(
            f"batch_size={batch} must divide the transitions of an epoch, envs_per_gpu x horizon x processes = "
            f"{envs} x {settings.horizon} x {world_size} = {envs * step}; use {fitting * step}"
        )


def minibatch_segments(settings: Settings, world_size: int) -> int:
    """Return the segments of one process per optimizer step; at most those that it collects."""
    return min(settings.batch_size // (settings.horizon * world_size), settings.envs_per_gpu)


def _rules(s: Settings) -> Iterator[tuple[str, bool, str]]:
    # (setting, whether it is valid, the rule and the fix)
    for field in fields(s):
        value = getattr(s, field.name)
        parts = value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(part) for part in parts if isinstance(part, float))
        yield field.name, finite, "must be finite"
    for name in AT_LEAST_ONE:
        yield name, getattr(s, name) >= 1, "must be 1 or more"
    for name in ZERO_OR_MORE:
        yield name, getattr(s, name) >= 0, "must be 0 or more"
    EnvConfig.from_settings(s)  # raises its own errors
    yield "positions", 0.0 in s.positions, "must have 0 among them"
    yield "seed", 0 <= s.seed < 2**31, "must be 0 or more and below 2147483648"
    for name in ("learning_rate", "max_grad_norm", "clip_coef"):
        yield name, getattr(s, name) > 0, "must be above 0"
    yield "gamma", 0 <= s.gamma < 1, "must be 0 or more and below 1, such as 0.99"
    for name in ("gae_lambda", "final_learning_rate_fraction", "cost_ramp"):
        yield name, 0 <= getattr(s, name) <= 1, "must be from 0 to 1"
    for name in ("runs", "micro_batch_segments"):
        value = getattr(s, name)
        yield name, value is None or value >= 1, "must be 1 or more, or not set"

    for name, folder in folders(s):
        yield name, bool(folder.strip()), "must be a folder; . is the program's own"
        # What expanduser leaves: ~NAME of no user. A folder of that name has to be meant, as in a shell.
        yield name, not folder.startswith("~"), "names no user; use ./~... for a folder of that name"

    port = s.prometheus_port
    yield "prometheus_port", port is None or 1 <= port <= 65_535, "must be 1 to 65535, or not set"

    sources = ", ".join(SOURCES)
    unknown = [source for source in s.sources if source not in SOURCES]
    yield "sources", bool(s.sources), f"must name at least one of: {sources}"
    yield "sources", not unknown, f"has {', '.join(unknown)}, which is unknown; use some of: {sources}"
    mixed = "simulated" in s.sources and len(s.sources) > 1
    yield "sources", not mixed, "must not mix simulated bars with real ones"

    for name in SYMBOL_SETTINGS:
        rule = "must be symbols"
        if name in RULE_SETTINGS:
            rule += ", or a rule such as top:500: the largest by dollar volume, as known at each date"
        yield name, _are_symbols(getattr(s, name), name in RULE_SETTINGS), rule

    today = datetime.now(UTC)
    first = parse_day(FIRST_DATE.isoformat())
    days: dict[str, datetime] = {}
    for name in ("start_date", "end_date"):
        if getattr(s, name) is not None:
            yield name, _is_date(getattr(s, name)), "must be a day such as 2026-01-31"
            days[name] = parse_day(getattr(s, name))
            yield name, days[name] >= first, f"must not be before {FIRST_DATE}"
    end = min(today, days.get("end_date", today))
    if "start_date" in days:
        yield "start_date", days["start_date"] <= today, f"must not be after today, {today.date()}"
        yield "start_date", days["start_date"] <= end, f"must not be after end_date={s.end_date}"
    else:
        most = max(1, (end - first).days)
        yield "history_days", s.history_days <= most, f"must be at most {most}, the days since {FIRST_DATE}"

    pair = 2 * s.num_heads  # rotary positions rotate pairs of a head's channels
    rule = f"must be a multiple of 2 x num_heads = {pair}, such as {max(1, round(s.d_model / pair)) * pair}"
    yield "d_model", s.d_model % pair == 0, rule
    for name, hint in get_type_hints(type(s)).items():
        choices = get_args(hint) if get_origin(hint) is Literal else (getattr(s, name),)
        yield name, getattr(s, name) in choices, f"must be one of: {', '.join(map(str, choices))}"


def _are_symbols(names: tuple[str, ...], may_be_rule: bool) -> bool:
    try:
        return not universe.top_of(names) or may_be_rule
    except ValueError:
        return False


def _is_date(text: str) -> bool:
    try:
        return parse_day(text) is not None
    except ValueError:
        return False
