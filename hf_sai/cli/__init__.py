"""The command line: `hf-sai run`, `lr`, `list`, `memory`, `report`, `compare`, `push`, `env`."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import sys
import textwrap
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from trainer_patches.compat import version_of

from .env import env as _env
from .lr import HELP as LR_HELP
from .lr import lr as _lr
from .memory import memory as _memory
from .push import push
from .report import compare as _compare
from .report import report as _report
from .run import HELP, ScriptRequest, launch
from .run import run as _run


class _App(typer.Typer):
    """
    Runs a script when the command line is done with its options, and gone. Output that can't be written (a full disk,
    a pipe whose reader has gone) is one sentence and a status of its own.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            try:
                return super().__call__(*args, **kwargs)
            finally:
                if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # how the parser ends, unsaid, at a closed pipe
                    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
                sys.stdout.flush()
        except ScriptRequest as request:
            script = request.script
        except OSError as error:
            _end_without_output(error)
        return launch(script)


def _end_without_output(error: OSError) -> NoReturn:
    """Ends the process: with 2 where it compares, whose 1 means that the runs are apart, and with 1 otherwise."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer goes nowhere, without a traceback
    remedy = "read all of it" if error.errno == errno.EPIPE else "free space, or send it elsewhere"
    os.write(2, f"hf-sai: the output must be written whole but: {error.strerror or error}; {remedy}\n".encode())
    raise SystemExit(2 if sys.argv[1:2] == ["compare"] else 1)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-sai {version_of('hf_sai')}")
        raise typer.Exit


_VERSION = typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end")

app = _App(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _main(version: Annotated[bool, _VERSION] = False) -> None:
    """SGD-SaI and SWAN for the Hugging Face trainers."""


def _with_version(command: Callable[..., None]) -> Callable[..., None]:
    """The same command with `--version`, as every command has it."""

    @functools.wraps(command)
    def wrapped(*args: Any, version: bool = False, **kwargs: Any) -> None:
        command(*args, **kwargs)

    option = inspect.Parameter(
        "version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, _VERSION]
    )
    signature = inspect.signature(command, eval_str=True)
    wrapped.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {**get_type_hints(command, include_extras=True), "version": option.annotation}
    return wrapped


def list_optimizers() -> None:
    """Names of the optimizers, with their options and defaults."""
    from ..optimizer_facts import optimizer_table

    for row in optimizer_table():
        typer.echo(_wrapped(f"{row['name']}: {row['description']}", "  "))
        for option in row["options"]:
            value = option["default"]
            default = tuple(value) if isinstance(value, list) else value
            shown = f"  {option['name']}={default}  ({option['kind']}) {option['help']}"
            typer.echo(_wrapped(shown, "      "))


def _wrapped(text: str, indent: str) -> str:
    """For a terminal of 80 columns; words stay whole, so that a name can be found in the output."""
    return textwrap.fill(text, 80, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


# Options end at the script's path: what comes after is not looked at.
for _name, _help, _starts in (("run", HELP, _run), ("lr", LR_HELP, _lr)):
    _settings = {"allow_interspersed_args": False}
    app.command(name=_name, help=_help, context_settings=_settings)(_with_version(_starts))
for _name, _command in (
    ("list", list_optimizers),
    ("memory", _memory),
    ("report", _report),
    ("compare", _compare),
    ("push", push),
    ("env", _env),
):
    app.command(name=_name)(_with_version(_command))
