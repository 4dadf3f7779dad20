"""Short trainings, and what is looked at after them."""

from __future__ import annotations

from pathlib import Path

from accelerate.utils.memory import find_executable_batch_size
from transformers import TrainerCallback, TrainingArguments


def arguments(output_dir, cls=TrainingArguments, **changed):
    """Arguments of a run of a few quiet CPU steps."""
    settings = {
        "output_dir": str(output_dir),
        "optim": "sgd_sai",
        "learning_rate": 0.05,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return cls(**{**settings, **changed})


class StopAt(TrainerCallback):
    """Ends a training after a step, as an interruption would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def trainable(model):
    """Copies of the trained parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def files_below(folder):
    """Every file below a folder."""
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def batch_after(size):
    """What accelerate tries after a batch of that size did not fit: nine tenths, or half in older versions."""
    tried = []

    def run(batch_size):
        tried.append(batch_size)
        if len(tried) == 1:
            raise RuntimeError("CUDA out of memory.")

    find_executable_batch_size(run, starting_batch_size=size)()
    return tried[1]
