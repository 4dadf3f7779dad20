"""
What torch asks of every optimizer of its own, asked of the four here.

After the generic tests of torch's `test/test_optim.py` (named with each), written anew over
`torch.testing._internal.common_optimizers`: its kinds of input and its errors for all optimizers. What is expected is
what torch expects. Left out, each with its reason:

- complex parameters: refused by name (`test_complex_parameters_are_refused`); there is no std of a complex gradient
- sparse gradients: refused by name; whitening and g-SNR need whole gradients
- CUDA graphs, `capturable`, `differentiable`: no such options
- `test_optim_infos_*`, `test_defaults_changed_to_foreach`, `test_peak_memory_foreach`: of torch's own tables
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.gradients import closure_of
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from hf_sai.optim import SWAN, SGDSaI, SGDSaILayerwise, SWANLayerwise


INPUTS = {
    SGDSaI: [
        {},
        {"lr": 0.01},
        {"lr": torch.tensor(0.001)},
        {"momentum": 0.0},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"normalize": "max", "measure_steps": 2},
        {"foreach": True},
        {"fused": False, "foreach": False},
        {"state_dtype": "bfloat16"},
    ],
    SWAN: [
        {},
        {"lr": 0.01},
        {"lr": torch.tensor(0.001)},
        {"momentum": 0.9},
        {"weight_decay": 0.1, "maximize": True},
        {"whitening": "newton_schulz"},
        {"whitening": "svd", "betas": (0.5, 0.5)},
        {"whitening_dtype": "float32", "scale": 1.0, "adam_lr_ratio": 1.0},
    ],
}
INPUTS |= {SGDSaILayerwise: INPUTS[SGDSaI], SWANLayerwise: INPUTS[SWAN]}
CLASSES = pytest.mark.parametrize("cls", list(INPUTS))
ALL = pytest.mark.parametrize(
    ("cls", "options"),
    [
        pytest.param(cls, options, id=f"{cls.__name__} {options}")
        for cls, inputs in INPUTS.items()
        for options in inputs
    ],
)


def clone(options):
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in options.items()}


def problem(dtype=torch.float64):
    """torch's: weights, a bias and an input; a loss whose gradients it has."""
    torch.manual_seed(3)
    weight, bias = nn.Parameter(torch.randn(10, 5, dtype=dtype)), nn.Parameter(torch.randn(10, dtype=dtype))
    return weight, bias, torch.randn(5, dtype=dtype)


def state_tensors(optimizer):
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


@CLASSES
def test_errors_for_all_optimizers(cls):
    """`test_errors`; torch's table needs a package of its tests, which is asked of no one."""
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, get_error_inputs_for_all_optims

    for error in get_error_inputs_for_all_optims("cpu", torch.float32):
        wanted = error.optimizer_error_input
        assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        expecting = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with expecting(error.error_type, match=error.error_regex):
            cls(wanted.params, **wanted.kwargs)


