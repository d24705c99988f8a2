"""What the shell, a notebook or another program left behind changes nothing; what is the machine's stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from data_sources.vendors.http import RetryPolicy, prepare, unreachable
from data_sources.vendors.polygon_files import socks_note
from monitoring.console import Console
from runtime import install, surroundings
from tests.program import ALONE, PATIENCE, ROOT, environment, tiny_flags

long = pytest.mark.drill

# Each of these broke a command, or could: names of absent backends, accounts, folders and ranks.
HOSTILE = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PROMETHEUS_MULTIPROC_DIR": "/nonexistent",
    "PYTHON_DOTENV_DISABLED": "1",
    "PYTHONWARNINGS": "error",
    "PYTHONIOENCODING": "ascii",
    "AWS_PROFILE": "gone",
    "AWS_USE_FIPS_ENDPOINT": "true",
    "AWS_DEFAULTS_MODE": "nonsense",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    "AWS_DATA_PATH": "/nonexistent",
    "PET_STANDALONE": "1",
    "PET_NNODES": "7",
    "GIT_DIR": "/nonexistent",
    "FORCE_COLOR": "1",
    "NO_PROXY": "",
    "SLURM_PROCID": "3",
    "MASTER_ADDR": "elsewhere",
    "GROUP_RANK": "3",
    "LOCAL_WORLD_SIZE": "9",
    "TORCHELASTIC_RUN_ID": "other",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
    "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "cpp",
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "SSLKEYLOGFILE": "/nonexistent/keys",
    "PYTHONOPTIMIZE": "2",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONPYCACHEPREFIX": "/nonexistent/cache",
    "LC_ALL": "C",
    "LANG": "xx_XX.UTF-8",
    "TZ": "Pacific/Kiritimati",
    "COLUMNS": "wide",
    "LINES": "-3",
    "TERM": "dumb",
    "TERMINAL_WIDTH": "wide",
    "NO_COLOR": "1",
    "TMPDIR": "/nonexistent",
    "MPLCONFIGDIR": "/nonexistent/matplotlib",
    "XDG_CACHE_HOME": "/nonexistent/cache",
    "XDG_CONFIG_HOME": "/nonexistent/config",
    "ARROW_DEFAULT_MEMORY_POOL": "nonsense",
    "POLARS_ENGINE_AFFINITY": "gpu",
    "POLARS_MAX_THREADS": "0",
    "RANK": "5",
    "WORLD_SIZE": "8",
}
# In a shell with few files and a strict umask.
SHELL = 'ulimit -Sn 40; umask 077; exec "$@"'


@pytest.mark.drill
def test_every_command_runs_in_hostile_surroundings(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".config" / "matplotlib").mkdir(parents=True)
    (home / ".config" / "matplotlib" / "matplotlibrc").write_text("text.usetex: True\nbackend: nonsense\n")
    (home / ".netrc").write_text("default login anonymous password user@example.org\n")
    (home / ".aws").mkdir()
    (home / ".aws" / "config").write_text("not an ini file")
    hostile = environment(**HOSTILE, HOME=str(home), MATPLOTLIBRC=str(home / ".config" / "matplotlib"))
    folders = tiny_flags(tmp_path, epochs=1, runs=1, checkpoint_every=1, holdout_days=1)
    best = tmp_path / "checkpoints" / "run1_epoch1.pt"
    reports = ["--report-dir", str(tmp_path / "reports")]
    for words in (
        ["-m", "runtime.supervisor", *folders],
        ["-m", "runtime.supervisor", "check", "--offline", *folders],
        [*ALONE, "data", "--json", *folders],
        [*ALONE, "episode", str(best), "--symbol", "SIM000", "--output", str(tmp_path / "episode.png")],
        [*ALONE, "evaluate", str(best), *reports],
        [*ALONE, "export", str(best), "--output", str(tmp_path / "exported")],
        [*ALONE, "signals", str(best), "--json"],
        *([[*ALONE, "selftest", *reports, *folders[-6:]]] if os.environ.get("DRILL") == "1" else []),
    ):
        variables = hostile | ({"PYTHONSAFEPATH": "1"} if words[0] == ALONE[0] else {})
        done = subprocess.run(
            ["bash", "-c", SHELL, "bash", sys.executable, *words],
            cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=PATIENCE * (3 if "selftest" in words else 1),  # eight minutes on two cores that are idle
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    assert (tmp_path / "episode.png").is_file()


@pytest.mark.drill
@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_without_a_home_and_with_a_full_temporary_folder_it_trains(tmp_path: Path) -> None:
    missing = environment(
        TMPDIR="/dev/full", HOME="/nonexistent/home", USER="", LOGNAME="", XDG_RUNTIME_DIR=""
    )
    words = ["-m", "runtime.supervisor", *tiny_flags(tmp_path, epochs=1, runs=1, checkpoint_every=1)]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=missing, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "checkpoints" / "run1_epoch1.pt").is_file()


def test_a_socks_proxy_is_named_with_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "NO_PROXY",
        "no_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    assert socks_note() == ""
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with prepare(requests.Session(), RetryPolicy(), 1_000) as session, pytest.raises(OSError) as error:
        session.get("http://example.org/")
    assert "which needs python -m pip install PySocks" in str(unreachable("Binance", error.value))
    assert socks_note() == "; Polygon's files come through no SOCKS proxy: set HTTPS_PROXY to one of HTTP"


def test_netrc_replaces_no_key_and_credentials_of_an_address_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("default login anonymous password user@example.org\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    session = prepare(requests.Session(), RetryPolicy(), 1_000)
    assert session.trust_env  # proxies and certificates
    key = requests.Request("GET", "http://127.0.0.1/", headers={"Authorization": "Bearer key"})
    assert session.prepare_request(key).headers["Authorization"] == "Bearer key"
    assert (
        "Authorization" not in session.prepare_request(requests.Request("GET", "http://127.0.0.1/")).headers
    )
    own = session.prepare_request(requests.Request("GET", "http://me:word@127.0.0.1/"))
    assert own.headers["Authorization"].startswith("Basic ")


def test_what_is_the_machines_stays() -> None:
    kept = {
        "HTTPS_PROXY": "http://proxy:1",
        "REQUESTS_CA_BUNDLE": "/ca.pem",
        "AWS_CA_BUNDLE": "/ca.pem",
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "2",
        "NCCL_DEBUG": "INFO",
        "POLYGON_API_KEY": "key",
        "PYTHONWARNINGS": "default",
    }
    left = dict(kept) | {"AWS_SECRET_ACCESS_KEY": "other", "MPLBACKEND": "x"}
    surroundings.shut_out(left)
    assert left == kept | {"NETRC": os.devnull}


def test_ranks_of_something_else_are_not_ours() -> None:
    """A shell within a Kubeflow or Slurm job has them, and only rank 0 of a training prints its errors."""
    rank = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    assert surroundings.is_rank(rank, []) and surroundings.is_rank(rank, ["--epochs", "1"])
    assert surroundings.is_rank(rank, ["train", "--demo"])
    assert not surroundings.is_rank(rank, ["check"]) and not surroundings.is_rank({"RANK": "3"}, ["train"])
    assert not surroundings.is_rank(rank | {"WORLD_SIZE": "all"}, ["train"])
    done = subprocess.run(
        [sys.executable, *ALONE, "check", "--epochs", "none"],
        cwd=ROOT, env=environment(**rank), capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("Invalid setting: epochs")


def test_what_only_polars_would_act_upon_is_shut_out_but_its_number_of_threads() -> None:
    for given, kept in (("2", {"POLARS_MAX_THREADS": "2"}), ("0", {}), ("all", {}), ("", {})):
        left = {"POLARS_ENGINE_AFFINITY": "gpu", "POLARS_IDEAL_MORSEL_SIZE": "0", "POLARS_MAX_THREADS": given}
        surroundings.shut_out(left)
        assert left == kept | {"NETRC": os.devnull}


def test_pip_installs_here_and_from_the_users_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://mirror/simple\ntrusted-host =\n  mirror\n  other\nuser = true\n"
        "[install]\ntarget = /elsewhere\ndry-run = true\nno-deps = true\n"
    )
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    for name in ("PIP_TARGET", "PIP_USER", "PIP_DRY_RUN", "PIP_NO_DEPS", "PIP_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    seen = install._pip_environment(sys.executable)
    found = {name: text.split() for name, text in seen.items() if name.startswith("PIP_")}
    assert found.pop("PIP_INDEX_URL") == ["https://mirror/simple"]
    assert found.pop("PIP_TRUSTED_HOST") == ["mirror", "other"]
    assert (found.pop("PIP_TIMEOUT"), found.pop("PIP_CONFIG_FILE")) == (["1"], [os.devnull])
    assert not {"PIP_TARGET", "PIP_USER", "PIP_DRY_RUN", "PIP_NO_DEPS"} & found.keys()


def test_only_the_programs_own_env_file_is_read(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "continuous_training.py").write_bytes((ROOT / "continuous_training.py").read_bytes())
    (tmp_path / ".env").write_text("POLYGON_API_URL=of-a-folder-above\n")
    code = (
        "import os, sys, runpy; sys.argv = ['continuous_training.py', '--version']\n"
        "try: runpy.run_path('continuous_training.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(os.environ.get('POLYGON_API_URL'))"
    )
    clean = {name: text for name, text in os.environ.items() if name != "POLYGON_API_URL"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project, env=clean | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["None"], done.stdout + done.stderr


@pytest.mark.parametrize(
    "shell",
    [
        "2>&1 | head -1",
        pytest.param(">&- 2>&- <&-", marks=long),
        pytest.param("2>&-", marks=long),
        pytest.param(">/dev/full 2>&1", marks=long),
    ],
)
def test_a_training_whose_output_goes_nowhere_saves_and_ends_with_its_code(
    tmp_path: Path, shell: str
) -> None:
    words = [sys.executable, "-m", "runtime.supervisor", *tiny_flags(tmp_path, epochs=4, runs=1)]
    code = tmp_path / "code"
    command = f'("$@"; echo $? > {code}) {shell}'
    done = subprocess.run(
        ["bash", "-c", command, "bash", *words], cwd=ROOT, env=environment(), timeout=PATIENCE
    )
    assert code.read_text().strip() == "0", done
    assert {path.name for path in (tmp_path / "checkpoints").glob("run*.pt")} == {
        "run1_epoch2.pt",
        "run1_epoch4.pt",
    }
    # Of one start, not of five.
    assert len((tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_output_that_a_full_disk_lost_is_no_success_of_a_command_and_a_closed_pipe_is() -> None:
    for shell, code, told in (
        (">/dev/full", 1, "The output was not written: No space left on device\n"),
        ("| true; exit ${PIPESTATUS[0]}", 0, ""),
    ):
        words = [sys.executable, *ALONE, "--version"]
        done = subprocess.run(
            ["bash", "-c", f'"$@" {shell}', "bash", *words],
            cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (code, told), shell


@pytest.mark.drill
def test_a_mistake_keeps_its_exit_code_without_a_reader(tmp_path: Path) -> None:
    for shell in ("2>&-", "2>/dev/full", ">&- 2>&-"):
        command = f'"$@" {shell}'
        words = [sys.executable, *ALONE, "check", "--epochs", "none"]
        done = subprocess.run(["bash", "-c", command, "bash", *words], cwd=ROOT, env=environment())
        assert done.returncode == 2, shell


def test_rich_raises_instead_of_ending_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as gone, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", gone)
        with Console(tmp_path) as console:
            console.print_line("lost")
            assert console.quiet
            console.print_line("silent")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # so that closing it can flush
    monkeypatch.setattr(sys, "stdout", None)
    with Console(tmp_path) as console:
        console.print_line("nowhere")


def test_a_python_without_the_packages_names_the_one_that_has_them() -> None:
    words = [sys.executable, "-I", "-S", str(ROOT / "continuous_training.py"), "evaluate", "best"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.endswith(f"use those of .venv, by {surroundings.START} evaluate best\n")
    assert ended.stderr.count("\n") == 1


def test_garbage_is_looked_for_as_often_as_usual_once_all_is_imported() -> None:
    code = (
        "import gc; before = gc.get_threshold(); from runtime import surroundings as s; s.prepare_process(); "
        "assert gc.get_threshold()[0] > 10 * before[0]; s.collect_as_usual(); "
        "assert gc.get_threshold() == before and gc.get_freeze_count() > 0"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("program", "module"),
    [
        (["-m", "runtime.install"], "hashlib"),
        (["-m", "runtime.supervisor"], "runtime.launch"),
        (["continuous_training.py", "status"], "typer"),
    ],
)
def test_ctrl_c_while_modules_load_is_no_traceback(program: list[str], module: str) -> None:
    code = f"""
import builtins, os, runpy, signal, sys
load = builtins.__import__
def interrupted(name, *others, **named):
    if name == {module!r}:
        os.kill(os.getpid(), signal.SIGINT)
    return load(name, *others, **named)
builtins.__import__ = interrupted
sys.path.insert(0, "")
sys.argv = {program[-1:]}
runpy.{"run_module" if program[0] == "-m" else "run_path"}({program[program[0] == "-m"]!r}, run_name="__main__")
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")
