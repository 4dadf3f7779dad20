"""
The functions by which other programs build an optimizer, taken from their own source and called with what a user
types there. `HOST_SOURCES` is a folder of checkouts, `sd-scripts`, `ai-toolkit`, `OneTrainer` and `SimpleTuner`; the
lines that are tried here stand in docs/hosts.md.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import copy
import enum
import importlib
import inspect
import io
import logging
import math
import os
import types
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_sai.optim import SWAN, SGDSaI
from hf_sai.stand_in import Replacement


SOURCES = os.environ.get("HOST_SOURCES")
pytestmark = pytest.mark.skipif(SOURCES is None, reason="HOST_SOURCES names no folder of checkouts")


class Missing(dict):
    """Names that a host's module has and the part of it that is tried does not need."""

    def __missing__(self, name):
        if name.startswith("__") or hasattr(builtins, name):
            raise KeyError(name)
        return types.SimpleNamespace


def part_of(host, file, *names, **given):
    """Functions, classes and constants of a host's file, without importing what it imports."""
    path = Path(SOURCES) / host / file
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {}
    for node in tree.body:
        targets = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        for name in [getattr(node, "name", None), *targets]:
            named[name] = node
    body = [ast.parse("from __future__ import annotations").body[0], *(named[name] for name in names)]
    space = Missing(
        torch=torch,
        ast=ast,
        importlib=importlib,
        inspect=inspect,
        copy=copy,
        math=math,
        logger=logging.getLogger(host),
    )
    space.update(
        {name: getattr(typing, name) for name in ("Any", "Dict", "List", "Optional", "Tuple", "Type", "Union")}
    )
    space.update(given)
    exec(compile(ast.Module(body=body, type_ignores=[]), str(path), "exec"), space)
    return [space[name] for name in names]


def network():
    """Linear layers, and images' convolution."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def step(optimizer, params, seed=1):
    """One step with gradients of a seed."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def assert_steps_as(optimizer, params, expected):
    """Three steps from the same weights end as those of `expected`, a function from parameters to optimizer."""
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    other = expected(copies)
    for seed in range(3):
        step(optimizer, params, seed)
        step(other, copies, seed)
    for param, its_copy in zip(params, copies, strict=True):
        assert torch.equal(param, its_copy)
    torch.save(optimizer.state_dict(), saved := io.BytesIO())
    saved.seek(0)
    assert torch.load(saved, weights_only=True)["param_groups"]


# ---- kohya's sd-scripts: --optimizer_type hf_sai.SGDSaI --optimizer_args "normalize=None" ... ----


def kohya(params, optimizer_type, *optimizer_args, **changed):
    (get_optimizer,) = part_of("sd-scripts", "library/train_util.py", "get_optimizer")
    args = argparse.Namespace(
        optimizer_type=optimizer_type,
        optimizer_args=list(optimizer_args),
        use_8bit_adam=False,
        use_lion_optimizer=False,
        fused_backward_pass=False,
        optimizer_schedulefree_wrapper=False,
        learning_rate=1e-2,
        max_grad_norm=1.0,
        lr_scheduler="constant",
    )
    vars(args).update(changed)
    return get_optimizer(args, params)[2]


def kohya_lora(plus=None):
    """Two of its LoRA modules, and the groups that its network makes of them."""
    module, its_network = part_of("sd-scripts", "networks/lora.py", "LoRAModule", "LoRANetwork")
    loras = [module(f"lora_unet_{index}", layer, lora_dim=2) for index, layer in enumerate(network()) if index != 1]
    for lora in loras:
        lora.apply_to()
    made = types.SimpleNamespace(
        text_encoder_loras=[],
        unet_loras=loras,
        block_lr=False,
        loraplus_lr_ratio=plus,
        loraplus_text_encoder_lr_ratio=None,
        loraplus_unet_lr_ratio=None,
        requires_grad_=lambda flag: None,
    )
    groups, _ = its_network.prepare_optimizer_params(made, None, 1e-3, None)
    return loras, groups, [param for lora in loras for param in lora.parameters()]


@pytest.mark.parametrize(
    ("cls", "typed", "options"),
    [
        (SGDSaI, ["normalize=None"], {}),
        (
            SGDSaI,
            ["normalize='max'", "momentum=0.5", "weight_decay=0", "foreach=None"],
            {"normalize": "max", "momentum": 0.5, "weight_decay": 0.0},
        ),
        (SGDSaI, ["lora_policy='paired'"], {"lora_policy": "paired"}),
        (
            SGDSaI,
            ["stochastic_rounding=True", "state_dtype='float32'"],
            {"stochastic_rounding": True, "state_dtype": "float32"},
        ),
        (SWAN, ["betas=(0.9,0.99)", "eps=1e-6", "ns_steps=None"], {"betas": (0.9, 0.99), "eps": 1e-6}),
        (SWAN, ["whitening='svd'", "momentum=0.9"], {"whitening": "svd", "momentum": 0.9}),
    ],
)
def test_kohya_takes_the_class_and_its_options(cls, typed, options):
    _, groups, params = kohya_lora()
    optimizer = kohya(groups, f"hf_sai.{cls.__name__}", *typed)
    assert type(optimizer) is cls
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3]
    assert_steps_as(optimizer, params, lambda copies: cls(copies, lr=1e-3, **options))


