"""Layer-wise updates: the same results, one gradient at a time, and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from support.models import tiny_llama, token_blocks
from support.processes import peak_allocated
from support.trainers import arguments, trainable

from hf_sai import GSNRReport, SaITrainer, SGDSaI
from hf_sai.optim import SGDSaILayerwise


def batches(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 32, (4, 10), generator=generator) for _ in range(count)]


def train(model, optimizer, data):
    losses = []
    for tokens in data:
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": "max"},
        {"normalize": "rms"},
        {"momentum": 0.0},
        {"measure_steps": 3},
        {"measure_steps": 2, "normalize": "max", "maximize": False},
        {"state_dtype": "bfloat16"},
    ],
)
def test_losses_weights_and_statistics_equal_the_ordinary_path(options):
    ordinary, layerwise = tiny_llama(), tiny_llama()
    first = SGDSaI(ordinary.named_parameters(), lr=0.02, **options)
    second = SGDSaILayerwise(layerwise.named_parameters(), lr=0.02, **options)
    data = batches(8)
    assert train(ordinary, first, data) == pytest.approx(train(layerwise, second, data), rel=1e-6)
    expected = trainable(ordinary)
    for name, value in trainable(layerwise).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert first.gsnr_statistics() == second.gsnr_statistics()


def test_never_more_than_one_gradient_at_a_time():
    model = tiny_llama()
    optimizer = SGDSaILayerwise(model.parameters())
    alive = []
    inner = optimizer._on_gradient

    def count(param):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        inner(param)

    optimizer._on_gradient = count
    train(model, optimizer, batches(2))
    assert set(alive) == {1}
    assert len(alive) == 2 * len(list(model.parameters()))


def peak_bytes(make_optimizer):
    """The most that a 12-layer model's training needed at a time beyond its parameters, by torch's own record."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 12, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    optimizer = make_optimizer(model.parameters())
    tokens = torch.randint(0, 64, (1, 4))  # few activations: the rest shows
    train(model, optimizer, [tokens])
    state = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    peak = peak_allocated(lambda: train(model, optimizer, [tokens]))
    return state + peak, max(p.nbytes for p in model.parameters()), sum(p.nbytes for p in model.parameters())


def test_peak_memory_is_that_of_the_buffers_and_of_one_gradient():
    def layerwise(**options):
        return peak_bytes(lambda params: SGDSaILayerwise(params, lr=0.01, **options))[0]

    sgd, largest, parameters = peak_bytes(lambda params: torch.optim.SGD(params, lr=0.01))
    ordinary, *_ = peak_bytes(lambda params: SGDSaI(params, lr=0.01))
    assert layerwise(momentum=0.0) < sgd + largest - 0.8 * parameters
    assert layerwise(state_dtype="bfloat16") < sgd + largest - 0.3 * parameters
    # With a float32 buffer, which is as large as the gradients that SGD holds, activations come on top.
    assert layerwise() == pytest.approx(layerwise(momentum=0.0) + parameters, rel=0.01)
    assert layerwise() < ordinary - 0.8 * parameters


def test_gradients_wait_for_step_only_while_the_maximum_is_open():
    model = tiny_llama()
    optimizer = SGDSaILayerwise(model.parameters(), normalize="max")
    waiting = []
    for tokens in batches(3):
        model(tokens, labels=tokens).loss.backward()
        waiting.append(sum(p.grad is not None for p in model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    assert waiting == [len(list(model.parameters())), 0, 0]


def test_schedulers_and_resume_work_as_usual():
    def make(model):
        optimizer = SGDSaILayerwise(model.named_parameters(), lr=0.02)
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)

    whole = tiny_llama()
    optimizer, scheduler = make(whole)
    data = batches(10)
    for tokens in data[:5]:
        train(whole, optimizer, [tokens])
        scheduler.step()
    resumed = copy.deepcopy(whole)
    other, other_scheduler = make(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_scheduler.load_state_dict(scheduler.state_dict())
    for model, each, each_scheduler in ((whole, optimizer, scheduler), (resumed, other, other_scheduler)):
        for tokens in data[5:]:
            train(model, each, [tokens])
            each_scheduler.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert optimizer.gsnr_statistics() == other.gsnr_statistics()


def test_a_pickled_one_hooks_its_own_parameters():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = SGDSaILayerwise([param], lr=0.1)
    other = pickle.loads(pickle.dumps(optimizer))
    (theirs,) = other.param_groups[0]["params"]
    (theirs * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert theirs.grad is None
    assert not torch.equal(theirs, param)
    assert torch.equal(param, torch.ones(3))


def test_group_added_later_is_updated_in_the_backward_pass():
    first, later = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = SGDSaILayerwise([first])
    optimizer.add_param_group({"params": [later]})
    ((first + later) * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert first.grad is None
    assert later.grad is None
    optimizer.step()
    assert [row.step for row in optimizer.gsnr_statistics()] == [1, 1]


def test_the_parameters_do_not_keep_the_optimizer_alive():
    param = torch.nn.Parameter(torch.ones(3))
    gone = weakref.ref(SGDSaILayerwise([param]))
    gc.collect()
    assert gone() is None
    param.square().sum().backward()  # as if there were no hook
    assert param.grad is not None


def test_accumulation_is_refused():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = SGDSaILayerwise([param])
    (param * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    with pytest.raises(RuntimeError, match=r"a second one came before step\(\); set gradient_accumulation_steps=1"):
        (param * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    optimizer.step()
    (param * torch.tensor([1.0, 2.0, 4.0])).sum().backward()


def test_a_grad_scaler_is_refused():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = SGDSaILayerwise([param])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((param * torch.tensor([1.0, 2.0, 4.0])).sum()).backward()
    with pytest.raises(RuntimeError, match="gradients that a GradScaler has multiplied; train in bf16 or float32"):
        scaler.step(optimizer)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = SGDSaILayerwise([param])
    with pytest.raises(RuntimeError, match="before gradients are averaged over the processes, but there are 2"):
        param.sum().backward()
    assert optimizer.gsnr_statistics()[0].status == "pending"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, r"needs max_grad_norm=0, but it is 1\.0; set it so, or use optim='sgd_sai'"),
        ({"max_grad_norm": 0, "gradient_accumulation_steps": 2}, r"needs gradient_accumulation_steps=1, but it is 2"),
    ],
)
def test_settings_of_the_trainer_are_refused_before_the_first_step(tmp_path, changed, message):
    args = arguments(tmp_path, optim="sgd_sai_layerwise", **changed)
    trainer = SaITrainer(tiny_llama(), args, train_dataset=token_blocks())
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_trainer_run_equals_the_ordinary_one(tmp_path):
    weights = {}
    for name in ("sgd_sai", "sgd_sai_layerwise"):
        args = arguments(tmp_path / name, optim=name, max_grad_norm=0, weight_decay=0.1)
        trainer = SaITrainer(tiny_llama(), args, train_dataset=token_blocks())
        trainer.train()
        weights[name] = trainable(trainer.model)
        assert GSNRReport.load(tmp_path / name).optimizer == name
    for name, value in weights["sgd_sai_layerwise"].items():
        torch.testing.assert_close(value, weights["sgd_sai"][name], rtol=1e-6, atol=1e-7)
