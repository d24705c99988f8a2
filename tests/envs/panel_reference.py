"""The features of the panel by a plain computation: loops over symbols, tables of pandas by the minute.

It leaves a symbol out of its market instead of subtracting it, and knows nothing of chunks and whole steps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import torch

from data_sources.bars import Bars, find_breaks
from envs.features import FEATURES, compute

WARM_UP, MOST_AGE = 15, pd.Timedelta(minutes=5)
LEADERS = {
    "stock": ("SPY", "QQQ"),
    "crypto": ("BTCUSDT|X:BTC-USD|BTCUSDT.P", "ETHUSDT|X:ETH-USD|ETHUSDT.P"),
}


def panel_features(bars: Sequence[Bars], symbol: str, members: Sequence[str] | None = None) -> pd.DataFrame:
    """The features of one symbol, by its open times."""
    (own,) = [series for series in bars if series.symbol == symbol]
    counted = [series for series in bars if members is None or series.symbol in members]
    peers = {series.symbol: by_bar(series) for series in counted if series.asset_class == own.asset_class}
    parts = [part for _, part in by_bar(own).groupby("part")]
    return pd.concat([features_of_part(part, own, peers, counted) for part in parts])


def growth_of_others(bars: Sequence[Bars], own: Bars) -> np.ndarray:
    """The mean log growth of the others of its asset class from each bar's open to the next one's."""
    peers = [series for series in bars if series.asset_class == own.asset_class]
    minutes = pd.DatetimeIndex(np.unique(np.concatenate([series.open_time for series in peers])))
    others = {
        series.symbol: at_minutes(by_bar(series), minutes) for series in peers if series.symbol != own.symbol
    }
    level = index_of(others, minutes, is_weighted=False)
    just_before = pd.DatetimeIndex(own.open_time) - pd.Timedelta(minutes=1)
    known = level.reindex(just_before, method="ffill").fillna(0.0).to_numpy()
    return np.append(np.diff(known), 0.0)


def features_of_part(
    mine: pd.DataFrame, own: Bars, peers: dict[str, pd.DataFrame], counted: Sequence[Bars]
) -> pd.DataFrame:
    """The features between two breaks."""
    symbol, is_member = own.symbol, own.symbol in peers
    minutes = pd.DatetimeIndex(
        np.unique(np.concatenate([mine.index[:1], *(p.index for p in peers.values())]))
    )
    others = {name: at_minutes(table, minutes) for name, table in peers.items() if name != symbol}
    everyone = others | ({symbol: at_minutes(peers[symbol], minutes)} if is_member else {})
    result = pd.DataFrame(index=mine.index)
    equal, weighted = index_of(others, minutes, False), index_of(others, minutes, True)
    leaders = [leader_index(counted, own, number) for number in (0, 1)]
    market = {bars: change(equal, mine, bars) for bars in (1, 2, 3, 5, 15, 60, 240)}
    limit = 8 * mine.sigma
    clipped = market[1].clip(-limit, limit)
    slope = (mine.move.clip(-limit, limit) * clipped).rolling(1_440, 1).mean()
    prior = 0.05 * mine.slow_sigma**2
    beta = (slope + prior) / ((clipped**2).rolling(1_440, 1).mean() + prior)
    for bars_back, move in market.items():
        scale = mine.sigma * np.sqrt(bars_back)
        result[f"market_return_{bars_back}"] = move / scale
        result[f"weighted_market_return_{bars_back}"] = change(weighted, mine, bars_back) / scale
        past = mine.log_close.diff(bars_back).fillna(0.0)
        result[f"residual_{bars_back}"] = (past - beta * move) / scale
    for bars_back in (1, 5, 15, 60):
        for name, index in zip(("leader_return", "second_leader_return"), leaders, strict=True):
            result[f"{name}_{bars_back}"] = change(index, mine, bars_back) / mine.sigma / np.sqrt(bars_back)
    result["beta"] = beta
    spread = cross_section(everyone, "return_1", minutes).std(axis=1, ddof=0).reindex(mine.index).fillna(0.0)
    usual = spread.rolling(240, 1).mean()
    result["dispersion"] = np.log((spread + 0.05 * usual) / (1.05 * usual)).fillna(0.0)
    for bars_back in (1, 15, 60):
        signs = np.sign(cross_section(others, f"return_{bars_back}", minutes))
        result[f"share_up_{bars_back}"] = (
            signs.mean(axis=1).reindex(mine.index, method="ffill", tolerance=MOST_AGE).fillna(0.0)
        )
    for name in ("return_1", "return_15", "return_60", "volume", "taker_flow_5"):
        table = cross_section(others, name, minutes).reindex(mine.index, method="ffill", tolerance=MOST_AGE)
        number = table.notna().sum(axis=1).clip(lower=1)
        share = (table.lt(mine[name], axis=0).sum(axis=1) - table.gt(mine[name], axis=0).sum(axis=1)) / number
        result[f"{name}_rank"] = share.where(mine.counts | (not is_member), 0.0)
    flows = {f"market_flow_{length}": f"taker_flow_{length}" for length in (1, 5, 15, 60)}
    for feature, name in {"market_volume": "volume", **flows}.items():
        mean = cross_section(others, name, minutes).mean(axis=1)
        result[feature] = mean.reindex(mine.index, method="ffill", tolerance=MOST_AGE).fillna(0.0)
    return result


def by_bar(bars: Bars) -> pd.DataFrame:
    """One symbol's own series; they begin again at every break."""
    edges = [0, *find_breaks(bars).tolist(), len(bars)]
    parts = [bars.rows(first, end) for first, end in pairwise(edges)]
    return pd.concat([of_part(part).assign(part=number) for number, part in enumerate(parts)])


