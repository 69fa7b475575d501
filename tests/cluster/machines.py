"""A laptop and two hosts with sshd on this machine, out of Linux namespaces; `ray stop` on a host sees that host only."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("machines.sh")
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
NAMESPACES = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
SSHD_CONFIG = """Port 22
HostKey {folder}/sshd/host_key
AuthorizedKeysFile {folder}/sshd/key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile none
"""


def why_not() -> str | None:
    """Returns why this machine cannot be several, or None where it can."""
    if os.geteuid() != 0:
        return "only root may make the namespaces that keep `ray stop` away from other Rays"
    missing = [name for name in ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "rsync") if not shutil.which(name)]
    missing += [] if SSHD else ["sshd"]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install openssh-server openssh-client iproute2 rsync)"
    trial = "ip link add bridge0 type bridge && ip link add port0 type veth peer name eth0 && mount -t tmpfs tmpfs /run"
    done = subprocess.run([*NAMESPACES, "sh", "-c", trial], capture_output=True, text=True)
    return f"the kernel refuses namespaces: {done.stderr.strip()}" if done.returncode else None


def kept_paths(*more: Path) -> list[str]:
    """Returns the folders that every machine must see: Python with all it imports, the repository, and more."""
    candidates = {Path(sys.prefix), Path(sys.base_prefix), REPOSITORY, *map(Path, sys.path), *more}
    folders = sorted({path.resolve() for path in candidates if path.is_dir()})
    return [str(path) for path in folders if not any(other != path and other in path.parents for other in folders)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """The machines that run: host2 and host3, at 10.77.0.2 and 10.77.0.3, and the laptop that all of them can reach.

    Args:
        folder: everything that is written; `folder/host2/tmp` is the /tmp of host2.
        storage: the one folder that is the same on all machines.
        key: the private key that logs in as root.
        process: a process inside the laptop's namespaces.
    """

    folder: Path
    storage: Path
    key: Path
    process: int

    def on_laptop(self, *command: str, timeout: float = 500.0) -> subprocess.CompletedProcess[str]:
        """Runs a command on the laptop, in the repository's folder; its output is one text."""
        where = ["nsenter", f"--target={self.process}", "--net", "--pid", "--mount", "--uts"]
        enter = ["bash", "-c", 'cd "$0" && exec "$@"', str(REPOSITORY)]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_", "OMP_"))
        }
        return subprocess.run(
            [*where, *enter, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**environment, "RAY_USAGE_STATS_ENABLED": "0"},
            timeout=timeout,
        )

    def on_host(self, number: int, command: str) -> subprocess.CompletedProcess[str]:
        """Runs a shell command on a host over ssh, in no login shell."""
        options = [f"-i{self.key}", "-q", "-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null"]
        return self.on_laptop("ssh", *options, f"root@10.77.0.{number}", command)

    def actors(self, number: int) -> int:
        """Returns how many processes of a host were EIL's env runners, by the host's own Ray logs."""
        logs = (self.folder / f"host{number}" / "tmp" / "ray").glob("session_2*/logs/worker-*.out")
        return sum("actor_name:EILEnvRunner" in path.read_text() for path in logs)


@contextlib.contextmanager
def start(folder: Path) -> Iterator[Machines]:
    """Starts the laptop and two hosts, and ends them with everything that runs on them."""
    storage, key = folder / "storage", folder / "sshd" / "key"
    storage.mkdir()
    key.parent.mkdir()
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key.with_name(name))], check=True)
    key.with_name("config").write_text(SSHD_CONFIG.format(folder=folder))
    with (folder / "laptop.log").open("w") as log:
        process = subprocess.Popen(
            [*NAMESPACES, "bash", str(SCRIPT), "laptop", str(folder), "2", *kept_paths(storage)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 30
        while not (folder / "ready").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("\n".join(path.read_text() for path in sorted(folder.glob("*.log"))))
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield Machines(folder=folder, storage=storage, key=key, process=int(children[0]))
    finally:
        # The first process of the namespaces dies with this one, and everything in them with it; so it does at the end of
        # its input, when the tests themselves are killed.
        process.kill()
        process.wait()
