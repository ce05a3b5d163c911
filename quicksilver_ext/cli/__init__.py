"""The command line: one file a command, and the door, ``app``."""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line (of the process, or these arguments); returns the exit code."""
    from .app import main  # typer waits until somebody runs a command

    return main(arguments)
