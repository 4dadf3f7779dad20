"""What a DeepSpeed configuration may not ask for, and the seam that sees it before a Trainer makes its optimizer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import is_deepspeed_available

import hf_sai
from hf_sai.deepspeed_config import check_config, deepspeed_config, is_left_out
from hf_sai.optim.registry import get_record
from trainer_patches import deepspeed_optimizer


EXAMPLES = Path(__file__).parent.parent / "examples" / "zero"
SGD_SAI = get_record("sgd_sai")


def zero(**settings):
    return {"zero_optimization": {"stage": 2, **settings}}


@pytest.mark.parametrize("optim", ["sgd_sai", "swan"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"optimizer": {"type": "AdamW", "params": {}}},
            r"and the 'optimizer' section of the DeepSpeed configuration \(AdamW\) exclude each other: DeepSpeed "
            "would build its own and leave ours out; remove that section",
        ),
        ({"optimizer": {}}, r"configuration \(one\) exclude"),
        (
            zero(offload_optimizer={"device": "cpu"}),
            'needs "zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration, but it is true',
        ),
        (zero(offload_optimizer={"device": "nvme"}), "was never tried with NVMe offload; use device 'cpu' or 'none'"),
        (zero(offload_param={"device": "nvme"}), "was never tried with NVMe offload"),
        (
            {**zero(offload_optimizer={"device": "cpu", "ratio": 0.4}), "zero_force_ds_cpu_optimizer": False},
            r"needs offload_optimizer.ratio=1.0, but it is 0.4, by which DeepSpeed trains a share of the tensors with",
        ),
        (zero(zenflow={"topk_ratio": 0.1}), "was never tried with ZenFlow, but .* zero_optimization.zenflow="),
        (zero(mics_shard_size=4), "was never tried with MiCS"),
        (zero(zero_hpz_partition_size=8), r"was never tried with ZeRO\+\+, but .*zero_hpz_partition_size=8"),
        (zero(zero_quantized_weights=True), r"never tried with ZeRO\+\+"),
        (zero(zero_quantized_gradients=True), r"never tried with ZeRO\+\+"),
        ({"tensor_parallel": {"autotp_size": 2}}, "was never tried with AutoTP"),
        ({"pipeline": {"stages": 2}}, "was never tried with pipeline parallelism"),
        ({"checkpoint": {"load_universal": True}}, "was never tried with universal checkpoints"),
    ],
)
def test_what_was_never_tried_is_refused_by_name(optim, config, message):
    with pytest.raises(hf_sai.OptionError, match=f"optim='{optim}'.*{message}"):
        check_config(optim, get_record(optim), config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        zero(),
        zero(zero_hpz_partition_size=1, zero_quantized_weights=False, mics_shard_size=-1, zenflow=None),
        {**zero(offload_optimizer={"device": "cpu"}), "zero_force_ds_cpu_optimizer": False},
        zero(offload_optimizer={"device": "none"}, offload_param={"device": "cpu"}),
        {"tensor_parallel": {"autotp_size": 1}, "scheduler": {"type": "WarmupLR"}},
        *[json.loads(path.read_text()) for path in sorted(EXAMPLES.glob("*.json"))],
    ],
)
def test_what_was_tried_is_let_through(config):
    check_config("sgd_sai", SGD_SAI, config)


def test_layerwise_updates_are_refused():
    with pytest.raises(hf_sai.OptionError, match="which DeepSpeed has to itself; use optim='swan'"):
        check_config("swan_layerwise", get_record("swan_layerwise"), zero())


def test_the_configuration_is_found_where_hosts_keep_it():
    config = zero()
    held = SimpleNamespace(config=config)
    assert deepspeed_config(SimpleNamespace(hf_deepspeed_config=held)) is config
    plugin = SimpleNamespace(hf_ds_config=held)
    assert deepspeed_config(SimpleNamespace(hf_deepspeed_config=None, deepspeed_plugin=plugin)) is config
    assert deepspeed_config(SimpleNamespace(deepspeed=config)) == config
    assert deepspeed_config(SimpleNamespace(deepspeed=None)) is None


def test_use_cpu_is_warned_of(caplog):
    assert not is_left_out(SimpleNamespace(use_cpu=False))
    with caplog.at_level(logging.WARNING, "hf_sai"):
        assert is_left_out(SimpleNamespace(use_cpu=True))
    assert "use_cpu=True makes accelerate leave DeepSpeed out: this run trains without it." in caplog.text


def test_the_seam_checks_before_the_host_and_is_taken_back():
    """As the host calls it: with its configuration, which holds an optimizer; and after `unregister` not any more."""
    if not is_deepspeed_available():
        pytest.skip("the host's own optimizers of DeepSpeed come with it")
    import transformers.integrations.deepspeed as host

    assert isinstance(host.deepspeed_optim_sched, deepspeed_optimizer._Checked)
    config = {"optimizer": {"type": "AdamW"}, **zero()}
    asked = SimpleNamespace(config=config, is_offload=lambda: False)
    trainer = SimpleNamespace(create_optimizer=lambda: "made")
    with pytest.raises(hf_sai.OptionError, match="exclude each other"):
        host.deepspeed_optim_sched(trainer, asked, SimpleNamespace(optim="sgd_sai"), 10, [])
    for optim in ("adamw_torch", SimpleNamespace(value="adamw_torch")):
        assert "Dummy" in str(host.deepspeed_optim_sched(trainer, asked, SimpleNamespace(optim=optim), 10, []))
    del config["optimizer"]
    assert host.deepspeed_optim_sched(trainer, asked, SimpleNamespace(optim="swan"), 10, [])[0] == "made"
    hf_sai.unregister()
    try:
        config["optimizer"] = {"type": "AdamW"}
        assert "Dummy" in str(host.deepspeed_optim_sched(trainer, asked, SimpleNamespace(optim="sgd_sai"), 10, []))
    finally:
        hf_sai.register()


def test_the_page_has_the_costs_as_computed(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES.parent.parent / "benchmarks"))
    import zero_costs

    page = (EXAMPLES.parent.parent / "docs" / "processes.md").read_text()
    assert zero_costs.table() in page
    # By hand, one figure: 8B at stage 3 on 8 GPUs is (2 + 2 + 4 + 4) bytes of 8.03e9 elements on 8.
    assert zero_costs.bytes_on_a_gpu(zero_costs.MODELS[0], 3, 8, "SGD-SaI") == pytest.approx(12 * 8.03e9 / 8, rel=1e-3)
    assert zero_costs.measured_bytes(zero_costs.MODELS[0]) == 24 * 291  # the tensors of Llama-3-8B


def test_accelerates_files_name_the_modes():
    import yaml

    zero3 = yaml.safe_load((EXAMPLES / "accelerate_zero3.yaml").read_text())
    assert zero3["distributed_type"] == "DEEPSPEED"
    assert (EXAMPLES.parent.parent / zero3["deepspeed_config"]["deepspeed_config_file"]).is_file()
    assert yaml.safe_load((EXAMPLES / "accelerate_fsdp2.yaml").read_text())["fsdp_config"]["fsdp_version"] == 2
