"""Where a run's processes are: Ray is started or connected to, and the cluster is checked before the first actor starts.

Every check asks all other nodes at once and costs nothing where there is one node only.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysseg.errors import InputError

CONNECT_SECONDS = 5.0
"""How long the head's port may take to answer; Ray itself tries for minutes."""
ANSWER_SECONDS = 60.0
"""How long a node may take to answer a check: it may have to start a process first."""
STORAGE_SECONDS = 5.0
"""How long a network file system may take to show a new file on another node."""
COMPARED_PACKAGES = ("ray", "raysseg", "torch")
TOKEN_NAME = ".seen-by-every-node-"
STORE_MANIFEST = "store.json"
"""A store is there when this file of it is."""


# ---- start or connect -----------------------------------------------------------------------------------------------


def start_ray(*, include_dashboard: bool = False) -> None:
    """Connects to the cluster that RAY_ADDRESS names, or starts Ray on this machine; does nothing where Ray runs.

    Without RAY_ADDRESS nothing is connected to, not even a cluster that was started on this machine with `ray start`:
    a run on it says RAY_ADDRESS=auto.

    Args:
        include_dashboard: start Ray's dashboard as well; a cluster that exists has one or not already.

    Raises:
        InputError: RAY_ADDRESS is no address, nothing answers there, or the cluster has another Ray, Python or token.
    """
    if ray.is_initialized():
        return
    # A process without a GPU keeps seeing the machine's GPUs: a learner in the driver uses one that Ray does not manage.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address and address != "local":
        _connect(address)
        return
    try:
        ray.init(address="local", include_dashboard=include_dashboard, log_to_driver=False, logging_level=logging.ERROR)
    except PermissionError as error:
        raise InputError(
            f"Ray cannot write {error.filename or 'its files'}; set HOME to a folder that can be written, or "
            "RAY_AUTH_TOKEN to a token of your own."
        ) from error


