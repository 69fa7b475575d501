"""Connecting to a cluster, and the checks before the first actor starts: on real nodes, each driver in a process of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from raysseg.core import cluster as subject
from raysseg.core.capacity import ResourceRequest, _lack, requested_resources
from raysseg.core.cluster import Node, check_storage, check_versions, start_ray
from raysseg.core.settings import EngineSettings
from raysseg.errors import InputError

SMALL: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False}


# ---- addresses ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process look like one that is not connected; what is refused here never gets as far as Ray."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("address", ["head", "http://127.0.0.1:8265", "ray://127.0.0.1:10001", "127.0.0.1:", ":6379"])
def test_what_is_no_address_is_refused(address: str, no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=f"RAY_ADDRESS is '{address}'; expected is 'auto' .* or the head's host:port"):
        start_ray()


def test_an_address_where_nobody_listens_is_refused_at_once(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=f"RAY_ADDRESS is '{address}', but nothing answers there .Connection refused"):
        start_ray()


def test_a_port_of_another_server_is_refused(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                connection.recv(64)

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(InputError, match="what answers there is not Ray's head"):
            start_ray()
        thread.join()


def test_auto_where_the_last_cluster_is_gone(tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(InputError, match=f"RAY_ADDRESS is 'auto' .which means .*:{port} here., but nothing answers"):
        start_ray()
    (tmp_path / "ray" / "ray_current_cluster").unlink()
    with pytest.raises(InputError, match="RAY_ADDRESS is 'auto', but no Ray runs on this machine"):
        start_ray()


# ---- what fits ------------------------------------------------------------------------------------------------------


def nodes(*totals: dict[str, float]) -> list[Node]:
    """Returns nodes with these resources."""
    return [
        Node(identifier=f"{number:x}", name=f"10.0.0.{number}", resources=total)
        for number, total in enumerate(totals, start=1)
    ]


def test_more_than_there_is_names_the_keys_and_what_exists() -> None:
    engine = EngineSettings(num_env_runners=4, num_cpus_per_env_runner=2, num_learners=1, num_gpus_per_env_runner=0.5)
    asked = requested_resources(engine, learner_gpus=1)
    assert _lack(asked, nodes({"CPU": 8, "GPU": 2}, {"CPU": 2, "GPU": 1})) == ""
    assert _lack(asked, nodes({"CPU": 4, "GPU": 3}, {"CPU": 2})) == (
        "The run asks for 9 CPUs (engine.num_env_runners × engine.num_cpus_per_env_runner + engine.num_learners × "
        "engine.num_cpus_per_learner), but the cluster has 6 CPUs (4 on 10.0.0.1, 2 on 10.0.0.2)"
    )
    assert _lack(asked, nodes({"CPU": 16})) == (
        "The run asks for 3 GPUs (engine.num_env_runners × engine.num_gpus_per_env_runner + engine.num_learners × "
        "engine.num_gpus_per_learner), but the cluster has 0 GPUs"
    )


def test_what_fits_in_sum_but_on_no_node_is_refused() -> None:
    asked = [ResourceRequest(count=3, cpus=1.5, gpus=0.5, keys="a × {}")]
    lack = _lack(asked, nodes({"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}, {"CPU": 2}))
    assert lack == (
        "The run asks for 3 × 1.5 CPUs and 0.5 GPUs (a × cpus, a × gpus), each on one node, but only 2 of them fit: the cluster "
        "has 6 CPUs (2 on 10.0.0.1, 2 on 10.0.0.2, 2 on 10.0.0.3) and 2 GPUs (1 on 10.0.0.1, 1 on 10.0.0.2)"
    )


def test_a_run_in_one_process_asks_for_nothing() -> None:
    assert _lack(requested_resources(EngineSettings(), learner_gpus=1.0), nodes({"CPU": 1})) == ""


# ---- nodes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """The environment of nodes and drivers that other Rays of this machine cannot find, nor be found by."""
    folder = tempfile.mkdtemp(prefix="raysseg-")  # a socket's path must be short, which pytest's folders are not
    yield {**{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}, "RAY_TMPDIR": folder}
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def two_nodes(environment: dict[str, str]) -> Iterator[Cluster]:
    """A head and one more node, both with two CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", environment["RAY_TMPDIR"])
        cluster = Cluster(initialize_head=True, head_node_args=SMALL)
    try:
        cluster.add_node(**SMALL)
        yield cluster
    finally:
        cluster.shutdown()


