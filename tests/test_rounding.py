"""Pure bf16 training: stochastic rounding that is the same on all replicas, and Kahan summation."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_sai.optim import SGDSaI, rounding, sgd_update
from hf_sai.optim.rounding import Rounding


def trained(steps, seed=0, accelerator=False, resume=None, **options):
    """Two tensors of one shape, the same gradients in every run, and another state of the global generator."""
    params = [torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = SGDSaI(params, lr=1e-5, weight_decay=0.0, **options)
    first = 0
    if resume:
        for param, value in zip(params, resume[0], strict=True):
            param.data.copy_(value)
        optimizer.load_state_dict(copy.deepcopy(resume[1]))
        first = resume[2]
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sgd_update, "is_accelerator", lambda device: accelerator)
        for step in range(first, steps):
            gradient = torch.randn(500, generator=torch.Generator().manual_seed(step)) + 1
            for param in params:
                param.grad = gradient.bfloat16()
            optimizer.step()
    return [param.detach().clone() for param in params], optimizer.state_dict()


@pytest.mark.parametrize("accelerator", [False, True])
def test_replicas_round_alike_whatever_their_random_numbers_and_leave_these_alone(accelerator):
    found = trained(20, seed=1, accelerator=accelerator, stochastic_rounding=True)[0]
    state = torch.get_rng_state()
    other = trained(20, seed=2, accelerator=accelerator, stochastic_rounding=True)[0]
    assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))
    assert not torch.equal(found[0], found[1])  # each tensor has its own noise
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("option", ["stochastic_rounding", "kahan_sum"])
def test_a_resumed_run_goes_on_with_the_noise_and_the_errors_of_the_whole_one(option, accelerator):
    whole = trained(9, accelerator=accelerator, **{option: True})[0]
    part = trained(4, accelerator=accelerator, **{option: True})
    resumed = trained(9, seed=7, accelerator=accelerator, resume=(*part, 4), **{option: True})[0]
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_noise_differs_from_step_to_step_and_list_to_list():
    values = torch.full((1000,), 1.0 + 2.0**-8)
    seen = []
    for seed in (2**24, 2**24 + 1, 2 * 2**24):
        each, again = values.clone(), values.clone()
        use = Rounding(seed)
        use.before(each, torch.bfloat16)
        use.before(again, torch.bfloat16)
        seen += [each, again]
    assert all(0.4 < (a != b).float().mean() < 0.6 for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_low_precision_stalls_where_kahan_summation_follows_float32(dtype, accelerator, monkeypatch):
    """A step is 1/20 of the spacing of bf16 numbers at 1; 400 of them move by 20 spacings, or by nothing."""
    monkeypatch.setattr(sgd_update, "is_accelerator", lambda device: accelerator)
    spacing = torch.finfo(dtype).eps
    runs = {}
    for name, kept, options in (
        ("float32", torch.float32, {}),
        ("plain", dtype, {}),
        ("kahan", dtype, {"kahan_sum": True}),
        ("stochastic", torch.bfloat16, {"stochastic_rounding": True}),
    ):
        param = torch.nn.Parameter(torch.ones(2000, dtype=kept))
        rows = [type("Row", (), {"name": "p", "shape": (2000,), "gsnr": 1.0, "scale": 1.0, "status": "measured"})]
        optimizer = SGDSaI([("p", param)], lr=spacing / 20, weight_decay=0.0, gsnr=rows, **options)
        gradient = torch.where(torch.arange(2000) % 2 == 0, 1.0, -1.0)
        for _ in range(400):
            param.grad = gradient.to(kept)
            optimizer.step()
        runs[name] = param.detach().float() - 1.0
        bytes_held = sum(v.nbytes for v in optimizer.state[param].values() if isinstance(v, torch.Tensor))
        of_buffer = 4 if kept == torch.float16 else kept.itemsize
        assert bytes_held == 2000 * (of_buffer + (kept.itemsize if name == "kahan" else 0))
    assert not runs["plain"].any()
    moved = runs["float32"].abs()
    assert moved.min() > 19 * spacing
    assert (runs["kahan"] - runs["float32"]).abs().max() <= spacing
    if dtype == torch.bfloat16:
        even = runs["stochastic"][::2].mean() / runs["float32"][::2].mean()
        assert even == pytest.approx(1.0, abs=0.03)


def test_both_ways_at_once_are_refused():
    with pytest.raises(ValueError, match="stochastic_rounding and kahan_sum must not both be True"):
        SGDSaI([torch.nn.Parameter(torch.ones(2))], stochastic_rounding=True, kahan_sum=True)


def test_noise_is_refused_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="use kahan_sum=True inside graphs"):
        rounding._seeded(torch.device("cuda"), 1)


def test_pieces_of_another_size_leave_the_noise_of_whole_tensors_alone(monkeypatch):
    """As under tensor parallelism, where ranks hold other shards beside the same whole tensors."""
    from hf_sai.optim import sgd_sai

    found = []
    for size in (300, 200):
        shard, whole = (torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (size, 400))
        monkeypatch.setattr(sgd_sai, "is_sharded", lambda tensor, shard=shard: tensor is shard)
        optimizer = SGDSaI([shard, whole], lr=1e-5, stochastic_rounding=True)
        torch.manual_seed(5)
        gradient = torch.randn(400).bfloat16()
        for _ in range(5):
            shard.grad, whole.grad = gradient[:size].clone(), gradient
            optimizer.step()
        found.append(whole.detach())
    assert torch.equal(*found)


def test_copies_of_large_tensors_are_bounded(monkeypatch):
    sizes = []
    original = sgd_update.copies

    def copies(tensors, dtype):
        flat, found = original(tensors, dtype)
        sizes.append(flat.numel())
        return flat, found

    monkeypatch.setattr(sgd_update, "copies", copies)
    expected = trained(5, kahan_sum=True)[0]
    assert not sizes
    monkeypatch.setattr(sgd_update, "LIST_NUMEL", 120)
    found = trained(5, accelerator=True, kahan_sum=True)[0]
    assert max(sizes) == 120
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2.0**-8, atol=0.0)
