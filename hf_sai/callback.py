"""The callback that reads what the optimizer measured and writes the report; for trainers that nobody may subclass."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .integration import assert_optimizer, check_sharded, name_parameters, unwrap_optimizer
from .optim.registry import list_records, record_of
from .report import REPORT_JSON, REPORT_PNG, GSNRReport, ReportError


logger = logging.getLogger(__name__)


class GSNRCallback(TrainerCallback):
    """
    Builds the report of a run and writes it where it is needed.

    After every step that measured something (with SWAN, after the first) `gsnr_report.json` is written to `output_dir`
    and a few scalars are logged (`gsnr/measured`, `gsnr/scale_max`, ...; `swan/whitened`, ...). The picture of g-SNR
    follows after the first measuring step, with every checkpoint, and at the end of training. Nothing is written where
    the optimizer is not one of ours.

    Where a Trainer subclass is possible, [`SaITrainer`] does more: the report is then in a checkpoint before the
    checkpoint is pushed, and in the model card.

    Args:
        trainer (`transformers.Trainer`, *optional*): Carries the scalars to all its trackers. Without it they go to
            the state's `log_history` and to the log of this module.

    Example:

    ```python
    trainer = SFTTrainer(model, args=SFTConfig(optim="sgd_sai", learning_rate=0.1), train_dataset=data)
    trainer.add_callback(GSNRCallback(trainer))
    ```
    """

    def __init__(self, trainer: Any | None = None) -> None:
        self.trainer = trainer
        self.report: GSNRReport | None = None
        self._drawn: GSNRReport | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the optimizer and the learning rate before the first step."""
        names = {record.name for record in list_records()}
        if optim_name(args) in names:
            assert_optimizer(kwargs.get("optimizer"), optim_name(args))
            warn_if_learning_rate_is_adams(args)
        self.report = self._drawn = None
        live = unwrap_optimizer(kwargs.get("optimizer"))
        if record_of(live) is None:
            if state.is_world_process_zero:
                _put_aside_reports(Path(args.output_dir))
            return
        check_sharded(live, args)
        if kwargs.get("model") is not None:
            name_parameters(live, kwargs["model"])
        if _measurements(live):  # resumed: what it was measured on stands in the report of then
            self.report = GSNRReport.from_optimizer(live, _run_facts(args, state, live))
            self.report = dataclasses.replace(self.report, run=_run_of(args.output_dir, self.report))
            self._write_report(args, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads the statistics, and writes and logs where something was measured."""
        live = unwrap_optimizer(kwargs.get("optimizer"))
        if record_of(live) is None or not _has_news(live, self.report):
            return
        self.report = GSNRReport.from_optimizer(live, _run_facts(args, state, live))
        self._write_report(args, state)
        prefix = "swan" if self.report.routes else "gsnr"
        self._log(state, {f"{prefix}/{key}": value for key, value in self.report.summary().items()})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the report into the checkpoint."""
        if state.is_world_process_zero:
            self.write(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", args.output_dir)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draws what has changed since the last picture."""
        if state.is_world_process_zero:
            self.write(args.output_dir, args.output_dir)

    def write(self, directory: str | Path, output_dir: str | Path) -> None:
        """
        Writes report and picture to `directory`; drawn once for all folders.

        A report that can't be written (a full disk, a broken matplotlib) is a warning: training goes on.

        Args:
            directory (`str` or path): A checkpoint, or `output_dir` itself. Left alone where it does not exist.
            output_dir (`str` or path): Where the run's own copy is kept.
        """
        if self.report is None or not (Path(directory).is_dir() or Path(directory) == Path(output_dir)):
            return
        with _training_goes_on():
            if self._drawn != self.report:
                self.report.save(output_dir)
                self._drawn = self.report
            if Path(directory).resolve() != Path(output_dir).resolve():
                for name in (REPORT_JSON, REPORT_PNG):
                    if (Path(output_dir) / name).is_file():
                        shutil.copy(Path(output_dir) / name, Path(directory) / name)

    def _write_report(self, args: TrainingArguments, state: TrainerState) -> None:
        """The picture takes about a second, and so is drawn for the first measuring step and with every save."""
        if self.report is None or not state.is_world_process_zero:
            return
        if self._drawn is None:
            self.write(args.output_dir, args.output_dir)
        else:
            with _training_goes_on():
                self.report.save(args.output_dir, picture=False)

    def _log(self, state: TrainerState, scalars: dict[str, float]) -> None:
        if self.trainer is not None:
            # Not `self.trainer.log`: TRL's averages and clears its own metrics there, at the wrong step.
            Trainer.log(self.trainer, scalars)
            return
        state.log_history.append({**scalars, "step": state.global_step})
        logger.info("g-SNR at step %d: %s", state.global_step, scalars)


@contextlib.contextmanager
def _training_goes_on() -> Iterator[None]:
    try:
        yield
    except Exception:  # whatever it is, it is not worth a training run
        logger.warning("The g-SNR report could not be written; training goes on.", exc_info=True)


def _put_aside_reports(output_dir: Path) -> None:
    """A report of an earlier run says nothing of this model: renamed, so that no push takes it along."""
    for name in (REPORT_JSON, REPORT_PNG):
        if (output_dir / name).is_file():
            os.replace(output_dir / name, output_dir / f"_{name}")
            logger.warning("%s is of an earlier run with another optimizer: renamed to _%s.", name, name)


def _run_of(output_dir: str, report: GSNRReport) -> dict[str, Any]:
    """The facts of the run that measured a report, from its file where that is of the same measurement."""
    try:
        before = GSNRReport.load(output_dir)
    except (OSError, ReportError):
        return report.run
    measured = [[(row.name, row.gsnr, row.step) for row in each.tensors] + each.routes for each in (before, report)]
    return before.run if measured[0] == measured[1] and "measurements" in before.run else report.run


def warn_if_learning_rate_is_adams(args: TrainingArguments) -> None:
    """One warning where `learning_rate` is still the default of the arguments' class, which is tuned for Adam."""
    fields = {field.name: field.default for field in dataclasses.fields(args)}
    if args.learning_rate != fields.get("learning_rate"):
        return
    record = next(record for record in list_records() if record.name == optim_name(args))
    if record.routed:  # its learning rates are AdamW's
        return
    logger.warning(
        "learning_rate is %g, the default of %s, which is made for Adam; %s needs another: %s.",
        args.learning_rate,
        type(args).__name__,
        record.name,
        record.learning_rate_hint,
    )


def optim_name(args: TrainingArguments) -> str:
    """`args.optim` as text, whether it is a member of the host's enum or a string (an unpickled one is)."""
    return str(getattr(args.optim, "value", args.optim))


def _has_news(optimizer: Any, report: GSNRReport | None) -> bool:
    """Whether something was measured since the report was built."""
    measurements = _measurements(optimizer)
    return measurements > 0 and (report is None or report.run["measurements"] != measurements)


def _measurements(optimizer: Any) -> int:
    """Gradients that were measured, and tensors with a given scale that began to move; of SWAN all with a state."""
    if not hasattr(optimizer, "gsnr_statistics"):
        return len(optimizer.state)
    states = optimizer.state.values()
    return sum(state["gsnr_count"] + bool(state["gsnr_given"] and state["gsnr_step"]) for state in states)


def _run_facts(args: TrainingArguments, state: TrainerState, optimizer: Any) -> dict[str, Any]:
    """What the scale depends on besides the model: the batch that it was measured on."""
    per_device = state.train_batch_size or args.train_batch_size  # auto_find_batch_size changes the first
    clipping = args.max_grad_norm
    return {
        "measurements": _measurements(optimizer),
        "trainer_step": state.global_step,
        "world_size": args.world_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "effective_batch_size": per_device * args.gradient_accumulation_steps * args.world_size,
        "max_grad_norm": clipping if clipping is not None and math.isfinite(clipping) else None,
        "bf16": bool(args.bf16),
        "fp16": bool(args.fp16),
        "seed": args.seed,
    }
