"""What `ray submit cluster.yaml raysseg/cli/submit.py train …` copies to the head and runs there: the `raysseg` command on
the head's cluster.

It is a file of its own because `ray submit` takes a file, and because a bare `raysseg` on a head would start a Ray
of its own.
"""

from __future__ import annotations

import os


def main() -> None:
    """Runs the command line on the cluster of this machine and exits with its status."""
    os.environ.setdefault("RAY_ADDRESS", "auto")
    # The shell that `ray submit` opens sets these two; they would leave a learner in the driver one thread, and hide warnings.
    for name in ("OMP_NUM_THREADS", "PYTHONWARNINGS"):
        os.environ.pop(name, None)
    from raysseg.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
