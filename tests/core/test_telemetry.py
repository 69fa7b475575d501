import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from raysseg.core.telemetry import FIELDS, TOTALS, Telemetry, progress_fields


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """The telemetry's clock."""
    return Clock()


@pytest.fixture
def telemetry(clock: Clock) -> Telemetry:
    """A telemetry that has seen nothing."""
    return Telemetry(clock=clock)


def test_a_window_has_rates_means_and_shares(telemetry: Telemetry, clock: Clock) -> None:
    telemetry.actors(3, 4)
    telemetry.actor_died()
    telemetry.lost(2)
    telemetry.dropped(5)
    telemetry.orders_in_flight(6)
    telemetry.replay(640)
    for lag, age in ((0, 0.5), (1, 1.0), (5, 3.0)):
        telemetry.rollout(8, lag, age)
    telemetry.update(3.0, 0.5, 0.25)
    telemetry.update(3.0, 1.5, 0.5)
    clock.now += 2.0
    assert telemetry.snapshot() == {
        "actors_alive": 3.0,
        "actors_total": 4.0,
        "actor_deaths": 1.0,
        "rollouts_per_second": 1.5,
        "transitions_per_second": 12.0,
        "policy_lag_mean": 2.0,
        "policy_lag_max": 5.0,
        "learner_busy_share": 0.75,
        "learner_idle_share": 0.25,
        "learner_prepare_share": 0.125,
        "rollouts_dropped": 5.0,
        "rollouts_lost": 2.0,
        "weights_age_seconds": 1.5,
        "replay_size": 640.0,
        "orders_in_flight": 6.0,
    }


def test_the_next_window_keeps_totals_and_levels_only(telemetry: Telemetry, clock: Clock) -> None:
    telemetry.actors(2, 2)
    telemetry.actor_died(2)
    telemetry.rollout(8, 3, 1.0)
    telemetry.update(1.0, 1.0, 0.0)
    clock.now += 1.0
    telemetry.snapshot()
    telemetry.actor_died()
    clock.now += 4.0
    assert telemetry.snapshot() == {
        "actors_alive": 2.0,
        "actors_total": 2.0,
        "actor_deaths": 3.0,
        "rollouts_per_second": 0.0,
        "transitions_per_second": 0.0,
        "rollouts_dropped": 0.0,
        "rollouts_lost": 0.0,
    }


def test_a_rate_is_over_the_time_since_the_last_snapshot(telemetry: Telemetry, clock: Clock) -> None:
    clock.now += 50.0
    telemetry.snapshot()
    telemetry.rollout(4, 0, 0.0)
    clock.now += 0.5
    assert telemetry.snapshot()["rollouts_per_second"] == 2.0


def test_without_time_or_data_there_are_the_totals(telemetry: Telemetry) -> None:
    assert telemetry.snapshot() == dict.fromkeys(TOTALS, 0.0)


def test_an_update_that_is_the_first_has_no_idle_time_but_a_share(telemetry: Telemetry, clock: Clock) -> None:
    telemetry.update(2.0, 0.0, 0.0)
    clock.now += 2.0
    snapshot = telemetry.snapshot()
    assert (snapshot["learner_busy_share"], snapshot["learner_idle_share"]) == (1.0, 0.0)


def test_totals_survive_a_resume(telemetry: Telemetry) -> None:
    telemetry.actor_died(2)
    telemetry.dropped(3)
    telemetry.lost(4)
    state = json.loads(json.dumps(telemetry.get_state()))
    resumed = Telemetry()
    resumed.set_state(state)
    resumed.lost(1)
    snapshot = resumed.snapshot()
    assert [snapshot[name] for name in TOTALS] == [2.0, 3.0, 5.0]


def test_progress_says_nothing_without_remote_actors_and_no_drops_where_there_are_none(telemetry: Telemetry) -> None:
    telemetry.rollout(8, 2, 0.1)
    telemetry.update(1.0, 1.0, 0.0)
    assert progress_fields(telemetry.snapshot()) == {}
    telemetry.actors(2, 2)
    telemetry.rollout(8, 2, 0.1)
    telemetry.update(1.0, 3.0, 0.0)
    assert progress_fields(telemetry.snapshot()) == {"actors": "2/2", "lag": 2.0, "busy": 0.25}
    telemetry.dropped(1)
    telemetry.lost(2)
    assert progress_fields(telemetry.snapshot()) == {"actors": "2/2", "drops": 3.0}


@pytest.mark.parametrize("running", [False, True])
def test_instruments_are_made_only_where_ray_runs(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr("ray.is_initialized", lambda: running)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_worker_id=lambda: "worker"))
    instruments = SimpleNamespace(show=lambda snapshot, tags: shown.append(tags))
    monkeypatch.setattr("raysseg.core.telemetry._instruments", lambda worker: instruments)
    tags = {"run": "r", "variant": "v", "seed": "0"}
    telemetry.snapshot()
    telemetry.export(tags)
    assert shown == ([tags] if running else [])


