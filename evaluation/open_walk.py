"""A walk that goes on: accounts of a policy and of buy and hold, over the bars that came since they last stood.

Shapes: S = symbols, R = decisions of the longest walk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from envs.config import EnvConfig
from envs.market import Market
from envs.open_env import OpenAccount, OpenEnv
from evaluation.baselines import BUY_AND_HOLD, actions_after
from evaluation.exam import ENCODED_SEGMENTS, POLICY, Reader, Walk, one_thread, play_segment, walks_of
from models.ensemble import Decider, EnsembleHead
from models.policy import Head

NAMES = (POLICY, BUY_AND_HOLD)
Accounts = Mapping[str, Mapping[str, OpenAccount]]  # contestant -> symbol -> account


@dataclass(frozen=True)
class OpenWalks:
    """What was walked, by contestant, and the accounts as they stand now: those that did not walk as before."""

    walks: dict[str, list[Walk]]
    accounts: dict[str, dict[str, OpenAccount]]
    held: int  # decisions of the policy's accounts before ``decides_from_ns``
    is_whole: bool  # else it was stopped before the newest bar


@torch.no_grad()
def walk_on(
    policy: Decider,
    market: Market,
    config: EnvConfig,
    symbols: Sequence[str],
    accounts: Accounts,
    decides_from_ns: int,
    end_ns: int,
    chunk_segments: int = 64,
    check_stop: Callable[[], None] = lambda: None,
    is_late: Callable[[], bool] = lambda: False,
) -> OpenWalks:
    """Let the accounts walk on to the newest bar whose outcome is known, as an exam would, greedily.

    Args:
        policy: decides; the trunk reads segments as in an exam.
        market: has the bars.
        config: of the accounts, with the horizon of the training.
        symbols: to walk.
        accounts: as they stood; a symbol without one begins with money 1, at ``decides_from_ns``.
        decides_from_ns: at the close of older bars an account keeps what it holds: the policy knows what comes.
        end_ns: of the bars.
        chunk_segments: segments per forward of the trunk.
        check_stop: called every few bars; an exception from it ends the walk.
        is_late: asked likewise; then the walk ends where it is.

    Raises:
        NoSegment: there is nothing to walk.
    """
    market = replace(market, horizon=1).until(end_ns)
    places = [(symbol, decides_from_ns) for _ in NAMES for symbol in symbols]
    standing = [accounts.get(name, {}).get(symbol) for name in NAMES for symbol in symbols]
    env = OpenEnv(market, config, market.device, places, standing)
    num_symbols, horizon = len(symbols), config.horizon
    numbers = [market.symbols.index(symbol) for symbol in symbols]
    schedule = env.schedule[:, :num_symbols]  # (R, S)
    first_bars = market.offsets[torch.tensor(numbers, device=env.device)]
    reader = Reader(policy, market, numbers, horizon, chunk_segments)
    decide = _Decide(policy.head, len(config.positions))
    at_once = max(horizon, ENCODED_SEGMENTS * horizon // num_symbols)
    played, held = [], 0
    for first in range(0, len(schedule), at_once):
        if first and is_late():
            break
        rows = schedule[first : first + at_once]
        encoded = reader.read(rows.T[None], check_stop)[0]  # (r, S, W)
        may_decide = market.open_time[rows.clamp(min=0)] >= decides_from_ns
        held += int(((rows >= 0) & ~may_decide).sum())
        buying = actions_after(BUY_AND_HOLD, market, config.positions, rows, first_bars)
        with one_thread(env.device):
            for row in range(len(rows)):
                if row % 64 == 0:
                    check_stop()
                env.begin_segment()
                inputs = buying[row : row + 1], encoded[row : row + 1]
                played.append(play_segment(env, decide, may_decide[row : row + 1], inputs))
    columns = list(np.concatenate(played, axis=1))
    ahead = torch.arange(1, device=env.device)
    walks = walks_of(NAMES, symbols, market, schedule[: len(played)], ahead, columns)
    now = iter(env.accounts())
    after = {name: {symbol: account for symbol in symbols if (account := next(now))} for name in NAMES}
    accounts_now = {name: {**accounts.get(name, {}), **after[name]} for name in NAMES}
    return OpenWalks(walks, accounts_now, held, len(played) == len(schedule))


@dataclass(frozen=True)
class _Decide:
    """The actions of all accounts at one bar: the policy's, then those of buy and hold."""

    head: Head | EnsembleHead
    num_positions: int

    def __call__(
        self, accounts: Tensor, may_decide: Tensor, buying: Tensor, projected: Tensor
    ) -> tuple[Tensor]:
        """Join observations (2 x S, A), who may decide (S,), buy and hold's actions (S,), the market's part."""
        own = accounts[: len(may_decide)]
        chosen = self.head.decide(projected, own[None])[0].argmax(-1).flatten()
        holds = own[:, : self.num_positions].argmax(-1)
        return (torch.cat((torch.where(may_decide, chosen, holds), buying)),)
