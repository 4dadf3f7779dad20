"""SGDSaI by value: against the slow reference, the authors' package, steps by hand, and itself after a resume."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
import random

import pytest
import sgd_sai
import torch
from reference import ReferenceSGDSaI

from hf_sai.optim import SWAN, SGDSaI
from hf_sai.optim.gsnr import NORMALIZATIONS


def params_like(*shapes, dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def set_gradients(params, gradients):
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = None if gradient is None else gradient.to(param.dtype)


def statistics(optimizer):
    return {row.name: row for row in optimizer.gsnr_statistics()}


def round_trip(optimizer):
    """The state as a checkpoint gives it back, read as the hosts read it."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- One step by hand ----


def test_first_and_second_step_by_hand():
    (param,) = [torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))]
    optimizer = SGDSaI([param], lr=0.1, momentum=0.5, weight_decay=0.2, eps=0.0)
    param.grad = torch.tensor([3.0, 4.0, -3.0, -4.0], dtype=torch.float64)
    optimizer.step()
    root3 = math.sqrt(3)  # sqrt(50) / sqrt(50 / 3)
    first = [x * 0.98 - 0.1 * root3 * g for x, g in zip([1, 2, 3, 4], [3, 4, -3, -4], strict=True)]
    assert param.tolist() == pytest.approx(first, rel=1e-12)
    param.grad = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)  # another g-SNR: must not matter
    optimizer.step()
    averages = [0.5 * 3 + 0.5, 0.5 * 4, 0.5 * -3, 0.5 * -4]
    assert param.tolist() == pytest.approx(
        [x * 0.98 - 0.1 * root3 * m for x, m in zip(first, averages, strict=True)], rel=1e-12
    )


def test_max_divides_by_the_largest_of_all_groups():
    first, second = params_like((4,), (100,))
    optimizer = SGDSaI([{"params": [first]}, {"params": [second]}], lr=1.0, weight_decay=0.0, normalize="max")
    set_gradients([first, second], [torch.randn(4), torch.randn(100)])
    optimizer.step()
    small, large = optimizer.gsnr_statistics()
    assert large.scale == 1.0
    assert small.scale == pytest.approx(small.gsnr / large.gsnr, rel=1e-15)


# ---- Against the slow reference ----


def random_gradient(rng, shape):
    """A gradient, or one of the cases that the first-step rules are for."""
    case = rng.random()
    if case < 0.08:
        return None
    if case < 0.2:
        return torch.zeros(shape)
    if case < 0.26:
        return torch.full(shape, rng.uniform(-2, 2))
    gradient = torch.randn(shape) * 10 ** rng.uniform(-3, 3) + rng.choice([0.0, 0.5])
    if case < 0.32 and gradient.numel():
        gradient.view(-1)[0] = rng.choice([math.inf, -math.inf, math.nan])
    return gradient


SHAPES = [(), (1,), (7,), (3, 5), (0, 2), (2, 3, 4), (2, 2, 3, 3), (1, 2, 1, 3, 2)]


@pytest.mark.parametrize("hundred", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10))])
def test_a_thousand_random_runs_equal_the_reference(hundred):
    compared = [random_run(seed) for seed in range(100 * hundred, 100 * hundred + 100)]
    assert compared == [8 * 6] * 100


