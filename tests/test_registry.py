"""Records and typed options."""

from __future__ import annotations

import inspect

import pytest
import torch

from hf_sai.optim import OptionError, get_record, list_records, parse_options


def test_every_option_is_an_argument_of_its_class_and_every_argument_an_option():
    for record in list_records():
        arguments = set(inspect.signature(record.cls).parameters) - {"params", "lr", "weight_decay"}
        assert {option.name for option in record.options if not option.routing} == arguments
        routing = {option.name for option in record.options if option.routing}
        assert routing == ({"lora_policy", "split_qkv"} if record.routed else {"lora_policy"})


def test_defaults_read_as_text_give_themselves():
    for record in list_records():
        for option in record.options:
            assert option.parse(str(record.default(option.name))) == record.default(option.name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ({"momentum": "0.8"}, {"momentum": 0.8}),
        ({"momentum": 0}, {"momentum": 0.0}),
        ({"maximize": "False"}, {"maximize": False}),  # bool("False") is True: the host's own trap
        ({"maximize": "true"}, {"maximize": True}),
        ({"measure_steps": "4"}, {"measure_steps": 4}),
        ({"normalize": "max", "eps": "1e-10"}, {"normalize": "max", "eps": 1e-10}),
        ({"normalize": None}, {"normalize": "none"}),  # as a host that reads literals hands on "none"
    ],
)
def test_typed_values(text, value):
    parsed = parse_options(get_record("sgd_sai"), text)
    assert parsed == value
    assert [type(parsed[name]) for name in parsed] == [type(value[name]) for name in value]


@pytest.mark.parametrize(
    "given", [{"momentum": True}, {"measure_steps": "1.5"}, {"measure_steps": 1.5}, {"eps": ""}, {"maximize": "2"}]
)
def test_values_of_another_type_are_refused(given):
    (name,) = given
    with pytest.raises(OptionError, match=f"{name} of sgd_sai must be "):
        parse_options(get_record("sgd_sai"), given)


def test_typed_values_of_swan():
    given = {
        "betas": "0.9/0.95",
        "ns_steps": "none",
        "split_qkv": "true",
        "whitening": "svd",
        "max_batch_bytes": "1024",
    }
    parsed = parse_options(get_record("swan"), given)
    assert parsed == {
        "betas": (0.9, 0.95), "ns_steps": None, "split_qkv": True, "whitening": "svd", "max_batch_bytes": 1024
    }  # fmt: skip
    assert parse_options(get_record("swan"), {"betas": (0.8, 0.9)}) == {"betas": (0.8, 0.9)}
    for bad in ({"betas": "0.9"}, {"betas": "a/b"}, {"betas": 0.9}, {"lora_policy": "B"}, {"whitening": "qr"}):
        with pytest.raises(OptionError, match="of swan must be "):
            parse_options(get_record("swan"), bad)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        OptionError, match="'sgdsai' is not an optimizer of hf_sai; choose one of: sgd_sai, sgd_sai_layerwise, swan"
    ):
        get_record("sgdsai")
    with pytest.raises(OptionError, match="betas is not an option of sgd_sai; valid options: eps, foreach"):
        parse_options(get_record("sgd_sai"), {"betas": "1"})


@pytest.mark.parametrize("record", list_records(), ids=lambda record: record.name)
def test_defaults_are_what_an_optimizer_is_made_with(record):
    group = record.cls([torch.nn.Parameter(torch.ones(2, 2))]).param_groups[0]
    shown = {option.name for option in record.options if not option.routing and option.name in group}
    assert {"momentum", "eps", "maximize"} <= shown
    assert {name: record.default(name) for name in shown} == {name: group[name] for name in shown}


def test_defaults_are_the_papers():
    """Momentum and decay of arXiv 2412.11768, Algorithm 1; betas and eps of Adam where SWAN hands tensors to it."""
    sgd_sai, swan = get_record("sgd_sai"), get_record("swan")
    assert {name: sgd_sai.default(name) for name in ("momentum", "weight_decay", "eps", "measure_steps")} == {
        "momentum": 0.9, "weight_decay": 1e-2, "eps": 1e-8, "measure_steps": 1
    }  # fmt: skip
    assert {name: swan.default(name) for name in ("betas", "eps", "momentum", "weight_decay")} == {
        "betas": (0.9, 0.999), "eps": 1e-8, "momentum": 0.0, "weight_decay": 0.0
    }  # fmt: skip
