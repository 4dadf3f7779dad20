"""
Random runs against float64 references, one number at a time: options that change in mid-run, NaN and inf at any step,
gradients that are missing or zero, mixed dtypes, pairs, layer-wise, and state through every door in the middle.

A few hundred in any run; 5,000 with `HF_SAI_LONG_TESTS=1`.
"""

from __future__ import annotations

import copy
import io
import math
import os
import random

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from reference import grad_norm, whitened
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from hf_sai.optim import SWAN, SGDSaI, SGDSaILayerwise, SWANLayerwise


LONG = os.environ.get("HF_SAI_LONG_TESTS") == "1"
BLOCKS, RUNS = 20, 125 if LONG else 8  # BLOCKS * RUNS of each of the two optimizers
SHAPES = [(4, 6), (6, 4), (7,), (1,), (3, 2, 2), (5, 5), ()]


class Slow:
    """SGD-SaI on float64 arrays, from its docstring: one rule per line."""

    def __init__(self, values, normalize, measure_steps):
        self.values = [numpy.array(value, dtype=float) for value in values]
        self.normalize, self.k = normalize, measure_steps
        self.samples = [[] for _ in values]
        self.constant = [False] * len(values)
        self.m = [None] * len(values)
        self.max, self.rounds = None, 0

    def gsnr(self, i):
        return math.fsum(self.samples[i]) / len(self.samples[i]) if self.samples[i] else 0.0

    def measure(self, gradients, eps):
        for i, g in enumerate(gradients):
            if g is None or not numpy.isfinite(g).all() or len(self.samples[i]) >= self.k or not g.any():
                continue
            n, std = g.size, g.std(ddof=1) if g.size > 1 else 0.0
            if n < 2 or std <= 2.0**-52 * abs(g.mean()):
                self.constant[i] = True
                self.samples[i].append(math.sqrt(n))
            else:
                self.samples[i].append(max(numpy.linalg.norm(g) / (std + eps), math.sqrt(n - 1)))
        measured = [i for i, found in enumerate(self.samples) if found and not self.constant[i]]
        if measured or self.rounds:
            self.rounds += 1
            if measured and self.rounds <= self.k:
                self.max = max(self.gsnr(i) for i in measured)

    def step(self, gradients, lr, momentum, weight_decay, eps, maximize):
        self.measure(gradients, eps)
        for i, g in enumerate(gradients):
            if g is None or not numpy.isfinite(g).all():
                continue
            g = -g if maximize else g
            scale = self.gsnr(i)
            if self.normalize == "max" and scale:
                scale /= self.max or max(self.gsnr(j) for j in range(len(self.values)))
            direction = g
            if momentum and scale:
                self.m[i] = g if self.m[i] is None else momentum * self.m[i] + (1 - momentum) * g
                direction = self.m[i]
            self.values[i] = self.values[i] * (1 - lr * weight_decay) - lr * scale * direction


class SlowSWAN:
    """SWAN with its momentum, and Adam, likewise."""

    def __init__(self, values):
        self.values = [numpy.array(value, dtype=float) for value in values]
        self.m = [None] * len(values)
        self.moments = [(0, 0.0, 0.0)] * len(values)

    def step(self, gradients, lr, momentum, weight_decay, maximize):
        for i, g in enumerate(gradients):
            if g is None or not numpy.isfinite(g).all():
                continue
            shape = self.values[i].shape
            decayed = self.values[i] * (1 - lr * weight_decay)
            if len(shape) < 2 or shape[0] < 2 or math.prod(shape[1:]) < 2:
                g = -g if maximize else g
                count, mean, square = self.moments[i]
                count, mean, square = count + 1, 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
                self.moments[i] = count, mean, square
                corrected = mean / (1 - 0.9**count), square / (1 - 0.999**count)
                self.values[i] = decayed - lr * 3.0 * corrected[0] / (numpy.sqrt(corrected[1]) + 1e-8)
                continue
            if momentum:
                self.m[i] = g if self.m[i] is None else momentum * self.m[i] + (1 - momentum) * g
                g = self.m[i]
            normed = numpy.array(grad_norm(g.reshape(shape[0], -1).tolist()))
            wide = normed.shape[0] > normed.shape[1]
            direction = whitened(normed.T if wide else normed)
            direction = direction.T if wide else direction
            norm = numpy.linalg.norm(direction)
            direction = direction * (numpy.linalg.norm(normed) / norm if norm else 0.0)
            sign = -1.0 if maximize else 1.0
            self.values[i] = decayed - sign * lr * 3.0 * direction.reshape(shape)


def some_gradients(chance, generator, count):
    """Of one step: mostly ordinary, some missing, zero, or with an inf or NaN."""
    found = []
    for shape in SHAPES[:count]:
        what = chance.random()
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** chance.randint(-2, 1)
        if what < 0.1:
            gradient = None
        elif what < 0.2:
            gradient = torch.zeros(shape, dtype=torch.float64)
        elif what < 0.3:
            flat = gradient.view(-1)
            flat[chance.randrange(len(flat))] = chance.choice([math.nan, math.inf, -math.inf])
        found.append(gradient)
    return found


