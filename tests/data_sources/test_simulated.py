import numpy as np
from bar_tables import DAY_NS, ns

from data_sources.bars import COLUMNS, MINUTE_NS
from data_sources.simulated import simulated_bars

END = ns("2026-11-23 13:37")


def same(first, second):
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in COLUMNS)


def test_the_market_is_the_same_all_day_and_more_symbols_leave_the_first_as_they_are():
    morning, evening = simulated_bars(2, 3000, 0, END), simulated_bars(5, 3000, 0, END + 10 * 60 * MINUTE_NS)
    assert [bars.symbol for bars in evening] == ["SIM000", "SIM001", "SIM002", "SIM003", "SIM004"]
    assert all(same(a, b) for a, b in zip(morning, evening, strict=False))
    assert morning[0].open_time[-1] == ns("2026-11-22 23:59")
    assert np.diff(morning[0].open_time).tolist() == [MINUTE_NS] * 2999


def test_seeds_and_symbols_are_different_markets():
    a, b = simulated_bars(2, 2000, 0, END)
    (c,) = simulated_bars(1, 2000, 1, END)
    returns = [np.diff(np.log(bars.close)) for bars in (a, b, c)]
    assert abs(np.corrcoef(returns) - np.eye(3)).max() < 0.1


def test_yesterdays_bars_are_still_there_tomorrow_up_to_the_price_scale():
    (today,), (tomorrow,) = simulated_bars(1, 4320, 0, END), simulated_bars(1, 4320, 0, END + DAY_NS)
    shared = np.diff(np.log(today.close[1440:]))
    np.testing.assert_allclose(np.diff(np.log(tomorrow.close[:2880])), shared, atol=1e-12)


def test_returns_have_the_stated_size_and_persistence_and_nothing_is_there_without_strength():
    sigma, strength, persistence = 0.002, 0.5, 0.95
    kwargs = {"sigma": sigma, "persistence": persistence}
    bars = simulated_bars(8, 40_000, 3, END, strength=strength, **kwargs)
    r = np.stack([np.log(series.close / series.open) for series in bars])
    assert abs(r.std() / (sigma * np.sqrt(1 + strength**2)) - 1) < 0.01
    for lag in (1, 5, 20):  # E[r(t) r(t+lag)] of a two-state chain: (sigma strength)^2 (2p-1)^lag
        expected = (sigma * strength) ** 2 * (2 * persistence - 1) ** lag
        assert abs(np.mean(r[:, lag:] * r[:, :-lag]) / expected - 1) < 0.2 or lag == 20
        assert abs(np.mean(r[:, lag:] * r[:, :-lag]) - expected) < 5 * r.var() / np.sqrt(r.size)
    noise = simulated_bars(8, 40_000, 3, END, strength=0.0, **kwargs)
    r = np.stack([np.log(series.close / series.open) for series in noise])
    assert abs(np.mean(r[:, 1:] * r[:, :-1])) < 4 * r.var() / np.sqrt(r.size)


def test_each_bar_opens_at_the_close_before_it():
    (bars,) = simulated_bars(1, 5000, 0, END)
    np.testing.assert_array_equal(bars.open[1:], bars.close[:-1])
    assert (bars.high > bars.low).all()
