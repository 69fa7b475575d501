"""The `raysseg` command.

Exit status 0 only when the work is done, 2 for bad input with one sentence on standard error.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import typer
from ray.exceptions import RayTaskError

from raysseg.cli.check_rewards import check_rewards_command
from raysseg.cli.compare import compare_command
from raysseg.cli.data import data_app
from raysseg.cli.evaluate import evaluate_command
from raysseg.cli.label import label_app
from raysseg.cli.predict import predict_command
from raysseg.cli.report import report_command
from raysseg.cli.train import recipes_command, train_command
from raysseg.cli.tune import tune_command
from raysseg.errors import ActorsLostError, InputError, LearnerLostError, NonFiniteError, Stopped

SENTENCES = (InputError, NonFiniteError, ActorsLostError, LearnerLostError)
"""Errors whose message is all that a user needs."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, or a second request to stop; Typer turns `KeyboardInterrupt` into it without a word."""

CLICK_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
"""Typer carries its own copy of click, whose base error it does not export."""

app = typer.Typer(
    name="raysseg",
    help="Reinforcement learning for semantic segmentation from scarce labels, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train_command)
app.command("tune")(tune_command)
app.command("evaluate")(evaluate_command)
app.command("predict")(predict_command)
app.command("compare")(compare_command)
app.command("report")(report_command)
app.command("check-rewards")(check_rewards_command)
app.command("recipes")(recipes_command)
app.add_typer(data_app, name="data")
app.add_typer(label_app, name="label")


def _cause(error: BaseException) -> BaseException:
    """Returns what an actor raised, where the error came from one."""
    return error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) else error


def main() -> None:
    """Runs the command line and exits with its status."""
    for name in ("ray.rllib", "ray._common.deprecation"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        status = app(standalone_mode=False)
    except CLICK_ERROR as error:
        error.show()
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except Stopped as error:
        print(error, file=sys.stderr)
        sys.exit(128 + error.signal_number)
    except (*SENTENCES, RayTaskError) as error:
        cause = _cause(error)
        if not isinstance(cause, SENTENCES):
            raise
        print(" ".join(str(cause).split()), file=sys.stderr)
        sys.exit(2 if isinstance(cause, InputError) else 1)
    if status == INTERRUPTED:
        print("Interrupted; give the same command again, of train and tune with --resume.", file=sys.stderr)
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
