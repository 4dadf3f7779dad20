"""Options as hosts hand them on, groups that are refused, options that change in mid-run, names, and what decays."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from torch import nn

import hf_sai
from hf_sai.live import name_parameters
from hf_sai.optim import SWAN, SGDSaI, SGDSaILayerwise, SWANLayerwise
from hf_sai.optim.decay import decaying, is_norm
from hf_sai.optim.names import named_parameters, plain_name
from trainer_patches.optim_names import parse_optim_args


CLASSES = pytest.mark.parametrize("cls", [SGDSaI, SWAN, SGDSaILayerwise, SWANLayerwise])
BOTH = pytest.mark.parametrize("cls", [SGDSaI, SWAN])
NUMBERS = {
    SGDSaI: ("lr", "momentum", "weight_decay", "eps"),
    SWAN: ("lr", "momentum", "weight_decay", "eps", "scale", "adam_lr_ratio"),
}
NUMBERS |= {SGDSaILayerwise: NUMBERS[SGDSaI], SWANLayerwise: NUMBERS[SWAN]}


def weight():
    return nn.Parameter(torch.ones(2, 3))


# ---- Options ----


@CLASSES
def test_tensors_of_several_elements_are_refused_by_name(cls):
    for name in NUMBERS[cls]:
        for several in (torch.tensor([0.1, 0.1]), torch.ones(1, 2) * 0.1, torch.empty(0)):
            with pytest.raises(ValueError, match=f"Tensor {name} must be 1-element but has the shape"):
                cls([weight()], **{name: several})
            with pytest.raises(ValueError, match=f"Tensor {name} must be 1-element"):
                cls([{"params": [weight()], name: several}])
    if issubclass(cls, SWAN):
        with pytest.raises(ValueError, match=r"Tensor betas\[1\] must be 1-element"):
            cls([weight()], betas=(0.9, torch.ones(2)))


@CLASSES
def test_what_is_no_number_is_refused_by_name(cls):
    for name in NUMBERS[cls]:
        for odd in (None, "fast", True, [0.1], float("nan"), -1.0):
            with pytest.raises(ValueError, match=name):
                cls([weight()], **{name: odd})


@CLASSES
def test_numbers_come_as_text_and_tensors_of_one_element(cls):
    for name in NUMBERS[cls]:
        assert cls([weight()], **{name: "0.5"}).param_groups[0][name] == 0.5
        found = cls([weight()], **{name: torch.tensor([0.5])}).param_groups[0][name]
        assert (type(found) is float) == (name != "lr")
        assert found == 0.5


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (SGDSaI, {"normalize": None}, {"normalize": "none"}),
        (SGDSaI, {"normalize": "'none'"}, {"normalize": "none"}),
        (SGDSaI, {"state_dtype": "none", "foreach": "None", "fused": "none"}, {"state_dtype": None, "foreach": None}),
        (SGDSaI, {"state_dtype": "torch.bfloat16"}, {"state_dtype": "bfloat16"}),
        (SGDSaI, {"measure_steps": "2"}, {"measure_steps": 2}),
        (SWAN, {"betas": "0.9/0.95"}, {"betas": (0.9, 0.95)}),
        (SWAN, {"betas": "(0.9, 0.95)"}, {"betas": (0.9, 0.95)}),
        (SWAN, {"betas": [0.9, 0.95]}, {"betas": (0.9, 0.95)}),
        (SWAN, {"ns_steps": "none", "max_batch_bytes": "None"}, {"ns_steps": None, "max_batch_bytes": None}),
        # what parsers of other hosts make: words for flags, other cases, floats for whole numbers, quotes in quotes
        (SGDSaI, {"maximize": "True", "kahan_sum": "false"}, {"maximize": True, "kahan_sum": False}),
        (SGDSaI, {"normalize": "None", "measure_steps": 2.0}, {"normalize": "none", "measure_steps": 2}),
        (SGDSaI, {"lora_policy": None}, {"lora_policy": "plain", "paired": False}),
        (SGDSaI, {"lora_policy": "none"}, {"lora_policy": "plain", "paired": False}),
        (SWAN, {"stochastic_rounding": "true", "maximize": "0"}, {"stochastic_rounding": True, "maximize": False}),
        (SWAN, {"ns_beta": "none", "ns_steps": 4.0}, {"ns_beta": None, "ns_steps": 4}),
    ],
)
def test_options_of_hosts_that_take_a_class_by_its_path(cls, options, expected):
    group = cls([weight()], **options).param_groups[0]
    assert {name: group[name] for name in expected} == expected


@BOTH
def test_numpys_numbers_become_plain_ones(cls, tmp_path):
    """A checkpoint with one of them is refused by `torch.load`, which takes plain values only."""
    whole = {SGDSaI: "measure_steps", SWAN: "ns_steps"}[cls]
    options = {name: np.float64(0.5) for name in NUMBERS[cls]} | {whole: np.int64(2), "maximize": np.bool_(True)}
    if cls is SWAN:
        options["betas"] = (np.float32(0.5), np.float64(0.5))
    optimizer = cls([{"params": [weight()], "lr": np.float32(0.25)}], **options)
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in options} == {
        **options,
        "lr": 0.25,
        **({"betas": (0.5, 0.5)} if cls is SWAN else {}),
    }
    assert {type(group[name]) for name in NUMBERS[cls]} == {float}
    assert (type(group[whole]), type(group["maximize"])) == (int, bool)
    optimizer.param_groups[0]["params"][0].grad = torch.randn(2, 3)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"][0][whole] == 2


def test_pairs_by_a_quoted_word_are_pairs():
    pair = [nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.zeros(7, 2))]
    (group,) = SGDSaI(pair, lora_policy="'paired'").param_groups
    assert (group["paired"], group["lora_policy"]) == (True, "paired")


def test_a_report_by_its_place_is_refused_in_words(tmp_path):
    named = [("a", weight())]
    assert SGDSaI(named, gsnr="none").param_groups[0].get("gsnr_given") is None
    for place in ("user/repository", tmp_path):
        with pytest.raises(ValueError, match=r"gsnr of SGDSaI must be the rows of a report but is .*from_pretrained"):
            SGDSaI(named, gsnr=place)


@pytest.mark.parametrize("name", ["lora_whitening", "lora_policy", "split_qkv", "target_modules"])
def test_a_choice_that_needs_the_model_is_refused_in_words(name):
    with pytest.raises(ValueError, match=rf"{name} of SWAN is a choice of groups.*create_optimizer"):
        SWAN([weight()], **{name: "both"})


@pytest.mark.parametrize("cls", [nn.Linear, nn.Conv2d])
def test_factors_of_lora_by_kohyas_names(cls):
    """sd-scripts, OneTrainer and ai-toolkit have `lora_down` and `lora_up` for PEFT's `lora_A` and `lora_B`."""
    layer = nn.Module()
    size = (1,) if cls is nn.Conv2d else ()
    layer.lora_down, layer.lora_up = cls(6, 2, *size), cls(2, 5, *size)
    model = nn.ModuleDict({"lora": layer})
    routes = {row.name: (row.route, row.reason) for row in hf_sai.optim.route_parameters(model, lora_policy="b_only")}
    assert routes["lora.lora_down.weight"] == ("adam", "LoRA A, by lora_whitening=b_only")
    assert routes["lora.lora_up.weight"][0] != "adam"
    if cls is nn.Linear:  # as PEFT's: rows are those of the rank
        assert routes["lora.lora_up.weight"] == ("matrix, transposed", "LoRA B")


