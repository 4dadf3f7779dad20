"""Gradients with inf or NaN, of odd dtypes and sizes, on every path: a tensor that gets one stays, bit for bit."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.gradients import Given
from torch import nn

import hf_sai
from hf_sai.optim import SGDSaI, SGDSaILayerwise, SWANLayerwise, finite
from hf_sai.optim.adam_update import AdamBatch, adam_update, new_adam_state
from hf_sai.optim.finite import LateNews, find_not_finite
from hf_sai.optim.swan import SWAN


PATHS = {
    "sgd": (SGDSaI, {}),
    "sgd, max": (SGDSaI, {"normalize": "max"}),
    "sgd without momentum": (SGDSaI, {"momentum": 0.0}),
    "sgd, foreach": (SGDSaI, {"foreach": True}),
    "sgd, plain": (SGDSaI, {"fused": False, "foreach": False}),
    "sgd, three measuring steps": (SGDSaI, {"measure_steps": 3}),
    "sgd, bf16 state": (SGDSaI, {"state_dtype": "bfloat16"}),
    "sgd layer-wise": (SGDSaILayerwise, {}),
    "swan": (SWAN, {}),
    "swan with momentum": (SWAN, {"momentum": 0.9}),
    "swan layer-wise": (SWANLayerwise, {"momentum": 0.9}),
}


def state_of(optimizer, param):
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else copy.copy(value)
        for key, value in optimizer.state[param].items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def step(optimizer, params, gradients):
    """Through backward, so that layer-wise updates get them too."""
    optimizer.zero_grad()
    loss = sum(Given.apply(param, gradient) for param, gradient in zip(params, gradients, strict=True))
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_a_tensor_stays_as_if_the_step_had_not_been_and_the_others_go_on(path, dtype, bad):
    """Two runs, of which one gets the bad gradient: afterwards they are equal but for the step that was lost."""
    cls, options = PATHS[path]
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 6), (6, 5), (7,), (3,))]
    gradients = [[torch.randn(each.shape, generator=generator).to(dtype) for each in start] for _ in range(5)]
    params = [nn.Parameter(each.clone()) for each in start]
    optimizer = cls(params, lr=1e-2, weight_decay=0.1, **options)
    alone = [nn.Parameter(each.clone()) for each in start]  # the third step of tensors 1 and 2 does not come
    reference = cls(alone, lr=1e-2, weight_decay=0.1, **options)
    for index, now in enumerate(gradients):
        hurt = [each.clone() for each in now]
        if index == 2:
            hurt[1][-1, -1] = bad
            hurt[2][0] = bad
            before = [(params[i].detach().clone(), state_of(optimizer, params[i])) for i in (1, 2)]
        step(optimizer, params, hurt)
        if index == 2:
            for i, (value, state) in zip((1, 2), before, strict=True):
                assert torch.equal(params[i], value)
                assert same(state_of(optimizer, params[i]), state)
            reference.zero_grad()
            sum(Given.apply(alone[i], now[i]) for i in (0, 3)).backward()
            reference.step()
        else:
            step(reference, alone, now)
    for i in range(4):
        assert torch.equal(params[i], alone[i]), i
        assert not torch.equal(params[i], start[i])


@pytest.mark.parametrize("path", ["sgd", "swan"])
def test_one_warning_counts_the_tensors_of_both_kinds(path, caplog):
    cls, options = PATHS[path]
    params = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)] + [nn.Parameter(torch.randn(4)) for _ in range(3)]
    optimizer = cls([(f"p{i}", param) for i, param in enumerate(params)], **options)
    step(optimizer, params, [torch.randn_like(param) for param in params])
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        step(optimizer, params, [torch.full_like(param, math.nan) for param in params])
    said = [record.getMessage() for record in caplog.records]
    assert sum("has inf or NaN" in each for each in said) == (1 if path == "sgd" else 2)  # matrices, then Adam's
    assert any("p0, p1, p2" in each for each in said)


def paired(bad=None, size=100.0):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), LoraConfig(r=4, target_modules=["0"]))
    optimizer = hf_sai.create_optimizer("sgd_sai", model, lr=0.005, weight_decay=0.0, lora_policy="paired")
    a, b = (next(p for n, p in model.named_parameters() if f"lora_{x}" in n) for x in "AB")
    return optimizer, a, b


@pytest.mark.parametrize("hurt", ["a", "b", "both"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_factor_without_a_finite_gradient_stays_and_the_other_keeps_its_bound(bad, hurt):
    optimizer, a, b = paired()
    for when in range(4):
        before = a.detach().clone(), b.detach().clone()
        a.grad, b.grad = torch.randn_like(a) * 100, torch.randn_like(b) * 100
        wrong = when in (0, 2)
        if wrong and hurt in ("a", "both"):
            a.grad[0, 0] = bad
        if wrong and hurt in ("b", "both"):
            b.grad[-1, -1] = bad
        optimizer.step()
        for name, param, old, bound in (("a", a, before[0], 0.3 * 0.005), ("b", b, before[1], 0.005)):
            move = (param - old).square().mean().sqrt().item()
            if wrong and hurt in (name, "both"):
                assert move == 0.0
            else:
                assert 0.0 < move <= bound * 1.1
    # The norm of the pair is that of the first step in which both were finite: B's, which is 100 * sqrt(256).
    assert optimizer.state[a]["pair_norm"] == optimizer.state[b]["pair_norm"] == pytest.approx(1600, rel=0.2)


def test_a_pair_keeps_its_bound_where_float32_overflows():
    optimizer, a, b = paired()
    for _ in range(3):
        before = a.detach().clone(), b.detach().clone()
        a.grad, b.grad = torch.randn_like(a) * 1e25, torch.randn_like(b) * 1e25
        optimizer.step()
        assert 0.0 < (a - before[0]).square().mean().sqrt() <= 0.0015 * 1.1
        assert 0.0 < (b - before[1]).square().mean().sqrt() <= 0.005 * 1.1


def test_large_gradients_are_finite_where_their_norm_is_not():
    for dtype, size in ((torch.float32, 1e30), (torch.float16, 6e4), (torch.float64, 1e300), (torch.bfloat16, 1e38)):
        gradients = [torch.full((64,), size, dtype=dtype), torch.full((64,), size, dtype=dtype)]
        gradients[1][-1] = math.inf
        found = find_not_finite([*gradients, torch.empty(0, 3, dtype=dtype), torch.tensor(math.nan, dtype=dtype)])
        assert found.bad == {1, 3}


# ---- What clipping knows ----


def clipped_run(monkeypatch, hears, bound=1.0):
    """Three steps of clipped gradients; with an optimizer that does not hear of their norm where it is told so."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (5,))]
    optimizer = SGDSaI(params, lr=1e-2)
    looks = []
    real = finite._bad_ones
    with monkeypatch.context() as patch:
        patch.setattr(finite, "_bad_ones", lambda gradients: looks.append(len(gradients)) or real(gradients))
        if not hears:
            patch.setattr(finite, "norm_with", lambda gradient: None)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            nn.utils.clip_grad_norm_(iter(params), bound)
            optimizer.step()
    return params, looks


