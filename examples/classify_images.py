"""
Trains an image classifier (ViT) with SGD-SaI.

Without arguments it runs offline, in under a minute on two cores: a small ViT from random weights, on the digits of
scikit-learn (in the clone: pip install -c constraints.txt ".[examples]"):

    python examples/classify_images.py

With a model and a data set of the Hub (every flag of TrainingArguments works):

    python examples/classify_images.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name AI-Lab-Makerere/beans --label_column labels --learning_rate 0.01 --max_steps 300 --bf16
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import offline
from datasets import DatasetDict
from finetune_lora import load_splits, train_and_evaluate
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    ViTImageProcessor,
    default_data_collator,
    set_seed,
)

import hf_sai  # makes optim="sgd_sai" valid; import it before the argument parser is built


# The argument parser's defaults where they differ from TrainingArguments'.
DEFAULTS = {
    "output_dir": "demo_output/digits",
    "optim": "sgd_sai",
    "learning_rate": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 30,
    "max_steps": 300,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 128,
    "logging_steps": 100,
    "save_strategy": "no",
    "remove_unused_columns": False,  # images become pixels when they are read: their column has to be there until then
}


@dataclass
class ScriptArguments:
    """What to train, and on what."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of an image model. Default: a small ViT for 8 x 8 pixels."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a data set of images. Default: scikit-learn's digits."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    image_column: str = field(default="image", metadata={"help": "Column that holds the images."})
    label_column: str = field(default="label", metadata={"help": "Column that holds the class."})


def load_model(name: str | None, labels: list[str], seed: int) -> tuple[PreTrainedModel, Any]:
    """A model with one output for each class, and what turns images into its pixels."""
    if name is None:
        size = {"height": 8, "width": 8}
        return offline.small_vit(labels, seed), ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    set_seed(seed)  # the output layer is new, and random
    model = AutoModelForImageClassification.from_pretrained(
        name,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )
    return model, AutoImageProcessor.from_pretrained(name)


def reader(processor: Any, image_column: str, label_column: str) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
    """What makes a batch of rows into the model's inputs."""

    def read(rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows[image_column]]
        return {**processor(images, return_tensors="pt"), "labels": rows[label_column]}

    return read


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the images whose class has the largest output."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(axis=-1) == prediction.label_ids))}


def make_trainer(script_args: ScriptArguments, args: TrainingArguments) -> hf_sai.SaITrainer:
    """A Trainer that checks the optimizer, writes the g-SNR report and adds it to the model card."""
    if script_args.dataset_name is None:
        data: DatasetDict = offline.digits()
    else:
        data = load_splits(script_args.dataset_name, script_args.dataset_config, args.seed)
    labels = data["train"].features[script_args.label_column].names
    model, processor = load_model(script_args.model_name_or_path, labels, args.seed)
    data = data.with_transform(reader(processor, script_args.image_column, script_args.label_column))
    return hf_sai.SaITrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=processor,
        data_collator=default_data_collator,
        compute_metrics=accuracy,
    )


def main() -> None:
    """Reads the command line and trains."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    script_args, args = parser.parse_args_into_dataclasses()
    trainer = make_trainer(script_args, args)
    result = train_and_evaluate(trainer, metric="eval_accuracy")
    print(f"\nHeld-out accuracy {result['before']:.1%} before, {result['after']:.1%} after.")
    if trainer.gsnr_callback.report is not None:  # another --optim has none
        print(f"\n{trainer.gsnr_callback.report.to_text()}\n")
    print(f"Model, g-SNR report and model card are in {args.output_dir}.")


if __name__ == "__main__":
    main()
