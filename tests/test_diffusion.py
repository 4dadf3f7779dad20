"""Real denoisers of diffusers, tiny: what SWAN does with them when it gets bare tensors, and LoRA there and back."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from reference import ReferenceSGDSaI, ReferenceSWAN
from tiny_pipelines import PIPELINES
from torch import nn

from hf_sai import create_optimizer
from hf_sai.stand_in import Replacement


OPTIONS = {"lr": 0.01, "scale": 2.0, "adam_lr_ratio": 0.5, "weight_decay": 0.1}
BETAS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
FAMILIES = list(PIPELINES)


def denoiser_of(pipeline):
    return getattr(pipeline, "unet", None) or pipeline.transformer


def inputs(family, dtype=torch.float64):
    """What a denoiser takes: latents of an 8 x 8 picture, a time, and a text of five tokens."""
    generator = torch.Generator().manual_seed(3)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    time = torch.tensor([7.0, 400.0], dtype=dtype)
    if family == "flux":
        return {
            "hidden_states": random(2, 16, 16),
            "timestep": time / 1000,
            "pooled_projections": random(2, 32),
            "encoder_hidden_states": random(2, 5, 32),
            "txt_ids": torch.zeros(5, 3, dtype=dtype),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)).to(dtype),
        }
    latents, text = random(2, 4, 8, 8), random(2, 5, 32 if family == "sd" else 64)
    if family == "sd3":
        pooled = random(2, 64)
        return {
            "hidden_states": latents,
            "timestep": time,
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
        }
    extra = {} if family == "sd" else {"added_cond_kwargs": {"text_embeds": random(2, 32), "time_ids": random(2, 6)}}
    return {"sample": latents, "timestep": time.long(), "encoder_hidden_states": text, **extra}


def predict(model, family):
    return model(**inputs(family, next(model.parameters()).dtype), return_dict=False)[0]


def loss_of(model, family):
    prediction = predict(model, family)
    target = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (prediction - target.to(prediction.dtype)).square().mean()


def as_matrix(array):
    """Rows are outputs; of a convolution all else is columns."""
    return [array.reshape(len(array), -1)]


def matrices_of(model):
    """The rule as a person would apply it: weights of linear layers and convolutions, but not what embeds patches."""
    return {
        f"{name}.weight": as_matrix
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name != "pos_embed.proj"
    }


EXPECTED = {  # name of a tensor, why it went where
    "sd": {
        "conv_in.weight": "convolution, flattened",
        "time_embedding.linear_1.weight": "linear layer",
        "down_blocks.1.resnets.0.conv1.weight": "convolution, flattened",
        "down_blocks.1.attentions.0.proj_in.weight": "convolution, flattened",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": "linear layer",
        "mid_block.resnets.0.norm1.weight": "not a matrix",
        "conv_out.bias": "not a matrix",
    },
    "sdxl": {
        "add_embedding.linear_1.weight": "linear layer",
        "down_blocks.1.attentions.0.proj_in.weight": "linear layer",
    },
    "sd3": {
        "pos_embed.proj.weight": "embedding",
        "transformer_blocks.0.attn.add_q_proj.weight": "linear layer",
        "transformer_blocks.0.norm1.linear.bias": "not a matrix",
        "proj_out.weight": "linear layer",
    },
    "flux": {
        "x_embedder.weight": "linear layer",
        "single_transformer_blocks.0.proj_mlp.weight": "linear layer",
        "transformer_blocks.0.attn.norm_q.weight": "not a matrix",
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_swan_from_bare_tensors_trains_a_denoiser_as_the_reference(family, capsys):
    model = denoiser_of(PIPELINES[family]()).double()
    given = "whitening=svd,scale=2.0,adam_lr_ratio=0.5"
    with Replacement.of("swan", given, []).installed():
        optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])
        routes = {row.name: row for row in optimizer.routes()}
        assert {name: routes[name].reason for name in EXPECTED[family]} == EXPECTED[family]
        views = matrices_of(model)
        assert {name for name, row in routes.items() if row.route == "matrix"} == set(views)
        assert {row.route for row in routes.values()} == {"matrix", "adam"}
        assert f"hf-sai: swan: {len(views)} tensors" in capsys.readouterr().err
        params = dict(model.named_parameters())
        arrays = {name: param.detach().numpy().copy() for name, param in params.items()}
        reference = ReferenceSWAN(arrays, views, {**OPTIONS, **BETAS})
        for _ in range(2):
            loss_of(model, family).backward()
            for param in params.values():  # tables of sines leave directions without extent, whose sign is rounding
                if param.grad is not None and param.numel() > 1:
                    param.grad += 0.1 * param.grad.std() * torch.randn_like(param)
            reference.step({name: p.grad.numpy().copy() for name, p in params.items() if p.grad is not None})
            optimizer.step()
            optimizer.zero_grad()
    for name, param in params.items():
        expected = torch.from_numpy(reference.theta[name])
        torch.testing.assert_close(
            param.detach(), expected, rtol=1e-6, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}"
        )


def with_adapter(family):
    """A pipeline whose denoiser has an adapter on its attention, and the adapter's tensors by name."""
    pipeline = PIPELINES[family]()
    model = denoiser_of(pipeline)
    model.requires_grad_(False)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return pipeline, {name: param for name, param in model.named_parameters() if param.requires_grad}


