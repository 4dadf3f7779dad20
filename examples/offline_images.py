"""
A Stable Diffusion pipeline and captioned drawings for the example that needs no network.

With `--model_name_or_path` and `--dataset_name` the example uses the Hub instead, and nothing of this file.
"""

from __future__ import annotations

import itertools

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


COLORS = {"red": (214, 40, 40), "green": (40, 160, 70), "blue": (45, 85, 200), "yellow": (245, 200, 30)}
SHAPES = ("circle", "square", "triangle")


def drawings(size: int = 64, background: str = "white") -> list[tuple[Image.Image, str]]:
    """A circle, a square and a triangle in four colours, each with its caption."""
    rows = []
    low, high, middle = size // 5, size - size // 5, size // 2
    for color, shape in itertools.product(COLORS, SHAPES):
        image = Image.new("RGB", (size, size), background)
        draw = ImageDraw.Draw(image)
        if shape == "circle":
            draw.ellipse((low, low, high, high), fill=COLORS[color])
        elif shape == "square":
            draw.rectangle((low, low, high, high), fill=COLORS[color])
        else:
            draw.polygon(((middle, low), (low, high), (high, high)), fill=COLORS[color])
        rows.append((image, f"a {color} {shape}"))
    return rows


def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    """CLIP's with one token per byte, at the end of a word or inside it, and no merges but two."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["t h", "th e</w>"]
    entries = [*characters, *(f"{each}</w>" for each in characters), *(merge.replace(" ", "") for merge in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    pairs = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=length)


def clip_text_config(tokenizer: CLIPTokenizer, width: int = 32) -> CLIPTextConfig:
    """Two layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=width,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def autoencoder(channels: tuple[int, ...] = (8, 16), latent_channels: int = 4) -> AutoencoderKL:
    """Halves the picture as often as there are steps between its channels."""
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=latent_channels,
        norm_num_groups=4,
        layers_per_block=1,
    )


def noise_schedule() -> DDPMScheduler:
    """That of Stable Diffusion."""
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )


def stable_diffusion(
    channels: tuple[int, ...] = (8, 16), vae_channels: tuple[int, ...] = (8, 16), width: int = 32, seed: int = 0
) -> StableDiffusionPipeline:
    """A pipeline with random weights; one of the parts is what the scripts of diffusers load by its folder."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return StableDiffusionPipeline(
        vae=autoencoder(vae_channels),
        text_encoder=CLIPTextModel(clip_text_config(tokenizer, width)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
