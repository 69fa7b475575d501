"""Whether the cluster can hold what a run asks for at the same time, and what an autoscaler may still add."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import ray
from ray.util.placement_group import get_current_placement_group, placement_group, remove_placement_group

from raysseg.core.cluster import Node, living_nodes
from raysseg.errors import InputError

if TYPE_CHECKING:
    from raysseg.core.settings import EngineSettings

logger = logging.getLogger(__name__)

RELEASE_SECONDS = 2.0
"""How long Ray may take to give back the resources of actors that ended."""
REPORT_SECONDS = 10.0
"""How long a cluster that has just started may have no report of its nodes yet."""
GROWTH_PAUSE_SECONDS = 60.0
"""How long an autoscaler may neither add a node nor be about to, before nothing more is expected of it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResourceRequest:
    """Equal processes that a run needs on the cluster at the same time.

    Args:
        count: how many.
        cpus: of each, 0 or more.
        gpus: of each, 0 or more; fractions share a GPU.
        keys: the settings that ask for it, with `{}` where the resource's name stands, as
            `engine.num_env_runners × engine.num_{}_per_env_runner`.
    """

    count: int
    cpus: float
    gpus: float = 0.0
    keys: str

    @property
    def bundle(self) -> dict[str, float]:
        """What one of the processes reserves, by Ray's names."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount > 0}


def requested_resources(engine: EngineSettings, *, learner_gpus: float) -> list[ResourceRequest]:
    """Returns what the engine's remote actors and remote learners reserve; what runs in the driver reserves nothing.

    Args:
        engine: the layout of the run.
        learner_gpus: of each remote learner, `engine.num_gpus_per_learner` with `auto` resolved.
    """
    actors = "engine.num_env_runners × engine.num_{}_per_env_runner"
    learners = "engine.num_learners × engine.num_{}_per_learner"
    return [
        ResourceRequest(
            count=engine.num_env_runners,
            cpus=engine.num_cpus_per_env_runner,
            gpus=engine.num_gpus_per_env_runner,
            keys=actors,
        ),
        ResourceRequest(count=engine.num_learners, cpus=engine.num_cpus_per_learner, gpus=learner_gpus, keys=learners),
    ]


def check_resources(requests: Sequence[ResourceRequest], *, tell: Callable[[str], None] = logger.warning) -> None:
    """Checks that everything a run asks for fits on the cluster, whatever else runs there; an autoscaler is given time.

    Where other jobs hold what is asked for, the run may start and waits for them; `tell` says so.

    Args:
        requests: what the run asks for, all at the same time.
        tell: is given one sentence where the run has to wait for other jobs or for new nodes.

    Raises:
        InputError: naming what is asked for, by which keys, and what exists; or the autoscaler adds nothing more.
    """
    asked = [request for request in requests if request.count > 0 and request.bundle]
    if not asked or get_current_placement_group() is not None:
        return  # A trial of a sweep has reserved what it asks for already.
    nodes = living_nodes()
    lack = _lack(asked, nodes)
    if lack and _autoscaler() is not None:
        tell(f"{lack}; waiting for the autoscaler to add nodes.")
        nodes = _grow(asked)
        lack = _lack(asked, nodes)
    if lack:
        raise InputError(f"{lack}.")
    for name, amount in _total(asked).items():
        free = _free(name, amount)
        if amount > free:
            tell(f"The run asks for {amount:g} {name}s and {free:g} are free now; it waits for other jobs to end.")


def _free(name: str, enough: float) -> float:
    """Returns how much of a resource nobody holds, after a moment in which what actors held that ended comes back."""
    deadline = time.monotonic() + RELEASE_SECONDS
    while (free := ray.available_resources().get(name, 0.0)) < enough and time.monotonic() < deadline:
        time.sleep(0.1)
    return free


def _total(requests: Sequence[ResourceRequest]) -> dict[str, float]:
    """Returns what all requests reserve together, by resource."""
    total: dict[str, float] = {}
    for request in requests:
        for name, amount in request.bundle.items():
            total[name] = total.get(name, 0.0) + request.count * amount
    return total


def _lack(requests: Sequence[ResourceRequest], nodes: Sequence[Node]) -> str:
    """Returns why the requests cannot all be met by the nodes, even were they idle, or nothing where they may be."""
    for name, amount in _total(requests).items():
        existing = sum(node.resources.get(name, 0.0) for node in nodes)
        if amount > existing + 1e-6:
            keys = " + ".join(request.keys.format(f"{name.lower()}s") for request in requests if name in request.bundle)
            return f"The run asks for {amount:g} {name}s ({keys}), but the cluster has {_inventory(nodes, name)}"
    for request in requests:
        places = sum(
            int(min(node.resources.get(name, 0.0) / amount for name, amount in request.bundle.items()) + 1e-6)
            for node in nodes
        )
        if places < request.count:
            each = " and ".join(f"{amount:g} {name}s" for name, amount in request.bundle.items())
            keys = ", ".join(request.keys.format(f"{name.lower()}s") for name in request.bundle)
            have = " and ".join(_inventory(nodes, name) for name in request.bundle)
            return (
                f"The run asks for {request.count} × {each} ({keys}), each on one node, but only {places} of them fit: "
                f"the cluster has {have}"
            )
    return ""


def _inventory(nodes: Sequence[Node], name: str) -> str:
    """Describes the total of one resource and where it is, as `4 CPUs (2 on 10.0.0.1, 2 on 10.0.0.2)`."""
    counts = [(node.resources.get(name, 0.0), node.name) for node in nodes]
    parts = [f"{amount:g} on {where}" for amount, where in counts if amount > 0]
    shown = ", ".join(parts[:8]) + (", …" if len(parts) > 8 else "")
    return f"{sum(amount for amount, _ in counts):g} {name}s" + (f" ({shown})" if parts else "")


# ---- growth ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Autoscaler:
    """What the cluster's autoscaler reports: how many nodes it is starting, and how many are up."""

    coming: int
    running: int


