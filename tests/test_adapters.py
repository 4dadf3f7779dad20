"""LoRA's factors as pairs: by value, after a resume, layer by layer, through the hosts, and what is refused."""

from __future__ import annotations

import copy
import io
import math

import numpy
import pytest
import torch
from reference import ReferencePair
from support.models import tiny_llama, tiny_lora, token_blocks
from support.trainers import arguments, trainable

import hf_sai
from hf_sai import GSNRReport
from hf_sai.optim import OptionError, SGDSaI, SGDSaILayerwise
from hf_sai.optim.lora_pairs import A_RATE, adapter_pairs
from hf_sai.stand_in import Replacement


def factors(a_shape=(3, 8), b_shape=(6, 3), dtype=torch.float64, start=0.0):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s).mul_(f).to(dtype)) for s, f in ((a_shape, 0.5), (b_shape, start))]


def set_gradients(a, b, target):
    """Of half the squared distance of the product to a target; returns that."""
    for each in (a, b):
        each.grad = None
    distance = (b.flatten(1) @ a.flatten(1) - target).square().sum() / 2
    distance.backward()
    return distance.item()


def paired(params, cls=SGDSaI, **options):
    return cls([{"params": params, "paired": True}], **{"lr": 0.05, "weight_decay": 0.0, **options})


def round_trip(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def batches(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 32, (4, 10), generator=generator) for _ in range(count)]


def train(model, optimizer, data):
    for tokens in data:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- By value ----


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("start", [0.0, 0.4], ids=["B is zero", "B is not"])
@pytest.mark.parametrize(
    ("a_shape", "b_shape"), [((3, 8), (6, 3)), ((2, 3, 3, 3), (5, 2, 1, 1))], ids=["linear", "convolution"]
)
def test_30_steps_equal_the_float64_reference(a_shape, b_shape, start, momentum):
    a, b = factors(a_shape, b_shape, start=start)
    options = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.1}
    optimizer = paired([a, b], eps=0.0, **options)
    flat = [each.detach().flatten(1).numpy().copy() for each in (a, b)]
    reference = ReferencePair(*flat, {**options, "a_rate": 0.3})
    target = 3 * torch.randn(b_shape[0], a[0].numel(), dtype=torch.float64)
    for _ in range(30):
        set_gradients(a, b, target)
        reference.step([each.grad.flatten(1).numpy().copy() for each in (a, b)])
        optimizer.step()
        for each, expected in zip((a, b), reference.factors, strict=True):
            numpy.testing.assert_allclose(each.detach().flatten(1).numpy(), expected, rtol=1e-6, atol=1e-9)
    assert [optimizer.state[each]["pair_norm"] for each in (a, b)] == pytest.approx([reference.norm] * 2, rel=1e-12)


def test_a_step_has_an_rms_of_at_most_the_learning_rate_however_large_the_gradient():
    a, b = factors(start=0.4)
    optimizer = paired([a, b], lr=0.01, momentum=0.0)
    found = []
    for size in (1e-6, 1.0, 1e6):
        before = [each.detach().clone() for each in (a, b)]
        for each in (a, b):
            each.grad = size * torch.randn_like(each)
            each.grad -= each.grad.mean()  # so that the g-SNR is the root of the size
        optimizer.step()
        found += [
            (each.detach() - old).square().mean().sqrt().item() for each, old in zip((a, b), before, strict=True)
        ]
    largest = [0.01 * A_RATE, 0.01]
    assert found[2:] == pytest.approx(largest * 2, rel=0.05)  # above the pair's first norm: sqrt(n - 1) for sqrt(n)
    assert 0 < max(found[0] / largest[0], found[1] / largest[1]) <= 1.0


def test_what_moves_is_not_changed_by_the_scale_of_the_loss():
    ends = []
    for scale in (1.0, 1e-4):
        a, b = factors()
        optimizer = paired([a, b], eps=0.0)
        target = torch.ones(6, 8, dtype=torch.float64) + torch.eye(6, 8, dtype=torch.float64)
        for _ in range(10):
            set_gradients(a, b, target)
            for each in (a, b):
                each.grad *= scale
            optimizer.step()
        ends.append([each.detach().clone() for each in (a, b)])
    for first, second in zip(*ends, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-8)


