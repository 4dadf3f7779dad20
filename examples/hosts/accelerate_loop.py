"""
A loop of accelerate with one of our optimizers, in the shape of accelerate's `nlp_example.py`.

    python examples/hosts/accelerate_loop.py --optim sgd_sai --output_dir accelerate_output
    accelerate launch examples/hosts/accelerate_loop.py --optim swan --mixed_precision bf16

The model is a tiny BERT that tells two kinds of sentences of random words apart: some seconds on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

import hf_sai


RATES = {"sgd_sai": 1e-2, "swan": 1e-3}
WORDS = 32


def dataloader(count: int = 256, size: int = 16) -> DataLoader:
    """Sentences with more words of the first half are of kind 1."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, WORDS, (count, 9), generator=generator)
    kinds = (words < WORDS // 2).sum(-1).gt(4).long()
    rows = [{"input_ids": row, "labels": kind} for row, kind in zip(words, kinds, strict=True)]
    return DataLoader(rows, shuffle=True, batch_size=size, drop_last=True)  # type: ignore[arg-type]


def main(given: argparse.Namespace) -> list[float]:
    """The loss of every step."""
    accelerator = Accelerator(
        cpu=given.cpu,
        mixed_precision=given.mixed_precision,
        gradient_accumulation_steps=given.gradient_accumulation_steps,
        project_dir=given.output_dir,
    )
    set_seed(0)
    loader = dataloader()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=WORDS, max_position_embeddings=16, **sizes))
    # The model, not its parameters: names, decay and SWAN's routes come from it. Before `prepare`, which may wrap it.
    optimizer = hf_sai.create_optimizer(given.optim, model, lr=RATES[given.optim], weight_decay=0.01)
    updates = len(loader) * given.num_epochs // given.gradient_accumulation_steps
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=updates)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    first = 0
    if given.resume_from_checkpoint is not None:
        accelerator.load_state(given.resume_from_checkpoint)
        first = int(given.resume_from_checkpoint.name.removeprefix("epoch_")) + 1
    losses = []
    for epoch in range(first, given.num_epochs):
        model.train()
        loader.set_epoch(epoch)  # the order of the data, in a resumed run too
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        accelerator.save_state(given.output_dir / f"epoch_{epoch}")
        accelerator.print(f"epoch {epoch}: loss {sum(losses[-len(loader) :]) / len(loader):.3f}")
    if accelerator.is_main_process:
        hf_sai.GSNRReport.from_optimizer(optimizer.optimizer).save(given.output_dir)
    accelerator.end_training()
    return losses


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--optim", choices=RATES, default="sgd_sai")
    found.add_argument("--output_dir", type=Path, default=Path("accelerate_output"))
    found.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    found.add_argument("--gradient_accumulation_steps", type=int, default=1)
    found.add_argument("--num_epochs", type=int, default=3)
    found.add_argument("--resume_from_checkpoint", type=Path, help="a folder epoch_N of an earlier run")
    found.add_argument("--cpu", action="store_true")
    return found


if __name__ == "__main__":
    main(parser().parse_args())
