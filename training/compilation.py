"""Compile update, hindsight and accounts, and dry-run them: does the compiler work, is memory enough?

Compilers fail on machines that otherwise train well: no C++ compiler, another driver, a full temporary folder.
So everything that is compiled is tried first, and used on all ranks or on none.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from envs.ahead import HORIZONS
from envs.group_env import GroupEnv
from envs.trading_env import TradingEnv
from models.policy import Policy
from training.devices import missing_tools
from training.distributed import Ranks
from training.hindsight import Hindsight, hindsight_advantages
from training.losses import Objective, Targets
from training.parallel import is_sharded

CompilerErrors = (RuntimeError, OSError)  # TorchDynamoException is a RuntimeError


def _alone(policy: Policy) -> AbstractContextManager[None]:
    """Compute without the other ranks, which a sharded policy would wait for."""
    if not is_sharded(policy):
        return nullcontext()
    from training.sharding import without_communication

    return without_communication(policy)


def dry_run(objective: Objective, num_segments: int, context_bars: int, horizon: int, ranks: Ranks) -> None:
    """Run one forward as in a rollout, and one forward and backward as in an update, on zeros (all ranks).

    Allocates the optimizer's moments too, so that peak memory is realistic; clears the gradients. ``num_segments``
    is of one micro-batch. A sharded policy is of no use after an error: FSDP stays in the middle of its step.

    Raises:
        torch.OutOfMemoryError: on every rank, if one has too little memory.
        torch.AcceleratorError: the GPU failed, or has no kernel for something.
        Exception: the error of a compiled part.
    """
    policy, device = objective.policy, ranks.device
    out_of_memory = ""
    failure: Exception | None = None
    try:
        moments = [torch.empty_like(p) for _, p in objective.learnt() for _ in range(2)]
        num_features = policy.trunk.config.num_features
        bars = torch.zeros(num_segments, context_bars + horizon + 1, num_features, device=device)
        accounts, targets = zeros_of(objective, num_segments, horizon)
        num_layers = policy.trunk.config.num_layers
        is_drawn = objective.settings.stochastic_depth > 0  # else exams alone would be of use to compile
        more = (torch.ones(num_segments, num_layers, device=device),) if is_drawn else ()
        with _alone(policy):
            with torch.no_grad():
                policy.encode(bars, horizon + 1)
                if more:
                    policy.hidden(bars, horizon + 1, *more)
            losses = objective(bars[:, 1:].contiguous(), accounts, targets, targets.valid.numel(), *more)
            losses.total.backward()
        del moments
    except torch.OutOfMemoryError as error:
        out_of_memory = _describe(error)
    except torch.AcceleratorError:  # the GPU's, which computes nothing any more
        raise
    except CompilerErrors as error:
        failure = error
    objective.zero_grad()
    _raise_together(out_of_memory, ranks)
    if failure:
        raise failure


def zeros_of(objective: Objective, num_segments: int, horizon: int) -> tuple[Tensor, Targets]:
    """Make account observations and targets of one micro-batch."""
    head, by_decision = objective.policy.head, (num_segments, horizon)
    device = head.logits.weight.device
    accounts = torch.zeros(*by_decision, head.account.in_features, device=device)
    shape = *by_decision, head.logits.out_features
    # Separate tensors: the compiler specialises on one tensor in two places.
    log_policy, weights, advantages = (torch.zeros(shape, device=device) for _ in range(3))
    returns = torch.zeros(by_decision, device=device)
    valid = torch.zeros(by_decision, device=device, dtype=torch.bool)
    targets = Targets(log_policy, weights, advantages, returns, valid)
    if objective.forecaster is not None:
        targets.ahead = torch.zeros(*by_decision, 2, len(HORIZONS), device=device)
    return accounts, targets


def compile_objective(
    objective: Objective, num_segments: int, context_bars: int, horizon: int, ranks: Ranks
) -> str:
    """Compile the trunk for rollouts and updates, and head and losses for updates (all ranks).

    All of it or nothing; takes a minute for large models. With several ranks, the trunk is compiled block by
    block, where it has blocks: FSDP gathers a block's weights when the block is called, and DDP averages a block's
    gradients during the backward of those below. One function for all blocks would return all gradients at its
    end (docs/LOG.md).

    Args:
        objective: changed in place; weights and their names stay as they are.
        num_segments: of one micro-batch.
        context_bars, horizon: of a segment.
        ranks: of the training.

    Returns:
        Why it was not compiled, in one line; empty if it was.

    Raises:
        torch.OutOfMemoryError: on every rank, if one has too little memory.
    """
    missing = missing_tools(ranks.device.type)
    if ranks.any(bool(missing)):
        return missing or "it lacks a tool on another rank"
    trunk = objective.policy.trunk
    modules: list[nn.Module] = [trunk] if ranks.world_size == 1 else list(trunk.blocks) or [trunk]
    # A guard has checked sizes and strides already: checks between kernels take up to 2 %.
    compile_ = partial(torch.compile, dynamic=False, options={"size_asserts": False})
    for module in modules:  # the forward alone: FSDP's hooks stay outside, weights keep their names
        module.forward = compile_(module.forward)
    objective.after_trunk = compile_(objective.after_trunk)  # type: ignore[method-assign]
    reason = ""
    try:
        dry_run(objective, num_segments, context_bars, horizon, ranks)
    except torch.OutOfMemoryError:
        uncompile(objective)
        raise
    except torch.AcceleratorError:
        raise
    except CompilerErrors as error:
        reason = _describe(error)
    if ranks.any(bool(reason)):
        uncompile(objective)
        return reason or "it failed on another rank"
    return ""


def compile_accounts(env: TradingEnv | GroupEnv, policy: Policy, ranks: Ranks) -> str:
    """Compile the environment's steps together with the policy's head (all ranks).

    The state of ``env`` is not touched: the dry run uses another environment of the same sizes on its market.

    Returns:
        Why they were not compiled, in one line; empty if they were.

    Raises:
        torch.OutOfMemoryError: on every rank, if one has too little memory.
    """
    if isinstance(env, GroupEnv):
        return "accounts over groups of symbols are stepped one by one"
    reason = out_of_memory = ""
    try:
        _play_on_zeros(env, policy)
    except torch.OutOfMemoryError as error:
        out_of_memory = _describe(error)
    except torch.AcceleratorError:
        raise
    except CompilerErrors as error:
        reason = _describe(error)
    _raise_together(out_of_memory, ranks)
    if ranks.any(bool(reason)):
        return f"accounts are stepped one by one: {reason or 'the compiler failed on another rank'}"
    env.compiled = True
    return ""


@torch.no_grad()
def _play_on_zeros(env: TradingEnv, policy: Policy) -> None:
    twin = TradingEnv(env.market, env.config, env.device, seed=0, dtype=env.dtype, compiled=True)
    twin.begin_segment()
    by_time = env.config.horizon, env.config.num_envs
    market = torch.zeros(*by_time, policy.head.mix.in_features, device=env.device)
    noise = torch.zeros(*by_time, len(env.config.positions), device=env.device)
    twin.play(policy.head.choose, market, noise)


def compile_hindsight(objective: Objective, env: TradingEnv | GroupEnv, ranks: Ranks) -> str:
    """Compile the recursion of hindsight advantages, where they are used (all ranks).

    Returns:
        Why it was not compiled, in one line; empty if it was, or need not be.
    """
    settings = objective.settings
    if settings.advantages != "hindsight":
        return ""
    reason = ""
    try:
        zeros, valid = _hindsight_of_zeros(env)
        hindsight_advantages(zeros, valid, settings.gamma, settings.gae_lambda, is_compiled=True)
    except torch.AcceleratorError:
        raise
    except CompilerErrors as error:
        reason = _describe(error)
    if ranks.any(bool(reason)):
        return f"hindsight is valued step by step: {reason or 'the compiler failed on another rank'}"
    objective.hindsight_is_compiled = True
    return ""


def _hindsight_of_zeros(env: TradingEnv | GroupEnv) -> tuple[Hindsight, Tensor]:
    config, device = env.config, env.device
    num_targets = len(config.positions)
    num_held = num_targets + (0.0 not in config.positions)
    by_decision = config.num_envs, config.horizon
    choices = *by_decision, num_held, num_targets
    growth, log_policy = (torch.zeros(choices, device=device) for _ in range(2))
    values = torch.zeros(config.num_envs, config.horizon + 1, num_held, device=device)
    held = torch.zeros(by_decision, device=device, dtype=torch.int64)
    ends = torch.zeros(choices, device=device, dtype=torch.bool)
    zeros = Hindsight(growth, ends, log_policy, values, held)
    if isinstance(env, GroupEnv) or env.segment.allowed is not None:
        zeros.only_cash = torch.zeros(by_decision, device=device, dtype=torch.bool)
        zeros.cash = config.positions.index(0.0)
    return zeros, torch.ones(by_decision, device=device, dtype=torch.bool)


def _raise_together(out_of_memory: str, ranks: Ranks) -> None:
    if ranks.any(bool(out_of_memory)):
        torch.cuda.empty_cache()
        raise torch.OutOfMemoryError(out_of_memory or "another rank ran out of memory")


def _describe(error: Exception) -> str:
    reason = str(error).strip() or "it gave no reason"
    return f"{type(error).__name__}: {reason.splitlines()[0]}"


def uncompile(objective: Objective) -> None:
    """Undo ``compile_objective``."""
    for module in objective.policy.trunk.modules():
        vars(module).pop("forward", None)  # the class has its own
    vars(objective).pop("after_trunk", None)
    torch._dynamo.reset()
