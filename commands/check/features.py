"""Features, a reward and a model of one's own: whether they can be run, and look ahead nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from commands.check.report import Line
from data_sources.errors import DataError
from envs.feature_checks import check_own_features
from envs.feature_errors import FeatureError
from envs.features import chosen_features, own_features
from runtime.control import EXIT_SETTING
from training.model_checks import check_own_model, describe_model
from training.rewards import describe_reward, own_reward

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


def check_reward(settings: Settings) -> Iterator[Line]:
    """Check the reward of one's own, if any."""
    try:
        if own_reward(is_of_groups=settings.account != "single"):
            yield Line("reward", "OK", describe_reward().removeprefix("Reward: "))
    except FeatureError as error:
        yield Line("reward", "error", str(error), EXIT_SETTING)


def check_model(settings: Settings) -> Iterator[Line]:
    """Check the model of one's own, if any."""
    try:
        check_own_model(settings)
        if text := describe_model():
            yield Line("model", "OK", f"{text.removeprefix('Model: ')}; it does not look ahead")
    except FeatureError as error:
        yield Line("model", "error", str(error), EXIT_SETTING)
