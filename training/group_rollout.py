"""Rollouts of accounts over groups of symbols, and what every choice of every symbol would have earned there.

A rollout has a row per slot, one symbol of one group, so that the update needs to know nothing of groups. Each
choice of a symbol is valued along the realised path given the choices of the others: by the growth of the group's
equity, less what it would have grown without that symbol. What the others earn does not depend on the choice, so
it is left out, and with it most of the noise (difference rewards: Wolpert and Tumer 2002).

Shapes: N = groups, G = symbols of a group, M = N x G, T = horizon, A = account features, J = K = target positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from envs.ahead import moves_ahead
from envs.group_account import GroupState, advance_group
from envs.group_env import GroupEnv, GroupTrajectory
from envs.recent_volatility import recent_volatility
from models.forecaster import Forecaster
from models.policy import Policy
from training.hindsight import Hindsight
from training.rollout import REWARD_LIMIT, Rollout, add_noise, depth_of, encode

SLOTS_AT_ONCE = 64  # whose every choice is valued at once: bounds the memory of (T, K, K, G) for each


@torch.no_grad()
def collect_groups(
    env: GroupEnv,
    policy: Policy,
    generator: torch.Generator,
    chunk_segments: int,
    greedy: bool = False,
    hindsight: bool = False,
    reward_scale: float = 1.0,
    feature_noise: float = 0.0,
    forecaster: Forecaster | None = None,
    stochastic_depth: float = 0.0,
) -> Rollout:
    """Play one segment in every group; arguments as of ``rollout.collect``.

    Rewards of a slot are those of its group, in units of what a move of one of its symbols typically earns.
    """
    config, group = env.config, env.group
    horizon, slots = config.horizon, config.num_envs
    bars = add_noise(env.begin_segment(), feature_noise, generator)
    depth = depth_of(policy, slots, stochastic_depth, generator)
    projected, forecasts = encode(policy, bars, horizon, chunk_segments, forecaster, depth)
    newest = _newest_bars(env)
    came = None if forecaster is None else moves_ahead(env.market, newest)
    volatility = recent_volatility(env.market, newest)
    noise = torch.rand(slots, horizon, len(config.positions), generator=generator, device=bars.device)
    noise = torch.zeros_like(noise) if greedy else -(-noise.clamp_(1e-7, 1 - 1e-7).log()).log()
    by_time = (tensor.transpose(0, 1).contiguous() for tensor in (projected[:, :-1], noise))
    played = env.play(policy.head.choose, *by_time)
    actions, log_policy, values = (column.transpose(0, 1).contiguous() for column in played.outputs)
    accounts = played.observations.transpose(0, 1).contiguous()
    after = env.account_observations()
    scale, limit = reward_scale / env.scale, REWARD_LIMIT * reward_scale

    def by_slot(column: Tensor) -> Tensor:
        return column.t().repeat_interleave(group.size, dim=0)

    seen = None
    if hindsight:
        ahead = torch.cat((accounts, after[:, None]), dim=1)
        growth, ends, everywhere = [], [], []
        groups = max(1, SLOTS_AT_ONCE // group.size)
        for first in range(0, env.num_groups, groups):
            rows = slice(first, first + groups)
            own = slice(first * group.size, (first + groups) * group.size)
            results = (
                value_every_choice(env, played, rows),
                observe_every_position(env, played, rows, ahead[own]),
            )
            growth.append(
                (results[0][0] * scale[rows].repeat_interleave(group.size)[:, None, None, None]).float()
            )
            ends.append(results[0][1])
            everywhere.append(results[1])
        log_policies, critic = _in_every_position(policy, projected, torch.cat(everywhere), chunk_segments)
        seen = Hindsight(
            torch.cat(growth).clamp_(-limit, limit),
            torch.cat(ends),
            log_policies,
            critic,
            played.held.flatten(1).t().contiguous(),
        )
        # Choices that became cash, near the close or of a symbol that is gone.
        seen.only_cash = ~env.segment.may_hold.flatten(1).t().contiguous()
        seen.cash = env.cash_index
    is_decided = env.segment.is_decided.flatten(1).t().contiguous()
    return Rollout(
        bars[:, :-1],
        accounts,
        actions,
        log_policy,
        by_slot((played.rewards * scale).clamp_(-limit, limit)),
        values,
        by_slot(played.terminated),
        by_slot(played.alive) & is_decided,
        policy.head.decide(projected[:, horizon], after)[1],
        seen,
        forecasts,
        came,
        depth,
        volatility,
    )


def _newest_bars(env: GroupEnv) -> Tensor:
    """Return the bar that came with each minute of the segment that begins, (M, T) int64; -1 where none did."""
    steps = torch.arange(-1, env.config.horizon, device=env.device)
    bars = env.grid.bars_at(env.symbols[..., None], (env.minute[:, None] + steps)[:, None]).flatten(0, 1)
    return torch.where(bars[:, 1:] != bars[:, :-1], bars[:, 1:], -1)


def value_every_choice(env: GroupEnv, played: GroupTrajectory, rows: slice) -> tuple[Tensor, Tensor]:
    """Return the log growth that every choice of a slot adds from every position it could hold, and which end all.

    The others hold and choose what they did. Before the fill every position has the weight that it has in the
    group after a trade, without drift. What the group would have grown by with this slot in cash throughout is
    taken off.

    Args:
        env: after the segment.
        played: the segment.
        rows: of groups, n of them.

    Returns:
        (n x G, T, J, K) float64, and (n x G, T, J, K) bool.
    """
    held = env.weights_of_every_position(played.held[:, rows])  # (T, n, G, K, G)
    chosen = env.weights_of_every_position(played.chosen[:, rows])
    fills = {name: values[:, rows, None, None, None] for name, values in env.segment.fills.items()}
    equity = played.log_equity[:, rows].exp()[:, :, None, None, None, None]
    fills |= {name: fills[name] * equity for name in ("impact", "next_impact") if name in fills}
    held, chosen = held[:, :, :, :, None], chosen[:, :, :, None]
    # Who is not filled stays where it is.
    target = torch.where(fills["is_filled"], chosen, held)
    held = held.expand_as(target)
    zeros = target[..., 0] * 0
    state = GroupState(
        cash=1 - held.sum(-1),
        units=held / fills["price"],
        weight=held,
        choice=torch.zeros((), dtype=torch.int64, device=env.device),
        owed=zeros,
        log_equity=zeros,
        log_peak=zeros,
        alive=zeros == 0,
    )
    # Ruin is in start equities, which all rows of this have in common.
    _, fill = advance_group(state, target, state.choice, ruin_equity=0.0, **fills)
    before = played.log_equity[:, rows, None, None, None]
    ends = (before + fill.log_return <= math.log(env.config.ruin_fraction)) | fill.ruined
    alone = fill.log_return[:, :, :, env.cash_index, None, env.cash_index, None]
    growth = fill.log_return - alone
    return tuple(each.flatten(1, 2).transpose(0, 1) for each in (growth, ends))  # type: ignore[return-value]


def observe_every_position(env: GroupEnv, played: GroupTrajectory, rows: slice, accounts: Tensor) -> Tensor:
    """Return each slot's observations, had it held every position: (n x G, T + 1, A) -> (n x G, T + 1, J, A).

    At the position held they are unchanged. Any other one counts as reached just now, as do those of its group.
    """
    group, num_targets = env.group, len(env.config.positions)
    index = torch.cat((played.held[:, rows], env.account.choice[None, rows]))
    weights = env.weights_of_every_position(index)  # (T + 1, n, G, J, G)
    own = weights.diagonal(dim1=2, dim2=4).movedim(-1, 2) / group.share
    together = weights.sum(-1) / group.gross, weights.abs().sum(-1) / group.gross
    columns = torch.stack((own, *together), dim=-1).flatten(1, 2).transpose(0, 1).clamp(-8, 8)
    one_hot = torch.eye(num_targets, dtype=accounts.dtype, device=accounts.device)
    held = index.flatten(1).t()[..., None, None]
    same = held == torch.arange(num_targets, device=held.device)[:, None]
    shape = (*accounts.shape[:2], num_targets)
    exposure = accounts[:, :, None, num_targets : num_targets + 3].expand(*shape, 3)
    rest = accounts[:, :, None, num_targets + 3 :].expand(*shape, -1)
    exposure = torch.where(same, exposure, columns.to(accounts.dtype))
    return torch.cat((one_hot.expand(*shape, num_targets), exposure, rest), dim=-1)


def _in_every_position(
    policy: Policy, projected: Tensor, everywhere: Tensor, chunk_segments: int
) -> tuple[Tensor, Tensor]:
    """Evaluate policy (M, T, J, K) and critic (M, T + 1, J) as if every position were held."""
    log_policies, values = [], []
    for market, accounts in zip(
        projected.split(chunk_segments), everywhere.split(chunk_segments), strict=True
    ):
        logits, value = policy.head.decide(market[:, :, None], accounts)
        log_policies.append(torch.log_softmax(logits[:, :-1], dim=-1))
        values.append(value)
    return torch.cat(log_policies), torch.cat(values)
