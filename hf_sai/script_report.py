"""The report of a script that knows nothing of us: read from its optimizer, written beside what the script saves."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

from .files import warning_instead
from .hub.card import update_card
from .keeper import ReportKeeper


logger = logging.getLogger(__name__)


class ScriptReport:
    """
    Keeps the newest report of an optimizer, and not the optimizer: scripts free theirs before they draw pictures.

    Args:
        world_size (`int`, *optional*, defaults to 1): A fact of the run.
    """

    def __init__(self, world_size: int = 1) -> None:
        self.keeper = ReportKeeper("The report could not be written; the script goes on.")
        self.folder: Path | None = None  # that of the run's own copy
        self._world_size = world_size
        self._optimizer: Any = lambda: None
        self._warned = False

    def read(self, optimizer: Any) -> None:
        """
        Takes over what was measured, where there is news. Of two optimizers (a GAN's) the first is reported.

        Args:
            optimizer (`torch.optim.Optimizer`): One of ours, without a wrapper, after its step.
        """
        if self._optimizer() is None:
            self._optimizer = weakref.ref(optimizer)
            self.keeper.clear()
        if self._optimizer() is not optimizer:
            if not self._warned:
                logger.warning("The script trains with more than one optimizer; the report shows the first.")
            self._warned = True
        elif self.keeper.report is None or self.keeper.has_news(optimizer):
            self.keeper.read(optimizer, {"world_size": self._world_size})

    def on_checkpoint(self, checkpoint: Path, project: Path | None) -> None:
        """Into the checkpoint too, once the run's own copy is written."""
        self._write(project or checkpoint, checkpoint)

    def write(self, output: Path | None) -> None:
        """
        Report and picture, and our section in the card that the script has written there; drawn once.

        Args:
            output (`pathlib.Path` or `None`): The script's folder. With `None` nothing is written.
        """
        if output is not None:
            self._write(output)

    def _write(self, output: Path, copy_to: Path | None = None) -> None:
        report = self.keeper.report
        if report is None or not self.keeper.write(output, copy_to):
            return
        self.folder = output
        if (output / "README.md").is_file():
            with warning_instead(logger, self.keeper.warning):
                update_card(output / "README.md", report)
