"""
Random runs against float64 references, one number at a time: options that change in mid-run, NaN and inf at any step,
gradients that are missing or zero, mixed dtypes, pairs, layer-wise, and state through every door in the middle.

Each in float64, to rounding, and with parameters, gradients and buffers of any dtypes beside each other, within what
their digits allow. A few hundred in any run; 15,000 with `HF_SAI_LONG_TESTS=1`.
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
from support.gradients import Given, through_safetensors
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from hf_sai.optim import SWAN, SGDSaI, SGDSaILayerwise, SWANLayerwise


LONG = os.environ.get("HF_SAI_LONG_TESTS") == "1"
BLOCKS, RUNS = 20, 125 if LONG else 3  # BLOCKS * RUNS of each kind in each precision
SHAPES = [(4, 6), (6, 4), (7,), (1,), (3, 2, 2), (5, 5), ()]
PAIRS = [(2, 6), (4, 2), (3, 5), (7, 3), (1, 4), (4, 1)]  # A and B in turn
A_RATE = 0.3
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


class Slow:
    """SGD-SaI on float64 arrays, from its docstring: one rule per line."""

    def __init__(self, values, normalize, measure_steps, paired=False):
        self.paired, self.norms, self.rms = paired, [0.0] * len(values), None
        self.moves = [[0.0] for _ in values]
        self.values = [numpy.array(value, dtype=float) for value in values]
        self.normalize, self.k = normalize, measure_steps
        self.samples = [[] for _ in values]
        self.constant = [False] * len(values)
        self.m = [None] * len(values)
        self.max, self.rounds = None, 0

    def gsnr(self, i):
        return math.fsum(self.samples[i]) / len(self.samples[i]) if self.samples[i] else 0.0

    def bounded(self, gradients):
        """Of pairs of factors: over their norm, at least the first one of the pair; A's times a rate."""
        if not self.paired:
            return gradients
        found = list(gradients)
        for a in range(0, len(gradients), 2):
            there = {i: numpy.linalg.norm(gradients[i]) for i in (a, a + 1) if gradients[i] is not None}
            norm = self.norms[a] or max(filter(math.isfinite, there.values()), default=0.0)
            if norm and all(map(math.isfinite, there.values())):
                self.norms[a] = norm
            for i, own in there.items():
                if norm:
                    found[i] = (A_RATE if i == a else 1.0) * gradients[i] / max(own, norm)
        return found

    def measure(self, gradients, moving, eps, resolutions):
        now = []
        for i, g in enumerate(gradients):
            if g is None or not numpy.isfinite(g).all() or len(self.samples[i]) >= self.k or not g.any():
                continue
            now.append(i)
            n, std = g.size, g.std(ddof=1) if g.size > 1 else 0.0
            if n < 2 or std <= resolutions[i] * abs(g.mean()):
                self.constant[i] = True
                self.samples[i].append(math.sqrt(n))
            else:
                self.samples[i].append(max(numpy.linalg.norm(g) / (std + eps), math.sqrt(n - 1)))
        measured = [i for i, found in enumerate(self.samples) if found and not self.constant[i]]
        if measured or self.rounds:
            self.rounds += 1
            if measured and self.rounds <= self.k:
                self.max = max(self.gsnr(i) for i in measured)
        if now and self.rounds <= self.k:
            elements = numpy.concatenate([self.gsnr(i) * moving[i].ravel() for i in now])
            self.rms = math.sqrt((elements**2).mean())

    def step(self, gradients, lr, momentum, weight_decay, eps, maximize, resolutions):
        moving = self.bounded(gradients)
        self.measure(gradients, moving, eps, resolutions)
        for i, g in enumerate(gradients):
            if g is None or not numpy.isfinite(g).all():
                continue
            g = -moving[i] if maximize else moving[i]
            scale = self.gsnr(i)
            if self.normalize == "max" and scale:
                scale /= self.max or max(self.gsnr(j) for j in range(len(self.values)))
            if self.normalize == "rms" and scale:
                scale /= self.rms
            direction = g
            if momentum and scale:
                self.m[i] = g if self.m[i] is None else momentum * self.m[i] + (1 - momentum) * g
                direction = self.m[i]
            self.values[i] = self.values[i] * (1 - lr * weight_decay) - lr * scale * direction
            self.moves[i].append(numpy.abs(lr * scale * direction).max(initial=0.0))