@CLASSES
def test_an_option_that_is_none_lists_those_that_are(cls):
    for error in (TypeError, ValueError):
        with pytest.raises(error, match=r"has no option nesterov; leave it out; valid options: .*momentum"):
            cls([weight()], nesterov=True)
    with pytest.raises(ValueError, match="did you mean momentum"):
        cls([weight()], momentun=0.9)


def test_betas_are_none_of_sgd_sais():
    with pytest.raises(ValueError, match="SGDSaI has no option betas"):
        SGDSaI([weight()], betas=(0.9, 0.99))


def test_pairs_by_a_class_path_have_to_alternate():
    pair = [nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.zeros(7, 2))]
    (group,) = SGDSaI(pair, lora_policy="paired").param_groups
    assert (group["paired"], group["lora_policy"]) == (True, "paired")
    with pytest.raises(ValueError, match="must alternate A of shape"):
        SGDSaI(pair[::-1], lora_policy="paired")


# ---- Groups ----


@pytest.mark.parametrize(
    ("cls", "bad", "error"),
    [
        (SWAN, {"kind": "swan", "params": [nn.Parameter(torch.ones(3))]}, ValueError),
        (SWAN, {"routes": ["matrix"], "params": [weight(), weight()]}, ValueError),
        (SWAN, {"routes": ["no route"], "reasons": [""], "params": [weight()]}, ValueError),
        (SWAN, {"lr": -1.0, "params": [weight()]}, ValueError),
        (SGDSaI, {"normalize": "max", "params": [weight()]}, ValueError),
        (SGDSaI, {"paired": True, "params": [weight()]}, ValueError),
        (SGDSaI, {"momentum": torch.ones(2), "params": [weight()]}, ValueError),
        (SGDSaI, {"params": {weight()}}, TypeError),
        (SGDSaI, {"params": ["weight"]}, TypeError),
        (SWAN, {"params": [3]}, TypeError),
    ],
)
def test_a_refused_group_leaves_the_optimizer_as_it_was(cls, bad, error):
    param = weight()
    optimizer = cls([param], lr=0.1)
    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    with pytest.raises(error):
        optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 1
    assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == before
    param.grad = torch.randn(2, 3)
    start = param.detach().clone()
    optimizer.step()
    assert not torch.equal(param, start)
    optimizer.add_param_group({"params": [weight()]})
    optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.1, 1.0])
