"""What the user was promised, one test per promise: the training, its checkpoints, and what interrupts it.

The program runs for real, tiny, on a simulated market that is the same on every day; several tests look at
one start. Real sources are in test_promises_data.py.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import signal
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from continuous_training import Settings
from models.policy import Policy
from models.transformer import TransformerConfig
from runtime.control import EXIT_CRASH, EXIT_DOES_NOT_FIT
from runtime.launch import Launch
from tests.drill.programs import WITH_FAULTS
from tests.program import (
    ALONE,
    ROOT,
    SUPERVISED,
    TRANSITIONS_PER_EPOCH,
    Start,
    checkpoint,
    environment,
    epochs_of,
    is_same,
    metrics,
    names_of,
    tiny_flags,
)
from training import distributed

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and terminals of POSIX")

EPOCHS, STEPS_PER_EPOCH = 8, 3 * 2  # 3 passes over 64 transitions, 32 in each step
TWO_RUNS = [(run, epoch) for run in (1, 2) for epoch in range(1, EPOCHS + 1)]
LAST = f"run2_epoch{EPOCHS}.pt"
TEXTS = {"time", "loss/outlying_symbol"}
TWO_RANKS = {"runs": 1, "batch_size": 64}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two runs of eight epochs in one go: the folder and what was printed."""
    folder = tmp_path_factory.mktemp("unbroken")
    start = Start(folder / "out", [*ALONE, *tiny_flags(folder, runs=2)]).ends_well()
    return folder, start.output


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run on two ranks under torchrun, watched from inside by two_rank_training.py."""
    folder = tmp_path_factory.mktemp("two_ranks")
    driver = [str(ROOT / "tests" / "two_rank_training.py"), str(folder), "train"]
    ((command, additions),) = Launch(num_ranks=2).commands([*driver, *tiny_flags(folder, **TWO_RANKS)])
    start = Start(folder / "out", command[1:], environment(**additions)).ends_well()
    return folder, start.output


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Start, Start]]:
    """A daemon in a terminal, without --runs, until a Ctrl+C is typed in run 3 or later; and a second one."""
    folder = tmp_path_factory.mktemp("interrupted")
    words = [*SUPERVISED, *tiny_flags(folder, epochs=24, checkpoint_every=1000), "--no-dashboard"]
    start = Start(folder / "out", words, terminal=True)
    second = None
    try:
        start.wait_for("Run 1: epochs 1 to 24")
        with start.paused():  # so that it cannot be over before the second has looked
            second = Start(folder / "second", words)
            second.ends()
        start.wait_for("run 3 epoch  1/24")
        assert start.process.stdin is not None
        start.process.stdin.write(b"\x03")
        start.process.stdin.flush()
        start.ends()
        yield folder, start, second
    finally:
        for started in (start, second):
            if started:
                started.kill()


def run_again(folder: Path, **changes: object) -> Start:
    start = Start(folder / "again", [*ALONE, *tiny_flags(folder, **changes)])
    start.ends()
    return start


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- the model and how it learns ---------------------------------------------------------------------------


def test_the_default_model_is_a_transformer_2048_wide_with_12_layers_and_32_heads() -> None:
    with torch.device("meta"):
        settings = Settings()
        sizes = TransformerConfig(30, settings.d_model, settings.num_layers, settings.num_heads, 193)
        policy = Policy(sizes, 8, len(settings.positions))
    assert len(policy.trunk.blocks) == 12
    attention = policy.trunk.blocks[0].attention
    assert (attention.num_heads, attention.head_width) == (32, 64)
    assert policy.num_parameters() > 12 * 12 * 2048**2
    trunk = sum(parameter.numel() for parameter in policy.trunk.parameters())
    assert trunk / policy.num_parameters() > 0.99


def test_attention_sees_every_bar_of_the_context_and_the_segment(two_ranks: tuple[Path, str]) -> None:
    for seen in ranks_of(two_ranks[0]):
        # Without gradients: the rollout, 8 bars of context, 8 decisions, one more value. With: the update. And
        # what the first rank's watch on plasticity looks at.
        assert [False, 17, 17] in seen["attention"]
        assert {(*lengths,) for _, *lengths in seen["attention"]} == {(17, 17), (16, 16)}
        assert [lengths for gradients, *lengths in seen["attention"] if gradients] == [[16, 16]]


def test_the_oldest_bar_of_the_context_reaches_the_decision(unbroken: tuple[Path, str]) -> None:
    saved = checkpoint(unbroken[0], LAST)
    policy = Policy.from_sizes(saved["model_config"])
    policy.load_state_dict(saved["model"])
    bars = torch.randn(1, 8, policy.trunk.config.num_features, generator=torch.Generator().manual_seed(1))
    accounts = torch.zeros(1, 1, policy.head.account.in_features)
    logits, values = policy(bars, accounts)
    for bar in range(8):
        changed = bars.clone()
        changed[:, bar] += 1.0
        other_logits, other_values = policy(changed, accounts)
        assert not torch.equal(logits, other_logits) and not torch.equal(values, other_values), bar


def test_training_changes_every_weight_from_checkpoint_to_checkpoint(unbroken: tuple[Path, str]) -> None:
    names = [f"run{run}_epoch{epoch}.pt" for run in (1, 2) for epoch in range(2, EPOCHS + 1, 2)]
    models = [checkpoint(unbroken[0], name)["model"] for name in names]
    for earlier, later in pairwise(models):
        for name in earlier:
            assert not torch.equal(earlier[name], later[name]), name
            assert torch.isfinite(later[name]).all(), name
            assert later[name].dtype == torch.float32


def test_episodes_are_as_long_as_the_setting_says(unbroken: tuple[Path, str]) -> None:
    ended = sum(entry["rollout/episodes"] for entry in metrics(unbroken[0]))
    ruined = sum(entry["rollout/ruined_episodes"] for entry in metrics(unbroken[0]))
    # An episode or two may be cut where its symbol's bars end.
    assert ended - len(TWO_RUNS) * TRANSITIONS_PER_EPOCH // 16 in (0, 1, 2)
    assert ruined == 0


def test_an_optimizer_step_takes_one_batch_of_transitions(unbroken: tuple[Path, str]) -> None:
    resume = torch.load(unbroken[0] / "checkpoints" / "resume" / LAST, weights_only=True)
    assert resume["learner"]["optimizer_steps"] == len(TWO_RUNS) * STEPS_PER_EPOCH
    for moments in resume["learner"]["optimizer"]["state"].values():
        assert moments["step"] == len(TWO_RUNS) * STEPS_PER_EPOCH
    assert "32 transitions per optimizer step, 3 segments per micro-batch" in unbroken[1]


def test_bf16_is_used_where_it_is_asked_for_and_weights_stay_float32(
    unbroken: tuple[Path, str], tmp_path: Path
) -> None:
    start = run_again(tmp_path, precision="bf16", runs=1, epochs=2)
    assert start.process.returncode == 0, start.output
    assert "trunk in bf16" in start.output and "trunk in fp32" in unbroken[1]
    model, other = checkpoint(tmp_path, "run1_epoch2.pt")["model"], checkpoint(unbroken[0], "run1_epoch2.pt")
    for name, weights in model.items():
        assert weights.dtype == torch.float32 and torch.isfinite(weights).all()
        if name.startswith("trunk.blocks"):
            assert not torch.equal(weights, other["model"][name]), name
    entries = metrics(tmp_path)
    assert all(
        math.isfinite(value) for entry in entries for name, value in entry.items() if name not in TEXTS
    )
    assert entries[0]["ppo/first_kl"] < 1e-4


def test_matrices_multiply_in_tf32_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    try:
        with distributed.start() as ranks:
            assert ranks.device.type == "cuda"
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("micro_batch", "code"), [(1, EXIT_DOES_NOT_FIT), (14, EXIT_CRASH)])
def test_a_full_gpu_ends_the_training_unless_it_did_fit_before(
    tmp_path: Path, micro_batch: int, code: int
) -> None:
    # Four segments in micro-batches of three, twice for each of three passes: the second epoch has the 14th.
    env = environment(OUT_OF_MEMORY=str(micro_batch))
    start = Start(tmp_path / "out", [WITH_FAULTS, "train", *tiny_flags(tmp_path, runs=1)], env)
    start.ends()
    assert start.process.returncode == code
    assert "memory is full: lower envs_per_gpu, then d_model. CUDA out of memory" in start.output
    assert "Traceback" not in start.output


def test_the_allocator_setting_is_there_before_torch(two_ranks: tuple[Path, str]) -> None:
    assert {seen["allocator"] for seen in ranks_of(two_ranks[0])} == {"max_split_size_mb:512"}


# --- several processes --------------------------------------------------------------------------------------


def ranks_of(folder: Path) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_both_ranks_end_with_identical_weights(two_ranks: tuple[Path, str]) -> None:
    folder, output = two_ranks
    first, second = ranks_of(folder)
    assert (first["code"], second["code"]) == (0, 0), output
    assert first["weights"] == second["weights"] and first["weights"]
    saved = checkpoint(folder, f"run1_epoch{EPOCHS}.pt")["model"]
    digests = {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in saved.items()}
    assert digests == first["weights"]


@pytest.mark.drill
def test_ranks_that_hold_shares_learn_what_copies_learn_and_either_goes_on_from_either(
    two_ranks: tuple[Path, str], tmp_path: Path
) -> None:
    def with_shares(runs: int) -> None:
        words = ["continuous_training.py", "train", *tiny_flags(tmp_path, **(plan | {"runs": runs}))]
        ((command, additions),) = Launch(num_ranks=2).commands(words)
        Start(tmp_path / "out", command[1:], environment(**additions)).ends_well()

    plan = TWO_RANKS | {"parallel": "fsdp"}
    last = f"run1_epoch{EPOCHS}.pt"
    with_shares(runs=1)
    for name, weights in checkpoint(two_ranks[0], last)["model"].items():
        torch.testing.assert_close(checkpoint(tmp_path, last)["model"][name], weights, rtol=1e-2, atol=1e-4)
    run_again(tmp_path, **(TWO_RANKS | {"runs": 2}))  # one rank, which holds all
    with_shares(runs=3)
    assert f"Resuming from {tmp_path / 'checkpoints' / LAST}" in (tmp_path / "out").read_text()
    resume = checkpoint(tmp_path, f"resume/run3_epoch{EPOCHS}.pt")
    # Alone, half as many transitions make half as many steps of the same batch.
    assert resume["learner"]["optimizer_steps"] == EPOCHS * STEPS_PER_EPOCH * 5 // 2


def test_every_rank_plays_its_own_accounts_and_all_of_them_count(two_ranks: tuple[Path, str]) -> None:
    folder, output = two_ranks
    first, second = ranks_of(folder)
    assert first["accounts"] != second["accounts"]
    assert "on 2 x cpu; 16 accounts; 64 transitions per optimizer step" in output
    assert [entry["transitions"] for entry in metrics(folder)] == [
        2 * TRANSITIONS_PER_EPOCH * epoch for epoch in range(1, EPOCHS + 1)
    ]
    assert first["optimizer_steps"] == EPOCHS * STEPS_PER_EPOCH


@pytest.mark.drill
@pytest.mark.slow
def test_a_killed_rank_changes_nothing_in_the_end(two_ranks: tuple[Path, str], tmp_path: Path) -> None:
    start = Start(tmp_path / "out", [*SUPERVISED, *tiny_flags(tmp_path, **TWO_RANKS)], environment(NPROC="2"))
    try:
        start.wait_for("run1_epoch2.pt")
        start.worker(lambda env: env.get("RANK") == "1").kill()
        start.ends_well()
    finally:
        start.kill()
    assert "Training died" in start.output and "Resuming from" in start.output
    last = f"run1_epoch{EPOCHS}.pt"
    assert is_same(checkpoint(tmp_path, last)["model"], checkpoint(two_ranks[0], last)["model"])


# --- runs and checkpoints -----------------------------------------------------------------------------------


def test_checkpoints_come_at_the_promised_epochs_of_every_run(unbroken: tuple[Path, str]) -> None:
    folder, output = unbroken
    assert names_of(folder) == {f"run{run}_epoch{epoch}.pt" for run in (1, 2) for epoch in (2, 4, 6, 8)}
    assert epochs_of(folder) == TWO_RUNS
    assert [line.split("/")[-1] for line in output.splitlines() if line.startswith("Saved ")] == [
        f"run{run}_epoch{epoch}.pt" for run in (1, 2) for epoch in (2, 4, 6, 8)
    ]


def test_a_checkpoint_holds_weights_configuration_symbols_run_and_epoch(unbroken: tuple[Path, str]) -> None:
    saved = checkpoint(unbroken[0], "run2_epoch4.pt")
    assert (saved["run"], saved["epoch"]) == (2, 4)
    assert saved["transitions"] == 12 * TRANSITIONS_PER_EPOCH
    assert saved["symbols"] == ["SIM000", "SIM001"]
    # A target of messages holds a secret.
    assert set(saved["config"]) == {field.name for field in dataclasses.fields(Settings)} - {"notify"}
    assert (saved["config"]["d_model"], saved["config"]["learning_rate"]) == (16, 1e-2)
    policy = Policy.from_sizes(saved["model_config"])
    assert policy.load_state_dict(saved["model"], strict=True)
    assert {key for key in saved if f"`{key}`" not in (ROOT / "docs" / "checkpoints.md").read_text()} == set()


def assert_same_end(folder: Path, other: Path) -> None:
    assert is_same(checkpoint(folder, LAST)["model"], checkpoint(other, LAST)["model"])
    ours, theirs = (
        torch.load(parent / "checkpoints" / "resume" / LAST, weights_only=True) for parent in (folder, other)
    )
    ours["clock"].pop("cutoff_ns"), theirs["clock"].pop("cutoff_ns")
    assert is_same(ours, theirs)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run that was ended by kill -9 in its middle and started again."""
    folder = tmp_path_factory.mktemp("killed")
    start = Start(folder / "out", [*ALONE, *tiny_flags(folder, runs=1)])
    start.wait_for("run 1 epoch 3/8").process.kill()
    assert start.ends() == -signal.SIGKILL, start.output
    assert epochs_of(folder)[-1] < (1, EPOCHS)
    again = run_again(folder, runs=1)
    assert again.process.returncode == 0, again.output
    assert "Resuming from" in again.output and "Run 1 is complete" in again.output
    return folder