def random_run(seed):
    """
    Six tensors of any shape, dtype and layout in two groups, frozen and unfrozen, for eight steps; returns how often
    a tensor was compared.
    """
    compared = 0
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice([torch.float64, torch.float32])
    shapes = [rng.choice(SHAPES) for _ in range(6)]
    params = params_like(*shapes, dtype=dtype)
    for i, shape in enumerate(shapes):
        if len(shape) == 2 and rng.random() < 0.3:
            params[i] = torch.nn.Parameter(torch.randn(shape[::-1]).to(dtype).t())
    groups = [
        {"lr": 10 ** rng.uniform(-4, -1), "momentum": rng.choice([0.0, 0.5, 0.9]), "weight_decay": 0.1, "eps": 1e-8}
        for _ in range(2)
    ]
    settings = {
        "normalize": rng.choice(NORMALIZATIONS),
        "measure_steps": rng.choice([1, 1, 3]),
        "maximize": rng.random() < 0.3,
    }
    path = rng.choice([{}, {"foreach": True}, {"fused": False, "foreach": False}])
    optimizer = SGDSaI([{"params": params[:3], **groups[0]}, {"params": params[3:], **groups[1]}], **settings, **path)
    reference = ReferenceSGDSaI(
        [p.detach().flatten().tolist() for p in params],
        [groups[0]] * 3 + [groups[1]] * 3,
        **settings,
        resolution=torch.finfo(dtype).eps,
    )
    frozen = rng.randrange(6) if rng.random() < 0.5 else None
    for step in range(8):
        gradients = [random_gradient(rng, shape) for shape in shapes]
        for i, gradient in enumerate(gradients):
            # A gradient that is not finite after the first spoils a tensor for good, as in any SGD.
            if gradient is not None and not gradient.isfinite().all() and (step > 2 or reference.snr_samples[i]):
                gradients[i] = None
        if frozen is not None:
            params[frozen].requires_grad_(step >= 4)
            gradients[frozen] = gradients[frozen] if step >= 4 else None
        set_gradients(params, gradients)
        for group, live in zip(groups, optimizer.param_groups, strict=True):  # as schedules of all three do
            group.update(lr=group["lr"] * rng.choice([0.3, 1.0, 1.0, 2.0]), weight_decay=rng.choice([0.0, 0.1, 0.1]))
            group["momentum"] = group["momentum"] and rng.choice([0.5, 0.9])
            live.update(group)
        optimizer.step()
        reference.step([None if p.grad is None else p.grad.double().flatten().tolist() for p in params])
        # What float32 rounds away relative to the largest number that went in.
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        for i, param in enumerate(params):
            size = max([1.0, *(abs(x) for x in reference.theta[i]), *(abs(x) for x in reference.moves[i])])
            assert param.detach().flatten().tolist() == pytest.approx(
                reference.theta[i], rel=1e-9, abs=20 * tolerance * size
            ), seed
            compared += 1
    found = {row.name: row.gsnr for row in optimizer.gsnr_statistics()}
    for i in range(6):
        assert found.get(f"group{i // 3}.{i % 3}", 0.0) == pytest.approx(reference.gsnr(i), rel=1e-9), seed
    return compared


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_25_float32_steps_equal_the_float64_reference(normalize):
    params = params_like((16, 8), (8,), (3, 4, 5))
    options = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.05, "eps": 1e-8}
    optimizer = SGDSaI(params, **options, normalize=normalize)
    reference = ReferenceSGDSaI([p.detach().flatten().tolist() for p in params], [options] * 3, normalize=normalize)
    for _ in range(25):
        gradients = [torch.randn_like(p) for p in params]
        set_gradients(params, gradients)
        optimizer.step()
        reference.step([g.flatten().tolist() for g in gradients])
    for param, expected in zip(params, reference.theta, strict=True):
        assert param.detach().flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("lr", "weight_decay"), [(1e-2, 1e-2), (1e-3, 0.0), (0.05, 0.3)])
def test_25_steps_equal_the_authors_package(lr, weight_decay, capsys):
    ours = params_like((16, 8), (8,), (3, 4, 5))
    theirs = copy.deepcopy(ours)
    optimizer = SGDSaI(ours, lr=lr, weight_decay=weight_decay)
    authors = sgd_sai.SGD_sai(theirs, lr=lr, weight_decay=weight_decay)
    for _ in range(25):
        gradients = [torch.randn_like(p) for p in ours]
        set_gradients(ours, gradients)
        set_gradients(theirs, gradients)
        optimizer.step()
        authors.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


# ---- The first step ----


def test_zero_gradient_leaves_a_tensor_pending_until_its_first_informative_one():
    late, other = params_like((4, 4), (4, 4))
    optimizer = SGDSaI([("late", late), ("other", other)], lr=0.1, weight_decay=0.0)
    before = late.detach().clone()
    for _ in range(2):
        set_gradients([late, other], [torch.zeros(4, 4), torch.randn(4, 4)])
        optimizer.step()
    assert torch.equal(late, before)
    assert statistics(optimizer)["late"].status == "pending"
    gradient = torch.randn(4, 4)
    set_gradients([late, other], [gradient, torch.randn(4, 4)])
    optimizer.step()
    row = statistics(optimizer)["late"]
    assert (row.status, row.step, statistics(optimizer)["other"].step) == ("measured", 3, 1)
    torch.testing.assert_close(late, before - 0.1 * row.gsnr * gradient)  # the buffer starts with this gradient


