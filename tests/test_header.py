"""Headers of people's cards: what our edits leave, byte for byte, in 300 cards that go over the loopback Hub."""

from __future__ import annotations

import pytest
import torch
from hub_server import connected, loopback_hub
from huggingface_hub import EvalResult, ModelCard

from hf_sai import GSNRReport, SGDSaI
from hf_sai.hub.card import update_card
from hf_sai.hub.header import LARGEST, Header, HeaderError, newline_of
from hf_sai.hub.push import push_folder
from hf_sai.hub.section import BEGIN, END


TOKEN = "hf_" + "Cards" * 7
LIBRARY = "library_name: peft\n"
OURS = ("lora", "hf-sai", "sgd-sai", "arxiv:2412.11768")
TAGS = "tags:\n" + "".join(f"- {tag}\n" for tag in OURS)
INLINE = "lora, hf-sai, sgd-sai, 'arxiv:2412.11768'"
MODEL_INDEX = """model-index:
- name: cool # mine
  results:
  - task: {type: image-classification}
    dataset:
      type: beans
      name: "Beans"
      args:
        date: 20220120
    metrics:
    - type: accuracy
      value: 0.90
"""
# A header as a person wrote it, and as it is with our fields: the rest is the same to the byte.
EDITED = {
    "simple": ("language: en\nlicense: mit\n", None),
    "norwegian": ("language:\n- no\n- en # and English\n", None),
    "yaml 1.1": ("a: no\nb: 'no'\nversion: 1.10\nrevision: 0123\ntime: 12:30:45\nbig: 1_000\nnull_: ~\n", None),
    "comments": ("# keep me\nlicense: mit  # and me\n\n# the end\n", None),
    "unicode": ("title: 北京 🎁\nwidget:\n- text: 'a * b & c'\n- text: \"x: [MASK]\"\n", None),
    "anchors": ("base: &b {x: 1}\nother: *b\nmerged:\n  <<: *b\n", None),
    "blocks": ("description: |\n  some: text\n\n  more # no comment\nshort: >-\n  a\n  b\n", None),
    "a block at the end": ("license: mit\ntext: |\n  some\n", None),
    "spaces": ("date: 2020-01-01\nkey  :   spaced\n'odd key': 1\n\"license\": \"mit\"\n", None),
    "indented": (" license: mit\n x: 1\n", " license: mit\n x: 1\n library_name: peft\n tags:\n "
                 + TAGS[6:-1].replace("\n", "\n ") + "\n"),
    "model index": (MODEL_INDEX + "z: 1\n", None),
    "tags": ("tags:\n- mine\n\n# after\nlibrary_name: timm\n",
             "tags:\n- mine\n" + TAGS[6:] + "\n# after\nlibrary_name: timm\n"),
    "tags, indented": ("tags:\n  - mine\n  - 'lora' # x\nlicense: mit\n",
                       "tags:\n  - mine\n  - 'lora' # x\n  - hf-sai\n  - sgd-sai\n  - arxiv:2412.11768\nlicense: mit\n"
                       + LIBRARY),
    "tags in brackets": ("tags: [mine,\n  \"x y\"] # these\nx: {a: 1}\n",
                         f"tags: [mine,\n  \"x y\", {INLINE}] # these\nx: {{a: 1}}\n{LIBRARY}"),
    "one tag": ("tags: mine # one\n", f"tags: [mine, {INLINE}] # one\n{LIBRARY}"),
    "no tag": ("tags:\nlicense: mit\n", f"tags: [{INLINE}]\nlicense: mit\n{LIBRARY}"),
    "a local model": ("# base\nbase_model: /models/llama\nlicense: mit\n", "# base\nlicense: mit\n" + LIBRARY + TAGS),
    "local models": ("base_model:\n- a/b # one\n- /models/x # two\n- c/d\n",
                     "base_model:\n- a/b # one\n- c/d\n" + LIBRARY + TAGS),
    "a comment only": ("# only a comment\n", None),
    "empty": ("", LIBRARY + TAGS),
}  # fmt: skip
# A header that can be read and not be edited safely: it stays, and a warning says so.
LEFT = {
    "in braces": "{license: mit}\n",
    "an anchor on tags": "tags: &t\n- mine\nother: *t\n",
    "tags of another": "other: &t [mine]\ntags: *t\n",
    "twice": "tags:\n- mine\nlicense: mit\nlicense: apache-2.0\n",
    "nested tags": "tags:\n- - mine\n",
}
TEXTS = {"# mine\n": ("# mine\n\n", "\n"), "": ("\n\n", "\n"), "no end": ("no end\n\n", "\n")}
TEXTS["# A\n\n---\n\ntags: x  \n\n\n\n"] = ("# A\n\n---\n\ntags: x  \n\n", "\n\n")
BROKEN = {
    "bad YAML": b"---\nlicense: mit: x\n---\n# m\n",
    "a list": b"---\n- a\n---\n# m\n",
    "an empty list": b"---\n[]\n---\n# m\n",
    "a word": b"---\njust words\n---\n",
    "old model-index": b"---\nmodel-index:\n- name: x\n  results:\n  - task:\n      type: t\n    metrics: []\n---\n",
    "model-index of a word": b"---\nmodel-index: mine\n---\n",
    "a tab": b"---\na:\n\t- b\n---\n# m\n",
    "an open quote": b"---\na: 'b\n---\n# m\n",
    "no such alias": b"---\na: *x\n---\n",
    "an object": b"---\na: !!python/object/apply:os.getcwd []\n---\n",
    "tags of a number": b"---\ntags: 5\n---\n",
    "a number for a name": b"---\n1: 2\n---\n",
    "Latin-1": b"---\nlicense: mit\n---\n# caf\xe9\n",
    "UTF-16": "---\nlicense: mit\n---\n# m\n".encode("utf-16"),
    "a zero": b"---\na: \x00\n---\n",
    "5 MB": b"---\nlicense: mit\n---\n" + b"x" * 5_000_000,
}


