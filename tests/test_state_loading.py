"""State through torch's doors: hooks, other orders, partial loads, older checkpoints, other dtypes and devices."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.gradients import through_safetensors
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from hf_sai.optim import SWAN, SGDSaI, SGDSaILayerwise, SWANLayerwise


CLASSES = {"sgd": SGDSaI, "swan": SWAN, "sgd layer-wise": SGDSaILayerwise, "swan layer-wise": SWANLayerwise}
SHAPES = {"a": (4, 6), "b": (4, 6), "c": (5,)}


def stepped(cls, names="abc", dtype=torch.float32, steps=2, **options):
    """Named parameters and an optimizer that has made steps."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(SHAPES[name], generator=generator).to(dtype) for name in SHAPES}
    params = {name: nn.Parameter(values[name].clone()) for name in names}
    optimizer = cls(list(params.items()), lr=1e-2, momentum=0.9, weight_decay=0.1, **options)
    for index in range(steps):
        advance(params, optimizer, index)
    return params, optimizer


def advance(params, optimizer, index):
    for name, param in params.items():
        generator = torch.Generator().manual_seed(100 * index + ord(name))
        param.grad = torch.randn(SHAPES[name], generator=generator).to(param.dtype)
    optimizer.step()
    optimizer.zero_grad()


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[key].dtype, key
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


def by_name(optimizer, loaded):
    """torch's documented way to load what was saved in another order, or with more parameters."""
    new = {"state": {}, "param_groups": copy.deepcopy(loaded["param_groups"])}
    (group,), mine = new["param_groups"], optimizer.param_groups[0]["param_names"]
    saved = list(group["param_names"])
    at = [saved.index(name) for name in mine]
    for key, value in group.items():
        if isinstance(value, list) and len(value) == len(saved):
            group[key] = [value[index] for index in at]
    group["params"] = list(range(len(mine)))
    new["state"] = {index: loaded["state"][old] for index, old in enumerate(at)}
    return new


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", ["cab", "ba", "c"])
@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_a_pre_hook_decides_what_is_loaded(cls, names, dtype):
    options = {"state_dtype": "float32"} if issubclass(cls, SGDSaI) else {}
    saved_params, saved = stepped(cls, dtype=dtype, **options)
    params, optimizer = stepped(cls, names, dtype=dtype, steps=0, **options)
    optimizer.register_load_state_dict_pre_hook(by_name)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    for name in names:
        assert_same_state(optimizer.state[params[name]], saved.state[saved_params[name]])
    # And it goes on as the other does.
    for name, param in params.items():
        param.data.copy_(saved_params[name])
    advance(params, optimizer, 7)
    advance(saved_params, saved, 7)
    for name in names:
        torch.testing.assert_close(params[name], saved_params[name], rtol=0, atol=0)


@pytest.mark.parametrize("cls", [SGDSaI, SWAN])
def test_what_a_pre_hook_changes_in_a_tensor_is_loaded_and_checked(cls):
    params, saved = stepped(cls, dtype=torch.bfloat16)

    def halve(optimizer, loaded):
        for state in loaded["state"].values():
            for key in ("momentum_buffer", "exp_avg"):
                if key in state:
                    state[key] = state[key] * 0.5

    mine, optimizer = stepped(cls, dtype=torch.bfloat16, steps=0)
    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    for name in SHAPES:
        for key in ("momentum_buffer", "exp_avg"):
            if key in saved.state[params[name]]:
                assert torch.equal(optimizer.state[mine[name]][key], saved.state[params[name]][key] * 0.5)

    adam = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    optimizer.register_load_state_dict_pre_hook(lambda *_: adam.state_dict())
    with pytest.raises(ValueError, match="but AdamW saved this one"):
        optimizer.load_state_dict(saved.state_dict())
    assert not [key for key in optimizer.__dict__ if "loading" in key]


def test_a_post_hook_has_the_last_word():
    """It sees the tensors in their documented dtype, and what it sets stays."""
    _, saved = stepped(SGDSaI, dtype=torch.bfloat16, state_dtype="float32")
    mine, optimizer = stepped(SGDSaI, dtype=torch.bfloat16, steps=0, state_dtype="float32")
    seen = []

    def look(loaded):
        seen.extend(state["momentum_buffer"].dtype for state in loaded.state.values())
        for state in loaded.state.values():
            state["momentum_buffer"] = torch.full_like(state["momentum_buffer"], 2.0)

    optimizer.register_load_state_dict_post_hook(look)
    optimizer.load_state_dict(saved.state_dict())
    assert seen == [torch.float32] * 3
    assert all((optimizer.state[param]["momentum_buffer"] == 2.0).all() for param in mine.values())


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_loaded_tensors_have_the_documented_dtype_and_device(cls):
    """A state from the CPU beside parameters elsewhere (meta stands for an accelerator), Adam's step too."""
    _, saved = stepped(cls, dtype=torch.bfloat16)
    params = [
        (name, nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))) for name, shape in SHAPES.items()
    ]
    optimizer = cls(params, lr=1e-2, momentum=0.9, weight_decay=0.1)
    optimizer.load_state_dict(saved.state_dict())
    found = {
        (key, value.dtype)
        for _, param in params
        for key, value in optimizer.state[param].items()
        if isinstance(value, torch.Tensor) and value.device.type == "meta"
    }
    kept = {("momentum_buffer", torch.bfloat16)}
    if issubclass(cls, SWAN):
        kept |= {(key, torch.float32) for key in ("step", "exp_avg", "exp_avg_sq")}
    assert found == kept
    assert all(
        value.device.type == "meta"
        for _, param in params
        for value in optimizer.state[param].values()
        if isinstance(value, torch.Tensor)
    )


