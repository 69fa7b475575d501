"""Standard output for tables."""

from __future__ import annotations

from rich.console import Console

PIPE_COLUMNS = 240


def table_console() -> Console:
    """Returns standard output; a pipe has no width, and a table must not be cut to the 80 columns that rich assumes there."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_COLUMNS)
