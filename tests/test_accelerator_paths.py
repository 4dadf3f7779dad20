"""
The paths of accelerators by value, walked on the CPU: a stand-in for CUDA's kernel computes as that one does.

With `--device cuda` the same tests run on a card, with its own kernel.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from reference import ReferencePair

from hf_sai.optim import SWAN, SGDSaI, finite, lora_pairs, matrices, polynomials, sgd_update, swan, whitening
from hf_sai.optim.rounding import Rounding
from hf_sai.optim.sgd_batch import Batch, Coefficients


pytestmark = pytest.mark.on_device


def cuda_fused_sgd(
    params, grads, buffers, *, lr, weight_decay, momentum, dampening, nesterov, maximize, is_first_step, found_inf
):
    """FusedSgdKernel.cu: low precision is computed in float32, and each result rounded once."""
    assert not nesterov
    assert not is_first_step
    assert len({tensor.dtype for tensor in [*params, *grads, *buffers]}) == 1
    if found_inf is not None and found_inf:
        return
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        wide = torch.promote_types(param.dtype, torch.float32)
        g = grad.to(wide) * (-1 if maximize else 1) + weight_decay * param.to(wide)
        if buffers:
            assert momentum != 0.0
            g = momentum * buffers[index].to(wide) + (1 - dampening) * g
            buffers[index].copy_(g)
        param.copy_(param.to(wide) - lr * g)


@pytest.fixture
def as_cuda(monkeypatch, device):
    """Has the CPU take CUDA's paths; counts the calls of the kernel."""
    calls = []
    if device != "cpu":
        return calls

    def kernel(params, *args, **kwargs):
        calls.append(len(params))
        cuda_fused_sgd(params, *args, **kwargs)

    monkeypatch.setattr(sgd_update, "is_accelerator", lambda device: True)
    monkeypatch.setattr(sgd_update, "low_precision", lambda dtype: False)
    monkeypatch.setattr(torch, "_fused_sgd_", kernel)
    return calls


SHAPES = [(), (7,), (5, 3), (6, 4), (2, 3, 4, 4), (1, 2, 2, 1, 3), (0, 3), (40, 30), (300,)]


def parameters(dtype, device):
    tensors = [torch.randn(shape, device="cpu").to(dtype) for shape in SHAPES]
    tensors += [tensors[3].clone().t(), tensors[4].clone().to(memory_format=torch.channels_last)]
    return [torch.nn.Parameter(tensor.to(device)) for tensor in tensors]


class Formula:
    """The update as the paper writes it, float64, nothing folded."""

    def __init__(self, params, lr, weight_decay, momentum, maximize=False):
        self.values, self.means = [param.detach().double().cpu().clone() for param in params], [None] * len(params)
        self.scales, self.momentum, self.weight_decay = [0.0] * len(params), momentum, weight_decay
        self.lr, self.sign = lr, -1.0 if maximize else 1.0

    def step(self, grads, divisor=1.0):
        for i, grad in enumerate(grads):
            g = self.sign * grad.double().cpu()
            if not g.numel():
                continue
            n = g.numel()
            if not self.scales[i]:
                self.scales[i] = max((g.norm() / (g.std() + 1e-8)).item(), (n - 1) ** 0.5) if n > 1 else 1.0
            mean = self.means[i]
            self.means[i] = g if mean is None or not self.momentum else self.momentum * mean + (1 - self.momentum) * g
            move = self.lr * self.scales[i] / divisor * self.means[i]
            self.values[i] = self.values[i] * (1 - self.lr * self.weight_decay) - move


def worst(params, formula):
    """In units of the dtype's resolution."""
    pairs = zip(params, formula.values, strict=True)
    errors = [((p.detach().cpu().double() - v).abs() / (1 + v.abs())).max().item() for p, v in pairs if v.numel()]
    return max(errors) / torch.finfo(params[0].dtype).eps


