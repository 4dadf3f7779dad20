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
from support.trainers import arguments, batch_after, trainable
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback

from hf_sai import SWAN, GSNRReport, SaIConfig, SaITrainer, SGDSaI
from hf_sai.optim import SGDSaILayerwise, SWANLayerwise


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
    model = tiny_llama(vocab_size=64, hidden_size=64, intermediate_size=172, num_hidden_layers=12)
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


# ---- The life of the hooks ----


class Square(torch.nn.Module):
    """Two layers of 3 x 3, a loss, and a place where the backward pass can fail: between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
        self.fails = None

    def forward(self, x):
        middle = self.first(x)
        if self.fails is not None:
            middle.register_hook(self.fails)
        return self.second(middle).square().sum()


X = torch.tensor([[1.0, 2.0, -0.5], [0.5, -1.0, 2.0]])
KINDS = [(SGDSaI, SGDSaILayerwise), (SWAN, SWANLayerwise)]


def failing(error):
    def hook(gradient):
        raise error

    return hook


def assert_same_weights(found, expected):
    for name, value in trainable(expected).items():
        torch.testing.assert_close(trainable(found)[name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("zeroes", [True, False])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), KeyboardInterrupt(), RuntimeError("nan in anomaly")]
)
@pytest.mark.parametrize(("ordinary", "layerwise"), KINDS)
def test_after_an_error_in_the_pass_the_next_ones_train(ordinary, layerwise, error, zeroes):
    """What the failed pass had updated (here the second layer) stays; from there on it is the ordinary training."""
    found, expected = Square(), Square()
    one = layerwise(found.named_parameters(), lr=0.01, weight_decay=0.1)
    other = ordinary(expected.named_parameters(), lr=0.01, weight_decay=0.1)
    found.fails = failing(error)
    with pytest.raises(type(error)):
        found(X).backward()
    if zeroes:
        one.zero_grad()
    found.fails = None
    loss = expected(X)
    expected.second.weight.grad = torch.autograd.grad(loss, expected.second.weight)[0]
    other.step()
    assert_same_weights(found, expected)
    for _ in range(3):
        for model, optimizer in ((found, one), (expected, other)):
            model.zero_grad()
            model(X).backward()
            optimizer.step()
        assert_same_weights(found, expected)


def test_a_pass_that_is_skipped_ends_with_zero_grad():
    model = Square()
    optimizer = SGDSaILayerwise(model.parameters())
    model(X).backward()
    optimizer.zero_grad()
    model(X).backward()
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1]
    model(X).backward()
    with pytest.raises(RuntimeError, match=r"a second one came before step\(\)"):
        model(X).backward()


@pytest.mark.parametrize(("ordinary", "layerwise"), KINDS)
def test_detached_it_is_the_ordinary_optimizer_and_attached_again_itself(ordinary, layerwise):
    found, expected = Square(), Square()
    one, other = layerwise(found.named_parameters(), lr=0.01), ordinary(expected.named_parameters(), lr=0.01)
    for action in (None, one.detach, one.attach):
        if action is not None:
            action()
        for _ in range(2):
            before = trainable(found)
            found(X).backward()
            waits = action == one.detach
            assert [param.grad is not None for param in found.parameters()] == [waits, waits]
            assert all(torch.equal(before[name], value) == waits for name, value in trainable(found).items())
            one.step()
            expected(X).backward()
            other.step()
            for optimizer in (one, other):
                optimizer.zero_grad()
            assert_same_weights(found, expected)
    one.detach()
    one.load_state_dict(one.state_dict())
    one.add_param_group({"params": [("late", torch.nn.Parameter(torch.ones(2, 2)))]})
    found(X).backward()
    assert found.first.weight.grad is not None


class StopsAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("interrupted", [False, True])
def test_after_a_training_of_any_trainer_the_model_is_free(tmp_path, interrupted):
    """Also where the user has stopped it. Then AdamW trains the model as if it had come so, and again we."""
    model, rows = tiny_llama(), token_blocks()
    args = arguments(tmp_path, optim="sgd_sai_layerwise", max_grad_norm=0)
    first = Trainer(model, args, train_dataset=rows, callbacks=[StopsAt()] if interrupted else [])
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            first.train()
    else:
        first.train()
    assert model.lm_head.weight.grad is None
    kept = trainable(model)
    model(**{name: value[None] for name, value in rows[0].items()}).loss.backward()
    assert all(torch.equal(kept[name], value) for name, value in trainable(model).items())
    assert all(param.grad is not None for param in model.parameters())
    model.zero_grad()
    fresh = copy.deepcopy(model)
    for each in (model, fresh):
        Trainer(each, arguments(tmp_path, optim="adamw_torch"), train_dataset=rows).train()
    assert_same_weights(model, fresh)
    assert not torch.equal(model.lm_head.weight, kept["lm_head.weight"])
    again = copy.deepcopy(model)
    first.callback_handler.remove_callback(StopsAt) if interrupted else None
    first.train()
    assert not torch.equal(model.lm_head.weight, again.lm_head.weight)


class TooLarge(torch.nn.Module):
    """Out of memory, in the backward pass, with more than two rows."""

    def __init__(self):
        super().__init__()
        self.net = Square()

    def forward(self, x):
        self.net.fails = failing(torch.OutOfMemoryError("CUDA out of memory.")) if len(x) > 2 else None
        return {"loss": self.net(x)}


def test_auto_find_batch_size_finds_it_and_trains_with_it(tmp_path):
    """The pass that failed had updated the second layer; the rest is six ordinary steps on two rows."""
    if batch_after(3) != 2:
        pytest.skip("this accelerate tries a batch of one next")
    options = {"optim": "sgd_sai_layerwise", "max_grad_norm": 0, "remove_unused_columns": False}
    args = arguments(
        tmp_path,
        per_device_train_batch_size=3,
        auto_find_batch_size=True,
        lr_scheduler_type="constant",
        learning_rate=1e-3,
        **options,
    )
    model, expected = TooLarge(), Square()
    trainer = Trainer(model, args, train_dataset=[{"x": X[0]}] * 64)
    trainer.train()
    assert (trainer.state.global_step, trainer.state.train_batch_size) == (6, 2)
    optimizer = SGDSaI(expected.parameters(), lr=1e-3, weight_decay=0.0)
    loss = expected(X[:1].expand(3, -1))
    expected.second.weight.grad = torch.autograd.grad(loss, expected.second.weight)[0]
    optimizer.step()
    for _ in range(6):
        optimizer.zero_grad()
        expected(X[:1].expand(2, -1)).backward()
        optimizer.step()
    assert_same_weights(model.net, expected)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize(("cls", "late"), [(SGDSaILayerwise, False), (SWANLayerwise, False), (SGDSaILayerwise, True)])
def test_a_grad_scaler_is_refused_however_it_is_used(cls, late, unscales, beside):
    model, other = Square(), torch.nn.Linear(3, 3)
    optimizers = [cls(model.requires_grad_(not late).parameters())]
    model.requires_grad_(True)
    if beside:
        optimizers.append(torch.optim.SGD(other.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(other(X))).backward()
    if unscales:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="gradients that a GradScaler has multiplied; train in bf16 or float32"):
        scaler.step(optimizers[0])
    # Nothing of it is left: without the scaler it trains on.
    optimizers[0].zero_grad()
    model(X).backward()
    optimizers[0].step()


@pytest.mark.parametrize("options", [{}, {"normalize": "max"}])
def test_a_scaler_that_is_switched_off_changes_nothing(options):
    found, expected = Square(), Square()
    one = SGDSaILayerwise(found.parameters(), lr=0.01, **options)
    other = SGDSaI(expected.parameters(), lr=0.01, **options)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(3):
        for model, optimizer in ((found, one), (expected, other)):
            scaler.scale(model(X)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_same_weights(found, expected)


class Shared(torch.nn.Module):
    """One layer three times, each time checkpointed, and another after it."""

    def __init__(self, reentrant):
        super().__init__()
        self.net, self.reentrant = Square(), reentrant

    def forward(self, x):
        x = x.clone().requires_grad_(True)
        for _ in range(3):
            x = checkpoint(self.net.first, x, use_reentrant=self.reentrant)
        return self.net.second(x).square().sum()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("ordinary", "layerwise"), KINDS)
def test_gradients_that_come_in_parts_are_used_whole(ordinary, layerwise, reentrant, caplog):
    found, expected = Shared(reentrant), Shared(reentrant)
    one, other = layerwise(found.parameters(), lr=0.01), ordinary(expected.parameters(), lr=0.01)
    for _ in range(3):
        found(X).backward()
        assert [param.grad is not None for param in found.parameters()] == [reentrant, False]
        expected(X).backward()
        for optimizer in (one, other):
            optimizer.step()
            optimizer.zero_grad()
        assert_same_weights(found, expected)
    said = [record.getMessage() for record in caplog.records if "use_reentrant" in record.getMessage()]
    assert len(said) == reentrant


@pytest.mark.parametrize("clip", ["norm", "by name", "value", "one tensor"])
@pytest.mark.parametrize("cls", [SGDSaILayerwise, SWANLayerwise])
def test_clipping_that_comes_too_late_is_refused(cls, clip):
    model = Square()
    optimizer = cls(model.parameters(), lr=0.01)
    model(X).backward()
    clips = {
        "norm": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6),
        "by name": lambda: clip_grad_norm_(model.parameters(), 1e-6),
        "value": lambda: torch.nn.utils.clip_grad_value_(model.parameters(), clip_value=1e-6),
        "one tensor": lambda: torch.nn.utils.clip_grad_norm_(model.first.weight, max_norm=1e-6),
    }
    used = "1 of these 1" if clip == "one tensor" else "2 of these 2"
    with pytest.raises(RuntimeError, match=f"{cls.__name__} updates in the backward pass, which has used {used} grad"):
        clips[clip]()
    torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))  # asks for the norm
    optimizer.step()
    other = Square()
    other(X).backward()
    assert torch.nn.utils.clip_grad_norm_(other.parameters(), 1e-6).item() > 1.0
    assert torch.cat([param.grad.flatten() for param in other.parameters()]).norm().item() == pytest.approx(1e-6)
    torch.nn.utils.clip_grad_value_(iter(other.parameters()), 1e-9)
    assert max(param.grad.abs().max().item() for param in other.parameters()) == pytest.approx(1e-9)


def test_a_second_optimizer_on_the_same_parameters_is_an_error():
    model = Square()
    first = SGDSaILayerwise(model.parameters())
    second = SGDSaILayerwise(model.parameters())
    with pytest.raises(RuntimeError, match=r"somebody else has taken this gradient.*call its detach\(\) first"):
        model(X).backward()
    first.detach()
    model(X).backward()
    second.step()
    assert [row.step for row in second.gsnr_statistics()] == [1, 1]


# ---- What is measured, counted and said ----


@pytest.mark.parametrize("options", [{}, {"normalize": "max"}, {"measure_steps": 2}])
def test_a_look_at_gsnr_says_what_the_ordinary_optimizer_says(options):
    ordinary, layerwise = tiny_llama(), tiny_llama()
    first = SGDSaI(ordinary.named_parameters(), lr=0.02, **options)
    second = SGDSaILayerwise(layerwise.named_parameters(), lr=0.02, **options)
    for step, tokens in enumerate(batches(4)):
        if step % 2:
            second.measure_next_pass()
        for model in (ordinary, layerwise):
            model(tokens, labels=tokens).loss.backward()
        expected, found = first.measure_now(), second.measure_now()
        if step % 2:
            assert list(found) == list(expected)
            assert found == pytest.approx(expected, rel=1e-5)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    assert second.measure_now() == {}


def test_a_trainers_report_says_what_the_ordinary_one_says(tmp_path):
    """With the drift, the steps and the scalars; but for the optimizer's name and its memory."""
    reports, logs = [], []
    for name in ("sgd_sai", "sgd_sai_layerwise"):
        args = arguments(tmp_path / name, optim=name, max_grad_norm=0)
        config = SaIConfig(gsnr_track_steps=2)
        trainer = SaITrainer(tiny_llama(), args, train_dataset=token_blocks(), sai_config=config)
        trainer.train()
        reports.append(GSNRReport.load(tmp_path / name))
        kept = [{k: v for k, v in entry.items() if k.startswith("gsnr/")} for entry in trainer.state.log_history]
        logs.append([entry for entry in kept if entry])
    assert [entry["step"] for entry in reports[0].history] == [entry["step"] for entry in reports[1].history]
    for one, other in zip(*(report.history for report in reports), strict=True):
        assert one["gsnr"] == pytest.approx(other["gsnr"], rel=1e-4)
        assert len(one["gsnr"]) == 21
    assert reports[0].tensors == reports[1].tensors
    assert reports[0].run == reports[1].run
    assert [list(entry) for entry in logs[0]] == [list(entry) for entry in logs[1]]
    assert len(logs[0]) == 4