def test_kill_9_and_a_restart_change_nothing_in_the_end(unbroken: tuple[Path, str], killed: Path) -> None:
    last = f"run1_epoch{EPOCHS}.pt"
    ours, theirs = checkpoint(killed, last), checkpoint(unbroken[0], last)
    assert is_same(ours["model"], theirs["model"])
    for name in ("loss/value", "ppo/grad_norm", "rollout/reward_bps", "learning_rate"):
        assert ours["metrics"][name] == theirs["metrics"][name]


def test_sigterm_in_the_middle_of_an_update_changes_nothing_in_the_end(
    unbroken: tuple[Path, str], tmp_path: Path
) -> None:
    at_step_4_of_epoch_3 = str(2 * STEPS_PER_EPOCH * 2 + 2 * 4 - 1)  # micro-batches: 3 + 1 segments per step
    words = [WITH_FAULTS, "train", *tiny_flags(tmp_path, runs=1)]
    start = Start(tmp_path / "out", words, environment(TERM_AT=at_step_4_of_epoch_3)).ends_well()
    (newest,) = (line for line in start.lines if line.startswith("Newest checkpoint: "))
    assert newest.endswith("run1_epoch2_step4.pt") and epochs_of(tmp_path)[-1] == (1, 2)
    again = run_again(tmp_path, runs=1)
    assert "Resuming from" in again.output and "Run 1: epochs 3 to 8" in again.output
    assert epochs_of(tmp_path) == [(1, epoch) for epoch in range(1, EPOCHS + 1)]
    last = f"run1_epoch{EPOCHS}.pt"
    assert is_same(checkpoint(tmp_path, last)["model"], checkpoint(unbroken[0], last)["model"])
    for ours, theirs in zip(metrics(tmp_path), metrics(unbroken[0]), strict=False):
        for name in ("rollout/reward_bps", "loss/value", "ppo/grad_norm", "transitions"):
            assert ours[name] == theirs[name], name


