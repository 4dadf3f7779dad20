"""Gradients that a test chooses, and a state that goes through a file."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file


class Given(torch.autograd.Function):
    """`Given.apply(param, gradient)` is a zero whose backward pass gives the parameter that gradient."""

    @staticmethod
    def forward(ctx, param, gradient):
        ctx.save_for_backward(gradient)
        return param.detach().sum() * 0

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0].clone(), None


def closure_of(optimizer, weight, bias, given):
    """That of torch's tests, which timm has too."""

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(given) + bias).pow(2).sum()
        loss.backward()
        return loss

    return closure


def through_safetensors(state, path):
    """An optimizer's state whose tensors were written to a file and read from it."""
    tensors = {
        f"{index}.{key}": value.contiguous()
        for index, each in state["state"].items()
        for key, value in each.items()
        if isinstance(value, torch.Tensor)
    }
    save_file(tensors, path)
    for name, value in load_file(path).items():
        index, key = name.split(".", 1)
        state["state"][int(index)][key] = value
    return state
