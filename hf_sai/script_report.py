"""Reports without a Trainer: of a loop that asks for one, and of a script that knows nothing of us."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .files import warning_instead, write_whole
from .hub.card import update_card
from .keeper import ReportKeeper
from .live import name_parameters, unwrap_optimizer
from .report import GSNRReport


logger = logging.getLogger(__name__)


def write_report(
    optimizer: Any,
    folder: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    facts: Mapping[str, Any] | None = None,
) -> GSNRReport:
    """
    Report, picture and our section of the model card for a training without a Trainer: a plain loop, accelerate's or
    Lightning's. Call it after the last step, once the model is saved, and before a push.

    A `README.md` that stands in the folder keeps its text; where there is none, one with our section is begun. Of
    several processes the first writes.

    Args:
        optimizer (`torch.optim.Optimizer`): One of ours, or a wrapper of it, as accelerate, Lightning and DeepSpeed
            have them.
        folder (`str` or path): Where the model is. Made where it is missing.
        model (`torch.nn.Module`, *optional*): Where names of tensors come from, for an optimizer that was made
            without them; [`hf_sai.create_optimizer`] has given them.
        facts (mapping, *optional*): Of the run, plain values that the report holds, such as
            `{"effective_batch_size": 32}`. Everybody can read them.

    Returns:
        `GSNRReport`: What was written.

    Raises:
        `TypeError`: The optimizer is none of ours.
        `OSError`: A file can't be written.

    Example:

    ```python
    optimizer = hf_sai.create_optimizer("sgd_sai", model, lr=1e-3)
    ...  # the loop
    model.save_pretrained("out")
    hf_sai.write_report(optimizer, "out")
    ```
    """
    live = unwrap_optimizer(optimizer)
    if model is not None and isinstance(live, torch.optim.Optimizer):
        name_parameters(live, model)
    several = dist.is_available() and dist.is_initialized()
    known = {"world_size": dist.get_world_size() if several else 1, **(facts or {})}
    report = ReportKeeper("").read(live, known)
    if not several or dist.get_rank() == 0:
        report.save(folder)
        card = Path(folder) / "README.md"
        if card.is_file():
            update_card(card, report)
        else:
            write_whole(card, f"# {card.absolute().parent.name}\n".encode())
            update_card(card, report, earlier="")
    return report


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
