"""Trainer runs under DeepSpeed, in processes that a test starts."""

from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist

from support.models import tiny_llama, token_blocks


def on_cpu():
    """accelerate knows no backend for DeepSpeed on CPUs and then sees one process: it is given gloo."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    def backend(cpu=False, sagemaker_dp=False, backend=None):
        return "gloo", DistributedType.MULTI_CPU

    PartialState._prepare_backend = staticmethod(backend)


def configuration(stage, **more):
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    if stage == 3:
        config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "reduce_bucket_size": 100_000,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return {**config, **more}


def model_of(lora):
    if not lora:
        return tiny_llama()
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def trainer_of(cls, folder, config, lora=False, optim="sgd_sai", callbacks=(), trainer_options=None, **changed):
    from transformers import TrainingArguments

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {
        "optim": optim,
        "per_device_train_batch_size": 4 // ranks,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 0.05 if optim == "sgd_sai" else 2e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,
        "seed": 3,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": config is None,
        "deepspeed": copy.deepcopy(config),
    }
    args = TrainingArguments(str(folder), **{**settings, **changed})
    return cls(
        model_of(lora), args, train_dataset=token_blocks(), callbacks=list(callbacks), **(trainer_options or {})
    )


def whole_weights(trainer, stage):
    import deepspeed

    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    found = {}
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters([param]) if stage == 3 else contextlib.nullcontext():
            found[name] = param.detach().clone()
    return found


def train_and_resume(folder: Path, stage, lora, optim="sgd_sai", changed=None):
    """A run of six steps, and one resumed from the third; what rank 0 has of each."""
    from hf_sai import GSNRReport, SaIConfig, SaITrainer

    on_cpu()
    config, changed = configuration(stage), changed or {}
    track = {"sai_config": SaIConfig(gsnr_track_steps=2)}
    trainer = trainer_of(SaITrainer, folder, config, lora, optim, trainer_options=track, **changed)
    trainer.train()
    first = whole_weights(trainer, stage)
    report = GSNRReport.load(folder) if dist.get_rank() == 0 else None
    trainer.create_model_card()
    again = trainer_of(SaITrainer, folder, config, lora, optim, trainer_options=track, **changed)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    second = whole_weights(again, stage)
    dist.barrier()
    return {
        "weights": first,
        "resumed": second,
        "report": report,
        "resumed_report": GSNRReport.load(folder) if dist.get_rank() == 0 else None,
        "checkpoint": sorted(path.name for path in (folder / "checkpoint-3").iterdir()),
        "log": trainer.state.log_history,
        "optimizer": type(trainer.optimizer).__name__,
    }
