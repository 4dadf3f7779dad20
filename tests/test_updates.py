"""The three paths of the update: equal to each other on mixed dtypes and layouts, and small in memory."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys

import pytest
import torch
from packaging.version import Version
from support.processes import peak_allocated

from hf_sai.optim import SGDSaI, sgd_update
from hf_sai.optim.gsnr import CHUNK_NUMEL
from hf_sai.optim.rounding import round_stochastically_
from hf_sai.optim.sgd_update import BLOCK_NUMEL, COMPILED_NUMEL
from hf_sai.optim.swan import SWAN


PATHS = {
    "single": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "auto": {},
}


def mixed_params():
    """Every dtype, non-contiguous and channels-last layouts, 0-d to 5-d, empty, and one larger than a block."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = [
        make(()),
        make(7),
        make(5, 3, dtype=torch.float64),
        make(4, 6, dtype=torch.bfloat16),
        make(33, dtype=torch.float16),
        make(6, 4).t(),
        make(2, 3, 4, 4).to(memory_format=torch.channels_last),
        make(1, 2, 2, 1, 3),
        make(0, 3),
        make(BLOCK_NUMEL + 17),
        make(BLOCK_NUMEL // 512 + 1, 513, dtype=torch.bfloat16),
        make(COMPILED_NUMEL + 3, dtype=torch.float64),
    ]
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def run(path, steps=4, **options):
    params = mixed_params()
    optimizer = SGDSaI(params, lr=1e-4, **PATHS[path], **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in params:
            gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad = torch.empty_like(param).copy_(gradient)  # laid out as the parameter
        optimizer.step()
    return params, optimizer


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@pytest.mark.parametrize(
    ("momentum", "weight_decay", "maximize"), list(itertools.product([0.0, 0.9], [0.0, 0.1], [False, True]))
)
@pytest.mark.parametrize("path", ["foreach", "fused", "auto"])
def test_paths_are_equal_on_mixed_dtypes(path, momentum, weight_decay, maximize):
    options = {"momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
    expected, reference = run("single", **options)
    found, optimizer = run(path, **options)
    assert optimizer.gsnr_statistics() == reference.gsnr_statistics()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[a.dtype], atol=TOLERANCE[a.dtype])
    for a, b in zip(found, expected, strict=True):
        if momentum:
            states = (optimizer.state[a], reference.state[b])
            pair = [state["momentum_buffer"] / (state["buffer_scale"] or 1.0) for state in states]
            torch.testing.assert_close(*pair, rtol=TOLERANCE[a.dtype], atol=TOLERANCE[a.dtype])


def taken(monkeypatch, params, **options):
    """How many tensors took each path in the second step."""
    counts = dict.fromkeys(("_single", "_together", "_wide", "_fused", "_compiled"), 0)
    for name in counts:
        original = getattr(sgd_update, name)

        def count(batch, *args, name=name, original=original):
            counts[name] += len(batch.params)
            return original(batch, *args)

        monkeypatch.setattr(sgd_update, name, count)
    optimizer = SGDSaI(params, **options)
    for step in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        counts.update(dict.fromkeys(counts, 0)) if step else None
        optimizer.step()
    return counts


def test_low_precision_is_kept_away_from_the_fused_kernel_for_a_reason():
    """If this fails, torch has mended its CPU kernel, and `sgd_update._NATIVE` can be looked at again."""
    param, grad, buffer = (torch.randn(64).bfloat16() for _ in range(3))
    expected = 0.9 * buffer.float() + 0.1 * grad.float()
    options = {"weight_decay": 0.0, "momentum": 0.9, "dampening": 0.9, "lr": 0.1, "nesterov": False}
    torch._fused_sgd_([param], [grad], [buffer], **options, maximize=False, is_first_step=False)
    assert (buffer.float() - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"_fused": 2, "_single": 2}),
        ({"fused": False}, {"_single": 4}),
        ({"foreach": True}, {"_together": 2, "_single": 2}),
        ({"fused": True}, {"_fused": 2, "_compiled": 1, "_single": 1}),  # the smaller bf16 one is not worth it
        ({"fused": True, "stochastic_rounding": True}, {"_fused": 2, "_single": 2}),
        ({"fused": True, "momentum": 0.0}, {"_fused": 2, "_single": 2}),
    ],
)
def test_each_path_takes_what_it_can(monkeypatch, options, expected):
    tensors = [torch.randn(8, 4), torch.randn(1 << 16), torch.randn(4, 8).bfloat16(), torch.randn(1 << 16).bfloat16()]
    found = taken(monkeypatch, [torch.nn.Parameter(tensor) for tensor in tensors], **options)
    assert {name: count for name, count in found.items() if count} == expected


