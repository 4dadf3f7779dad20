"""The benchmark scripts, at a size that proves only that they run and that their tables follow from their runs."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = BENCHMARKS / "results"
PNG = b"\x89PNG\r\n"


@pytest.fixture
def results(monkeypatch, tmp_path):
    """The scripts' folders on the path, and folders of its own for what they write."""
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "examples"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common

    threads = torch.get_num_threads()
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(common, "RUNS", tmp_path / "runs")
    yield tmp_path / "results"
    torch.set_num_threads(threads)


def read(folder, name):
    """The result file, whose machine, versions, date and command are there."""
    written = json.loads((folder / f"{name}.json").read_text())
    about = written["machine"]
    assert {"torch", "hf_sai", "transformers"} <= set(about["versions"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])
    assert about["threads"] >= 1
    assert written["command"].startswith("python benchmarks/")
    markdown = (folder / f"{name}.md").read_text()
    assert markdown.endswith(f"; {about['date']}.\n")
    return written, markdown


def cells(markdown, *start):
    """The first row of the tables that starts with these cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    return next(row for row in rows if row[: len(start)] == list(start))


def test_grid_peak_and_mean_follow_from_its_runs(results, monkeypatch):
    import lr_wd_grid

    choice = [
        "--optimizers",
        "sgd_sai",
        "adamw",
        "--rates",
        "0.1",
        "0.001",
        "--decays",
        "0.01",
        "--steps",
        "5",
        "--seeds",
        "2",
    ]
    lr_wd_grid.main(choice)
    for model in ("vit", "cnn"):
        written, markdown = read(results, f"lr_wd_grid_{model}_5")
        assert len(written["runs"]) == 2 * 2 * 2
        assert (results / f"lr_wd_grid_{model}_5.png").read_bytes().startswith(PNG)
        for optimizer, label in (("sgd_sai", "SGD-SaI"), ("adamw", "AdamW")):
            mean = {
                lr: statistics.mean(
                    run["accuracy"] for run in written["runs"] if (run["optimizer"], run["lr"]) == (optimizer, lr)
                )
                for lr in (0.1, 0.001)
            }
            row = cells(markdown, label)
            assert row[1] == f"{max(mean.values()):.1f}"
            assert row[3:] == [f"{value:.1f}" for value in (statistics.mean(mean.values()), *mean.values())]

    def fail(*place):
        raise AssertionError(f"{place} was trained again")

    monkeypatch.setattr(lr_wd_grid, "train", fail)
    lr_wd_grid.main([*choice, "--steps", "5"])
    assert read(results, "lr_wd_grid_cnn_5")[0]["runs"] == written["runs"]


def test_grid_counts_what_a_constant_model_gets_right(results):
    """At a learning rate of 0 nothing but the decay moves; one class of ten or so is right by chance."""
    import lr_wd_grid

    run = lr_wd_grid.train("cnn", "adamw", 0.0, 0.0, 0, 2)
    torch.manual_seed(0)
    model = lr_wd_grid.CNN()
    pixels, classes, held_out_pixels, held_out_classes = lr_wd_grid.digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(classes), generator=generator)
    for step in range(2):  # the running means of BatchNorm
        model(pixels[order[64 * step : 64 * (step + 1)]])
    right = (model.eval()(held_out_pixels).argmax(-1) == held_out_classes).sum().item()
    assert run["accuracy"] == pytest.approx(100 * right / 360)
    assert (len(classes), len(held_out_classes)) == (1437, 360)


@pytest.fixture
def short(monkeypatch, results):
    """Language modelling with two evaluations of one batch."""
    import lm_pretraining

    monkeypatch.setattr(lm_pretraining, "EVALUATE_EVERY", 2)
    monkeypatch.setattr(lm_pretraining, "HELD_OUT_BATCHES", 1)
    return results


def test_language_modelling_tokens_follow_from_its_curves(short):
    import lm_pretraining

    size = "--architecture gpt2 --width 32 --layers 1 --steps 6 --seeds 2 --threads 1 --optimizers adamw swan"
    lm_pretraining.main(size.split())
    name = "lm_pretraining_gpt2_32x1_6"
    written, markdown = read(short, name)
    assert (short / f"{name}.png").read_bytes().startswith(PNG)
    found = written["results"]
    assert set(found) == {"adamw", "swan", "swan, half the tokens"}
    for result in found.values():
        assert result["lr"] == min((loss, float(lr)) for lr, loss in result["trials"].items())[1]
        assert [run["seed"] for run in result["runs"]] == [0, 1]
    swan, adamw = found["swan"]["runs"], found["adamw"]["runs"]
    shares, seconds = [], []
    for mine, theirs in zip(swan, adamw, strict=True):
        assert [step for step, _ in mine["curve"]] == [2, 4, 6]
        reached = next((index for index, (_, loss) in enumerate(mine["curve"]) if loss <= theirs["final"]), None)
        shares.append("not" if reached is None else f"{mine['curve'][reached][0] / 6:.2f}")
        seconds.append("not" if reached is None else f"{mine['seconds_at'][reached] / theirs['seconds']:.2f}")
    row = cells(markdown, "SWAN")
    assert row[2] == f"{statistics.mean(run['final'] for run in swan):.3f}"
    assert row[5:] == [", ".join(shares), ", ".join(seconds)]

    lm_pretraining.main(["--summary"])
    summary = cells((short / "lm_pretraining_summary.md").read_text(), "GPT-2", "1 x 32", "6", "2")
    assert summary[5] == row[2]
    reached = [float(share) for share in shares if share != "not"]
    if len(reached) == 2:
        assert float(summary[8]) == pytest.approx(statistics.mean(reached), abs=0.011)
    else:
        assert summary[8] == "not"


def test_recipes_name_each_run(short):
    import sgd_sai_recipes

    sgd_sai_recipes.main(["--width", "32", "--layers", "1", "--steps", "2"])
    written, markdown = read(short, "sgd_sai_recipes")
    runs = written["runs"]
    usual = [run for run in runs if (run["recipe"], run["optimizer"], run["steps"]) == ("usual", "sgd_sai", 2)]
    best = min(usual, key=lambda run: run["loss"])
    # The same training under the other normalisation, whose learning rate was carried over.
    (normalized,) = [run for run in runs if run["recipe"] == "normalize=max"]
    assert normalized["lr"] == pytest.approx(best["lr"] * written["largest_gsnr"])
    assert normalized["loss"] == pytest.approx(best["loss"], abs=2e-3)
    assert {run["steps"] for run in runs} == {2, 2 * sgd_sai_recipes.LONGER}
    for run in runs:
        assert f"| {run['steps']} | {run['loss']:.3f} |" in markdown


def test_gsnr_is_measured_in_every_condition_and_ablated(short):
    import gsnr_stability
    import lm_pretraining

    size = "--width 32 --layers 1 --steps 2 --base_steps 1 --lora_steps 1 --vit_steps 2 --seeds 1"
    gsnr_stability.main(size.split())
    written, markdown = read(short, "gsnr_stability")
    assert (short / "gsnr_stability.png").read_bytes().startswith(PNG)
    # One tensor by hand: the paper's formula over the square root of its size.
    model = lm_pretraining.gpt2(32, 1, 0)
    tokens = lm_pretraining.batch(lm_pretraining.data()[0], torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name in ("transformer.ln_f.weight", "transformer.h.0.mlp.c_fc.weight"):
        grad = model.get_parameter(name).grad.double()
        ratio = grad.norm() / grad.std() / math.sqrt(grad.numel())
        assert written["conditions"]["GPT-2"]["one batch"][name] == pytest.approx(ratio.item(), rel=1e-5)
    assert [entry["step"] for entry in written["training"]["LoRA"]] == [0, 1, 2]
    assert not any("lora_A" in name for name in written["training"]["LoRA"][0]["excess"])  # zero while B is
    assert any("lora_A" in name for name in written["training"]["LoRA"][2]["excess"])
    for row in written["ablation"]:
        digits = 4 if row["unit"] == "loss" else 1
        ours, size_only = (row["results"][name][0] for name in ("sgd_sai", "sgd_sai_size"))
        shown = cells(markdown, row["task"], row["unit"], f"{row['lr']:g}")
        values = [f"{ours:.{digits}f}", f"{size_only:.{digits}f}", f"{ours - size_only:+.{digits}f}"]
        assert shown[3:] == values


def test_scales_of_the_ablation_are_the_square_roots_of_the_sizes(results):
    import lm_pretraining

    model = lm_pretraining.llama(32, 1, 0)
    optimizer = lm_pretraining.make_optimizer("sgd_sai_size", model, 0.01)
    rows = optimizer.gsnr_statistics()
    assert {row.name: row.scale for row in rows} == {
        name: math.sqrt(param.numel()) for name, param in model.named_parameters()
    }


def test_tables_apart_learn_at_their_own_rate(results):
    import lm_pretraining

    model = lm_pretraining.llama(32, 1, 0)
    optimizer = lm_pretraining.make_optimizer("sgd_sai", model, 0.01, table_lr_ratio=3.0)
    tables, rest = optimizer.param_groups
    assert tables["param_names"] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert (tables["lr"], rest["lr"]) == (pytest.approx(0.03), 0.01)
    assert len(tables["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_guard_says_what_moved(results):
    import quick

    before = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 1.0, "gone": 1.0}
    now = {"a": 1.149, "b": 1.151, "c": 1.6, "d": 0.86, "fresh": 0.5}
    assert quick.moved(now, before) == [
        ("b", "worse: 1.000 -> 1.151 (+15%)"),
        ("c", "better: 2.000 -> 1.600 (-20%)"),
        ("gone", "missing: was not measured"),
        ("fresh", "new: 0.500"),
    ]


def test_guard_compares_with_what_is_committed(results, monkeypatch, capsys):
    import quick

    measured = {"time": 1.0}
    monkeypatch.setattr(quick, "step_ratios", lambda rounds, threads: dict(measured))
    monkeypatch.setattr(quick, "loss_ratios", lambda steps: {})
    assert quick.main([]) == 0
    assert "Nothing to compare with" in capsys.readouterr().out
    assert quick.main(["--update"]) == 0
    written, markdown = read(results, "quick_cpu")
    assert written["ratios"]["state, gpt2-xl: SGD-SaI to AdamW"] == pytest.approx(0.5, abs=1e-6)
    assert cells(markdown, "time") == ["time", "1.000"]
    capsys.readouterr()
    assert quick.main([]) == 0
    assert capsys.readouterr().out.endswith("Nothing moved by more than 15%.\n")
    measured["time"] = 1.2
    assert quick.main([]) == 1
    assert capsys.readouterr().out.endswith("\ntime: worse: 1.000 -> 1.200 (+20%)\n")
    measured["time"] = 0.8
    assert quick.main([]) == 0
    assert json.loads((results.parent / "runs" / "quick_cpu.json").read_text())["ratios"]["time"] == 0.8


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="from torch 2.9 on")
def test_guard_measures_steps_and_losses(short, monkeypatch):
    import quick

    monkeypatch.setattr(quick, "STEP_MODELS", ("LoRA r=4 on GPT-2 medium",))
    steps, losses = quick.step_ratios(1, 1), quick.loss_ratios(1)
    assert "time of a step, LLaMA 6 x 128: SWAN to Muon" in steps
    assert "time of a step, LoRA r=4 on GPT-2 medium: SGD-SaI to AdamW fused" in steps
    assert len(losses) == 2
    assert all(value > 0 for value in [*steps.values(), *losses.values()])


# ---- what is committed ----


@pytest.mark.parametrize("path", sorted(RESULTS.glob("lm_pretraining_*x*.json")), ids=lambda path: path.stem)
def test_committed_tables_of_language_modelling_follow_from_their_runs(results, path):
    import lm_pretraining

    written = json.loads(path.read_text())
    markdown = path.with_suffix(".md").read_text()
    assert lm_pretraining.table(written["results"], written["setting"]["steps"]) in markdown
    assert lm_pretraining.trials_table(written["results"]) in markdown


@pytest.mark.parametrize("path", sorted(RESULTS.glob("lr_wd_grid_*.json")), ids=lambda path: path.stem)
def test_committed_tables_of_the_grid_follow_from_their_runs(results, path):
    import lr_wd_grid

    written = json.loads(path.read_text())
    rows = lr_wd_grid.summary(written["runs"])
    assert rows == written["summary"]
    assert lr_wd_grid.table(rows) in path.with_suffix(".md").read_text()


def test_committed_summary_follows_from_the_result_files(results, monkeypatch):
    import common
    import lm_pretraining

    monkeypatch.setattr(common, "RESULTS", RESULTS)
    shown = (RESULTS / "lm_pretraining_summary.md").read_text()
    for row in lm_pretraining.summary_rows():
        assert f"| {' | '.join(row)} |" in shown


def test_committed_tables_of_gsnr_follow_from_the_measurements(results):
    import gsnr_stability

    written = json.loads((RESULTS / "gsnr_stability.json").read_text())
    markdown = (RESULTS / "gsnr_stability.md").read_text()
    setting = written["setting"]
    assert gsnr_stability.change_table(written, setting["width"], setting["layers"]) in markdown
    assert gsnr_stability.ablation_table(written["ablation"]) in markdown


@pytest.mark.parametrize("path", sorted(RESULTS.glob("sgd_sai_recipes*.json")), ids=lambda path: path.stem)
def test_committed_table_of_the_recipes_follows_from_the_runs(results, path):
    import sgd_sai_recipes

    assert sgd_sai_recipes.table(json.loads(path.read_text())["runs"]) in path.with_suffix(".md").read_text()


def test_lora_is_tuned_alike_and_goes_on_where_it_was(results, monkeypatch):
    import lora_finetuning

    paired, frozen = "SGD-SaI, paired", "SGD-SaI, A frozen (as published)"
    for name, value in (("HELD_OUT_BATCHES", 1), ("BASE_BLOCKS", (2, 32)), ("ADAPTER_BLOCKS", (2, 32))):
        monkeypatch.setattr(lora_finetuning, name, value)
    monkeypatch.setattr(
        lora_finetuning,
        "METHODS",
        {method: (lora_finetuning.METHODS[method][0], (1e-3, 1e-1)) for method in (paired, frozen)},
    )
    choice = ["--methods", paired, frozen, "--rank", "4", "--steps", "2", "--base_steps", "1", "--seeds", "2"]
    lora_finetuning.main(choice)
    written, markdown = read(results, "lora_finetuning")
    assert (results / "lora_finetuning.png").read_bytes().startswith(PNG)
    for method in (paired, frozen):
        result = written["ranks"]["4"][method]
        best = min(result["trials"], key=result["trials"].get)
        assert float(best) == result["lr"]
        assert result["losses"][0] == result["trials"][best]
        assert len(set(result["losses"])) == 2
        assert cells(markdown, method)[1:3] == [best, f"{statistics.mean(result['losses']):.3f}"]

    def fail(*place):
        raise AssertionError(f"{place} was trained again")

    monkeypatch.setattr(lora_finetuning, "train", fail)
    lora_finetuning.main(choice)
    assert read(results, "lora_finetuning")[0]["ranks"] == written["ranks"]


def test_committed_cases_of_the_first_step_are_what_happens(results):
    import first_step

    first_step.main()
    committed = json.loads((RESULTS / "first_step.json").read_text())
    assert read(results, "first_step")[0]["outcomes"] == committed["outcomes"]
    assert committed["outcomes"]["LoRA: factors that train in 20 steps"] == {
        "hf_sai": "A 14 of 14, B 14 of 14",
        "sgd-sai": "A 0 of 14, B 14 of 14",
        "pytorch-optimizer": "A 0 of 14, B 14 of 14",
        "AdamW": "A 14 of 14, B 14 of 14",
    }


def test_the_committed_headline_is_that_of_the_other_results(results, monkeypatch):
    import headline

    monkeypatch.setattr(headline, "RESULTS", RESULTS)
    headline.main()
    written, markdown = read(results, "headline")
    assert written["rows"] == json.loads((RESULTS / "headline.json").read_text())["rows"]
    assert markdown.splitlines()[:13] == (RESULTS / "headline.md").read_text().splitlines()[:13]


def test_a_suggested_rate_stands_beside_the_best_of_its_sweep(results):
    import lr_test

    runs = [{"suggestion": rate, "updates": 98} for rate in (1e-3, 4e-3)]
    classic = [{"lowest / 10": 1e-2, "steepest": 1e-4}] * 2
    entry = {"task": "lm", "optimizer": "swan", "best": 1e-3, "sweep": [(1e-3, 1.5), (1e-2, 2.0)], "runs": runs}
    found = lr_test.table({"lm swan": {**entry, "classic": classic}})
    assert cells(found, "lm")[1:] == ["SWAN", "0.001: 1.5, 0.01: 2", "0.001", "0.001, 0.004", "2", "10", "0.1"]
    assert not lr_test.is_close(entry)
    assert lr_test.is_close({**entry, "runs": runs[:1]})


def test_the_classic_range_test_takes_the_lowest_and_the_steepest_place_of_a_smoothed_loss(results):
    import lr_test

    class Falling:
        """A loss that falls fastest at one place and diverges later."""

        def __len__(self):
            return lr_test.RAMP

        def run(self, rates, is_over):
            losses = []
            for index in range(len(rates)):
                losses.append(3.0 - (index > 40) * min(1.0, 0.5 * (index - 40)) + 100.0 * (index > 70))
                if is_over(losses):
                    break
            return losses

    found = lr_test.classic(Falling())
    rate = lambda index: 10.0 ** (-6 + 6 * index / (lr_test.RAMP - 1))  # noqa: E731
    assert found["lowest / 10"] == pytest.approx(rate(70) / 10)
    assert found["steepest"] == pytest.approx(rate(41))


# ---- real weights, without the packages ----


@pytest.fixture
def small_encoder(results, monkeypatch, tmp_path):
    """A BERT of one layer in the place of MiniLM, twelve snippets, two steps."""
    import real_tasks
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "good", "bad", "film"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = str(tmp_path / "encoder")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    snippets = ["good film", "bad film", "a good film", "film"] * 3
    monkeypatch.setattr(real_tasks, "minilm_path", lambda: folder)
    monkeypatch.setattr(real_tasks, "reviews", lambda: (snippets, [1, 0, 1, 0] * 3))
    for name, value in (("HELD_OUT_REVIEWS", 4), ("REVIEW_STEPS", 2), ("REVIEW_BATCH", 4), ("WARM_UP", 1)):
        monkeypatch.setattr(real_tasks, name, value)
    return results


def test_real_weights_are_tuned_and_the_documented_rate_is_judged(small_encoder, monkeypatch):
    import dataclasses

    import real_tasks
    import real_weights

    trained = []

    def score(method, lr, seed, **options):
        """What a real run gives but for the score, which has its best at 1e-3 and falls by 0.1 for each decade."""
        trained.append((method.label, lr, seed))
        found = real_tasks.minilm(method, lr, seed, **options)
        return {**found, "score": 0.8 - 0.1 * abs(math.log10(lr) + 3) - 0.01 * seed}

    rates = {"adamw": (1e-4, 3e-4), "paired": (1e-3, 1e-2), "swan": (3e-4, 1e-3, 3e-3)}
    task = dataclasses.replace(
        real_weights.TASKS["minilm_lora"],
        run=lambda *run: score(*run, lora=True),
        rates=rates,
        documented={"paired": 1e-2, "swan": 1e-3},
        seeds=2,
    )
    monkeypatch.setattr(real_weights, "TASKS", {"minilm_lora": task})
    real_weights.main(["--tasks", "minilm_lora"])
    written, markdown = read(small_encoder, "real_weights")
    found = written["tasks"]["minilm_lora"]
    # The best stood at the upper edge twice; the lower edge was passed too.
    assert list(found["adamw"]["trials"]) == ["0.0001", "0.0003", "0.0009", "0.003"]
    assert list(found["paired"]["trials"]) == ["0.0003", "0.001", "0.01"]
    assert {method: result["lr"] for method, result in found.items()} == {"adamw": 9e-4, "paired": 1e-3, "swan": 1e-3}
    assert [run["score"] for run in found["swan"]["runs"]["0.001"]] == pytest.approx([0.8, 0.79])
    # Of the real runs: AdamW's state is two numbers for each element, SGD-SaI's one, SWAN's none for B.
    state = {method: result["runs"][f"{result['lr']:g}"][0]["state_bytes"] for method, result in found.items()}
    assert state["paired"] < 0.51 * state["adamw"]
    assert state["swan"] < 0.7 * state["adamw"]
    assert cells(markdown, "MiniLM, LoRA", "0.790 (9e-4)", "SGD-SaI, paired")[3:] == [
        "1e-2",
        "0.695",
        "0.795 (1e-3)",
        "no, 0.100 behind",
    ]
    assert cells(markdown, "MiniLM, LoRA", "0.790 (9e-4)", "SWAN")[3:] == ["1e-3", "0.795", "0.795 (1e-3)", "yes"]
    before = list(trained)
    real_weights.main(["--tasks", "minilm_lora"])
    assert trained == before  # every run was kept


def test_the_reviews_are_those_of_the_package_and_rated_above_zero(results, monkeypatch):
    import io
    import tarfile
    import zipfile

    import common
    import real_tasks

    with pytest.raises(SystemExit, match="-d runs vaderSentiment==0"):
        real_tasks.reviews()
    lines = b"1\t2.5\tGood\r\n2\t-0.5\tNot so good\r\n3\t0.0\tSo so\r\n"
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        about = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        about.size = len(lines)
        archive.addfile(about, io.BytesIO(lines))
    common.RUNS.mkdir()
    with zipfile.ZipFile(common.RUNS / real_tasks.REVIEWS, "w") as package:
        package.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    real_tasks.reviews.cache_clear()
    try:
        assert set(zip(*real_tasks.reviews(), strict=True)) == {("Good", 1), ("Not so good", 0), ("So so", 0)}
    finally:
        real_tasks.reviews.cache_clear()


def test_runs_of_other_benchmarks_are_read_by_rate_and_seed(results, monkeypatch):
    import common
    import real_tasks

    monkeypatch.setattr(common, "RESULTS", RESULTS)
    language = json.loads((RESULTS / "lm_pretraining_64x2_200.json").read_text())["results"]["adamw"]
    found = real_tasks.byte_llama_runs()["adamw"]
    assert {lr: run["score"] for (lr, seed), run in found.items() if seed == 0} == {
        float(lr): loss for lr, loss in language["trials"].items()
    }
    assert [found[language["lr"], seed]["score"] for seed in range(3)] == [run["final"] for run in language["runs"]]
    adapters = json.loads((RESULTS / "lora_finetuning.json").read_text())["ranks"]["16"]["SWAN, b_only"]
    found = real_tasks.small_lora_runs(16)["swan"]
    assert [found[adapters["lr"], seed]["score"] for seed in range(3)] == adapters["losses"]
    digits = json.loads((RESULTS / "lr_wd_grid_vit_300.json").read_text())["runs"]
    (run,) = [
        run
        for run in digits
        if [run[key] for key in ("optimizer", "lr", "weight_decay", "seed")] == ["swan", 0.01, 1e-3, 2]
    ]
    assert real_tasks.digits_runs()["swan"][0.01, 2]["score"] == pytest.approx(run["accuracy"] / 100)


def test_committed_tables_of_real_weights_follow_from_their_runs(results):
    import real_weights

    written = json.loads((RESULTS / "real_weights.json").read_text())
    assert real_weights.text_of(written["tasks"]) in (RESULTS / "real_weights.md").read_text()


def test_bounds_hold_a_gradient_by_its_first_norm(results):
    """By hand: norms of 3 and 4, then of 6 and 2, of tensors of four elements and of one."""
    import real_tasks

    def stepped(*bounds):
        params = [torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(1))]
        optimizer = real_tasks.Bounded(torch.optim.SGD(params, lr=1.0), bounds)
        seen = []
        for norms in ((3.0, 4.0), (6.0, 2.0)):
            for param, norm in zip(params, norms, strict=True):
                param.grad = torch.full_like(param, norm / param.numel() ** 0.5)
            optimizer.step()
            seen.append([param.grad.norm().item() for param in params])
        return seen

    divisor = math.sqrt((4 * 9 + 16) / 5)  # above the first norm of the first tensor
    assert stepped("first")[0] == pytest.approx([3.0, divisor])
    assert stepped("first")[1] == pytest.approx([6.0, 2 * divisor / 4])
    assert stepped("later") == [pytest.approx([3.0, 4.0]), pytest.approx([divisor, 2.0])]
    assert stepped("whole")[1] == pytest.approx([6 * 5 / math.sqrt(40), 2 * 5 / math.sqrt(40)])
