"""
Fine-tunes a LoRA adapter of a causal language model with SGD-SaI.

Without arguments it runs offline, in under two minutes on two cores: it pre-trains a small byte-level model on the
standard library's source, then adapts it to English documentation:

    python examples/finetune_lora.py

With a model and a data set of the Hub (every flag of TrainingArguments works):

    python examples/finetune_lora.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name roneneldan/TinyStories \
        --optim_args lora_policy=paired --learning_rate 1e-3 --max_steps 500 --bf16 \
        --push_to_hub --hub_model_id you/tiny-stories-lora
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import offline
from datasets import Dataset, DatasetDict, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import hf_sai  # makes optim="sgd_sai" valid; import it before the argument parser is built


# The argument parser's defaults where they differ from TrainingArguments'. The rate is for the small model that is
# made here: on pretrained weights start at 1e-3 with lora_policy=paired.
DEFAULTS = {
    "output_dir": "demo_output/lora",
    "optim": "sgd_sai",
    "learning_rate": 0.1,
    "lr_scheduler_type": "cosine",
    "max_steps": 200,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "logging_steps": 50,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 2,
}


@dataclass
class ScriptArguments:
    """What to fine-tune, and on what."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a causal LM. Default: a small one, pre-trained here."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a data set. Default: Python's documentation."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    block_size: int = field(default=128, metadata={"help": "Tokens per training example."})
    lora_r: int = field(default=4, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=8, metadata={"help": "The adapter's output is multiplied by lora_alpha / lora_r."})
    pretrain_steps: int = field(default=400, metadata={"help": "Steps of the offline model's pre-training."})


def blocks_of_tokens(texts: Dataset, tokenizer: PreTrainedTokenizerBase, column: str, block_size: int) -> Dataset:
    """Joins all texts and cuts them into examples of `block_size` tokens; the labels are the tokens themselves."""

    def cut(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        tokens = list(
            chain.from_iterable(tokenizer([text + tokenizer.eos_token for text in batch[column]])["input_ids"])
        )
        whole = [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]
        return {"input_ids": whole, "labels": whole}

    return texts.map(cut, batched=True, remove_columns=texts.column_names, desc="Cutting texts into blocks")


def prepare(texts: DatasetDict, tokenizer: PreTrainedTokenizerBase, column: str, block_size: int) -> DatasetDict:
    """`train` and `test` as blocks of tokens; 256 blocks are enough for the held-out loss."""
    data = DatasetDict(
        {part: blocks_of_tokens(texts[part], tokenizer, column, block_size) for part in ("train", "test")}
    )
    data["test"] = data["test"].select(range(min(256, len(data["test"]))))
    return data


def load_splits(name: str, config: str | None, seed: int) -> DatasetDict:
    """A data set of the Hub (or of a folder) as `train` and `test`; where it has no `test`, 2% are held out."""
    data = load_dataset(name, config)
    return data if "test" in data else data["train"].train_test_split(test_size=0.02, seed=seed)


def make_trainer(model: Any, args: TrainingArguments, data: DatasetDict, tokenizer: Any) -> hf_sai.SaITrainer:
    """A Trainer that checks the optimizer, writes the g-SNR report and adds it to the model card."""
    return hf_sai.SaITrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )


def pretrain(
    output_dir: str, steps: int, optim: str = "sgd_sai", learning_rate: float = 0.01, **others: Any
) -> dict[str, Any]:
    """Trains the small byte-level model on Python code and saves it; returns losses and the optimizer's bytes."""
    tokenizer = offline.byte_tokenizer()
    data = prepare(offline.standard_library_source(), tokenizer, "text", 128)
    changed = {"output_dir": output_dir, "optim": optim, "learning_rate": learning_rate, "max_steps": steps}
    args = TrainingArguments(**{**DEFAULTS, **changed, "warmup_steps": steps // 10, "save_strategy": "no", **others})
    trainer = make_trainer(offline.small_llama(len(tokenizer)), args, data, tokenizer)
    return train_and_evaluate(trainer)


def train_and_evaluate(trainer: Any, metric: str = "eval_loss") -> dict[str, Any]:
    """A held-out metric before and after, the bytes of the state, the logged losses by step; saves or pushes."""
    before = trainer.evaluate()[metric]
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    after = trainer.evaluate()[metric]
    if trainer.args.push_to_hub:
        trainer.push_to_hub()  # saves, writes the card, and uploads all in one commit
    else:
        trainer.save_model()
        trainer.create_model_card()
    curve = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    state_bytes = hf_sai.optimizer_state_bytes(trainer.optimizer)
    return {"before": before, "after": after, "state_bytes": state_bytes, "curve": curve}


def finetune(script_args: ScriptArguments, args: TrainingArguments) -> dict[str, Any]:
    """Adapts a model with LoRA; returns losses and the optimizer's bytes."""
    set_seed(args.seed)  # the adapter's first weights are random
    tokenizer = AutoTokenizer.from_pretrained(script_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(script_args.model_name_or_path)
    if script_args.dataset_name is None:
        texts = offline.documentation()
    else:
        texts = load_splits(script_args.dataset_name, script_args.dataset_config, args.seed)
    data = prepare(texts, tokenizer, script_args.text_column, script_args.block_size)
    adapter = LoraConfig(
        r=script_args.lora_r, lora_alpha=script_args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = make_trainer(get_peft_model(model, adapter), args, data, tokenizer)
    return train_and_evaluate(trainer)


def main() -> None:
    """Reads the command line and fine-tunes."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    script_args, args = parser.parse_args_into_dataclasses()
    if script_args.model_name_or_path is None:
        script_args.model_name_or_path = f"{args.output_dir}_base"
        pretrain(script_args.model_name_or_path, script_args.pretrain_steps)
    result = finetune(script_args, args)
    print(f"\nHeld-out loss {result['before']:.3f} before, {result['after']:.3f} after.")
    print(f"Adapter, g-SNR report and model card are in {args.output_dir}.")


if __name__ == "__main__":
    main()