def test_absent_gradient_is_measured_when_it_arrives():
    late, other = params_like((4,), (4,))
    optimizer = SGDSaI([("late", late), ("other", other)])
    set_gradients([late, other], [None, torch.randn(4)])
    optimizer.step()
    assert statistics(optimizer)["late"].status == "pending"
    set_gradients([late, other], [torch.randn(4), torch.randn(4)])
    optimizer.step()
    assert (statistics(optimizer)["late"].status, statistics(optimizer)["late"].step) == ("measured", 2)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_first_gradient_skips_the_tensor_with_one_warning(bad, caplog):
    broken, other = params_like((4,), (4,))
    optimizer = SGDSaI([("blocks.0.broken", broken), ("other", other)], weight_decay=0.5)
    before = broken.detach().clone()
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        for _ in range(3):
            set_gradients([broken, other], [torch.tensor([1.0, bad, 2.0, 3.0]), torch.randn(4)])
            optimizer.step()
    assert torch.equal(broken, before)  # not even decayed
    assert len(caplog.records) == 1
    assert "blocks.0.broken" in caplog.text
    set_gradients([broken, other], [torch.randn(4), torch.randn(4)])
    optimizer.step()
    assert statistics(optimizer)["blocks.0.broken"].status == "measured"
    assert broken.isfinite().all()
    assert not torch.equal(broken, before)


@pytest.mark.parametrize("gradient", [torch.tensor([2.0]), torch.tensor(-3.0), torch.full((3, 3), 0.7)])
def test_no_deviation_falls_back_to_the_root_of_the_size(gradient):
    constant, other = torch.nn.Parameter(torch.zeros_like(gradient)), torch.nn.Parameter(torch.zeros(50))
    optimizer = SGDSaI([("constant", constant), ("other", other)], lr=0.1, normalize="none")
    set_gradients([constant, other], [gradient, torch.randn(50)])
    optimizer.step()
    row = statistics(optimizer)["constant"]
    assert (row.status, row.gsnr) == ("fallback", math.sqrt(gradient.numel()))
    torch.testing.assert_close(constant.detach(), -0.1 * math.sqrt(gradient.numel()) * gradient)


def test_fallback_never_sets_the_maximum():
    constant, other = params_like((100,), (4,))
    optimizer = SGDSaI([("constant", constant), ("other", other)], normalize="max")
    set_gradients([constant, other], [torch.ones(100), torch.randn(4)])
    optimizer.step()
    rows = statistics(optimizer)
    assert rows["other"].scale == 1.0
    assert rows["constant"].scale == pytest.approx(10 / rows["other"].gsnr)


def test_maximum_stays_for_tensors_that_are_measured_later():
    late, other = params_like((100,), (4,))
    optimizer = SGDSaI([("late", late), ("other", other)], normalize="max")
    set_gradients([late, other], [None, torch.randn(4)])
    optimizer.step()
    maximum = optimizer.param_groups[0]["gsnr_max"]
    set_gradients([late, other], [torch.randn(100), torch.randn(4)])
    optimizer.step()
    assert optimizer.param_groups[0]["gsnr_max"] == maximum
    assert statistics(optimizer)["late"].scale > 1.0


def test_model_of_fallbacks_only_keeps_its_scale_at_one_or_below():
    one, three = params_like((1,), (3,))
    optimizer = SGDSaI([one, three], lr=0.1, normalize="max")
    set_gradients([one, three], [torch.ones(1), torch.ones(3)])
    optimizer.step()
    assert [row.scale for row in optimizer.gsnr_statistics()] == [pytest.approx(1 / math.sqrt(3)), 1.0]


def first_move(normalize="rms", gradients=None, **options):
    """How far tensors of zeros go in their first step."""
    shapes = [tuple(gradient.shape) for gradient in gradients]
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    optimizer = SGDSaI(params, lr=0.01, weight_decay=0.0, normalize=normalize, **options)
    set_gradients(params, gradients)
    optimizer.step()
    return optimizer, torch.cat([param.detach().flatten() for param in params])


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
def test_rms_makes_the_first_update_as_large_as_the_learning_rate(size):
    torch.manual_seed(3)
    gradients = [size * torch.randn(shape, dtype=torch.float64) for shape in [(40, 30), (7,), (3, 4, 5)]]
    gradients.append(torch.tensor([size], dtype=torch.float64))
    optimizer, moved = first_move(gradients=gradients)
    assert moved.square().mean().sqrt().item() == pytest.approx(0.01, rel=1e-9)
    rows = optimizer.gsnr_statistics()
    expected = math.sqrt(
        sum((row.gsnr * g.norm().item()) ** 2 for row, g in zip(rows, gradients, strict=True))
        / sum(g.numel() for g in gradients)
    )
    assert [row.scale for row in rows] == pytest.approx([row.gsnr / expected for row in rows], rel=1e-9)
    # The same divisor is known, and not used, under the other two.
    for normalize in ("none", "max"):
        other, _ = first_move(normalize, gradients)
        assert other.param_groups[0]["gsnr_rms"] == pytest.approx(expected, rel=1e-9)


