"""What happened in an environment, added up on the device until somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor

from envs.account import AccountState

TOTALS = (
    "decisions",
    "rewards",
    "episodes",
    "episode_log_returns",
    "ruins",
    "costs",
    "borrow_costs",
    "traded",
)


class Statistics:
    """Sums over whole segments, float64 on the device, so that ranks may be added before anything is divided."""

    def __init__(
        self,
        positions: tuple[float, ...],
        cash_index: int,
        num_envs: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.positions, self.cash_index = positions, cash_index
        # Log return, traded value, costs and borrow cost of this segment.
        self.flows = torch.zeros(4, num_envs, dtype=dtype, device=device)
        self.at_begin = torch.zeros(2, num_envs, dtype=dtype, device=device)  # log equity, decisions played
        self.time_in = torch.zeros(len(positions) + 1, dtype=torch.float64, device=device)
        self.totals = torch.zeros(len(TOTALS), dtype=torch.float64, device=device)

    def begin(self, account: AccountState, played: Tensor) -> None:
        """Remember where a segment began; ``played`` is (N,)."""
        self.at_begin[0] = account.log_equity
        self.at_begin[1] = played

    def end(self, account: AccountState, played: Tensor, over: Tensor, held: Tensor) -> None:
        """Count a segment whose episodes end where ``over``, (N,) bool, and its targets held, (H, N)."""
        # One that has not played in this segment was counted before.
        ended = (over & (played > self.at_begin[1])).to(torch.float64)
        progress = torch.stack((account.log_equity, played)) - self.at_begin
        rewards, decisions = progress.sum(1, dtype=torch.float64)
        # In cash for the rest: held says so of the ruined, too, who decide nothing.
        self.time_in[self.cash_index] += decisions
        for index, spent in enumerate(self.time_in):
            if index != self.cash_index:
                decided = held.numel() - (held ^ index).count_nonzero()  # bytes all the way, which is quicker
                spent.add_(decided)
                self.time_in[self.cash_index] -= decided
        episodes = torch.stack((torch.ones_like(ended), account.log_equity, ~account.alive)).double()
        _, traded, costs, borrow_costs = self.flows.sum(1, dtype=torch.float64)
        flows = torch.stack((costs, borrow_costs, traded))
        self.totals.add_(torch.cat((torch.stack((decisions, rewards)), episodes @ ended, flows)))
        self.flows.zero_()

    def take(self) -> dict[str, Tensor]:
        """Return the sums by name and start anew."""
        totals = dict(zip(TOTALS, self.totals.clone().unbind(), strict=True))
        spent = self.time_in[: len(self.positions)].clone().unbind()
        totals |= {f"in_position_{p:g}": t for p, t in zip(self.positions, spent, strict=True)}
        self.totals.zero_()
        self.time_in.zero_()
        return totals
