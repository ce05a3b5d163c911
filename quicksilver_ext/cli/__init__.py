"""The command line: one file a command, and the door, ``app``."""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line (of the process, or these arguments); returns the exit code."""
    try:
        from .app import main  # typer waits until somebody runs a command
    except KeyboardInterrupt:  # from here on ``app`` answers it
        return 130
    return main(arguments)
