"""The command ``quicksilver``.

What a command is for goes to stdout, everything else to stderr; with ``--json`` stdout holds one JSON object. Exit 0,
or 2 for a user's mistake, with one line that says how to mend it; 1 where a benchmark finds a wrong answer. Options are
checked before the model is loaded, and slow libraries are imported where they are needed, so that a mistake is answered
at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import typer

from .bench import bench
from .common import one_line
from .doctor import doctor
from .eval import evaluate_text
from .generate import generate
from .optimize import optimize_model

app = typer.Typer(
    name="quicksilver",
    help="Frozen GPT-2 and Llama models with less work per token.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(generate)
app.command("eval")(evaluate_text)
app.command("optimize")(optimize_model)
app.command()(bench)
app.command()(doctor)

# Progress bars and advice of the libraries below would bury the one line that matters.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
CLOSED_PIPE, INTERRUPTED = 141, 130  # what a shell says of a process that SIGPIPE or SIGINT ended


@contextmanager
def _surroundings() -> Iterator[None]:
    """Quiet libraries; streams where the process was started without; stdout and stderr that escape what they can't
    encode, so that no text is lost. All put back afterwards, for who calls ``main`` from Python."""
    added = [name for name in QUIET if name not in os.environ]
    streams = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
    handlers = {name: stream.errors for name, stream in streams.items() if hasattr(stream, "reconfigure")}
    os.environ.update({name: QUIET[name] for name in added})
    with open(os.devnull, "r+", encoding="utf-8") as nothing:
        for name, stream in streams.items():
            if stream is None:
                setattr(sys, name, nothing)
            elif name in handlers and name != "stdin":
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            for name, stream in streams.items():
                setattr(sys, name, stream)  # typer wraps those that broke
            for name in added:
                os.environ.pop(name, None)
            for name, errors in handlers.items():
                streams[name].reconfigure(errors=errors)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line (of the process, or these arguments); returns the exit code."""
    try:
        with _surroundings():
            code = _run(arguments)
            sys.stdout.flush()
            return code
    except (BrokenPipeError, SystemExit):  # whoever read stdout or stderr has seen enough; typer makes an exit of it
        code = CLOSED_PIPE
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:  # a full disk, say
        code = _mistake(f"stdout can't be written to: {one_line(error)}")
    if arguments is None:
        # The process ends, and what its streams still hold has nowhere to go.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(nowhere, number)
    return code


def _mistake(message: str) -> int:
    with suppress(OSError):
        print(f"quicksilver: {message}", file=sys.stderr, flush=True)
    return 2


def _run(arguments: list[str] | None) -> int:
    try:
        return app(args=arguments, prog_name="quicksilver", standalone_mode=False) or 0
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError) as error:
        message = one_line(error)
    except Exception as error:
        # A usage error: its class moved from click to typer between releases.
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        message = f"{one_line(usage())} (see quicksilver --help)"
    return _mistake(message)
