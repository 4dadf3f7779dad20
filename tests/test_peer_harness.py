"""
What timm and pytorch_optimizer ask of every optimizer of theirs, asked of the four here.

After `tests/test_optim.py` of timm and `tests/` of pytorch_optimizer (named with each), written anew. What is expected
is what they expect; learning rates are ours, as each optimizer there has its own. A layer-wise optimizer gets its
gradients from a backward pass, one per step. Left out, each with its reason:

- timm's parts on CUDA: they ask for a device; `torch_device = "cpu"` leaves them out there too
- timm's `PlateauLRScheduler`: no test there uses it any more; torch's own schedulers are in `test_torch_harness.py`
- Lookahead, SAM, PCGrad, TRAC, OrthoGrad and other wrappers: of pytorch_optimizer itself
- AdaNorm, AdamD, cautious, stable, gradient centralisation, Hessians, `reset()`: no such options or methods
- pytorch_optimizer's complex SGDSaI: refused by name here; there is no std of a complex gradient
- `test_sparse`, `test_zero_epsilon`: of its optimizers that take sparse gradients; here they are refused
- `test_sgdw_delayed_momentum`: the values of another formula; `test_random_runs.py` has ours
- `_step_foreach` called so and so often: a method of its own
- `create_optimizer`, `load_optimizer`: of its own names; `test_every_optimizer.py` has ours
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from support.gradients import closure_of
from torch import nn

import hf_sai
from hf_sai.optim import SWAN, SGDSaI, SGDSaILayerwise, SWANLayerwise


# Options as the tables of both have them: some per class.
ROWS = [
    (SGDSaI, {"lr": 1e-3}),
    (SGDSaI, {"lr": 1e-3, "momentum": 0.0}),
    (SGDSaI, {"lr": 1e-2, "normalize": "max", "weight_decay": 1e-3}),
    (SGDSaI, {"lr": 1e-2, "normalize": "rms", "foreach": True}),
    (SGDSaILayerwise, {"lr": 1e-3}),
    (SWAN, {"lr": 1e-3}),
    (SWAN, {"lr": 1e-3, "weight_decay": 1.0, "share_whitening": True}),
    (SWAN, {"lr": 1e-3, "momentum": 0.9, "whitening": "newton_schulz"}),
    (SWANLayerwise, {"lr": 1e-3}),
]
EACH = pytest.mark.parametrize(
    ("cls", "options"), [pytest.param(*row, id=f"{row[0].__name__} {row[1]}") for row in ROWS]
)
CLASSES = pytest.mark.parametrize("cls", [SGDSaI, SGDSaILayerwise, SWAN, SWANLayerwise])
LAYERWISE = (SGDSaILayerwise, SWANLayerwise)


# ---- timm ----


def constructors(cls, options):
    """The four ways to construct one that timm tries: a list, groups, one group of a bare tensor, and its own rate."""
    rate = 3 * options["lr"]
    return [
        lambda weight, bias: cls([weight, bias], **options),
        lambda weight, bias: cls([{"params": [weight]}, {"params": [bias], "lr": rate}], **options),
        lambda weight, bias: cls([{"params": bias, "lr": rate}], **options),
        lambda weight, bias: cls([{"params": bias, "lr": rate}]),
    ]


@EACH
def test_basic_cases(cls, options):
    """`_test_basic_cases_template`: 200 steps make the loss smaller, also where parameters are not contiguous."""
    for make in constructors(cls, options):
        for strided in (False, True):
            torch.manual_seed(1)
            weight = torch.randn(10, 5, 2)[..., 0] if strided else torch.randn(10, 5)
            bias = torch.randn(10, 2)[..., 0] if strided else torch.randn(10)
            weight, bias, given = nn.Parameter(weight), nn.Parameter(bias), torch.randn(5)
            assert weight.is_contiguous() != strided
            optimizer = make(weight, bias)
            assert cls.__name__ in repr(optimizer)
            closure = closure_of(optimizer, weight, bias, given)
            initial = closure().item()
            if issubclass(cls, LAYERWISE):
                optimizer.step()
            for _ in range(200):
                optimizer.step(closure)
            assert closure().item() < initial


def same(one, other):
    """Bit for bit, whatever is nested in what."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@EACH