def through(door, make, optimizer, params, folder):
    """The optimizer that has what the other one saved, by one of the ways to save."""
    resumed = make(params)
    if door == "dcp":
        optimizer.zero_grad()  # with gradients there torch would not make the state that it loads into
        model = nn.Module()
        for index, param in enumerate(params):
            model.register_parameter(f"p{index}", param)
        options = StateDictOptions(flatten_optimizer_state_dict=False)
        dcp.save({"o": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=folder)
        values = [param.detach().clone() for param in params]
        state = {"o": get_optimizer_state_dict(model, resumed, options=options)}
        dcp.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(model, resumed, state["o"], options=options)
        for param, value in zip(params, values, strict=True):
            assert torch.equal(param, value)
        return resumed
    state = copy.deepcopy(optimizer.state_dict())
    if door == "torch.save":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    if door == "safetensors":
        tensors = {
            f"{index}.{key}": value.contiguous()
            for index, each in state["state"].items()
            for key, value in each.items()
            if isinstance(value, torch.Tensor)
        }
        save_file(tensors, folder / "state.safetensors")
        for name, value in load_file(folder / "state.safetensors").items():
            index, key = name.split(".", 1)
            state["state"][int(index)][key] = value
    resumed.load_state_dict(state)
    return resumed


def give(optimizer, params, gradients):
    """Through backward where the optimizer updates there."""
    optimizer.zero_grad()
    if not isinstance(optimizer, (SGDSaILayerwise, SWANLayerwise)):
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = None if gradient is None else gradient.clone()
    else:
        there = [_Given.apply(param, g) for param, g in zip(params, gradients, strict=True) if g is not None]
        if there:
            sum(there).backward()
    optimizer.step()


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx, param, gradient):
        ctx.save_for_backward(gradient)
        return param.detach().sum() * 0

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0].clone(), None


def one_run(seed, cls, folder):
    """The largest difference to the reference, in units of the largest value."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    count = chance.randint(1, len(SHAPES))
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES[:count]]
    params = [nn.Parameter(each.clone()) for each in start]
    maximize, sgd = chance.random() < 0.2, issubclass(cls, SGDSaI)
    options = {"lr": 1e-2, "maximize": maximize}
    if sgd:
        normalize, steps = chance.choice(["none", "max"]), chance.choice([1, 1, 2])
        options |= {"normalize": normalize, "measure_steps": steps, "foreach": chance.choice([None, None, True])}
        slow = Slow([each.numpy() for each in start], normalize, steps)
    else:
        options |= {"whitening": "svd"}
        slow = SlowSWAN([each.numpy() for each in start])

    def make(params):
        return cls([(f"p{index}", param) for index, param in enumerate(params)], **options)

    optimizer = make(params)
    momenta = [chance.choice([0.0, 0.5, 0.9])] if not sgd else [0.0, 0.5, 0.9]
    for index in range(chance.randint(3, 8)):
        now = {
            "lr": chance.choice([1e-2, 3e-3, 1e-1]),
            "momentum": chance.choice(momenta),
            "weight_decay": chance.choice([0.0, 0.1, 0.7]),
        }
        optimizer.param_groups[0].update(now)
        gradients = some_gradients(chance, generator, count)
        give(optimizer, params, gradients)
        arrays = [None if each is None else each.numpy() for each in gradients]
        slow.step(arrays, **now, **({"eps": 1e-8} if sgd else {}), maximize=maximize)
        if chance.random() < 0.15:
            # DCP loads what a new optimizer has after a step: the same keys, which hang on the momentum of the first.
            like_new = (
                all("momentum_buffer" in state for state in optimizer.state.values()) if sgd else momenta == [0.0]
            )
            doors = ["plain", "torch.save", "safetensors"] + ["dcp"] * (like_new and not optimizer_is_layerwise(cls))
            place = folder / f"{seed}-{index}"
            place.mkdir()
            optimizer = through(chance.choice(doors), make, optimizer, params, place)
    worst = 0.0
    for param, value in zip(params, slow.values, strict=True):
        assert param.isfinite().all()
        difference = numpy.abs(param.detach().numpy() - value).max()
        worst = max(worst, difference / max(1.0, numpy.abs(value).max()))
    return worst


def optimizer_is_layerwise(cls):
    return issubclass(cls, (SGDSaILayerwise, SWANLayerwise))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("optim", ["sgd", "swan"])
def test_random_runs_are_those_of_the_reference(tmp_path, optim, block):
    classes = (SGDSaI, SGDSaILayerwise) if optim == "sgd" else (SWAN, SWANLayerwise)
    different = {}
    for seed in range(block * RUNS, (block + 1) * RUNS):
        worst = one_run(seed, classes[seed % 3 == 0], tmp_path)
        if worst > 1e-9:
            different[seed] = worst
    assert different == {}
