"""A picture of one episode: price, position, equity and costs of a greedy policy, decision by decision."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_sources.errors import LakeError
from data_sources.lake.lake import Lake
from data_sources.load import load
from envs.config import EnvConfig
from envs.market import Market
from envs.walk_env import ExamEnv
from evaluation.trained_policy import NEVER_NS, TrainedPolicy
from models.policy import Policy
from training.data_feed import data_request

TRADED = 0.2  # a change of the position below this is drift, not a trade
# Okabe and Ito's colours: told apart by everyone, on paper too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


@dataclass(frozen=True)
class Episode:
    """What happened, (T,) float64 each but for ``time``; T decisions."""

    time: NDArray[np.datetime64]  # at which each decision filled
    price: NDArray[np.float64]  # at which it filled
    position: NDArray[np.float64]  # value held after it, as a fraction of equity
    equity: NDArray[np.float64]  # right before the next fill, 1 at the start
    costs: NDArray[np.float64]  # fees and slippage so far, in start equities
    borrow_costs: NDArray[np.float64]  # so far, in start equities


@torch.no_grad()
def play(policy: Policy, market: Market, config: EnvConfig, symbol: str, start_ns: int) -> Episode:
    """Play one episode greedily; shorter than ``episode_bars`` where bars end.

    Raises:
        ValueError: the symbol is not in the market, or has no segment of bars after the start.
    """
    env = ExamEnv(market, config, market.device, [(symbol, start_ns)])
    rows: list[Tensor] = []
    for _ in range(min(env.num_segments, config.episode_bars // config.horizon)):
        projected = policy.encode(env.begin_segment(), config.horizon + 1)
        times = market.open_time[env.cursor + torch.arange(1, config.horizon + 1, device=market.device)]
        for h in range(config.horizon):
            logits, _ = policy.head.decide(projected[:, h], env.account_observations())
            price = env.segment.prices[h].clone()
            env.step(logits.argmax(-1))
            account, costs = env.account, env.last_fill[2]
            value = account.units * price
            equity = account.log_equity.exp()
            # The cash is what is left after this fill: with the units, the equity that the target is measured by.
            exposure = value / (account.cash + value)
            rows.append(torch.cat((times[h : h + 1], price, exposure, equity, costs, account.owed)))
    time, price, position, equity, costs, borrow = torch.stack(rows).cpu().double().numpy().T
    return Episode(
        time.astype(np.int64).astype("datetime64[ns]"),
        price,
        position,
        equity,
        costs.cumsum(),
        borrow.cumsum(),
    )


def draw(episode: Episode, title: str, path: Path) -> None:
    """Write the picture as a PNG.

    Raises:
        ValueError: matplotlib is not there, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 8), dpi=80, layout="constrained")
    prices, positions, equities, costs = figure.subplots(4, sharex=True, height_ratios=(3, 1, 3, 2))
    decisions = np.arange(len(episode.price))

    change = np.diff(episode.position.round(2), prepend=0.0)
    prices.plot(decisions, episode.price, color=GREY, linewidth=1)
    for name, marker, color, where in (
        ("bought", "^", GREEN, change > TRADED),
        ("sold", "v", ORANGE, change < -TRADED),
    ):
        prices.scatter(
            decisions[where], episode.price[where], s=18, c=color, marker=marker, label=name, zorder=3
        )
    prices.set_ylabel("price at the fill")
    prices.legend(loc="upper left", frameon=False, ncols=2)
    prices.set_title(title, loc="left")

    positions.fill_between(decisions, episode.position, step="post", color=BLUE, alpha=0.6, linewidth=0)
    positions.axhline(0, color=GREY, linewidth=0.5)
    positions.set_ylabel("position")

    equities.plot(decisions, episode.equity, color=BLUE, label="equity")
    equities.plot(
        decisions,
        episode.price / episode.price[0],
        color=GREY,
        linewidth=1,
        label="bought and held, for nothing",
    )
    equities.set_ylabel("in start equities")
    equities.legend(loc="upper left", frameon=False, ncols=2)

    costs.stackplot(
        decisions,
        episode.costs,
        episode.borrow_costs,
        labels=("fees and slippage so far", "borrowing so far"),
        colors=(ORANGE, BLUE),
    )
    costs.set_ylabel("paid")
    costs.yaxis.set_major_formatter(PercentFormatter(1.0))
    costs.legend(loc="upper left", frameon=False)
    ticks = np.linspace(0, len(decisions) - 1, 7).round().astype(int)
    costs.set_xticks(
        ticks, [str(episode.time[tick].astype("datetime64[m]")).replace("T", "\n") for tick in ticks]
    )
    costs.set_xlabel("decisions, by the time of their fill, UTC; closed hours take no room")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0)
    try:
        figure.savefig(path, format="png", pil_kwargs={"optimize": True})
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def command(trained: TrainedPolicy, symbol: str, start: str, output: Path) -> str:
    """Draw one episode from the bars in the lake; nothing is downloaded.

    Args:
        trained: the policy; the lake is that of its settings, read up to the bars that it was trained with.
        symbol: the first one in the checkpoint when empty.
        start: UTC, ISO 8601; the newest whole episode when empty.
        output: the PNG.

    Returns:
        A line about the episode.

    Raises:
        ValueError: the symbol or start does not fit, or the picture cannot be drawn.
    """
    request = data_request(trained.settings, trained.weights["data_cutoff_ns"])
    try:
        loaded = load(Lake(Path(trained.settings.data_dir)), request).bars
    except LakeError as error:
        raise ValueError(str(error)) from error
    bars = {one.symbol: one for one in loaded}
    symbol = symbol or trained.weights["symbols"][0]
    if symbol not in bars:
        raise ValueError(f"--symbol {symbol} has no bars here; there are: {', '.join(bars) or 'none'}")
    config, market = trained.env_config(1), trained.market([bars[symbol]])
    newest = max(0, len(bars[symbol]) - config.episode_bars - 2)
    episode = play(
        trained.policy, market, config, symbol, _time_ns(start) or int(bars[symbol].open_time[newest])
    )
    line = (
        f"{symbol}, {len(episode.equity):,} decisions from {str(episode.time[0])[:16]} UTC, "
        f"{trained.path.name}: "
        f"equity {episode.equity[-1] - 1:+.2%}, costs {episode.costs[-1] + episode.borrow_costs[-1]:.2%}"
    )
    draw(episode, line, output)
    return f"{line}; drawn as {output}"


def _time_ns(text: str) -> int:
    # 0 where there is no text.
    if not text:
        return 0
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"--start {text} must be a time in UTC such as 2026-11-20T14:30") from None
    return min(NEVER_NS, int(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()) * 10**9)