def test_other_groups_are_trained_as_without_pairs():
    torch.manual_seed(1)
    (a, b), plain = factors(), torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    alone = torch.nn.Parameter(plain.detach().clone())
    both = SGDSaI([{"params": [plain]}, {"params": [a, b], "paired": True}], lr=0.05)
    one = SGDSaI([alone], lr=0.05)
    for _ in range(4):
        set_gradients(a, b, torch.ones(6, 8, dtype=torch.float64) + torch.eye(6, 8, dtype=torch.float64))
        plain.grad = torch.randn_like(plain)
        alone.grad = plain.grad.clone()
        both.step()
        one.step()
    assert torch.equal(plain, alone)


def test_zero_and_bad_gradients_leave_a_pair_as_it_is():
    a, b = factors()
    optimizer = paired([a, b])
    start = [each.detach().clone() for each in (a, b)]
    for value in (0.0, float("nan")):
        for each in (a, b):
            each.grad = torch.full_like(each, value)
        optimizer.step()
    assert all(torch.equal(each, old) for each, old in zip((a, b), start, strict=True))
    assert optimizer.state[a]["pair_norm"] == 0.0
    set_gradients(a, b, torch.ones(6, 8, dtype=torch.float64) + torch.eye(6, 8, dtype=torch.float64))
    optimizer.step()
    assert not torch.equal(b, start[1])


# ---- Resume and layer-wise ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 6])
def test_resumed_pairs_stay_bit_equal(dtype, steps):
    a, b = factors(dtype=dtype)
    optimizer = paired([a, b], lr=0.02)
    target = torch.randn(6, 8).to(dtype)
    for _ in range(steps):
        set_gradients(a, b, target)
        optimizer.step()
    others = [torch.nn.Parameter(each.detach().clone()) for each in (a, b)]
    resumed = paired(others, lr=0.02)
    resumed.load_state_dict(round_trip(optimizer.state_dict()))
    for _ in range(10):
        for pair, each in (((a, b), optimizer), (others, resumed)):
            set_gradients(*pair, target)
            each.step()
        assert all(torch.equal(first, second) for first, second in zip((a, b), others, strict=True))
    assert optimizer.gsnr_statistics() == resumed.gsnr_statistics()


@pytest.mark.parametrize("zero", [True, False], ids=["B is zero", "B is not"])
def test_layerwise_equals_the_ordinary_path(zero):
    ends = []
    for cls in (SGDSaI, SGDSaILayerwise):
        model = tiny_lora(init_lora_weights=zero)
        optimizer = cls(hf_sai.param_groups(model, "sgd_sai", lora_policy="paired"), lr=0.02)
        train(model, optimizer, batches(6))
        ends.append((trainable(model), optimizer.gsnr_statistics()))
    assert ends[0][1] == ends[1][1]
    for name, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], value, rtol=1e-6, atol=1e-7)


# ---- Groups and hosts ----