@pytest.fixture(scope="module")
def report():
    optimizer = SGDSaI([("layers.0.q.weight", torch.nn.Parameter(torch.zeros(2, 2)))], lr=0.5)
    optimizer.param_groups[0]["params"][0].grad = torch.tensor([[3.0, 4.0], [-3.0, 4.0]])
    optimizer.step()
    return GSNRReport.from_optimizer(optimizer)


HOST = "---\nlibrary_name: peft\ntags:\n- lora\n---\n\n# Of the host\n"


@pytest.fixture(scope="module")
def run(report, tmp_path_factory):
    """A folder whose card a host generated: over a person's card only our section and fields go."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "README.md").write_text(HOST)
    update_card(folder / "README.md", report, earlier="")
    return folder


def section_of(text):
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def without_section(card):
    """What stands around our section; that depends on the card's `library_name`."""
    before, _, rest = card.partition(BEGIN.encode())
    return before, rest.partition(END.encode())[2]


def made_cards(section):
    """Name, a person's card and the same with our section and fields."""
    for bom in ("", "\ufeff"):
        for line in ("\n", "\r\n"):
            for text, (before, after) in TEXTS.items():
                cards = {"no header": ("", f"---\n{LIBRARY}{TAGS}---\n")}
                for name, (header, expected) in EDITED.items():
                    cards[name] = (
                        f"---\n{header}---\n",
                        f"---\n{header + LIBRARY + TAGS if expected is None else expected}---\n",
                    )
                cards |= {name: (f"---\n{header}---\n",) * 2 for name, header in LEFT.items()}
                for name, (old, new) in cards.items():
                    pair = old + text, new + before + section + after
                    if "\n" in pair[0] or (bom + pair[0] and line == "\n"):  # else nothing shows its line ending
                        yield name, *((bom + each.replace("\n", line)).encode() for each in pair)


def test_three_hundred_cards_keep_what_is_not_ours(run, monkeypatch, caplog):
    section = section_of((run / "README.md").read_text())
    cards = list(made_cards(section))
    assert len(cards) >= 300
    wrong = []
    with loopback_hub() as hub, connected(hub, monkeypatch):
        for number, (name, theirs, expected) in enumerate(cards):
            hub.add(f"user/r{number}", {"README.md": theirs})
            caplog.clear()
            push_folder(run, f"user/r{number}", token=TOKEN)
            tree = hub.repos[f"user/r{number}"].tree()
            expected = expected.replace(b"your-name/this-repository", f"user/r{number}".encode())
            said = f"The header of README.md of user/r{number} is left as it is" in caplog.text
            if tree["README.md"] != expected or "adapter_config.json" not in tree or said != (name in LEFT):
                wrong.append((name, theirs[:200], tree["README.md"][:300], said))
    assert wrong == []


def test_a_card_that_can_not_be_read_stays_and_the_model_goes(run, monkeypatch, caplog):
    with loopback_hub() as hub, connected(hub, monkeypatch):
        for number, (name, theirs) in enumerate(BROKEN.items()):
            repo = f"user/b{number}"
            hub.add(repo, {"README.md": theirs})
            caplog.clear()
            assert push_folder(run, repo, token=TOKEN) is not None, name
            tree = hub.repos[repo].tree()
            assert tree["README.md"] == theirs, name
            assert "adapter_config.json" in tree, name
            assert f"README.md of {repo} on the Hub is left as it is" in caplog.text, name


def test_a_card_here_that_can_not_be_read_stays_and_the_model_goes(tmp_path, monkeypatch, caplog):
    (tmp_path / "adapter_config.json").write_text("{}")
    with loopback_hub() as hub, connected(hub, monkeypatch):
        for number, (name, mine) in enumerate(BROKEN.items()):
            (tmp_path / "README.md").write_bytes(mine)
            caplog.clear()
            assert push_folder(tmp_path, f"user/h{number}", token=TOKEN) is not None, name
            assert sorted(hub.repos[f"user/h{number}"].tree()) == [".gitattributes", "adapter_config.json"], name
            assert (tmp_path / "README.md").read_bytes() == mine, name
            assert f"{tmp_path / 'README.md'} is left as it is and not pushed" in caplog.text, name