def test_momentum_that_is_off_for_a_while_leaves_the_buffer_as_sgd_does(decay):
    """`m` waits while momentum is 0, and decay is right in every step."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    value, mean = param.detach().clone(), None
    optimizer = SGDSaI([param], lr=1e-2, weight_decay=decay)
    for momentum in (0.9, 0.9, 0.0, 0.0, 0.5, 0.9, 0.0, 0.9):
        gradient = torch.randn(6, 4, dtype=torch.float64)
        optimizer.param_groups[0]["momentum"] = momentum
        param.grad = gradient.clone()
        optimizer.step()
        scale = optimizer.gsnr_statistics()[0].scale
        move = gradient
        if momentum:
            mean = gradient if mean is None else momentum * mean + (1 - momentum) * gradient
            move = mean
        value = value * (1 - 1e-2 * decay) - 1e-2 * scale * move
        torch.testing.assert_close(param.detach(), value, rtol=0, atol=1e-12)


# ---- Names ----


@BOTH
def test_two_parameters_do_not_share_a_name(cls):
    with pytest.raises(ValueError, match=r"must not share a name.*'a' is given twice"):
        cls([("a", weight()), ("a", weight())])
    optimizer = cls([("a", weight())])
    with pytest.raises(ValueError, match="'a' is given twice"):
        optimizer.add_param_group({"params": [("a", weight())]})
    assert len(optimizer.param_groups) == 1


def test_strangers_of_a_model_get_a_name_each():
    net, extra = nn.Linear(2, 2), [weight(), weight()]
    optimizer = SGDSaI([{"params": [extra[0], *net.parameters()]}, {"params": [extra[1]]}])
    name_parameters(optimizer, net)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["unnamed.0", "weight", "bias"],
        ["unnamed.1"],
    ]


def test_wrappers_leave_no_trace_in_names():
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2)))
    plain = [name for name, _ in net.named_parameters()]
    whole = torch.compile(net, backend="eager")
    assert [name for name, _ in named_parameters(whole)] == plain
    assert [name for name, _ in named_parameters(nn.DataParallel(whole))] == plain
    inner = nn.Sequential(net[0], torch.compile(net[1], backend="eager"))
    assert [name for name, _ in named_parameters(inner)] == plain
    assert plain_name("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.weight") == "a.b.weight"
    # A module of one's own that is called `module` keeps its name.
    assert next(name for name, _ in named_parameters(nn.ModuleDict({"module": nn.Linear(1, 1)}))) == "module.weight"


@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="eager"), nn.DataParallel])
def test_wrapped_models_have_the_plain_ones_scales_routes_and_decay(wrap):
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    wrapped = wrap(net)
    for optim in ("sgd_sai", "swan"):
        for own, theirs in zip(*(hf_sai.param_groups(each, optim, 0.1) for each in (net, wrapped)), strict=True):
            assert [name for name, _ in own["params"]] == [name for name, _ in theirs["params"]]
            assert own["weight_decay"] == theirs["weight_decay"]
    plain = hf_sai.create_optimizer("sgd_sai", net)
    for param in net.parameters():
        param.grad = torch.randn_like(param)
    plain.step()
    given = hf_sai.create_optimizer("sgd_sai", wrapped, gsnr=plain.gsnr_statistics())
    assert {row.name: row.scale for row in given.gsnr_statistics()} == {
        row.name: row.scale for row in plain.gsnr_statistics()
    }
    routes = {row.name: row.route for row in hf_sai.create_optimizer("swan", wrapped, target_modules=r"2").routes()}
    assert (routes["0.weight"], routes["2.weight"]) == ("adam", "matrix")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gsnr=/my runs/first one, momentum=0.5", {"gsnr": "/my runs/first one", "momentum": "0.5"}),
        (" momentum = 0.5 ,eps=1e-6 ", {"momentum": "0.5", "eps": "1e-6"}),
    ],
)
def test_spaces_in_a_path_arrive(text, expected):
    assert parse_optim_args(text) == expected


@pytest.mark.parametrize("text", ["gsnr=/a,b/c", "gsnr=/a=b"])
def test_commas_and_equals_signs_in_a_path_are_refused_in_words(text):
    with pytest.raises(ValueError, match=r"optim_args must be name=value entries.*values with a comma can't be given"):
        parse_optim_args(text)


# ---- Decay ----


class OwnNorm(nn.Module):
    """As many models have one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class SomeRMSNorm(OwnNorm):
    pass


