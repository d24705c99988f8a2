"""The supervisor with real processes, signals and a terminal; the worker is tests/runtime/fake_worker.py."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from runtime.control import ENTER, LEAVE
from tests.program import written_to

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and terminals of POSIX")

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "runtime" / "fake_worker.py"
PATIENCE = 60.0  # a bound for a busy machine, not an expectation
IMPATIENT = {"first_delay_seconds": 0.05, "longest_delay_seconds": 0.1}
DRIVER = """
import json, sys
from pathlib import Path
from runtime.supervisor import Limits, main
sys.exit(main(sys.argv[3:], script=Path(sys.argv[1]), limits=Limits(**json.loads(sys.argv[2]))))
"""


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


class Daemon:
    """A supervisor under test, in a session of its own."""

    def __init__(
        self, folder: Path, *arguments: str, limits: dict[str, float] | None = None, **settings: str
    ) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.terminal: int | None = None
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "FAKE_FOLDER": str(folder),
            "TMPDIR": str(self.temporary),
            "NPROC": "1",
            "LAUNCHER": "direct",
        }
        self.environment = environment | settings
        limits = IMPATIENT | (limits or {})
        self.command = [sys.executable, "-c", DRIVER, str(WORKER), json.dumps(limits), *arguments]

    def start(self, **how: object) -> "Daemon":
        pipes = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "start_new_session": True,
        }
        self.process = subprocess.Popen(self.command, env=self.environment, **(pipes | how))  # type: ignore[call-overload]
        return self

    def start_in_terminal(self) -> "Daemon":
        """Start it as a shell in a terminal window would be: session leader, with the keyboard's signals."""
        process, self.terminal = pty.fork()
        if process == 0:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
            os.execve(self.command[0], self.command, self.environment)
        self.process = psutil.Process(process)  # type: ignore[assignment]
        return self

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def epochs(self) -> int:
        path = self.folder / "epochs"
        return int(path.read_text()) if path.exists() else 0

    def starts(self, rank: int = 0) -> list[int]:
        """Return the process ids of that rank's workers, oldest first."""
        lines = [line.split() for line in self.log().splitlines() if line.startswith(f"start rank={rank} ")]
        return [int(words[3].removeprefix("pid=")) for words in lines]

    def trains(self) -> bool:
        """Whether every rank is past its start."""
        return all(f"trains rank={rank}" in self.log() for rank in range(int(self.environment["NPROC"])))

    def train(self, epochs: int = 1) -> "Daemon":
        """Wait for this many more finished epochs."""
        target = self.epochs() + epochs
        wait_for(lambda: self.epochs() >= target)
        return self

    def ends(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and standard error."""
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors

    def living(self) -> list[psutil.Process]:
        """Find every process of this test, also those in other sessions."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("FAKE_FOLDER") == str(self.folder)
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def has_left_nothing(self) -> bool:
        return not self.living() and not list(self.temporary.glob("continuous_training_*"))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    daemons: list[Daemon] = []

    def make(*arguments: str, **settings: object) -> Daemon:
        daemons.append(Daemon(tmp_path, *arguments, **settings))  # type: ignore[arg-type]
        return daemons[-1]

    yield make
    for daemon in daemons:
        for process in daemon.living():
            process.kill()


@pytest.mark.parametrize("num_ranks", ["1", "2"])
def test_ctrl_c_finishes_the_epoch_and_exits_0(daemon, num_ranks):
    run = daemon(NPROC=num_ranks, EPOCH_SECONDS="0.6").start().train()
    run.process.send_signal(signal.SIGINT)
    code, errors = run.ends()
    assert code == 0 and "Stopping after this epoch" in errors
    assert "epoch end rank=0" in run.log() and "safe point" not in run.log()
    assert run.has_left_nothing()


def test_ctrl_c_in_a_terminal_reaches_the_supervisor_only(daemon):
    run = daemon().start_in_terminal().train()
    os.write(run.terminal, b"\x03")
    _, status = os.waitpid(run.process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert run.log().count("start rank=0") == 1 and "epoch end rank=0" in run.log()


def test_a_workers_last_error_is_shown_after_its_dashboard_died(daemon):
    run = daemon(MISHAP="step:screen", limits={"crashes": 2}).start_in_terminal()
    written = written_to(run.terminal)
    os.waitpid(run.process.pid, 0)
    assert written.count(ENTER) == written.count(LEAVE) == written.count("Traceback: why") == 2
    first, second, rest = written.split(LEAVE)
    assert "Traceback" not in first and ENTER in first
    assert second.index("Traceback: why") < second.index("Training died") < second.index(ENTER)
    assert "Traceback: why" in rest and run.has_left_nothing()


def test_a_closed_terminal_saves_at_the_next_safe_point(daemon):
    run = daemon(EPOCH_SECONDS="30").start_in_terminal()
    wait_for(run.trains)
    os.close(run.terminal)
    _, status = os.waitpid(run.process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert "safe point rank=0" in run.log() and run.has_left_nothing()


def test_nohup_survives_the_terminal(daemon):
    run = daemon()
    run.command = ["nohup", *run.command]
    run.start().train()
    run.process.send_signal(signal.SIGHUP)
    run.train(2)
    run.process.send_signal(signal.SIGINT)
    assert run.ends()[0] == 0


def test_a_second_ctrl_c_ends_at_once_with_130(daemon):
    run = daemon(NPROC="2", EPOCH_SECONDS="30", GRANDCHILD="yes").start()
    wait_for(run.trains)
    run.process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    code, errors = run.ends()
    assert code == 130 and "newest checkpoint on disk is intact" in errors
    assert run.has_left_nothing()


def heard(run: Daemon) -> list[tuple[str, int]]:
    """What the companion was told: events with their counts."""
    lines = [line.removeprefix("heard ") for line in run.log().splitlines() if line.startswith("heard ")]
    return [(word["event"], word["count"]) for word in map(json.loads, lines)]


def test_a_companion_outlives_crashes_and_is_told_of_them(daemon):
    run = daemon("--flag", "1", COMPANION="yes", MISHAP="step:1", limits={"crashes": 3}).start()
    code, errors = run.ends()
    assert code == 1 and "Giving up: 3 crashes" in errors
    assert heard(run) == [("restarted", 1), ("restarted", 2), ("gave_up", 1), ("end", 1)]
    assert run.log().count("companion --flag 1") == 1 and "companion ends" in run.log()
    assert run.has_left_nothing()


def test_a_companion_hears_the_end_of_a_supervisor_that_is_killed(daemon):
    run = daemon(COMPANION="yes").start().train()
    run.process.kill()
    wait_for(lambda: "companion ends" in run.log())
    assert heard(run) == []
    wait_for(lambda: not run.living())


@pytest.mark.parametrize(("mishap", "events"), [("start:reports 4", ["gave_up", "end"]), ("", ["end"])])
def test_a_companion_is_told_of_an_end_that_is_final(daemon, mishap, events):
    run = daemon(COMPANION="yes", MISHAP=mishap).start()
    if not mishap:
        run.train().process.send_signal(signal.SIGINT)
    assert run.ends()[0] == (4 if mishap else 0)
    assert [event for event, _ in heard(run)] == events and run.has_left_nothing()


def test_a_bouncing_ctrl_c_counts_once(daemon):
    run = daemon(EPOCH_SECONDS="0.8").start().train()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    run.process.send_signal(signal.SIGINT)
    assert run.ends()[0] == 0
    assert "epoch end rank=0" in run.log()


BARE_WORKER = """
import time
from runtime.control import RUN, Control
control = Control()
control.listen()
level = RUN
print(level, flush=True)
while True:
    time.sleep(0.01)
    if control.stop_level != level:
        print(level := control.stop_level, flush=True)
"""


def test_a_worker_without_a_supervisor_takes_signals_in_the_same_way():
    environment = {name: value for name, value in os.environ.items() if name != "CONTROL_DIR"}
    words = [sys.executable, "-c", BARE_WORKER]
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGINT)  # bounces
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "2\n"
    time.sleep(1.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    process.stdout.close()


def test_sigterm_saves_at_the_next_safe_point(daemon):
    run = daemon(NPROC="2", EPOCH_SECONDS="30").start()
    wait_for(run.trains)
    run.process.send_signal(signal.SIGTERM)
    code, errors = run.ends()
    assert code == 0 and "SIGTERM: saving" in errors
    assert "safe point rank=0" in run.log() and run.has_left_nothing()


def test_sigterm_to_every_process_of_a_service_saves_too(daemon):
    run = daemon(NPROC="2", EPOCH_SECONDS="30").start()
    wait_for(run.trains)
    for process in run.living():
        process.terminate()
    assert run.ends()[0] == 0
    assert "safe point rank=0" in run.log() and run.has_left_nothing()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_workers_start_exits_0(daemon, sent):
    run = daemon(MISHAP="start:sleep").start()
    wait_for(run.starts)
    run.process.send_signal(sent)
    errors = run.process.stderr.readline() + run.process.stderr.readline()
    assert "Ctrl+C again" in errors or "SIGTERM" in errors
    os.kill(run.starts()[0], signal.SIGTERM)  # the fake sleeps while it starts; systemd ends it like this
    code, errors = run.ends()
    assert code == 0 and "Stopped before" in errors
    assert run.has_left_nothing()


def test_a_stop_between_a_crash_and_the_restart_exits_0(daemon):
    run = daemon(MISHAP="step:1", limits={"first_delay_seconds": 30.0, "longest_delay_seconds": 30.0}).start()
    assert "Restarting from the newest checkpoint" in run.process.stderr.readline()
    run.process.send_signal(signal.SIGTERM)
    assert run.ends()[0] == 0
    assert len(run.starts()) == 1 and run.has_left_nothing()


@pytest.mark.parametrize(("num_ranks", "victim"), [("1", 0), ("2", 1)])
def test_a_killed_worker_is_restarted_and_resumes(daemon, num_ranks, victim):
    run = daemon(NPROC=num_ranks).start().train(2)
    os.kill(run.starts(victim)[0], signal.SIGKILL)
    wait_for(lambda: len(run.starts()) == 2)
    resumed_at = int(run.log().rsplit("epochs=", 1)[1].split()[0])
    run.train()
    run.process.send_signal(signal.SIGINT)
    code, errors = run.ends()
    assert code == 0 and resumed_at >= 2
    assert "Training died: a worker was killed by SIGKILL" in errors
    remembered = (run.folder / "train.log").read_text().splitlines()
    assert sum("WARNING Training died: a worker was killed by SIGKILL" in line for line in remembered) == 1
    assert run.has_left_nothing()


def test_a_hanging_worker_is_swept_and_restarted(daemon):
    run = daemon(NPROC="2", limits={"hang_seconds": 2.0}).start().train()
    os.kill(run.starts()[0], signal.SIGSTOP)
    wait_for(lambda: len(run.starts()) == 2)
    run.train()
    run.process.send_signal(signal.SIGINT)
    code, errors = run.ends()
    assert code == 0 and "no heartbeat for 2 s" in errors
    assert run.has_left_nothing()


def test_a_machine_frozen_as_a_whole_is_not_a_hang(daemon):
    """A snapshot of a virtual machine, a paused container, a laptop that slept."""
    run = daemon(limits={"hang_seconds": 4.0}).start().train()
    processes = [psutil.Process(run.process.pid), psutil.Process(run.starts()[0])]
    for process in processes:
        process.suspend()
    time.sleep(5.0)
    for process in reversed(processes):
        process.resume()
    run.train()
    run.process.send_signal(signal.SIGINT)
    code, errors = run.ends()
    assert code == 0 and len(run.starts()) == 1, errors


LONG_CALL = """
import os, time
from runtime.control import CONTROL_DIR, Control, SupervisorControl, heartbeat, heartbeat_thread
with SupervisorControl() as supervisor:
    start = supervisor.heartbeat()
    os.environ[CONTROL_DIR] = str(supervisor.folder)
    heartbeat()  # without a Control: none
    assert supervisor.heartbeat() == start
    Control()
    for _ in range(2):
        before = supervisor.heartbeat()
        with heartbeat_thread(600.0):  # a compiler at work
            while supervisor.heartbeat() == before:
                time.sleep(0.01)
    before = supervisor.heartbeat()
    with heartbeat_thread(0.0):  # one that takes too long
        time.sleep(2.5)
    time.sleep(2.5)  # the thread has ended
    assert supervisor.heartbeat() == before
print("seen")
"""


def test_a_thread_records_heartbeats_of_a_long_call_within_its_limit(tmp_path):
    words = [sys.executable, "-c", LONG_CALL]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stdout, done.stderr) == ("seen\n", "")


def test_a_worker_without_a_first_heartbeat_has_the_longer_start_limit(daemon):
    limits = {"start_seconds": 1.5, "hang_seconds": 0.1, "crashes": 2}
    run = daemon(MISHAP="start:sleep", limits=limits).start()
    code, errors = run.ends()
    assert code == 1 and "no heartbeat for 2 s" in errors and len(run.starts()) == 2


@pytest.mark.parametrize("code", [2, 3, 4, 75])
@pytest.mark.parametrize("way", ["step:{}", "step:reports {}"])
def test_a_final_exit_code_is_passed_on_and_not_retried(daemon, code, way):
    run = daemon(NPROC="2", MISHAP=way.format(code)).start()
    assert run.ends() == (code, "Starting 2 ranks.\n")
    # Rank 1 may have reported it before rank 0 started.
    assert len(run.starts(0)) <= 1 and len(run.starts(1)) <= 1 and run.has_left_nothing()


def test_the_only_worker_is_the_process_of_the_preflight_until_it_dies(daemon):
    run = daemon().start().train()
    (first,) = run.starts()
    assert run.log().startswith("preflight  planned=1\nstart rank=0")
    os.kill(first, signal.SIGKILL)
    run.train(2).process.send_signal(signal.SIGINT)
    assert run.ends()[0] == 0
    assert run.log().count("preflight") == 1 and len(run.starts()) == 2 and run.has_left_nothing()


def test_an_invalid_setting_is_reported_once_and_starts_no_worker(daemon):
    run = daemon("--batch-size", "7", NPROC="4", MISHAP="preflight:2").start()
    assert run.ends() == (2, "the setting is wrong\n")
    assert run.log() == "preflight --batch-size 7 planned=4\n" and run.has_left_nothing()


def test_it_gives_up_after_five_crashes_without_a_finished_epoch(daemon):
    run = daemon(MISHAP="step:1").start()
    code, errors = run.ends()
    assert code == 1 and len(run.starts()) == 5
    assert "Giving up: 5 crashes without a finished epoch" in errors.splitlines()[-1]
    assert run.has_left_nothing()


def test_a_finished_epoch_resets_the_count_of_crashes(daemon):
    run = daemon(MISHAP="epoch:kill", EPOCH_SECONDS="0.05", limits={"crashes": 2}).start().train(4)
    run.process.send_signal(signal.SIGTERM)
    assert run.ends()[0] in (0, 1)  # the signal may come just before the next crash
    assert run.epochs() >= 4 and run.has_left_nothing()


@pytest.mark.parametrize("num_ranks", ["1", "2"])
def test_a_killed_supervisor_leaves_no_process(daemon, num_ranks):
    run = daemon(NPROC=num_ranks).start().train()
    run.process.kill()
    run.ends()
    wait_for(lambda: not run.living())


def test_a_workers_child_in_a_session_of_its_own_is_swept_too(daemon):
    run = daemon(GRANDCHILD="yes").start().train()
    assert any(process.name() == "sleep" for process in run.living())
    os.kill(run.starts()[0], signal.SIGKILL)
    wait_for(lambda: len(run.starts()) == 2)
    run.process.send_signal(signal.SIGINT)
    assert run.ends()[0] == 0 and run.has_left_nothing()


def test_a_closed_pipe_does_not_end_it(daemon):
    run = daemon(MISHAP="").start()
    run.process.stderr.close()
    run.train()
    os.kill(run.starts()[0], signal.SIGKILL)  # now it has something to print
    wait_for(lambda: len(run.starts()) == 2)
    run.process.send_signal(signal.SIGINT)
    run.process.stdout.read()
    assert run.process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    "arguments", [("check", "--epochs", "2"), ("train", "--help"), ("--help",), ("--version",)]
)
def test_other_commands_and_help_run_alone(daemon, arguments):
    run = daemon(*arguments, NPROC="4").start()
    output, _ = run.process.communicate(timeout=PATIENCE)
    assert (output, run.process.returncode) == (f"alone: {' '.join(arguments)}\n", 7)


@pytest.mark.drill
@pytest.mark.slow
def test_torchrun_with_two_ranks_survives_kills(daemon):
    run = daemon(NPROC="2", LAUNCHER="torchrun", EPOCH_SECONDS="0.3").start().train()
    assert "of=2" in run.log()
    os.kill(run.starts(1)[0], signal.SIGKILL)
    wait_for(lambda: len(run.starts(0)) == 2)
    agent = psutil.Process(run.starts(0)[1]).parent()
    run.train()
    agent.kill()
    wait_for(lambda: len(run.starts(0)) == 3)
    run.train()
    run.process.send_signal(signal.SIGINT)
    code, errors = run.ends()
    assert code == 0 and run.has_left_nothing()
    first_words = [line.split()[0] for line in errors.splitlines() if line]
    assert first_words == ["Starting", "Training", "Training", "Stopping"]  # and nothing from torchrun


@pytest.mark.slow
def test_torchrun_passes_the_final_exit_code_without_noise_and_dies_with_the_supervisor(daemon):
    run = daemon(NPROC="2", LAUNCHER="torchrun", MISHAP="step:reports 3").start()
    assert run.ends() == (3, "Starting 2 ranks.\n")
    assert run.has_left_nothing()
    run = daemon(NPROC="2", LAUNCHER="torchrun").start().train()
    run.process.kill()
    run.ends()
    wait_for(lambda: not run.living())


def test_an_invalid_launch_setting_is_one_line_and_exit_2(daemon):
    run = daemon(NPROC="none").start()
    assert run.ends() == (2, "NPROC must be a whole number of at least 1, was 'none'\n")
