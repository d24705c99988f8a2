"""The container, systemd, Slurm and Kubernetes files: their paths exist, and their numbers are the program's."""

import configparser
import fnmatch
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from continuous_training import Settings
from runtime.control import FINAL_CODES
from runtime.processes import SWEEP_SECONDS
from runtime.supervisor import Limits
from tests.program import PACKAGES, ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SLURM = (ROOT / "contrib" / "slurm.sbatch").read_text(encoding="utf-8")
HOPELESS = {code for code in FINAL_CODES if code}
SAVE_SECONDS = 10.0 * 60  # of the full model, 7.2 GB, at 12 MB/s
LEAST_STOP_SECONDS = max(Limits.hang_seconds, SAVE_SECONDS) + 60


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]["training"])


def kubernetes() -> dict[str, Any]:
    text = (ROOT / "contrib" / "kubernetes.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def unit() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(ROOT / "contrib" / "continuous-training.service", encoding="utf-8")
    return parser


def minutes(text: str) -> float:
    return 60.0 * int(text.removesuffix("m"))


def is_sent(path: str) -> bool:
    """Whether a file goes to Docker: the last pattern that fits it, or a folder above it, decides."""
    sent = True
    places = [path, *(parent.as_posix() for parent in Path(path).parents)]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip().lstrip("!").rstrip("/").removeprefix("**/")
        if not pattern or pattern.startswith("#"):
            continue
        names = [Path(place).name for place in places] if line.startswith("**/") else places
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            sent = line.startswith("!")
    return sent


def test_the_image_gets_the_program_and_neither_keys_nor_data() -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    program = [path.relative_to(ROOT).as_posix() for path in sources if "__pycache__" not in path.parts]
    assert "evaluation/report.html" in program
    for path in [*program, "continuous_training.py", "requirements_simple.txt"]:
        assert is_sent(path), path
    for path in (".env", "runtime/.env", ".git/config", ".venv/bin/python", "data_cache/polygon/a.parquet",
                 "checkpoints/run1_epoch1.pt", "logs/metrics.jsonl", "tests/program.py"):  # fmt: skip
        assert not is_sent(path), path


def test_the_container_runs_the_supervisor_as_no_root_on_volumes() -> None:
    assert re.findall(r'^ENTRYPOINT \["python", "-m", "runtime\.supervisor"\]$', DOCKERFILE, re.M)
    assert re.findall(r'CMD \["python", "-m", "(runtime\.health)"\]', DOCKERFILE) == ["runtime.health"]
    assert re.findall(r"^USER (\d+)$", DOCKERFILE, re.M) == re.findall(r"--uid (\d+)", DOCKERFILE) != ["0"]
    volumes = set(re.findall(r'"(/[^"]+)"', DOCKERFILE.split("\nVOLUME ")[1].split("\n")[0]))
    assert {f"/app/{name}" for name in ("checkpoints", "data_cache", "logs")} < volumes
    made = DOCKERFILE.split("mkdir ")[1].split("\\")[0].split()
    owned = DOCKERFILE.split("chown trainer ")[1].split("\n")[0].split()
    assert made == owned and {Path(volume).name for volume in volumes} <= {Path(name).name for name in made}
    assert {line.split(":")[1] for line in compose()["volumes"]} == volumes
    (python,) = re.findall(r"^FROM python:3\.(\d+)-slim$", DOCKERFILE, re.M)
    assert int(python) >= 11
    assert "torch==" in (ROOT / "requirements_simple.txt").read_text(encoding="utf-8")


def test_a_stop_has_the_time_of_a_save() -> None:
    pod = kubernetes()["Job"]["spec"]["template"]["spec"]
    (slurm,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", SLURM, re.M)
    stops = {
        "compose": minutes(compose()["stop_grace_period"]),
        "systemd": float(unit()["Service"]["TimeoutStopSec"]),
        "Kubernetes": pod["terminationGracePeriodSeconds"],
        "Slurm": float(slurm),
    }
    assert {name: seconds for name, seconds in stops.items() if seconds < LEAST_STOP_SECONDS} == {}


def test_what_a_restart_would_not_help_is_not_restarted() -> None:
    service, job = unit()["Service"], kubernetes()["Job"]["spec"]
    assert service["Restart"] == "on-failure"
    assert set(map(int, service["RestartPreventExitStatus"].split())) == HOPELESS
    (rule,) = [rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert set(rule["onExitCodes"]["values"]) == HOPELESS
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # which that rule needs
    assert compose()["restart"] == "unless-stopped"


def test_a_hang_is_the_supervisors_to_find_and_the_watchdog_waits_for_it() -> None:
    service = unit()["Service"]
    assert service["Type"] == "notify"
    # It pings four times in that time, and sweeping what it killed takes up to SWEEP_SECONDS.
    watchdog = float(service["WatchdogSec"])
    assert watchdog / 4 + SWEEP_SECONDS < watchdog * 0.6
    (interval, retries) = map(int, re.findall(r"--interval=(\d+)s .*--retries=(\d+)", DOCKERFILE)[0])
    (start,) = re.findall(r"--start-period=(\d+)m", DOCKERFILE)
    assert 60 * int(start) > Limits.start_seconds and interval * retries >= SWEEP_SECONDS
    container = kubernetes()["Job"]["spec"]["template"]["spec"]["containers"][0]
    assert container["livenessProbe"]["exec"]["command"] == ["python", "-m", "runtime.health"]


def test_the_pods_find_each_other() -> None:
    found = kubernetes()
    name, pod = found["Job"]["metadata"]["name"], found["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    port = found["Service"]["spec"]["ports"][0]["port"]
    service = found["Service"]["metadata"]["name"]
    assert environment["RDZV_ENDPOINT"] == f"{name}-0.{service}:{port}" and pod["subdomain"] == service
    assert (
        int(environment["NNODES"])
        == found["Job"]["spec"]["completions"]
        == found["Job"]["spec"]["parallelism"]
    )
    assert found["Service"]["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert claims == [found["PersistentVolumeClaim"]["metadata"]["name"]]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def test_files_that_units_and_scripts_name_exist() -> None:
    service = unit()["Service"]
    program, script = service["ExecStart"].split()
    assert program == "/bin/bash" and script.startswith(service["WorkingDirectory"] + "/")
    assert (ROOT / Path(script).name).is_file()
    assert (ROOT / re.findall(r"exec bash (\S+\.sh)", SLURM)[0]).is_file()
    assert re.findall(r"^export NNODES=\$SLURM_NNODES RDZV_ENDPOINT=\$first:\d+$", SLURM, re.M)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_reads_the_unit_without_a_word() -> None:
    command = ["systemd-analyze", "verify", str(ROOT / "contrib" / "continuous-training.service")]
    found = subprocess.run(command, capture_output=True, text=True, env={"SYSTEMD_LOG_LEVEL": "warning"})
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("script", ["contrib/slurm.sbatch", "benchmarks/gpu.sh"])
def test_bash_reads_the_scripts(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0


def test_the_gpu_benchmark_names_files_settings_and_tests_that_exist() -> None:
    text = (ROOT / "benchmarks" / "gpu.sh").read_text(encoding="utf-8")
    paths = set(re.findall(r"\b(?:benchmarks|tests)/[\w/]+\.py", text))
    assert len(paths) == 5 and [path for path in paths if not (ROOT / path).is_file()] == []
    marked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")
              if "pytest.mark.gpu" in path.read_text(encoding="utf-8") and path != Path(__file__)}  # fmt: skip
    assert marked <= paths
    settings = {field.name.replace("_", "-") for field in fields(Settings)}
    own = {"preset", "demo", "measured-epochs", "kernels", "bars", "symbols", "exam-days", "offline"}
    others = {"signal", "kill-after", "query-gpu", "format", "no-header", "timeout", "collect-only"}
    assert set(re.findall(r"--([a-z][a-z-]+)", text)) - settings == own | others