@pytest.mark.parametrize("bound", [1e-3, 1.0, math.inf])
def test_a_step_does_not_look_where_clipping_has_found_a_finite_norm(bound, monkeypatch):
    heard, looks = clipped_run(monkeypatch, True, bound)
    own, own_looks = clipped_run(monkeypatch, False, bound)
    assert (looks, own_looks) == ([], [2, 2, 2])
    assert all(torch.equal(*pair) for pair in zip(heard, own, strict=True))


def overwrite(params):
    params[0].grad[0, 0] = math.nan


def replace(params):
    params[0].grad = torch.full_like(params[0], math.nan)


def accumulate(params):
    (params[0] * math.nan).sum().backward()


def clip_by_another_norm(params):
    nn.utils.clip_grads_with_norm_(params[:1], 1.0, torch.tensor(math.nan))


def clip_by_a_bound_below_zero(params):
    nn.utils.clip_grad_norm_(params[:1], -math.inf)


def count_what_is_not_zero(params):
    params[0].grad[0, 0] = math.nan
    nn.utils.clip_grad_norm_(params, 1e9, norm_type=0.0)


@pytest.mark.parametrize(
    "change",
    [overwrite, replace, accumulate, clip_by_another_norm, clip_by_a_bound_below_zero, count_what_is_not_zero],
)
def test_what_changes_after_clipping_is_looked_at_again(change):
    params = [nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (5,))]
    optimizer = SGDSaI(params, lr=1e-2)
    for number in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        nn.utils.clip_grad_norm_(params, 1.0)
        if number:
            before = [param.detach().clone() for param in params]
            change(params)
            assert not params[0].grad.isfinite().all()
        optimizer.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])


