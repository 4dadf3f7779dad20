"""A Trainer that checks its optimizer, writes the g-SNR report with every save, and puts it into the model card."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from transformers import Trainer

import trainer_patches

from .callback import GSNRCallback
from .config import SaIConfig
from .files import is_switched_off, warning_instead
from .hub.card import back_on_error, card_aside, keep_card, read_card, update_card
from .hub.push import HostPushes
from .hub.results import plain
from .integration import decay_rule
from .live import assert_optimizer, name_parameters, optim_name, trains_ours, unwrap_optimizer
from .optim.registry import get_record, list_records, parse_options, record_of
from .upload import checked_token


logger = logging.getLogger(__name__)


class ReportingMixin:
    """
    Before a `transformers.Trainer` subclass: a checked optimizer, the report with every save, its section in the card.

    [`SaITrainerMixin`] has it, and [`look_after`] gives it to trainers that were made without us.
    """

    gsnr_callback: GSNRCallback
    # What the Trainer behind the mixin has, of any version: for the type checker only.
    args: Any
    model: Any
    optimizer: Any
    state: Any
    add_callback: Any
    is_world_process_zero: Any
    get_decay_parameter_names: Any

    @property
    def _asked_for(self) -> str | None:
        """The name of ours that `args.optim` asks for; `None` where it asks for another or is overridden."""
        name = optim_name(self.args)
        overridden = getattr(self, "optimizer_cls_and_kwargs", None) is not None
        return name if not overridden and name in {record.name for record in list_records()} else None

    def create_optimizer(self, model: Any = None) -> Any:
        """
        As the host's, and checks the result.

        Args:
            model (`torch.nn.Module`, *optional*): Handed on where it is given; transformers 5.2 has no such argument.

        Raises:
            `OptimizerMismatchError`: Something else was made than `args.optim` asks for.
        """
        with decay_rule(self.get_decay_parameter_names):
            host = super().create_optimizer  # type: ignore[misc]
            optimizer = host() if model is None else host(model)
        if self._asked_for is not None:
            assert_optimizer(self.optimizer, self._asked_for)
        live = unwrap_optimizer(self.optimizer)
        if record_of(live) is not None:
            name_parameters(live, self.model if model is None else model)
        return optimizer

    def create_model_card(self, *args: Any, results: Iterable[EvalResult] = (), **kwargs: Any) -> None:
        """
        As the host's, with our section after it; see [`hf_sai.hub.card.update_card`].

        A card that a person has edited since it was generated keeps its text: there only our section is renewed. One
        that can't be read is left as it is, with a warning; the host would raise.

        Args:
            results (iterable of `huggingface_hub.EvalResult`, *optional*): For the card's header; as from
                [`hf_sai.hub.metrics.card_results`].
            *args: The host's own.
            **kwargs: The host's own.
        """
        path = Path(self.args.output_dir) / "README.md"
        writes = self.is_world_process_zero()
        earlier = read_card(path) if writes and path.is_file() else ""
        if earlier is None:
            return
        history = self.state.log_history
        # With numbers of NumPy or torch the host would write a header that no reader of YAML loads.
        self.state.log_history = [plain(entry) for entry in history]
        try:
            with back_on_error(path, earlier):
                super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.state.log_history = history
        callback = self.gsnr_callback
        if writes and callback.report is not None and callback.config.sai_report:
            callback.write(self.args.output_dir, self.args.output_dir)
            failed = warning_instead(logger, f"{path} could not be written; the model is not concerned.")
            with failed, back_on_error(path, earlier):
                update_card(path, callback.report, earlier=earlier, repo_id=self._full_repo_id(), results=results)

    def _full_repo_id(self) -> str | None:
        name = getattr(self, "hub_model_id", None) or self.args.hub_model_id
        return name if name and "/" in name else None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        path = folder / "README.md"
        with trainer_patches.token_free_pickles(self.args), card_aside(path) as before:
            super()._save(output_dir, state_dict=state_dict)  # type: ignore[misc]
        if self.args.should_save:
            callback = self.gsnr_callback
            callback.write(folder, self.args.output_dir)
            report = callback.report if callback.config.sai_report else None
            with warning_instead(logger, f"{path} could not be written; the model is not concerned."):
                keep_card(path, before, report, self._full_repo_id())

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with trainer_patches.token_free_pickles(self.args):
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]


class SaITrainerMixin(ReportingMixin):
    """
    What `optim="sgd_sai"` and `optim="swan"` need around any `transformers.Trainer` subclass; put it before that.

    - Options are read when the trainer is built, not when training starts.
    - The optimizer that was made is checked to be the one that was asked for.
    - `gsnr_report.json` and `gsnr_report.png` are written to `output_dir` and into every checkpoint, before a push.
    - `training_args.bin` holds no token.
    - The model card gets a section with the report after the host wrote its own.

    With another optimizer it is the plain trainer, but for the token.

    Args:
        *args: The trainer's own.
        **kwargs: The trainer's own.
        sai_config (`SaIConfig`, *optional*): What the run does besides: tracking, measuring before the first update.

    Example:

    ```python
    class MyTrainer(SaITrainerMixin, Seq2SeqTrainer): ...
    ```
    """

    gsnr_callback_class = GSNRCallback

    def __init__(self, *args: Any, sai_config: SaIConfig | None = None, **kwargs: Any) -> None:
        config = sai_config or SaIConfig()
        self._hub = HostPushes(config.hub_strict, config.hub_timeout)
        super().__init__(*args, **kwargs)
        if self.args.push_to_hub:
            checked_token(self.args.hub_token)
        if self._asked_for is not None:
            parse_options(get_record(self._asked_for), trainer_patches.parse_optim_args(self.args.optim_args))
        self.gsnr_callback = self.gsnr_callback_class(self, config)
        self.add_callback(self.gsnr_callback)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the host's; a resumed run's report keeps what the checkpoint's says of the measurement."""
        self.gsnr_callback.resume_from(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As the host's; a Hub that can't be reached is a warning, and the push tries again."""
        with self._hub_calls():
            super().init_hf_repo(*args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, *args: Any, private: bool | None = None, create_pr: bool = False, **kwargs: Any) -> Any:
        """
        As the host's: model, report, picture and card, in one commit. What may pass is tried again.

        A push that fails is a warning with the command to run later, or an error with `SaIConfig(hub_strict=True)`.

        Args:
            private (`bool`, *optional*): Visibility where the repository has to be made.
            create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead.
            *args: The host's own.
            **kwargs: The host's own; what it does not know goes to `create_model_card`.

        Returns:
            `huggingface_hub.CommitInfo`: Of the commit; `None` where it failed. With `blocking=False` a future of it.

        Raises:
            `PushError`: It failed, and `hub_strict` is set.
        """
        wanted = (private, self._hub.private, self.args.hub_private_repo)  # the second is what init_hf_repo asked for
        with self._hub.asked(next((each for each in wanted if each is not None), None), create_pr), self._hub_calls():
            return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]

    def _hub_calls(self) -> AbstractContextManager[None]:
        return trainer_patches.replaced_hub_calls(self._hub.create_repo, self._hub.upload_folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with self._hub_calls():
            super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        """As the host's; what it waits for ends in time."""
        self._hub.wait()


class SaITrainer(SaITrainerMixin, Trainer):
    """[`SaITrainerMixin`] on `transformers.Trainer`."""


def make_trainer(cls: type[Trainer]) -> type[Trainer]:
    """
    A trainer class with [`SaITrainerMixin`] in front.

    Args:
        cls (`type`): Such as `trl.SFTTrainer`. One that has the mixin already is returned as it is.

    Returns:
        `type`: Named `SaI` + the class's name. To pickle instances, write the class out instead.

    Raises:
        `TypeError`: It is not a Trainer.

    Example:

    ```python
    trainer = make_trainer(SFTTrainer)(model, args=SFTConfig(optim="sgd_sai", learning_rate=1e-3), train_dataset=data)
    ```
    """
    if not (isinstance(cls, type) and issubclass(cls, Trainer)):
        raise TypeError(
            f"make_trainer needs a subclass of transformers.Trainer but got {cls!r}; pass the class itself"
        )
    if issubclass(cls, SaITrainerMixin):
        return cls
    return type(f"SaI{cls.__name__}", (SaITrainerMixin, cls), {"__doc__": f"`SaITrainerMixin` on `{cls.__name__}`."})


def look_after(trainer: Any, resume_from_checkpoint: Any = None) -> None:
    """
    Has a Trainer that was made without us report its training as [`SaITrainer`] does; `import hf_sai` has this called
    when the training of any Trainer starts. Pushes stay the host's own.

    Where the trainer has a [`GSNRCallback`], that one is used. Nothing is done for the optimizers of others, and with
    `HF_SAI_REPORT=0` in the environment. What goes wrong is a warning, and the training goes on as without us.

    Args:
        trainer (`transformers.Trainer`): Before its optimizer is made. It becomes an instance of a class that derives
            from its own and has that one's name.
        resume_from_checkpoint (`str` or `bool`, *optional*): As `train()` got it.
    """
    if is_switched_off("HF_SAI_REPORT") or not trains_ours(trainer):
        return
    with warning_instead(logger, "There will be no report of this training; the training is not concerned."):
        if not isinstance(trainer, ReportingMixin):
            callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, GSNRCallback)]
            if not callbacks:
                callbacks.append(GSNRCallback(trainer))
                trainer.add_callback(callbacks[0])
            trainer.gsnr_callback = callbacks[0]
            host: Any = type(trainer)
            trainer.__class__ = _reporting(host)
        trainer.gsnr_callback.resume_from(resume_from_checkpoint)


@functools.cache
def _reporting(cls: Any) -> type:
    fields = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls)(cls.__name__, (ReportingMixin, cls), fields)
