"""``episode CHECKPOINT``: one episode of a greedy policy as a picture, decision by decision."""

from __future__ import annotations

import math
from datetime import UTC
from pathlib import Path
from typing import Any

from commands.options import parse_moment
from data_sources.errors import LakeError
from data_sources.lake.lake import Lake
from data_sources.load import load
from envs.config import EnvConfig
from envs.market import Market
from evaluation.exam import POLICY, Walk, examine
from evaluation.group_exam import Group, examine_groups, groups_of
from evaluation.trained_policy import NEVER_NS, TrainedPolicy
from models.ensemble import Decider
from training.data_feed import data_request


def command(trained: TrainedPolicy, symbol: str, start: str, output: Path) -> str:
    """Draw one episode from the bars in the lake; nothing is downloaded.

    Args:
        trained: the policy; the lake is that of its settings, read up to the bars that it was trained with.
        symbol: empty: the checkpoint's first symbol; of accounts over groups, one of the group.
        start: UTC, ISO 8601; empty: the newest whole episode.
        output: the PNG.

    Returns:
        A line about the episode.

    Raises:
        ValueError: the symbol or start does not fit, or the picture cannot be written.
    """
    from evaluation import plots  # matplotlib takes a second to import

    request = data_request(trained.settings, trained.data_cutoff_ns)
    try:
        loaded = load(Lake(Path(trained.settings.data_dir)), request).bars
    except LakeError as error:
        raise ValueError(str(error)) from error
    bars = {series.symbol: series for series in loaded}
    symbol = symbol or trained.symbols[0]
    if symbol not in bars:
        raise ValueError(f"--symbol {symbol} has no bars here; there are: {', '.join(bars) or 'none'}")
    config = trained.env_config(1)
    # A group is played on the clock of all symbols.
    own = [bars[name] for name in trained.symbols if name in bars] if config.group else [bars[symbol]]
    market = trained.market(own, loaded)
    newest = max(0, len(bars[symbol]) - config.episode_bars - 2)
    start_ns = _time_ns(start) if start else int(bars[symbol].open_time[newest])
    owner = owner_of(symbol, market, config)
    walk = play(trained.policy, market, config, owner, start_ns)
    about = f"{', '.join(owner.symbols)} (an index of their prices)" if config.group else symbol
    line = (
        f"{about}, {len(walk.time):,} decisions from {str(walk.time[0])[:16]} UTC, "
        f"{trained.name}: "
        f"equity {math.expm1(walk.log_returns.sum()):+.2%}, costs {walk.costs @ walk.equity_before:.2%}"
    )
    try:
        output.write_bytes(plots.as_png(plots.episode(walk, line), dpi=80))
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror}") from error
    return f"{line}; drawn as {output}"


def play(policy: Decider, market: Market, config: EnvConfig, owner: Group, start_ns: int) -> Walk:
    """Play one episode of an account greedily; shorter than ``episode_bars`` where bars end.

    Raises:
        ValueError: its symbol is not in the market, or there is no segment of bars after the start.
    """
    segments = config.episode_bars // config.horizon
    terms: dict[str, Any] = {"start_ns": start_ns, "end_ns": NEVER_NS, "max_segments": segments}
    if config.group:
        return examine_groups(policy, market, config, [owner], **terms)[POLICY][0]
    return examine(policy, market, config, owner.symbols, chunk_segments=1, **terms)[POLICY][0]


def owner_of(symbol: str, market: Market, config: EnvConfig) -> Group:
    """Return what has the account that a symbol is in: itself alone, or the first group of the exam with it.

    Raises:
        ValueError: it is in no group.
    """
    if config.group is None:
        return Group(symbol, (symbol,))
    groups = groups_of(market, config.group.size)
    for group in groups:
        if symbol in group.symbols:
            return group
    raise ValueError(f"--symbol {symbol} is in no group of {config.group.size}: its kind has too few symbols")


def _time_ns(text: str) -> int:
    moment = parse_moment("--start", text)
    return min(NEVER_NS, int(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()) * 10**9)
