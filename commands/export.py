"""The command ``export``: a folder that holds a policy and none of our code.

``model.safetensors`` holds the weights, ``card.json`` describes them, ``example.py`` shows how to act on bars.
``--onnx`` adds the network as a graph for other runtimes. The folder appears only after all of it was checked.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from commands.version import program_version
from evaluation.measures import jsonable
from evaluation.provenance import members_of, minute_of
from evaluation.trained_policy import Actor, TrainedPolicy, feature_probe, feature_schema, stem_of
from models.ensemble import Decider, Ensemble
from models.exported import CARD, ENSEMBLE_FORMAT, FORMAT, WEIGHTS, ExportError, load_policy
from models.own import OWN_FILE
from models.policy import Policy
from runtime.files import TEMPORARY_SUFFIX, make_folder, remove_empty, sha256_of, sync_file, sync_folder

# Of one machine, so not in the card.
FOLDERS = ("checkpoint_dir", "data_dir", "log_dir", "report_dir", "files_dir", "mirror", "web_host")
GRAPHS = ("policy.pt2", "policy.onnx")  # torch.export's and ONNX
# Of a graph's logits and values from those of the network, relative to the largest.
MAX_DIFFERENCE = 1e-3

EXAMPLE = '''"""Act on a table of minute bars with this policy. Run it in the program's folder:

    python {folder}/example.py bars.csv BTCUSDT crypto
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path.cwd()))
from data_sources.bars import bars_of_frame
from evaluation.trained_policy import Actor
from models import load_policy

file, symbol, asset_class = sys.argv[1:]  # the class: crypto, perpetual or stock
frame = pd.read_csv(file)  # open_time (UTC), open, high, low, close, volume: closed minutes, oldest first
folder = Path(__file__).parent
actor = Actor.with_card(load_policy(folder), folder)
decisions, unavailable = actor.decide([bars_of_frame(frame, symbol, asset_class)])
for decision in decisions:
    target, probability = decision.when_holding(0.0)
    print(f"{{decision.symbol}}: {{target:+g}} of equity from the next open on, probability {{probability:.3f}}")
for name, reason in unavailable.items():
    print(f"{{name}}: no decision, {{reason}}")
'''

EXAMPLE_OF_GROUPS = '''"""Act on tables of minute bars of a group's symbols. Run it in the program's folder:

    python {folder}/example.py crypto BTCUSDT=btc.csv ETHUSDT=eth.csv ...
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path.cwd()))
from data_sources.bars import bars_of_frame
from evaluation.group_decisions import decide_groups
from evaluation.trained_policy import Actor
from models import load_policy

asset_class, *files = sys.argv[1:]  # the class: crypto, perpetual or stock
# open_time (UTC), open, high, low, close, volume: closed minutes, oldest first
frames = {{symbol: pd.read_csv(file) for symbol, file in (given.split("=") for given in files)}}
bars = [bars_of_frame(frame, symbol, asset_class) for symbol, frame in frames.items()]
folder = Path(__file__).parent
actor = Actor.with_card(load_policy(folder), folder)
found, unavailable = decide_groups(actor, bars, others=[], holdings={{}})
for each in found:
    target, probability = each.decision.when_holding(0.0)
    odds = f"probability {{probability:.3f}}"
    print(f"{{each.group}}, {{each.decision.symbol}}: {{target:+g}}, {{odds}}, {{each.weight:+.3f}} of equity")
for name, reason in unavailable.items():
    print(f"{{name}}: no decision, {{reason}}")
'''

README = """---
tags: [reinforcement-learning, trading, ppo]
---
# {name}

An exported trading policy. It places no orders and promises no profit; `card.json` has the results of its exam, if
there was one.

| file | what |
|---|---|
| `model.safetensors` | the weights, float32 |
| `card.json` | sizes, settings, features with their scale, symbols, data, exam |
| `example.py` | loads it and acts on a CSV of bars; needs the program that exported it |
{own_model}{graphs}
{positions} A decision rests on the newest closed bar and
is meant to fill at the next bar's open.
"""
POSITIONS = "A position is a fraction of equity: -1 is short, 0 cash, 1 all of it."
POSITIONS_OF_GROUPS = """An account is over a group of {size} symbols. A position of 1 asks for {share:g} of
its equity, -1 for as much short. Then the heavier side is scaled down until longs and shorts differ by {net:g} of
equity at most, and all until they add up to {gross:g} at most. These caps belong to the account, not to the
network: `envs.group_account.project` has them."""

OWN_ROW = """| `own_model.py` | its network; put it into that program's folder `models/` before you use it |
"""

GRAPH_ROWS = """| `policy.pt2`, `policy.onnx` | the network as a graph: `torch.export.load`, ONNX Runtime |