def driver(cluster: Cluster, environment: dict[str, str], program: str) -> str:
    """Returns what a driver prints that is connected to the cluster; an `InputError` it prints as its sentence."""
    lines = "\n    ".join(program.strip().splitlines())
    text = (
        "from pathlib import Path\nimport ray\nfrom raysseg.core.capacity import *\nfrom raysseg.core.cluster import *\n"
        f"from raysseg.errors import InputError\ntry:\n    {lines}\n    print('passed')\n"
        "except InputError as error:\n    print('refused:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", text],
        # Workers look for packages in the driver's working directory first; the repository there would hide what a node has.
        cwd=environment["RAY_TMPDIR"],
        env={**environment, "RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nodes_that_are_equal_and_see_the_run_pass(
    two_nodes: Cluster, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "store.json").write_text("{}")
    program = f"""
start_ray()
assert len(living_nodes()) == 2 and living_nodes()[0].identifier == ray.get_runtime_context().get_node_id()
check_versions()
check_storage(Path({str(tmp_path)!r}), {str(tmp_path)!r})
check_storage(Path({str(tmp_path)!r}), {tmp_path.as_uri()!r})
check_resources([ResourceRequest(count=2, cpus=1.5, keys="key")])"""
    assert driver(two_nodes, environment, program) == "passed\n"
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]


def test_more_than_the_cluster_has_is_refused(two_nodes: Cluster, environment: dict[str, str]) -> None:
    program = 'start_ray(); check_resources([ResourceRequest(count=3, cpus=1.5, keys="engine.num_{}")])'
    output = driver(two_nodes, environment, program)
    assert output.startswith("refused: The run asks for 4.5 CPUs (engine.num_cpus), but the cluster has 4 CPUs (2 on ")


def test_what_another_job_holds_is_said(two_nodes: Cluster, environment: dict[str, str]) -> None:
    program = """
start_ray()
held = ray.util.placement_group([{"CPU": 1}])
ray.get(held.ready())
check_resources([ResourceRequest(count=4, cpus=1, keys="key")], tell=print)"""
    assert driver(two_nodes, environment, program) == (
        "The run asks for 4 CPUs and 3 are free now; it waits for other jobs to end.\npassed\n"
    )


def test_a_node_with_another_raysseg_is_named(two_nodes: Cluster, environment: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "raysseg-9.9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: raysseg\nVersion: 9.9.9\n")
    odd = two_nodes.add_node(**SMALL, node_name="odd", env_vars={"PYTHONPATH": str(tmp_path)})
    try:
        output = driver(two_nodes, environment, "start_ray(); check_versions()")
    finally:
        two_nodes.remove_node(odd)
    assert output.count(" has ") == 1
    assert "(odd) has raysseg 9.9.9 instead of " in output


def test_a_node_with_other_source_files_is_named(
    two_nodes: Cluster, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "raysseg").mkdir()
    (tmp_path / "raysseg" / "__init__.py").write_text("")
    odd = two_nodes.add_node(**SMALL, node_name="odd", env_vars={"PYTHONPATH": str(tmp_path)})
    try:
        output = driver(two_nodes, environment, "start_ray(); check_versions()")
    finally:
        two_nodes.remove_node(odd)
    assert "(odd) has raysseg's source files " in output


def test_a_driver_with_another_ray_gets_one_sentence(two_nodes: Cluster, environment: dict[str, str]) -> None:
    output = driver(two_nodes, environment, "ray.__version__ = '2.1.0'\nstart_ray()")
    assert output.startswith(f"refused: The cluster at {two_nodes.address} has Ray {ray.__version__} and Python 3.")
    assert "but this process has Ray 2.1.0 and Python 3." in output


def test_without_an_address_a_cluster_of_this_machine_is_left_alone(
    two_nodes: Cluster, environment: dict[str, str]
) -> None:
    program = "import os; del os.environ['RAY_ADDRESS']; start_ray(); print(len(living_nodes()))"
    assert driver(two_nodes, environment, program) == "1\npassed\n"


def test_one_node_is_asked_nothing(ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_ask", lambda *_: pytest.fail("a task was started"))
    check_versions()
    check_storage(tmp_path, str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_a_node_that_does_not_see_the_run_is_named(
    two_nodes: Cluster, environment: dict[str, str], tmp_path: Path
) -> None:
    trial = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*trial, "true"], capture_output=True).returncode:
        pytest.skip("a node with file systems of its own needs root and unshare")
    run, store, hidden = tmp_path / "run", tmp_path / "store", tmp_path / "hidden"
    for folder in (run, store, hidden):
        folder.mkdir()
        (folder / "store.json").write_text("{}")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-name=blind", "--num-cpus=1"]
    command += [f"--address={two_nodes.address}", f"--dashboard-agent-listen-port={free_port()}"]
    blind = subprocess.Popen(
        [*trial, "bash", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(hidden), *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        ready = "start_ray()\nimport time\nwhile len(living_nodes()) < 3: time.sleep(0.1)\n"
        for run_dir, uri, sentence in (
            (hidden, store, f"does not see the run directory {hidden}"),
            (run, hidden, f"does not see the data store {hidden}"),
            (run, store, "passed"),
        ):
            check = f"check_storage(Path({str(run_dir)!r}), {str(uri)!r})"
            output = driver(two_nodes, environment, ready + check)
            assert output == "passed\n" or output.count("(blind)") == 1
            assert sentence in output
            assert [path.name for path in run_dir.iterdir()] == ["store.json"]
    finally:
        blind.kill()
        blind.wait()