def _connect(address: str) -> None:
    """Connects this process, the driver, to a cluster that runs."""
    target = _head_address(address)
    try:
        if address != "auto":
            # Says at once what Ray says after twenty tries: that the token is wrong.
            GcsClient(address=target)
        # With 'auto' Ray also finds out by itself whether there is a token to use.
        ray.init(address=address if address == "auto" else target, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        ray.shutdown()
        raise InputError(_reason(error, target)) from error


def _head_address(address: str) -> str:
    """Returns the head's `host:port`, once something answers there."""
    where = f"RAY_ADDRESS is '{address}'"
    target = address
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        try:
            target = canonicalize_bootstrap_address("auto") or ""
        except ConnectionError:
            target = ""
        if not target:
            raise InputError(
                f"{where}, but no Ray runs on this machine; start a head with `ray start --head`, give a head's "
                "host:port, or unset RAY_ADDRESS to run on this machine alone."
            )
    scheme, _, rest = target.rpartition("://")
    host, _, port = rest.rpartition(":")
    if scheme or not host or not port.isdigit():
        raise InputError(
            f"{where}; expected is 'auto' on a node of the cluster, or the head's host:port (6379 unless the head was "
            "started with another), not a dashboard's or a Ray Client's address."
        )
    found = "" if target == address else f" (which means {target} here)"
    try:
        answer = _greet(host.strip("[]"), int(port))
    except OSError as error:
        raise InputError(
            f"{where}{found}, but nothing answers there ({error.strerror or error}); start a head with "
            "`ray start --head`, or unset RAY_ADDRESS to run on this machine alone."
        ) from None
    if not answer:
        raise InputError(
            f"{where}{found}, but what answers there is not Ray's head; its port is 6379 unless it was "
            "started with another."
        )
    return target


def _greet(host: str, port: int) -> bool:
    """Returns whether a port speaks HTTP/2, as Ray's head does: a client's greeting is answered by a SETTINGS frame.

    With TLS nobody can tell before the certificates were exchanged, so any answer will do.
    """
    with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return True
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        try:
            return connection.recv(9)[3:4] == b"\x04"
        except OSError:
            return False


def _reason(error: BaseException, address: str) -> str:
    """Says in one sentence why Ray refused the connection."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = " ".join(" ".join(texts).split())
    rays, pythons = re.findall(r"Ray: (\S+)", text), re.findall(r"Python: (\S+)", text)
    if "Version mismatch" in text and len(rays) >= 2 and len(pythons) >= 2:
        return (
            f"The cluster at {address} has Ray {rays[0]} and Python {pythons[0]}, but this process has Ray {rays[1]} "
            f"and Python {pythons[1]}; both must be equal on every node and where raysseg is started."
        )
    if isinstance(error, AuthenticationError) or "uthenticat" in text:
        return (
            f"The cluster at {address} wants another token than this process has; set RAY_AUTH_MODE=token and give the "
            "head's token in RAY_AUTH_TOKEN or in the file that RAY_AUTH_TOKEN_PATH names."
        )
    if "No node info found" in text or "raylet" in text.lower():
        return (
            f"This machine is not a node of the cluster at {address}; start raysseg on one of its nodes, with "
            "`ray submit` or `ray job submit` (docs/cluster.md)."
        )
    return f"The cluster at {address} cannot be used: {text}"


# ---- nodes ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One living node of the cluster: Ray's identifier, the name people know it by, and its total resources."""

    identifier: str
    name: str
    resources: Mapping[str, float]


def living_nodes() -> list[Node]:
    """Returns the nodes that are alive, the driver's own first."""
    own = ray.get_runtime_context().get_node_id()
    nodes = []
    for entry in ray.nodes():
        if entry["Alive"]:
            address, label = entry["NodeManagerAddress"], entry.get("NodeName") or entry["NodeManagerHostname"]
            nodes.append(
                Node(
                    identifier=entry["NodeID"],
                    name=address if label == address else f"{address} ({label})",
                    resources=entry["Resources"],
                )
            )
    return sorted(nodes, key=lambda node: (node.identifier != own, node.name))


def _ask(nodes: Sequence[Node], question: Callable[..., Any], *arguments: Any) -> Iterator[tuple[Node, Any]]:
    """Runs a function once on every node at the same time and yields the answers; a node that died meanwhile has none.

    Raises:
        InputError: a node does not answer.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(question)
    answers = [
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.identifier, soft=False), name="raysseg check"
        ).remote(*arguments)
        for node in nodes
    ]
    deadline = time.monotonic() + ANSWER_SECONDS
    for node, answer in zip(nodes, answers, strict=True):
        try:
            yield node, ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError:
            raise InputError(
                f"The node {node.name} has not answered within {ANSWER_SECONDS:g} seconds; look at its logs, or remove "
                "it from the cluster."
            ) from None
        except RayError:
            if node.identifier in {alive.identifier for alive in living_nodes()}:
                raise


# ---- versions -------------------------------------------------------------------------------------------------------


def _version_question() -> Callable[[], dict[str, str]]:
    """Returns a function that a node without raysseg can run: it travels by value and imports only what Python has."""
    packages = COMPARED_PACKAGES

    def installed() -> dict[str, str]:
        import hashlib
        import importlib.metadata
        import importlib.util
        import pathlib
        import platform

        found = {"Python": platform.python_version()}
        for name in packages:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "missing"
        spec = importlib.util.find_spec("raysseg")
        digest = hashlib.sha256()
        for folder in sorted(spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(pathlib.Path(folder).rglob("*.py")):
                digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
        found["raysseg's source files"] = digest.hexdigest()[:12] if spec else "missing"
        return found

    return installed


def check_versions() -> None:
    """Checks that every node has the Python, Ray, torch and raysseg of this process, down to raysseg's source files.

    Raises:
        InputError: naming the nodes that differ, what they have and what is expected.
    """
    others = living_nodes()[1:]
    if not others:
        return
    question = _version_question()
    expected = question()
    differing = []
    for node, found in _ask(others, question):
        wrong = [
            f"{name} {found[name]} instead of {expected[name]}" for name in expected if found[name] != expected[name]
        ]
        if wrong:
            differing.append(f"{node.name} has {', '.join(wrong)}")
    if differing:
        raise InputError(
            f"The nodes of the cluster do not have what this process has: {'; '.join(differing)}. Install the same on "
            "every node (`ray up` runs the setup commands again)."
        )


# ---- storage --------------------------------------------------------------------------------------------------------


def _read_question() -> Callable[[Sequence[str], float], list[str]]:
    """Returns a function that reads files on a node, each for some seconds until it is there."""

    def read(paths: Sequence[str], seconds: float) -> list[str]:
        import hashlib
        import time

        from pyarrow import fs

        found = []
        deadline = time.monotonic() + seconds
        for path in paths:
            while True:
                try:
                    system, inner = fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), path)
                    with system.open_input_stream(inner) as stream:
                        found.append(hashlib.sha256(stream.read()).hexdigest())
                    break
                except Exception as error:
                    if time.monotonic() > deadline:
                        found.append(f"{type(error).__name__}: {error}")
                        break
                    time.sleep(0.2)
        return found

    return read


def check_storage(run_dir: Path, store_uri: str) -> None:
    """Checks that every node sees the files that the driver writes into the run directory, and the same data store.

    Args:
        run_dir: a folder that exists.
        store_uri: the Arrow store, as a local path or a `pyarrow.fs` URI.

    Raises:
        InputError: naming the nodes that do not, and what they miss.
    """
    others = living_nodes()[1:]
    if not others:
        return
    token = run_dir.resolve() / f"{TOKEN_NAME}{secrets.token_hex(8)}"
    token.write_text(token.name)
    manifest = f"{store_uri}/{STORE_MANIFEST}"
    try:
        question = _read_question()
        expected = question((str(token), manifest), 0.0)
        missing = []
        for node, found in _ask(others, question, (str(token), manifest), STORAGE_SECONDS):
            if found[0] != expected[0]:
                missing.append(f"{node.name} does not see the run directory {token.parent}")
            elif found[1] != expected[1]:
                missing.append(f"{node.name} does not see the data store {store_uri}, or another one there")
    finally:
        token.unlink()
    if missing:
        raise InputError(
            f"Not every node has the run's files: {'; '.join(missing)}. Both must lie on storage that all nodes share "
            "under the same path (--run-dir, data.path), the store also behind a URI (docs/cluster.md)."
        )