The graphs take `bars` (segments, bars, {num_features}), normalised features{scales} of {shortest} to
{longest} bars, the newest one last, and `accounts` (segments, 1, {num_account_features}). They return `logits`
(segments, 1, {num_positions}) over the positions {positions}, and `value` (segments, 1).
"""


def command(
    trained: TrainedPolicy, output: Path | None, with_graphs: bool, log: Callable[[str], None]
) -> Path:
    """Export a checkpoint to a folder, which appears only when it is complete and checked.

    Args:
        trained: the policy, on any device.
        output: the folder; ``exports/NAME`` when None. An earlier export there is replaced.
        with_graphs: also write the network as graphs for torch.export and ONNX.
        log: receives lines about the export.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds something else or cannot be written, or a library is missing.
        ExportError: the exported files compute something else than the checkpoint.
    """
    output = output or Path("exports") / stem_of(trained.names)
    is_empty = output.is_dir() and not any(output.iterdir())
    if output.exists() and not is_empty and not (output / CARD).is_file():
        raise ValueError(f"{output} exists and is not an export: choose another with --output")
    output = output.absolute()
    temporary = output.with_name(f".{output.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    made: list[Path] = []
    try:
        _, *made = make_folder(temporary)
        _write(trained, temporary, output, with_graphs, log)
        for path in temporary.iterdir():
            with path.open("rb") as file:
                sync_file(file, output.parent)
        _replace_folder(temporary, output)
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        remove_empty(made)
    return output


def _write(
    trained: TrainedPolicy, folder: Path, output: Path, with_graphs: bool, log: Callable[[str], None]
) -> None:
    policy = _on_cpu(trained)
    save_file({name: tensor.contiguous() for name, tensor in policy.state_dict().items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes it private
    card = card_of(trained) | {"weights_sha256": sha256_of(folder / WEIGHTS)}
    (folder / CARD).write_text(json.dumps(card, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    graph_rows = ""
    if with_graphs:
        for name, difference in write_graphs(policy, folder).items():
            log(f"{name} differs from the checkpoint by {difference:.1e} at most")
        sizes = {
            "num_features": policy.num_features,
            "num_account_features": policy.num_account_features,
            "num_positions": len(card["accounts"]["positions"]),
            "scales": ", by each scale of `card.json` in turn," if trained.statistics.mean.dim() > 1 else "",
            "shortest": policy.min_length,
            "longest": policy.max_length,
        }
        positions = ", ".join(f"{position:g}" for position in card["accounts"]["positions"])
        graph_rows = GRAPH_ROWS.format(**sizes, positions=positions)
    own_row = ""
    if any("own_model" in part.policy.sizes for part in trained.parts) and OWN_FILE.exists():
        shutil.copy(OWN_FILE, folder / OWN_FILE.name)
        own_row = OWN_ROW
    name = f"{trained.name.replace('.pt', '')}, exported {card['exported'][:10]}"
    group = trained.env_config(1).group
    words = POSITIONS_OF_GROUPS.format(**asdict(group), share=group.share) if group else POSITIONS
    readme = README.format(name=name, own_model=own_row, graphs=graph_rows, positions=words)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    example = EXAMPLE_OF_GROUPS if group else EXAMPLE
    (folder / "example.py").write_text(example.format(folder=_as_argument(output)), encoding="utf-8")
    reloaded = Actor.with_card(load_policy(folder), folder).policy  # as a user's program will
    if difference := _largest_difference(policy, reloaded):
        raise ExportError(f"{WEIGHTS} differs from the checkpoint by {difference:g}; nothing was exported")


def _as_argument(output: Path) -> str:
    """Return a folder relative to the current one; only its name where it is elsewhere."""
    try:
        return output.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return output.name


def _on_cpu(trained: TrainedPolicy) -> Decider:
    """Return the policy in float32 on the CPU, where every runtime can be compared with it."""
    policy: Decider
    if trained.members:
        policy = Ensemble.from_sizes(_sizes_of(trained), lambda wanted: "fp32")
    else:
        policy = Policy.from_sizes(trained.policy.sizes)
    policy.load_state_dict(trained.policy.state_dict())
    return policy.eval()


def _replace_folder(temporary: Path, output: Path) -> None:
    old = output.with_name(f"{temporary.name}-old")
    if output.exists():
        output.replace(old)
    temporary.replace(output)
    sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sizes_of(trained: TrainedPolicy) -> dict[str, Any]:
    """Return the sizes of an ensemble's networks, each with the precision of its training."""
    parts = zip(trained.policy.sizes["members"], trained.parts, strict=True)
    return {"members": [sizes | {"precision": part.settings.precision} for sizes, part in parts]}