def test_groups_of_pairs_alternate_and_hold_each_tensor_once():
    model = tiny_lora(use_dora=True)
    rest, pairs = hf_sai.param_groups(model, "sgd_sai", 0.1, lora_policy="paired")
    names = [name for name, _ in pairs["params"]]
    assert names[::2] == [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert names[1::2] == [name.replace("lora_A", "lora_B") for name in names[::2]]
    assert pairs["paired"] is True
    assert pairs["weight_decay"] == 0.1
    assert {name.split(".")[-2] for name, _ in rest["params"]} == {"default"}
    assert all("magnitude" in name for name, _ in rest["params"])
    assert len(names) + len(rest["params"]) == len(trainable(model))


def test_without_the_option_the_groups_are_what_they_were():
    (group,) = hf_sai.param_groups(tiny_lora(), "sgd_sai", 0.1, lora_policy="plain")
    assert set(group) == {"params", "weight_decay"}
    train(model := tiny_lora(), optimizer := hf_sai.create_optimizer("sgd_sai", model), batches(1))
    assert not any("pair_norm" in state for state in optimizer.state.values())


def test_the_trainer_makes_the_pairs(tmp_path):
    model = tiny_lora()
    options = {"optim_args": "lora_policy=paired", "learning_rate": 0.005, "max_steps": 3}
    trainer = hf_sai.SaITrainer(model, arguments(tmp_path, **options), train_dataset=token_blocks(12))
    before = trainable(model)
    trainer.train()
    (group,) = hf_sai.live.unwrap_optimizer(trainer.optimizer).param_groups
    assert group["paired"] is True
    assert len(group["params"]) == len(before)
    assert all(not torch.equal(value, before[name]) for name, value in trainable(model).items())


@pytest.mark.parametrize(
    ("model", "policy", "message"),
    [
        (tiny_llama, "paired", "needs a layer with lora_A and lora_B that are both trained, but the model has none"),
        (tiny_lora, "both", "lora_policy must be one of plain, paired but is 'both'; choose one"),
    ],
)
def test_what_has_no_pairs_is_refused(model, policy, message):
    with pytest.raises(ValueError, match=message):
        adapter_pairs(model(), policy)


def test_a_frozen_factor_makes_no_pair():
    model = tiny_lora()
    frozen = next(param for name, param in model.named_parameters() if "lora_A" in name)
    everything = adapter_pairs(model, "paired")
    frozen.requires_grad_(False)
    assert [pair for pair in everything if pair[0] is not frozen] == adapter_pairs(model, "paired")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(3, 8)], "must alternate A of shape .* but holds 1 tensors"),
        ([(6, 3), (3, 8)], r"but holds \(6, 3\) before \(3, 8\)"),
        ([(3,), (6, 3)], r"but holds \(3,\) before \(6, 3\)"),
    ],
)
def test_groups_that_are_no_pairs_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        paired([torch.nn.Parameter(torch.randn(shape)) for shape in shapes])


def test_routes_that_know_no_modules_refuse_pairs():
    with pytest.raises(OptionError, match="sgd_sai with lora_policy is routed by the model's modules, but"):
        hf_sai.optimizer_cls_and_kwargs("sgd_sai", lr=0.005, lora_policy="paired")
    with pytest.raises(OptionError, match="lora_policy of sgd_sai need the modules"):
        hf_sai.create_optimizer("sgd_sai", tiny_lora().parameters(), lora_policy="paired")
    with pytest.raises(OptionError, match="lora_policy of sgd_sai needs the model, but a script that builds its own"):
        Replacement.of("sgd_sai", "lora_policy=paired", [])


def test_sharded_factors_are_refused():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        layer = torch.nn.Sequential(torch.nn.Linear(8, 3, bias=False), torch.nn.Linear(3, 6, bias=False))
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        optimizer = paired(list(layer.parameters()))
        for param in layer.parameters():
            param.grad = copy.deepcopy(param.detach())
        with pytest.raises(RuntimeError, match="lora_policy='paired' needs whole factors, but they are sharded"):
            optimizer.step()
    finally:
        dist.destroy_process_group()


def test_rms_of_paired_factors_is_that_of_their_bounded_gradients():
    model = tiny_lora()
    optimizer = hf_sai.create_optimizer("sgd_sai", model, lr=1e-3, normalize="rms", lora_policy="paired")
    generator = torch.Generator().manual_seed(2)
    before = trainable(model)
    for param in model.parameters():
        if param.requires_grad:
            param.grad = 30.0 * torch.randn(param.shape, generator=generator)
    optimizer.step()
    moved = torch.cat([(before[name] - value).flatten() for name, value in trainable(model).items()])
    assert moved.square().mean().sqrt().item() == pytest.approx(1e-3, rel=1e-3)


# ---- what the report says of a pair ----


def hand_made_pair(**options):
    """A of 2 x 3 twos, B of 3 x 2 that starts at zero."""
    a, b = torch.nn.Parameter(torch.full((2, 3), 2.0)), torch.nn.Parameter(torch.zeros(3, 2))
    groups = [{"params": [("layers.0.lora_A.weight", a), ("layers.0.lora_B.weight", b)], "paired": True}]
    return a, b, SGDSaI(groups, lr=0.1, momentum=0.9, weight_decay=0.0, eps=0.0, **options)


def step_by(optimizer, params, gradients):
    """What a step adds to each tensor."""
    before = [param.detach().clone() for param in params]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.clone()
    optimizer.step()
    return [param.detach() - old for param, old in zip(params, before, strict=True)]