def test_gradients_without_a_version_are_clipped_as_ever():
    param = nn.Parameter(torch.ones(4))
    with torch.inference_mode():
        param.grad = torch.full((4,), 3.0)
        assert nn.utils.clip_grad_norm_([param], 1.0).item() == 6.0
        assert finite.norm_with(param.grad) is None
        torch.testing.assert_close(param.grad, torch.full((4,), 0.5))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_clipping_to_a_norm_that_is_not_finite_moves_no_tensor_that_has_one(bad):
    params = [nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (5,))]
    optimizer = SGDSaI(params, lr=1e-2, weight_decay=0.0, momentum=0.0)
    for number in range(3):
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.randn_like(param)
        if number == 1:
            params[1].grad[2] = bad
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        # torch multiplies by 0 or by NaN there: nothing is left of the others' gradients.
        assert [torch.equal(*pair) for pair in zip(params, before, strict=True)] == [number == 1] * 2


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_on_a_device_the_norm_becomes_the_flag_of_all(bad, monkeypatch):
    monkeypatch.setattr(finite, "is_known_at_once", lambda device: False)
    monkeypatch.setattr(finite, "flags_of", lambda gradients: pytest.fail("all gradients were read"))
    params = [nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (5,))]
    for param in params:
        param.grad = torch.randn_like(param)
    params[1].grad[2] += bad
    nn.utils.clip_grad_norm_(params, 1.0)
    found = find_not_finite([param.grad for param in params])
    flag = found.on_device[0]
    assert found.on_device[1] is flag
    assert (flag.dtype, flag.shape, flag.item()) == (torch.float32, (), float(bad != 0.0))
    news = LateNews()
    for indices, flags in found.tables:
        news.send(flags, [params[index] for index in indices])
    assert len(news.read()) == (2 if bad else 0)


# ---- What stays on a device ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("accelerator", [False, True])
def test_a_flag_on_the_device_leaves_adams_state_alone(dtype, strided, accelerator, monkeypatch):
    monkeypatch.setattr("hf_sai.optim.adam_update.is_accelerator", lambda device: accelerator)
    torch.manual_seed(0)
    params = [torch.randn(8, 6).to(dtype) for _ in range(3)]
    params = [each.t() if strided else each for each in params]
    grads = [torch.randn_like(each) for each in params]
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}

    def updated(flag, gradients):
        batch = AdamBatch()
        for param, grad in zip(params, gradients, strict=True):
            state = new_adam_state(param)
            batch.append(param.clone(), grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
        adam_update(batch, None, None if flag is None else torch.tensor(flag), **options)
        return [*batch.params, *batch.means, *batch.squares, *batch.steps]

    start = [*params, *(new_adam_state(param)[key] for key in ("exp_avg", "exp_avg_sq", "step") for param in params)]
    bad = [grads[0], torch.full_like(grads[1], math.inf), grads[2]]
    assert all(torch.equal(one, other) for one, other in zip(updated(1.0, bad), start, strict=True))
    assert all(torch.equal(*pair) for pair in zip(updated(0.0, grads), updated(None, grads), strict=True))


@pytest.mark.parametrize("change", ["", "momentum comes", "momentum pauses", "kahan_sum"])
def test_news_from_a_device_is_read_a_step_later_and_puts_right_what_did_not_know(change, monkeypatch):
    """A device leaves out a step of a whole group; the host's numbers are then those of the step before."""
    real = find_not_finite

    def on_device(gradients):
        found = real(gradients)
        flags = torch.tensor([float(index in found.bad) for index in range(len(gradients))])
        found.tables.append((list(range(len(gradients))), flags))
        found.on_device.update(dict.fromkeys(range(len(gradients)), flags.amax()))
        found.bad.clear()
        return found

    dtype = torch.bfloat16 if change == "kahan_sum" else torch.float32
    results = []
    for late in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((4, 6), (5,))]
        optimizer = SGDSaI(params, lr=1e-2, weight_decay=0.5, kahan_sum=change == "kahan_sum")
        with monkeypatch.context() as patch:
            if late:
                patch.setattr("hf_sai.optim.base.find_not_finite", on_device)
            for index in range(7):
                group = optimizer.param_groups[0]
                group["lr"] = 1e-2 * (6 - index) + 1e-3  # the folded decay hangs on the rate of each step
                if change.startswith("momentum"):
                    group["momentum"] = 0.0 if (index < 3 if "comes" in change else 3 <= index < 5) else 0.9
                gradients = [torch.randn_like(param) for param in params]
                if index == 3:
                    gradients[0][0, 0] = math.nan
                    if not late:
                        gradients[1][0] = math.nan  # a group shares its fate
                step(optimizer, params, gradients)
            optimizer.state_dict()
        results.append((params, [state_of(optimizer, param) for param in params]))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert one.keys() == other.keys()
        for key in ("buffer_scale", "decay", "decay_ratio"):
            assert one[key] == other[key], key
        torch.testing.assert_close(one["momentum_buffer"], other["momentum_buffer"])


