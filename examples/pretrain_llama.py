"""
Pre-trains a Llama from random weights with SWAN, which keeps nothing between steps for the matrices.

Without arguments it runs offline, in about a minute on two cores: a small byte-level model on the standard library's
source:

    python examples/pretrain_llama.py

With the architecture and the tokenizer of a model of the Hub, and a data set (every flag of TrainingArguments works):

    python examples/pretrain_llama.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name roneneldan/TinyStories \
        --block_size 1024 --per_device_train_batch_size 8 --max_steps 10000 --warmup_steps 1000 --bf16
"""

from __future__ import annotations

from dataclasses import dataclass, field

import offline
from finetune_lora import load_splits, make_trainer, prepare, train_and_evaluate
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from hf_sai import GSNRReport  # importing hf_sai makes optim="swan" valid; do it before the argument parser is built


# The argument parser's defaults where they differ from TrainingArguments'. SWAN's learning rate is in AdamW's terms:
# what is right for AdamW is a good start. Embeddings, the output head and norms are Adam's; the rest is whitened.
DEFAULTS = {
    "output_dir": "demo_output/pretrain_swan",
    "optim": "swan",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 25,
    "weight_decay": 0.1,
    "max_steps": 250,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "logging_steps": 50,
    "save_strategy": "no",
}


@dataclass
class ScriptArguments:
    """What to pre-train, and on what."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder whose configuration and tokenizer are taken, not its weights. "
            "Default: a small Llama."
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a data set. Default: the standard library's source."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    block_size: int = field(default=128, metadata={"help": "Tokens per training example."})


def new_model(name: str | None, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with random weights, and its tokenizer."""
    if name is None:
        tokenizer = offline.byte_tokenizer()
        return offline.small_llama(len(tokenizer), seed), tokenizer
    set_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name)), AutoTokenizer.from_pretrained(name)


def show(report: GSNRReport) -> None:
    """Where the tensors went, and what is kept for them."""
    routes = report.summary()
    print(
        f"{routes['whitened']:.0f} tensors whitened ({routes['whitened_share']:.1%} of the elements), "
        f"{routes['adam']:.0f} to Adam."
    )
    share = report.state_bytes / report.adamw_state_bytes
    print(f"Optimizer state {report.state_bytes:,} bytes; AdamW's: {report.adamw_state_bytes:,} ({share:.1%}).")


def main() -> None:
    """Reads the command line and pre-trains."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    script_args, args = parser.parse_args_into_dataclasses()
    model, tokenizer = new_model(script_args.model_name_or_path, args.seed)
    if script_args.dataset_name is None:
        texts = offline.standard_library_source()
    else:
        texts = load_splits(script_args.dataset_name, script_args.dataset_config, args.seed)
    data = prepare(texts, tokenizer, script_args.text_column, script_args.block_size)
    trainer = make_trainer(model, args, data, tokenizer)
    result = train_and_evaluate(trainer)
    print(f"\nHeld-out loss {result['before']:.3f} before, {result['after']:.3f} after.")
    if trainer.gsnr_callback.report is not None:  # another --optim has none
        show(trainer.gsnr_callback.report)
    print(f"Model, report and model card are in {args.output_dir}.")


if __name__ == "__main__":
    main()