def test_rms_stays_for_tensors_that_are_measured_later():
    late, other = params_like((100,), (40,))
    optimizer = SGDSaI([("late", late), ("other", other)], normalize="rms")
    gradient = torch.randn(40)
    set_gradients([late, other], [torch.zeros(100), gradient])
    optimizer.step()
    expected = statistics(optimizer)["other"].gsnr * gradient.norm().item() / math.sqrt(40)
    set_gradients([late, other], [1e3 * torch.randn(100), torch.randn(40)])
    optimizer.step()
    assert optimizer.param_groups[0]["gsnr_rms"] == pytest.approx(expected, rel=1e-5)
    row = statistics(optimizer)["late"]
    assert (row.status, row.step) == ("measured", 2)
    assert row.scale == pytest.approx(row.gsnr / expected, rel=1e-5)


def test_rms_is_that_of_the_accumulated_and_clipped_gradient():
    torch.manual_seed(4)
    linear = torch.nn.Linear(6, 3).double()
    optimizer = SGDSaI(linear.named_parameters(), lr=0.01, weight_decay=0.0, normalize="rms")
    before = torch.cat([param.detach().flatten() for param in linear.parameters()])
    whole = [torch.zeros_like(param) for param in linear.parameters()]
    for _ in range(3):
        inputs = torch.randn(5, 6, dtype=torch.float64)
        (10.0 * linear(inputs).square().sum()).backward()
        # Of a sum of squares, by hand: 2 * 10 * output, times the input.
        outputs = 20.0 * linear(inputs).detach()
        whole[0] += outputs.T @ inputs
        whole[1] += outputs.sum(0)
    torch.nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
    optimizer.step()
    norm = math.hypot(*(gradient.norm().item() for gradient in whole))
    assert norm > 100
    rows = optimizer.gsnr_statistics()
    squares = [(row.gsnr * gradient.norm().item() / norm) ** 2 for row, gradient in zip(rows, whole, strict=True)]
    assert optimizer.param_groups[0]["gsnr_rms"] == pytest.approx(math.sqrt(sum(squares) / 21), rel=1e-5)
    moved = torch.cat([param.detach().flatten() for param in linear.parameters()]) - before
    assert moved.square().mean().sqrt().item() == pytest.approx(0.01, rel=1e-9)


def test_rms_of_fallbacks_only_is_of_that_step():
    gate, weight = params_like((1,), (50,))
    optimizer = SGDSaI([gate, weight], lr=0.1, normalize="rms")
    set_gradients([gate, weight], [torch.tensor([1e-4]), torch.zeros(50)])
    before = gate.item()
    optimizer.step()
    assert before * (1 - 1e-3) - gate.item() == pytest.approx(0.1, rel=1e-5)
    gradient = torch.randn(50)
    set_gradients([gate, weight], [torch.tensor([1e-4]), gradient])
    optimizer.step()
    group, row = optimizer.param_groups[0], optimizer.gsnr_statistics()[1]
    expected = row.gsnr * gradient.norm().item() / math.sqrt(50)
    assert (group["gsnr_rms"], group["gsnr_rms_step"]) == (pytest.approx(expected, rel=1e-5), 2)


def test_rms_of_several_steps_is_that_of_the_last():
    (param,) = params_like((60,))
    optimizer = SGDSaI([param], normalize="rms", measure_steps=2)
    found = []
    for size in (1.0, 10.0, 100.0):
        param.grad = size * torch.randn(60)
        optimizer.step()
        row = optimizer.gsnr_statistics()[0]
        found.append(row.gsnr * param.grad.norm().item() / math.sqrt(60))
        assert row.scale == pytest.approx(row.gsnr / found[min(len(found), 2) - 1], rel=1e-5)


