"""
Fine-tunes a model on chats with TRL's SFTTrainer, a LoRA adapter and SGD-SaI.

Without arguments it runs offline, in under two minutes on two cores: it pre-trains a small byte-level model on the
standard library's source, then adapts it to questions and answers on Python:

    python examples/sft.py

With a model and a data set of the Hub that has a column `messages` (every flag of SFTConfig works):

    python examples/sft.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara \
        --max_length 1024 --max_steps 500 --bf16 --gradient_checkpointing
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import finetune_lora
import offline
from datasets import DatasetDict
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from trl import SFTConfig, SFTTrainer

import hf_sai  # makes optim="sgd_sai" valid; import it before the argument parser is built


# The argument parser's defaults where they differ from SFTConfig's.
DEFAULTS = {
    **finetune_lora.DEFAULTS,
    "output_dir": "demo_output/sft",
    "learning_rate": 0.04,  # for LoRA; with --lora_r 0 start at 0.01
    "warmup_steps": 10,
    "max_steps": 120,
    "logging_steps": 20,
    "save_steps": 60,
    "max_length": 384,  # in tokens, which are bytes here
    "assistant_only_loss": True,  # the questions are read, not learned
    "bf16": False,  # these two are on in SFTConfig, and help a large model on a GPU, not a small one on two cores
    "gradient_checkpointing": False,
}


@dataclass
class ScriptArguments:
    """What to fine-tune, and on what."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a causal LM. Default: a small one, pre-trained here."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a data set of chats. Default: Python's documentation."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    lora_r: int = field(default=4, metadata={"help": "Rank of the adapter; 0 trains the model itself."})
    lora_alpha: int = field(default=8, metadata={"help": "The adapter's output is multiplied by lora_alpha / lora_r."})
    pretrain_steps: int = field(default=150, metadata={"help": "Steps of the offline model's pre-training."})


def load_chats(script_args: ScriptArguments, seed: int) -> DatasetDict:
    """Rows of `messages`, each `{"role": ..., "content": ...}`; 256 chats are enough for the held-out loss."""
    if script_args.dataset_name is None:
        data = offline.documentation_chats()
    else:
        data = finetune_lora.load_splits(script_args.dataset_name, script_args.dataset_config, seed)
    data["test"] = data["test"].select(range(min(256, len(data["test"]))))
    return data.select_columns("messages")


def make_trainer(script_args: ScriptArguments, args: SFTConfig) -> Any:
    """TRL's own trainer, which checks the optimizer, writes the g-SNR report and adds it to the model card."""
    set_seed(args.seed)  # the adapter's first weights are random
    tokenizer = AutoTokenizer.from_pretrained(script_args.model_name_or_path)
    tokenizer.chat_template = tokenizer.chat_template or offline.CHAT_TEMPLATE  # a base model has none
    data = load_chats(script_args, args.seed)
    adapter = LoraConfig(
        r=script_args.lora_r, lora_alpha=script_args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return hf_sai.make_trainer(SFTTrainer)(
        AutoModelForCausalLM.from_pretrained(script_args.model_name_or_path),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        peft_config=adapter if script_args.lora_r else None,
    )


def main() -> None:
    """Reads the command line and fine-tunes."""
    parser = HfArgumentParser((ScriptArguments, SFTConfig))
    parser.set_defaults(**DEFAULTS)
    script_args, args = parser.parse_args_into_dataclasses()
    if script_args.model_name_or_path is None:
        script_args.model_name_or_path = f"{args.output_dir}_base"
        steps = script_args.pretrain_steps  # with SWAN, which learns more in so few than SGD-SaI
        finetune_lora.pretrain(script_args.model_name_or_path, steps, optim="swan", learning_rate=1e-3)
    trainer = make_trainer(script_args, args)
    result = finetune_lora.train_and_evaluate(trainer)
    print(f"\nHeld-out loss {result['before']:.3f} before, {result['after']:.3f} after.")
    if trainer.gsnr_callback.report is not None:  # another --optim has none
        print(f"\n{trainer.gsnr_callback.report.to_text()}\n")
    print(f"Adapter, g-SNR report and model card are in {args.output_dir}.")


if __name__ == "__main__":
    main()
