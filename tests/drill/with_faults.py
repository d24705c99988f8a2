"""The whole program with a fault injected by the environment; started in its place.

    with_faults.py train --flag value ...

NAN_LOSSES=RANK:FIRST:LAST   the losses of these micro-batches are not a number on that rank (counted from 1)
CLOCK_BACK=SECONDS           the clock jumps back an hour, this many seconds after the start
PAUSE=SECONDS                before each rollout, so that training lasts without computing
TERM_AT=N                    SIGTERM to this process when the losses of the N-th micro-batch are computed
OUT_OF_MEMORY=N              the GPU's memory is full at the N-th micro-batch
KILL_IN_WRITE=NAME           kill -9 when half of resume/NAME is on the disk
"""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def at_micro_batches(act: Callable[[int, Any], Any]) -> None:
    """Replace the losses of every micro-batch of every update by ``act(number, losses)``."""
    from training import learner

    healthy, number = learner.parallelize, count(1)

    def planted(*arguments):
        ways = healthy(*arguments)
        # Around compiled code, and after the dry run.
        ways.objective.register_forward_hook(lambda module, given, losses: act(next(number), losses))
        return ways

    learner.parallelize = planted


def plant_nan(rank: int, first: int, last: int) -> None:
    def spoil(number: int, losses: Any) -> Any:
        if first <= number <= last:
            return dataclasses.replace(losses, total=losses.total * float("nan"))
        return losses

    if rank == int(os.environ.get("RANK", "0")):
        at_micro_batches(spoil)


def plant_at_micro_batch(when: int, fault: Callable[[], None]) -> None:
    def act(number: int, losses: Any) -> Any:
        if number == when:
            fault()
        return losses

    at_micro_batches(act)


def send_term() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fill_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")


def plant_clock(seconds: float) -> None:
    began, right_time, right_ns = time.monotonic(), time.time, time.time_ns

    def jump() -> int:
        return 3600 if time.monotonic() - began > seconds else 0

    time.time = lambda: right_time() - jump()
    time.time_ns = lambda: right_ns() - jump() * 10**9


def plant_pause(seconds: float) -> None:
    from training.trainer import Trainer

    collect = Trainer.collect

    def paused(self, *arguments):
        time.sleep(seconds)
        return collect(self, *arguments)

    Trainer.collect = paused


def plant_kill(name: str) -> None:
    from training import checkpoint

    healthy = checkpoint.write_atomically

    def write(path, fill):
        def half(file):
            fill(file)
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        healthy(path, half if path.match(f"resume/{name}") else fill)

    checkpoint.write_atomically = write


if __name__ == "__main__":
    import continuous_training as program

    if "NAN_LOSSES" in os.environ:
        plant_nan(*map(int, os.environ["NAN_LOSSES"].split(":")))
    if "TERM_AT" in os.environ:
        plant_at_micro_batch(int(os.environ["TERM_AT"]), send_term)
    if "OUT_OF_MEMORY" in os.environ:
        plant_at_micro_batch(int(os.environ["OUT_OF_MEMORY"]), fill_memory)
    if "CLOCK_BACK" in os.environ:
        plant_clock(float(os.environ["CLOCK_BACK"]))
    if "PAUSE" in os.environ:
        plant_pause(float(os.environ["PAUSE"]))
    if "KILL_IN_WRITE" in os.environ:
        plant_kill(os.environ["KILL_IN_WRITE"])
    program.main()
