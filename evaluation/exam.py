"""The exam: policies and baselines walk the same bars, one account per symbol, in order, once.

All contestants are accounts of one ``ExamEnv``, so they pay the same costs at the same opens. The trunk reads
many segments in parallel, laid out by the clock as for live decisions (``Market.segment_starts``), wherever the
walk begins, and each of them once; only the ledger and the head run bar by bar, as in a rollout, in compiled
pieces where the training's are. Nothing that a policy decides is taken over from another cost: its head sees the
cost rate and the equity. ``tests/evaluation/test_exam.py`` has the same walk step by step, for one account.
Shapes: P = contestants, S = symbols, N = P x S accounts, H = horizon, R = segments of the longest walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.compiled import Decide
from envs.config import EnvConfig
from envs.market import Market
from envs.walk_env import ExamEnv
from evaluation.baselines import BASELINES, actions_after, own_actions, own_baselines
from models.ensemble import Decider, EnsembleHead
from models.policy import Head
from runtime.control import heartbeat_thread

POLICY, CHAMPION, AGAINST = "policy", "champion", "the other checkpoint"
# So many segments are encoded ahead: enough to fill a micro-batch, few enough to keep in memory.
ENCODED_SEGMENTS = 512
COMPILER_SECONDS = 900.0  # for the first segment, if it is compiled; a compiler that takes longer hangs


@dataclass(frozen=True)
class Walk:
    """One contestant on one symbol: T decisions in order. After a ruin positions and returns are 0."""

    symbol: str
    asset_class: str  # "stock", "crypto" or "perpetual"
    time: NDArray[np.datetime64]  # (T,) ns, when each decision filled: open of that bar
    price: NDArray[np.float64]  # (T,) at which it filled
    position: NDArray[np.float64]  # (T,) value held after the fill, as a fraction of equity
    log_returns: NDArray[np.float64]  # (T,) reward of each decision, up to the next open, net of all costs
    costs: NDArray[np.float64]  # (T,) fees, slippage and borrowing, as a fraction of equity
    traded: NDArray[np.float64]  # (T,) value bought or sold, as a fraction of equity
    borrowing: NDArray[np.float64]  # (T,) the part of ``costs`` paid for borrowing
    # (T,) paid beside ``costs``, below 0 where received, as a fraction of equity; None where no symbol has funding
    funding: NDArray[np.float64] | None = None
    # (T,) each: the next open, up to which ``log_returns`` counts. After a hole, where the account goes on in
    # cash, the next decision fills later. None where it is not known
    next_time: NDArray[np.datetime64] | None = None
    next_price: NDArray[np.float64] | None = None

    @property
    def equity_before(self) -> NDArray[np.float64]:
        """(T,) equity right before each fill, 1 at the start."""
        return np.exp(np.cumsum(self.log_returns) - self.log_returns)

    def where(self, chosen: NDArray[np.bool_]) -> Walk:
        """Return some of its decisions, chosen (T,), as a walk that begins with equity 1."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: value[chosen] for name, value in values.items() if isinstance(value, np.ndarray)}
        return Walk(**values)


Contestants = Mapping[str, list[Walk]]  # name -> one walk per symbol, on the same bars for all


