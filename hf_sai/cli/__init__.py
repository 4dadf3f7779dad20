"""The command line: `hf-sai run`, `list`, `memory`, `report`, `compare`, `push`, `env`."""

from __future__ import annotations

import textwrap
from typing import Any

import typer

from .env import env as _env
from .memory import memory as _memory
from .push import push
from .report import compare as _compare
from .report import report as _report
from .run import HELP, ScriptRequest, launch
from .run import run as _run


class _App(typer.Typer):
    """Runs a script when the command line is done with its options, and gone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ScriptRequest as request:
            script = request.script
        return launch(script)


app = _App(
    help="SGD-SaI and SWAN for the Hugging Face trainers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


# Options end at the script's path: what comes after is not looked at.
app.command(name="run", help=HELP, context_settings={"allow_interspersed_args": False})(_run)
app.command(name="push")(push)
app.command(name="memory")(_memory)
app.command(name="env")(_env)


@app.command(name="list")
def list_optimizers() -> None:
    """Names of the optimizers, with their options and defaults."""
    from ..optim.registry import list_records

    for record in list_records():
        typer.echo(_wrapped(f"{record.name}: {record.description}", "  "))
        for option in record.options:
            shown = f"  {option.name}={record.default(option.name)}  ({option.kind}) {option.help}"
            typer.echo(_wrapped(shown, "      "))


def _wrapped(text: str, indent: str) -> str:
    """For a terminal of 80 columns; words stay whole, so that a name can be found in the output."""
    return textwrap.fill(text, 80, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


app.command(name="report")(_report)
app.command(name="compare")(_compare)
