"""`hf-sai push`: a run's folder to the Hub, in one commit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="The run's output_dir: model or adapter, report, picture, card")],
    repo: Annotated[str, typer.Argument(help="user/repo, or repo alone for the token's user")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private where it is new")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made where it is missing")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check what a push checks, list its files, and send nothing")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with 1 where there is anything to warn of, before a file is sent")
    ] = False,
    token: Annotated[
        str | None, typer.Option(help="Better: hf auth login, or HF_TOKEN; a command line can be seen by others")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds, all in all", min=1.0)] = 3600.0,
) -> None:
    """
    Pushes a run's folder to the Hub: model, report, picture and card in one commit. Ends with 1 where nothing was
    pushed.
    """
    from ..hub.push import Destination, Push, UploadError

    logging.basicConfig(level=logging.WARNING, format="hf-sai: %(message)s")
    logger = logging.getLogger("hf_sai")
    logger.setLevel(logging.INFO)
    job = Push(folder, Destination(repo, private or None, revision, create_pr, token), timeout=timeout)
    try:
        notes = job.check() if dry_run or strict else []
        for note in notes:
            logger.warning(note)
        if dry_run:
            for name, path in job.files().items():
                typer.echo(f"{path.stat().st_size:>14,}  {name}")
        if notes and strict:
            raise typer.Exit(1)
        commit = None if dry_run else job.run(strict=True)
    except (UploadError, OSError) as error:
        typer.echo(f"hf-sai: {error}", err=True)
        raise typer.Exit(1) from None
    if commit is not None:
        typer.echo(commit.pr_url or commit.commit_url)
