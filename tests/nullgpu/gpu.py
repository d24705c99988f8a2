"""What a process can ask of the null GPU that it runs on: launches and copies, and where the host waited."""

from __future__ import annotations

import collections
import ctypes
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.nullgpu.build import BUILT

# The order of nullgpu.h.
COUNTED = ("kernels", "products", "triton", "to_device", "to_host", "syncs")
ROOT = Path(__file__).parents[2]


@dataclass
class Counts:
    """What happened inside ``counting``."""

    kernels: int = 0  # torch's own; copies within the device count as well
    products: int = 0  # cuBLAS
    triton: int = 0  # compiled kernels
    to_device: int = 0  # copies
    to_host: int = 0
    syncs: int = 0
    places: collections.Counter[str] = field(default_factory=collections.Counter)  # of syncs, in our code

    @property
    def launches(self) -> int:
        """All that the device was given to do."""
        return self.kernels + self.products + self.triton


def is_null_gpu() -> bool:
    """Whether the GPU of this process is the null one."""
    return "libnull.so" in os.environ.get("LD_PRELOAD", "")


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(BUILT / "libnull.so"))  # the preloaded one: the same file is loaded once
    library.null_counters.restype = ctypes.POINTER(ctypes.c_long)
    return library


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what happens inside, with the place of every sync."""
    library, counts = _library(), Counts()
    counters = library.null_counters()
    before = [counters[number] for number in range(len(COUNTED))]

    def waited(name: bytes) -> None:
        ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT))]
        frames = [
            f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours if ".venv" not in frame.filename
        ]
        counts.places[f"{name.decode()} {' < '.join(reversed(frames[-5:-1]))}"] += 1

    hook = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(waited)
    library.null_on_sync(hook)
    try:
        yield counts
    finally:
        library.null_on_sync(None)
        for number, (name, start) in enumerate(zip(COUNTED, before, strict=True)):
            setattr(counts, name, counters[number] - start)
