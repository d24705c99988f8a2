"""One file of a checkpoint: torch's zip, whose checksums are checked before anything in it is trusted."""

from __future__ import annotations

import errno
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from runtime.files import fault_of_zip

DISK_IS_FULL = "the disk is full"
EXAMPLE = "checkpoints/best.pt"


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the text names the file and the reason."""


def load_file(path: Path, device: torch.device | str) -> dict[str, Any]:
    """Read one file.

    Raises:
        CheckpointError: it is missing, damaged, or not one of ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch packs nothing: what is packed is not ours, and may unpack to more than any memory.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise CheckpointError(f"{path} is not a checkpoint of this program: it is compressed")
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path} is damaged (checksum of {damaged!a})")
    except (zipfile.BadZipFile, EOFError, struct.error) as error:
        fault = fault_of_zip(path, f"a checkpoint of this program; one is such as {EXAMPLE}")
        raise CheckpointError(f"{path} {fault}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {root_cause(error)}") from error
    except (RuntimeError, ValueError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this program: {root_cause(error)}") from error
    try:
        loaded: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (torch.OutOfMemoryError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {root_cause(error)}") from error
    except Exception as error:  # a stranger's file can do anything to torch's unpickler
        raise CheckpointError(f"{path} is not a checkpoint of this program: {root_cause(error)}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} is not a checkpoint of this program: holds a {type(loaded).__name__}")
    return dict(loaded)


def root_cause(error: BaseException) -> str:
    """Return the root cause: torch.save hides a full disk in a RuntimeError's context."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            return DISK_IS_FULL
        cause = cause.__cause__ or cause.__context__
    text = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
