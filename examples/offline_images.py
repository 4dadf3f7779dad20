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


def pretrained(size: int = 32, steps: int = 250, seed: int = 0) -> StableDiffusionPipeline:
    """A pipeline that draws on white paper, more or less: its autoencoder and its denoiser are trained here."""
    pipeline = stable_diffusion(channels=(16, 32), seed=seed)
    images, captions = zip(*drawings(size), strict=True)
    pixels = pipeline.image_processor.preprocess(list(images))
    vae, unet, scheduler = pipeline.vae, pipeline.unet, pipeline.scheduler
    optimizer = torch.optim.AdamW(vae.parameters(), lr=5e-3)
    for _ in range(steps):
        moved = torch.roll(pixels, torch.randint(-4, 5, (2,)).tolist(), (2, 3))[torch.randperm(len(pixels))[:6]]
        loss = (vae.decode(vae.encode(moved).latent_dist.mean).sample - moved).square().mean()
        _step(optimizer, loss)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        latents = latents * vae.config.scaling_factor
        text = pipeline.encode_prompt(list(captions), "cpu", 1, False)[0]
        nothing = pipeline.encode_prompt("", "cpu", 1, False)[0]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(steps):
        chosen = torch.randint(0, len(latents), (8,))
        told = torch.where(torch.rand(8, 1, 1) < 0.1, nothing, text[chosen])  # for guidance
        noise, times = torch.randn_like(latents[chosen]), torch.randint(0, scheduler.config.num_train_timesteps, (8,))
        predicted = unet(scheduler.add_noise(latents[chosen], noise, times), times, told).sample
        _step(optimizer, (predicted - noise).square().mean())
    return pipeline


def _step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