PATHS = {
    "chosen": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "no kernel": {"fused": False},
    "per tensor": {"foreach": False},
    "state_dtype": {"state_dtype": "float32"},
    "by tensor": {},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_the_formula(path, dtype, as_cuda, device):
    if device == "cpu" and path == "no kernel" and dtype.itemsize == 2:
        pytest.skip("the CPU's stand-in has no low precision")
    for momentum, maximize in itertools.product((0.0, 0.9), (False, True)):
        params = parameters(dtype, device)
        options = {"weight_decay": 0.1, "momentum": momentum, "maximize": maximize}
        optimizer, formula = SGDSaI(params, lr=1e-3, **options, **PATHS[path]), Formula(params, 1e-3, **options)
        if path == "by tensor":
            optimizer.param_groups[0]["lr"] = torch.tensor(1e-3, dtype=torch.float64, device=device)
        for step in range(5):
            for param in params:
                param.grad = torch.empty_like(param).copy_(torch.randn(param.shape, device="cpu") * 0.1)
            rate = (1e-3, 1e-3, 3e-4, 5e-4, 5e-4)[step]
            formula.lr = rate
            if path == "by tensor":
                optimizer.param_groups[0]["lr"].fill_(rate)
            else:
                optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            formula.step([param.grad for param in params])
        # The buffer or the learning rate is float32 then.
        as_float32 = path in ("by tensor", "state_dtype") and dtype == torch.float64
        assert worst(params, formula) < (1e8 if as_float32 else 64 if dtype.itemsize > 2 else 6)


ROUNDINGS = {"nearest": None, "kahan": Rounding(), "stochastic": Rounding(3)}
CALLS = {"chosen": {}, "foreach": {"foreach": True, "fused": False}, "per tensor": {"foreach": False}, "by tensor": {}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_flag_leaves_a_call_alone_on_every_path(dtype, strided, momentum, path, rounding, as_cuda, device):
    """Nothing is read back: the update is told by a number on the device."""
    if device == "cpu" and path == "foreach" and dtype.itemsize == 2:
        pytest.skip("the CPU's stand-in has no low precision")
    params = [torch.randn(8, 6, device="cpu").to(device, dtype) for _ in range(3)]
    params = [each.t() if strided else each for each in params]
    buffers = [torch.randn_like(each) for each in params] if momentum else []
    has_errors = rounding == "kahan" and dtype == torch.bfloat16
    errors = [each * 2.0**-10 for each in params] if has_errors else []
    grads = [torch.randn_like(each) for each in params]
    step = torch.tensor(0.1, device=device) if path == "by tensor" else 0.1
    coefficients = [Coefficients(0.9, weight, 0.01, step) for weight in (1.0, 2.0, 3.0)]

    def updated(flag, gradients):
        lists = [[each.clone() for each in values] for values in (params, buffers, errors)]
        noise = ROUNDINGS[rounding] and Rounding(ROUNDINGS[rounding].seed)
        found = None if flag is None else torch.tensor(flag, device=device)
        sgd_update.update(Batch(False, noise, lists[0], gradients, *lists[1:], coefficients, found), **CALLS[path])
        return [each for values in lists for each in values]

    before = [*params, *buffers, *errors]
    bad = [grads[0], torch.full_like(grads[1], math.nan), grads[2]]
    assert all(torch.equal(*pair) for pair in zip(updated(1.0, bad), before, strict=True))
    pairs = list(zip(updated(0.0, grads), updated(None, grads), strict=True))
    assert all(torch.equal(*pair) for pair in pairs)
    assert not any(torch.equal(one, other) for (one, _), other in zip(pairs, before, strict=True))


def test_a_group_is_one_call_and_large_tensors_have_their_own(as_cuda, monkeypatch, device):
    if device != "cpu":
        pytest.skip("calls are counted on the stand-in")
    monkeypatch.setattr(sgd_update, "ACCELERATOR_FUSED_NUMEL", 1000)
    params = parameters(torch.bfloat16, device)
    optimizer = SGDSaI(params, lr=1e-3)
    for step in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        as_cuda.clear()
        optimizer.step()
        # One list; channels-last, or transposed by copies; the one of 1200 elements by itself.
        assert sorted(as_cuda) == [1, 1, 8], step


def test_a_checkpoint_of_before_the_scale_was_folded_goes_on_exactly(as_cuda, device):
    """Its buffer is `m + weight_decay / scale * p`, and it has no `buffer_scale`."""
    start = torch.randn(50, dtype=torch.float64)
    param = torch.nn.Parameter(start.clone().to(device))
    formula = Formula([param], 0.01, 0.1, 0.9)
    grads = [torch.randn(50, dtype=torch.float64) for _ in range(6)]
    for grad in grads[:3]:
        before = formula.values[0].clone()
        formula.step([grad])
    scale = formula.scales[0]
    param.data.copy_(formula.values[0])
    optimizer = SGDSaI([param], lr=0.01, weight_decay=0.1)
    param.grad = torch.zeros_like(param)
    optimizer.step()  # makes the state
    saved = copy.deepcopy(optimizer.state_dict())
    state = saved["state"][0]
    param.data.copy_(formula.values[0])
    del state["buffer_scale"]
    state.update(gsnr=scale, gsnr_step=1, gsnr_count=1, decay_ratio=0.1 / scale, decay=0.01 * 0.1)
    state["momentum_buffer"] = formula.means[0] + 0.1 / scale * before
    optimizer.load_state_dict(saved)
    for grad in grads[3:]:
        param.grad = grad.clone().to(device)
        optimizer.step()
        formula.step([grad])
    assert worst([param], formula) < 64


@pytest.mark.parametrize("change", ["measure_steps", "lr tensor and back", "skipped"])
def test_the_buffer_follows_scales_rates_and_pauses(change, as_cuda, device):
    params = [torch.nn.Parameter(torch.randn(n, dtype=torch.float64, device="cpu").to(device)) for n in (30, 20, 10)]
    formula = Formula(params, 0.01, 0.1, 0.9)
    optimizer = SGDSaI(params, lr=0.01, weight_decay=0.1, measure_steps=2 if change == "measure_steps" else 1)
    samples = []
    for step in range(6):
        grads = [torch.randn(p.shape, dtype=torch.float64, device="cpu") + step for p in params]
        if change == "skipped" and step in (2, 3):
            grads[1] = None
        formula.lr = 0.01 / (step + 1)
        if change == "measure_steps" and step < 2:
            samples.append([(g.norm() / (g.std() + 1e-8)).item() for g in grads])
            formula.scales = [sum(each) / len(each) for each in zip(*samples, strict=True)]
        rate = torch.tensor(formula.lr, dtype=torch.float64) if "tensor" in change and step in (2, 3) else formula.lr
        optimizer.param_groups[0]["lr"] = rate
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else grad.clone().to(device)
        optimizer.step()
        kept = (formula.values[1], formula.means[1])
        formula.step([torch.zeros(0) if grad is None else grad for grad in grads])
        if grads[1] is None:
            formula.values[1], formula.means[1] = kept
    assert worst(params, formula) < (1e9 if "tensor" in change else 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_are_bounded_together_as_one_by_one(dtype, as_cuda, device, monkeypatch):
    shapes = [((3, 8), (5, 3)), ((3, 8), (7, 3)), ((3, 9), (5, 3))]
    params = [torch.nn.Parameter(torch.randn(s, device="cpu").to(device, dtype)) for pair in shapes for s in pair]
    options = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = SGDSaI([{"params": params, "paired": True}], **options)
    arrays = [param.detach().double().cpu().numpy() for param in params]
    expected = [ReferencePair(*arrays[i : i + 2], {**options, "a_rate": lora_pairs.A_RATE}) for i in (0, 2, 4)]
    reads = []
    monkeypatch.setattr(lora_pairs, "fetch", lambda values: reads.append(1) or values.tolist())
    for step in range(4):
        for index, param in enumerate(params):
            size = 0.0 if step == 0 and index % 2 == 0 else 10.0**index
            param.grad = (torch.randn(param.shape, device="cpu") * size).to(device, dtype)
        optimizer.step()
        assert sum(reads) == 1  # in the first step only
        grads = [param.grad.double().cpu().numpy() for param in params]
        for index, reference in enumerate(expected):
            reference.step(grads[2 * index : 2 * index + 2])
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-6
    found = [factor for reference in expected for factor in reference.factors]
    for param, factor in zip(params, found, strict=True):
        torch.testing.assert_close(
            param.detach().double().cpu(), torch.from_numpy(factor), rtol=tolerance, atol=tolerance
        )


@pytest.fixture
def swan_as_cuda(monkeypatch, device):
    """Has SWAN take CUDA's paths on the CPU, from when it is called."""

    def switch():
        for module in (swan, matrices, whitening, finite):
            monkeypatch.setattr(module, "is_known_at_once", lambda device: False)
        monkeypatch.setattr(polynomials, "is_accelerator", lambda tensor: True)

    return switch if device == "cpu" else lambda: None


MATRICES = [(48, 64), (48, 64), (64, 48), (48, 48), (8, 300), (300, 8), (48, 64), (200, 40), (200, 40)]


def swan_steps(dtype, device, start, **options):
    """Three steps of SWAN from `start`; the second gradient is zero, and the seventh has a NaN once."""
    params = [torch.nn.Parameter(each.clone().to(device, dtype)) for each in start]
    params.append(torch.nn.Parameter(start[3].clone().to(device, dtype).t()))  # as it lies in memory, column by column
    optimizer = SWAN([{"params": params, "kind": "swan"}], lr=1e-2, scale=2.0, **options)
    generator = torch.Generator().manual_seed(5)
    for step in range(3):
        for index, param in enumerate(params):
            values = torch.randn(param.shape, generator=generator) * 10.0 ** (index - 4)
            values[: len(values) // 3] *= 30.0
            values *= index != 1
            if (index, step) == (6, 1):
                values[3, 4] = math.nan
            param.grad = torch.empty_like(param).copy_(values)
        optimizer.step()
    return [param.detach().cpu().double() for param in params]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"whitening": "svd"},
        {"whitening": "svd", "weight_decay": 0.1, "momentum": 0.9, "maximize": True},
        {"whitening": "polar", "whitening_dtype": "float32", "weight_decay": 0.1},
        {"whitening": "polar_express", "whitening_dtype": "float32"},
        {"whitening": "newton_schulz", "momentum": 0.5},
        {"whitening": "nsds", "whitening_dtype": "float32"},
        {"whitening": "polar"},
        {"whitening": "polar_express"},
    ],
    ids=str,
)
def test_swan_moves_on_an_accelerator_as_on_the_cpu(options, dtype, swan_as_cuda, device):
    start = [torch.randn(shape) for shape in MATRICES]
    expected = swan_steps(dtype, "cpu", start, **options)
    swan_as_cuda()
    found = swan_steps(dtype, device, start, **options)
    # bfloat16's products differ by their rounding, which the polynomials magnify where a value is small.
    exact = options["whitening"] == "svd" or options.get("whitening_dtype") == "float32"
    moves = [(each.to(dtype).double() - there).norm() for each, there in zip(start, expected, strict=False)]
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        moved = moves[min(index, len(moves) - 1)].item() or 1.0
        rounding = one.norm().item() * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
        assert (one - other).norm().item() <= (1e-4 if exact else 0.1) * moved + 2 * rounding, index
