"""What people added in files of their own, checked before bars are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from envs.features import registered_features
from training.model_checks import check_own_model
from training.rewards import own_reward

if TYPE_CHECKING:
    from continuous_training import Settings


def check_own_parts(settings: Settings) -> None:
    """Run the files with features, a reward and a model of one's own; those of exams are read when one begins.

    Raises:
        FeatureError: one of them cannot be used.
    """
    registered_features()
    own_reward(is_of_groups=settings.account != "single")
    check_own_model(settings)
