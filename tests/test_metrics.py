"""Metrics for the Trainer by value, and results where the Hub reads them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, parse_eval_result_entries
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


NUMBERS = {
    "float": 0.5,
    "int": 40,
    "float64": np.float64(0.5),
    "float32": np.float32(0.5),
    "float16": np.float16(0.5),
    "int64": np.int64(40),
    "array": np.array(0.5),
    "array of one": np.array([0.5]),
    "tensor": torch.tensor(0.5),
    "bfloat16": torch.tensor(0.5, dtype=torch.bfloat16),
    "tensor of one": torch.tensor([[40]]),
    "with a gradient": torch.tensor(0.5, requires_grad=True),
}
NO_NUMBERS = {
    "none": None,
    "text": "0.5",
    "nested": {"a": 0.5},
    "list": [0.5],
    "truth": True,
    "numpy's truth": np.bool_(True),
    "two": np.array([0.5, 0.5]),
    "no tensor": torch.zeros(0),
    "nan": np.float32("nan"),
    "inf": torch.tensor(math.inf),
}


def test_numbers_of_all_kinds_are_plain_in_the_card_and_others_are_named(tmp_path, caplog):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n# x\n")
    write_results(
        path, card_results({**{f"eval_{name}": each for name, each in NUMBERS.items()}, **NO_NUMBERS}, **DATASET)
    )
    header = yaml.safe_load(path.read_text().split("---")[1])
    (entry,) = header["model-index"][0]["results"]
    found = {metric["type"]: metric["value"] for metric in entry["metrics"]}
    assert found == {name: 40 if "40" in str(value) else 0.5 for name, value in NUMBERS.items()}
    assert {type(value) for value in found.values()} == {int, float}
    assert f"left out of the card: {', '.join(NO_NUMBERS)}." in caplog.text
    assert path.read_text().startswith("---\nlicense: mit\nmodel-index:\n")
    assert path.read_text().endswith("---\n# x\n")


MEASURES = (
    "loss accuracy token_accuracy mean_token_accuracy gen_len length_ratio precision_at_1 top_5_accuracy perplexity"
)
NO_MEASURES = """epoch runtime samples_per_second steps_per_second samples total_flos num_input_tokens_seen num_tokens
    model_preparation_time jit_compilation_time translation_length reference_length sys_len ref_len step global_step
    mem_cpu_alloc_delta init_mem_cpu before_init_mem_cpu tokens_per_second word_count counts totals number support"""


def test_measures_go_into_the_card_and_counts_and_times_do_not():
    metrics = {f"eval_{name}": 2.0 for name in [*MEASURES.split(), *NO_MEASURES.split()]}
    assert [each.metric_type for each in card_results(metrics, **DATASET)] == MEASURES.split()


@pytest.mark.parametrize("value", [None, [0.5], {"a": 1}, torch.zeros(2), object()])
def test_a_result_that_is_no_measure_is_named_and_left_out(tmp_path, caplog, value):
    path = tmp_path / "README.md"
    path.write_text(mine := "---\nlicense: mit\n---\n# x\n")
    results = card_results({"eval_loss": 2.0}, **DATASET)
    odd = dataclasses.replace(results[0], metric_type="odd one", metric_value=value)
    write_results(path, [odd])
    assert path.read_text() == mine
    assert "The result odd one is left out of the card" in caplog.text


def test_a_result_of_odd_things_is_plain(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# x\n")
    args = {"k": np.int64(3), "at": (np.float32(0.5), None), "path": tmp_path / "x"}
    write_results(path, [EvalResult("t|`", "d\nd", "no", "m: x", "20.0 ± 1.2", metric_args=args, dataset_args=args)])
    (found,) = ModelCard.load(path).data.eval_results
    assert (found.task_type, found.dataset_type, found.dataset_name) == ("t|`", "d\nd", "no")
    assert (found.metric_type, found.metric_value) == ("m: x", "20.0 ± 1.2")
    assert found.metric_args == {"k": 3, "at": [0.5], "path": str(tmp_path / "x")}


@pytest.mark.parametrize("content", [b"---\na: b: c\n---\n", b"caf\xe9", b"---\nmodel-index: [{name: x}]\n---\n"])
def test_results_leave_a_card_that_can_not_be_read(tmp_path, caplog, content):
    path = tmp_path / "README.md"
    path.write_bytes(content)
    write_results(path, card_results({"eval_loss": 2.0}, **DATASET))
    assert path.read_bytes() == content
    assert f"{path} is left as it is" in caplog.text


def test_numbers_of_a_module_may_be_numpys(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(
        METRIC.format(kind="int64").replace("weight * sum(equal) / len(equal)", "__import__('numpy').array(0.5)")
    )
    compute = ComputeMetrics([str(path)])
    assert compute(EvalPrediction(torch.tensor([[1.0, 2.0]]), torch.tensor([1]))) == {"share": 0.5}


def test_a_history_with_numpys_numbers_makes_a_card_that_loads(tmp_path):
    """As a trainer of one's own logs them in its `evaluate`."""
    trainer = SaITrainer(tiny_llama(), arguments(tmp_path, max_steps=1), train_dataset=token_blocks())
    trainer.train()
    logged = {"eval_loss": np.float32(2.0), "eval_accuracy": np.float64(0.5), "eval_f1": torch.tensor(0.5), "step": 1}
    trainer.state.log_history.append(logged)
    trainer.create_model_card(tasks="text-generation", dataset_tags="user/data", dataset="Data")
    (accuracy, f1) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert (accuracy.metric_value, f1.metric_value) == (0.5, 0.5)
    assert trainer.state.log_history[-1] is logged


def test_benchmarks_are_files_that_the_hub_reads(tmp_path):
    entries = [
        EvalResultEntry(dataset_id="some/benchmark", task_id="easy", value=0.5),
        EvalResultEntry(dataset_id="some/benchmark", task_id="hard", value=0.25, notes="no tools"),
        EvalResultEntry(dataset_id="another/one", task_id="default", value=3.0),
    ]
    given = [dataclasses.replace(each, value=np.float32(each.value)) for each in entries]
    paths = write_benchmark_results(tmp_path, given)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        ".eval_results/some__benchmark.yaml",
        ".eval_results/another__one.yaml",
    ]
    read = [entry for path in paths for entry in parse_eval_result_entries(yaml.safe_load(path.read_text()))]
    assert read == entries
    with pytest.raises(MetricError, match=r"user/name, but is 'my_data'; results on other data go into the card"):
        write_benchmark_results(tmp_path, [EvalResultEntry(dataset_id="my_data", task_id="x", value=1.0)])
