"""What an environment's next segment depends on, to be kept in a checkpoint and taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from envs.trading_env import TradingEnv


def capture(env: TradingEnv) -> dict[str, Any]:
    """Return it as plain types and CPU tensors; places are told by symbol and time."""
    market = env.market
    names = [market.symbols[number] for number in env._symbol.tolist()]
    return {
        "positions": list(env.config.positions),
        "symbols": names,
        "open_time": market.open_time[env._cursor].cpu(),
        # Prices of the past may change, by a split for one: units are kept worth the same here.
        "next_open": market.quotes[env._cursor + 1, 0].cpu(),
        "account": {f.name: getattr(env.account, f.name).cpu().clone() for f in fields(env.account)},
        "played": env._played.cpu().clone(),
        "over": env._over.cpu().clone(),
        "begun": env._begun,
        "totals": env.statistics.totals.cpu().clone(),
        "time_in": env.statistics.time_in.cpu().clone(),
        "generator": env.generator.get_state().clone(),
    }


def restore(env: TradingEnv, state: Mapping[str, Any]) -> None:
    """Put an environment where ``capture`` found another one."""
    place(env, state)
    env._begun = state["begun"]
    env.statistics.totals.copy_(state["totals"])
    if list(state["positions"]) == list(env.config.positions):
        env.statistics.time_in.copy_(state["time_in"])
    if len(state["generator"]) == len(env.generator.get_state()):
        env.generator.set_state(state["generator"].cpu())


def place(env: TradingEnv, state: Mapping[str, Any]) -> None:
    """Take up the accounts alone; runs between segments only, so it may take the host's time."""
    n, market = min(env.config.num_envs, len(state["symbols"])), env.market
    symbol, cursor, found = market.find(state["symbols"][:n], state["open_time"][:n])
    account = state["account"]
    ratio = state["next_open"][:n].to(env.device) / market.quotes[cursor + 1, 0]
    for field in fields(env.account):
        value = account[field.name][:n].to(env.device)
        if field.name == "units":
            value = value * ratio
        if field.name == "target":
            # Compared by value from now on, so to the bit of this environment's own, whatever its precision.
            nearest = env._targets[(value[:, None] - env._targets).abs().argmin(1)]
            value = torch.where((nearest - value).abs() < 1e-6, nearest, value.to(env.dtype))
        getattr(env.account, field.name)[:n] = value.to(getattr(env.account, field.name).dtype)
    env._symbol[:n], env._cursor[:n] = symbol, cursor
    env._played[:n] = state["played"][:n].to(env.device)
    # Beyond the state, any place will do until the next draw.
    env._symbol[n:], env._cursor[n:] = 0, 0
    env._over.fill_(True)
    env._over[:n] = state["over"][:n].to(env.device) | ~found
    env._over |= env._does_not_fit()
    env._step = env.config.horizon
