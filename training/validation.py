"""The rules for settings; an error names the value, the rule and a valid value, in one line."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from data_sources import universe
from data_sources.bars import DAY_NS, FIRST_DATE, MINUTE_NS
from data_sources.calendar import parse_day
from data_sources.vendors import ADVISERS, RULE_SETTINGS, SOURCES, SYMBOL_SETTINGS
from data_sources.vendors.files_description import is_timezone
from envs.config import FEATURE_GROUPS, EnvConfig, GroupConfig, require
from runtime.control import EXIT_SETTING, ExitProgram
from runtime.files import fault_of_folder
from training.checkpoint_names import may_have_checkpoint
from training.setting_types import DEVICE_RULE, DEVICES, shown
from training.urls import find_targets, is_address, is_local

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

# The least and the most; what is beyond has no meaning, or could only be a slip. EnvConfig has more rules.
LIMITS: Mapping[str, tuple[float, float]] = {
    "history_days": (1, math.inf),
    "min_bars": (1, 10**7),
    "holdout_days": (0, 10**4),
    "simulated_symbols": (1, 10**4),
    "simulated_bars": (1, 10**7),
    "envs_per_gpu": (1, 2**20),
    "context_bars": (1, 10**5),
    "horizon": (1, 10**5),
    "episode_bars": (1, 10**7),
    "stock_fee_bps": (0, 10**4),
    "crypto_fee_bps": (0, 10**4),
    "perpetual_fee_bps": (0, 10**4),
    "slippage_bps": (0, 10**4),
    "range_slippage": (0, 10),
    "volume_slippage": (0, 10),
    "account_value": (0, 10**15),
    "flat_before_close": (0, 389),
    "borrow_rate": (0, 100),
    "maintenance_margin": (0, 1),
    "cost_ramp": (0, 1),
    "group_size": (2, 64),  # the value of every choice of each takes memory by the square
    "gross_exposure": (0, 100),
    "net_exposure": (0, 100),
    "d_model": (1, 2**17),
    "num_layers": (1, 1_000),
    "num_heads": (1, 2**16),
    "batch_size": (1, 2**31),
    "micro_batch_segments": (1, 2**20),
    "feature_noise": (0, 10),
    "stochastic_depth": (0, 0.9),
    "update_passes": (1, 1_000),
    "learning_rate": (0, 1),
    "warmup_steps": (0, 10**9),
    "final_learning_rate_fraction": (0, 1),
    "weight_decay": (0, 100),
    "max_grad_norm": (0, 10**12),
    "gae_lambda": (0, 1),
    "clip_coef": (0, 10),
    "entropy_coef": (0, 100),
    "value_coef": (0, 1_000),
    "forecast_coef": (0, 1_000),
    "epochs": (1, 10**9),
    "runs": (1, 10**9),
    "checkpoint_every": (1, 10**9),
    "checkpoint_minutes": (0.01, 10**5),
    "exam_minutes": (0.01, 10**5),
    "exam_patience": (1, 10**6),
    "keep_checkpoints": (1, 10**6),
    "keep_runs": (1, 10**6),
    "prometheus_port": (1, 65_535),
    "web_port": (1, 65_535),
}
ABOVE_ZERO = ("learning_rate", "max_grad_norm", "clip_coef", "gross_exposure")
OPTIONAL = ("micro_batch_segments", "runs", "exam_patience", "prometheus_port", "web_port")
LARGEST_POSITION = 100.0
LONGEST_SYMBOL = 32
UNSET_VARIABLE = re.compile(r"(?:^|[/\\])(\$\w+|\$\{\w+\})")  # what expand_path left
WITHOUT_SHORTS = "use --positions 0,1, or --allow-spot-shorts if you borrow coins on margin"
KEPT_SHORTS = "keeps those that it was trained with; --allow-spot-shorts says that you borrow coins on margin"
LEAST_TOKEN = 16  # characters
TRACKERS = ("wandb", "mlflow", "trackio")  # by the name of the package that each needs
MINUTES_PER_DAY = DAY_NS // MINUTE_NS


def folders(settings: Settings) -> list[tuple[str, str]]:
    """Return name and value of every setting that is a folder."""
    values = ((field.name, getattr(settings, field.name)) for field in fields(settings))
    return [(name, value) for name, value in values if is_folder(name, value)]


def is_folder(name: str, value: object) -> bool:
    """Whether a setting of this name and value is a folder of this machine."""
    return isinstance(value, str) and (name.endswith("_dir") or (name == "mirror" and "://" not in value))


def check(settings: Settings) -> None:
    """Check every setting by itself and against the others; their types are right (setting_types.py).

    Raises:
        ValueError: names the setting, its value, the rule, and a value that would do.
    """
    try:
        for name, holds, rule in _rules(settings):
            require(holds, name, getattr(settings, name), rule)
    except AttributeError as error:
        if error.obj is not settings:
            raise
        raise ValueError(f"{error.name} is missing: it must be among the settings, see README.md") from None


def check_training(settings: Settings, world_size: int) -> None:
    """Check what a training needs beyond valid settings: bars left to train on, and a batch of whole segments.

    Raises:
        ValueError: names the setting, its value, the rule, and a value that would do.
    """
    s = settings
    sources = [SOURCES[source] for source in s.sources]
    lists = dict.fromkeys(group.setting for source in sources for group in source.groups)
    has_symbols = not lists or any(getattr(s, setting) if setting else s.files_dir for setting in lists)
    require(has_symbols, "sources", s.sources, f"must have symbols: set {' or '.join(lists)}")
    if all(source.is_computed for source in sources):
        rule = f"must be at least min_bars={s.min_bars}"
        require(s.simulated_bars >= s.min_bars, "simulated_bars", s.simulated_bars, rule)
        rule = f"must be at most simulated_symbols={s.simulated_symbols}"
        require(s.account != "group" or s.group_size <= s.simulated_symbols, "group_size", s.group_size, rule)
        num_days, lengthen = s.simulated_bars / MINUTES_PER_DAY, "simulated_bars"
    elif s.start_date:
        end = parse_day(s.end_date) if s.end_date else datetime.now(UTC)
        num_days, lengthen = (end - parse_day(s.start_date)).days + 1.0, "the days from start_date on"
    else:
        num_days, lengthen = float(s.history_days), "history_days"
    rule = (
        f"must be below the {num_days:.4g} days of bars, so that some are left to train on: raise {lengthen}"
    )
    require(s.holdout_days < num_days, "holdout_days", s.holdout_days, rule)
    if all(source.is_computed for source in sources):
        held_out = s.holdout_days * MINUTES_PER_DAY
        least = held_out + s.context_bars + s.horizon + 3
        rule = (
            f"must be {least} or more: {held_out} in holdout_days, and a segment of context_bars and horizon"
        )
        require(s.simulated_bars >= least, "simulated_bars", s.simulated_bars, rule)
    same = Path(s.checkpoint_dir).resolve() == Path(s.data_dir).resolve()
    require(not same, "data_dir", s.data_dir, "must be another folder than checkpoint_dir")
    check_batch(settings, world_size)
    check_watchers(settings, os.environ)


def check_start(settings: Settings, world_size: int) -> None:
    """Check a training that is to start now, as ``check_training``, and its shorts where it has no checkpoint.

    Raises:
        ValueError: names the setting, its value, the rule, and a value that would do.
    """
    check_training(settings, world_size)
    impossible = impossible_shorts(settings)
    if impossible and not settings.mirror and not may_have_checkpoint(Path(settings.checkpoint_dir)):
        raise ValueError(f"{impossible}; {WITHOUT_SHORTS}")


def check_watchers(settings: Settings, environment: Mapping[str, str]) -> None:
    """Check what the page, the messages and the telemetry need of the environment.

    Raises:
        ValueError: others could read the page without a token, a tracker's package is missing, or a target in
            NOTIFY_URLS cannot be used.
    """
    token = environment.get("WEB_TOKEN", "")
    if (
        settings.web_port is not None
        and len(token) < LEAST_TOKEN
        and (token or not is_local(settings.web_host))
    ):
        reason = (
            f"is reached from other machines, so WEB_TOKEN in .env must have {LEAST_TOKEN} characters or more"
        )
        if token:
            reason = f"has a WEB_TOKEN in .env of under {LEAST_TOKEN} characters"
        make = 'python -c "import secrets; print(secrets.token_urlsafe())"'
        raise ValueError(f"web_host={settings.web_host} {reason}; make one with {make}")
    missing = [name for name in settings.telemetry if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"telemetry={','.join(settings.telemetry)} needs what is not installed: .venv/bin/pip install "
            f"{' '.join(missing)}"
        )
    for url in find_targets((), environment):
        if fault := url.find_fault():
            raise ValueError(f"NOTIFY_URLS in .env has {url}, which {fault}")


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


def impossible_shorts(settings: Settings) -> str:
    """Return why these positions cannot be held in any symbol of a training, "" if they can.

    A spot pair is sold by its owner; to sell it short takes coins borrowed on margin. A training with stocks or
    perpetual futures among its symbols keeps its positions, as do simulated bars.
    """
    sources = [SOURCES[name] for name in settings.sources]
    groups = [group for source in sources for group in source.groups]
    # Files may have symbols of every class.
    groups = [group for group in groups if not group.setting or getattr(settings, group.setting)]
    is_spot = bool(groups) and all(group.asset_class == "crypto" for group in groups)
    if settings.allow_spot_shorts or not is_spot or min(settings.positions) >= 0:
        return ""
    positions = ",".join(f"{position:g}" for position in settings.positions)
    return (
        f"positions={positions} must not be below 0 where all symbols are spot pairs, which only their owner can "
        "sell"
    )


def check_shorts(settings: Settings, resumed: Path | None) -> None:
    """Refuse a new training whose shorts are impossible; warn where a checkpoint, ``resumed``, was trained so.

    Raises:
        ExitProgram: a new training is refused.
    """
    impossible = impossible_shorts(settings)
    if impossible and resumed is None:
        raise ExitProgram(EXIT_SETTING, f"Invalid setting: {impossible}; {WITHOUT_SHORTS}")
    if impossible:
        log.warning(f"{impossible}; {resumed} {KEPT_SHORTS}")


def minibatch_segments(settings: Settings, world_size: int) -> int:
    """Return the segments of one process per optimizer step; at most those that it collects."""
    return min(settings.batch_size // (settings.horizon * world_size), settings.envs_per_gpu)


def policy_sizes(settings: Settings, num_features: int) -> dict[str, Any]:
    """Return the sizes of a new policy of these settings, as ``Policy.from_sizes`` takes them.

    Raises:
        FeatureError: models/own_model.py cannot be used.
    """
    # torch, which settings are checked without
    from models.transformer import ATTENTION_SCALE
    from training.model_checks import identify_model

    trunk = {
        "num_features": num_features,
        "d_model": settings.d_model,
        "num_layers": settings.num_layers,
        "num_heads": settings.num_heads,
        "max_length": settings.context_bars + settings.horizon + 1,
        "feature_encoding": settings.feature_encoding,
        "attention_scale": ATTENTION_SCALE,
    }
    account_features = EnvConfig.from_settings(settings).num_account_features
    return {
        "trunk": trunk,
        "num_account_features": account_features,
        "num_positions": len(settings.positions),
    } | identify_model()


def _rules(s: Settings) -> Iterator[tuple[str, bool, str]]:
    # (setting, whether it is valid, the rule and the fix)
    for field in fields(s):
        value = getattr(s, field.name)
        parts = value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(part) for part in parts if isinstance(part, float))
        yield field.name, finite, "must be finite"
    for name in ABOVE_ZERO:
        yield name, getattr(s, name) > 0, "must be above 0"
    for name, (least, most) in LIMITS.items():
        value, unset = getattr(s, name), ", or not set" if name in OPTIONAL else ""
        yield name, value is None or value >= least, f"must be {least} or more{unset}"
        yield name, value is None or value <= most, f"must be at most {most}{unset}"
    too_large = [position for position in s.positions if abs(position) > LARGEST_POSITION]
    rule = f"must be fractions of equity, from -{LARGEST_POSITION:g} to {LARGEST_POSITION:g}"
    yield "positions", not too_large, rule
    EnvConfig.from_settings(s)  # raises its own errors
    yield "positions", 0.0 in s.positions, "must have 0 among them"
    if group := GroupConfig.from_settings(s):
        fitting = max(1, s.envs_per_gpu // group.size) * group.size
        rule = f"must be whole groups of {group.size}, as account={s.account}: use {fitting}"
        yield "envs_per_gpu", s.envs_per_gpu % group.size == 0, rule
        rule = f"must be log equity with account={s.account}, whose net_exposure caps what it holds of the market"
        yield "reward", s.reward == "log equity", rule
        rule = f"must be at most gross_exposure={s.gross_exposure:g}"
        yield "net_exposure", s.net_exposure <= s.gross_exposure, rule
    yield "seed", 0 <= s.seed < 2**31, "must be 0 or more and below 2147483648"
    yield "gamma", 0 <= s.gamma < 1, "must be 0 or more and below 1, such as 0.99"

    for name, folder in folders(s):
        yield name, bool(folder.strip()), "must be a folder, such as checkpoints"
        # What expanduser leaves: ~NAME of no user. A folder of that name has to be meant, as in a shell.
        yield name, not folder.startswith("~"), "names no user; use ./~... for a folder of that name"
        variable = UNSET_VARIABLE.search(folder)
        yield name, not variable, f"names a variable that is not set, {variable and variable[1]}"
        scheme, mark, _ = folder.partition("://")
        rule = "must be a folder of this machine; only mirror takes a URL"
        require(not mark, name, f"{scheme}://...", rule)  # a URL may have a password: it is not repeated
        yield name, min(folder) >= " ", "must have no line breaks and other control characters in it"
        fault = fault_of_folder(Path(folder))
        yield name, not fault, f"must be a folder: {fault}"

    yield "device", DEVICES.fullmatch(s.device) is not None, DEVICE_RULE

    yield (
        "web_host",
        bool(s.web_host) and is_address(s.web_host),
        "must be an address, such as 127.0.0.1 or 0.0.0.0",
    )
    is_same_port = s.web_port is not None and s.web_port == s.prometheus_port
    yield "web_port", not is_same_port, "must be another port than prometheus_port"
    faults = [f"{url}: {fault}" for url in s.notify if (fault := url.find_fault())]
    yield "notify", not faults, f"has {'; '.join(faults)}"

    unknown = [name for name in s.telemetry if name not in TRACKERS]
    yield (
        "telemetry",
        not unknown,
        f"has {', '.join(unknown)}, which is unknown; use some of: {', '.join(TRACKERS)}",
    )

    if s.mirror:
        protocol, _, rest = s.mirror.rpartition("://")
        rule = (
            "must have no password and no query, which would be logged: put them into MIRROR_OPTIONS in .env"
        )
        has_secret = bool(protocol) and ("?" in rest or ":" in rest.rpartition("@")[0])
        require(not has_secret, "mirror", f"{protocol}://...", rule)  # the value itself is not repeated
        is_same = not protocol and Path(s.mirror).resolve() == Path(s.checkpoint_dir).resolve()
        is_url = "://" not in s.mirror or bool(protocol and rest)
        yield "mirror", is_url, "must be a folder, or a URL such as s3://bucket/folder"
        yield "mirror", not is_same, "must be another place than checkpoint_dir"

    groups, unknown = ", ".join(FEATURE_GROUPS), [name for name in s.features if name not in FEATURE_GROUPS]
    yield "features", bool(s.features), f"must name at least one of: {groups}"
    yield "features", not unknown, f"has {', '.join(unknown)}, which is unknown; use some of: {groups}"

    known = ", ".join(SOURCES)
    unknown = [source for source in s.sources if source not in SOURCES]
    yield "sources", bool(s.sources), f"must name at least one of: {known}"
    yield "sources", not unknown, f"has {', '.join(unknown)}, which is unknown; use some of: {known}"
    mixed = "simulated" in s.sources and len(s.sources) > 1
    yield "sources", not mixed, "must not mix simulated bars with real ones"
    lacks_folder = "files" in s.sources and not s.files_dir
    yield "files_dir", not lacks_folder, "must be the folder that has the files of bars, as sources has files"
    own, lake = Path(s.files_dir or "").resolve(), Path(s.data_dir).resolve()
    is_lakes = bool(s.files_dir) and (own == lake or lake in own.parents)
    yield "files_dir", not is_lakes, "must be a folder outside of data_dir, which has the lake's own files"
    yield (
        "files_timezone",
        is_timezone(s.files_timezone),
        "must be a time zone such as America/New_York or UTC",
    )

    for name in SYMBOL_SETTINGS:
        advice = {symbol: ADVISERS[name](symbol) for symbol in universe.plain_names(getattr(s, name))}
        wrong = "; ".join(f"{shown(symbol)}, which {text}" for symbol, text in advice.items() if text)
        yield name, not wrong, f"has {wrong}"
        strange = [symbol for symbol in getattr(s, name) if not _is_symbol(symbol)]
        rule = f"has {shown(strange[0])}, which is no symbol" if strange else ""
        yield name, not strange, f"{rule}: one in each pair of quotes, without spaces, commas and slashes"
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
    step = math.lcm(pair, 16)  # fp8.MULTIPLE
    rule = f"must be a multiple of {step} for precision=fp8, such as {max(1, round(s.d_model / step)) * step}"
    yield "d_model", s.precision != "fp8" or s.d_model % step == 0, rule
    for name, hint in get_type_hints(type(s)).items():
        choices = get_args(hint) if get_origin(hint) is Literal else (getattr(s, name),)
        yield name, getattr(s, name) in choices, f"must be one of: {', '.join(map(str, choices))}"


def _is_symbol(name: str) -> bool:
    """Whether it could be a symbol, or a rule; sources know their own."""
    fits = name.isprintable() and 1 <= len(name) <= LONGEST_SYMBOL
    return fits and bool(name.strip(".")) and not set(name) & set(" ,;/\\\"'")


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
