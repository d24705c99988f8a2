"""The former path of ``evaluation.trained_policy.Actor``, for exported examples; kept for one release."""

from evaluation.trained_policy import Actor, Decision

__all__ = ["Actor", "Decision"]