@torch.no_grad()
def examine(
    policies: Decider | Mapping[str, Decider],
    market: Market,
    config: EnvConfig,
    symbols: Sequence[str],
    start_ns: int,
    end_ns: int,
    cost_scale: float = 1.0,
    chunk_segments: int = 64,
    check_stop: Callable[[], None] = lambda: None,
    flat_costs_bps: Sequence[float] = (),
    on_segment: Callable[[int, int], None] = lambda done, total: None,
    max_segments: int | None = None,
    compiled: bool = False,
) -> dict[str, list[Walk]]:
    """Let policies and baselines walk the bars from ``start_ns`` to ``end_ns``, greedily: nothing is drawn.

    The first decision is made at the first bar that opens at or after the start; its context may be older. No
    bar that opens at or after the end is touched. Up to H bars at the end of a stretch without holes are left
    over. No random stream, policy or market is changed.

    Args:
        policies: by name; a single one is called "policy". All read the market's features with its scale.
        market: has the bars; its own holdout is ignored.
        config: of the accounts.
        symbols: to walk; those without bars for one segment are skipped.
        start_ns: of the first decision.
        end_ns: of the bars.
        cost_scale: the share of all costs to charge.
        chunk_segments: segments per forward of the trunk, to bound memory; the last chunk is padded, so that
            a compiled trunk sees one shape only.
        check_stop: called before every segment and chunk; an exception from it ends the exam.
        flat_costs_bps: costs of traded value, instead of all fees and slippage, at which the first policy walks
            again, as further contestants named ``at_flat_cost(name, bps)``.
        on_segment: called after segments were read or walked, with how many are done, and of how many.
        max_segments: stop after this many segments; None: at the end of the bars.
        compiled: play by torch.compile, which takes a while for each number of accounts, once in a process.

    Returns:
        Walks of the policies, then of the baselines.

    Raises:
        NoSegment: no symbol has bars for a segment there.
        ValueError: a symbol is unknown to the market.
    """
    policies = dict(policies) if isinstance(policies, Mapping) else {POLICY: policies}
    market = market.until(end_ns)
    first, *others = policies
    own = {
        name: own_actions(function, market, symbols, config.positions)
        for name, function in own_baselines().items()
    }
    rules_of = (*BASELINES, *own)
    names = [first, *(at_flat_cost(first, bps) for bps in flat_costs_bps), *others, *rules_of]
    costs = [None, *flat_costs_bps, *(None for _ in (*others, *rules_of))]
    env = ExamEnv(
        market,
        config,
        market.device,
        [(symbol, start_ns) for _ in names for symbol in symbols],
        flat_cost_bps=[cost for cost in costs for _ in symbols],
        compiled=compiled,
    )
    env.cost_scale = cost_scale
    accounts_per_head = (1 + len(flat_costs_bps), *(1 for _ in others))  # on every symbol
    decide = Decisions(tuple(policy.head for policy in policies.values()), accounts_per_head)
    horizon, num_symbols = config.horizon, len(symbols)
    schedule = env.schedule[:max_segments, :num_symbols]  # (R, S)
    indices = [market.symbols.index(symbol) for symbol in symbols]
    first_bars = market.offsets[torch.tensor(indices, device=env.device)]
    ahead = torch.arange(horizon, device=env.device)
    num_ahead = max(1, ENCODED_SEGMENTS // num_symbols)
    # A policy with two names reads the market once.
    count = _Count(on_segment)
    readers = {
        id(p): Reader(p, market, indices, horizon, chunk_segments, count.add) for p in policies.values()
    }
    to_read = sum(
        _num_segments(market, n, rows, horizon) for n, rows in zip(indices, schedule.T, strict=True)
    )
    count.total = len(readers) * to_read + len(schedule)

    played = []
    for number in range(len(schedule)):
        check_stop()
        if number % num_ahead == 0:
            rows = schedule[number : number + num_ahead, :, None]
            read_at = torch.where(rows < 0, -1, rows + ahead)
            read = {key: reader.read(read_at, check_stop) for key, reader in readers.items()}
            projected = [read[id(policy)] for policy in policies.values()]
        env.begin_segment()
        # (H, S); accounts that have ended are in cash at some bar
        bars = env.cursor[:num_symbols] + ahead[:, None]
        rules = [actions_after(name, market, config.positions, bars, first_bars) for name in BASELINES]
        rules += [actions[bars] for actions in own.values()]
        encoded = [segments[number % num_ahead] for segments in projected]
        with one_thread(env.device), _patience(compiled and number == 0):
            played.append(play_segment(env, decide, torch.cat(rules, dim=1), encoded))
        count.add(1)
    columns = list(np.concatenate(played, axis=1))  # (R x H, N) each
    return walks_of(names, symbols, market, schedule, ahead, columns)


def at_flat_cost(name: str, bps: float) -> str:
    """Return the name under which a policy walks at a flat cost of traded value."""
    return f"{name} at {bps:g} bps"


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Use one thread of a CPU: splitting a step of a few hundred accounts takes longer than the step."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _patience(is_compiling: bool) -> AbstractContextManager[None]:
    return heartbeat_thread(COMPILER_SECONDS) if is_compiling else nullcontext()


@dataclass
class _Count:
    """How many segments are done: each is read once by every policy, and then walked."""

    report: Callable[[int, int], None]
    total: int = 0
    done: int = 0

    def add(self, number: int) -> None:
        self.done += number
        self.report(self.done, self.total)


def _num_segments(market: Market, symbol: int, schedule: Tensor, horizon: int) -> int:
    """Return how many segments a policy reads to walk one symbol's ``schedule``, (R,), -1 for none."""
    first = schedule[schedule >= 0]
    bars = (first[:, None] + torch.arange(horizon, device=first.device)).flatten()
    return len(market.segment_starts(symbol, bars, horizon).unique())


class Reader:
    """Runs a policy's trunk over the bars of a walk, each segment once, in the order of the walk."""

    def __init__(
        self,
        policy: Decider,
        market: Market,
        symbols: Sequence[int],
        horizon: int,
        chunk_segments: int,
        on_read: Callable[[int], None] = lambda number: None,
    ) -> None:
        self._on_read = on_read
        self._policy, self._market, self._symbols = policy, market, symbols
        self._horizon, self._chunk_segments = horizon, chunk_segments
        # The newest segment of every symbol, in which the next rows may go on: (k,) starts, (k, H + 1, W).
        self._starts = torch.empty(0, dtype=torch.int64, device=market.device)
        self._encoded = torch.empty(0, device=market.device)

    def read(self, bars: Tensor, check_stop: Callable[[], None]) -> Tensor:
        """Encode the decisions at ``bars`` (r, S, h), -1 for none: (r, h, S, W)."""
        starts = torch.full_like(bars, -1)
        for column, number in enumerate(self._symbols):
            walked = bars[:, column] >= 0
            of_symbol = bars[:, column][walked]
            starts[:, column][walked] = self._market.segment_starts(number, of_symbol, self._horizon)
        segments, number_of = torch.unique(starts, return_inverse=True)
        newest_of = number_of[-1, :, -1].unique()  # each symbol's
        number_of, within = number_of.flatten(), (bars - starts).flatten()
        result, kept = None, []
        for numbers, encoded in self._segments(segments, check_stop):
            if result is None:
                result = encoded.new_zeros(len(number_of), encoded.shape[-1])
            place = torch.full_like(segments, -1)
            place[numbers] = torch.arange(len(numbers), device=bars.device)
            here = (place[number_of] >= 0).nonzero().flatten()
            result[here] = encoded[place[number_of[here]], within[here]]
            keep = torch.isin(numbers, newest_of)
            kept.append((segments[numbers[keep]], encoded[keep]))
        assert result is not None  # some symbol walks every segment
        starts_kept, encoded_kept = (torch.cat(parts) for parts in zip(*kept, strict=True))
        self._starts, order = starts_kept.sort()
        self._encoded = encoded_kept[order]
        return result.view(*bars.shape, -1).transpose(1, 2).contiguous()

    def _segments(self, segments: Tensor, check_stop: Callable[[], None]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield numbers (m,) of ``segments`` (n,), sorted, -1 for none, with their decisions, (m, H + 1, W)."""
        market = self._market
        numbers = torch.arange(len(segments), device=segments.device)
        if len(self._starts):
            place = torch.searchsorted(self._starts, segments).clamp_(max=len(self._starts) - 1)
            is_kept = self._starts[place] == segments
            yield numbers[is_kept], self._encoded[place[is_kept]]
            numbers = numbers[~is_kept]
        tokens = torch.arange(market.context_bars + self._horizon + 1, device=segments.device)
        for part in numbers[segments[numbers] >= 0].split(self._chunk_segments):
            check_stop()
            first = segments.new_full((self._chunk_segments,), market.context_bars)
            first[: len(part)] = segments[part]
            # A segment may reach beyond the last bar; nothing is decided there.
            places = torch.minimum(
                first[:, None] - market.context_bars + tokens, market.last_bar(first)[:, None]
            )
            encoded = self._policy.encode(market.features[places].float(), self._horizon + 1)
            yield part, encoded[: len(part)]
            self._on_read(len(part))


@dataclass(frozen=True)
class Decisions:
    """Actions of all accounts, or slots of groups, at one bar: of policies by their heads, then those of rules."""

    heads: tuple[Head | EnsembleHead, ...]
    accounts_per_head: tuple[int, ...]  # on every symbol

    def __call__(self, accounts: Tensor, rules: Tensor, *projected: Tensor) -> tuple[Tensor]:
        """Join observations (N, A), the rules' actions (n,), and the market's part of each head, (S, W)."""
        actions, first = [], 0
        for head, market, count in zip(self.heads, projected, self.accounts_per_head, strict=True):
            size = market.shape[0]
            own = accounts[first : first + count * size].unflatten(0, (count, size))
            actions.append(head.decide(market, own)[0].argmax(-1).flatten())
            first += count * size
        return (torch.cat((*actions, rules)),)


def play_segment(
    env: ExamEnv, decide: Decide, rules: Tensor, projected: Sequence[Tensor]
) -> NDArray[np.float64]:
    """Play one segment; return position, log return, costs, traded, borrowing, and funding if any: (5-6, H, N)."""
    played = env.play(decide, rules, *projected)
    assert played.fills is not None
    units, held, log_return, traded, costs, borrowing, funding = played.fills
    equity = played.log_equity.exp()
    # A new target is reached exactly; repeating a target trades nothing, so the exposure has drifted.
    targets = torch.tensor([*env.config.positions, 0.0], dtype=env.dtype, device=env.device)
    chosen = targets[env.segment.held.long()]
    position = torch.where(chosen == held, units * env.segment.price[:-1] / equity, chosen)
    paid = [costs + borrowing, traded, borrowing, *([] if funding is None else [funding])]
    columns = (position, log_return, *(part / equity for part in paid))
    return torch.stack(columns).cpu().numpy()


def walks_of(
    names: Sequence[str],
    symbols: Sequence[str],
    market: Market,
    schedule: Tensor,
    ahead: Tensor,
    columns: Sequence[NDArray[np.float64]],
) -> dict[str, list[Walk]]:
    """Cut the columns of what was played, (R x H, N) each, into walks, one a symbol and name."""
    walks: dict[str, list[Walk]] = {name: [] for name in names}
    for number, symbol in enumerate(symbols):
        first = schedule[:, number]
        walked = (first >= 0).repeat_interleave(len(ahead)).cpu().numpy()
        if not walked.any():
            continue
        fills = (first[first >= 0, None] + 1 + ahead).flatten()
        time, price = _opens(market, fills)
        after = _opens(market, fills + 1)
        asset_class = market.asset_classes[market.symbols.index(symbol)]
        for place, name in enumerate(names):
            account = place * len(symbols) + number
            own = (column[walked, account] for column in columns)
            walk = Walk(symbol, asset_class, time, price, *own)
            walks[name].append(replace(walk, next_time=after[0], next_price=after[1]))
    return walks


def _opens(market: Market, bars: Tensor) -> tuple[NDArray[np.datetime64], NDArray[np.float64]]:
    """Return when bars (n,) open, and at which price."""
    times = market.open_time[bars].cpu().numpy().astype("datetime64[ns]")
    return times, market.quotes[bars, 0].double().cpu().numpy()
