"""A script that builds torch.optim.AdamW trains with ours, groups as they are; anything else is an error."""

from __future__ import annotations

import datetime
import inspect
import logging
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from accelerate import Accelerator
from hub_server import connected, loopback_hub
from support.pictures import no_pictures
from torch import nn

from hf_sai import SWAN, GSNRReport, SGDSaI, create_optimizer
from hf_sai.cli.run import Script, launch
from hf_sai.hub.card import update_card
from hf_sai.optim import OptionError
from hf_sai.stand_in import Replacement
from trainer_patches.script_optimizer import (
    ForeignOptimizerError,
    guarded_steps,
    replaced_adamw,
    root_modules,
    stand_in_for_adamw,
)


SCRIPT = str(Path(__file__).parent / "fixtures" / "script_like_diffusers.py")
ADAMW = torch.optim.AdamW


@pytest.fixture
def run_script(monkeypatch, tmp_path):
    """
    Runs the stand-in for diffusers' scripts in this process, and returns what it found; draws a picture on request.
    """

    def run(*arguments, optim="sgd_sai", optim_args=None, picture=False):
        if not picture:
            no_pictures(monkeypatch)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        monkeypatch.setattr(sys, "argv", ["hf-sai"])
        monkeypatch.setattr(sys, "path", ["", *sys.path])
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        arguments = ["--output", str(tmp_path), *arguments]
        launch(Script(SCRIPT, arguments, False, Replacement.of(optim, optim_args, arguments)))
        return sys.modules["__main__"].found

    yield run
    assert torch.optim.AdamW is sys.modules["torch.optim.adamw"].AdamW is ADAMW


def moved(found, part):
    return [not torch.equal(a, b) for a, b in zip(found["before"][part], found["after"][part], strict=True)]


