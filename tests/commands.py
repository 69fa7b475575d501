"""The `raysseg` command as a process of its own, which a test may kill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def start(command: str, file: Path, run_dir: Path, *options: str) -> subprocess.Popen[bytes]:
    """Starts `raysseg COMMAND FILE --run-dir DIR`, its output appended to a log beside the run directory."""
    words = [sys.executable, "-m", "raysseg.cli.main", command, str(file), "--run-dir", str(run_dir), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    with run_dir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env=environment)