def test_the_next_run_goes_on_with_weights_and_optimizer(unbroken: tuple[Path, str], killed: Path) -> None:
    """One run, then a start for the second, is the same as two runs in one go: nothing starts over."""
    again = run_again(killed, runs=2)
    end_of_run_1 = f"run1_epoch{EPOCHS}.pt"
    assert f"Resuming from {killed}/checkpoints/{end_of_run_1} (512 transitions)" in again.output
    assert "Run 2: epochs 1 to 8" in again.output
    assert_same_end(killed, unbroken[0])


def test_the_newest_checkpoint_being_corrupt_is_said_and_the_one_before_is_used(
    unbroken: tuple[Path, str], tmp_path: Path
) -> None:
    folder = copy_of(unbroken[0], tmp_path)
    path = folder / "checkpoints" / LAST
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = run_again(folder, runs=2)
    assert again.process.returncode == 0, again.output
    # Beside others, such as that a busy machine has become slow.
    (warning,) = [line for line in again.lines if line.startswith("Warning") and str(path) in line]
    assert warning.endswith("the one before it is used")
    assert f"Resuming from {folder}/checkpoints/run2_epoch6.pt" in again.output
    assert_same_end(folder, unbroken[0])


def test_a_checkpoint_of_another_width_is_one_line_exit_2_and_nothing_is_overwritten(
    unbroken: tuple[Path, str], tmp_path: Path
) -> None:
    folder = copy_of(unbroken[0], tmp_path)
    before = contents(folder / "checkpoints")
    start = run_again(folder, d_model=32, runs=3)
    assert start.process.returncode == 2
    (line,) = start.lines
    assert line.startswith("d_model=32, but ") and "trained with d_model=16" in line
    assert "set it back" in line and "--checkpoint-dir" in line
    assert contents(folder / "checkpoints") == before


