"""What a policy of accounts over groups wants now: the position of every symbol, and its weight within the caps.

Groups are made as in an exam (``groups_of``), of the symbols that have bars. Their newest minute is that of the
clock: a symbol whose bar of it is late or missing is seen, as in training, with the one before.

Shapes: Q = groups, G = symbols of a group, J = K = target positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_sources.bars import Bars
from envs.config import EnvConfig
from envs.grid import Grid
from envs.group_account import project, weights_of_every_position
from envs.latest import minutes_left_at_next_fill
from envs.market import Market
from evaluation.group_exam import groups_of, read
from evaluation.trained_policy import NEVER_NS, SEGMENTS_AT_ONCE, Actor, Decision, training_panel


@dataclass(frozen=True)
class GroupDecision:
    """A symbol's decision, given what is held of the others of its group."""

    group: str
    decision: Decision
    weight: float  # of the target, after the caps, as a fraction of the group's equity


@torch.no_grad()
def decide_groups(
    actor: Actor, bars: Sequence[Bars], others: Sequence[Bars], holdings: Mapping[str, float]
) -> tuple[list[GroupDecision], dict[str, str]]:
    """Decide for every group at the newest minute.

    Args:
        actor: of a training of groups.
        bars: closed bars of the symbols to hold, up to the newest; see ``Actor.decide``.
        others: of symbols that features only look at.
        holdings: positions held now, of a new account; cash where none is given.

    Returns:
        The decisions, and for each symbol without one the reason. A symbol may be in two groups.

    Raises:
        ValueError: no kind of market has enough symbols for a group, or enough bars in a row.
    """
    config, group = actor.config, actor.config.group
    assert group is not None
    needed = config.context_bars + 3  # the least that a market accepts
    unavailable = {s.symbol: f"{len(s)} bars, needs {needed}" for s in bars if len(s) < needed}
    place = {symbol: number for number, symbol in enumerate(actor.symbols)}
    usable = sorted(
        (series for series in bars if series.symbol not in unavailable),
        key=lambda series: (place.get(series.symbol, len(place)), series.symbol),
    )
    device = next(actor.policy.parameters()).device
    market = Market.from_bars(
        usable,
        device=device,
        holdout_start_ns=NEVER_NS,
        context_bars=config.context_bars,
        horizon=1,  # nothing is played
        statistics=actor.statistics,
        features=actor.features,
        panel=training_panel(usable, others, device, actor.symbols),
    )
    groups, grid = groups_of(market, group.size), Grid.of(market, group.size)
    number_of = {symbol: number for number, symbol in enumerate(market.symbols)}
    symbols = torch.tensor([[number_of[s] for s in each.symbols] for each in groups], device=device)
    clocks = grid.clock_of[symbols[:, 0]]
    # The newest minute of each group's clock: the last of its last span.
    minute = grid.span_last[torch.searchsorted(grid.span_clock, clocks, right=True) - 1]
    at_once = min(SEGMENTS_AT_ONCE, symbols.numel())  # none is read for nothing
    encoded = read(actor.policy, grid, config.horizon, symbols, minute[None, :, None], at_once)
    projected = encoded[0, 0].unflatten(0, symbols.shape)
    held = torch.tensor(
        [[config.positions.index(holdings.get(s, 0.0)) for s in each.symbols] for each in groups],
        device=device,
    )
    observed = observe_new_groups(market, config, symbols, held)
    logits, _ = actor.policy.head.decide(projected[:, :, None], observed)
    probabilities = torch.log_softmax(logits, -1).exp().tolist()
    is_ready = grid.is_ready(symbols, minute[:, None]).tolist()
    found: list[GroupDecision] = []
    for row, each in enumerate(groups):
        decided = []
        for column, symbol in enumerate(each.symbols):
            series = usable[number_of[symbol]]
            newest = int(series.open_time[-1])
            is_near_close = (
                bool(config.flat_before_close)
                and series.asset_class == "stock"
                and minutes_left_at_next_fill(int(grid.minutes[minute[row]])) <= config.flat_before_close
            )
            if not is_ready[row][column]:
                unavailable[symbol] = (
                    f"needs {config.context_bars + 1} bars in a row, the newest of late: in cash"
                )
            decided.append(
                Decision(
                    symbol,
                    series.asset_class,
                    newest,
                    float(series.close[-1]),
                    config.positions,
                    tuple(map(tuple, probabilities[row][column])),
                    is_near_close or not is_ready[row][column],
                )
            )
        targets = [decision.when_holding(holdings.get(decision.symbol, 0.0))[0] for decision in decided]
        wanted = torch.tensor(targets, dtype=torch.float64) * group.share
        weights = project(wanted, group.gross, group.net).tolist()
        found += [
            GroupDecision(each.name, decision, weight)
            for decision, weight in zip(decided, weights, strict=True)
            if decision.symbol not in unavailable
        ]
    return found, unavailable


def observe_new_groups(market: Market, config: EnvConfig, symbols: Tensor, held: Tensor) -> Tensor:
    """Return what new accounts with ``held`` (Q, G) see, had each symbol any position: (Q, G, J, A) float32."""
    assert config.group is not None
    group, num_targets = config.group, len(config.positions)
    targets = torch.tensor(config.positions, dtype=torch.float64, device=symbols.device) * group.share
    weights = weights_of_every_position(held, targets, group.gross, group.net)  # (Q, G, J, G)
    own = weights.diagonal(dim1=1, dim2=3).movedim(-1, 1) / group.share
    net, gross = weights.sum(-1) / group.gross, weights.abs().sum(-1) / group.gross
    zeros = torch.zeros_like(own)
    rate = (1e3 * market.cost_rates(config, torch.float64)[symbols])[..., None].expand_as(own)
    columns = torch.stack((own, net, gross, zeros, zeros, zeros + 1, rate), dim=-1).clamp(-8, 8)
    one_hot = torch.eye(num_targets, device=symbols.device).expand(*own.shape, num_targets)
    return torch.cat((one_hot, columns.float()), dim=-1)
