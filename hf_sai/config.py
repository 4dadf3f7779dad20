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
        gsnr_premeasure_batches (`int`, *optional*, defaults to 0): Takes the scales of `sgd_sai` from so many batches
            before the first update, instead of from the first gradient. 0 for the paper's way. One process only.

    Raises:
        `ValueError`: A number is below 0.
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

    def __post_init__(self) -> None:
        for name in ("gsnr_track_steps", "gsnr_premeasure_batches"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0 but is {getattr(self, name)}; 0 turns it off")