class SlowSWAN:
    """SWAN with its momentum, and Adam, likewise."""

    def __init__(self, values):
        self.values = [numpy.array(value, dtype=float) for value in values]
        self.m = [None] * len(values)
        self.moves = [[0.0] for _ in values]  # what an error of one digit in a gradient can change
        self.moments = [(0, 0.0, 0.0)] * len(values)

    def step(self, gradients, lr, momentum, weight_decay, maximize, resolutions):
        del resolutions
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
                self.moves[i].append(lr * 3.0)
                continue
            if momentum:
                self.m[i] = g if self.m[i] is None else momentum * self.m[i] + (1 - momentum) * g
                g = self.m[i]
            normed = numpy.array(grad_norm(g.reshape(shape[0], -1).tolist()))
            wide = normed.shape[0] > normed.shape[1]
            direction = whitened(normed.T if wide else normed)
            sizes = numpy.linalg.svd(normed, compute_uv=False)
            sizes = sizes[sizes > 1e-9 * sizes.max()]
            spread = g.reshape(shape[0], -1).std(axis=1)
            offset = (numpy.abs(g).max() / spread[spread > 0].min()) if spread.any() else 0.0
            condition = (sizes.max() / sizes.min() if len(sizes) else 0.0) * (1.0 + offset)
            self.moves[i].append(lr * 3.0 * math.sqrt(g.size) * condition)
            direction = direction.T if wide else direction
            norm = numpy.linalg.norm(direction)
            direction = direction * (numpy.linalg.norm(normed) / norm if norm else 0.0)
            sign = -1.0 if maximize else 1.0
            self.values[i] = decayed - sign * lr * 3.0 * direction.reshape(shape)


def some_gradients(chance, generator, shapes, dtypes):
    """Of one step: mostly ordinary, some missing, zero, or with an inf or NaN."""
    found = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        what = chance.random()
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** chance.randint(-2, 1)
        if what < 0.1:
            found.append(None)
            continue
        if what < 0.2:
            gradient = torch.zeros(shape, dtype=torch.float64)
        elif what < 0.3:
            flat = gradient.view(-1)
            flat[chance.randrange(len(flat))] = chance.choice([math.nan, math.inf, -math.inf])
        found.append(gradient.to(dtype))
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
        state = through_safetensors(state, folder / "state.safetensors")
    resumed.load_state_dict(state)
    return resumed


def give(optimizer, params, gradients):
    """Through backward where the optimizer updates there."""
    optimizer.zero_grad()
    if not isinstance(optimizer, (SGDSaILayerwise, SWANLayerwise)):
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = None if gradient is None else gradient.clone()
    else:
        there = [Given.apply(param, g) for param, g in zip(params, gradients, strict=True) if g is not None]
        if there:
            sum(there).backward()
    optimizer.step()


KINDS = {
    "sgd": (SGDSaI, SGDSaILayerwise),
    "paired": (SGDSaI, SGDSaI),  # layer-wise refuses pairs
    "swan": (SWAN, SWANLayerwise),
}


def some_options(kind, chance, start):
    """Those of an optimizer, and the reference that has the same."""
    options = {"lr": 1e-2, "maximize": chance.random() < 0.2}
    if kind == "swan":
        return {**options, "whitening": "svd"}, SlowSWAN(start)
    normalize, steps = chance.choice(["none", "max", "rms"]), chance.choice([1, 1, 2])
    options |= {"normalize": normalize, "measure_steps": steps, "foreach": chance.choice([None, None, True])}
    if kind == "paired":
        options |= {"lora_policy": "paired"}
    return options, Slow(start, normalize, steps, kind == "paired")


