"""
Teaches Stable Diffusion a style with a LoRA adapter and SGD-SaI or SWAN: a loop of accelerate, and no trainer.

Without arguments it runs offline, in about a minute on two cores: it pre-trains a tiny pipeline on drawings on white
paper, then adapts it to the same on black paper:

    python examples/train_text_to_image_lora.py

With a model of the Hub, and a data set of the Hub or a folder of images with a `metadata.jsonl`:

    python examples/train_text_to_image_lora.py --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --dataset_name folder_of_images --resolution 512 --max_train_steps 1000 --checkpointing_steps 250

Goes on from its last checkpoint with `--resume_from_checkpoint latest`, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import make_image_grid
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from tqdm.auto import tqdm
from transformers import HfArgumentParser

import hf_sai
from hf_sai.hub.card import update_card
from hf_sai.hub.push import push_folder
from trainer_patches import parse_optim_args


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
CONVOLUTIONS = ["conv_in", "conv1", "conv2", "proj_in", "proj_out", "conv_out"]
TARGETS = [*ATTENTION, *CONVOLUTIONS]  # for a large model attention alone is usual, and enough


@dataclass
class Arguments:
    """What to adapt, to what, and how."""

    output_dir: str = field(default="demo_output/text_to_image_lora", metadata={"help": "Adapter, report and card."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of a Stable Diffusion. Default: a tiny one, pre-trained here."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of images with captions. Default: drawings on black paper."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    caption_column: str = field(default="text", metadata={"help": "Column of the captions."})
    resolution: int = field(default=32, metadata={"help": "Images are resized to so many pixels, square."})
    optim: str = field(default="sgd_sai", metadata={"help": "Name of an optimizer; `hf-sai list` shows them."})
    optim_args: str | None = field(default=None, metadata={"help": "Its options: name=value,name=value."})
    learning_rate: float = field(default=0.3, metadata={"help": "For a large model start at 0.1, for SWAN at 3e-4."})
    lora_r: int = field(default=4, metadata={"help": "Rank of the adapter."})
    train_batch_size: int = field(default=4, metadata={"help": "Images per step and process."})
    max_train_steps: int = field(default=60, metadata={"help": "Optimizer steps."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to it."})
    checkpointing_steps: int = field(default=30, metadata={"help": "Every so often a checkpoint is written."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "A checkpoint's folder, or `latest`."})
    validation_images: int = field(default=4, metadata={"help": "So many captions are drawn before and after."})
    validation_steps: int = field(default=20, metadata={"help": "Denoising steps of a validation image."})
    pretrain_steps: int = field(default=250, metadata={"help": "Steps of the offline pipeline's pre-training."})
    seed: int = field(default=0, metadata={"help": "Of all that is random."})
    push_to_hub: bool = field(default=False, metadata={"help": "Whether to push the folder when it is done."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Where to. Default: the folder's name."})


class AdapterState:
    """What a checkpoint keeps of the model: the adapter alone."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet

    def state_dict(self) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(self.unet)

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        set_peft_model_state_dict(self.unet, state_dict)


def load(args: Arguments) -> tuple[StableDiffusionPipeline, list[tuple[Image.Image, str]] | Any]:
    """The pipeline, and rows of image and caption that are read when they are asked for."""
    if args.model_name_or_path is None:
        import offline_images

        pipeline = offline_images.pretrained(args.resolution, args.pretrain_steps, args.seed)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(args.model_name_or_path)
    if args.dataset_name is None:
        import offline_images

        return pipeline, offline_images.drawings(args.resolution, background="black")
    rows = load_dataset(args.dataset_name, split="train")
    return pipeline, _Rows(rows, args.image_column, args.caption_column)


@dataclass
class _Rows:
    rows: Any
    image: str
    caption: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        row = self.rows[index]
        return row[self.image], row[self.caption]


def loss_at(step: int, pipeline: StableDiffusionPipeline, unet: Any, rows: Any, args: Arguments, process: int) -> Any:
    """
    Noise is put on some images, and predicted. Images, noise and times follow from the number of the step, so that a
    resumed run sees what the uninterrupted one would have seen.
    """
    generator = torch.Generator().manual_seed((args.seed * 100_003 + step) * 1_009 + process)
    chosen = torch.randint(len(rows), (args.train_batch_size,), generator=generator).tolist()
    images, captions = zip(*(rows[index] for index in chosen), strict=True)
    device = pipeline.vae.device
    pixels = pipeline.image_processor.preprocess(
        [image.convert("RGB") for image in images], height=args.resolution, width=args.resolution
    )
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels.to(device)).latent_dist.mean * pipeline.vae.config.scaling_factor
        text = pipeline.encode_prompt(list(captions), device, 1, False)[0]
    noise = torch.randn(latents.shape, generator=generator).to(device)
    times = torch.randint(pipeline.scheduler.config.num_train_timesteps, (len(images),), generator=generator)
    noisy = pipeline.scheduler.add_noise(latents, noise, times.to(device))
    return torch.nn.functional.mse_loss(unet(noisy, times.to(device), text).sample, noise)


