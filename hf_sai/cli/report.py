"""`hf-sai report` and `hf-sai compare`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer


if TYPE_CHECKING:
    from ..report import GSNRReport


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
    from ..report.terminal import report_view

    if (html or open_page) and markdown:
        refuse("--html and --markdown exclude each other; give one")
    _check_output(output, html or open_page)
    _check_revision("--revision", revision, source)
    with _one_sentence(1):
        loaded = _loaded(source, revision)
        if html or open_page:
            if not Path(source).exists():  # a page that is passed on says where its report is
                loaded = dataclasses.replace(loaded, run={**loaded.run, "repository": source})
            page = _write(output or Path(PAGE), loaded.to_html())
            if open_page:
                import webbrowser

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

    Exits with 0, with 1 where --fail-over is exceeded, and with 2 where the runs can't be compared: a run can't be
    read, or with --fail-over not one tensor has a value in both.
    """
    from ..report.terminal import diff_view

    _check_revision("--revision", revision, first)
    _check_revision("--other-revision", other_revision, second)
    with _one_sentence(2):
        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib but it is not installed; pip install matplotlib")
        diff = _loaded(first, revision, "the first run").diff(_loaded(second, other_revision, "the second run"))
        apart = [] if fail_over is None else diff.apart(fail_over)
        if plot is not None:
            from ..report.plots import diff_png

            plot.write_bytes(diff_png(diff, fail_over))
        if as_json:
            failed = {"fail_over": fail_over, "failed": [row.name for row in apart]}
            typer.echo(json.dumps({**diff.to_dict(), **failed}, indent=1))
        else:
            _show(diff_view(diff, fail_over))
    if fail_over is not None and all(row.ratio is None for row in diff.rows):
        reason = "no tensor has a value in both runs" if diff.rows else "neither run has a tensor"
        typer.echo(
            f"hf-sai: --fail-over {fail_over:g} needs at least one tensor to compare, but {reason}; check that both "
            "reports are of trained runs of one model",
            err=True,
        )
        raise typer.Exit(2)
    if apart:
        typer.echo(f"hf-sai: {len(apart)} of {len(diff.rows)} tensors fail --fail-over {fail_over:g}", err=True)
        raise typer.Exit(1)


def refuse(message: str) -> NoReturn:
    """What the parser does with a wrong option, in one sentence."""
    typer.echo(f"hf-sai: {message}", err=True)
    raise typer.Exit(2)


def _loaded(source: str, revision: str | None, which: str = "") -> GSNRReport:
    """A run's report; an error names the run, and what was given for it."""
    from ..report import GSNRReport

    try:
        return GSNRReport.from_pretrained(source, revision=revision)
    except (ValueError, OSError) as error:
        raise ValueError(f"{which} {source}: {error}".lstrip()) from None


def _check_revision(option: str, revision: str | None, source: str) -> None:
    """Refuses a revision that would not be used."""
    if revision is not None and Path(source).exists():
        refuse(
            f"{option} is of a repository of the Hub, but {source} is a file or folder here, which has none; leave "
            f"{option} out"
        )


def _check_output(output: Path | None, is_page: bool) -> None:
    """Refuses a page under the name of a text, and a text under that of a page."""
    if output is not None and is_page != (output.suffix.lower() in (".html", ".htm")):
        remedy = f"write {output.stem}.html" if is_page else "add --html, or write another name"
        refuse(f"--output {output} is {'no' if is_page else 'the'} name of a page; {remedy}")


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
        if isinstance(error, OSError) and error.filename is None:
            raise  # the output itself can't be written: the app says so
        typer.echo(f"hf-sai: {error}", err=True)
        raise typer.Exit(code) from None
