"""Exported policies: folders with ``model.safetensors`` and ``card.json``, none of which is ever run as code.

A model of one's own is that of models/own_model.py here, not the text of it that lies in the folder.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.ensemble import Decider, Ensemble
from models.own import OwnModelError
from models.policy import Policy, precision_on

CARD, WEIGHTS = "card.json", "model.safetensors"
FORMAT, ENSEMBLE_FORMAT = 1, 2


class ExportError(ValueError):
    """An exported folder cannot be used; the message names the file and the reason."""


def read_card(folder: Path) -> dict[str, Any]:
    """Read the card of an exported folder.

    Raises:
        ExportError: the card is missing, damaged or of another format.
    """
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{path} is damaged: it is not JSON; export again") from error
    found = card.get("format") if isinstance(card, dict) else type(card).__name__
    if found not in (FORMAT, ENSEMBLE_FORMAT):
        raise ExportError(
            f"{path} has format {found}, this program reads {FORMAT} and {ENSEMBLE_FORMAT}: export again"
        )
    return card


def load_policy(path: str | Path, device: torch.device | str = "cpu") -> Decider:
    """Load the policy or ensemble of an exported folder, ready for use; on a GPU in the precision of its training.

    Raises:
        ExportError: a file is missing or damaged, or the weights are of another network.
    """
    folder, device = Path(path), torch.device(device)
    card = read_card(folder)
    weights = folder / WEIGHTS
    try:
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ExportError(f"{weights} cannot be read: {error.strerror}") from error
    if digest != card["weights_sha256"]:
        raise ExportError(f"{weights} is damaged: its SHA-256 is not the card's; export again")
    sizes = card["model"]
    policy: Decider
    try:
        if card["format"] == ENSEMBLE_FORMAT:
            policy = Ensemble.from_sizes(sizes, lambda wanted: precision_on(device, wanted))
        else:
            policy = Policy.from_sizes(sizes, precision_on(device, sizes["precision"]))
    except OwnModelError as error:
        raise ExportError(f"{folder}: {error}") from error
    try:
        policy.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ExportError(f"{weights} is of another network than its card says; export again") from error
    return policy.to(device).eval()