SCRAPE = """
import json, sys, time, urllib.request
import ray
from raysseg.core.telemetry import Telemetry

ray.init(
    num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000,
    _system_config={"metrics_report_interval_ms": 500},
)
tags = {"run": "first", "variant": "eil", "seed": "3"}

def busy(clock):
    telemetry = Telemetry(clock=lambda: clock[0])
    telemetry.actors(3, 4)
    telemetry.actor_died()
    telemetry.dropped(2)
    telemetry.lost(1)
    telemetry.orders_in_flight(5)
    telemetry.replay(64)
    telemetry.rollout(8, 1, 0.5)
    telemetry.update(3.0, 1.0, 1.5)
    clock[0] += 2.0
    telemetry.snapshot()
    return telemetry

first = busy([0.0])
first.export(tags)
first.export(tags)
again = Telemetry()
again.set_state(first.get_state())
again.lost(2)
again.snapshot()
again.export(tags)
node = ray.nodes()[0]
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
found, end = {}, time.monotonic() + 60
while len(found) < int(sys.argv[1]) and time.monotonic() < end:
    time.sleep(0.2)
    try:
        text = urllib.request.urlopen(url, timeout=5).read().decode()
    except OSError:
        continue
    lines = [line for line in text.splitlines() if line.startswith("ray_raysseg_")]
    found = {line.split("{")[0]: line for line in lines}
ray.shutdown()
print(json.dumps(found))
"""
"""A process of its own, because Ray reads how often it reports metrics only when it starts."""


def test_prometheus_finds_every_field_at_the_nodes_metrics_endpoint() -> None:
    if any(importlib.util.find_spec(name) is None for name in ("prometheus_client", "opencensus", "aiohttp_cors")):
        pytest.skip("Ray's metrics agent is not installed; it comes with ray[default]")
    command = [sys.executable, "-c", SCRAPE, str(len(FIELDS))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    lines = json.loads(done.stdout.splitlines()[-1])
    values = {name: float(line.rsplit(" ", 1)[1]) for name, line in lines.items()}
    assert all('run="first"' in line and 'variant="eil"' in line and 'seed="3"' in line for line in lines.values())
    gauges = {
        "actors_alive": 3.0,
        "actors_total": 4.0,
        "rollouts_per_second": 0.5,
        "transitions_per_second": 4.0,
        "policy_lag_mean": 1.0,
        "policy_lag_max": 1.0,
        "learner_busy_share": 0.75,
        "learner_idle_share": 0.25,
        "learner_prepare_share": 0.5,
        "weights_age_seconds": 0.5,
        "replay_size": 64.0,
        "orders_in_flight": 5.0,
    }
    # A run that goes on from its state counts its old totals once.
    counters = {"actor_deaths_total": 1.0, "rollouts_dropped_total": 2.0, "rollouts_lost_total": 3.0}
    expected = {f"ray_raysseg_{name}": value for name, value in {**gauges, **counters}.items()}
    # The second telemetry's rates were said too: its window had no rollouts.
    expected |= {"ray_raysseg_rollouts_per_second": 0.0, "ray_raysseg_transitions_per_second": 0.0}
    assert values == expected


ROOT = Path(__file__).resolve().parents[2]


def dashboard() -> dict[str, Any]:
    """The Grafana dashboard of the repository."""
    found: dict[str, Any] = json.loads((ROOT / "dashboards" / "grafana-raysseg.json").read_text())
    return found


def queries(board: dict[str, Any]) -> dict[str, list[str]]:
    """What each panel asks Prometheus."""
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in panels}


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    board = dashboard()
    ours = {f"ray_raysseg_{name}" + ("_total" if name in TOTALS else "") for name in FIELDS}
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    rays = set(re.findall(r"\bray_\w+", "".join(path.read_text() for path in folder.glob("*.py"))))
    variables = [variable["query"]["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    asked = set(
        re.findall(r"\bray_\w+", " ".join([*variables, *(e for each in queries(board).values() for e in each)]))
    )
    assert ours <= asked, "a field is on no panel"
    assert asked - ours <= rays
    assert {"ray_node_cpu_utilization", "ray_node_gpus_utilization", "ray_object_store_memory", "ray_actors"} <= asked


def test_the_dashboard_can_be_imported() -> None:
    board = dashboard()
    variables = [variable["name"] for variable in board["templating"]["list"]]
    assert variables == ["datasource", "run", "variant", "seed", "instance"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert "id" not in board, "an id would replace another dashboard of the same Grafana"
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all(set(re.findall(r"\$(\w+)", target["expr"])) <= set(variables) for target in panel["targets"])
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_documentation_explains_every_field() -> None:
    text = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    explained = re.findall(
        r"`(\w+)`", " ".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    )
    assert set(FIELDS) <= set(explained)
