"""
A Lightning module with one of our optimizers; its report is written when the training ends.

    python examples/hosts/lightning_module.py --optim swan --output_dir lightning_output

The network is a Transformer that copies words, with random weights: about ten seconds on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hf_sai


RATES = {"sgd_sai": 1e-2, "swan": 1e-3}
WORDS, LENGTH = 32, 12


class Copier(L.LightningModule):
    """
    Learns to give back what it reads.

    Args:
        optim (`str`): `"sgd_sai"` or `"swan"`.
        options: As for [`hf_sai.create_optimizer`]: `lr`, `weight_decay`, `momentum`, ...
    """

    def __init__(self, optim: str, **options: Any) -> None:
        super().__init__()
        self.optim, self.options = optim, options
        block = nn.TransformerEncoderLayer(32, nhead=2, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(WORDS, 32)
        self.encoder = nn.TransformerEncoder(block, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(32, WORDS)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (words,) = batch
        logits = self.head(self.encoder(self.embedding(words)))
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), words.flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        # The module itself, not its parameters: groups then have names, norms and biases do not decay, and SWAN knows
        # the embedding. It does not know the head of a network of your own: leave it out of what may be whitened.
        targets = {"target_modules": r"encoder\..*"} if self.optim == "swan" else {}
        optimizer = hf_sai.create_optimizer(self.optim, self, **targets, **self.options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            hf_sai.GSNRReport.from_optimizer(self.trainer.optimizers[0]).save(self.trainer.default_root_dir)


def batches(count: int = 64, size: int = 16) -> DataLoader:
    """Random words."""
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randint(0, WORDS, (count * size, LENGTH), generator=generator)), size)


def train(
    module: L.LightningModule, folder: Path, resume: Path | None = None, count: int = 64, **settings: Any
) -> L.Trainer:
    """Lightning's own Trainer; `settings` are its arguments."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(default_root_dir=folder, **quiet | settings)
    trainer.fit(module, batches(count), ckpt_path=resume)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", choices=RATES, default="sgd_sai")
    parser.add_argument("--output_dir", type=Path, default=Path("lightning_output"))
    given = parser.parse_args()
    L.seed_everything(0, verbose=False)
    module = Copier(given.optim, lr=RATES[given.optim])
    trainer = train(module, given.output_dir, max_steps=60, gradient_clip_val=1.0, enable_checkpointing=False)
    report = hf_sai.GSNRReport.load(given.output_dir)
    layers = sorted({row.layer for row in report.rows if row.layer is not None})
    print(
        f"{given.optim}: loss {float(trainer.callback_metrics['loss']):.3f} at the end, layers {layers} in the report"
    )


if __name__ == "__main__":
    main()
