"""Tiny pipelines of diffusers with random weights, built in code, and drawings to train them on."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast


sys.path.append(str(Path(__file__).parent.parent / "examples"))
from offline_images import (
    autoencoder,
    clip_text_config,
    clip_tokenizer,
    drawings,
    noise_schedule,
    stable_diffusion,
)


VAE = (8, 8, 8, 16)  # divides the picture by 8, as ControlNet needs it


def sd():
    return stable_diffusion(vae_channels=VAE)


def sdxl(seed=0):
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=4,
        sample_size=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        use_linear_projection=True,
    )
    config = clip_text_config(tokenizer)
    return StableDiffusionXLPipeline(
        vae=autoencoder(VAE),
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=noise_schedule(),
    )


def t5(width=32):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5TokenizerFast(vocab=pieces + [(each, -3.0) for each in string.printable[:94]], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return tokenizer, T5EncoderModel(config)


def sd3(layers=2, seed=0):
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    tokenizer_3, text_encoder_3 = t5(width=64)  # the two encoders of CLIP side by side
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
    )
    config = clip_text_config(tokenizer)
    config.projection_dim = 32
    vae = autoencoder(VAE)
    vae.register_to_config(shift_factor=0.06, scaling_factor=1.5)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def flux(seed=0):
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    tokenizer_2, text_encoder_2 = t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=False,
    )
    vae = autoencoder(VAE)
    vae.register_to_config(shift_factor=0.06, scaling_factor=1.5)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=CLIPTextModel(clip_text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


PIPELINES = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def write_data(root, count=8):
    """
    Drawings as scripts read them from a folder: `pictures` (image and text), `plain` (images alone), `conditions`
    (with a conditioning image) and `edits` (two images, and what was edited).
    """
    rows = {"pictures": [], "plain": [], "conditions": [], "edits": []}
    for index, (image, text) in enumerate(drawings()[:count]):
        color, grey = f"{index}.png", f"grey{index}.png"
        rows["pictures"].append({"file_name": color, "text": text})
        rows["conditions"].append({"image_file_name": color, "conditioning_image_file_name": grey, "text": text})
        edit = {"original_image_file_name": grey, "edited_image_file_name": color, "edit_prompt": f"make it {text}"}
        rows["edits"].append(edit)
        for folder in rows:
            (root / folder).mkdir(parents=True, exist_ok=True)
            image.save(root / folder / color)
            if folder in ("conditions", "edits"):
                image.convert("L").convert("RGB").save(root / folder / grey)
    for folder, lines in rows.items():
        if lines:
            (root / folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    control = [
        {
            "image": str(root / "conditions" / row["image_file_name"]),
            "conditioning_image": str(root / "conditions" / row["conditioning_image_file_name"]),
            "text": row["text"],
        }
        for row in rows["conditions"]
    ]
    (root / "control.jsonl").write_text("".join(json.dumps(row) + "\n" for row in control))


def unconditional_unet():
    """For pictures of 32 pixels."""
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
    )
