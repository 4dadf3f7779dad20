"""training_args.bin without tokens."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from support.hub import TOKEN
from transformers import TrainingArguments

from trainer_patches import token_free_pickles


def saved(args):
    buffer = io.BytesIO()
    with token_free_pickles(args):
        torch.save(args, buffer)
    return buffer.getvalue()


def test_token_is_left_out_and_all_else_is_kept():
    args = TrainingArguments("unused", hub_token=TOKEN, learning_rate=0.3, run_name="eos_token")
    loaded = torch.load(io.BytesIO(saved(args)), weights_only=False)
    assert loaded.hub_token is None
    assert {k: v for k, v in loaded.to_dict().items() if k != "hub_token"} == {
        k: v for k, v in args.to_dict().items() if k != "hub_token"
    }
    assert args.hub_token == TOKEN


def test_tokens_elsewhere_are_left_out_and_special_tokens_stay():
    from trl import SFTConfig

    args = SFTConfig(
        "unused",
        bf16=False,
        hub_token="a-token-of-another-form",
        eos_token="<eos>",
        model_init_kwargs={"token": "t", "revision": "main", "nested": [TOKEN, "a-token-of-another-form", "kept"]},
        run_name=f"run with {TOKEN}",
    )
    content = saved(args)
    assert not any(secret in content for secret in (TOKEN.encode(), b"a-token-of-another-form"))
    loaded = pickle.loads(pickle.dumps(torch.load(io.BytesIO(content), weights_only=False)))
    assert loaded.eos_token == "<eos>"
    assert loaded.model_init_kwargs == {"token": None, "revision": "main", "nested": ["<TOKEN>", "<TOKEN>", "kept"]}
    assert loaded.run_name == "run with <TOKEN>"


def test_other_fields_are_kept_to_the_letter():
    folder = "runs/hf_transformersfinetuning"
    args = TrainingArguments(folder, hub_token="", run_name="", lr_scheduler_kwargs=OrderedDict(token=TOKEN))
    loaded = torch.load(io.BytesIO(saved(args)), weights_only=False)
    assert (loaded.output_dir, loaded.run_name, loaded.lr_scheduler_kwargs) == (folder, "", {"token": None})


def test_pickling_outside_is_as_before():
    args = TrainingArguments("unused", hub_token=TOKEN)
    saved(args)
    assert TrainingArguments not in copyreg.dispatch_table
    assert pickle.loads(pickle.dumps(args)).hub_token == TOKEN


def test_an_error_inside_leaves_nothing_behind():
    with pytest.raises(KeyError), token_free_pickles(TrainingArguments("unused")):
        raise KeyError
    assert TrainingArguments not in copyreg.dispatch_table
