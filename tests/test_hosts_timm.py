"""timm: heads and patch embeddings go to Adam, and its factory builds ours under the launcher."""

from __future__ import annotations

import pytest
import torch
from support.processes import forked
from support.timm_alone import import_timm

from hf_sai.optim import route_parameters


timm = import_timm()
if timm is None:
    pytest.skip("needs timm, which `make` installs", allow_module_level=True)

# Head, and what makes patches into tokens, by the beginnings of names.
MODELS = {
    "vit_tiny_patch16_224": ("head.", "patch_embed."),
    "deit_tiny_distilled_patch16_224": (("head.", "head_dist."), "patch_embed."),
    "swin_tiny_patch4_window7_224": ("head.fc.", "patch_embed."),
    "mixer_s32_224": ("head.", "stem."),
    "vit_tiny_r_s16_p8_224": ("head.", "patch_embed.proj."),  # a stem of convolutions before its patches
    "vit_small_resnet26d_224": ("head.", "patch_embed.proj."),  # a whole network before them
    "vitamin_small_224": ("head.", ()),  # the same, without a projection
    "pit_ti_224": ("head.", "patch_embed."),
    "tnt_s_patch16_224": ("head.", "pixel_embed."),
    "naflexvit_base_patch16_gap": ("head.", "embeds."),
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
import torch
from support.timm_alone import import_timm
timm = import_timm()
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


@pytest.mark.slow
@pytest.mark.parametrize(("optim", "cls"), [("sgd_sai", "SGDSaI"), ("swan", "SWAN")])
def test_its_factory_under_the_launcher(processes, tmp_path, optim, cls):
    """As `hf-sai run --optim swan train.py --opt adamw` has it."""
    (tmp_path / "train.py").write_text(SCRIPT)
    code, output = forked(processes, tmp_path, "run", "--optim", optim, "train.py")
    assert code == 0, output
    assert f"RAN {cls} True [0.0, 0.05]" in output
