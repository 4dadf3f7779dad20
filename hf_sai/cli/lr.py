"""`hf-sai lr`: a training script, unmodified, with a test of learning rates in the place of its training."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer_patches import replaced_trainings

from .run import Script, ScriptRequest


if TYPE_CHECKING:
    from ..lr_test import LRTest

UPDATES = 14  # as `lr_find` has it, which imports torch
PICTURE = "lr_test.png"
HELP = """
Finds a learning rate for a script's own model and data.

Runs a training script up to its trainer.train(). There it makes short trainings at seven learning rates, from one
start and on the same batches, undoes them, prints the loss of each and the rate to try, draws a picture, and ends. The
script takes its own options after its path, with the optimizer among them:

    hf-sai lr train.py --optim sgd_sai

    hf-sai lr -m trl.scripts.sft --optim swan ...
"""


@dataclass
class InsteadOfTraining:
    """
    The test of learning rates in the place of a script's training.

    Args:
        updates (`int`): Of each rate.
        picture (`pathlib.Path`, *optional*): Where to draw it; `None` for the run's `output_dir`.
    """

    updates: int
    picture: Path | None
    begun: bool = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While it is open, `Trainer.train()` tests and ends the script."""
        with replaced_trainings(self._test):
            yield

    def check_used(self) -> None:
        """
        Says so where the script has ended without training.

        Raises:
            `SystemExit`: With 1.
        """
        if not self.begun:
            typer.echo(
                "hf-sai: lr tests where a script calls the train() of transformers' Trainer, but the script ended "
                "without; give it the options with which it trains, or call hf_sai.lr_find(trainer) in it",
                err=True,
            )
            raise SystemExit(1)

    def _test(self, trainer: Any) -> None:
        from ..lr_test import lr_find
        from ..optim.registry import OptionError

        self.begun = True
        try:
            found = lr_find(trainer, self.updates)
        except OptionError as error:
            typer.echo(f"hf-sai: {error}", err=True)
            raise SystemExit(2) from None
        typer.echo(f"\n{found.to_text()}\n")
        self._draw(found, self.picture or Path(trainer.args.output_dir) / PICTURE)
        raise SystemExit(0)

    def _draw(self, found: LRTest, path: Path) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            typer.echo("No picture: matplotlib is not installed; pip install matplotlib")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save_picture(path)
        typer.echo(f"Picture: {path}")


def lr(
    command: Annotated[
        list[str], typer.Argument(metavar="SCRIPT", help="The script's path, and all that belongs to it")
    ],
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module, as in python -m")] = False,
    updates: Annotated[int, typer.Option(help="Updates of each rate; more say more")] = UPDATES,
    picture: Annotated[
        Path | None, typer.Option(help=f"File to draw into; {PICTURE} in the run's output_dir without it")
    ] = None,
) -> None:
    target, *arguments = command
    raise ScriptRequest(Script(target, arguments, module, InsteadOfTraining(updates, picture)))
