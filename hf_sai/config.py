"""Our own settings around a Trainer, beside the host's arguments."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SaIConfig:
    """
    What a run does besides training; the optimizer's own options go into `optim_args`.

    For a command line: `HfArgumentParser((TrainingArguments, SaIConfig))`.

    Args:
        sai_report (`bool`, *optional*, defaults to `True`): Whether report, picture and card section are written.
        gsnr_track_steps (`int`, *optional*, defaults to 0): Measures g-SNR again every so many steps, for the report:
            the paper says that it stays what it was. 0 for never. A measurement reads all gradients once.
        gsnr_premeasure_batches (`int`, *optional*, defaults to 0): Takes the scales of `sgd_sai` from the gradients of
            so many updates before the first one, instead of from the first gradient alone. The training then begins
            with the same batches. 0 for the paper's way. One process only.
        hub_strict (`bool`, *optional*, defaults to `False`): Whether a push that fails at the end is an error. Without
            it, and always for the pushes in the middle of training, it is a warning with the command to run later.
        hub_timeout (`float`, *optional*, defaults to 3600): Seconds that one push may take, all in all.

    Raises:
        `ValueError`: A number is below 0, or the time-out is not above it.
    """

    sai_report: bool = field(
        default=True, metadata={"help": "Write gsnr_report.json, its picture and our section of the model card."}
    )
    gsnr_track_steps: int = field(
        default=0, metadata={"help": "Measure g-SNR again every so many steps, for the report; 0 for never."}
    )
    gsnr_premeasure_batches: int = field(
        default=0, metadata={"help": "Take the scales from so many batches before the first update; 0 for none."}
    )
    hub_strict: bool = field(default=False, metadata={"help": "A push that fails at the end is an error."})
    hub_timeout: float = field(default=3600.0, metadata={"help": "Seconds that one push may take, all in all."})

    def __post_init__(self) -> None:
        for name in ("gsnr_track_steps", "gsnr_premeasure_batches"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0 but is {getattr(self, name)}; 0 turns it off")
        if not self.hub_timeout > 0:
            raise ValueError(f"hub_timeout must be > 0 but is {self.hub_timeout}; a push of 70 GB takes about 3600 s")