def test_the_learning_rate_of_a_pair_is_what_its_first_gradients_are_multiplied_by():
    """
    B's gradient has a norm of 4, which bounds A's of 3. The g-SNR of a gradient of zero mean is sqrt(n - 1) = sqrt(5),
    so that B's is multiplied by 0.1 sqrt(5) / 4, and A's by 0.3 of that.
    """
    signs = torch.tensor([1.0, -1.0]).repeat(3) / math.sqrt(6)
    gradients = [3 * signs.view(2, 3), 4 * signs.view(3, 2)]
    a, b, optimizer = hand_made_pair()
    moves = step_by(optimizer, (a, b), gradients)
    row_a, row_b = GSNRReport.from_optimizer(optimizer).tensors
    expected = [0.1 * math.sqrt(5) * 0.3 / 4, 0.1 * math.sqrt(5) / 4]
    assert [row_a.learning_rate, row_b.learning_rate] == pytest.approx(expected, rel=1e-6)
    assert [row_a.factor, row_b.factor] == pytest.approx([0.3 / 4, 1 / 4], rel=1e-6)
    assert [row_a.gradient_norm, row_b.gradient_norm] == pytest.approx([3.0, 4.0], rel=1e-6)
    assert (row_a.weight_rms, row_b.weight_rms) == (2.0, 0.0)
    for row, move, gradient in zip((row_a, row_b), moves, gradients, strict=True):
        assert torch.allclose(move, -row.learning_rate * gradient, rtol=1e-5)
        assert row.update_rms == pytest.approx(move.square().mean().sqrt().item(), rel=1e-5)
    assert row_a.moved == pytest.approx(moves[0].square().mean().sqrt().item() / 2.0, rel=1e-5)
    assert row_b.moved is None


def test_a_factor_that_is_measured_later_is_bounded_by_its_own_norm_where_that_is_larger():
    """As in a real run: A's first gradient is zero, and comes with a norm of 10 when B has moved, whose norm was 4."""
    signs = torch.tensor([1.0, -1.0]).repeat(3) / math.sqrt(6)
    a, b, optimizer = hand_made_pair()
    step_by(optimizer, (a, b), [torch.zeros(2, 3), 4 * signs.view(3, 2)])
    pending, _ = GSNRReport.from_optimizer(optimizer).tensors
    assert (pending.status, pending.learning_rate, pending.update_rms) == ("pending", 0.0, None)
    second = [10 * signs.view(2, 3), torch.zeros(3, 2)]
    move, _ = step_by(optimizer, (a, b), second)
    row, _ = GSNRReport.from_optimizer(optimizer).tensors
    assert row.learning_rate == pytest.approx(0.1 * math.sqrt(5) * 0.3 / 10, rel=1e-6)
    assert torch.allclose(move, -row.learning_rate * second[0], rtol=1e-5)


def test_a_pairs_state_of_before_norms_were_kept_gives_the_bound_alone():
    signs = torch.tensor([1.0, -1.0]).repeat(3) / math.sqrt(6)
    a, b, optimizer = hand_made_pair()
    step_by(optimizer, (a, b), [signs.view(2, 3), 4 * signs.view(3, 2)])
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        del state["gradient_norm"], state["weight_rms"]
    _, _, other = hand_made_pair()
    other.load_state_dict(saved)
    rows = GSNRReport.from_optimizer(other).tensors
    assert [row.factor for row in rows] == pytest.approx([0.3 / 4, 1 / 4], rel=1e-6)
    assert [row.update_rms for row in rows] == [None, None]


def test_the_rms_of_the_first_step_is_that_of_what_moves_where_the_other_factor_has_inf():
    """A alone is measured and moves, by its own norm; B's inf has no part in the bound, nor in what divides."""
    for odd in (math.inf, math.nan):
        a, b = factors(start=0.4)
        optimizer = paired([a, b], lr=0.01, momentum=0.0, normalize="rms")
        before = a.detach().clone()
        a.grad, b.grad = torch.randn_like(a), torch.full_like(b, odd)
        optimizer.step()
        assert (a.detach() - before).square().mean().sqrt().item() == pytest.approx(0.01, rel=1e-6)
