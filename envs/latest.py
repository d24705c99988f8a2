"""The present: each symbol's newest closed bar as a decision, seen as an exam of that day would see it.

In training and in an exam decision h of a segment sees C + h earlier bars. So the present is a segment under way:
segments begin with the bars of the newest bar's UTC day, every H bars, as those of
``ExamEnv(market, config, device, [(symbol, midnight_ns)])`` do. What an exam measured is then what is
done now, bar by bar and to the same numbers, and only the newest bars are needed to know it.

Shapes: N = symbols with a decision, C = context bars, H = horizon, F = bar features, A = account features,
J = positions that can be held.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_sources.bars import COLUMNS, MINUTE_NS, Bars
from data_sources.calendar import DAY_NS, expected_minutes, minutes_left
from envs.account import AccountState, observation_constants, observe
from envs.config import EnvConfig
from envs.counterfactuals import accounts_in_every_position
from envs.market import Market

LONGEST_CLOSURE_NS = 7 * DAY_NS  # within it the next session begins


@dataclass(frozen=True, eq=False)
class Present:
    """What a policy needs to decide now. ``waiting`` says of the other symbols why they have no decision."""

    symbols: tuple[str, ...]  # N
    bar: Tensor  # (N,) int64, the newest bar's place in the market
    bars: Tensor  # (N, C + H + 1, F) float32, of a segment under way: 0 from token C + decision + 1 on
    decision: Tensor  # (N,) int64, which one of the segment's H it is
    accounts: Tensor  # (N, J, A) float32, of a new account in cash, and as if it held each other position
    only_cash: Tensor  # (N,) bool, an order of now fills too near the close: see flat_before_close
    waiting: dict[str, str]


def present(market: Market, config: EnvConfig) -> Present:
    """Make every symbol's newest bar the decision of a segment under way.

    A new account is one at the start of an episode: equity 1, in cash, nothing won or lost. Where it holds a
    position, it is as if that had been reached just now and for nothing.

    Args:
        market: bars up to now, none held out, of the same context; its own horizon does not matter.
        config: horizon, positions, fees and episodes as in training.
    """
    context, horizon = config.context_bars, config.horizon
    bounds = market.offsets.tolist()
    firsts, lasts = market.stretch_first.tolist(), market.stretch_last.tolist()
    # The newest stretch of each symbol ends with its last bar.
    begin_of = dict(zip(lasts, firsts, strict=True))
    numbers, starts, newest, waiting = [], [], [], {}
    for index, symbol in enumerate(market.symbols):
        first, last = bounds[index], bounds[index + 1] - 1
        if last < first:
            waiting[symbol] = "no bars"
            continue
        midnight = int(market.open_time[last]) // DAY_NS * DAY_NS
        first_today = first + int((market.open_time[first : last + 1] < midnight).sum())
        first_decision = max(begin_of[last] + context, first_today)
        if first_decision > last:
            have = last - begin_of[last] + 1
            waiting[symbol] = f"{have} bars in a row since its last hole, needs {context + 1}"
            continue
        numbers.append(index)
        starts.append(last - (last - first_decision) % horizon)
        newest.append(last)
    device = market.device
    number, start, bar = (torch.tensor(each, device=device).long() for each in (numbers, starts, newest))
    places = start[:, None] - context + torch.arange(context + horizon + 1, device=device)
    ahead = places > bar[:, None]
    tokens = market.features[torch.where(ahead, bar[:, None], places)].float()
    is_crypto = market.is_crypto[number]
    only_cash = [
        bool(config.flat_before_close)
        and not market.is_crypto[each]
        and _minutes_left_at_next_fill(int(market.open_time[place])) <= config.flat_before_close
        for each, place in zip(numbers, newest, strict=True)
    ]
    return Present(
        tuple(market.symbols[each] for each in numbers),
        bar,
        tokens.masked_fill_(ahead[..., None], 0.0),
        bar - start,
        accounts_in_every_position(_new_accounts(config, is_crypto), config.positions),
        torch.tensor(only_cash, dtype=torch.bool, device=device),
        waiting,
    )


def _new_accounts(config: EnvConfig, is_crypto: Tensor) -> Tensor:
    """Return what accounts know of themselves at the start of an episode, (N, A) float32."""
    dtype, device, positions = torch.float64, is_crypto.device, config.positions
    account = AccountState.fresh(len(is_crypto), dtype, device)
    cost_rate = torch.where(is_crypto, config.crypto_fee_bps, config.stock_fee_bps).to(dtype)
    cost_rate = (cost_rate + config.slippage_bps) / 1e4
    constants = observation_constants(positions, config.episode_bars, dtype, device)
    nothing = torch.zeros_like(cost_rate)
    return observe(account, nothing, nothing, cost_rate, constants).contiguous()


def _minutes_left_at_next_fill(open_time: int) -> int:
    """Return the minutes to the close when the next minute of trade after a stock's bar opens."""
    scheduled = expected_minutes(open_time + MINUTE_NS, open_time + LONGEST_CLOSURE_NS)
    following = open_time + MINUTE_NS if scheduled is None or not len(scheduled) else int(scheduled[0])
    columns = dict.fromkeys(COLUMNS, np.ones(1)) | {"open_time": np.array([following])}
    return int(minutes_left(Bars("", "stock", **columns))[0])
