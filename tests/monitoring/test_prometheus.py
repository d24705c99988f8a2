"""The endpoint over real HTTP, its text read by Prometheus's own parser and by a strict one."""

from __future__ import annotations

import http.client
import json
import math
import re
import socket
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from monitoring.exporters import Endpoint, Telemetry, metric_families

FIGURES = {
    "run": 2,
    "epoch": 7,
    "transitions": 1_000,
    "rollout/reward_bps": -0.25,
    "rollout/in_position_-1": 0.5,
    "rollout/in_position_0.5": 0.25,
    "loss/value": math.nan,
    "loss/policy": None,
    "exam/sharpe": math.inf,
    "time": "2026-11-24",
    "flag": True,
}
ROOT = Path(__file__).parents[2]
SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(\{position="[^"\\\n]*"\})? (NaN|[-+0-9.e]+)')


def get(port: int, path: str = "/metrics") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, answer.headers["Content-Type"], body


def samples(text: str) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels.get("position", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_newest_metrics_are_served() -> None:
    with Endpoint(0) as endpoint:
        endpoint.show({"epoch": 6})
        endpoint.show(FIGURES)
        status, kind, text = get(endpoint.port)
        assert get(endpoint.port, "/") == (status, kind, text)
    assert status == 200 and "version=0.0.4" in kind
    found = samples(text)
    assert found.pop(("continuous_training_last_epoch_timestamp_seconds", "")) > 1.7e9
    not_finite = {name for (name, _), value in found.items() if math.isnan(value)}
    assert not_finite == {
        f"continuous_training_{name}" for name in ("loss_value", "loss_policy", "exam_sharpe")
    }
    assert {key: value for key, value in found.items() if not math.isnan(value)} == {
        ("continuous_training_run", ""): 2,
        ("continuous_training_epoch", ""): 7,
        ("continuous_training_transitions_total", ""): 1_000,
        ("continuous_training_rollout_reward_bps", ""): -0.25,
        ("continuous_training_rollout_in_position", "-1"): 0.5,
        ("continuous_training_rollout_in_position", "0.5"): 0.25,
    }


def test_every_line_follows_the_text_format() -> None:
    with Endpoint(0) as endpoint:
        endpoint.show(FIGURES)
        text = get(endpoint.port)[2]
    assert text.endswith("\n")
    announced = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            announced = line.split()[2]
        elif line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            assert name == announced and kind == ("counter" if name.endswith("_total") else "gauge")
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample and sample[1] == announced, line
    names = re.findall(r"^# TYPE (\S+)", text, re.M)
    assert len(names) == len(set(names)) == 9


def test_it_listens_on_this_machine_only_and_frees_its_port() -> None:
    endpoint = Endpoint(0)
    assert endpoint._server.server_address[0] == "127.0.0.1"
    before = threading.active_count()
    endpoint.close()
    assert threading.active_count() < before
    with Endpoint(endpoint.port) as again:
        assert again.port == endpoint.port


def test_a_silent_client_does_not_delay_others() -> None:
    with Endpoint(0) as endpoint:
        endpoint.show(FIGURES)
        with socket.create_connection(("127.0.0.1", endpoint.port)):
            assert get(endpoint.port)[0] == 200


def test_a_port_that_is_taken_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Endpoint(0) as first:
        telemetry = Telemetry(tmp_path, first.port)
        telemetry.record({"epoch": 1, "transitions": 64})
        telemetry.close()
        assert samples(get(first.port)[2]) == {}
    (warning,) = caplog.messages
    assert str(first.port) in warning
    assert (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("value", ["0", "65536", "-1"])
def test_an_invalid_port_is_rejected(value: str) -> None:
    from continuous_training import Settings

    with pytest.raises(ValueError, match="prometheus_port"):
        Settings(prometheus_port=int(value))


def test_an_exam_stays_until_the_next_one() -> None:
    with Endpoint(0) as endpoint:
        endpoint.show({"epoch": 25, "exam/sharpe": 1.5, "loss/value": 2.0})
        endpoint.show({"epoch": 26})
        found = samples(get(endpoint.port)[2])
    assert found["continuous_training_exam_sharpe", ""] == 1.5
    assert found["continuous_training_epoch", ""] == 26
    assert ("continuous_training_loss_value", "") not in found


def test_the_dashboard_of_grafana_names_only_what_is_exported() -> None:
    board = json.loads((ROOT / "contrib" / "grafana.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("| key | what it is |")[1]
    cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    names = [name.replace("_X", "_1") for cell in cells for name in re.findall("`([^`]+)`", cell)]
    families = metric_families(dict.fromkeys(names, 1.0), 0.0)
    exported = {sample.name for family in families for sample in family.samples}
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [entry["query"]["query"] for entry in board["templating"]["list"] if entry["type"] == "query"]
    used = set(re.findall(r"continuous_training_\w+", " ".join(queries)))
    assert len(used) > 20 and used <= exported
    places = [panel["gridPos"] for panel in board["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
    assert all(place["x"] + place["w"] <= 24 for place in places)