def by_reference(optim, params):
    """One step of the slow reference: from gradients by name to tensors by name."""
    if optim == "swan":
        arrays = {name: param.detach().double().numpy() for name, param in params.items()}
        views = {name: lambda array: [array.T] for name in params if "lora_B" in name}  # A goes to Adam
        swan = ReferenceSWAN(arrays, views, {**OPTIONS, **BETAS})

        def swan_step(gradients):
            swan.step({name: gradient.double().numpy() for name, gradient in gradients.items()})
            return {name: torch.from_numpy(value) for name, value in swan.theta.items()}

        return swan_step
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "eps": 1e-8}
    flat = [param.detach().double().flatten().tolist() for param in params.values()]
    sgd_sai = ReferenceSGDSaI(flat, [options] * len(flat))

    def sgd_sai_step(gradients):
        sgd_sai.step([gradient.double().flatten().tolist() for gradient in gradients.values()])
        values = zip(params.items(), sgd_sai.theta, strict=True)
        return {name: torch.tensor(value, dtype=torch.float64).view_as(param) for (name, param), value in values}

    return sgd_sai_step


@pytest.mark.parametrize("optim", ["sgd_sai", "swan"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_trains_as_the_reference_and_loads_back_into_its_pipeline(family, optim, tmp_path):
    pipeline, params = with_adapter(family)
    model = denoiser_of(pipeline)
    if optim == "sgd_sai":
        optimizer = create_optimizer("sgd_sai", model, lr=0.1, weight_decay=0.1)
    else:
        optimizer = create_optimizer("swan", model, **OPTIONS, whitening="svd")
    before = {name: param.detach().clone() for name, param in params.items()}
    base = predict(denoiser_of(PIPELINES[family]()), family)
    torch.testing.assert_close(predict(model, family), base)  # B is zero
    reference = by_reference(optim, params)
    for _ in range(3):
        loss_of(model, family).backward()
        expected = reference({name: param.grad for name, param in params.items()})
        optimizer.step()
        optimizer.zero_grad()
    for name, param in params.items():
        assert not torch.equal(param, before[name]), name
        torch.testing.assert_close(param.detach().double(), expected[name], rtol=1e-3, atol=1e-5)
    trained = predict(model, family)
    assert (trained - base).abs().max() > 1e-4
    layers = get_peft_model_state_dict(model)
    if family in ("sd", "sdxl"):
        type(pipeline).save_lora_weights(tmp_path, unet_lora_layers=convert_state_dict_to_diffusers(layers))
    else:
        type(pipeline).save_lora_weights(tmp_path, transformer_lora_layers=layers)
    fresh = PIPELINES[family]()
    fresh.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(predict(denoiser_of(fresh), family), trained, rtol=0, atol=1e-6)
