"""What a run chose is in its groups, survives a checkpoint, and is said where a checkpoint goes on with another."""

from __future__ import annotations

import io

import pytest
import torch
from support.models import tiny_llama, tiny_lora, token_blocks
from support.trainers import arguments
from transformers import Trainer

import hf_sai
from hf_sai.live import unwrap_optimizer
from hf_sai.optim import OptionError
from hf_sai.optim.groups import swan_groups


SWANS = ("lora_whitening", "split_qkv", "target_modules")


def chosen(optimizer, names=SWANS):
    """The values of every group, each once."""
    found = [tuple(group[name] for name in names) for group in optimizer.param_groups]
    assert all(each == found[0] for each in found)
    return found[0]


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def stepped(optimizer, model):
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_sgd_sai_holds_its_policy_in_every_group_and_in_a_checkpoint():
    model = tiny_lora()
    paired = hf_sai.create_optimizer("sgd_sai", model, weight_decay=0.1, lora_policy="paired")
    assert chosen(paired, ["lora_policy"]) == ("paired",)
    stepped(paired, model)
    state = saved_and_loaded(paired.state_dict())
    assert [group["lora_policy"] for group in state["param_groups"]] == ["paired"] * len(paired.param_groups)
    assert chosen(hf_sai.create_optimizer("sgd_sai", tiny_lora()), ["lora_policy"]) == ("plain",)
    a, b = torch.nn.Parameter(torch.ones(2, 4)), torch.nn.Parameter(torch.zeros(4, 2))
    assert chosen(hf_sai.SGDSaI([{"params": [a, b], "paired": True}]), ["lora_policy"]) == ("paired",)
    with pytest.raises(ValueError, match="lora_policy must be one of plain, paired but is 'both'; choose one"):
        hf_sai.SGDSaI([{"params": [a], "lora_policy": "both"}])


def test_swan_holds_what_it_was_routed_by():
    model = tiny_lora()
    options = {"split_qkv": True, "target_modules": ("q_proj", "v_proj")}
    swan = hf_sai.create_optimizer("swan", model, weight_decay=0.1, lora_whitening="both", **options)
    assert chosen(swan) == ("both", True, ["q_proj", "v_proj"])
    stepped(swan, model)
    for group in saved_and_loaded(swan.state_dict())["param_groups"]:
        assert [group[name] for name in SWANS] == ["both", True, ["q_proj", "v_proj"]]
    assert chosen(hf_sai.create_optimizer("swan", tiny_lora())) == ("b_only", False, None)
    assert chosen(hf_sai.SWAN([torch.nn.Parameter(torch.ones(2, 2))])) == (None, False, None)
    with pytest.raises(ValueError, match="target_modules must come with targets"):
        swan_groups(tiny_llama(), target_modules="all-linear")


def test_the_trainer_s_choice_is_in_the_groups(tmp_path):
    given = {"optim": "swan", "optim_args": "lora_policy=both", "optim_target_modules": ["q_proj"], "max_steps": 1}
    trainer = Trainer(tiny_lora(), arguments(tmp_path, **given), train_dataset=token_blocks())
    trainer.train()
    assert chosen(unwrap_optimizer(trainer.optimizer)) == ("both", False, ["q_proj"])


def test_the_older_name_of_an_option_still_works_but_not_beside_the_new_one():
    for groups in (
        hf_sai.param_groups(tiny_lora(), "swan", lora_policy="both"),
        hf_sai.optimizer_cls_and_kwargs("swan", lr=0.1, model=tiny_lora(), lora_policy="both")[1]["params"],
    ):
        assert {group["lora_whitening"] for group in groups} == {"both"}
    with pytest.raises(OptionError, match="lora_whitening of swan must be given once, but lora_whitening is it too"):
        hf_sai.create_optimizer("swan", tiny_lora(), lora_policy="both", lora_whitening="b_only")
    with pytest.raises(OptionError, match="lora_policy, lora_whitening of swan are two names of one option"):
        hf_sai.param_groups(tiny_lora(), "swan", lora_policy="both", lora_whitening="b_only")


@pytest.mark.parametrize(
    ("optim", "options"),
    [
        ("sgd_sai", {"lora_policy": "paired"}),
        ("sgd_sai", {}),
        ("swan", {"lora_whitening": "both", "split_qkv": True, "target_modules": ["q_proj"]}),
    ],
)
def test_a_checkpoint_of_before_loads_and_trains_the_same(optim, options, caplog):
    names = SWANS if optim == "swan" else ["lora_policy"]
    model = tiny_lora()
    optimizer = hf_sai.create_optimizer(optim, model, **options)
    stepped(optimizer, model)
    older = saved_and_loaded(optimizer.state_dict())
    for group in older["param_groups"]:
        for name in names:
            del group[name]
    resumed_model = tiny_lora(seed=1)
    resumed_model.load_state_dict(model.state_dict())
    resumed = hf_sai.create_optimizer(optim, resumed_model, **options)
    resumed.load_state_dict(older)
    assert chosen(resumed, names) == chosen(optimizer, names)
    assert "its own options" not in caplog.text
    stepped(optimizer, model)
    stepped(resumed, resumed_model)
    for mine, other in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_checkpoint_that_goes_on_with_another_choice_says_so(caplog):
    model = tiny_llama()
    optimizer = hf_sai.create_optimizer("swan", model, split_qkv=True, betas=(0.8, 0.9))
    stepped(optimizer, model)
    other = hf_sai.create_optimizer("swan", tiny_llama(), target_modules="all-linear", betas=(0.8, 0.9))
    state = saved_and_loaded(optimizer.state_dict())
    for group in state["param_groups"]:
        group["betas"] = list(group["betas"])  # as JSON gives them back
    other.load_state_dict(state)
    assert [text for record in caplog.records if "its own options" in (text := record.getMessage())] == [
        "The loaded state goes on with its own options: split_qkv=True (not False), target_modules=None (not "
        "all-linear)."
    ]
    assert chosen(other) == ("b_only", True, None)
    caplog.clear()
    other.load_state_dict(saved_and_loaded(other.state_dict()))
    assert not caplog.records