def of_part(bars: Bars) -> pd.DataFrame:
    """The same between two breaks."""
    raw = compute(bars, torch.device("cpu"), {name: FEATURES[name] for name in SINGLE}).double().numpy()
    table = pd.DataFrame(raw, index=pd.DatetimeIndex(bars.open_time), columns=SINGLE)
    table["log_close"] = np.log(bars.close)
    table["move"] = table.log_close.diff().fillna(0.0)
    variance = np.log(bars.high / bars.low) ** 2 / (4 * np.log(2))
    for name, window in (("sigma", 240), ("slow_sigma", 1_440)):
        means = pd.Series(variance, table.index).rolling(window, 1).mean()
        table[name] = np.sqrt(means).clip(lower=1e-5)
    table["weight"] = pd.Series(bars.close * bars.volume, table.index).rolling(1_440, 1).mean()
    table["counts"] = np.arange(len(bars)) >= WARM_UP
    table["time"] = table.index
    return table


SINGLE = [
    "return_1",
    "return_15",
    "return_60",
    "volume",
    "taker_flow_1",
    "taker_flow_5",
    "taker_flow_15",
    "taker_flow_60",
]


def at_minutes(table: pd.DataFrame, minutes: pd.DatetimeIndex) -> pd.DataFrame:
    """A symbol's newest bar at every minute; its move only where the bar is."""
    newest = table.reindex(minutes, method="ffill")
    newest["move"] = table.move.where(table.counts, 0.0).reindex(minutes).fillna(0.0)
    is_fresh = (minutes - pd.DatetimeIndex(newest.time)) <= MOST_AGE
    newest["counts"] = newest.counts.eq(True) & is_fresh
    return newest


def index_of(others: dict[str, pd.DataFrame], minutes: pd.DatetimeIndex, is_weighted: bool) -> pd.Series:
    """The others' index of log returns."""
    level, levels = 0.0, []
    for place in range(len(minutes)):
        rows = [table.iloc[place] for table in others.values()]
        weights = [(row.weight if is_weighted else 1.0) * row.counts for row in rows if row.counts]
        moves = [row.move * (row.weight if is_weighted else 1.0) for row in rows if row.move]
        level += sum(moves) / sum(weights) if sum(weights) else 0.0
        levels.append(level)
    return pd.Series(levels, minutes)


def leader_index(counted: Sequence[Bars], own: Bars, number: int) -> pd.Series | None:
    market = "stock" if own.asset_class == "stock" else "crypto"
    names = LEADERS[market][number]
    found = [bars for bars in counted if re.fullmatch(names, bars.symbol)]
    found = sorted(found, key=lambda bars: (bars.asset_class != own.asset_class, bars.symbol))
    if not found or found[0].symbol == own.symbol:
        return None
    return by_bar(found[0]).move.cumsum()


def change(index: pd.Series | None, mine: pd.DataFrame, bars: int) -> pd.Series:
    if index is None:
        return pd.Series(0.0, mine.index)
    return index.reindex(mine.index, method="ffill").fillna(0.0).diff(bars).fillna(0.0)


def cross_section(tables: dict[str, pd.DataFrame], name: str, minutes: pd.DatetimeIndex) -> pd.DataFrame:
    columns = {symbol: table[name].where(table.counts) for symbol, table in tables.items()}
    return pd.DataFrame(columns, index=minutes)