def test_late_news_says_which():
    news = LateNews()
    news.send(torch.tensor([0.0, 1.0, 0.0, 1.0]), list("abcd"))
    assert news.read() == ["b", "d"]
    assert news.read() == []


# ---- Odd dtypes and sizes ----


@pytest.mark.parametrize("cls", [SGDSaI, SWAN])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameter", [torch.float32, torch.bfloat16, torch.float16])
def test_a_momentum_buffer_takes_any_gradient(cls, parameter, gradient):
    """To the resolution of the coarser dtype the same as all in float32."""
    torch.manual_seed(0)
    start = torch.randn(6, 8).to(parameter)
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.float())
    options = {"lr": 1e-2, "momentum": 0.9} | ({} if cls is SGDSaI else {"whitening_dtype": "float32"})
    optimizers = cls([one], **options), cls([other], **options)
    for _ in range(4):
        given = torch.randn(6, 8).to(gradient)
        # torch's own is of the parameter's dtype; a backward of another library may set another where this is None.
        one.grad_dtype = None
        try:
            one.grad = given
        except RuntimeError:
            pytest.skip("this torch allows no other dtype than the parameter's")
        other.grad = given.float()
        for optimizer in optimizers:
            optimizer.step()
    resolution = torch.finfo(parameter).eps
    torch.testing.assert_close(one.detach().float(), other.detach(), rtol=4 * resolution, atol=4 * resolution)


@pytest.mark.parametrize("size", [1e-7, 5e-9, 1e4])
def test_float16_parameters_keep_their_momentum_right(size):
    """Against float32, as far as float16's own gradients go."""
    torch.manual_seed(0)
    start = torch.randn(16, 16).half()
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizers = [SGDSaI([each], lr=1e-3 / size, weight_decay=0.0) for each in (one, other)]
    for _ in range(10):
        one.grad = (torch.randn(16, 16) * size).half()
        other.grad = one.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[0].state[one]["momentum_buffer"].dtype == torch.float32
    moved = (other.detach() - start.float()).norm()
    assert (one.detach().float() - other.detach()).norm() < 0.05 * moved + 16 * 5e-4


def test_a_float16_state_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"state_dtype must be one of float32, bfloat16 or None .*float16 loses grad"):
        SGDSaI([nn.Parameter(torch.ones(2))], state_dtype="float16")
    with pytest.raises(ValueError, match="float16 loses"):
        SGDSaI([nn.Parameter(torch.ones(2))], state_dtype=torch.float16)


@pytest.mark.parametrize("path", ["sgd", "swan", "swan layer-wise"])
def test_autocast_and_matmul_precision_around_a_step_change_nothing(path):
    cls, options = PATHS[path]
    if cls is not SGDSaI:
        options = {**options, "whitening_dtype": "float32"}
    found = []
    for disturbed in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(16, 24)), nn.Parameter(torch.randn(5))]
        optimizer = cls(params, lr=1e-2, **options)
        gradients = [torch.randn_like(each) for each in params]
        before = torch.get_float32_matmul_precision()
        try:
            if disturbed:
                torch.set_float32_matmul_precision("medium")
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=disturbed):
                step(optimizer, params, gradients)
                assert torch.is_autocast_enabled("cpu") == disturbed
            assert torch.get_float32_matmul_precision() == ("medium" if disturbed else before)
        finally:
            torch.set_float32_matmul_precision(before)
        found.append(params)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
