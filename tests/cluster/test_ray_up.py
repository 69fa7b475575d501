"""`ray up`, `ray submit` and `ray down` with cluster.yaml, over ssh, on two hosts."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from algorithms.tiny_eil import VALUES, changed
from cluster.machines import REPOSITORY, Machines

RAY = str(Path(sys.prefix) / "bin" / "ray")
SUBMIT = "raysseg/cli/submit.py"

pytestmark = pytest.mark.slow


def edited(machines: Machines) -> dict[str, Any]:
    """Returns cluster.yaml as a user with two hosts edits it, with one change more: instead of installing anything, the
    hosts, which share this machine's files, take the Python that runs the tests.
    """
    config = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    config["provider"] |= {"head_ip": "10.77.0.2", "worker_ips": ["10.77.0.3"]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(machines.key)}
    config["initialization_commands"] = [f"mkdir -p {machines.storage} && test -w {machines.storage}"]
    install, environment = config["setup_commands"]
    assert "pip install" in install
    config["setup_commands"] = [f"ln -sfn {sys.prefix} ~/.raysseg/venv", environment]
    return config


@pytest.fixture(scope="module")
def cluster(machines: Machines) -> Iterator[str]:
    """The path of a cluster file whose cluster is up."""
    path = machines.folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(edited(machines)))
    done = machines.on_laptop(RAY, "up", "-y", str(path))
    assert done.returncode == 0, done.stdout
    yield str(path)
    done = machines.on_laptop(RAY, "down", "-y", str(path))
    assert done.returncode == 0, done.stdout
    assert "raylet" not in machines.on_host(2, "ps -e -o comm=").stdout


def settings(**changes: Any) -> list[str]:
    """Returns `--set key=value` for every value of the small EIL."""

    def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    values = changed(VALUES, {key.replace("__", "."): value for key, value in changes.items()})
    return [
        part
        for key, value in leaves(values)
        for part in ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}")
    ]


def asking(count: int) -> str:
    """Returns a command for the head that checks whether `count` actors fit, each taking more than half of a host."""
    cpus = 0.6 * (os.cpu_count() or 1)
    program = (
        "from raysseg.core import capacity as c, cluster; cluster.start_ray(); c.GROWTH_PAUSE_SECONDS = 10\n"
        f"c.check_resources([c.ResourceRequest(count={count}, cpus={cpus}, keys='key')], tell=lambda s: print('TOLD', s))\n"
        "print('NODES', len(cluster.living_nodes()))"
    )
    return f". ~/.raysseg/env; RAY_ADDRESS=auto python -c {shlex.quote(program)}"


def test_a_run_waits_for_workers_that_are_coming(machines: Machines, cluster: str) -> None:
    done = machines.on_host(2, asking(2))
    assert done.returncode == 0, done.stdout
    assert "waiting for the autoscaler" in done.stdout
    assert "NODES 2" in done.stdout


def test_no_run_waits_for_workers_that_never_come(machines: Machines, cluster: str) -> None:
    done = machines.on_host(2, asking(3))
    assert "InputError: The run asks for" in done.stdout
    assert "on 10.77.0.2" in done.stdout
    assert "on 10.77.0.3" in done.stdout
    assert "NODES" not in done.stdout


def test_submit_trains_on_both_hosts(machines: Machines, cluster: str) -> None:
    # An actor asks for more than half of a host, so that each host must take one of the two.
    cpus = 0.6 * (os.cpu_count() or 1)
    done = machines.on_laptop(
        *(RAY, "submit", cluster, SUBMIT, "train", "eil-synthetic", "--variants", "ps+pa"),
        *settings(training__pretrain_epochs=0, engine__num_env_runners=2, engine__num_cpus_per_env_runner=cpus),
        *("--run-dir", str(machines.storage / "first")),
    )
    assert done.returncode == 0, done.stdout
    variant = machines.storage / "first" / "variants" / "ps+pa" / "seed-0"
    assert json.loads((variant / "summary.json").read_text())["complete"]
    assert (machines.storage / "first" / "report.html").is_file()
    assert machines.actors(2) > 0
    assert machines.actors(3) > 0


def test_bad_input_ends_submit_with_its_sentence(machines: Machines, cluster: str) -> None:
    done = machines.on_laptop(RAY, "submit", cluster, SUBMIT, "train", "eil-syntetic")
    assert done.returncode != 0
    assert "Unknown recipe 'eil-syntetic'; did you mean 'eil-synthetic'?" in done.stdout


def test_a_persons_shell_on_the_hosts_is_left_alone(machines: Machines, cluster: str) -> None:
    path = machines.on_host(2, "bash --login -i -c 'echo $PATH'").stdout
    assert "/usr/bin" in path
    assert ".raysseg" not in path
    chosen = machines.on_host(2, ". ~/.raysseg/env; command -v python raysseg").stdout.split()
    assert chosen == ["/root/.raysseg/venv/bin/python", "/root/.raysseg/venv/bin/raysseg"]


def test_the_cluster_wants_its_token(machines: Machines, cluster: str) -> None:
    train = "RAY_ADDRESS=10.77.0.2:6379 ~/.raysseg/venv/bin/python -c 'from raysseg.core.cluster import start_ray as s; s()'"
    assert "wants another token" in machines.on_host(2, train).stdout
    assert machines.on_host(2, f". ~/.raysseg/env; {train}").returncode == 0


def test_a_ray_job_trains(machines: Machines, cluster: str) -> None:
    recipe = machines.storage / "job.yaml"
    changes = {"training.pretrain_epochs": 0, "eil.stages": 1, "engine.num_env_runners": 1}
    recipe.write_text(yaml.safe_dump({**changed(VALUES, changes), "variants": {"run": {}}}))
    job = f"raysseg train {recipe} --run-dir {machines.storage}/job"
    done = machines.on_laptop(RAY, "exec", cluster, f"ray job submit --address http://127.0.0.1:8265 -- {job}")
    assert done.returncode == 0, done.stdout
    assert "succeeded" in done.stdout
    assert (machines.storage / "job" / "variants" / "run" / "seed-0" / "summary.json").is_file()
