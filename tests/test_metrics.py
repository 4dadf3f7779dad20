"""Metrics for the Trainer by value, and results where the Hub reads them."""

from __future__ import annotations

import math

import pytest
import torch
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from support.models import tiny_llama, token_blocks, word_tokenizer
from support.trainers import arguments
from transformers import EvalPrediction

from hf_sai import SaITrainer
from hf_sai.hub.metrics import ComputeMetrics, MetricError, card_results, write_benchmark_results, write_results


METRIC = '''
import datasets
import evaluate

class Shares(evaluate.Metric):
    """Share of equal entries, with a list beside it that is no number for a card."""

    def _info(self):
        value = datasets.Value("{kind}")
        features = datasets.Features({{"predictions": value, "references": value}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, weight=1.0):
        equal = [a == b for a, b in zip(predictions, references)]
        return {{"share": weight * sum(equal) / len(equal), "per_entry": equal}}
'''


def metric_file(tmp_path, kind):
    path = tmp_path / f"share_{kind}.py"
    path.write_text(METRIC.format(kind=kind))
    return str(path)


LOGITS = torch.tensor([[[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]], [[0.0, 1.0], [5.0, 0.0], [0.0, 0.0]]])
LABELS = torch.tensor([[1, 1, 0], [0, -100, 1]])


def test_language_modelling_by_hand():
    """Position 0's logits are about label 1; -100 does not count."""
    result = ComputeMetrics(["perplexity", "token_accuracy"], "causal_lm")(
        EvalPrediction(LOGITS.numpy(), LABELS.numpy())
    )
    pairs = [([2.0, 1.0], 1), ([0.0, 3.0], 0), ([5.0, 0.0], 1)]
    losses = [math.log(sum(math.exp(each) for each in logits)) - logits[label] for logits, label in pairs]
    assert result == pytest.approx({"perplexity": math.exp(sum(losses) / 3), "token_accuracy": 0.0}, rel=1e-6)


def test_tokens_by_hand():
    result = ComputeMetrics(["token_accuracy"], "token_classification")(EvalPrediction(LOGITS, LABELS))
    assert result == {"token_accuracy": 2 / 5}


def test_batches_give_what_the_whole_gives_and_the_next_evaluation_starts_anew():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 5, 7, generator=generator)
    labels = torch.randint(0, 7, (6, 5), generator=generator)
    labels[1] = -100
    compute = ComputeMetrics(["perplexity", "token_accuracy"], "causal_lm")
    whole = compute(EvalPrediction(logits, labels))
    for _ in range(2):
        assert compute(EvalPrediction(logits[:2], labels[:2]), compute_result=False) == {}
        parts = compute(EvalPrediction(logits[2:], labels[2:]), compute_result=True)
        assert parts == pytest.approx(whole, rel=1e-6)


def test_metrics_of_a_run_are_those_of_its_model(tmp_path):
    args = arguments(tmp_path, batch_eval_metrics=True, per_device_eval_batch_size=5, max_steps=1)
    compute = ComputeMetrics(["perplexity", "token_accuracy"], "causal_lm")
    trainer = SaITrainer(
        tiny_llama(), args, train_dataset=token_blocks(), eval_dataset=token_blocks(12), compute_metrics=compute
    )
    found = trainer.evaluate()
    rows = torch.stack([row["input_ids"] for row in token_blocks(12)])
    with torch.no_grad():
        output = trainer.model(rows, labels=rows)
    # Not the run's eval_loss: that of transformers 5.2 is another where the last batch is smaller.
    assert found["eval_perplexity"] == pytest.approx(math.exp(output.loss), rel=1e-5)
    guesses = output.logits.argmax(-1)
    assert found["eval_token_accuracy"] == pytest.approx((guesses[:, :-1] == rows[:, 1:]).float().mean().item())