@pytest.mark.parametrize(("ordinary", "layerwise"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_warnings_are_those_of_the_ordinary_optimizer(ordinary, layerwise, dtype, caplog):
    """Once for all tensors: of gradients that are not finite, of bf16 that stays."""
    said = []
    for cls in (ordinary, layerwise):
        caplog.clear()
        model = Square().to(dtype)
        optimizer = cls(model.named_parameters(), lr=1e-7)
        for factor in (float("nan"), 1.0):
            (model(X.to(dtype)) * factor).backward()
            optimizer.step()
            optimizer.zero_grad()
        said.append([record.getMessage().replace(cls.__name__, "") for record in caplog.records])
    assert said[0] == said[1]
    assert len(said[0]) == 1 + (ordinary is SGDSaI and dtype == torch.bfloat16)
    assert "first.weight, second.weight" in said[0][0]


@pytest.mark.parametrize("cls", [SGDSaI, SGDSaILayerwise])
def test_steps_are_counted_as_those_count_who_call_step(cls):
    """Three steps without a gradient, or with a gradient of zero: the fourth is the fourth."""
    for gradient in (None, 0.0, float("nan")):
        model = Square()
        optimizer = cls(model.named_parameters(), lr=0.01)
        for _ in range(3):
            if gradient is not None:
                (model(X) * gradient).backward()
            optimizer.step()
            optimizer.zero_grad()
        model(X).backward()
        optimizer.step()
        assert [row.step for row in optimizer.gsnr_statistics()] == [4, 4]
        assert [group["step"] for group in optimizer.param_groups] == [4]
