"""The latest decision of each symbol: its newest closed bar, seen as an exam of that day would see it.

In training and in an exam, decision h of a segment sees C + h earlier bars. So the newest bar becomes a
decision of an unfinished segment. Where that begins follows from the clock (``Market.segment_starts``), in an exam
as well: live decisions match the exam's to the same numbers, whenever it began, and need only the newest bars.

Shapes: N = symbols with a decision, C = context bars, H = horizon, F = bar features, A = account features,
J = positions that can be held.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_sources.bars import COLUMNS, DAY_NS, MINUTE_NS, Bars
from data_sources.calendar import expected_minutes, minutes_left
from envs.account import AccountState, observation_constants, observe
from envs.config import EnvConfig
from envs.counterfactuals import accounts_in_every_position
from envs.market import Market

LONGEST_CLOSURE_NS = 7 * DAY_NS  # the next session begins within it


@dataclass(frozen=True, eq=False)
class LatestDecisions:
    """Inputs for a decision per symbol, and why the other symbols have none."""

    symbols: tuple[str, ...]  # N
    bar: Tensor  # (N,) int64, index of the newest bar in the market
    bars: Tensor  # (N, C + H + 1, F) float32, of an unfinished segment: 0 from token C + decision + 1 on
    decision: Tensor  # (N,) int64, index within the segment
    accounts: Tensor  # (N, J, A) float32, of a new account holding each position
    only_cash: Tensor  # (N,) bool, the fill is too near the close to hold a position: see flat_before_close
    unavailable: dict[str, str]  # symbol -> reason


def latest_decisions(market: Market, config: EnvConfig) -> LatestDecisions:
    """Turn every symbol's newest bar into a decision of an unfinished segment.

    Accounts are new ones: equity 1, nothing gained or lost. A position counts as reached just now, at no cost.

    Args:
        market: bars up to now, none held out, with the context of ``config``; its horizon does not matter.
        config: horizon, positions, fees and episodes as in training.
    """
    context, horizon = config.context_bars, config.horizon
    bounds = market.offsets.tolist()
    firsts, lasts = market.stretch_first.tolist(), market.stretch_last.tolist()
    # A symbol's newest stretch ends with its last bar.
    begin_of = dict(zip(lasts, firsts, strict=True))
    numbers, starts, newest, unavailable = [], [], [], {}
    for number, symbol in enumerate(market.symbols):
        first, last = bounds[number], bounds[number + 1] - 1
        if last < first:
            unavailable[symbol] = "no bars"
            continue
        begin = int(market.segment_starts(number, torch.tensor([last], device=market.device), horizon))
        if begin > last:
            have = last - begin_of[last] + 1
            unavailable[symbol] = f"{have} bars in a row since its last hole, needs {context + 1}"
            continue
        numbers.append(number)
        starts.append(begin)
        newest.append(last)
    device = market.device
    symbol_of, start, bar = (
        torch.tensor(values, device=device).long() for values in (numbers, starts, newest)
    )
    places = start[:, None] - context + torch.arange(context + horizon + 1, device=device)
    ahead = places > bar[:, None]
    tokens = market.features[torch.where(ahead, bar[:, None], places)].float()
    cost_rate = market.cost_rates(config, torch.float64)[symbol_of]
    only_cash = [
        bool(config.flat_before_close)
        and not market.is_crypto[number]
        and minutes_left_at_next_fill(int(market.open_time[last])) <= config.flat_before_close
        for number, last in zip(numbers, newest, strict=True)
    ]
    return LatestDecisions(
        symbols=tuple(market.symbols[number] for number in numbers),
        bar=bar,
        bars=tokens.masked_fill_(ahead[..., None], 0.0),
        decision=bar - start,
        accounts=accounts_in_every_position(_observe_new_accounts(config, cost_rate), config.positions),
        only_cash=torch.tensor(only_cash, dtype=torch.bool, device=device),
        unavailable=unavailable,
    )


def _observe_new_accounts(config: EnvConfig, cost_rate: Tensor) -> Tensor:
    """Return the observations of accounts at the start of an episode, (N, A) float32."""
    dtype, device, positions = cost_rate.dtype, cost_rate.device, config.positions
    account = AccountState.fresh(len(cost_rate), dtype, device)
    constants = observation_constants(positions, config.episode_bars, dtype, device)
    zeros = torch.zeros_like(cost_rate)
    return observe(account, zeros, zeros, cost_rate, constants).contiguous()


def minutes_left_at_next_fill(open_time: int) -> int:
    """Return the minutes to the close at the open of the next trading minute after a stock's bar."""
    scheduled = expected_minutes(open_time + MINUTE_NS, open_time + LONGEST_CLOSURE_NS)
    following = open_time + MINUTE_NS if scheduled is None or not len(scheduled) else int(scheduled[0])
    columns = dict.fromkeys(COLUMNS, np.ones(1)) | {"open_time": np.array([following])}
    return int(minutes_left(Bars("", "stock", **columns))[0])
