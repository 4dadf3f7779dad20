"""The command line: `hf-sai run`, `hf-sai list`, `hf-sai report`, `hf-sai push`."""

from __future__ import annotations

import textwrap
from typing import Annotated, Any

import typer

from .push import push
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


@app.command()
def report(
    source: Annotated[str, typer.Argument(help="gsnr_report.json, the folder that holds it, or a Hub repository")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository")] = None,
) -> None:
    """The report of a run: the scale, or with SWAN the route, of every kind of tensor."""
    from ..report import GSNRReport, ReportError

    try:
        loaded = GSNRReport.from_pretrained(source, revision=revision)
    except (ReportError, OSError) as error:
        typer.echo(f"hf-sai: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(loaded.to_text())