def some_dtypes(mixed, chance, count):
    """Of parameters and of their gradients, which torch lets differ if it is told so."""
    if not mixed:
        return [torch.float64] * count, [torch.float64] * count
    dtypes = [chance.choice(list(EPS)) for _ in range(count)]
    others = list(EPS) if hasattr(torch.Tensor, "grad_dtype") else []  # of torch 2.10 and newer
    return dtypes, [chance.choice([dtype, dtype, *others]) for dtype in dtypes]


def one_run(seed, kind, mixed, folder):
    """The largest difference to the reference, in units of what rounding allows."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cls = KINDS[kind][seed % 3 == 0]
    shapes = PAIRS if kind == "paired" else SHAPES
    count = chance.randint(1, len(shapes) // 2) * 2 if kind == "paired" else chance.randint(1, len(shapes))
    shapes = shapes[:count]
    dtypes, of_gradients = some_dtypes(mixed, chance, count)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    if mixed:
        for param in params:
            param.grad_dtype = None
    options, slow = some_options(kind, chance, [param.detach().double().numpy() for param in params])

    def make(params):
        return cls([(f"p{index}", param) for index, param in enumerate(params)], **options)

    optimizer = make(params)
    momenta = [chance.choice([0.0, 0.5, 0.9])] if kind == "swan" else [0.0, 0.5, 0.9]
    largest = [max(1.0, numpy.abs(value).max()) for value in slow.values]
    steps = chance.randint(3, 8)
    for index in range(steps):
        now = {
            "lr": chance.choice([1e-2, 3e-3, 1e-1]),
            "momentum": chance.choice(momenta),
            "weight_decay": chance.choice([0.0, 0.1, 0.7]),
        }
        optimizer.param_groups[0].update(now)
        gradients = some_gradients(chance, generator, shapes, of_gradients)
        give(optimizer, params, gradients)
        arrays = [None if each is None else each.double().numpy() for each in gradients]
        more = {} if kind == "swan" else {"eps": 1e-8}
        slow.step(
            arrays, **now, **more, maximize=options["maximize"], resolutions=[EPS[each] for each in of_gradients]
        )
        largest = [max(old, numpy.abs(new).max()) for old, new in zip(largest, slow.values, strict=True)]
        if chance.random() < 0.15:
            # DCP loads what a new optimizer has after a step: the same keys, which hang on the momentum of the first.
            like_new = (
                momenta == [0.0]
                if kind == "swan"
                else all("momentum_buffer" in state for state in optimizer.state.values())
            )
            doors = ["plain", "torch.save", "safetensors"] + ["dcp"] * (like_new and not optimizer_is_layerwise(cls))
            place = folder / f"{seed}-{index}"
            place.mkdir()
            optimizer = through(chance.choice(doors), make, optimizer, params, place)
    worst = 0.0
    for index, (param, value) in enumerate(zip(params, slow.values, strict=True)):
        assert param.isfinite().all()
        assert param.dtype == dtypes[index]
        difference = numpy.abs(param.detach().double().numpy() - value).max()
        exact = dtypes[index] == of_gradients[index] == torch.float64
        if not mixed:
            allowed = 1e-9 * max(1.0, numpy.abs(value).max())
        else:  # half a digit of the value in each step, and what a digit of a gradient or buffer does to a move
            digit = EPS[dtypes[index]]
            if kind == "swan" and not (max(momenta) and dtypes[index] == torch.bfloat16):  # no buffer in bf16
                digit = EPS[torch.float64 if exact else torch.float32]
            if kind == "paired" and not exact:
                digit = max(digit, EPS[torch.float32])  # in which gradients are bounded
            allowed = steps * EPS[dtypes[index]] * largest[index] + 4 * digit * math.fsum(slow.moves[index]) + 1e-9
        worst = max(worst, difference / allowed)
    return worst


def optimizer_is_layerwise(cls):
    return issubclass(cls, (SGDSaILayerwise, SWANLayerwise))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("precision", ["float64", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_runs_are_those_of_the_reference(tmp_path, kind, precision, block):
    different = {}
    for seed in range(block * RUNS, (block + 1) * RUNS):
        worst = one_run(seed, kind, precision == "mixed", tmp_path)
        if not worst <= 1.0:
            different[seed] = worst
    assert different == {}
