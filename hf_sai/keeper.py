"""The one keeper of a run's report: reads it where there is news, writes it, draws it once, copies it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .files import copy_whole, warning_instead
from .live import count_measurements
from .report import HISTORY_PNG, REPORT_JSON, REPORT_PNG, GSNRReport


logger = logging.getLogger(__name__)

FILES = (REPORT_JSON, REPORT_PNG, HISTORY_PNG)


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


class ReportKeeper:
    """
    Keeps the newest report of one optimizer, and not the optimizer.

    A report that can't be written (a full disk, a broken matplotlib) is a warning: the run goes on.

    Args:
        warning (`str`): What that warning says.
    """

    def __init__(self, warning: str) -> None:
        self.warning = warning
        self.clear()

    def clear(self) -> None:
        """Forgets the report: another optimizer's begins."""
        self.report: GSNRReport | None = None
        self._read = 0
        self._drawn: tuple[GSNRReport, Path] | None = None

    def has_news(self, optimizer: Any) -> bool:
        """Whether something was measured since the report was read."""
        return count_measurements(optimizer) != self._read

    def read(self, optimizer: Any, facts: dict[str, Any], schedule: Sequence[float] = ()) -> GSNRReport:
        """
        A new report, with the history of the one before.

        Args:
            optimizer (`torch.optim.Optimizer`): One of ours, without a wrapper.
            facts (`dict`): Of the run; the number of measurements and the date are added.
            schedule (`list[float]`, *optional*): As in [`GSNRReport`].
        """
        self._read = count_measurements(optimizer)
        history = self.report.history if self.report is not None else []
        read = GSNRReport.from_optimizer(optimizer, {"measurements": self._read, "date": _today(), **facts}, schedule)
        self.report = dataclasses.replace(read, history=history)
        return self.report

    def write(self, output: Path, copy_to: Path | None = None) -> bool:
        """
        Writes report and picture, drawn once for all folders.

        Args:
            output (`pathlib.Path`): Where the run's own copy is kept.
            copy_to (`pathlib.Path`, *optional*): A checkpoint, that gets what was written there.

        Returns:
            `bool`: Whether all was written.
        """
        with warning_instead(logger, self.warning):
            if self.report is not None and self._drawn != (self.report, output):
                self.report.save(output)
                self._drawn = self.report, output
            if self.report is not None and copy_to is not None and copy_to.resolve() != output.resolve():
                for name in FILES:
                    copy_whole(output / name, copy_to / name)
            return True
        return False

    def write_news(self, output: Path) -> None:
        """The picture takes about a second, and so is drawn for the first report only; [`write`] draws the others."""
        if self._drawn is None:
            self.write(output)
        elif self.report is not None:
            with warning_instead(logger, self.warning):
                self.report.save(output, picture=False)
