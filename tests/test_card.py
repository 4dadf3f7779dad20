"""Our section in a card that others wrote: rendered whole, inserted once, nothing else lost."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from markdown_it import MarkdownIt

from hf_sai import SWAN, GSNRReport, SGDSaI, param_groups
from hf_sai.hub.card import (
    card_aside,
    is_generated,
    keep_card,
    mark_generated,
    merge_cards,
    name_repository,
    save_card,
    update_card,
)
from hf_sai.hub.section import BEGIN, END, Artifact, card_facts, insert_section, read_artifact, render_section
from hf_sai.report import format_bytes


FIXTURES = Path(__file__).parent / "fixtures" / "cards"
HOST_CARD = """---
library_name: transformers
license: mit
base_model: some-user/some-model
tags:
- generated_from_trainer
- mine
---

# My model

Text of mine.
"""


@pytest.fixture
def report():
    pairs = [
        ("model.layers.0.q.weight", torch.nn.Parameter(torch.zeros(2, 2))),
        ("scale", torch.nn.Parameter(torch.zeros(1))),
        ("late.weight", torch.nn.Parameter(torch.zeros(3))),
    ]
    optimizer = SGDSaI(pairs, lr=0.5, weight_decay=0.0)
    for (_, param), gradient in zip(pairs, ([[3.0, 4.0], [-3.0, -4.0]], [1.0], [0.0] * 3), strict=True):
        param.grad = torch.tensor(gradient)
    optimizer.step()
    report = GSNRReport.from_optimizer(optimizer, {"effective_batch_size": 8})
    report.versions.update(hf_sai="0.0.0")
    return report


def optimizer_of(names_and_shapes, cls=SGDSaI, **options):
    """After one step on gradients that are the same everywhere: rising numbers around one."""
    optimizer = cls([(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in names_and_shapes], **options)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.linspace(-1.0, 3.0, param.numel()).reshape(param.shape)
    optimizer.step()
    return optimizer


def layers(*names_and_shapes, prefix="model.layers"):
    return [(f"{prefix}.{layer}.{name}", shape) for layer in range(2) for name, shape in names_and_shapes]


def full():
    names = [
        *layers(("self_attn.q_proj.weight", (8, 8)), ("mlp.up_proj.weight", (24, 8))),
        ("lm_head.weight", (32, 8)),
    ]
    return optimizer_of(names, lr=0.01, weight_decay=0.1)


def lora(prefix="base_model.model.model.layers", **options):
    shapes = (("self_attn.q_proj.lora_A.default.weight", (2, 8)), ("self_attn.q_proj.lora_B.default.weight", (8, 2)))
    return optimizer_of(layers(*shapes, prefix=prefix), lr=0.1, weight_decay=0.0, **options)


def swan():
    model = torch.nn.ModuleDict(
        {"table": torch.nn.Embedding(4, 3), "layers": torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)])}
    )
    optimizer = SWAN(param_groups(model, "swan", weight_decay=0.1), lr=0.002)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


LLAMA = {"config.json": '{"architectures": ["LlamaForCausalLM"]}', "tokenizer_config.json": "{}"}
# Kind of card: the host's card, the optimizer, and what stands beside the card.
KINDS = {
    "full": ("full", full, {**LLAMA, "gsnr_report.png": ""}),
    "lora": ("lora", lora, {"adapter_config.json": '{"task_type": "CAUSAL_LM"}', "gsnr_report.png": ""}),
    "sft": ("sft", lambda: lora(normalize="max"), {**LLAMA, "adapter_config.json": '{"task_type": "CAUSAL_LM"}'}),
    "diffusers_lora": ("diffusers_lora", lambda: lora("unet.down_blocks"), {"gsnr_report.png": ""}),
    "swan": ("full", swan, LLAMA),
    "resumed": ("full", full, {**LLAMA, "gsnr_report.png": ""}),
}
RESULT = EvalResult("text-generation", "user/data", "some data", "loss", 0.5, dataset_split="test")


def written(kind, folder):
    """The card of a kind of run, beside what the run wrote."""
    host, build, files = KINDS[kind]
    for name, content in files.items():
        (folder / name).write_text(content)
    path = folder / "README.md"
    content = (FIXTURES / f"{host}.host.md").read_text()
    path.write_text(content)
    report = GSNRReport.from_optimizer(build(), {"effective_batch_size": 8})
    report.versions.clear()
    report.versions.update(hf_sai="0.0.0", torch="2.0.0")
    earlier = ""
    if kind == "resumed":  # the first part of the run was pushed, and then a person wrote into its card
        update_card(path, dataclasses.replace(report, learning_rate=0.5), earlier="")
        earlier = (
            path.read_text().replace("license: mit", "license: apache-2.0").replace("- Loss: 0.1234", "My words.")
        )
        path.write_text(content)
    repo_id = None if kind == "swan" else "user/my-model"
    update_card(path, report, earlier=earlier, repo_id=repo_id, results=[RESULT] if kind == "full" else [])
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_whole_card_equals_the_fixture(kind, tmp_path, write_cards):
    folder = tmp_path / "my-model"
    folder.mkdir()
    text = written(kind, folder).read_text()
    if write_cards:
        (FIXTURES / f"{kind}.md").write_text(text)
    assert text == (FIXTURES / f"{kind}.md").read_text()
    assert is_generated((FIXTURES / f"{kind}.md").read_text()) == (kind != "resumed")


def test_a_second_update_changes_nothing(report, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(HOST_CARD)
    update_card(path, report)
    once = path.read_text()
    update_card(path, report)
    assert path.read_text() == once


def test_section_is_replaced_where_it_stands_and_kept_once():
    section = f"{BEGIN}\nnew\n{END}"
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n{BEGIN}\nolder\n{END}\nend"
    assert insert_section(text, section) == f"before\n{section}\nafter\n\nend"
    assert insert_section("only text\n\n\n", section) == f"only text\n\n{section}\n"


def test_a_marker_of_the_user_alone_costs_no_text():
    section = f"{BEGIN}\nours\n{END}"
    once = insert_section(f"{BEGIN}\nMY TEXT", section)
    assert once.startswith(f"{BEGIN}\nMY TEXT")
    assert insert_section(once, section) == once


def test_several_base_models_stay(report, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nbase_model:\n- a/b\n- c/d\n---\n\nText.\n")
    update_card(path, report)
    assert ModelCard.load(path).data.base_model == ["a/b", "c/d"]


def test_backslashes_in_a_section_are_text():
    section = f"{BEGIN}\n\\1 \\g<0>\n{END}"
    assert insert_section(f"before\n{BEGIN}x{END}\n\\2", section) == f"before\n{section}\n\\2"


@pytest.mark.parametrize("base", ["/home/somebody/model", "./model", "demo_output/base/model", "existing"])
def test_local_folders_are_taken_out(report, tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "existing").mkdir()
    path = tmp_path / "README.md"
    path.write_text(
        f"---\nbase_model: {base}\ntags:\n- base_model:adapter:{base}\n- lora\n---\n\n"
        f"A fine-tuned version of [{base}](https://huggingface.co/{base}) on data.\n"
    )
    update_card(path, report)
    card = ModelCard.load(path)
    assert card.data.base_model is None
    assert card.data.tags == ["lora", "hf-sai", "sgd-sai", "arxiv:2412.11768"]
    assert base not in card.text.replace("existing gradient", "")
    assert "A fine-tuned version of a local model on data." in card.text


def test_facts_say_what_is_pending_and_what_fell_back(report):
    facts = card_facts(report)
    assert facts["status_sentence"].startswith(
        "Tensors of one element or with a constant gradient, whose scale is sqrt("
    )
    assert facts["status_sentence"].endswith("and did not train: 1.")
    assert ("effective batch size at the measurement", "8") in facts["options"]
    assert "| `late` | 1 | 3 | - | - | - | - | - | pending |" in render_section(facts)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (25_150_000_000, "25.1 GB")]
)
def test_bytes_for_people(count, text):
    assert format_bytes(count) == text


def test_a_form_that_is_filled_in_is_a_persons(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n\n# Form\n\n[fill in]\n")
    mark_generated(path)
    form = path.read_text()
    assert is_generated(form)
    assert is_generated(form.replace("\n", "\n\n"))
    assert not is_generated(form.replace("[fill in]", "My words"))
    assert not is_generated(form.replace("license: mit", "license: mit\ntags:\n- mine"))
    mark_generated(path)
    assert path.read_text() == form


def test_cards_of_persons_and_hosts_are_merged(report, tmp_path, caplog):
    path = tmp_path / "README.md"
    path.write_text("---\nlibrary_name: peft\n---\n\n# Of the host\n")
    update_card(path, report, earlier="")
    ours = path.read_text()
    theirs = "---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n"
    merged = ModelCard(merge_cards(ours, theirs))
    assert merged.text.startswith("\n# Mine")
    assert merged.text.count(BEGIN) == 1
    assert (merged.data.license, merged.data.library_name) == ("mit", "peft")
    assert merged.data.tags == ["mine", "hf-sai", "sgd-sai", "arxiv:2412.11768"]
    assert merge_cards(ours, str(merged)) == str(merged)
    older = ours.replace("# Of the host", "# Older")
    assert merge_cards(ours, ours) == ours
    assert "# Older" in merge_cards(ours, older)
    path.write_text("---\nlibrary_name: peft\n---\n\n# Old\n")
    update_card(path, report, earlier="")
    assert merge_cards(ours, path.read_text()) == ours
    edited = ours.replace("# Of the host", "# Mine, here")
    assert merge_cards(edited, theirs) == edited
    assert "were both edited" in caplog.text


def test_a_repository_is_named_in_our_section_only(report, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n\nI call it your-name/this-repository.\n")
    update_card(path, report)
    content = name_repository(path.read_text(), "user/run")
    assert content.count("your-name/this-repository") == 1
    assert content.count('"gsnr=user/run"') == 1


ODD_NAMES = ("a|b", "x`y", "n\nl", "<!-- hf-sai:end -->", "a\\", "*b*", "[c](d)", "``", "|", "&lt;", "e\tf\r\ng")


def rows_of(section):
    """Cells of the tables of a section, as Markdown renders them."""
    rows, inside = [], False
    for token in MarkdownIt("commonmark").enable("table").parse(section):
        if token.type in ("tr_open", "tr_close"):
            inside = token.type == "tr_open"
            rows += [[]] * inside
        elif token.type == "inline" and inside:
            rows[-1] = rows[-1] + ["".join(each.content or "\n" for each in token.children)]
    return rows


@pytest.mark.parametrize("template", ["sgd_sai", "swan"])
def test_odd_names_and_options_stand_in_whole_rows(report, template):
    """Names, options, routes and reasons, in both templates; what ends a line or a section ends neither."""
    facts = card_facts(report if template == "sgd_sai" else GSNRReport.from_optimizer(swan()))
    kinds = [{**facts["kinds"][0], "kind": name} for name in ODD_NAMES] if template == "sgd_sai" else []
    routes = [
        {"kind": name, "tensors": 1, "shape": "2x2", "route": name, "reason": name}
        for name in (ODD_NAMES if template == "swan" else ())
    ]
    options = [(name, name) for name in ODD_NAMES]
    section = render_section({**facts, "options": options, "kinds": kinds, "routes": routes})
    assert insert_section(section, section) == section  # one whole section
    words = [" ".join(name.split()) for name in ODD_NAMES]
    option_rows = [row for row in rows_of(section) if len(row) == 2][1:]
    assert option_rows == [[word, word] for word in words]
    tensor_rows = [row for row in rows_of(section) if len(row) > 2][1:]
    assert [row[0] for row in tensor_rows] == words
    if template == "swan":
        assert [row[3:] for row in tensor_rows] == [[word, word] for word in words]


@pytest.mark.parametrize(
    "base", ['a "quoted" model', "line\nbreak", "```\nx", "<!-- hf-sai:end -->", "back\\slash", "café"]
)
def test_code_of_odd_names_is_python(report, base):
    """The base model is what a person's header says; the code that names it can be run."""
    artifact = Artifact(kind="peft", base_model=base, repo_id="user/run")
    section = render_section(card_facts(report, artifact))
    assert insert_section(section, section) == section
    code = [
        token.content
        for token in MarkdownIt().parse(section)
        if token.type == "fence" and "PeftModel" in token.content
    ]
    calls = [node for node in ast.walk(ast.parse(code[0])) if isinstance(node, ast.Call)]
    assert base in [argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)]