def card_of(trained: TrainedPolicy) -> dict[str, Any]:
    """Return everything known about a policy as plain types; of an ensemble the parts of each member in a list."""
    statistics = trained.statistics
    accounts = asdict(trained.env_config(1))
    del accounts["num_envs"]
    if accounts["group"] is None:  # as before there were groups
        del accounts["group"]
    members = [_member_card(*given) for given in zip(trained.parts, members_of(trained), strict=True)]
    if trained.members:
        own = {"checkpoint": trained.name, "model": _sizes_of(trained), "members": members}
    else:
        own = members[0] | {"model": trained.policy.sizes | {"precision": trained.settings.precision}}
    return {
        "format": ENSEMBLE_FORMAT if trained.members else FORMAT,
        "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        "program": {
            "version": program_version(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        **own,
        "accounts": accounts,
        "features": {
            "schema_sha256": feature_schema(statistics.names),
            "names": list(statistics.names),
            "mean": statistics.mean.tolist(),
            "std": statistics.std.tolist(),
            "probe": feature_probe(statistics.names),
        },
        "symbols": list(trained.symbols),
        "trained_until": minute_of(trained.newest.trained_until_ns),
    }


def _member_card(trained: TrainedPolicy, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of one checkpoint."""
    checkpoint = trained.checkpoint
    figures = {name: value for name, value in checkpoint.metrics.items() if name.startswith("exam/")}
    cutoff = datetime.fromtimestamp(checkpoint.data_cutoff_ns // 10**9, UTC)
    return {
        **known,
        "data": {"fingerprint": checkpoint.data_fingerprint, "cutoff": cutoff.isoformat()},
        "exam": jsonable(checkpoint.exam or figures) or None,
        "settings": {name: value for name, value in checkpoint.config.items() if name not in FOLDERS},
    }


# --- graphs ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def write_graphs(policy: Decider, folder: Path) -> dict[str, float]:
    """Write the policy (float32 on the CPU) as graphs for torch.export and ONNX, and run both.

    Returns:
        The largest difference from the policy for each file, over segments of several lengths.

    Raises:
        ValueError: a library is missing.
        ExportError: a graph computes something else.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise ValueError("--onnx needs: pip install onnx onnxscript onnxruntime") from error
    shortest, longest = policy.min_length, policy.max_length
    shapes = {
        "bars": {
            0: torch.export.Dim("segments", min=1),
            1: torch.export.Dim("bars", min=shortest, max=longest),
        },
        "accounts": {0: torch.export.Dim("segments", min=1)},
    }
    # The exporter warns about its own internals.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(policy, _inputs(policy, 2, longest - 1), dynamic_shapes=shapes)
        torch.export.save(program, folder / GRAPHS[0])
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["bars", "accounts"],
            output_names=["logits", "value"],
            verbose=False,
        )
        assert onnx_program is not None
        onnx_program.save(folder / GRAPHS[1])
        module = torch.export.load(folder / GRAPHS[0]).module()
    session = onnxruntime.InferenceSession(folder / GRAPHS[1], providers=["CPUExecutionProvider"])

    def by_onnx(bars: Tensor, accounts: Tensor) -> tuple[Tensor, Tensor]:
        logits, value = session.run(None, {"bars": bars.numpy(), "accounts": accounts.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(value)

    runners: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        GRAPHS[0]: module, GRAPHS[1]: by_onnx,
    }  # fmt: skip
    differences = {name: _largest_difference(policy, run) for name, run in runners.items()}
    for name, difference in differences.items():
        if not difference <= MAX_DIFFERENCE:
            raise ExportError(
                f"{name} differs from the checkpoint by {difference:g}, more than {MAX_DIFFERENCE:g}; nothing "
                "was exported. Without --onnx the weights can still be exported"
            )
    return differences


def _inputs(policy: Decider, num_segments: int, num_bars: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random bars, and account observations at the last one."""
    generator = torch.Generator().manual_seed(seed)
    bars = torch.randn(num_segments, num_bars, policy.num_features, generator=generator)
    return bars, torch.randn(num_segments, 1, policy.num_account_features, generator=generator)


@torch.no_grad()
def _largest_difference(policy: Decider, run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> float:
    shortest, longest = policy.min_length, policy.max_length
    largest = 0.0
    for seed, (num_segments, num_bars) in enumerate(((1, longest), (3, longest - 1), (2, shortest))):
        inputs = _inputs(policy, num_segments, num_bars, seed)
        for expected, output in zip(policy(*inputs), run(*inputs), strict=True):
            scale = max(1.0, float(expected.abs().max()))
            # Values that are not finite count as different.
            largest = max(largest, float((expected - output).abs().nan_to_num(nan=torch.inf).max()) / scale)
    return largest