def test_measure_steps_averages_the_first_gradients():
    (param,) = params_like((6,))
    optimizer = SGDSaI([param], measure_steps=3)
    singles = []
    for _ in range(5):
        gradient = torch.randn(6) + 1
        param.grad = gradient
        optimizer.step()
        singles.append((gradient.norm() / gradient.std()).item())
    assert optimizer.gsnr_statistics()[0].gsnr == pytest.approx(sum(singles[:3]) / 3, rel=1e-6)


def test_zero_step_of_distributed_checkpointing_leaves_no_trace():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    torch.manual_seed(0)
    touched, clean = (torch.nn.Linear(4, 3), torch.nn.Linear(4, 3))
    clean.load_state_dict(touched.state_dict())
    optimizers = [SGDSaI(m.named_parameters(), normalize="max") for m in (touched, clean)]
    state = get_optimizer_state_dict(touched, optimizers[0])  # steps with zero gradients and lr 0
    assert {"gsnr", "momentum_buffer"} <= set(state["state"]["weight"])
    inputs = torch.randn(8, 4)
    for _ in range(3):
        for model, optimizer in zip((touched, clean), optimizers, strict=True):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    assert torch.equal(touched.weight, clean.weight)
    assert optimizers[0].gsnr_statistics() == optimizers[1].gsnr_statistics()


def test_learning_rate_zero_still_measures():
    (param,) = params_like((6,))
    optimizer = SGDSaI([param], lr=0.0)
    param.grad = torch.randn(6)
    optimizer.step()
    assert optimizer.gsnr_statistics()[0].status == "measured"


# ---- Options ----


def test_momentum_zero_keeps_no_buffer_and_uses_the_gradient():
    (param,) = [torch.nn.Parameter(torch.zeros(3))]
    optimizer = SGDSaI([param], lr=0.1, momentum=0.0, weight_decay=0.0)
    for _ in range(2):
        param.grad = torch.tensor([1.0, -1.0, 0.5])
        optimizer.step()
    assert not any(isinstance(v, torch.Tensor) for v in optimizer.state[param].values())
    scale = optimizer.gsnr_statistics()[0].scale
    torch.testing.assert_close(param.detach(), -0.2 * scale * torch.tensor([1.0, -1.0, 0.5]))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_maximize_is_descent_on_the_negated_gradient_and_never_writes_it(momentum):
    up, down = params_like((5,), (5,))
    down.data.copy_(up.data)
    ascent, descent = SGDSaI([up], momentum=momentum, maximize=True), SGDSaI([down], momentum=momentum)
    for _ in range(3):
        gradient = torch.randn(5)
        up.grad, down.grad = gradient.clone(), -gradient
        ascent.step()
        descent.step()
        assert torch.equal(up.grad, gradient)
    assert torch.equal(up, down)


def test_gradient_is_never_written():
    params = params_like((5,), (1,), (2, 2))
    optimizer = SGDSaI(params, momentum=0.0, weight_decay=0.1)
    gradients = [torch.randn_like(p) for p in params]
    set_gradients(params, [g.clone() for g in gradients])
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients, strict=True))


def test_closure_runs_once_with_gradients_enabled():
    (param,) = params_like((5,))
    optimizer = SGDSaI([param])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = param.square().sum()
        loss.backward()
        return loss

    expected = param.detach().square().sum()
    loss = optimizer.step(closure)
    assert calls == [True]
    assert torch.equal(loss.detach(), expected)
    assert optimizer.gsnr_statistics()[0].status == "measured"