def test_files_beside_the_card_may_be_broken(tmp_path):
    (tmp_path / "config.json").write_text("{no json")
    (tmp_path / "adapter_config.json").write_bytes(b"\xff")
    assert read_artifact(tmp_path, "peft", [], None).model_class == "AutoModel"
    (tmp_path / "config.json").write_text('{"architectures": "import os; os"}')
    assert read_artifact(tmp_path, "transformers", [], None).model_class == "AutoModel"
    (tmp_path / "config.json").write_text('{"architectures": "LlamaForCausalLM"}')
    assert read_artifact(tmp_path, "transformers", [], None).model_class == "LlamaForCausalLM"


HOST_LINES = """---
base_model: {path}
datasets:
- {path}/data
- user/data
model-index:
- name: run
  results:
  - task:
      type: text-generation
    dataset:
      name: {path}/data
      type: null
    metrics:
    - type: loss
      value: 0.5
tags:
- base_model:adapter:{path}
---

<!-- This model card has been generated automatically according to the information the Trainer had access to. -->

This model is a fine-tuned version of [{path}](https://huggingface.co/{path}) on the None dataset.
These are LoRA adaption weights for {path}. They were fine-tuned on the {path}/data dataset.
Trained on the [{path}/data](https://huggingface.co/datasets/{path}/data) dataset; see ![img](./image_0.png).
Also of [](https://huggingface.co/) and [user/base](https://huggingface.co/user/base), see https://example.org/a/b/c.

- optimizer: Use OptimizerNames.SGD_SAI and the args are:
gsnr={path}
- seed: 42 and/or 1 / 2
- other: gsnr=others/alice/runs
- optim_args: gsnr={path}, `file://{path}`
"""