def draw(pipeline: StableDiffusionPipeline, rows: Any, args: Arguments) -> list[Image.Image]:
    """One image for each of the first captions, from the same noise every time."""
    scheduler, pipeline.scheduler = pipeline.scheduler, DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    captions = [rows[index][1] for index in range(min(args.validation_images, len(rows)))]
    images = pipeline(
        captions,
        num_inference_steps=args.validation_steps,
        height=args.resolution,
        width=args.resolution,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(args.seed),
    ).images
    pipeline.scheduler = scheduler
    return images


def save(pipeline: StableDiffusionPipeline, unet: Any, optimizer: Any, drawn: list[Any], args: Arguments) -> Any:
    """Adapter, report with its picture, validation images and model card, in one folder that can be pushed."""
    folder = Path(args.output_dir)
    # In PEFT's names: those of diffusers lose the attention layers where an adapter has others too.
    pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    report = hf_sai.GSNRReport.from_optimizer(optimizer, {"effective_batch_size": args.train_batch_size})
    report.save(folder)
    if drawn:
        images = [image.resize((128, 128)) for image in drawn]
        make_image_grid(images, rows=2, cols=len(images) // 2).save(folder / "validation.png")
    data = ModelCardData(
        library_name="diffusers",
        base_model=args.model_name_or_path,
        tags=["lora", "text-to-image", "stable-diffusion"],
    )
    shown = "\n\n![Before (above) and after (below)](validation.png)" if drawn else ""
    name = args.model_name_or_path or "a tiny pipeline"
    card = (
        f"---\n{data.to_yaml()}\n---\n\n# LoRA text-to-image adapter\n\nOf {name}, with rank {args.lora_r}.{shown}\n"
    )
    ModelCard(card).save(folder / "README.md")
    update_card(folder / "README.md", report, earlier="")
    return report


def resume_step(args: Arguments, accelerator: Accelerator) -> int:
    """Loads a checkpoint where one is asked for, and says after which step it was written."""
    if args.resume_from_checkpoint is None:
        return 0
    folder = Path(args.resume_from_checkpoint)
    if args.resume_from_checkpoint == "latest":
        found = sorted(Path(args.output_dir).glob("checkpoint-*"), key=lambda each: int(each.name.split("-")[1]))
        if not found:
            raise SystemExit(f"There is no checkpoint in {args.output_dir}; leave --resume_from_checkpoint out.")
        folder = found[-1]
    accelerator.load_state(str(folder))
    return int(folder.name.split("-")[1])


def train(args: Arguments) -> list[float]:
    """Trains, saves, and returns the loss of every step."""
    accelerator = Accelerator(project_dir=args.output_dir)
    set_seed(args.seed)
    pipeline, rows = load(args)
    pipeline.to(accelerator.device)
    unet = pipeline.unet
    before = draw(pipeline, rows, args) if args.validation_images and accelerator.is_main_process else []
    for part in (pipeline.vae, pipeline.text_encoder, unet):
        part.requires_grad_(False)
    set_seed(args.seed)  # the adapter's first weights are random
    unet.add_adapter(LoraConfig(r=args.lora_r, lora_alpha=args.lora_r, target_modules=TARGETS))
    options = parse_optim_args(args.optim_args)
    optimizer = hf_sai.create_optimizer(args.optim, unet, lr=args.learning_rate, weight_decay=0.0, **options)
    wrapped, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(AdapterState(unet))
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    first, losses = resume_step(args, accelerator), []
    wrapped.train()
    progress = tqdm(range(first, args.max_train_steps), disable=not accelerator.is_main_process)
    for step in progress:
        loss = loss_at(step, pipeline, wrapped, rows, args, accelerator.process_index)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_([p for p in unet.parameters() if p.requires_grad], args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
        if (step + 1) % args.checkpointing_steps == 0:
            accelerator.save_state(f"{args.output_dir}/checkpoint-{step + 1}")
    if accelerator.is_main_process:
        unet.eval()
        drawn = before + draw(pipeline, rows, args) if args.validation_images else []
        report = save(pipeline, unet, optimizer.optimizer, drawn, args)
        print(f"\n{report.to_text()}\n\nAdapter, report, images and card are in {args.output_dir}.")
        if args.push_to_hub:
            name = args.hub_model_id or Path(args.output_dir).name
            print(f"Pushed: {push_folder(args.output_dir, name).commit_url}")
    accelerator.end_training()
    return losses


def main() -> None:
    """Reads the command line and trains."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    train(args)


if __name__ == "__main__":
    main()