@CLASSES
def test_errors_of_options(cls):
    """As the errors of SGD and Adam there, and their words for tensors."""
    weight = nn.Parameter(torch.randn(2, 3))
    for options in ({"lr": -0.5}, {"momentum": -0.5}, {"weight_decay": -0.1}, {"eps": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            cls([weight], **options)
    for name in ("lr", "momentum", "weight_decay", "eps"):
        with pytest.raises(ValueError, match=f"Tensor {name} must be 1-element"):
            cls([weight], **{name: torch.tensor([0.001, 0.001])})
    with pytest.raises(TypeError):
        cls([weight], no_such_option=1)


@ALL
def test_forloop_goes_right_direction(cls, options):
    """Also `test_foreach_` and `test_fused_goes_right_direction`, with a scheduler as there or without."""
    maximize = options.get("maximize", False)
    for scheduled in (False, True):
        weight, bias, given = problem()
        optimizer = cls([weight, bias], **clone(options))
        schedulers = [StepLR(optimizer, gamma=0.9, step_size=10), LinearLR(optimizer)] if scheduled else []
        closure = closure_of(optimizer, weight, bias, given)
        initial = closure().item()
        if isinstance(optimizer, (SGDSaILayerwise, SWANLayerwise)):
            optimizer.step()
        for _ in range(20):
            if isinstance(optimizer, (SGDSaILayerwise, SWANLayerwise)):
                closure()
                optimizer.step()
            else:
                optimizer.step(closure)
            for scheduler in schedulers:
                scheduler.step()
        with torch.no_grad():
            final = (weight.mv(given) + bias).pow(2).sum().item()
        assert final > initial if maximize else final < initial


@ALL
def test_param_groups_lr_and_weight_decay(cls, options):
    """`test_param_groups_lr`: a group at rate 0 stays; `test_param_groups_weight_decay`: one shrinks."""
    del options
    weight, bias, given = problem()
    other = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    still = other.detach().clone()
    optimizer = cls([{"params": [weight, bias]}, {"params": [other], "lr": 0.0}], lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        ((weight.mv(given) + bias).pow(2).sum() + other.sum()).backward()
        optimizer.step()
    assert torch.equal(other, still)

    pair = [nn.Parameter(torch.ones(3, 3, dtype=torch.float64)) for _ in range(2)]
    optimizer = cls([{"params": [pair[0]], "weight_decay": 0.5}, {"params": [pair[1]], "weight_decay": 0.0}], lr=0.1)
    for param in pair:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(pair[0].detach(), torch.full((3, 3), 0.95, dtype=torch.float64))
    assert torch.equal(pair[1], torch.ones(3, 3, dtype=torch.float64))


@CLASSES
def test_tensor_lr(cls):
    """A rate that is a tensor (of any shape with one element), constant and scheduled, is as the number."""
    for shape in ((), (1,), (1, 1)):
        results = []
        for rate in (0.01, torch.full(shape, 0.01, dtype=torch.float64)):
            weight, bias, given = problem()
            optimizer = cls([weight, bias], lr=rate)
            scheduler = ExponentialLR(optimizer, gamma=0.9)
            closure = closure_of(optimizer, weight, bias, given)
            for _ in range(4):
                closure()
                optimizer.step()
                scheduler.step()
            results.append((weight.detach(), bias.detach()))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [SGDSaI, SWAN])
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: CosineAnnealingLR(o, T_max=4),
        lambda o: OneCycleLR(o, max_lr=0.1, total_steps=20),  # cycles momentum, or betas, as well
        lambda o: ReduceLROnPlateau(o),
    ],
)
def test_schedulers_of_several_kinds(cls, scheduler):
    weight, bias, given = problem()
    optimizer = cls([weight, bias], lr=0.01, momentum=0.9)
    schedule = scheduler(optimizer)
    for _ in range(5):
        loss = optimizer.step(closure_of(optimizer, weight, bias, given))
        schedule.step(loss.item()) if isinstance(schedule, ReduceLROnPlateau) else schedule.step()
    assert weight.isfinite().all()


@ALL
def test_step_is_noop_when_params_have_no_grad(cls, options):
    params = [nn.Parameter(torch.randn(2, 3, dtype=torch.float64)) for _ in range(2)]
    before = copy.deepcopy(params)
    cls(params, **clone(options)).step()
    for one, other in zip(params, before, strict=True):
        assert torch.equal(one, other)


@ALL
def test_step_is_noop_for_zero_grads(cls, options):
    """But for the decay, as there."""
    if options.get("weight_decay") or (issubclass(cls, SGDSaI) and "weight_decay" not in options):
        options = {**options, "weight_decay": 0.0}
    param = nn.Parameter(torch.randn(5, 1, dtype=torch.float64))
    before = param.detach().clone()
    optimizer = cls([param], **clone(options))
    for _ in range(3):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(param, before)


@CLASSES
def test_param_group_with_lrscheduler_and_added_later(cls):
    weight, bias, given = problem()
    optimizer = cls([weight], lr=0.01)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.add_param_group({"params": [bias], "lr": 0.01})
    for _ in range(3):
        closure_of(optimizer, weight, bias, given)()
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.125)


@ALL
def test_state_dict_deterministic(cls, options):
    """Two optimizers, one loaded from the other in the middle, end up equal; the loaded one's tensors are its own."""
    weight, bias, given = problem()
    optimizer = cls([weight, bias], **clone(options))
    closure = closure_of(optimizer, weight, bias, given)
    for _ in range(4):
        closure()
        optimizer.step()
    again = [nn.Parameter(each.detach().clone()) for each in (weight, bias)]
    loaded = cls(again, **clone(options))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other = closure_of(loaded, *again, given)
    for _ in range(4):
        closure(), other()
        optimizer.step(), loaded.step()
        assert torch.equal(weight, again[0])
        assert torch.equal(bias, again[1])