def test_state_dict(cls, options):
    """`_test_state_dict`: 20 steps, a copy by its state, and 20 more of both are the same, weights and state."""
    for make in constructors(cls, options):
        torch.manual_seed(2)
        weight, bias, given = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10)), torch.randn(5)
        optimizer = make(weight, bias)
        for _ in range(20):
            optimizer.step(closure_of(optimizer, weight, bias, given))
        again = [nn.Parameter(each.detach().clone()) for each in (weight, bias)]
        other = make(*again)
        state, loaded = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
        other.load_state_dict(loaded)
        assert same(loaded, state)  # what was given was not written
        for _ in range(20):
            optimizer.step(closure_of(optimizer, weight, bias, given))
            other.step(closure_of(other, *again, given))
            assert torch.equal(weight, again[0])
            assert torch.equal(bias, again[1])
        assert same(optimizer.state_dict(), other.state_dict())
        # Repeated parameters are written once.
        other.param_groups.extend(other.param_groups)
        assert other.state_dict()["param_groups"][-1] == optimizer.state_dict()["param_groups"][-1]
        twin = copy.deepcopy(optimizer)
        public, copied = ({key for key in vars(each) if not key.startswith("_")} for each in (optimizer, twin))
        assert public == copied
        assert getattr(twin, "share_whitening", None) == getattr(optimizer, "share_whitening", None)


@EACH
def test_model(cls, options):
    """`_test_model`: the loss of a small network is smaller after every one of 20 steps; groups from the model."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    values = {
        "0.weight": [[-0.2109, -0.4976], [-0.1413, -0.3420], [-0.2524, 0.6976]],
        "0.bias": [-0.1085, -0.2979, 0.6892],
        "2.weight": [[-0.0508, -0.3941, -0.2843]],
        "2.bias": [-0.0711],
    }
    model.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    given = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).reshape(3, 2)
    optim = "swan" if issubclass(cls, SWAN) else "sgd_sai"
    decay = options.get("weight_decay", 0.0)
    rest = {key: value for key, value in options.items() if key != "weight_decay"}
    optimizer = cls(hf_sai.param_groups(model, optim, weight_decay=decay), **rest)
    previous = float("inf")
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(given).sum()
        loss.backward()
        assert loss.item() < previous
        previous = loss.item()
        optimizer.step()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SGDSaI, {"lr": 2e-4}),
        (SGDSaI, {"lr": 2e-4, "momentum": 0.0}),
        (SGDSaI, {"lr": 2e-4, "normalize": "max"}),
        (SGDSaI, {"lr": 2e-2, "normalize": "rms"}),
        (SGDSaILayerwise, {"lr": 2e-4}),
        (SWAN, {"lr": 5e-2}),  # timm's for Adam
        (SWANLayerwise, {"lr": 5e-2}),
    ],
)
def test_rosenbrock(cls, options):
    """`_test_rosenbrock`: 2,000 steps of cyclic coordinate descent end no further from the minimum."""
    point = nn.Parameter(torch.tensor([1.5, 1.5]))
    optimizer = cls([point], **options)
    solution = torch.tensor([1.0, 1.0])
    initial = point.detach().dist(solution)

    def evaluate(index):
        optimizer.zero_grad()
        x, y = point.detach().tolist()
        gradient = [0.0, 200 * (y - x**2)]
        if index % 2 == 0:
            gradient = [-400 * x * (y - x**2) - 2 * (1 - x), 0.0]
        (point * torch.tensor(gradient)).sum().backward()
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    for index in range(2000):
        optimizer.step(functools.partial(evaluate, index))
    assert point.detach().dist(solution) <= initial


# ---- pytorch_optimizer ----


class Network(nn.Module):
    """Its model for training: two linear layers for two blobs."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


def blobs():
    torch.manual_seed(42)
    given = torch.cat([torch.randn(50, 2) + 1.5, torch.randn(50, 2) - 1.5])
    return given, torch.cat([torch.ones(50, 1), torch.zeros(50, 1)])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("cls", "options", "iterations"),
    [
        (SGDSaI, {"lr": 1.0}, 15),  # its two rows
        (SGDSaI, {"lr": 1.0, "momentum": 0.0}, 15),
        (SGDSaI, {"lr": 1.0, "normalize": "max"}, 15),
        (SGDSaI, {"lr": 0.5, "normalize": "rms"}, 15),
        (SGDSaI, {"lr": 1.0, "stochastic_rounding": True}, 15),
        (SGDSaILayerwise, {"lr": 1.0}, 15),
        (SWAN, {"lr": 0.1, "weight_decay": 1e-3}, 5),
        (SWAN, {"lr": 0.1, "momentum": 0.9}, 5),
        (SWANLayerwise, {"lr": 0.1}, 5),
    ],
)
def test_f32_and_bf16_optimizers(cls, options, iterations, dtype):
    """The loss falls by a third and more, in float32 and with bf16 parameters under autocast."""
    given, labels = blobs()
    model = Network().to(dtype)
    optimizer = cls(model.parameters(), **options)
    losses = []
    for _ in range(iterations):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses.append(nn.functional.binary_cross_entropy_with_logits(model(given.to(dtype)), labels.to(dtype)))
        losses[-1].backward()
        optimizer.step()
    assert all(param.isfinite().all() and param.dtype == dtype for param in model.parameters())
    assert losses[0].item() > 1.5 * losses[-1].item()