def test_a_float16_buffer_of_an_older_version_is_widened():
    params, saved = stepped(SGDSaI, dtype=torch.float16)
    old = copy.deepcopy(saved.state_dict())
    old["param_groups"][0]["state_dtype"] = "float16"
    for state in old["state"].values():
        state["momentum_buffer"] = state["momentum_buffer"].half()
    mine, optimizer = stepped(SGDSaI, dtype=torch.float16, steps=0)
    optimizer.load_state_dict(old)
    for name, param in mine.items():
        buffer = optimizer.state[param]["momentum_buffer"]
        assert buffer.dtype == torch.float32
        torch.testing.assert_close(buffer, saved.state[params[name]]["momentum_buffer"], rtol=1e-3, atol=1e-4)
    advance(mine, optimizer, 3)


@pytest.mark.parametrize("cls", [SGDSaI, SWAN])
def test_other_options_on_resume_are_said_in_the_same_words(cls, caplog):
    _, saved = stepped(cls)
    _, optimizer = stepped(cls, steps=0)
    optimizer.param_groups[0].update(momentum=0.5, eps=1e-6)
    with caplog.at_level(logging.WARNING):
        optimizer.load_state_dict(saved.state_dict())
    assert caplog.messages == [
        "The loaded state goes on with its own options: eps=1e-08 (not 1e-06), momentum=0.9 (not 0.5)."
    ]


def test_other_routes_on_resume_are_said(caplog):
    _, saved = stepped(SWAN)
    state = saved.state_dict()
    _, optimizer = stepped(SWAN, steps=0)
    optimizer.param_groups[0]["routes"] = ["matrix", "adam", "adam"]
    with caplog.at_level(logging.WARNING):
        optimizer.load_state_dict(state)
    assert caplog.messages == [
        "The loaded state goes on with its own options: routes of 1 tensors, such as matrix (not adam)."
    ]


# ---- torch.distributed.checkpoint ----


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 4, bias=False), nn.Linear(6, 4)
        self.extra = nn.Parameter(torch.zeros(3))


def grouped(cls, model, empty=False, swapped=False):
    groups = [
        {"params": [("a.weight", model.a.weight), ("b.weight", model.b.weight)], "weight_decay": 0.1},
        {"params": [("b.bias", model.b.bias), ("extra", model.extra)], "weight_decay": 0.0},
    ]
    groups = groups[::-1] if swapped else groups
    return cls([*groups, *([{"params": [], "weight_decay": 0.3}] if empty else [])], lr=1e-2, momentum=0.9)


def train(model, optimizer, steps, first=0):
    for index in range(first, first + steps):
        for position, param in enumerate(model.parameters()):
            if param is not model.extra:  # never has a gradient
                generator = torch.Generator().manual_seed(10 * index + position)
                param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("order", ["empty first", "empty last"])
def test_a_group_without_parameters_stands_beside_named_ones(cls, order):
    groups = [{"params": []}, {"params": [("a", nn.Parameter(torch.ones(3, 3)))]}, {"params": []}]
    optimizer = cls(groups[:2] if order == "empty first" else groups[1:])
    optimizer.add_param_group({"params": [("b", nn.Parameter(torch.ones(2)))]})
    assert [len(group["param_names"]) for group in optimizer.param_groups] == (
        [0, 1, 1] if order == "empty first" else [1, 0, 1]
    )
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("change", ["same", "empty group", "swapped groups"])
@pytest.mark.parametrize("cls", [SGDSaI, SWAN])
def test_a_distributed_checkpoint_goes_on(tmp_path, cls, change):
    """By name, whatever the order of the groups; a group without parameters has nothing to load."""
    options = StateDictOptions(flatten_optimizer_state_dict=False)
    model = Two()
    optimizer = grouped(cls, model, empty=change == "empty group")
    train(model, optimizer, 3)
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path)
    again = Two()
    again.load_state_dict(model.state_dict())
    resumed = grouped(cls, again, empty=change == "empty group", swapped=change == "swapped groups")
    state = {"optim": get_optimizer_state_dict(again, resumed, options=options)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(again, resumed, state["optim"], options=options)
    train(model, optimizer, 2, first=3)
    train(again, resumed, 2, first=3)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("cls", [SGDSaI, SWAN])
def test_a_distributed_checkpoint_of_before_a_group_held_a_key(tmp_path, cls):
    """As one that an older version wrote: what its groups lack is what the new ones have."""
    options = StateDictOptions(flatten_optimizer_state_dict=False)
    model = Two()
    optimizer = grouped(cls, model)
    train(model, optimizer, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    for group in saved["param_groups"]:
        for key in ("maximize", "lora_policy", "split_qkv", "paired"):
            group.pop(key, None)
    again = Two()
    again.load_state_dict(model.state_dict())
    resumed = grouped(cls, again)
    set_optimizer_state_dict(again, resumed, saved, options=options)
    assert all(group["maximize"] is False for group in resumed.param_groups)
    train(model, optimizer, 2, first=2)
    train(again, resumed, 2, first=2)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_torch_save_and_safetensors_and_a_plain_load_are_exact(tmp_path, cls):
    params, optimizer = stepped(cls, dtype=torch.bfloat16)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    state = through_safetensors(state, tmp_path / "state.safetensors")
    mine, resumed = stepped(cls, dtype=torch.bfloat16, steps=0)
    resumed.load_state_dict(state)
    for name, param in mine.items():
        assert_same_state(resumed.state[param], optimizer.state[params[name]])
