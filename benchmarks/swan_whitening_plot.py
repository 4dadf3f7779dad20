"""
A picture of SWAN's whitenings: what becomes of a real gradient's singular values, what a step costs, what it buys.

    python benchmarks/swan_whitening_plot.py

The gradient is that of a feed-forward matrix of a byte-level LLaMA (128 wide) after 30 steps. Cost and loss are read
from the results of `swan_step.py` and `swan_whitenings.py`. Writes `docs/images/swan_whitening.png`.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import common
import torch
from lm_pretraining import batch, data, llama, make_optimizer

from hf_sai.optim.whitening import grad_norm, grad_whitening


PICTURE = Path(__file__).parent.parent / "docs" / "images" / "swan_whitening.png"
# Label, options, and the rows of the two benchmarks.
VARIANTS: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("polar, 3 steps", {"method": "polar", "steps": 3}, "SWAN", "SWAN, polar, 3 steps (default)"),
    ("polar, 2 steps", {"method": "polar", "steps": 2}, "SWAN, polar, 2 steps", "SWAN, polar, 2 steps"),
    ("polar_express", {"method": "polar_express"}, "SWAN, polar_express", "SWAN, polar_express"),
    (
        "newton_schulz, 0.8",
        {"method": "newton_schulz", "beta": 0.8},
        "SWAN, newton_schulz (the paper's)",
        "SWAN, newton_schulz, beta 0.8",
    ),
    (
        "newton_schulz, 0.5",
        {"method": "newton_schulz"},
        "SWAN, newton_schulz (the paper's)",
        "SWAN, newton_schulz, beta 0.5",
    ),
    ("nsds", {"method": "nsds"}, "SWAN, nsds", "SWAN, nsds"),
)


def real_gradient() -> torch.Tensor:
    """Of the last down projection, after 30 steps."""
    model = llama(128, 3, seed=0)
    optimizer = make_optimizer("swan", model, 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(31):
        model.zero_grad()
        tokens = batch(data()[0], generator)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model.model.layers[-1].mlp.down_proj.weight.grad


def along(gradient: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values of the normalised gradient, as a share of the largest, and what each becomes; RMS 1 over all."""
    normed = grad_norm(gradient)
    u, s, vh = torch.linalg.svd(normed.double(), full_matrices=False)
    found = grad_whitening(normed, dtype=torch.bfloat16, **options).double()
    values = torch.einsum("ij,ik,jk->j", u, found, vh)
    return s / s[0], values * (len(s) / found.square().sum()).sqrt()


def losses() -> dict[str, float]:
    """Held-out, by the rows of `swan_whitenings.py`; of the smallest setting, which all machines can run."""
    written = json.loads((common.RESULTS / "swan_whitenings_64x2_200.json").read_text())
    return {name: statistics.mean(run["final"] for run in runs) for name, runs in written["results"].items()}


def main() -> None:
    """Draws."""
    from matplotlib.figure import Figure

    torch.set_num_threads(1)
    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    spectrum, price = figure.subplots(1, 2)
    gradient = real_gradient()
    step = json.loads((common.RESULTS / "swan_step_cpu.json").read_text())["optimizers"]
    loss = losses()
    spectrum.axhline(1.0, color="#888888", lw=1, ls="--")
    for index, (label, options, step_row, loss_row) in enumerate(VARIANTS):
        before, after = along(gradient, options)
        spectrum.plot(before, after, ".", ms=4, color=f"C{index}", label=label)
        place = step[step_row]["to_muon"], loss[loss_row]
        price.plot(*place, "o", color=f"C{index}")
        left = place[0] > 1.5  # inside the frame
        below = -16 if label == "polar_express" else 5
        where = {"xytext": (-6 if left else 6, below), "ha": "right" if left else "left"}
        price.annotate(label, place, textcoords="offset points", fontsize=9, **where)
    price.plot(1.0, loss["Muon + AdamW"], "k^")
    where = {"xytext": (8, -4), "ha": "left"}
    price.set_xlim(left=0.0)
    price.annotate("Muon + AdamW", (1.0, loss["Muon + AdamW"]), textcoords="offset points", fontsize=9, **where)
    for name, text in (("SWAN, svd", "svd"), ("AdamW", "AdamW")):
        price.axhline(loss[name], color="#888888", lw=1, ls="--")
        price.annotate(
            text, (0.9, loss[name]), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9
        )
    spectrum.set_xscale("log")
    spectrum.set_xlabel("singular value of the normalised gradient, as a share of the largest")
    spectrum.set_ylabel("after whitening (RMS 1 over all)")
    spectrum.set_ylim(-0.1, 4.0)
    spectrum.set_title("What each direction becomes", loc="left", fontsize=11)
    spectrum.legend(frameon=False)
    price.set_xlabel("time of a step, to torch.optim.Muon's (84 matrices, 256 wide)")
    price.set_ylabel("held-out loss after 200 steps (nats per byte)")
    price.set_title("What it costs, and what it buys", loc="left", fontsize=11)
    for axes in (spectrum, price):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, metadata={"Software": None})
    print(f"written to docs/images/{PICTURE.name}")


if __name__ == "__main__":
    main()
