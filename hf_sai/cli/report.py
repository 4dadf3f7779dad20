"""`hf-sai report` and `hf-sai compare`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import sys
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer


Source = Annotated[str, typer.Argument(help="gsnr_report.json, the folder that holds it, or a Hub repository")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository")]

PAGE = "gsnr_report.html"


def report(
    source: Source,
    revision: Revision = None,
    html: Annotated[bool, typer.Option("--html", help=f"Write a page, {PAGE} here unless --output says more")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown instead of a table for a terminal")] = False,
    output: Annotated[Path | None, typer.Option(help="File to write instead of printing")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Write the page and show it in the browser")] = False,
) -> None:
    """The report of a run: the scale, or with SWAN the route, of every kind of tensor."""
    from ..report import GSNRReport
    from ..report.terminal import report_view

    if (html or open_page) and markdown:
        raise typer.BadParameter("--html and --markdown exclude each other; give one")
    with _one_sentence(1):
        loaded = GSNRReport.from_pretrained(source, revision=revision)
        if html or open_page:
            if not Path(source).exists():  # a page that is passed on says where its report is
                loaded = dataclasses.replace(loaded, run={**loaded.run, "repository": source})
            page = _write(output or Path(PAGE), loaded.to_html())
            if open_page:
                webbrowser.open(page.absolute().as_uri())
        elif output is not None:
            _write(output, loaded.to_markdown() if markdown else f"{loaded.to_text()}\n")
        elif markdown:
            typer.echo(loaded.to_markdown(), nl=False)
        else:
            _show(report_view(loaded))


def compare(
    first: Source,
    second: Source,
    fail_over: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="Exit with 1 where a tensor's second / first is above RATIO or below 1 / RATIO, where it is missing "
            "or pending in one run only, or has another shape",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a scatter plot to this PNG")] = None,
    revision: Revision = None,
    other_revision: Annotated[str | None, typer.Option(help="The same of the second")] = None,
) -> None:
    """
    The scales of two runs, tensor by tensor.

    Exits with 0, with 1 where --fail-over is exceeded, and with 2 where the runs can't be compared.
    """
    from ..report import GSNRReport
    from ..report.terminal import diff_view

    with _one_sentence(2):
        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib but it is not installed; pip install matplotlib")
        loaded = GSNRReport.from_pretrained(first, revision=revision)
        diff = loaded.diff(GSNRReport.from_pretrained(second, revision=other_revision))
        apart = [] if fail_over is None else diff.apart(fail_over)
        if plot is not None:
            from ..report.plots import diff_png

            plot.write_bytes(diff_png(diff, fail_over))
        if as_json:
            failed = {"fail_over": fail_over, "failed": [row.name for row in apart]}
            typer.echo(json.dumps({**diff.to_dict(), **failed}, indent=1))
        else:
            _show(diff_view(diff, fail_over))
    if apart:
        typer.echo(f"hf-sai: {len(apart)} of {len(diff.rows)} tensors fail --fail-over {fail_over:g}", err=True)
        raise typer.Exit(1)


def _show(view: Any) -> None:
    """With colours on a terminal; into a pipe or a file plain text, whatever FORCE_COLOR says."""
    from ..report import terminal

    if sys.stdout.isatty():
        terminal.show(view)
    else:
        typer.echo(terminal.plain(view))


def _write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    typer.echo(f"wrote {path}", err=True)
    return path


@contextlib.contextmanager
def _one_sentence(code: int) -> Iterator[None]:
    """An error that has a sentence is that sentence, and this exit code."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"hf-sai: {error}", err=True)
        raise typer.Exit(code) from None
