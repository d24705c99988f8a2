"""The features: whether envs/own_features.py can be run, and looks ahead nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from commands.check.report import Line
from data_sources.errors import DataError
from envs.feature_checks import check_own_features
from envs.feature_errors import FeatureError
from envs.features import chosen_features, own_features
from runtime.control import EXIT_SETTING

if TYPE_CHECKING:
    from continuous_training import Settings


def check_features(settings: Settings, now_ns: int) -> Iterator[Line]:
    """Check the features of one's own, if any, on some bars of the lake; on simulated ones where it is empty."""
    try:
        if not own_features():
            return
        from commands.selftest.lookahead import load_bars  # which trains, and takes a second to import

        report = check_own_features(load_bars(settings, now_ns))
    except FeatureError as error:
        yield Line("features", "error", str(error), EXIT_SETTING)
        return
    except DataError as error:
        yield Line("features", "warning", f"not checked: {error}")
        return
    for text in report.errors:
        yield Line("features", "error", text, EXIT_SETTING)
    for text in report.warnings:
        yield Line("features", "warning", text)
    if not report.errors and not report.warnings:
        num_chosen = len(chosen_features(settings.features)) - len(report.names)
        text = f"{num_chosen}, and {', '.join(report.names)} of your own: none looks ahead"
        yield Line("features", "OK", text)