@pytest.mark.parametrize("params", ["list", "generator", "filter", "chain", "keyword"])
def test_every_way_of_giving_parameters_trains_as_our_own_loop_does(run_script, params):
    found = run_script("--params", params, "--learning_rate", "0.1", optim_args="momentum=0.5,normalize=none")
    optimizer = found["optimizer"]
    assert found["is_adamw"]
    assert isinstance(optimizer, SGDSaI)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["momentum"], group["eps"]) == (0.1, 1e-2, 0.5, 1e-8)
    assert len(group["params"]) == 13
    assert "betas" not in group
    assert all(moved(found, "unet"))
    again = trained_by_hand(found, optimizer)
    for ours, theirs in zip(again, found["after"]["unet"] + found["after"]["text_encoder"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def trained_by_hand(found, optimizer):
    """The same four steps with hf_sai's own constructor, from the same weights."""
    main = sys.modules["__main__"]
    unet, encoder = nn.Sequential(main.Block(), main.Block()), main.Encoder()
    params = [*unet.parameters(), *encoder.parameters()]
    with torch.no_grad():
        for param, value in zip(params, found["before"]["unet"] + found["before"]["text_encoder"], strict=True):
            param.copy_(value)
    ours = create_optimizer("sgd_sai", params, lr=0.1, weight_decay=1e-2, momentum=0.5)
    for batch in main.batches:
        unet(encoder(batch)).square().mean().backward()
        ours.step()
        ours.zero_grad()
    return [param.detach() for param in params]


def test_groups_keep_order_rates_and_decay_and_can_be_frozen_later(run_script):
    found = run_script("--params", "groups", "--learning_rate", "0.2", "--freeze_text_encoder_at", "2")
    first, second = found["optimizer"].param_groups
    assert (len(first["params"]), len(second["params"])) == (8, 5)
    assert (first["lr"], first["weight_decay"], first["eps"]) == (0.2, 1e-2, 1e-8)
    assert (second["lr"], second["initial_lr"], second["weight_decay"], second["eps"]) == (0.0, 0.05, 0.5, 1e-8)
    assert all(moved(found, "unet"))
    assert not any(moved(found, "text_encoder"))


def test_without_lr_ours_is_taken(run_script):
    assert run_script("--no_lr")["optimizer"].param_groups[0]["lr"] == 1e-2


def test_what_is_not_used_and_an_adamw_rate_are_said_once(run_script, caplog):
    with caplog.at_level(logging.WARNING):
        run_script("--params", "groups", "--learning_rate", "1e-4")
    said = [record.getMessage() for record in caplog.records if record.name == "hf_sai.stand_in"]
    assert said[0] == "sgd_sai does not use what the script sets for AdamW: betas, eps."
    assert said[1].startswith(
        "lr=0.0001 is a usual one for AdamW and small for sgd_sai: with normalize=none start at 1e-3 on pretrained"
    )
    assert len(said) == 2


def test_swan_takes_betas_eps_and_routes_from_the_modules(run_script, caplog):
    with caplog.at_level(logging.WARNING):
        found = run_script("--params", "groups", "--learning_rate", "1e-3", optim="swan", optim_args="scale=1")
    assert [record.getMessage() for record in caplog.records if record.name == "hf_sai.stand_in"] == []
    optimizer = found["optimizer"]
    assert isinstance(optimizer, SWAN)
    first, second = optimizer.param_groups
    assert (first["betas"], first["eps"], first["scale"]) == ((0.8, 0.99), 1e-7, 1.0)
    assert (second["eps"], second["weight_decay"], second["lr"]) == (1e-3, 0.5, 1e-3 / 4)
    assert first["reasons"] == ["linear layer", *["not a matrix"] * 3] * 2
    assert second["reasons"] == ["embedding", "linear layer", *["not a matrix"] * 3]
    assert second["routes"][0] == "adam"
    kept = [set(optimizer.state.get(param, {})) for param in second["params"][:2]]
    assert "exp_avg" in kept[0]
    assert "exp_avg" not in kept[1]


def test_options_that_are_typed_go_before_the_scripts(run_script):
    found = run_script("--learning_rate", "1e-3", optim="swan", optim_args="betas=0.5/0.6")
    assert found["optimizer"].param_groups[0]["betas"] == (0.5, 0.6)


@pytest.mark.parametrize(
    ("flags", "steps", "remedy"),
    [
        (["--use_8bit_adam"], "bitsandbytes.optim.AdamW8bit", "remove --use_8bit_adam from the script's options"),
        (["--optimizer", "prodigy"], "prodigyopt.prodigy.Prodigy", "remove --optimizer from the script's options"),
        (["--optimizer=adam"], "torch.optim.adam.Adam", "remove --optimizer from the script's options"),
    ],
)
def test_another_optimizer_stops_at_its_first_step(run_script, flags, steps, remedy):
    with pytest.raises(ForeignOptimizerError) as error:
        run_script(*flags)
    assert str(error.value) == (
        f"hf-sai run --optim sgd_sai must be the optimizer that trains, but the script steps {steps}; {remedy}"
    )
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    torch.optim.Adam([param]).step()  # the guard is gone


def test_a_resumed_run_ends_as_the_uninterrupted_one(run_script, tmp_path):
    common = ["--params", "groups", "--learning_rate", "0.1"]
    whole = run_script(*common)
    run_script(*common, "--steps", "2", "--save_state", str(tmp_path / "state"))
    resumed = run_script(*common, "--load_state", str(tmp_path / "state"))
    assert all(moved(whole, "unet"))
    for part in ("unet", "text_encoder"):
        for one, other in zip(whole["after"][part], resumed["after"][part], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_report_and_card_ride_along_with_checkpoints_and_the_scripts_own_push(run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_given")
    with loopback_hub() as hub, connected(hub, monkeypatch):
        hub.add("user/repo", {})
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        found = run_script("--save_state", str(tmp_path / "checkpoint-4"), "--push_to_hub", picture=True)
    pushed = hub.repos["user/repo"].tree()
    report = GSNRReport.load(tmp_path)
    assert [row.name for row in report.tensors] == [
        *(f"Sequential.{name}" for name, _ in sys.modules["__main__"].unet.named_parameters()),
        *(f"Encoder.{name}" for name, _ in sys.modules["__main__"].text_encoder.named_parameters()),
    ]
    statistics = found["optimizer"].gsnr_statistics()
    assert [row.scale for row in report.tensors] == [each.scale for each in statistics]
    assert {**report.run, "date": ""} == {"measurements": 13, "date": "", "world_size": 1}
    assert datetime.date.fromisoformat(report.run["date"])
    assert report == GSNRReport.load(tmp_path / "checkpoint-4")
    assert (tmp_path / "gsnr_report.png").read_bytes() == (tmp_path / "checkpoint-4" / "gsnr_report.png").read_bytes()
    assert {"gsnr_report.json", "gsnr_report.png", "README.md", "checkpoint-4/gsnr_report.json"} <= set(pushed)
    card = pushed["README.md"].decode()
    (tmp_path / "expected.md").write_text("---\nlicense: openrail++\n---\n\n# LoRA of a script\n")
    update_card(tmp_path / "expected.md", report)
    assert card == (tmp_path / "README.md").read_text() == (tmp_path / "expected.md").read_text()
    assert "# LoRA of a script\n\n<!-- hf-sai:begin -->" in card
    assert huggingface_hub.upload_folder.__func__ is huggingface_hub.HfApi.upload_folder  # the moments are undone
    assert {Accelerator.save_state.__module__, Accelerator.end_training.__module__} == {"accelerate.accelerator"}
    assert not any(hasattr(each, "__wrapped__") for each in (Accelerator.save_state, Accelerator.end_training))


def test_start_and_end_are_said_and_a_report_that_cannot_be_written_is_a_warning(
    run_script, tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.setattr(GSNRReport, "save", lambda self, folder: 1 / 0)
    run_script("--params", "groups", "--learning_rate", "0.1")
    assert capsys.readouterr().err.splitlines() == [
        "hf-sai: SGDSaI in the place of torch.optim.AdamW: 13 tensors (0.000204 M elements), lr 0.1, 0.025, weight "
        "decay 0.01, 0.5",
        "hf-sai: SGDSaI ran, 4 steps",
    ]
    assert "The report could not be written; the script goes on." in caplog.text


def launched(tmp_path, monkeypatch, code, *arguments):
    """A script that builds nothing, or something else."""
    for name, value in (("argv", ["hf-sai"]), ("path", ["", *sys.path]), ("excepthook", sys.excepthook)):
        monkeypatch.setattr(sys, name, value)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    (tmp_path / "script.py").write_text(code)
    replacement = Replacement.of("sgd_sai", None, list(arguments))
    launch(Script(str(tmp_path / "script.py"), list(arguments), False, replacement))


STEP_OF_OURS = """
import torch
from hf_sai import create_optimizer
param = torch.nn.Parameter(torch.ones(2)); param.grad = torch.tensor([1., 2.])
create_optimizer("swan", [param]).step()
"""


@pytest.mark.parametrize("code", ["import torch", "import sys; sys.exit()", "import sys; sys.exit(0)"])
def test_a_script_that_built_none_of_ours_ends_with_an_error(tmp_path, monkeypatch, capsys, code):
    with pytest.raises(SystemExit) as ending:
        launched(tmp_path, monkeypatch, code)
    assert ending.value.code == 1
    assert "so it did not train with sgd_sai; choose torch's AdamW" in capsys.readouterr().err


def test_a_script_may_build_one_of_ours_by_itself(tmp_path, monkeypatch, capsys):
    launched(tmp_path, monkeypatch, STEP_OF_OURS)
    assert capsys.readouterr() == (
        "",
        "hf-sai: SWAN ran, 1 steps\n",
    )  # and no line on AdamW's place, which nothing took


def test_the_scripts_own_help_and_failures_are_not_ours_to_judge(tmp_path, monkeypatch):
    launched(tmp_path, monkeypatch, "", "--help")
    with pytest.raises(SystemExit) as ending:
        launched(tmp_path, monkeypatch, "import sys; sys.exit(3)")
    assert ending.value.code == 3


def test_one_that_was_built_and_never_stepped_is_a_warning(tmp_path, monkeypatch, caplog):
    launched(tmp_path, monkeypatch, "import torch; torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.5)")
    assert "sgd_sai was built but the script never stepped it" in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgd_sai", "momentun=0.9", "did you mean momentum?"),
        ("sgd_sai", "momentum=1.5", r"momentum must be in \[0, 1\) but is 1.5"),
        ("sgd_sai", "gsnr=user/repo", "leave gsnr out"),
        ("swan_layerwise", None, "use --optim swan"),
        ("adamw", None, "choose one of: sgd_sai"),
    ],
)
def test_a_wrong_choice_is_an_error_before_the_script_starts(name, options, message):
    with pytest.raises(ValueError, match=message):
        Replacement.of(name, options, [])


@pytest.mark.parametrize("mode", ["deepspeed", "fsdp"])
def test_a_launcher_that_splits_tensors_is_an_error_before_the_script_starts(monkeypatch, mode):
    monkeypatch.setenv(f"ACCELERATE_USE_{mode.upper()}", "true")
    with pytest.raises(OptionError, match=f"but the launcher has set {mode}"):
        Replacement.of("sgd_sai", None, [])


def test_swan_with_nothing_to_whiten_says_so_and_is_adam(caplog):
    ours, theirs = nn.Embedding(4, 3), nn.Embedding(4, 3)
    theirs.load_state_dict(ours.state_dict())
    gradients = [torch.randn(4, 3) for _ in range(2)]
    with Replacement.of("swan", "adam_lr_ratio=1", []).installed():
        swan = torch.optim.AdamW(ours.parameters(), lr=3e-3, weight_decay=0.1)
    for optimizer, embedding in ((swan, ours), (ADAMW(theirs.parameters(), lr=3e-3, weight_decay=0.1), theirs)):
        for gradient in gradients:
            embedding.weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    assert "swan whitens nothing here: all tensors of the script's optimizer go to Adam." in caplog.text


def test_swan_knows_a_lone_embedding_beside_a_model_and_says_what_it_can_not_find(caplog):
    embedding, layer, bare = nn.Embedding(4, 3), nn.Linear(3, 3), nn.Parameter(torch.ones(3, 3))
    late = nn.Embedding(4, 3)
    replacement = Replacement.of("swan", None, [])
    with replacement.installed():
        optimizer = torch.optim.AdamW([{"params": embedding.weight}, {"params": [layer.weight]}, {"params": [bare]}])
        optimizer.add_param_group({"params": late.weight, "amsgrad": True})
    assert [group["reasons"] for group in optimizer.param_groups] == [
        ["embedding"],
        ["linear layer"],
        ["by shape: the module is not known"],
        ["embedding"],
    ]
    assert "amsgrad" not in optimizer.param_groups[-1]
    assert "swan: the modules of 1 tensors were not found; routed by shape." in caplog.text


def test_without_weight_decay_adamws_is_taken_and_warnings_come_once_for_two_optimizers(caplog):
    layer = nn.Linear(3, 3)
    with Replacement.of("swan", None, []).installed():
        assert torch.optim.AdamW([layer.weight]).param_groups[0]["weight_decay"] == 1e-2
        assert isinstance(sys.modules["torch.optim.adamw"].AdamW([layer.weight]), SWAN)
    with Replacement.of("sgd_sai", None, []).installed():
        for param in layer.parameters():
            torch.optim.AdamW([param], lr=1e-3, fused=True)
    said = [record.getMessage() for record in caplog.records if record.name == "hf_sai.stand_in"]
    assert [text.split(":")[0] for text in said] == [
        "sgd_sai does not use what the script sets for AdamW",
        "lr=0.001 is a usual one for AdamW and small for sgd_sai",
    ]


def test_root_modules_are_the_outermost_ones():
    inner, other = nn.Linear(2, 2), nn.Linear(2, 2)
    outer = nn.Sequential(nn.Sequential(inner), other)
    assert root_modules([inner.weight, other.bias]) == [outer]
    assert root_modules([nn.Parameter(torch.ones(2))]) == []


def test_the_stand_in_has_adamws_signature_and_refuses_what_adamw_refuses():
    stand_in = stand_in_for_adamw(SGDSaI)
    param = nn.Parameter(torch.ones(2))
    assert inspect.signature(stand_in) == inspect.signature(ADAMW)
    assert issubclass(stand_in, SGDSaI)
    with pytest.raises(TypeError, match="beta"):
        stand_in([param], beta=0.9)
    with pytest.raises(ValueError, match="empty parameter list"):
        stand_in([])
    with pytest.raises(TypeError, match="should be an iterable"):
        stand_in(param)
    optimizer = stand_in([param], torch.tensor(0.25), (0.9, 0.95), maximize=True)
    assert (optimizer.defaults["lr"], optimizer.defaults["maximize"]) == (0.25, True)


def test_a_library_that_derives_from_it_with_a_step_of_its_own_is_stopped():
    stand_in = stand_in_for_adamw(SGDSaI)

    class Theirs(stand_in):
        def step(self, closure=None):
            return None

    class Renamed(stand_in):
        pass

    param = nn.Parameter(torch.ones(2))
    param.grad = torch.tensor([1.0, 2.0])
    with (
        replaced_adamw(stand_in),
        guarded_steps(lambda optimizer: isinstance(optimizer, SGDSaI), lambda optimizer: "stop") as stepped,
    ):
        Renamed([param]).step()
        torch.optim.AdamW([param]).step()
        with pytest.raises(ForeignOptimizerError, match="stop"):
            Theirs([param]).step()
    assert stepped == {Renamed: 1, stand_in: 1}


def test_an_error_of_options_is_one_that_catches_value_errors():
    assert issubclass(OptionError, ValueError)
    assert issubclass(ForeignOptimizerError, ValueError)