def test_decay_is_decoupled_from_the_scale_and_from_the_measurement():
    decayed, plain = params_like((5,), (5,))
    plain.data.copy_(decayed.data)
    start = decayed.detach().clone()
    optimizers = SGDSaI([decayed], lr=0.1, weight_decay=0.5), SGDSaI([plain], lr=0.1, weight_decay=0.0)
    gradient = torch.randn(5)
    for param, optimizer in zip((decayed, plain), optimizers, strict=True):
        param.grad = gradient
        optimizer.step()
    assert optimizers[0].gsnr_statistics()[0].gsnr == optimizers[1].gsnr_statistics()[0].gsnr
    torch.testing.assert_close(decayed - plain, -0.05 * start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_updated_in_float32_and_rounded_once(dtype):
    (param,) = params_like((200,), dtype=dtype)
    expected = param.detach().clone()
    optimizer = SGDSaI([param], lr=0.01, weight_decay=0.1)
    buffer = None  # scale * m + 0.1 * p
    kept = torch.float32 if dtype == torch.float16 else dtype  # float16 would lose small gradients
    for _ in range(4):
        gradient = (torch.randn(200) * 0.1).to(dtype)
        param.grad = gradient
        optimizer.step()
        scale = optimizer.gsnr_statistics()[0].scale
        average = scale * gradient.float() + 0.1 * expected.float()
        if buffer is not None:
            average = buffer.float() * (0.9 * (1 - 0.001)) + (1 - 0.9) * average
        buffer = average.to(kept)
        expected = (expected.float() - 0.01 * average).to(dtype)
        # One unit in the last place: the float32 sums may be made in another order.
        assert (param.detach() != expected).float().mean() < 0.01
        torch.testing.assert_close(param.detach(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert optimizer.state[param]["momentum_buffer"].dtype == kept


# ---- State ----


def clone_of(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def two_groups(params, **options):
    return SGDSaI(
        [{"params": params[:2], "lr": 0.01}, {"params": params[2:], "lr": 0.003, "weight_decay": 0.0}], **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_resumed_optimizer_stays_bit_equal(dtype, normalize, momentum):
    params = params_like((8, 4), (4,), (3, 3), (5,), dtype=dtype)
    optimizer = two_groups(params, normalize=normalize, momentum=momentum)

    def gradients(step):  # the first of the second group arrives at step 25, after the resume
        return [torch.randn(p.shape) if i != 2 or step >= 25 else None for i, p in enumerate(params)]

    for step in range(20):
        set_gradients(params, gradients(step))
        optimizer.step()
    resumed_params = clone_of(params)
    resumed = two_groups(resumed_params, normalize=normalize, momentum=momentum)
    resumed.load_state_dict(round_trip(optimizer))
    for step in range(20, 40):
        for_both = gradients(step)
        for each_params, each in ((params, optimizer), (resumed_params, resumed)):
            set_gradients(each_params, for_both)
            each.step()
        assert all(torch.equal(a, b) for a, b in zip(params, resumed_params, strict=True))
    assert optimizer.gsnr_statistics() == resumed.gsnr_statistics()
    assert optimizer.gsnr_statistics()[2].step == 26


def test_float32_buffer_of_a_bf16_parameter_survives_a_load():
    (param,) = params_like((40,), dtype=torch.bfloat16)
    optimizer = SGDSaI([param])
    param.grad = torch.randn(40).bfloat16()
    optimizer.step()
    optimizer.state[param]["momentum_buffer"] = torch.randn(40)  # as another version, or a user, may keep it
    gsnr = optimizer.gsnr_statistics()[0].gsnr
    resumed = SGDSaI(clone_of([param]))
    resumed.load_state_dict(round_trip(optimizer))
    (state,) = resumed.state.values()
    assert torch.equal(state["momentum_buffer"], optimizer.state[param]["momentum_buffer"])
    assert state["gsnr"] == gsnr


def test_a_bf16_checkpoint_in_float32_parameters_goes_on_in_float32():
    (param,) = params_like((8,), dtype=torch.bfloat16)
    optimizer = SGDSaI([param])
    param.grad = torch.randn(8).bfloat16()
    optimizer.step()
    wide = SGDSaI([torch.nn.Parameter(param.detach().float())])
    wide.load_state_dict(round_trip(optimizer))
    (state,) = wide.state.values()
    assert state["momentum_buffer"].dtype == torch.float32


def test_options_that_a_load_replaces_are_named(caplog):
    params = params_like((4,))
    state = SGDSaI(params, momentum=0.9, normalize="max").state_dict()
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        SGDSaI(params, momentum=0.9, normalize="max").load_state_dict(state)
        assert not caplog.records
        SGDSaI(params, momentum=0.5).load_state_dict(state)
    assert "momentum=0.9 (not 0.5), normalize=max (not none)" in caplog.text


def test_one_warning_for_many_bad_gradients(caplog):
    params = params_like(*[(2,)] * 20)
    optimizer = SGDSaI([(f"w{i}", p) for i, p in enumerate(params)])
    set_gradients(params, [torch.full((2,), math.nan)] * 20)
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        optimizer.step()
    (record,) = caplog.records
    assert "w0, w1, w2 and of 17 more tensors has inf or NaN" in record.getMessage()


def test_groups_without_names_join_groups_with_names():
    first, second = params_like((2,), (2,))
    optimizer = SGDSaI([("a", first)])
    optimizer.add_param_group({"params": [second]})
    optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(1))})
    assert [row.name for row in optimizer.gsnr_statistics()] == ["a", "group1.0", "group2.0"]


def test_nan_in_a_later_gradient_of_the_window_does_not_spoil_the_mean():
    (param,) = params_like((6,))
    optimizer = SGDSaI([param], measure_steps=2, momentum=0.0)
    for gradient in (torch.randn(6), torch.full((6,), math.nan), torch.randn(6)):
        param.grad = gradient
        optimizer.step()
    assert math.isfinite(optimizer.gsnr_statistics()[0].gsnr)
    assert optimizer.state[param]["gsnr_count"] == 2


def test_load_of_an_empty_state_leaves_everything_unmeasured():
    # accelerate.prepare calls load_state_dict(state_dict()) before the first step
    (param,) = params_like((4,))
    optimizer = SGDSaI([param])
    optimizer.load_state_dict(optimizer.state_dict())
    param.grad = torch.randn(4)
    optimizer.step()
    assert (optimizer.gsnr_statistics()[0].status, optimizer.gsnr_statistics()[0].step) == ("measured", 1)


@pytest.mark.parametrize(
    ("other", "name", "kept"),
    [
        (torch.optim.AdamW, "AdamW", "exp_avg, exp_avg_sq, step"),
        (torch.optim.Adam, "Adam", "exp_avg, exp_avg_sq, step"),
        (lambda params: torch.optim.SGD(params, momentum=0.9), "SGD", "momentum_buffer"),
        (SWAN, "SWAN", "step"),
        (torch.optim.Adagrad, "another optimizer", "step, sum"),
    ],
    ids=["adamw", "adam", "sgd", "swan", "adagrad"],
)
def test_state_of_another_optimizer_is_refused_by_name(other, name, kept):
    params = params_like((4, 4))
    optimizer = other(params)
    set_gradients(params, [torch.randn(4, 4)])
    optimizer.step()
    with pytest.raises(ValueError, match="SGDSaI loads only") as error:
        SGDSaI(params).load_state_dict(optimizer.state_dict())
    assert str(error.value) == (
        f"SGDSaI loads only state that SGDSaI saved, but {name} saved this one (it keeps {kept} per tensor); resume "
        f"with {name}, or start without its checkpoint"
    )


@pytest.mark.parametrize(
    "copies", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_as_the_original(copies):
    params = params_like((4, 4), (4,))
    optimizer = SGDSaI([("a", params[0]), ("b", params[1])], normalize="max")
    set_gradients(params, [torch.randn(4, 4), torch.randn(4)])
    optimizer.step()
    other = copies(optimizer)
    theirs = [p for group in other.param_groups for p in group["params"]]
    gradients = [torch.randn(4, 4), torch.randn(4)]
    for each_params, each in ((params, optimizer), (theirs, other)):
        set_gradients(each_params, gradients)
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(params, theirs, strict=True))
    assert optimizer.gsnr_statistics() == other.gsnr_statistics()


def test_group_added_later_is_measured_at_its_first_step_under_the_same_maximum():
    first, later = params_like((100,), (4,))
    optimizer = SGDSaI([("first", first)], normalize="max")
    first.grad = torch.randn(100)
    optimizer.step()
    maximum = optimizer.param_groups[0]["gsnr_max"]
    optimizer.add_param_group({"params": [("later", later)], "lr": 0.5})
    set_gradients([first, later], [torch.randn(100), torch.randn(4)])
    optimizer.step()
    row = statistics(optimizer)["later"]
    assert (row.step, row.status, row.scale) == (2, "measured", pytest.approx(row.gsnr / maximum))


def test_momentum_switched_on_later_starts_with_that_gradient():
    (param,) = params_like((4,))
    optimizer = SGDSaI([param], momentum=0.0)
    param.grad = torch.randn(4)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    param.grad = torch.randn(4)
    folded = statistics(optimizer)["group0.0"].gsnr * param.grad + 1e-2 * param.detach()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], folded, rtol=1e-6, atol=1e-7)