def test_where_nothing_can_be_compiled_the_plain_path_takes_over_with_one_warning(tmp_path):
    code = """
import logging, sys, torch
from hf_sai import SGDSaI
logging.basicConfig(stream=sys.stdout, level=logging.WARNING)
results = []
for fused in (True, False):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(1 << 17).bfloat16())
    optimizer = SGDSaI([param], fused=fused, weight_decay=0.1)
    for _ in range(3):
        param.grad = torch.randn(1 << 17).bfloat16()
        optimizer.step()
    results.append(param.detach())
print(torch.equal(*results))
"""
    environment = {
        **os.environ,
        "PATH": "/nonexistent",
        "CXX": "/nonexistent/g++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    warning, equal = done.stdout.splitlines()
    assert "fused=True: no kernel can be compiled here (InvalidCxxCompiler" in warning
    assert equal == "True"


@pytest.mark.parametrize("path", ["single", "fused", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_needs_less_extra_memory_than_the_largest_tensor(path, dtype):
    params = [torch.nn.Parameter(torch.randn(16 * BLOCK_NUMEL).to(dtype)) for _ in range(2)]
    optimizer = SGDSaI(params, **PATHS[path])
    for _ in range(2):  # measured, and compiled where it is asked for
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    largest = params[0].nbytes
    peak = peak_allocated(lambda: (torch.empty(10), optimizer.step()))
    assert peak <= (1_000_000 if (path, dtype) == ("single", torch.float32) or path == "fused" else largest + 1000)


def test_measuring_needs_a_chunk_of_extra_memory():
    param = torch.nn.Parameter(torch.randn(16 * BLOCK_NUMEL))
    optimizer = SGDSaI([param], momentum=0.0)
    param.grad = torch.randn_like(param)
    assert peak_allocated(optimizer.step) <= 4 * 8 * CHUNK_NUMEL


def test_state_bytes_per_parameter():
    for options, per_element in (({}, 4), ({"state_dtype": torch.bfloat16}, 2), ({"momentum": 0.0}, 0)):
        param = torch.nn.Parameter(torch.randn(1000))
        optimizer = SGDSaI([param], **options)
        param.grad = torch.randn(1000)
        optimizer.step()
        held = sum(v.nbytes for v in optimizer.state[param].values() if isinstance(v, torch.Tensor))
        assert held == per_element * 1000


def test_state_dtype_is_kept_by_a_load_and_rounds_only_the_buffer():
    param = torch.nn.Parameter(torch.randn(500, dtype=torch.float32))
    optimizer = SGDSaI([param], lr=0.1, weight_decay=0.0, state_dtype="bfloat16")
    start, first, second = param.detach().clone(), torch.randn(500), torch.randn(500)
    for gradient in (first, second):
        param.grad = gradient
        optimizer.step()
    scale = optimizer.gsnr_statistics()[0].scale
    average = (scale * first).bfloat16().float() / scale * 0.9 + second * 0.1
    torch.testing.assert_close(param.detach(), start - 0.1 * scale * (first + average), rtol=1e-5, atol=1e-5)
    kept = optimizer.state[param]["momentum_buffer"]
    assert kept.dtype == torch.bfloat16
    torch.testing.assert_close(kept.float(), scale * average, rtol=2.0**-8, atol=0.0)
    other = SGDSaI([torch.nn.Parameter(param.detach().clone())], state_dtype="bfloat16")
    other.load_state_dict(optimizer.state_dict())
    (state,) = other.state.values()
    assert state["momentum_buffer"].dtype == torch.bfloat16


# ---- bf16 parameters ----


def test_stochastic_rounding_is_right_on_average_and_never_beyond_the_neighbours():
    values = torch.tensor([1.0 + 2.0**-10, -3.0 - 2.0**-9, 1e-30, 0.0, 2.0])
    samples = torch.stack([round_stochastically_(values.clone()) for _ in range(20_000)])
    assert torch.equal(samples, samples.bfloat16().float())
    below, above = samples.min(0).values, samples.max(0).values
    assert (above - below <= 2.0**-6 * values.abs().clamp(min=1e-38)).all()
    assert (below <= values).all()
    assert (values <= above).all()
    torch.testing.assert_close(samples.mean(0), values, rtol=2e-4, atol=0.0)
    assert (samples[:, 3] == 0.0).all()
    assert (samples[:, 4] == 2.0).all()  # a bf16 number stays itself


def test_stochastic_rounding_leaves_what_is_not_finite():
    values = torch.tensor([float("inf"), -float("inf"), float("nan")])
    rounded = round_stochastically_(values.clone())
    assert torch.equal(rounded[:2], values[:2])
    assert rounded[2].isnan()


def test_stochastic_rounding_moves_what_plain_rounding_loses():
    means = {}
    for stochastic in (False, True):
        param = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
        optimizer = SGDSaI([param], lr=3e-6, momentum=0.0, weight_decay=0.0, stochastic_rounding=stochastic)
        gradient = (1 + 0.5 * torch.randn(4000)).bfloat16()
        for _ in range(20):
            param.grad = gradient
            optimizer.step()
        exact = 1 - 20 * 3e-6 * optimizer.gsnr_statistics()[0].scale * gradient.float().mean().item()
        means[stochastic] = param.float().mean().item()
    assert means[False] == 1.0
    assert means[True] == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize(
    ("lr", "dtype", "options", "warnings"),
    [
        (1e-5, torch.bfloat16, {}, 1),
        (1e-5, torch.bfloat16, {"stochastic_rounding": True}, 0),
        (1e-5, torch.float32, {}, 0),
        (1e-1, torch.bfloat16, {}, 0),
        (0.0, torch.bfloat16, {}, 0),
    ],
)
def test_bf16_parameters_that_would_not_move_are_warned_about_once(lr, dtype, options, warnings, caplog):
    pairs = [(name, torch.nn.Parameter(torch.randn(64).to(dtype))) for name in ("first", "second")]
    optimizer = SGDSaI(pairs, lr=lr, **options)
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        for _ in range(2):
            for _, param in pairs:
                param.grad = torch.randn(64).to(dtype)
            optimizer.step()
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == warnings
    assert all(m.startswith("2 of 2 bf16 parameters move by less than 2^-8 of their size") for m in messages)


def test_frozen_parameters_and_empty_groups_are_no_work():
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = SGDSaI([{"params": [frozen]}, {"params": []}])
    optimizer.step()
    assert torch.equal(frozen, torch.ones(3))
    assert not optimizer.state


def test_works_under_torch_compile():
    params, same = mixed_params()[:3], mixed_params()[:3]
    compiled, eager = SGDSaI(params, lr=0.01), SGDSaI(same, lr=0.01)
    step = torch.compile(compiled.step, backend="aot_eager")
    for _ in range(4):
        for param, other in zip(params, same, strict=True):
            param.grad = torch.randn_like(param)
            other.grad = param.grad.clone()
        step()
        eager.step()
    for param, other in zip(params, same, strict=True):
        torch.testing.assert_close(param, other)
    assert compiled.gsnr_statistics() == eager.gsnr_statistics()


# Where the host reads what the step before found: torch's SGD has one break too, of its own making.
OF_NEWS = "Skip inlining `torch.compiler.disable()`d function"


@pytest.mark.parametrize(("optimizer", "kinds", "graphs"), [(SGDSaI, (OF_NEWS,), 6), (SWAN, (OF_NEWS,), 8)])
def test_a_compiled_step_breaks_only_where_the_host_reads(optimizer, kinds, graphs):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    shapes = [(8, 8), (8, 8), (6, 8), (8,)]
    params, same = ([torch.nn.Parameter(torch.full(shape, 0.5)) for shape in shapes] for _ in range(2))
    compiled, eager = optimizer(params, lr=0.01), optimizer(same, lr=0.01)
    step = compiled.step
    for number in range(6):
        for param, other in zip(params, same, strict=True):
            param.grad = torch.randn_like(param)
            other.grad = param.grad.clone()
        for each in (compiled, eager):
            each.param_groups[0]["lr"] = 0.01 / (number + 1)
        step()
        eager.step()
        if number == 0:
            step = torch.compile(compiled.step, backend="eager")
            counters.clear()
    if Version(torch.__version__) >= Version("2.13"):  # older ones break at more of Python
        assert OF_NEWS in {kind.split("\n")[0] for kind in counters["graph_break"]}
        assert not [kind for kind in counters["graph_break"] if not kind.startswith(kinds)]
        assert 1 <= counters["stats"]["unique_graphs"] <= graphs, counters["stats"]
    for param, other in zip(params, same, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-5)


def test_a_compiled_step_leaves_a_group_where_a_gradient_is_not_finite_and_tells_in_the_next(caplog):
    params = [("a", torch.nn.Parameter(torch.ones(4, 3))), ("b", torch.nn.Parameter(torch.ones(5)))]
    optimizer = SGDSaI(params, lr=0.01)
    step, moved, told = torch.compile(optimizer.step, backend="eager"), [], []
    for number in range(4):
        for _, param in params:
            param.grad = torch.arange(1.0, param.numel() + 1).view(param.shape)
        if number == 1:
            params[1][1].grad[2] = torch.nan
        before = [param.detach().clone() for _, param in params]
        caplog.clear()
        (step if number else optimizer.step)()
        moved.append([not torch.equal(old, param) for old, (_, param) in zip(before, params, strict=True)])
        ours = [record for record in caplog.records if record.name.startswith("hf_sai")]
        told.append([record.getMessage().split(" has ")[0] for record in ours])
    assert moved == [[True] * 2, [False] * 2, [True] * 2, [True] * 2]
    assert told == [[], [], ["The gradient of b"], []]


def test_a_grad_scaler_skips_a_step_and_all_others_are_as_without_it():
    plain, scaled = (torch.nn.Parameter(torch.linspace(-1, 1, 12)) for _ in range(2))
    optimizer, other = SGDSaI([plain], lr=0.01), SGDSaI([scaled], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number in range(5):
        gradient = torch.randn(12)
        loss = (scaled * gradient).sum() * (torch.inf if number == 2 else 1.0)
        other.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(other)
        scaler.update()
        if number != 2:
            plain.grad = gradient
            optimizer.step()
    torch.testing.assert_close(plain, scaled, rtol=1e-6, atol=1e-7)
    assert optimizer.param_groups[0]["step"] == other.param_groups[0]["step"] == 4


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_learning_rate_that_is_a_tensor_gives_the_same_and_is_never_read_back(momentum, monkeypatch):
    params, same = mixed_params(), mixed_params()
    rate = torch.tensor(1e-4, dtype=torch.float64)
    by_tensor = SGDSaI(params, lr=rate, weight_decay=0.1, momentum=momentum)
    by_number = SGDSaI(same, lr=1e-4, weight_decay=0.1, momentum=momentum, fused=False, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        for param, other in zip(params, same, strict=True):
            gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad, other.grad = (torch.empty_like(each).copy_(gradient) for each in (param, other))
        if step == 2:  # in place, as a schedule has to do it inside a graph
            rate.fill_(3e-5)
            by_number.param_groups[0]["lr"] = 3e-5
        with monkeypatch.context() as patch:
            patch.setattr("hf_sai.optim.finite.is_known_at_once", lambda device: False)  # as on an accelerator
            if step:  # all is measured: what is left must not wait for the device
                for name in ("item", "tolist", "__float__", "__bool__"):
                    patch.setattr(torch.Tensor, name, lambda *args: pytest.fail("a tensor was read back"))
            by_tensor.step()
        by_number.step()
    for param, other in zip(params, same, strict=True):
        torch.testing.assert_close(param, other, rtol=TOLERANCE[param.dtype], atol=TOLERANCE[param.dtype])
    resumed = SGDSaI(mixed_params(), lr=3e-5, momentum=momentum)
    resumed.load_state_dict(by_tensor.state_dict())
    assert resumed.param_groups[0]["lr"] == rate