@pytest.mark.parametrize(
    "path", ["/home/alice/secret", "C:\\Users\\alice\\secret", "~/alice/secret", "runs/alice/secret"]
)
def test_the_lines_of_a_host_are_true_and_tell_no_path(report, tmp_path, path, caplog):
    card = tmp_path / "README.md"
    card.write_text(HOST_LINES.format(path=path))
    update_card(card, report)
    content = card.read_text()
    assert "alice" not in content
    assert caplog.text == ""
    data = ModelCard.load(card).data
    assert (data.base_model, data.datasets) == (None, ["user/data"])
    assert [(each.dataset_type, each.metric_value) for each in data.eval_results] == [("unknown", 0.5)]
    lines = content.splitlines()
    assert "This model is a fine-tuned version of a local model on an unnamed dataset." in lines
    assert (
        "Also of a local model and [user/base](https://huggingface.co/user/base), see https://example.org/a/b/c."
        in lines
    )
    assert "Trained on a local dataset; see ![img](./image_0.png)." in lines
    assert "- seed: 42 and/or 1 / 2" in lines
    line = next(line for line in lines if line.startswith("- optimizer: "))
    assert line.startswith(
        "- optimizer: sgd_sai of hf_sai with momentum=0.9, eps=1e-08, normalize=none, measure_steps=1"
    )
    assert "Use OptimizerNames" not in content
    assert is_generated(content)