class LayerNorm2d(nn.LayerNorm):
    pass


class BatchNormAct2d(nn.BatchNorm2d):
    pass


class AdaLayerNorm(nn.Module):
    """diffusers': a norm with a linear layer in it."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 8)


@pytest.mark.parametrize(
    "module",
    [nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.InstanceNorm2d(4, affine=True), nn.RMSNorm(4), nn.LayerNorm(4)]
    + [OwnNorm(), SomeRMSNorm(), LayerNorm2d(4), BatchNormAct2d(4), nn.SyncBatchNorm(4)],
    ids=lambda module: type(module).__name__,
)
def test_every_norm_is_one(module):
    assert is_norm(module)
    model = nn.ModuleDict({"layer": module, "fc": nn.Linear(4, 4)})
    groups = hf_sai.param_groups(model, "sgd_sai", weight_decay=0.1)
    assert next([name for name, _ in group["params"]] for group in groups) == ["fc.weight"]


def test_what_stands_in_a_norm_and_is_none_decays():
    model = nn.ModuleDict({"norm": AdaLayerNorm(), "normalizer": nn.Linear(2, 2), "table": nn.Embedding(3, 2)})
    assert decaying(model, {"table.weight"}) == {"norm.linear.weight", "normalizer.weight", "table.weight"}
    assert not is_norm(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))


def test_scalars_and_other_lines_decay_as_the_hosts_rule_has_it():
    model = nn.ModuleDict({"fc": nn.Linear(2, 2)})
    model.temperature, model.gamma = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(4))
    groups = hf_sai.param_groups(model, "sgd_sai", weight_decay=0.1)
    assert {name for name, _ in groups[0]["params"]} == {"fc.weight", "temperature", "gamma"}


def test_a_trainers_own_rule_stays_its_own():
    from hf_sai.integration import _decay_rule, decay_rule, decaying_names

    own = types.SimpleNamespace(rule=lambda model: ["norm.weight"])
    with decay_rule(own.rule):
        assert _decay_rule.get()(None) == ["norm.weight"]
    from transformers import Trainer

    with decay_rule(Trainer.get_decay_parameter_names):
        assert _decay_rule.get() is decaying_names
