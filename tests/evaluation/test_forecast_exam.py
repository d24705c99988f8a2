"""Held-out rank correlations are of decisions in the holdout alone, by the policy and its heads as they are."""

from __future__ import annotations

import torch

from envs.ahead import HORIZONS, moves_ahead
from evaluation.forecast_exam import MOST_SEGMENTS, rank_ics, segments_from
from evaluation.trained_policy import NEVER_NS
from models.forecaster import Forecaster
from models.policy import Policy
from models.transformer import TransformerConfig
from tests.envs.markets import CONTEXT, HORIZON, market_of, walk
from training.forecasts import rank_correlations

COIN, OTHER, SHORT = walk("AAA", 400, gaps={150: 300}), walk("BBB", 360, seed=1), walk("CCC", 60, seed=2)
HOLDOUT_NS = int(COIN.open_time[250])
MARKET = market_of(COIN, OTHER, SHORT, holdout_start_ns=HOLDOUT_NS)


def test_segments_are_spread_over_all_of_the_holdout_and_over_nothing_else() -> None:
    market = MARKET.until(NEVER_NS)
    first = segments_from(market, HOLDOUT_NS)
    assert len(first) == min(MOST_SEGMENTS, len(first)) and len(first.unique()) == len(first)
    assert (market.open_time[first] >= HOLDOUT_NS).all()
    assert (first + HORIZON + 1 <= market.last_bar(first)).all()
    symbols = torch.searchsorted(market.offsets, first, right=True) - 1
    assert symbols.unique().tolist() == [0]  # the other symbols end before it
    # All valid starts there, since they are few.
    assert first.tolist() == list(range(250, 400 - HORIZON - 1))
    assert len(segments_from(market, int(COIN.open_time[-3]))) == 0
    many = segments_from(market, 0)
    assert len(many) == MOST_SEGMENTS and (many - CONTEXT >= market.stretch_first[0]).all()


def test_they_are_spearmans_of_every_held_out_decision() -> None:
    torch.manual_seed(0)
    policy = Policy(TransformerConfig(MARKET.num_features, 16, 1, 2, CONTEXT + HORIZON + 1), 9, 3)
    heads = Forecaster(16, len(HORIZONS), torch.device("cpu"))
    torch.nn.init.normal_(heads.weight)
    market = MARKET.until(NEVER_NS)
    found = rank_ics(policy, heads, market, HOLDOUT_NS, chunk_segments=50)
    first = segments_from(market, HOLDOUT_NS)
    with torch.no_grad():
        bars = market.windows(first - CONTEXT, CONTEXT + HORIZON)
        forecasts = heads(policy.hidden(bars, HORIZON))
    ahead = moves_ahead(market, first[:, None] + torch.arange(HORIZON))
    expected = rank_correlations(forecasts.flatten(0, 1).flatten(1), ahead.flatten(0, 1).flatten(1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.isfinite().all()
