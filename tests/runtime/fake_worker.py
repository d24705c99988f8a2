"""Stands in for continuous_training.py: a worker that follows runtime.control's protocol and trains nothing.

Its state is the number of finished epochs in FAKE_FOLDER/epochs; it logs to FAKE_FOLDER/log.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from runtime.control import CHECK_FIRST, ENTER, STOP_NOW, Control, heartbeat, report_goes_on, report_plan

FOLDER = Path(os.environ["FAKE_FOLDER"])
EPOCHS = FOLDER / "epochs"
EPOCH_SECONDS = float(os.environ.get("EPOCH_SECONDS", "0.3"))
MISHAP, _, MISHAP_DETAIL = os.environ.get("MISHAP", "").partition(":")


def log(line: str) -> None:
    with (FOLDER / "log").open("a") as file:
        file.write(line + "\n")


def epochs() -> int:
    return int(EPOCHS.read_text()) if EPOCHS.exists() else 0


def save(number: int) -> None:
    (FOLDER / "new").write_text(str(number))
    (FOLDER / "new").replace(EPOCHS)


def mishap(control: Control, now: str) -> None:
    """Fail at this point, in the way that the test asks for."""
    if now != MISHAP:
        return
    if MISHAP_DETAIL == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if MISHAP_DETAIL.startswith("reports "):  # one code and exits with another, as under torchrun
        control.report_exit_code(int(MISHAP_DETAIL.split()[1]))
        sys.exit(1)
    if MISHAP_DETAIL == "screen":  # dies under its dashboard, after a traceback
        control.report_screen(True)
        sys.stdout.write(ENTER)
        sys.stdout.flush()
        os.write(2, b"Traceback: why\n")
        os._exit(9)
    if MISHAP_DETAIL == "sleep":
        time.sleep(600)
    sys.exit(int(MISHAP_DETAIL))


def train(rank: int) -> None:
    control = Control()
    log(f"start rank={rank} of={os.environ.get('WORLD_SIZE', '1')} pid={os.getpid()} epochs={epochs()}")
    mishap(control, "start")
    control.listen()
    log(f"trains rank={rank}")
    if os.environ.get("GRANDCHILD"):
        subprocess.Popen(["sleep", "600"], start_new_session=True)
    while True:
        end = time.monotonic() + EPOCH_SECONDS
        while time.monotonic() < end:
            time.sleep(0.02)
            if rank == 0:
                heartbeat()
            mishap(control, "step")
            if control.stop_level == STOP_NOW:
                log(f"safe point rank={rank}")
                control.report_exit_code(0)
                return
        if rank == 0:
            save(epochs() + 1)
            control.report_epoch()
            sys.stdout.write(f"epoch {epochs()}\n")
        mishap(control, "epoch")
        if control.stop_level:
            log(f"epoch end rank={rank}")
            control.report_exit_code(0)
            return


if __name__ == "__main__":
    command, *flags = sys.argv[1:] or ["nothing"]
    if command == "train" and os.environ.pop(CHECK_FIRST, ""):
        report_plan(int(os.environ["NPROC"]), FOLDER, "COMPANION" in os.environ)
        log(f"preflight {' '.join(flags)} planned={os.environ['NPROC']}")
        if MISHAP == "preflight":
            sys.stderr.write("the setting is wrong\n")
            sys.exit(int(MISHAP_DETAIL))
        if os.environ["NPROC"] == "1":
            report_goes_on()
            train(0)
    elif command == "train" and "--help" not in flags:
        train(int(os.environ.get("RANK", "0")))
    elif command == "companion":
        log(f"companion {' '.join(flags)}")
        for line in sys.stdin:
            log(f"heard {line.strip()}")
        log("companion ends")
    elif command == "folder":
        sys.stdout.write(os.environ["CONTINUOUS_TRAINING_CALLED_FROM"] + "\n")
    else:
        sys.stdout.write(" ".join(["alone:", command, *flags]) + "\n")
        sys.exit(7)