def test_unfrozen_parameter_is_measured_when_it_trains():
    frozen, other = params_like((4,), (4,))
    frozen.requires_grad_(False)
    optimizer = SGDSaI([("frozen", frozen), ("other", other)])
    other.grad = torch.randn(4)
    optimizer.step()
    assert list(statistics(optimizer)) == ["other"]
    assert frozen not in optimizer.state
    frozen.requires_grad_(True)
    set_gradients([frozen, other], [torch.randn(4), torch.randn(4)])
    optimizer.step()
    assert statistics(optimizer)["frozen"].step == 2


def test_state_is_half_of_adamw():
    params = params_like((64, 32), (32,))
    optimizer = SGDSaI(params)
    set_gradients(params, [torch.randn_like(p) for p in params])
    optimizer.step()
    held = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    assert held == 4 * sum(p.numel() for p in params)


def test_schedulers_and_names_work():
    (param,) = params_like((4,))
    optimizer = SGDSaI([("layer.weight", param)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    param.grad = torch.randn(4)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.075)
    assert optimizer.gsnr_statistics()[0].name == "layer.weight"
    assert SGDSaI([param]).gsnr_statistics()[0].name == "group0.0"


# ---- What is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, r"lr must be finite and >= 0 but is -1"),
        ({"lr": math.nan}, r"lr must be finite and >= 0 but is nan"),
        ({"eps": -1e-8}, r"eps must be finite and >= 0"),
        ({"weight_decay": math.inf}, r"weight_decay must be finite and >= 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\) but is 1.0"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\)"),
        ({"normalize": "maximum"}, r"normalize must be one of none, max, rms but is 'maximum'"),
        ({"measure_steps": 0}, r"measure_steps must be a whole number >= 1 but is 0"),
        ({"measure_steps": 1.5}, r"measure_steps must be a whole number"),
        ({"maximize": "perhaps"}, r"maximize must be True or False but is 'perhaps'"),
    ],
)
def test_bad_options_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        SGDSaI(params_like((2,)), **options)
    with pytest.raises(ValueError, match=message):
        SGDSaI([{"params": params_like((2,)), **options}])