@CLASSES
def test_closure_without_gradients(cls):
    """`test_closure`: a closure that gives a number and no gradient."""
    param = nn.Parameter(torch.zeros(1, 1))
    assert cls([param]).step(lambda: 1.0) == 1.0
    assert param.item() == 0.0


@CLASSES
def test_no_gradients(cls):
    """Groups in which some or all are frozen, and gradients that are part of a graph."""
    params = [torch.zeros(1, 1, requires_grad=index % 2 == 0) for index in range(4)]
    optimizer = cls([{"params": params[:2]}, {"params": params[2:3]}, {"params": params[3:]}])
    optimizer.zero_grad()
    trained = params[::2]
    gradients = torch.autograd.grad((params[0] + params[2] + 1).pow(2).sum(), trained, create_graph=True)
    for param, gradient in zip(trained, gradients, strict=True):
        param.grad = gradient
    optimizer.step(lambda: 0.1)
    optimizer.zero_grad(set_to_none=True)
    assert all(param.item() != 0.0 and param.is_leaf for param in trained)
    assert all(param.item() == 0.0 for param in params[1::2])


@CLASSES
def test_sparse_and_complex_are_refused(cls):
    """`test_sparse_not_supported`, `test_complex_not_supported`."""
    weight = torch.randn(5, 1, requires_grad=True)
    weight.grad = torch.rand_like(weight).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        cls([weight]).step(lambda: 0.1)
    weight = torch.zeros(1, 1, dtype=torch.complex64, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="complex"):
        cls([weight]).step(lambda: 0.1)


@CLASSES
@pytest.mark.parametrize(
    "options", [{"lr": -1e-2}, {"eps": -1e-6}, {"weight_decay": -1e-3}, {"momentum": -1e-3}, {"momentum": 1.0}]
)
def test_ranges_come_before_parameters(cls, options):
    """`test_learning_rate`, `test_epsilon`, `test_weight_decay`, `test_momentum`: with `None` for the parameters."""
    with pytest.raises(ValueError, match=next(iter(options))):
        cls(None, **options)


@pytest.mark.parametrize("cls", [SWAN, SWANLayerwise])
@pytest.mark.parametrize("betas", [(-0.1, 0.1), (0.1, -0.1)])
def test_betas(cls, betas):
    with pytest.raises(ValueError, match="betas"):
        cls(None, betas=betas)


def of_many_kinds(dtype):
    """Of two dtypes: a matrix, a vector, a number, a transposed matrix, and one that never has a gradient."""
    other = torch.float32 if dtype != torch.float32 else torch.bfloat16
    shapes = [((2, 3), dtype), ((2,), other), ((), dtype), ((2, 3), dtype), ((1, 1), torch.float32)]
    params = [torch.full(shape, 0.5, dtype=each) for shape, each in shapes]
    params[3] = params[3].t()
    return [param.requires_grad_() for param in params]


def assert_matches(optimizer, reference):
    """Its tolerances."""
    assert [group["step"] for group in optimizer.param_groups] == [group["step"] for group in reference.param_groups]
    for group, other in zip(optimizer.param_groups, reference.param_groups, strict=True):
        for param, expected in zip(group["params"], other["params"], strict=True):
            eps = torch.finfo(param.dtype).eps
            close = {torch.bfloat16: {"atol": eps, "rtol": 0.016}, torch.float16: {"atol": eps, "rtol": 4 * eps}}
            torch.testing.assert_close(param, expected, **close.get(param.dtype, {}))
            close = {"atol": 1e-5, "rtol": 4 * eps} if param.dtype == torch.float16 else {}
            state, wanted = optimizer.state.get(param, {}), reference.state.get(expected, {})
            torch.testing.assert_close(state, wanted, **close)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("foreach", [True, None])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"normalize": "max"}, {"measure_steps": 3}])
