"""A node that is gone without a word, on a cluster of this test's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import ray
from faults.conftest import Laboratory, Script, processes, wait_until
from ray._common.utils import reset_ray_address
from ray.cluster_utils import Cluster

from raysseg.algorithms.eil.algorithm import EIL

pytestmark = pytest.mark.slow

UPDATES = 60

HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""Ray's settings for noticing a dead node within seconds; as environment variables on a real cluster's head."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without room for actors; what this process was connected to before is there again afterwards."""
    before = ray.is_initialized()
    ray.shutdown()
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": HEALTH, "object_store_memory": 2 << 30}
    )
    # Else whoever starts Ray on this machine without an address joins this cluster.
    reset_ray_address()
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()
    if before:
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=2 << 30,
            include_dashboard=False,
            log_to_driver=False,
        )


def node_of(process: int, algorithm: EIL) -> str:
    """Returns the id of the node that runs a process of an actor."""
    handles = algorithm.env_runner_group._worker_manager.actors()
    where = [handle.apply.remote(lambda runner: ray.get_runtime_context().get_node_id()) for handle in handles.values()]
    return dict(zip(processes(algorithm).values(), ray.get(where), strict=True))[process]


def test_a_lost_node_costs_only_what_was_under_way_there(
    cluster: Cluster, make_laboratory: Callable[..., Laboratory]
) -> None:
    lab = make_laboratory()
    nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1))}
    seen: dict[str, float] = {}

    def script() -> Script:
        algorithm = yield
        while algorithm.record["phase"] != "explore" or algorithm.record["update"] < 3:
            algorithm = yield
        actor, process = max(processes(algorithm).items())
        home = nodes[node_of(process, algorithm)]
        seen["with it"] = yield from lab.hold(algorithm, actor, process)
        cluster.remove_node(home, allow_graceful=False)
        removed = time.monotonic()
        while lab.telemetry()[-1]["actors_alive"] == 2:
            time.sleep(0.5)
            algorithm = yield
        seen["noticed"] = time.monotonic() - removed
        noticed = algorithm.policy_version
        while algorithm.policy_version < noticed + 4:
            algorithm = yield
        seen["alive"] = lab.telemetry()[-1]["actors_alive"]
        cluster.add_node(num_cpus=1)
        wait_until(lambda: len(lab.log("started")) == 3, "the actor's return on another node")
        while algorithm.record["phase"] == "explore":
            time.sleep(0.1)
            algorithm = yield
            seen["alive at the end"] = lab.telemetry()[-1]["actors_alive"]

    lab.run(
        script(),
        engine__mode="asynchronous",
        engine__num_env_runners=2,
        engine__num_cpus_per_env_runner=1.0,
        engine__stall_seconds=1000.0,
        eil__exploration__updates_per_stage=UPDATES,
    )
    assert seen["noticed"] < 60, "Ray's own settings take longer than a minute"
    assert seen["alive"] == 1
    assert seen["alive at the end"] == 2
    last = lab.telemetry()[-1]
    assert 1 <= seen["with it"] <= last["rollouts_lost"] <= 2, "an actor has at most two orders"
    assert last["actor_deaths"] == 1
    assert len({row["process"] for row in lab.log("sample")}) == 3, "the actor works again on another node"
    numbers = lab.played()
    assert numbers == list(range(len(numbers)))
    assert [row["update"] for row in lab.metrics() if row["phase"] == "explore"] == list(range(1, UPDATES + 1))
