"""SWAN against a float64 reference, one matrix at a time, on real models; state, memory, and what is refused."""

from __future__ import annotations

import copy
import io
import logging
import math
import warnings

import pytest
import torch
from reference import ReferenceSWAN
from support.models import VOCABULARY, tiny_gpt2, tiny_llama, tiny_lora, tiny_mixtral, tiny_vit
from support.processes import peak_allocated

import hf_sai
from hf_sai.optim import SWAN, SGDSaI
from hf_sai.optim.matrices import BYTES_PER_ELEMENT


OPTIONS = {"lr": 0.01, "scale": 2.0, "adam_lr_ratio": 0.5, "weight_decay": 0.1}
EXACT = {"whitening": "svd"}


def whole(array):
    return [array.reshape(len(array), -1)]


def transposed(array):
    return [array.T]


def thirds_transposed(array):
    width = array.shape[1] // 3
    return [array.T[i * width : (i + 1) * width] for i in range(3)]


def each_expert(array):
    return list(array)


def token_loss(model):
    tokens = torch.randint(0, VOCABULARY, (2, 12))
    return model(input_ids=tokens, labels=tokens).loss


def image_loss(model):
    return model(pixel_values=torch.randn(4, 3, 16, 16), labels=torch.arange(4)).loss


def views_of(names, rules):
    """`{name: view}` for the names that hold one of the fragments; the first that fits."""
    found = {}
    for name in names:
        for fragment, view in rules:
            if fragment in name and "bias" not in name and "norm" not in name and "layernorm" not in name:
                found[name] = view
                break
    return found