def test_foreach_matches_per_parameter(dtype, foreach, options):
    """`TestForeach.test_matches_per_parameter`: 12 steps in which gradients come and go."""
    params, wanted = of_many_kinds(dtype), of_many_kinds(dtype)
    settings = {"lr": 0.01, "weight_decay": 0.1, "maximize": True, **options}
    optimizer, reference = SGDSaI(params, foreach=foreach, **settings), SGDSaI(wanted, foreach=False, **settings)
    for step in range(12):
        for index, (param, expected) in enumerate(zip(params, wanted, strict=True)):
            if step in (0, 11) or index == 4 or (index == 1 and step % 2) or (index == 3 and step < 4):
                param.grad = expected.grad = None
                continue
            gradient = torch.arange(param.numel(), dtype=param.dtype).reshape(param.shape)
            gradient = gradient.mul(0.1).add(0.25 if step % 2 else -0.35)
            param.grad, expected.grad = gradient, gradient.clone()
        optimizer.step()
        reference.step()
        assert_matches(optimizer, reference)
        for param, expected in zip(params, wanted, strict=True):
            assert param.grad is expected.grad is None or torch.equal(param.grad, expected.grad)
    assert params[-1].item() == 0.5


def test_foreach_per_group_and_switched_by_a_checkpoint():
    """`test_group_override`, `test_checkpoint_switch`."""
    params, wanted = ([torch.zeros(1, 1, requires_grad=True) for _ in range(3)] for _ in range(2))
    for param in (*params, *wanted):
        param.grad = torch.full_like(param, 0.2)
    groups = [{"params": [param], "foreach": way} for param, way in zip(params, (False, True, None), strict=True)]
    optimizer, reference = SGDSaI(groups, foreach=False), SGDSaI(wanted, foreach=False)
    optimizer.step()
    reference.step()
    for param, expected in zip(params, wanted, strict=True):
        torch.testing.assert_close(param, expected)
        torch.testing.assert_close(optimizer.state[param], reference.state[expected])

    for foreach in (False, True):
        params = [torch.zeros(2, requires_grad=True), torch.zeros(1, 1, requires_grad=True)]
        optimizer = SGDSaI(params, foreach=foreach)
        for _ in range(6):
            params[0].grad = torch.tensor([0.2, 0.1])
            optimizer.step()
        again = [param.detach().clone().requires_grad_() for param in params]
        restored = SGDSaI(again, foreach=not foreach)
        restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        restored.param_groups[0]["foreach"] = not foreach
        for step in range(3):
            for param, other in zip(params, again, strict=True):
                param.grad = torch.full_like(param, 0.1 if step % 2 else -0.2)
                other.grad = param.grad.clone()
            optimizer.step()
            restored.step()
            assert_matches(restored, optimizer)


@CLASSES
def test_maximize(cls):
    """Its `MAXIMIZE_OPTIMIZERS`: to maximize the negated loss is to minimize the loss; gradients are not written."""
    ends = []
    for maximize in (False, True):
        torch.manual_seed(0)
        model, (given, labels) = Network(), blobs()
        optimizer = cls(model.parameters(), lr=1e-2, maximize=maximize)
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(model(given), labels)
            (-loss if maximize else loss).backward()
            before = [param.grad.clone() for param in model.parameters() if param.grad is not None]
            optimizer.step()
            after = [param.grad for param in model.parameters() if param.grad is not None]
            assert all(map(torch.equal, before, after))
        ends.append([param.detach() for param in model.parameters()])
    torch.testing.assert_close(ends[1], ends[0])


@CLASSES
def test_odd_parameters(cls):
    """A number (`simple_zero_rank_parameter`), a 1 x 1 x 1 convolution (`test_muon_rank`), channels_last (SOAP's)."""
    number = torch.tensor(0.5, requires_grad=True)
    convolutions = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1))
    picture = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    params = [number, *convolutions.parameters(), *picture.parameters()]
    before = [param.detach().clone() for param in params]
    optimizer = cls(params)
    strides = [param.stride() for param in params]
    for _ in range(2):
        optimizer.zero_grad()
        loss = (number - 3).square() + convolutions(torch.ones(1, 1, 4)).square().sum()
        given = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
        (loss + picture(given).square().sum()).backward()
        optimizer.step()
    assert [param.stride() for param in params] == strides
    assert all(param.isfinite().all() and not param.equal(old) for param, old in zip(params, before, strict=True))


@CLASSES
def test_data_of_another_dtype(cls):
    """`test_stableadamw_optimizer`: one weight's data are replaced by float16 ones; no gradient, no change."""
    model = Network()
    model.fc1.weight.data = torch.randn(2, 2, dtype=torch.float16)
    before = model.fc1.weight.detach().clone()
    optimizer = cls(model.parameters())
    optimizer.step()
    assert torch.equal(model.fc1.weight, before)
    model.fc1.weight.grad = torch.randn(2, 2, dtype=torch.float16)
    optimizer.step()
    assert model.fc1.weight.dtype == torch.float16
    assert model.fc1.weight.isfinite().all()
    assert not torch.equal(model.fc1.weight, before)
