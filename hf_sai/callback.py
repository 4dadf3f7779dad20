"""The callback that reads what the optimizer measured and writes the report; for trainers that nobody may subclass."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import math
import os
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trainer_patches import finish_own_cards, trainings_are_watched
from trainer_patches.compat import trains_loaded_weights

from .config import SaIConfig
from .divergence import DivergenceWatch
from .files import warning_instead
from .hub.card import finish_card
from .hub.host_lines import is_repo_id
from .keeper import FILES, ReportKeeper
from .live import (
    begin_training,
    check_sharded,
    count_measurements,
    name_parameters,
    optim_name,
    unwrap_optimizer,
)
from .optim.registry import get_record, list_records, record_of
from .premeasure import premeasure
from .report import GSNRReport, ReportError, thinned


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
        config (`SaIConfig`, *optional*): What to do besides; see there for the defaults.

    Example:

    ```python
    trainer = SFTTrainer(model, args=SFTConfig(optim="sgd_sai", learning_rate=1e-3), train_dataset=data)
    trainer.add_callback(GSNRCallback(trainer))
    ```

    With Unsloth, whose trainers are made when it is imported, the same, with `import hf_sai` beside `import unsloth`.

    With axolotl, a plugin, which stands under `plugins:` beside `optimizer: sgd_sai` and `optim_args:`, and the launch
    by `hf-sai run axolotl train config.yml`, which knows the names before it reads them:

    ```python
    class SaIPlugin(axolotl.integrations.base.BasePlugin):
        def add_callbacks_post_trainer(self, cfg, trainer):
            return [GSNRCallback(trainer)]
    ```
    """

    def __init__(self, trainer: Any | None = None, config: SaIConfig | None = None) -> None:
        self.trainer = trainer
        self.config = config or SaIConfig()
        self._keeper = ReportKeeper("The g-SNR report could not be written; training goes on.")
        self._watch = DivergenceWatch()
        # Where a trainer that knows it resumes from; the run's own folder may be another then.
        self.resumed_from: str | os.PathLike[str] | None = None

    def resume_from(self, checkpoint: str | os.PathLike[str] | bool | None) -> None:
        """
        Has the report of a resumed run keep what a checkpoint's says of the measurement.

        Args:
            checkpoint (`str`, path or `bool`, *optional*): As `train(resume_from_checkpoint=...)` gets it.
        """
        self.resumed_from = checkpoint if isinstance(checkpoint, (str, os.PathLike)) else None

    @property
    def report(self) -> GSNRReport | None:
        """The newest; `None` before something was measured."""
        return self._keeper.report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the optimizer and the learning rate before the first step."""
        if not hasattr(kwargs.get("model"), "named_parameters"):  # SetFit hands on its own model, which is no module
            kwargs["model"] = getattr(self.trainer, "model", None)
        live, model = unwrap_optimizer(kwargs.get("optimizer")), kwargs.get("model")
        if not trainings_are_watched():  # a version of the host that is not known
            begin_training(args, model, kwargs.get("optimizer"))
        self._keeper.clear()
        self._watch = DivergenceWatch()
        if record_of(live) is None:
            if state.is_world_process_zero:
                with self._failing_softly():
                    _put_aside_reports(Path(args.output_dir))
            return
        check_sharded(live, args)
        with self._failing_softly():
            if optim_name(args) in {record.name for record in list_records()}:
                warn_of_learning_rate(args, live, model)
            if model is not None:
                name_parameters(live, model)
        if not count_measurements(live):
            if self.config.gsnr_premeasure_batches:
                premeasure(live, self.trainer, kwargs["train_dataloader"], self.config.gsnr_premeasure_batches)
            return
        with self._failing_softly():  # resumed: what it was measured on stands in the report of then
            report = self._read(args, state, live, **kwargs)
            for folder in (self.resumed_from, args.output_dir):
                report = _with_earlier_facts(report, folder, state.global_step)
            self._keeper.report = report
            self._write_news(args, state)

    def _failing_softly(self) -> contextlib.AbstractContextManager[None]:
        """No fault of a report is worth a training run."""
        return warning_instead(logger, self._keeper.warning)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        Has g-SNR measured anew where it is tracked: by the optimizer, in its step, from the gradients that the update
        uses. (No event of the Trainer sees those that DeepSpeed or a layer-wise optimizer uses in the backward pass.)
        """
        live, every = unwrap_optimizer(kwargs.get("optimizer")), self.config.gsnr_track_steps
        if every and (state.global_step + 1) % every == 0 and hasattr(live, "measure_in_next_step"):
            live.measure_in_next_step()
        if record_of(live) is not None:
            self._watch.before_step(live)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads the statistics, and writes and logs where something was measured."""
        live = unwrap_optimizer(kwargs.get("optimizer"))
        if record_of(live) is not None:
            with self._failing_softly():
                self._warn(self._watch.after_step())
                self._take_news(args, state, live, **kwargs)

    def _take_news(self, args: TrainingArguments, state: TrainerState, live: Any, **kwargs: Any) -> None:
        if self._keeper.has_news(live):
            report = self._read(args, state, live, **kwargs)
            self._write_news(args, state)
            self._log(state, {f"{report.log_prefix}/{key}": value for key, value in report.summary().items()})
        measured = live.take_measured() if hasattr(live, "take_measured") else None
        if measured is not None and self.report is not None:
            history = thinned([*self.report.history, {"step": state.global_step, "gsnr": measured}])
            self._keeper.report = report = dataclasses.replace(self.report, history=history)
            drift = report.drift()
            if drift and drift[-1]["step"] == state.global_step:
                self._log(state, {"gsnr/ratio_to_first_median": drift[-1]["median"]})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Warns once of a run that diverges in its first steps."""
        if record_of(unwrap_optimizer(kwargs.get("optimizer"))) is not None and state.is_world_process_zero:
            self._warn(self._watch.on_log(logs or {}, args.learning_rate, bool(args.fp16)))

    def _warn(self, message: str | None) -> None:
        if message is not None:
            logger.warning(message)

    def _read(
        self,
        args: TrainingArguments,
        state: TrainerState,
        live: Any,
        model: Any = None,
        lr_scheduler: Any = None,
        **unused: Any,
    ) -> GSNRReport:
        facts = {**_run_facts(args, state), **_origin(args, model)}
        return self._keeper.read(live, facts, schedule_range(lr_scheduler, state.max_steps))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the report into the checkpoint."""
        if state.is_world_process_zero:
            self.write(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", args.output_dir)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draws what has changed since the last picture; the cards that a model writes of itself get the section."""
        if not state.is_world_process_zero:
            return
        self.write(args.output_dir, args.output_dir)
        if self.report is not None and self.config.sai_report:
            for model in (kwargs.get("model"), getattr(self.trainer, "model", None)):
                finish_own_cards(model, functools.partial(finish_card, report=self.report))

    def write(self, directory: str | Path, output_dir: str | Path) -> None:
        """
        Writes report and picture to `directory`; drawn once for all folders.

        A report that can't be written (a full disk, a broken matplotlib) is a warning: training goes on.

        Args:
            directory (`str` or path): A checkpoint, or `output_dir` itself. Left alone where it does not exist.
            output_dir (`str` or path): Where the run's own copy is kept.
        """
        if self.config.sai_report and (Path(directory).is_dir() or Path(directory) == Path(output_dir)):
            self._keeper.write(Path(output_dir), Path(directory))

    def _write_news(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.config.sai_report and state.is_world_process_zero:
            self._keeper.write_news(Path(args.output_dir))

    def _log(self, state: TrainerState, scalars: dict[str, float]) -> None:
        if self.trainer is not None:
            control = self.trainer.control
            due = control.should_log
            # Not `self.trainer.log`: TRL's averages and clears its own metrics there, at the wrong step.
            Trainer.log(self.trainer, scalars)
            control.should_log = due  # the host's own log of this step is yet to come
            return
        state.log_history.append({**scalars, "step": state.global_step})
        logger.info("g-SNR at step %d: %s", state.global_step, scalars)


def schedule_range(scheduler: Any, steps: int) -> list[float]:
    """
    Lowest and highest factor of the peak learning rate over the steps that move something; empty where the schedule
    does not say so beforehand, as one that follows a metric.

    Args:
        scheduler (`torch.optim.lr_scheduler.LRScheduler`): Of the training; one of `LambdaLR` says it.
        steps (`int`): That the training makes; of many, 10,000 are looked at.
    """
    if type(scheduler) is not LambdaLR or steps < 1:
        return []
    places = range(0, steps, max(1, steps // 10_000))
    factors = [float(each(step)) for each in scheduler.lr_lambdas for step in places]
    positive = [factor for factor in factors if factor > 0.0]
    return [min(positive), max(positive)] if positive else []


def _put_aside_reports(output_dir: Path) -> None:
    """A report of an earlier run says nothing of this model: renamed, so that no push takes it along."""
    for name in FILES:
        if (output_dir / name).is_file():
            os.replace(output_dir / name, output_dir / f"_{name}")
            logger.warning("%s is of an earlier run with another optimizer: renamed to _%s.", name, name)


def _with_earlier_facts(report: GSNRReport, folder: str | os.PathLike[str] | None, step: int) -> GSNRReport:
    """
    A resumed run's report: facts and history from the file in a folder, where that is of the same measurement, up to
    the step that is resumed from.
    """
    try:
        before = GSNRReport.load(folder) if folder is not None else report
    except (OSError, ReportError):
        return report
    measured = [[(row.name, row.gsnr, row.step) for row in each.tensors] + each.routes for each in (before, report)]
    if measured[0] != measured[1] or "measurements" not in before.run:
        return report
    history = [entry for entry in before.history if entry["step"] <= step]
    return dataclasses.replace(report, run=before.run, history=history)


def warn_of_learning_rate(args: TrainingArguments, optimizer: Any, model: Any = None) -> None:
    """
    One warning where `learning_rate` is still the default of the arguments' class, which is tuned for Adam, and one
    where it is far above what pretrained weights that are trained as a whole were found to take.

    Silent for an optimizer whose rates are AdamW's: by its record, or with `normalize="rms"`.

    Args:
        args (`transformers.TrainingArguments`): Of the training.
        optimizer (`torch.optim.Optimizer`): Without a wrapper.
        model (`torch.nn.Module`, *optional*): That is trained; without it nothing is known of its weights.
    """
    record = get_record(optim_name(args))
    normalize = {group.get("normalize") for group in optimizer.param_groups}
    if record.adam_rates or normalize == {"rms"}:
        return
    fitting = ""
    if record.pretrained_rates and "max" not in normalize and model is not None and trains_loaded_weights(model):
        fitting = "{:g} to {:g} on pretrained weights that are trained as a whole; start at {:g}".format(
            *record.pretrained_rates, record.pretrained_rates[1]
        )
    if args.learning_rate == _default_rate(args):
        logger.warning(
            "learning_rate is %g, the default of %s, which is made for Adam; %s needs another: %s.",
            args.learning_rate,
            type(args).__name__,
            record.name,
            fitting or record.learning_rate_hint,
        )
    elif fitting and args.learning_rate > 2.5 * record.pretrained_rates[1]:
        logger.warning(
            "learning_rate is %g, which is high for %s: it needs %s. At ten times that a real model ended at chance.",
            args.learning_rate,
            record.name,
            fitting,
        )


def _default_rate(args: TrainingArguments) -> Any:
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    # Unsloth's classes have other defaults than their fields: in an __init__ of their own.
    defaults |= {name: each.default for name, each in inspect.signature(type(args)).parameters.items()}
    return defaults.get("learning_rate")


def _origin(args: TrainingArguments, model: Any) -> dict[str, str]:
    """What is trained and where it goes: the class of a model, the repository that it came from, and the run's own."""
    found: dict[str, str] = {}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter
    if base is not None:
        source = getattr(getattr(base, "config", None), "name_or_path", "")
        known = [source] if source and is_repo_id(source) else []  # no folder of this machine
        found["model"] = ", ".join([type(getattr(base, "_orig_mod", base)).__name__, *known])
    if args.hub_model_id and is_repo_id(args.hub_model_id):
        found["repository"] = args.hub_model_id
    return found


def _run_facts(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """What the scale depends on besides the model: the batch that it was measured on."""
    per_device = state.train_batch_size or args.train_batch_size  # auto_find_batch_size changes the first
    clipping = args.max_grad_norm
    return {
        "trainer_step": state.global_step,
        "world_size": args.world_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "effective_batch_size": per_device * args.gradient_accumulation_steps * args.world_size,
        "max_grad_norm": clipping if clipping is not None and math.isfinite(clipping) else None,
        "bf16": bool(args.bf16),
        "fp16": bool(args.fp16),
        "seed": args.seed,
    }