def test_a_module_of_evaluate_from_a_file(tmp_path):
    path = metric_file(tmp_path, "int64")
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([1, 0, 0, 0])
    compute = ComputeMetrics([path, "token_accuracy"], options={path: {"weight": 2.0}})
    compute(EvalPrediction(logits[:1], labels[:1]), compute_result=False)
    assert compute(EvalPrediction(logits[1:], labels[1:])) == {"share": 1.5, "token_accuracy": 0.75}


def test_generated_ids_are_compared_as_text(tmp_path):
    path = metric_file(tmp_path, "string")
    compute = ComputeMetrics([path], "generation", tokenizer=word_tokenizer())
    predictions = torch.tensor([[1, 2, 31], [3, 4, 5]])
    labels = torch.tensor([[1, 2, -100], [3, 5, 5]])
    assert compute(EvalPrediction(predictions.numpy(), labels.numpy())) == {"share": 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["perplexity"], "task": "lm"}, "task must be one of classification, .* but is 'lm'"),
        ({"names": ["x.py"], "task": "generation"}, "compares text and needs a tokenizer"),
        ({"names": ["perplexity"], "task": "generation", "tokenizer": 1}, "perplexity needs logits, but"),
        ({"names": ["perplexity"], "options": {"f1": {}}}, "'f1' is not among them"),
        ({"names": ["./no_such_metric.py"]}, "a metric must be perplexity, token_accuracy, a name or a path"),
    ],
)
def test_what_can_not_work_is_said_at_once(arguments, message):
    with pytest.raises(MetricError, match=message):
        ComputeMetrics(**arguments)


def test_shapes_that_do_not_fit_are_said():
    with pytest.raises(MetricError, match=r"they are \(2, 3\) and \(2, 3\); check the task"):
        ComputeMetrics(["perplexity"], "causal_lm")(EvalPrediction(LABELS, LABELS))


EVALUATED = {
    "eval_perplexity": 7.5,
    "eval_runtime": 1.0,
    "eval_samples_per_second": 2.0,
    "epoch": 3.0,
    "eval_loss": 2.0,
}
DATASET = {
    "task_type": "text-generation",
    "dataset_type": "user/data",
    "dataset_name": "Data",
    "dataset_split": "test",
}


def test_results_are_read_back_from_the_card_and_replaced(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n\nText.\n")
    write_results(path, card_results(EVALUATED, **DATASET))
    write_results(path, card_results({"eval_perplexity": 6.0}, **DATASET))
    card = ModelCard.load(path)
    assert card.data.model_name == tmp_path.name
    found = {each.metric_type: (each.metric_name, each.metric_value) for each in card.data.eval_results}
    assert found == {"perplexity": ("Perplexity", 6.0), "loss": ("Loss", 2.0)}
    assert all(each.dataset_type == "user/data" and each.dataset_split == "test" for each in card.data.eval_results)
    assert card.data.license == "mit"


def test_a_push_of_the_trainer_takes_results(tmp_path):
    trainer = SaITrainer(tiny_llama(), arguments(tmp_path, max_steps=1), train_dataset=token_blocks())
    trainer.train()
    trainer.create_model_card(results=card_results(EVALUATED, **DATASET))
    found = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {each.metric_type: each.metric_value for each in found} == {"perplexity": 7.5, "loss": 2.0}


def test_benchmarks_are_files_that_the_hub_reads(tmp_path):
    entries = [
        EvalResultEntry(dataset_id="some/benchmark", task_id="easy", value=0.5),
        EvalResultEntry(dataset_id="some/benchmark", task_id="hard", value=0.25, notes="no tools"),
        EvalResultEntry(dataset_id="another/one", task_id="default", value=3.0),
    ]
    paths = write_benchmark_results(tmp_path, entries)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        ".eval_results/some__benchmark.yaml",
        ".eval_results/another__one.yaml",
    ]
    import yaml

    read = [entry for path in paths for entry in parse_eval_result_entries(yaml.safe_load(path.read_text()))]
    assert read == entries
    with pytest.raises(MetricError, match=r"user/name, but is 'my_data'; results on other data go into the card"):
        write_benchmark_results(tmp_path, [EvalResultEntry(dataset_id="my_data", task_id="x", value=1.0)])