def test_a_persons_card_comes_back_after_a_host_wrote_over_it(report, tmp_path):
    """The trainer's way to the same bytes, without the Hub."""
    path = tmp_path / "README.md"
    path.write_text(HOST)
    update_card(path, report, earlier="")
    section = section_of(path.read_text())
    wrong = []
    for name, theirs, expected in list(made_cards(section))[::5]:
        path.write_text(HOST)
        update_card(path, report, earlier=theirs.decode())
        once = path.read_bytes()
        update_card(path, report)
        if without_section(once) != without_section(expected) or path.read_bytes() != once:
            wrong.append((name, theirs[:200], once[:300]))
    assert wrong == []


def test_an_own_card_is_pushed_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    with loopback_hub() as hub, connected(hub, monkeypatch):
        cards = [mine for name, mine, _ in made_cards("x") if "local" not in name]  # the Hub refuses local models
        for number, mine in enumerate(cards[::9]):
            (tmp_path / "README.md").write_bytes(mine)
            push_folder(tmp_path, f"user/own{number}", token=TOKEN)
            assert hub.repos[f"user/own{number}"].tree()["README.md"] == mine


def result(value, dataset="Beans", metric="accuracy"):
    return EvalResult("image-classification", "beans", dataset, metric, value, dataset_args={"date": 20220120})


def test_a_result_goes_into_the_value_or_behind_the_last():
    before = f"license: mit # x\n{MODEL_INDEX}# after\nv: 1.10"
    header = Header(before, "\n")
    header.add_results([result(0.25)], "unused")
    assert header.source == before.replace("0.90", "0.25")
    header.add_results([result(0.5, "Others")], "unused")
    added = """  - task:
      type: image-classification
    dataset:
      name: Others
      type: beans
      args:
        date: 20220120
    metrics:
    - type: accuracy
      value: 0.5
"""
    assert header.source == before.replace("0.90", "0.25").replace("# after", added + "# after")
    loaded = ModelCard(f"---\n{header.source}\n---\n").data
    assert [(each.dataset_name, each.metric_value) for each in loaded.eval_results] == [
        ("Beans", 0.25),
        ("Others", 0.5),
    ]


def test_a_result_that_is_there_already_keeps_its_spelling():
    for value, same in (("0.90", 0.9), ("1", 1.0)):
        header = Header(before := MODEL_INDEX.replace("0.90", value), "\n")
        header.add_results([result(same)], "unused")
        assert header.source == before


@pytest.mark.parametrize("before", ["results: []", "results: [] # none", "results:   []"])
def test_a_host_that_measured_nothing_leaves_a_place(before):
    header = Header(f"model-index:\n- name: run\n  {before}\nz: 1", "\n")
    header.add_results([result(0.5)], "unused")
    assert [each.metric_value for each in ModelCard(f"---\n{header.source}\n---\n").data.eval_results] == [0.5]
    assert header.source.startswith("model-index:\n- name: run\n  results:")
    assert header.source.endswith("\nz: 1")


@pytest.mark.parametrize(
    ("source", "edit", "message"),
    [
        ("tags: &t\n- a\nb: *t", lambda header: header.extend("tags", ["x"]), "would change b"),
        ("tags: |\n  a", lambda header: header.extend("tags", ["x"]), "tags must be a list or a word, but is a block"),
        ("tags: {a: 1}", lambda header: header.extend("tags", ["x"]), "or is a mapping"),
        ("a: !!omap [x: y]", lambda header: header.rewrite(lambda place, value: "z" if value == "y" else value),
         "would change a"),
        ("a: 1\n...", lambda header: header.append("b", 1), "one name only"),
        ("base_model: [/a/b, {c: 1}]", lambda header: header.drop("base_model", lambda each: True), "a list of words"),
        ("model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: d}, metrics: []}]}]",
         lambda header: header.add_results([result(1.0)], "n"), "block style"),
    ],
)  # fmt: skip
def test_an_edit_that_is_not_safe_changes_nothing(source, edit, message):
    header = Header(source, "\n")
    with pytest.raises(HeaderError, match=message):
        edit(header)
    assert header.source == source


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a: b: c", "it is no YAML: mapping values are not allowed here in line 2"),
        ("- a", "a mapping of names to values, but is a list"),
        ("{a: 1}", "block style"),
        ("a: 1\nb: 2\na: 3", "a stands there more often"),
        ("? [a]\n: 1", "no YAML|plain words"),
        ("x: " + "y" * LARGEST, "characters, but it has"),
    ],
)
def test_a_header_that_can_not_be_edited_says_why(source, message):
    with pytest.raises(HeaderError, match=message):
        Header(source, "\n")


def test_the_first_line_ending_counts():
    assert [newline_of(text) for text in ("a\r\nb\n", "a\nb\r\n", "a\rb", "a")] == ["\r\n", "\n", "\r", "\n"]
