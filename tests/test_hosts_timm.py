"""timm: heads and patch embeddings go to Adam, and its factory builds ours under the launcher."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hf_sai.optim import route_parameters


pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

# Head, and what makes patches into tokens, by the beginnings of names.
MODELS = {
    "vit_tiny_patch16_224": ("head.", "patch_embed."),
    "deit_tiny_distilled_patch16_224": (("head.", "head_dist."), "patch_embed."),
    "swin_tiny_patch4_window7_224": ("head.fc.", "patch_embed."),
    "mixer_s32_224": ("head.", "stem."),
    "convnext_atto": ("head.fc.", ()),
    "resnet18": ("fc.", ()),
    "efficientnet_b0": ("classifier.", ()),
    "levit_128": (("head.linear", "head_dist.linear", "head.bn", "head_dist.bn"), ()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_heads_and_patch_embeddings_go_to_adam(name):
    head, patches = MODELS[name]
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except RuntimeError:  # some compute while they are built
        model = timm.create_model(name)
    routes = route_parameters(model)
    assert {row.name for row in routes if row.reason == "output head"} == {
        row.name for row in routes if row.name.startswith(head)
    }
    assert {row.name for row in routes if row.reason == "embedding"} == {
        row.name for row in routes if row.name.startswith(patches)
    }
    whitened = [row.name for row in routes if row.route != "adam"]
    assert len(whitened) > 15
    assert not any(each.startswith(head) for each in whitened)


SCRIPT = """
import timm, torch
from timm.optim import create_optimizer_v2
model = timm.create_model("test_vit")
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
before = [param.detach().clone() for param in model.parameters()]
model(torch.randn(2, 3, 160, 160)).square().sum().backward()
optimizer.step()
moved = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
decays = [group["weight_decay"] for group in optimizer.param_groups]
print("RAN", type(optimizer).__name__, moved == len(before), decays)
"""


@pytest.mark.parametrize(("optim", "cls"), [("sgd_sai", "SGDSaI"), ("swan", "SWAN")])
def test_its_factory_under_the_launcher(tmp_path, optim, cls):
    """As `hf-sai run --optim swan train.py --opt adamw` has it."""
    (tmp_path / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "hf_sai.run", "--optim", optim, str(tmp_path / "train.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert f"RAN {cls} True [0.0, 0.05]" in done.stdout, done.stderr[-2000:]
