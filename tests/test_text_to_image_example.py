"""examples/train_text_to_image_lora.py: what it learns, what it leaves behind, and that a resumed run is the same."""

from __future__ import annotations

import sys

import pytest
import torch
from hub_server import connected, loopback_hub
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import sd, write_data

from hf_sai import GSNRReport


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example's module, a pipeline on disk and a folder of pictures, and how to run it on them."""
    import train_text_to_image_lora as module

    root = tmp_path_factory.mktemp("text_to_image")
    sd().save_pretrained(root / "model")
    write_data(root / "data")

    def run(output, *options):
        given = ["--model_name_or_path", str(root / "model"), "--dataset_name", str(root / "data" / "pictures")]
        given += ["--output_dir", str(output), "--resolution", "64", "--max_train_steps", "4"]
        given += ["--checkpointing_steps", "2", "--validation_images", "0", *options]
        (args,) = module.HfArgumentParser(module.Arguments).parse_args_into_dataclasses(given)
        return module.train(args)

    return run


def tensors(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(("optim", "rate"), [("sgd_sai", "0.1"), ("swan", "1e-3")])
def test_a_resumed_run_equals_the_uninterrupted_one(example, tmp_path, optim, rate):
    options = ["--optim", optim, "--learning_rate", rate]
    whole = example(tmp_path / "whole", *options)
    first = example(tmp_path / "parts", *options, "--max_train_steps", "2")
    second = example(tmp_path / "parts", *options, "--resume_from_checkpoint", "latest")
    assert first + second == whole
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    start = tensors_at_start(example, tmp_path, options)
    for name in one:
        assert torch.equal(start[name], torch.zeros_like(start[name])) == ("lora_B" in name)
        assert not torch.equal(one[name], start[name]), name
    pipeline = sd()
    pipeline.load_lora_weights(tmp_path / "whole", weight_name="pytorch_lora_weights.safetensors")
    loaded = get_peft_model_state_dict(pipeline.unet, adapter_name="default_0")
    assert {f"unet.{name}" for name in loaded} == one.keys()
    assert all(torch.equal(tensor, one[f"unet.{name}"]) for name, tensor in loaded.items())
    reports = [GSNRReport.load(tmp_path / each) for each in ("whole", "parts")]
    assert reports[0] == reports[1]
    assert reports[0].optimizer == optim


def tensors_at_start(example, tmp_path, options):
    """The adapter of the first step with a learning rate of nothing."""
    example(tmp_path / "start", *options, "--learning_rate", "0", "--max_train_steps", "1")
    return tensors(tmp_path / "start")


def test_offline_its_loss_falls_and_it_leaves_images_and_a_card(tmp_path, monkeypatch, capsys):
    import train_text_to_image_lora as module

    monkeypatch.chdir(tmp_path)
    command = "x --max_train_steps 12 --pretrain_steps 30 --validation_images 2 --validation_steps 2 "
    command += "--push_to_hub --hub_model_id user/example"
    monkeypatch.setattr(sys, "argv", command.split())
    losses = []
    train = module.train
    monkeypatch.setattr(module, "train", lambda args: losses.extend(train(args)))
    monkeypatch.setattr(module, "loss_at", fixed(module.loss_at))
    monkeypatch.setenv("HF_TOKEN", "hf_given")
    with loopback_hub() as hub, connected(hub, monkeypatch):
        module.main()
    pushed = set(hub.repos["user/example"].tree())
    adapter = "pytorch_lora_weights.safetensors"
    expected = {"README.md", "gsnr_report.json", "gsnr_report.png", "validation.png", adapter}
    assert pushed - {".gitattributes"} == expected
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.01
    folder = tmp_path / "demo_output" / "text_to_image_lora"
    assert Image.open(folder / "validation.png").size == (256, 256)
    card = (folder / "README.md").read_text()
    assert card.startswith(
        "---\nlibrary_name: diffusers\ntags:\n- lora\n- text-to-image\n- stable-diffusion\n- hf-sai\n"
    )
    assert "# LoRA text-to-image adapter\n\nOf a tiny pipeline, with rank 4." in card
    assert "Trained with **SGD-SaI**" in card
    report = GSNRReport.load(folder)
    assert {row.status for row in report.tensors} == {"measured"}
    assert report.to_text() in capsys.readouterr().out


def fixed(loss_at):
    """The same images, noise and times at every step: a set on which the loss can be compared."""
    return lambda step, *rest: loss_at(0, *rest)


def test_a_checkpoint_of_another_optimizer_is_refused(example, tmp_path):
    example(tmp_path, "--optim", "swan", "--learning_rate", "1e-3", "--max_train_steps", "2")
    with pytest.raises(ValueError, match="SGDSaI loads only state that SGDSaI saved, but SWAN saved this one"):
        example(tmp_path, "--resume_from_checkpoint", "latest")