def test_groups_with_different_normalize_are_refused():
    first, second = params_like((2,), (2,))
    with pytest.raises(
        ValueError, match="normalize must be the same in all parameter groups but is 'max' beside 'none'"
    ):
        SGDSaI([{"params": [first], "normalize": "none"}, {"params": [second], "normalize": "max"}])


def test_sparse_gradient_is_refused():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = SGDSaI(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"needs dense gradients but that of weight is torch\.sparse_coo"):
        optimizer.step()


def test_complex_parameter_is_refused():
    param = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
    optimizer = SGDSaI([("wave", param)])
    param.grad = torch.randn_like(param)
    with pytest.raises(RuntimeError, match=r"needs real parameters but wave is torch\.complex64"):
        optimizer.step()


# ---- what is kept for the report ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_gradients_norm_and_the_weights_before_it_are_kept(dtype):
    """By value, once: what comes later changes neither, and nothing is measured in later steps."""
    param = torch.nn.Parameter(torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=dtype))  # RMS 2.5
    late = torch.nn.Parameter(torch.full((2, 2), -2.0, dtype=dtype))
    optimizer = SGDSaI([("w", param), ("late", late)], lr=0.25)
    for step, gradient in enumerate(([2.0, 4.0, -5.0, 6.0], [1.0, 1.0, 2.0, 0.0])):
        param.grad = torch.tensor(gradient, dtype=dtype)
        late.grad = torch.tensor([[8.0, -1.0], [4.0, 0.0]], dtype=dtype) * step
        optimizer.step()
    kept = [(row.gradient_norm, row.weight_rms, row.factor) for row in optimizer.gsnr_statistics()]
    assert kept == [(9.0, 2.5, 1.0), (9.0, pytest.approx(2.0, rel=0.02), 1.0)]  # decay moved the second a little
    assert all(type(value) is float for row in kept for value in row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_sai.optim.scales.gradient_moments", lambda tensors: [] if not tensors else 1 / 0)
        optimizer.step()


def test_weights_that_are_not_finite_have_no_size():
    param = torch.nn.Parameter(torch.tensor([1.0, math.inf]))
    optimizer = SGDSaI([("w", param)], lr=0.0)
    param.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    (row,) = optimizer.gsnr_statistics()
    assert (row.gradient_norm, row.weight_rms) == (5.0, 0.0)
