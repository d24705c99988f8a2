"""Early stopping: a run that gets worse on its held-out days ends, and the next one begins at its best weights.

With ``exam_patience`` (Prechelt 1998, "Early stopping - but when?"). The next run has fresh bars. Exams before all
costs are charged do not count: the policy has not learnt to pay them yet.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from runtime.wording import count_of
from training.checkpoint import Checkpoint
from training.distributed import Ranks
from training.progress import TrainingProgress
from training.torch_files import CheckpointError

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")


def count_exam(
    progress: TrainingProgress, settings: Settings, ranks: Ranks, figures: Mapping[str, float]
) -> None:
    """Count an exam of the weights now, where the training may end early by it (all ranks take part).

    Args:
        progress: of the training; it is the same on every rank afterwards.
        settings: of the training.
        ranks: of the training.
        figures: of the exam, on rank 0; {} where there was none.
    """
    if settings.exam_patience is None or progress.cost_scale(settings.cost_ramp, settings.epochs) < 1:
        return
    net_bps = ranks.broadcast(figures.get("exam/net_bps"))
    if net_bps is None or math.isnan(net_bps):
        return
    progress.count_exam(net_bps)
    if progress.got_worse(settings):
        log.info(
            f"Run {progress.run} ends after epoch {progress.epoch}: {count_of(progress.worse_exams, 'exam')} in a "
            f"row below the {progress.best_net_bps:+.3f} bp a bar of {progress.best_exam}"
        )


def with_best_weights(
    saved: Checkpoint, progress: TrainingProgress, settings: Settings, ranks: Ranks
) -> Checkpoint:
    """Return the last checkpoint of a run that got worse with the weights of its best exam (all ranks take part).

    Optimizer, accounts and random streams go on. Any other checkpoint is returned as it is.
    """
    if not progress.got_worse(settings):
        return saved
    model = None
    if ranks.is_first:
        try:
            model = Checkpoint.read(saved.path.with_name(progress.best_exam)).model
            log.info(f"Run {progress.run + 1} begins with the weights of {progress.best_exam}")
        except CheckpointError as error:
            log.warning(f"{error}: run {progress.run + 1} begins with the last weights of the one before")
    model = ranks.broadcast(model)
    return saved if model is None else replace(saved, model=model)
