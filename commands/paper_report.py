"""What ``paper`` shows of a minute: as plain types, as a table, as lines of its book, as curves of its page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from envs.open_env import OpenAccount
from evaluation.baselines import BUY_AND_HOLD
from evaluation.exam import POLICY, Walk
from evaluation.measures import jsonable
from evaluation.paper import SETTLED_MINUTES, Minute
from evaluation.paper_totals import PORTFOLIO, Totals
from monitoring.format import iso_time


def report(checkpoint: str, done: Minute, totals: Totals, now_ns: int) -> dict[str, Any]:
    """Return everything as plain types; docs/use.md explains the fields."""
    returns = totals.returns(done)
    keys = {*done.state.accounts[POLICY], *done.targets, *done.waiting} - done.state.groups.keys()
    symbols = [row for key in (*done.state.groups, *sorted(keys)) for row in _rows(done, key)]
    portfolio = totals.portfolio
    return jsonable(
        {
            "time": iso_time(now_ns),
            "began": iso_time(totals.began_ns),
            "checkpoint": checkpoint,
            "headline": f"{returns[POLICY]:+.2%} after costs, buy and hold {returns[BUY_AND_HOLD]:+.2%}"
            + (f", portfolio {returns[PORTFOLIO]:+.2%}" if portfolio else ""),
            "accounts": {name: {"return": value} for name, value in returns.items()},
            "trades": totals.trades,
            "costs": totals.costs,
            "late": totals.late,
            "settled_minutes": SETTLED_MINUTES,
            "symbols": symbols,
            "portfolio": None
            if portfolio is None
            else {
                "equity": portfolio.equity,
                "exposure": portfolio.exposure,
                "gross": portfolio.gross,
                "trades": portfolio.trades,
                "costs": portfolio.costs,
                "borrowing": portfolio.borrowing,
                "funding": portfolio.funding,
                "weights": {
                    s: u * portfolio.prices[s] / portfolio.equity for s, u in portfolio.units.items()
                },
            },
        }
    )


def _rows(done: Minute, key: str) -> list[dict[str, Any]]:
    """Return the rows of an account: its symbol, or each symbol of its group."""
    own, hold = (done.state.accounts[name].get(key) for name in (POLICY, BUY_AND_HOLD))
    symbols = done.state.groups.get(key, (key,))
    positions: Sequence[float] = [0.0] * len(symbols)
    if own is not None:
        positions = [own.target] if isinstance(own, OpenAccount) else own.weight
    common = {
        **({"group": key if key in done.state.groups else ""} if done.state.groups else {}),
        "return": math.expm1(own.log_equity) if own else 0.0,
        "buy_and_hold": math.expm1(hold.log_equity) if hold else 0.0,
        "booked_until": iso_time(own.next_ns) if own else None,
        "state": done.waiting.get(key, "" if own is None or own.alive else "ruined"),
    }
    without = dict.fromkeys(done.unseen.get(key, ()), "no bar of this minute")
    targets = done.targets.get(key, [None] * len(symbols))
    return [
        {"symbol": symbol, "target": target, "position": position, **common}
        | ({"state": without[symbol]} if symbol in without else {})
        for symbol, target, position in zip(symbols, targets, positions, strict=True)
    ]


def table(content: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Return title, columns and rows for people."""
    title = (
        f"{content['time'].replace('T', ' ').rstrip('Z')} UTC, {content['checkpoint']}: {content['headline']}"
    )
    if content["portfolio"]:
        title += f", exposure {content['portfolio']['exposure']:.2f} of {content['portfolio']['gross']:g}"
    rows = [
        [
            *([row["group"]] if "group" in row else []),
            row["symbol"],
            "" if row["target"] is None else f"{row['target']:+g}",
            f"{row['position']:+.2%}" if "group" in row else f"{row['position']:+g}",
            f"{row['return']:+.2%}",
            f"{row['buy_and_hold']:+.2%}",
            row["state"],
        ]
        for row in content["symbols"]
    ]
    return (
        f"{title}; no orders are sent",
        [
            *(["group"] if any("group" in row for row in content["symbols"]) else []),
            *("symbol", "decided", "position", "return", "buy and hold", "state"),
        ],
        rows,
    )


def trades_of(done: Minute) -> list[dict[str, Any]]:
    """Return a line for every trade that was booked; docs/use.md explains the fields."""
    return [
        {
            "kind": "fill",
            "time": iso_time(trade.time_ns)[:16],
            **({"group": trade.key} if trade.key in done.state.groups else {}),
            "symbol": trade.symbol,
            "price": trade.price,
            "from": trade.before,
            "to": trade.after,
            "traded": trade.traded,
            "costs": trade.costs,
        }
        for trade in done.trades
    ]


def curves_of(marks: Sequence[Mapping[str, Any]]) -> dict[str, list[Walk]]:
    """Return the marks as walks, to be drawn like those of a report."""
    time_ = np.array([mark["time"].rstrip("Z") for mark in marks], dtype="datetime64[ns]")
    nothing = np.zeros(len(marks))
    curves = {}
    for name in (POLICY, BUY_AND_HOLD):
        growth = np.diff(np.log1p([mark[name] for mark in marks]), prepend=0.0)
        curves[name] = [Walk("", "crypto", time_, nothing, nothing, growth, nothing, nothing, nothing)]
    return curves