def test_a_persons_text_may_name_paths_and_optimizers(report, tmp_path):
    """Only what a host generated is put right; a card that was edited, and had our section, is a person's."""
    mine = HOST_LINES.format(path="/home/alice/secret").split("---\n", 2)[2]
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n" + mine)
    update_card(path, report, earlier="")
    edited = path.read_text().replace("- seed: 42", "- seed: 43, of /home/alice/seeds on the None dataset")
    path.write_text(edited)
    update_card(path, report)
    update_card(path, report)
    text = path.read_text()
    assert "- seed: 43, of /home/alice/seeds on the None dataset" in text
    assert text == re.sub("\n<!-- hf-sai:generated .*\n", "\n", edited)


def test_a_card_that_would_not_load_is_not_written_over_a_good_one(tmp_path, caplog):
    path = tmp_path / "README.md"
    path.write_text(HOST_CARD)
    for broken in ("---\na: b: c\n---\n", "---\n- a\n---\n", "---\na: !!python/name:os.system\n---\n", "a\ud800"):
        save_card(path, broken)
        assert path.read_text() == HOST_CARD
    assert caplog.text.count(f"{path} is left as it is: the new one could not be read again") == 4
    save_card(path, "---\na: 1\n---\n")
    assert path.read_text() == "---\na: 1\n---\n"


