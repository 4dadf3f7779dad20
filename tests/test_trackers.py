"""Our scalars in the trackers of `report_to`, read back from what these wrote."""

from __future__ import annotations

import sys

import pytest
from support.models import tiny_lora, token_blocks
from support.trainers import arguments

from hf_sai import SaIConfig, SaITrainer


LEARNING_RATE = {"sgd_sai": 0.02, "swan": 2e-3}
TRACKIO = """
import types
__version__ = "0"
context_vars = types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=lambda: None))
class Config(dict):
    def update(self, values, allow_val_change):
        super().update(values)
config, logged, calls = Config(), [], []
def init(**options): calls.append("init")
def log(values): logged.append(values)
def finish(): calls.append("finish")
"""


def train(folder, optim, report_to):
    """A training with an adapter: SGD-SaI measures in two steps, and again in each where tracking is on."""
    trainer = SaITrainer(
        tiny_lora(),
        arguments(folder, optim=optim, learning_rate=LEARNING_RATE[optim], report_to=report_to),
        train_dataset=token_blocks(),
        sai_config=SaIConfig(sai_report=False, gsnr_track_steps=3 if optim == "sgd_sai" else 0),
    )
    trainer.train()
    return trainer


def history(trainer):
    """What a tracker has to have got: all numbers of the trainer's own history, by step, but its closing summary."""
    entries = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    found = {}
    for entry in entries:
        found.setdefault(entry["step"], {}).update({f"train/{k}": v for k, v in entry.items() if k != "step"})
    return found


def check_ours(found, optim, trainer):
    """That ours are among them, where they belong."""
    prefix = "train/gsnr/" if optim == "sgd_sai" else "train/swan/"
    steps = {step for step, values in found.items() if any(name.startswith(prefix) for name in values)}
    assert steps == ({1, 2, 3, 6} if optim == "sgd_sai" else {1})
    last = 2 if optim == "sgd_sai" else 1
    summary = trainer.gsnr_callback.report.summary()
    assert {name: value for name, value in found[last].items() if name.startswith(prefix)} == pytest.approx(
        {f"{prefix}{name}": value for name, value in summary.items()}
    )


@pytest.mark.parametrize("optim", LEARNING_RATE)
def test_tensorboard_has_every_scalar_at_its_step(tmp_path, monkeypatch, optim):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = train(tmp_path / "out", optim, "tensorboard")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(event.step, {})[name] = event.value
    expected = history(trainer)
    for step, values in expected.items():  # beside these stands the summary at the end
        assert {name: found[step][name] for name in values} == pytest.approx(values, rel=1e-6)  # float32
    check_ours(found, optim, trainer)


@pytest.mark.parametrize("optim", LEARNING_RATE)
def test_trackio_has_every_scalar_at_its_step(tmp_path, monkeypatch, optim):
    """The host's own callback, with a module in the place of trackio that keeps what it is given."""
    (tmp_path / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    trainer = train(tmp_path / "out", optim, "trackio")
    trackio = sys.modules.pop("trackio")
    found = {}
    for values in trackio.logged:
        found.setdefault(values["train/global_step"], {}).update(values)
    for step, values in history(trainer).items():
        assert {name: found[step][name] for name in values} == values
    check_ours(found, optim, trainer)
    assert trackio.calls == ["init", "finish"]