# --- forever, until Ctrl+C ----------------------------------------------------------------------------------


def test_it_trains_run_after_run_until_it_is_stopped(interrupted: tuple[Path, Start, Start]) -> None:
    folder, start, _ = interrupted
    assert "Run 1 is complete" in start.output and "Run 2 is complete" in start.output
    run, epoch = epochs_of(folder)[-1]
    assert run >= 3 and 1 <= epoch <= 24
    assert epochs_of(folder) == [
        (earlier, number)
        for earlier in range(1, run + 1)
        for number in range(1, 25)
        if (earlier, number) <= (run, epoch)
    ]


def test_ctrl_c_finishes_the_epoch_saves_prints_a_summary_and_exits_0(
    interrupted: tuple[Path, Start, Start],
) -> None:
    folder, start, _ = interrupted
    assert start.process.returncode == 0, start.output
    run, epoch = epochs_of(folder)[-1]
    final = folder / "checkpoints" / f"run{run}_epoch{epoch}.pt"
    summary = start.output.split("Stopping after this epoch")[1]
    order = [
        summary.index(part)
        for part in (f"Saved {final}", "Summary: ", "Reward: ", f"Newest checkpoint: {final}")
    ]
    assert order == sorted(order)
    num_epochs = 24 * (run - 1) + epoch
    assert f"Summary: {num_epochs} epochs in " in summary
    saved = checkpoint(folder, final.name)
    assert (saved["run"], saved["epoch"]) == (run, epoch)
    assert saved["transitions"] == num_epochs * TRANSITIONS_PER_EPOCH


def test_a_start_after_ctrl_c_goes_on_from_there(interrupted: tuple[Path, Start, Start]) -> None:
    folder, _, _ = interrupted
    run, epoch = epochs_of(folder)[-1]
    again = run_again(folder, epochs=24, checkpoint_every=1000, runs=run + 1)
    assert again.process.returncode == 0, again.output
    assert f"Resuming from {folder}/checkpoints/run{run}_epoch{epoch}.pt" in again.output
    assert epoch == 24 or f"Run {run}: epochs {epoch + 1} to 24" in again.output
    last = run + 1
    assert epochs_of(folder) == [(run, number) for run in range(1, last + 1) for number in range(1, 25)]
    resume = torch.load(folder / "checkpoints" / "resume" / f"run{last}_epoch24.pt", weights_only=True)
    assert resume["learner"]["optimizer_steps"] == last * 24 * STEPS_PER_EPOCH


def test_a_second_daemon_on_the_same_folder_is_refused_with_75(
    interrupted: tuple[Path, Start, Start],
) -> None:
    folder, _, second = interrupted
    assert second.process.returncode == 75
    _, line = second.lines  # after that of loading PyTorch
    assert f"{folder}/checkpoints is written by process " in line
