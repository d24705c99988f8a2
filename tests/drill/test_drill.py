"""The long part of the fault drill, on the real program with two ranks: ``make drill``.

The short part is among the other tests; docs/reliability.md lists promises and their tests.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from runtime.launch import Launch
from tests.drill.programs import SUPERVISED_WITH_FAULTS, VICTIMS, find, living
from tests.program import PATIENCE, SUPERVISED, Start, checkpoint, environment, is_same, tiny_flags

TWO_RANKS = {"runs": 1, "batch_size": 64}
LAST = "run1_epoch8.pt"
IN_UTS_NAMESPACE = "import os, sys; os.execvp('unshare', ['unshare', '--uts', 'sh', '-c', sys.argv[1]])"
long = pytest.mark.drill


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    Start(folder / "out", [*SUPERVISED, *tiny_flags(folder, **TWO_RANKS)], environment(NPROC="2")).ends_well()
    return folder


def start_slowly(folder: Path, name: str = "out", **additions: str) -> Start:
    """Start two ranks whose epochs last long enough for a fault."""
    env = environment(NPROC="2", PAUSE="0.3", **additions)
    return Start(folder / name, [*SUPERVISED_WITH_FAULTS, "train", *tiny_flags(folder, **TWO_RANKS)], env)


def assert_ends_like(unbroken: Path, folder: Path) -> None:
    """Let it finish, and compare weights to the last bit."""
    Start(
        folder / "rest", [*SUPERVISED, *tiny_flags(folder, **TWO_RANKS)], environment(NPROC="2")
    ).ends_well()
    assert is_same(checkpoint(folder, LAST)["model"], checkpoint(unbroken, LAST)["model"])
    assert not living(folder)


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


@long
@pytest.mark.parametrize("victim", VICTIMS)
def test_kill_9_of_any_process_does_not_change_the_result(
    unbroken: Path, tmp_path: Path, victim: str
) -> None:
    start = start_slowly(tmp_path)
    try:
        process = find(start.wait_for("run1_epoch2.pt"), victim)
        assert process is not None
        process.kill()
        code = start.ends()
        assert code == (-signal.SIGKILL if victim == "supervisor" else 0), start.output
        wait_until(lambda: not living(tmp_path))
    finally:
        start.kill()
    assert_ends_like(unbroken, tmp_path)


@long
def test_a_stopped_rank_is_noticed_and_swept(unbroken: Path, tmp_path: Path) -> None:
    start = start_slowly(tmp_path, HANG_SECONDS="30")
    try:
        rank = find(start.wait_for("run1_epoch2.pt"), "rank 1")
        assert rank is not None
        rank.suspend()
        start.ends_well()
    finally:
        start.kill()
    assert "no heartbeat for 30 s" in start.output
    assert_ends_like(unbroken, tmp_path)


@long
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seed", range(4))
def test_a_stop_at_a_random_moment_exits_0(unbroken: Path, tmp_path: Path, sent: int, seed: int) -> None:
    start = start_slowly(tmp_path)
    try:
        time.sleep(random.Random(seed).uniform(0.5, 12.0))
        if start.process.poll() is None:
            start.process.send_signal(sent)
        start.ends_well()
    finally:
        start.kill()
    assert_ends_like(unbroken, tmp_path)


@long
def test_a_clock_that_jumps_back_an_hour_does_not_change_the_result(unbroken: Path, tmp_path: Path) -> None:
    start_slowly(tmp_path, CLOCK_BACK="1").ends_well()
    assert_ends_like(unbroken, tmp_path)


@long
@pytest.mark.skipif(
    subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode != 0,
    reason="needs unshare, root",
)
def test_two_ranks_train_on_a_machine_whose_name_does_not_resolve(unbroken: Path, tmp_path: Path) -> None:
    words = " ".join([*SUPERVISED, *tiny_flags(tmp_path, **TWO_RANKS)])
    command = f"hostname no-such-host; exec {sys.executable} {words}"
    start = Start(tmp_path / "out", ["-c", IN_UTS_NAMESPACE, command], environment(NPROC="2")).ends_well()
    assert "resolve" not in start.output
    assert_ends_like(unbroken, tmp_path)


@long
def test_two_machines_rejoin_after_one_or_its_torchrun_dies_and_a_stop_on_one_stops_both(
    tmp_path: Path,
) -> None:
    """Two supervisors with one rank each meet at a loopback address, as two machines would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"

    def machine(number: int, name: str) -> Start:
        settings = TWO_RANKS | {"epochs": 400, "checkpoint_every": 10}
        env = environment(NNODES="2", NODE_RANK=str(number), RDZV_ENDPOINT=endpoint, PAUSE="0.1")
        start = Start(
            tmp_path / name, [*SUPERVISED_WITH_FAULTS, "train", *tiny_flags(tmp_path, **settings)], env
        )
        psutil.Process(start.process.pid).cpu_affinity([sorted(os.sched_getaffinity(0))[number - 1]])
        return start

    second, first = machine(1, "second"), machine(0, "first")
    try:
        first.wait_for("run1_epoch10.pt")  # rank 0 is on the first machine although the second came first
        second.kill()
        first.wait_for("Training died")
        second = machine(1, "second again")
        first.wait_for("Resuming from")
        launcher = find(second, "launcher")
        assert launcher is not None
        launcher.kill()  # its torchrun alone: its supervisor starts another
        second.wait_for("Training died")
        wait_until(lambda: first.output.count("Resuming from") == 2)
        second.process.send_signal(signal.SIGINT)
        second.ends_well()
        first.ends_well()
    finally:
        first.kill()
        second.kill()
    assert "Summary: " in first.output


# --- short --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nan_on_rank_1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Start]]:
    """All losses of two epochs are NaN on rank 1, and healthy on rank 0."""
    folder = tmp_path_factory.mktemp("nan")
    driver = [str(SUPERVISED_WITH_FAULTS[-1]), "train", *tiny_flags(folder, **TWO_RANKS)]
    ((command, additions),) = Launch(num_ranks=2).commands(driver)
    start = Start(folder / "out", command[1:], environment(**additions, NAN_LOSSES="1:50:71"))
    start.ends_well()
    yield folder, start


@pytest.mark.drill
def test_losses_that_stay_not_finite_roll_back_with_half_the_learning_rate(
    nan_on_rank_1: tuple[Path, Start],
) -> None:
    folder, start = nan_on_rank_1
    back = [line for line in start.lines if "back to the newest checkpoint" in line]
    assert ["0.5 of" in back[0], "0.25 of" in back[1], len(back)] == [True, True, 2]
    assert start.output.count("Resuming from") == 2 and start.output.count("run1_epoch4.pt (512") == 2
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint(folder, LAST)["model"].values())
    assert "Run 1 is complete" in start.output