def _autoscaler() -> _Autoscaler | None:
    """Returns the report of the cluster's autoscaler, or None where nobody adds nodes.

    Ray has a report without an autoscaler as well; its node types are then called after the nodes, `node_…`.
    """
    deadline = time.monotonic() + REPORT_SECONDS
    while not (running := (report := _report())[0]) and time.monotonic() < deadline:
        time.sleep(0.2)
    if all(name.startswith("node_") for name in running):
        return None
    return _Autoscaler(coming=report[1], running=len(running))


def _report() -> tuple[list[str], int]:
    """Returns the type of every node that is up, and how many nodes are coming."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    if is_autoscaler_v2():
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        running = [node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)]
        coming = len(status.pending_nodes) + sum(launch.count for launch in status.pending_launches)
    else:
        # Not through ray.experimental.internal_kv, which forgets its client when another cluster of this process ends.
        status = ray._private.worker.global_worker.gcs_client.internal_kv_get(b"__autoscaling_status", None)
        report = (json.loads(status or b"{}") or {}).get("autoscaler_report") or {}
        running = [name for name, count in (report.get("active_nodes") or {}).items() for _ in range(count)]
        coming = len(report.get("pending_nodes") or ()) + sum((report.get("pending_launches") or {}).values())
    return running, coming


def _grow(requests: Sequence[ResourceRequest]) -> list[Node]:
    """Asks the autoscaler for what is missing, and waits as long as it adds nodes; returns the nodes there are then."""
    bundles = [request.bundle for request in requests for _ in range(request.count)]
    group = placement_group(bundles, strategy="PACK")
    try:
        deadline = time.monotonic() + GROWTH_PAUSE_SECONDS
        before: _Autoscaler | None = None
        while True:
            nodes, report = living_nodes(), _autoscaler()
            if not _lack(requests, nodes) or time.monotonic() > deadline:
                return nodes
            if report is not None and (report.coming or report != before):
                deadline = time.monotonic() + GROWTH_PAUSE_SECONDS
            before = report
            time.sleep(1.0)
    finally:
        remove_placement_group(group)