LLAMA = [("_proj.weight", whole)]
GPT2 = [("attn.c_attn", transposed), ("c_proj", transposed), ("c_fc", transposed)]
GPT2_SPLIT = [("attn.c_attn", thirds_transposed), *GPT2[1:]]
VIT = [("attention", whole), ("intermediate", whole), ("output.dense", whole), ("mlp", whole)]
MIXTRAL = [("experts", each_expert), ("_proj.weight", whole), ("gate.weight", whole)]
MODELS = {
    "llama": (tiny_llama, token_loss, LLAMA, {}),
    "gpt2": (tiny_gpt2, token_loss, GPT2, {}),
    "gpt2, split": (tiny_gpt2, token_loss, GPT2_SPLIT, {"split_qkv": True}),
    "vit": (tiny_vit, image_loss, VIT, {}),
    "mixtral": (tiny_mixtral, token_loss, MIXTRAL, {}),
    "lora": (tiny_lora, token_loss, [("lora_B", transposed)], {"lora_policy": "b_only"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_steps_on_real_models_equal_the_reference(name):
    build, loss_of, rules, routing = MODELS[name]
    model = build().double()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if name == "lora":  # B is zero at first, and so is the gradient of A
        for parameter_name, param in trainable.items():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(param, std=0.1)
    groups = hf_sai.param_groups(model, "swan", weight_decay=0.1, decay_names=list(trainable), **routing)
    optimizer = SWAN(groups, **OPTIONS, **EXACT)
    arrays = {n: p.detach().numpy().copy() for n, p in trainable.items()}
    views = views_of(trainable, rules)
    reference = ReferenceSWAN(arrays, views, {**OPTIONS, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8})
    assert {row.name for row in optimizer.routes() if row.route != "adam"} == set(views)
    for _ in range(3):
        loss_of(model).backward()
        reference.step({n: p.grad.numpy().copy() for n, p in trainable.items() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    for parameter_name, param in trainable.items():
        expected = torch.from_numpy(reference.theta[parameter_name])
        torch.testing.assert_close(
            param.detach(), expected, rtol=1e-7, atol=1e-9, msg=lambda text, n=parameter_name: f"{n}: {text}"
        )


def test_one_step_by_hand():
    # Rows (1, 3) and (4, 0) become (-1, 1) and (1, -1): rank 1, so that the direction is the same again, RMS 1.
    param = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = SWAN([param], lr=0.1, scale=2.0)
    param.grad = torch.tensor([[1.0, 3.0], [4.0, 0.0]])
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([[0.2, -0.2], [-0.2, 0.2]]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("whitening", ["polar", "polar_express", "newton_schulz", "nsds"])
@pytest.mark.parametrize("maximize", [False, True])
def test_update_has_rms_lr_times_scale_whatever_the_gradients_size(whitening, maximize):
    for size in (1e-12, 1.0, 1e12):
        param = torch.nn.Parameter(torch.zeros(24, 40))
        param.grad = torch.randn(24, 40) * size
        SWAN([param], lr=0.01, scale=3.0, whitening=whitening, maximize=maximize).step()
        assert param.detach().square().mean().sqrt().item() == pytest.approx(0.03, rel=1e-3)
        assert ((param.detach() * param.grad).sum().item() > 0) == maximize


# ---- State ----


def test_matrices_keep_nothing_and_adams_tensors_two_float32_moments():
    model = tiny_llama().bfloat16()
    optimizer = SWAN(hf_sai.param_groups(model, "swan"))
    token_loss(model).backward()
    optimizer.step()
    for row in optimizer.routes():
        state = optimizer.state.get(row.param, {})
        held = sum(v.nbytes for v in state.values() if isinstance(v, torch.Tensor) and v.ndim)
        assert held == (8 * row.param.numel() if row.route == "adam" else 0)
        assert ("exp_avg" in state) == (row.route == "adam")


def test_llama_2_7b_keeps_less_than_a_tenth_of_adamws_state():
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    routes = SWAN(hf_sai.param_groups(model, "swan")).routes()
    numel = sum(row.param.numel() for row in routes)
    to_adam = sum(row.param.numel() for row in routes if row.route == "adam")
    assert numel == 6_738_415_616
    assert to_adam / numel < 0.1


def round_trip(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_resume_is_exact(dtype, momentum):
    def build():
        return tiny_llama().to(dtype)

    def run(model, optimizer, steps, seed):
        torch.manual_seed(seed)
        for _ in range(steps):
            token_loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    options = {"lr": 0.01, "momentum": momentum}
    model = build()
    optimizer = SWAN(hf_sai.param_groups(model, "swan", weight_decay=0.1), **options)
    run(model, optimizer, 5, seed=1)
    other = build()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = SWAN(hf_sai.param_groups(other, "swan", weight_decay=0.1), **options)
    resumed.load_state_dict(round_trip(optimizer))
    for each, runs in ((model, optimizer), (other, resumed)):
        run(each, runs, 5, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    moments = [s["exp_avg"] for s in resumed.state.values() if "exp_avg" in s]
    assert moments
    assert {m.dtype for m in moments} == {torch.float32}


def test_all_matrices_no_state_and_still_a_checkpoint():
    param = torch.nn.Parameter(torch.randn(4, 6))
    optimizer = SWAN([param])
    param.grad = torch.randn(4, 6)
    optimizer.step()
    saved = round_trip(optimizer)
    assert saved["state"] == {0: {"step": 1}}
    other = SWAN([torch.nn.Parameter(param.detach().clone())], lr=1.0)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 1e-3
    assert other.param_groups[0]["routes"] == ["matrix"]


def test_state_of_another_optimizer_is_refused():
    param = torch.nn.Parameter(torch.randn(4, 6))
    param.grad = torch.randn(4, 6)
    adamw = torch.optim.AdamW([param])
    adamw.step()
    with pytest.raises(ValueError, match=r"SWAN loads only state that SWAN saved, but AdamW saved this one"):
        SWAN([param]).load_state_dict(adamw.state_dict())


# ---- Gradients ----


def test_gradients_that_are_zero_none_or_late():
    zero, none, late = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(3))
    optimizer = SWAN([zero, none, late])
    for step in range(2):
        zero.grad = torch.zeros(3, 4)
        late.grad = torch.randn(3, 4) if step else None
        optimizer.step()
    assert torch.equal(zero, torch.ones(3, 4))
    assert torch.equal(none, torch.ones(3, 4))
    assert not torch.equal(late, torch.ones(3, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_matrix_with_a_gradient_that_is_not_finite_is_left_alone_with_one_warning(bad, momentum, caplog):
    params = [(name, torch.nn.Parameter(torch.ones(3, 4))) for name in ("good", "bad", "other")]
    twins = [(name, torch.nn.Parameter(torch.ones(3, 4))) for name in ("good", "other")]
    optimizer = SWAN(params, weight_decay=0.1, momentum=momentum)
    without = SWAN(twins, weight_decay=0.1, momentum=momentum)
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        for _ in range(3):
            for name, param in params:
                param.grad = torch.randn(3, 4)
                if name == "bad":
                    param.grad[1, 2] = bad
            for (_, param), source in zip(twins, (params[0][1], params[2][1]), strict=True):
                param.grad = source.grad.clone()
            optimizer.step()
            without.step()
    assert torch.equal(params[1][1], torch.ones(3, 4))
    torch.testing.assert_close(params[0][1], twins[0][1])
    torch.testing.assert_close(params[2][1], twins[1][1])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("The gradient of bad has inf or NaN: not updated")
    assert optimizer.state[params[1][1]] == {"step": 0}  # no buffer began


def test_gradients_are_not_written_and_closure_is_called_once():
    param = torch.nn.Parameter(torch.randn(5, 7))
    optimizer = SWAN([param], momentum=0.9, maximize=True)
    gradient = torch.randn(5, 7)
    calls = []

    def closure():
        param.grad = gradient.clone()
        calls.append(1)
        return 2.5

    assert optimizer.step(closure) == 2.5
    assert calls == [1]
    assert torch.equal(param.grad, gradient)


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"SWAN needs dense gradients but that of table is torch\.sparse_coo"):
        SWAN([("table", table.weight)]).step()


def test_momentum_whitens_the_running_mean():
    param, twin = (torch.nn.Parameter(torch.zeros(6, 9)) for _ in range(2))
    optimizer, plain = SWAN([param], momentum=0.8, **EXACT), SWAN([twin], **EXACT)
    gradients = [torch.randn(6, 9) for _ in range(3)]
    mean = None
    for gradient in gradients:
        mean = gradient if mean is None else 0.8 * mean + 0.2 * gradient
        param.grad, twin.grad = gradient, mean
        optimizer.step()
        plain.step()
    torch.testing.assert_close(param, twin, rtol=1e-4, atol=1e-6)


# ---- Batches, memory, layouts ----


def gradients_like(params, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def test_batching_changes_nothing():
    shapes = [(8, 12)] * 5 + [(12, 8)] * 2 + [(8, 12)]
    results = []
    for size in (1, 3 * 96 * BYTES_PER_ELEMENT, 2**28):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        gradients_like(params)
        SWAN(params, max_batch_bytes=size, whitening_dtype="float32").step()
        results.append(params)
    for params in results[1:]:
        for a, b in zip(results[0], params, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_groups_with_their_own_options_are_not_mixed():
    params = [torch.nn.Parameter(torch.zeros(4, 6)) for _ in range(2)]
    optimizer = SWAN([{"params": params[:1], "lr": 0.1}, {"params": params[1:], "scale": 30.0}], lr=0.01)
    params[0].grad = params[1].grad = torch.randn(4, 6)
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), params[1].detach())


@pytest.mark.parametrize(
    "options", [{}, {"whitening_dtype": "float32"}, {"whitening": "newton_schulz"}, {"momentum": 0.9}]
)
@pytest.mark.parametrize("shape", [(256, 256), (512, 128), (128, 512)])
def test_extra_memory_of_a_step_stays_within_the_bound(options, shape):
    bound = 4 * BYTES_PER_ELEMENT * shape[0] * shape[1]
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(12)]
    optimizer = SWAN(params, max_batch_bytes=bound, **options)
    for _ in range(2):
        gradients_like(params)
        optimizer.step()
    assert bound / 8 < peak_allocated(optimizer.step) <= bound + 10_000


def test_bf16_parameters_are_updated_in_float32_and_rounded_once():
    param = torch.nn.Parameter(torch.randn(16, 24).bfloat16())
    wide = torch.nn.Parameter(param.detach().float())
    param.grad = torch.randn(16, 24).bfloat16()
    wide.grad = param.grad.float()
    for each in (param, wide):
        SWAN([each], lr=0.01, weight_decay=0.1).step()
    assert torch.equal(param.detach(), wide.detach().bfloat16())


def test_stochastic_rounding_moves_what_plain_rounding_loses():
    moved = {}
    for stochastic in (False, True):
        for kind in ("swan", "adam"):
            param = torch.nn.Parameter(torch.ones(40, 60, dtype=torch.bfloat16))
            group = {"params": [param], "kind": kind}
            optimizer = SWAN([group], lr=1e-4, scale=1.0, adam_lr_ratio=1.0, stochastic_rounding=stochastic)
            gradient = torch.randn(40, 60).bfloat16()
            for _ in range(10):
                param.grad = gradient
                optimizer.step()
            moved[stochastic, kind] = (param.detach() != 1).float().mean().item()
    assert moved[False, "swan"] == moved[False, "adam"] == 0.0
    assert min(moved[True, "swan"], moved[True, "adam"]) > 0.1


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "bf16", "large bf16"])
def test_adams_part_equals_torchs_adamw(layout, accelerator, monkeypatch):
    from hf_sai.optim import adam_update

    monkeypatch.setattr(adam_update, "is_accelerator", lambda device: accelerator)
    monkeypatch.setattr(adam_update, "BLOCK_NUMEL", 64)
    start = torch.randn(6, 40) if layout == "large bf16" else torch.randn(6, 4)
    start = start.bfloat16() if "bf16" in layout else start
    param = torch.nn.Parameter(start.clone().t() if layout == "transposed" else start.clone())
    twin = torch.nn.Parameter(param.detach().clone().float().contiguous())
    optimizer = SWAN([{"params": [param], "kind": "adam"}], lr=0.01, adam_lr_ratio=0.5, weight_decay=0.2)
    adamw = torch.optim.AdamW([twin], lr=0.005, weight_decay=0.4)
    for _ in range(4):
        if "bf16" in layout:
            twin.data.copy_(param.detach())  # a bf16 parameter is rounded after each step
        gradient = torch.randn(twin.shape).to(param.dtype)
        param.grad, twin.grad = gradient.clone(memory_format=torch.contiguous_format), gradient.float()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(param.detach().float(), twin.detach().to(param.dtype).float(), rtol=1e-6, atol=1e-7)


def test_learning_rates_follow_one_scheduler():
    matrix, bias = torch.nn.Parameter(torch.zeros(4, 6)), torch.nn.Parameter(torch.zeros(4))
    optimizer = SWAN([matrix, bias], lr=0.1, scale=2.0, adam_lr_ratio=3.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    for _ in range(2):
        gradients_like([matrix, bias])
        optimizer.step()
        scheduler.step()
    assert matrix.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-3)
    torch.testing.assert_close(bias.detach().abs(), torch.full((4,), 0.3), rtol=1e-4, atol=0)


def test_kinds_and_routes_made_by_hand():
    matrix, vector = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))
    auto = SWAN([("matrix", matrix), ("vector", vector)])
    assert [(row.name, row.route) for row in auto.routes()] == [("matrix", "matrix"), ("vector", "adam")]
    assert [row.route for row in SWAN([{"params": [matrix], "kind": "adam"}]).routes()] == ["adam"]
    with pytest.raises(ValueError, match=r"kind='swan' must hold matrices but its tensor 0 has shape \(5,\)"):
        SWAN([{"params": [vector], "kind": "swan"}])
    with pytest.raises(ValueError, match=r"one route per parameter but has 1 for 2"):
        SWAN([{"params": [matrix, vector], "routes": ["matrix"]}])
    with pytest.raises(ValueError, match=r"a route must be 'adam', 'matrix' or 'matrices'"):
        SWAN([{"params": [matrix], "routes": ["rows"]}])


def test_group_added_later():
    first, later = (torch.nn.Parameter(torch.zeros(3, 4)) for _ in range(2))
    optimizer = SWAN([("first", first)])
    optimizer.add_param_group({"params": [later], "lr": 0.5})
    gradients_like([first, later])
    optimizer.step()
    assert [row.name for row in optimizer.routes()] == ["first", "group1.0"]
    assert later.detach().square().mean().sqrt().item() == pytest.approx(1.5, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and >= 0 but is -1.0"),
        ({"weight_decay": math.nan}, "weight_decay must be finite and >= 0"),
        ({"scale": 0.0}, "scale must be finite and > 0 but is 0.0"),
        ({"adam_lr_ratio": math.inf}, "adam_lr_ratio must be finite and > 0"),
        ({"whitening": "qr"}, "whitening must be one of polar, polar_express, newton_schulz, nsds, svd but is 'qr'"),
        ({"ns_steps": 0}, "ns_steps must be a whole number >= 1 or None but is 0"),
        ({"whitening_dtype": "float16"}, "whitening_dtype must be one of bfloat16, float32 but is 'float16'"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\)"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\) but is 1.0"),
        ({"maximize": 2}, "maximize must be True or False but is 2"),
        ({"max_batch_bytes": 0}, "max_batch_bytes must be a whole number >= 1 or None but is 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SWAN([torch.nn.Parameter(torch.randn(2, 3))], **options)
    with pytest.raises(ValueError, match=message):
        SWAN([torch.nn.Parameter(torch.randn(2, 3))]).add_param_group(
            {"params": [torch.nn.Parameter(torch.randn(2, 3))], **options}
        )


def test_flags_of_an_accelerator_are_read_in_the_next_step(monkeypatch, caplog):
    """On the CPU they are read at once; the path of accelerators is walked by hand."""
    optimizer = SWAN([("matrix", torch.nn.Parameter(torch.zeros(2, 3)))])
    optimizer._late_news.send(torch.tensor([0.0, 1.0]), [("first", None), ("second", None)])
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        optimizer.step()
        optimizer.step()
    (message,) = [text for record in caplog.records if "inf or NaN" in (text := record.getMessage())]
    assert message.startswith("The gradient of second has inf or NaN")


@pytest.mark.slow
@pytest.mark.parametrize("cls", [SWAN, SGDSaI])
def test_a_compiled_step_warns_of_nothing(cls):
    """But for what torch itself uses on the way."""
    model = torch.nn.Linear(4, 4)
    optimizer = cls(model.parameters(), lr=1e-3)
    step = torch.compile(optimizer.step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        warnings.filterwarnings("ignore", "`torch._prims_common.check`", FutureWarning)
        for _ in range(3):
            model(torch.ones(2, 4)).square().sum().backward()
            step()
            optimizer.zero_grad()


def test_a_checkpoint_from_before_goes_on_with_its_own_whitening():
    def stepped(optimizer, param):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(4))
        optimizer.step()
        return param.detach()

    params = [torch.nn.Parameter(torch.zeros(40, 64)) for _ in range(2)]
    old = SWAN([params[0]], whitening="polar_express")
    saved = old.state_dict()
    for group in saved["param_groups"]:
        del group["ns_beta"]  # which is newer
    new = SWAN([params[1]])
    new.load_state_dict(saved)
    assert (new.param_groups[0]["whitening"], new.param_groups[0]["ns_beta"]) == ("polar_express", None)
    assert torch.equal(stepped(new, params[1]), stepped(old, params[0]))


def test_a_load_puts_adams_step_where_the_parameter_is():
    """As on one GPU, where the Trainer maps checkpoints to the CPU; `meta` stands in for the GPU."""
    groups = [("matrix", (4, 6), "swan"), ("bias", (6,), "adam")]

    def made(device):
        params = [torch.nn.Parameter(torch.randn(shape, device=device)) for _, shape, _ in groups]
        pairs = [{"params": [(n, p)], "kind": kind} for (n, _, kind), p in zip(groups, params, strict=True)]
        return params, SWAN(pairs, momentum=0.5)

    params, optimizer = made("cpu")
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    _, other = made("meta")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found = {key: value for state in other.state.values() for key, value in state.items()}
    assert {"exp_avg", "exp_avg_sq", "momentum_buffer"} <= set(found)
    kept = [value for state in other.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert len(kept) == 4
    assert all(value.device.type == "meta" for value in kept)
