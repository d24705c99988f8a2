"""What a file of TensorBoard events begins with: settings, as text and hyperparameters, and a layout of charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING

SETTINGS = "settings"
# Of the tab Custom Scalars: category -> chart -> metrics. Three with the ends of an interval are a line in a band.
LAYOUT: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Reward": {
        "reward, bp per bar": ("rollout/reward_bps",),
        "share of costs charged, turnover": ("rollout/cost_scale", "rollout/turnover"),
    },
    "Exams, on held-out days": {
        "return, %": ("exam/return_percent", "exam/buy_and_hold_percent", "exam/champion_percent"),
        "mean day, bps": ("exam/daily_bps", "exam/daily_bps_low", "exam/daily_bps_high"),
        "Sharpe": ("exam/sharpe", "exam/sharpe_low", "exam/sharpe_high"),
        "break-even cost, bps": ("exam/break_even_bps",),
    },
    "Record, on days that came later": {
        "return, %": ("record/return_percent", "record/buy_and_hold_percent"),
        "mean day, bps": ("record/daily_bps", "record/daily_bps_low", "record/daily_bps_high"),
    },
    "Learning": {
        "KL": ("ppo/approx_kl", "ppo/first_kl"),
        "share clipped": ("ppo/clip_fraction",),
        "entropy": ("loss/entropy",),
        "explained variance": ("ppo/explained_variance",),
        "gradient norm": ("ppo/grad_norm",),
        "losses": ("loss/policy", "loss/value"),
    },
    "Speed": {
        "transitions per second": ("perf/transitions_per_second",),
        "seconds": ("perf/rollout_seconds", "perf/update_seconds", "perf/evaluation_seconds"),
    },
}  # fmt: skip
# By which trainings are compared in the tab HParams.
COMPARED = ("exam/daily_bps", "exam/sharpe", "rollout/reward_bps")


def head_of(settings: Mapping[str, Any], name: str) -> list[Summary]:
    """Return the summaries of a training with these settings, which have no secrets in them."""
    from tensorboard.plugins.hparams import summary_v2  # a quarter of a second

    plain = {
        key: value if isinstance(value, bool | int | float) else _text(value)
        for key, value in settings.items()
    }
    metrics = [summary_v2.Metric(tag) for tag in COMPARED]
    return [
        Summary.FromString(summary_v2.hparams_config_pb([], metrics).SerializeToString()),
        Summary.FromString(summary_v2.hparams_pb(plain, trial_id=name).SerializeToString()),
        _of_plugin(SETTINGS, "text", _table(settings)),
        _of_plugin("custom_scalars__config__", "custom_scalars", _layout()),
    ]


def _layout() -> bytes:
    from tensorboard.plugins.custom_scalar import layout_pb2 as pb

    layout = pb.Layout()
    for title, charts in LAYOUT.items():
        category = layout.category.add(title=title)
        for name, tags in charts.items():
            chart = category.chart.add(title=name)
            middle, *ends = tags
            if ends == [f"{middle}_low", f"{middle}_high"]:
                chart.margin.series.add(value=middle, lower=ends[0], upper=ends[1])
            else:
                chart.multiline.tag.extend(f"^{tag}$" for tag in tags)  # regular expressions
    return layout.SerializeToString()


def _table(settings: Mapping[str, Any]) -> bytes:
    rows = (f"| {key} | {_text(value)} |" for key, value in settings.items())
    return "\n".join(["| setting | value |", "|---|---|", *rows]).encode()


def _text(value: Any) -> str:
    return (
        "not set" if value is None else ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    )


def _of_plugin(tag: str, plugin: str, content: bytes) -> Summary:
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))
    tensor = TensorProto(dtype=DT_STRING, string_val=[content])
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])