def test_kohya_with_the_rates_of_lora_plus():
    _, groups, params = kohya_lora(plus=16)
    optimizer = kohya(groups, "hf_sai.SGDSaI")
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 16e-3]
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] != list(map(id, params))
    with pytest.raises(ValueError, match="must alternate A"):  # its up factors stand in a group of their own
        kohya(kohya_lora(plus=16)[1], "hf_sai.SGDSaI", "lora_policy='paired'")


@pytest.mark.parametrize("typed", ["betas=(0.9,0.99)", "lora_whitening='both'"])
def test_kohya_is_told_what_a_class_alone_cannot_do(typed):
    cls = "hf_sai.SGDSaI" if "betas" in typed else "hf_sai.SWAN"
    with pytest.raises(ValueError, match=r"SGDSaI has no option betas; leave it out|for which the model is needed"):
        kohya(kohya_lora()[1], cls, typed)


@pytest.mark.parametrize(("policy", "whitened"), [("both", {"lora_down", "lora_up"}), ("b_only", {"lora_up"})])
def test_kohya_under_the_launcher_has_swans_policy(policy, whitened):
    """hf-sai run --optim swan --optim_args lora_whitening=both sdxl_train_network.py --optimizer_type AdamW"""
    loras, groups, _ = kohya_lora()
    with Replacement.of("swan", f"lora_whitening={policy}", []).installed():
        optimizer = kohya(groups, "AdamW", "betas=(0.9,0.99)", "weight_decay=0.1")
    routes = {id(row.param): row for row in optimizer.routes()}
    for lora in loras:
        for factor in ("lora_down", "lora_up"):
            row = routes[id(getattr(lora, factor).weight)]
            assert (row.route != "adam") == (factor in whitened)
            assert row.reason.startswith("LoRA " + {"lora_down": "A", "lora_up": "B"}[factor])
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)


# ---- Programs with a closed list: hf-sai run --optim sgd_sai ..., and their AdamW ----


def assert_in_place_of_adamw(build, params, expected=lambda copies: SGDSaI(copies, lr=1e-3, weight_decay=0.0)):
    with Replacement.of("sgd_sai", None, []).installed():
        optimizer = build()
        assert isinstance(optimizer, SGDSaI)
        assert_steps_as(optimizer, params, expected)
    return optimizer


def test_ai_toolkit_under_the_launcher():
    (get_optimizer,) = part_of("ai-toolkit", "toolkit/optimizer.py", "get_optimizer")
    params = list(network().parameters())
    options = {"weight_decay": 0.0, "betas": (0.9, 0.99)}
    assert_in_place_of_adamw(lambda: get_optimizer([{"params": params}], "adamw", 1e-3, options), params)


def test_onetrainer_under_the_launcher():
    (names,) = part_of("OneTrainer", "modules/util/enum/Optimizer.py", "Optimizer", Enum=enum.Enum)
    none = types.SimpleNamespace
    (create,) = part_of(
        "OneTrainer", "modules/util/create.py", "create_optimizer", Optimizer=names, TrainingMethod=none(FINE_TUNE=0)
    )
    params = list(network().parameters())
    group = {"name": "unet", "params": params, "lr": 1e-3, "initial_lr": 1e-3}
    choices = {
        "optimizer": names.ADAMW,
        "beta1": 0.9,
        "beta2": 0.999,
        "weight_decay": 0.0,
        "eps": 1e-8,
        "fused": False,
    }

    class Chosen(types.SimpleNamespace):
        __getattr__ = lambda self, name: None  # noqa: E731

    config = types.SimpleNamespace(
        optimizer=Chosen(**choices), learning_rate=1e-3, model_part_configs=lambda: [], training_method=1
    )
    collection = types.SimpleNamespace(parameters_for_optimizer=lambda config: [group])
    optimizer = assert_in_place_of_adamw(lambda: create(collection, None, config), params)
    assert (optimizer.param_groups[0]["name"], optimizer.param_groups[0]["initial_lr"]) == ("unet", 1e-3)


def test_simpletuner_under_the_launcher():
    file = "simpletuner/helpers/training/optimizer_param.py"
    parts = (
        "optimizer_parameters",
        "convert_arg_to_parameters",
        "_sanitize_optimizer_kwargs",
        "create_optimizer_with_param_groups",
    )
    params = list((model := network()).parameters())

    def build():
        entry = {"default_settings": {"betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8, "amsgrad": False}}
        choices = {"torch-adamw": {**entry, "class": torch.optim.AdamW}}
        parameters, _, _, create = part_of("SimpleTuner", file, *parts, optimizer_choices=choices)
        args = argparse.Namespace(
            optimizer="torch-adamw",
            optimizer_config="eps=1e-8,weight_decay=0.0",
            optimizer_beta1=None,
            optimizer_beta2=None,
            optimizer_release_gradients=False,
        )
        cls, details = parameters("torch-adamw", args)
        return create(model, cls, {**details["default_settings"], "lr": 1e-3})

    assert_in_place_of_adamw(build, params)


def test_a_closed_list_refuses_a_class_path():
    """So that the launcher is the way; a name in the YAML is not."""
    (get_optimizer,) = part_of("ai-toolkit", "toolkit/optimizer.py", "get_optimizer")
    with pytest.raises(ValueError, match="Unknown optimizer type"):
        get_optimizer([], "hf_sai.SGDSaI", 1e-3)
