"""The same promises for every registered name, as timm's optimizer tests do: a new record is tested by being there."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from hf_sai.optim import list_records


@pytest.fixture(params=list_records(), ids=lambda record: record.name)
def record(request):
    return request.param


def model_of(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1)).to(dtype)


def optimizer_of(record, model, **options):
    first, *rest = model.named_parameters()
    return record.cls([{"params": [first], "lr": 0.02}, {"params": rest, "weight_decay": 0.0}], lr=0.01, **options)


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        model(torch.randn(16, 6, generator=generator).to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


OPTIONS = [{}, {"normalize": "max"}, {"momentum": 0.0}, {"momentum": 0.8}, {"measure_steps": 30}]
OPTIONS += [{"whitening": "newton_schulz"}, {"adam_lr_ratio": 0.5}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_resume_is_bit_equal(record, dtype, options):
    if not set(options) <= {option.name for option in record.options}:
        return  # not an option of this one; tests/test_registry.py knows which are
    model = model_of(dtype)
    optimizer = optimizer_of(record, model, **options)
    train(model, optimizer, 20, seed=1)
    resumed = copy.deepcopy(model)
    other = optimizer_of(record, resumed, **options)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for each_model, each in ((model, optimizer), (resumed, other)):
        train(each_model, each, 20, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    first, second = optimizer.state_dict(), other.state_dict()
    assert first["param_groups"] == second["param_groups"]
    for index, state in first["state"].items():
        assert set(state) == set(second["state"][index])
        for key, value in state.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(value, second["state"][index][key])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_of_model_and_optimizer_go_on_alike(record, copied):
    model = model_of(torch.float32)
    optimizer = optimizer_of(record, model)
    train(model, optimizer, 3, seed=1)
    other_model, other = copied((model, optimizer))
    for each_model, each in ((model, optimizer), (other_model, other)):
        train(each_model, each, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))
    assert all(p.grad is None for p in other_model.parameters())


def test_group_added_after_a_step_trains(record):
    model = model_of(torch.float32)
    late = torch.nn.Parameter(torch.ones(8, 1))
    optimizer = optimizer_of(record, model)
    train(model, optimizer, 2, seed=1)
    optimizer.add_param_group({"params": [late], "lr": 0.1})
    before = late.detach().clone()
    (late * torch.arange(8.0).unsqueeze(1)).sum().backward()
    optimizer.step()
    assert not torch.equal(late, before)
    assert optimizer.param_groups[-1]["lr"] == 0.1


def test_state_of_an_optimizer_that_never_stepped_brings_its_options_and_nothing_else(record):
    """What trains on from it trains as one that was made with these options and loaded nothing."""
    model, twin = model_of(torch.float32), model_of(torch.float32)
    state = saved_and_loaded(optimizer_of(record, model, momentum=0.5).state_dict())
    other = optimizer_of(record, twin)
    other.load_state_dict(state)
    for each_model, each in ((model, optimizer_of(record, model, momentum=0.5)), (twin, other)):
        before = [p.detach().clone() for p in each_model.parameters()]
        train(each_model, each, 2, seed=1)
        assert not any(torch.equal(a, b) for a, b in zip(before, each_model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_set_of_parameters_has_no_order_and_is_refused(record):
    params = set(model_of(torch.float32).parameters())
    with pytest.raises(TypeError, match="they are a set; pass a list"):
        record.cls([{"params": params}])