def test_where_a_host_writes_what_can_not_be_read_the_earlier_card_is_back(report, tmp_path, caplog):
    path = tmp_path / "README.md"
    path.write_bytes(b"---\nvalue: !!python/object/apply:numpy.float32 []\n---\n")
    update_card(path, report, earlier=HOST_CARD)
    assert path.read_text() == HOST_CARD
    assert "the card that stood there before is back" in caplog.text


SAVED = "---\nlibrary_name: st\n---\n\n# Of a host that writes its card with every save: {}\n"


def test_a_card_that_a_save_writes_anew_gets_the_section(report, tmp_path):
    path = tmp_path / "README.md"
    for rate in ("0.001", "0.002"):
        before = path.read_bytes() if path.is_file() else None
        path.write_text(SAVED.format(rate))
        keep_card(path, before, report, "user/run")
        text = path.read_text()
        assert text.startswith(
            SAVED.format(rate).replace("st\n", "st\ntags:\n- hf-sai\n- sgd-sai\n- arxiv:2412.11768\n")
        )
        assert text.count(BEGIN) == 1
        assert is_generated(text)
    path.write_text(mine := text.replace("# Of", "# Mine, of"))
    path.write_text(SAVED.format("0.003"))
    keep_card(path, mine.encode(), report, "user/run")
    assert "# Mine, of a host" in path.read_text()
    assert path.read_text().count(BEGIN) == 1


def test_without_a_report_the_newest_card_of_a_host_stays_and_a_persons_too(tmp_path):
    path, before = tmp_path / "README.md", None
    for rate in ("0.001", "0.002"):
        path.write_text(SAVED.format(rate))
        keep_card(path, before, None, None)
        before = path.read_bytes()
        assert SAVED.format(rate) in before.decode()
        assert is_generated(before.decode())
    mine = before.replace(b"# Of", b"# Mine, of")
    path.write_text(SAVED.format("0.003"))
    keep_card(path, mine, None, None)
    assert path.read_bytes() == mine


def test_a_card_that_a_save_changes_is_put_back(report, tmp_path):
    path = tmp_path / "README.md"
    for mine in ("# Mine\r\n", SAVED):
        path.write_text(mine + "\n- PEFT 0.1")
        keep_card(path, mine.encode(), report, None)
        assert path.read_bytes() == mine.encode()
    path.write_text(form := "---\nlicense: mit\n---\n\n[More Information Needed]\n")
    keep_card(path, None, report, None)
    assert is_generated(path.read_text())
    assert path.read_text().startswith(form)
    assert BEGIN not in path.read_text()


def test_a_card_that_can_not_be_read_steps_aside_for_a_save(tmp_path, caplog):
    path = tmp_path / "README.md"
    path.write_bytes(b"---\na: b: c\n---\n")
    with contextlib.suppress(ZeroDivisionError), card_aside(path) as before:
        assert not path.exists()
        path.write_text("a host's form")
        raise ZeroDivisionError("of the save")
    assert path.read_bytes() == before == b"---\na: b: c\n---\n"
    assert [each.name for each in tmp_path.iterdir()] == ["README.md"]
    assert f"{path} is left as it is" in caplog.text
