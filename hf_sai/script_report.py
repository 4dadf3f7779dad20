"""The report of a script that knows nothing of us: read from its optimizer, written beside what the script saves."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

from .files import copy_whole, warning_instead
from .hub.card import update_card
from .live import count_measurements
from .report import REPORT_JSON, REPORT_PNG, GSNRReport


logger = logging.getLogger(__name__)

_SCRIPT_GOES_ON = "The report could not be written; the script goes on."


class ScriptReport:
    """
    Keeps the newest report of an optimizer, and not the optimizer: scripts free theirs before they draw pictures.

    Args:
        world_size (`int`, *optional*, defaults to 1): A fact of the run.
    """

    def __init__(self, world_size: int = 1) -> None:
        self.report: GSNRReport | None = None
        self.folder: Path | None = None  # that of the run's own copy
        self._world_size = world_size
        self._drawn: tuple[GSNRReport, Path] | None = None
        self._optimizer: Any = lambda: None
        self._warned = False

    def read(self, optimizer: Any) -> None:
        """
        Takes over what was measured, where there is news. Of two optimizers (a GAN's) the first is reported.

        Args:
            optimizer (`torch.optim.Optimizer`): One of ours, without a wrapper, after its step.
        """
        if self._optimizer() is None:
            self._optimizer, self.report = weakref.ref(optimizer), None
        if self._optimizer() is not optimizer:
            if not self._warned:
                logger.warning("The script trains with more than one optimizer; the report shows the first.")
            self._warned = True
            return
        measurements = count_measurements(optimizer)
        if self.report is None or self.report.run["measurements"] != measurements:
            facts = {"measurements": measurements, "world_size": self._world_size}
            self.report = GSNRReport.from_optimizer(optimizer, facts)

    def on_checkpoint(self, checkpoint: Path, project: Path | None) -> None:
        """Into the checkpoint too, once the run's own copy is written."""
        output = project or checkpoint
        self.write(output)
        if self.report is not None and output != checkpoint:
            with warning_instead(logger, _SCRIPT_GOES_ON):
                for name in (REPORT_JSON, REPORT_PNG):
                    copy_whole(output / name, checkpoint / name)

    def write(self, output: Path | None) -> None:
        """
        Report and picture, and our section in the card that the script has written there; drawn once.

        Args:
            output (`pathlib.Path` or `None`): The script's folder. With `None` nothing is written.
        """
        if self.report is None or output is None:
            return
        with warning_instead(logger, _SCRIPT_GOES_ON):
            if self._drawn != (self.report, output):
                self.report.save(output)
                self._drawn, self.folder = (self.report, output), output
            if (output / "README.md").is_file():
                update_card(output / "README.md", self.report)