@ALL
def test_can_load_older_state_dict(cls, options):
    """A key that every group has now may be missing in a saved one."""
    weight, bias, given = problem()
    optimizer = cls([weight, bias], **clone(options))
    closure_of(optimizer, weight, bias, given)()
    optimizer.step()
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for key in ("maximize", "foreach", "fused", "stochastic_rounding", "max_batch_bytes"):
            group.pop(key, None)
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    before = weight.detach().clone()
    optimizer.load_state_dict(old)
    assert [{key: group[key] for key in kept} for group, kept in zip(optimizer.param_groups, own, strict=True)] == own
    closure_of(optimizer, weight, bias, given)()
    optimizer.step()
    assert not torch.equal(weight, before)


@ALL
def test_deepcopy_pickle_and_weights_only(cls, options):
    """`test_deepcopy_copies_all_public_attrs`, `test_save_load_equality_with_weights_only`, pickling."""
    weight, bias, given = problem()
    optimizer = cls([weight, bias], **clone(options))
    for _ in range(3):
        closure_of(optimizer, weight, bias, given)()
        optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert {key for key in vars(optimizer) if not key.startswith("_")} <= set(vars(twin))
        for one, other in zip(state_tensors(twin), state_tensors(optimizer), strict=True):
            assert torch.equal(one, other)
        twin.param_groups[0]["params"][0].grad = torch.ones_like(weight)
        twin.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert loaded["param_groups"][0].keys() == optimizer.state_dict()["param_groups"][0].keys()


@ALL
def test_non_empty_state(cls, options):
    """Every tensor with a gradient has a state after a step."""
    weight, bias, given = problem()
    optimizer = cls([weight, bias], **clone(options))
    closure_of(optimizer, weight, bias, given)()
    optimizer.step()
    assert all(optimizer.state[param] for param in (weight, bias))


@CLASSES
def test_hooks_around_steps_and_states(cls):
    """`test_step_pre_hook`, `..._post_hook`, `..._all_hooks`, and the hooks of state_dict and load_state_dict."""
    weight, bias, given = problem()
    optimizer = cls([weight, bias])
    order = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: order.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: order.append("global post")),
        optimizer.register_step_pre_hook(lambda *_: order.append("pre")),
        optimizer.register_step_post_hook(lambda *_: order.append("post")),
    ]
    closure_of(optimizer, weight, bias, given)()
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert order == ["global pre", "pre", "post", "global post"]

    optimizer.register_state_dict_pre_hook(lambda o: order.append("state pre"))

    def add(_, state):
        return {**state, "mine": 1}

    optimizer.register_state_dict_post_hook(add)
    state = optimizer.state_dict()
    assert (order[-1], state["mine"]) == ("state pre", 1)
    calls = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("second"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after"))
    optimizer.load_state_dict(state)
    assert calls == ["first", "second", "after"]
    optimizer.load_state_dict(state)  # and nothing of the first load is left behind
    assert calls == ["first", "second", "after"] * 2


@pytest.mark.parametrize("cls", [SGDSaI, SWAN])
def test_mixed_dtypes_in_one_group(cls):
    """`test_mixed_device_dtype`, as far as one device goes: each tensor as in an optimizer of its own."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    torch.manual_seed(0)
    start = [torch.randn(4, 6).to(dtype) for dtype in dtypes]
    grads = [torch.randn(4, 6).to(dtype) for dtype in dtypes]
    together = [nn.Parameter(each.clone()) for each in start]
    optimizer = cls(together, lr=0.01)
    for param, grad in zip(together, grads, strict=True):
        param.grad = grad
    optimizer.step()
    for param, value, grad in zip(together, start, grads, strict=True):
        single = nn.Parameter(value.clone())
        alone = cls([single], lr=0.01)
        single.grad = grad
        alone.step()
        assert torch.equal(param, single)


@CLASSES
def test_complex_parameters_are_refused(cls):
    param = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = cls([param])
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="complex"):
        optimizer.step()


@CLASSES
def test_duplicate_params_and_parameters_across_groups(cls):
    """`test_duplicate_params_in_one_param_group`, `..._across_param_groups`."""
    param = nn.Parameter(torch.randn(3, 3))
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        cls([param, param])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        cls([{"params": param}, {"params": param}])
    with pytest.raises(TypeError):
        cls(param)
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        cls([])
