"""
The training scripts of a checkout of diffusers, unmodified, with our optimizers, and the table of what came of it.

    python tests/diffusers_scripts.py --examples <checkout>/examples --commit <its commit> docs/diffusers-scripts.md

The scripts want torchvision; docs/diffusers-scripts.md says which one to put beside a torch for CPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


COMMON = "--output_dir={out} --max_train_steps=4 --checkpointing_steps=2 --seed=0"
SMALL = f"{COMMON} --resolution=64 --train_batch_size=2"
MODEL = "--pretrained_model_name_or_path={models}/%s"
PICTURES = "--train_data_dir={data}/pictures"
EDITS = (
    "--train_data_dir={data}/edits --original_image_column=original_image --edited_image_column=edited_image "
    "--edit_prompt_column=edit_prompt"
)
CONDITIONS = "--train_data_dir={data}/conditions"
INSTANCES = "--instance_data_dir={data}/plain --instance_prompt=drawing"
FLUX_CONTROL = (
    "--jsonl_for_train={data}/control.jsonl --image_column=image --conditioning_image_column=conditioning_image "
    "--caption_column=text"
)
OPTIMS = {"sgd_sai": "momentum=0.9,normalize=none", "swan": "lora_whitening=both"}


def _of(pipeline, rest, options=SMALL):
    return f"{MODEL % pipeline} {options} {rest}"


# Script, below examples/, and its own options.
CASES = {
    "text_to_image/train_text_to_image_lora.py": _of("sd", PICTURES),
    "text_to_image/train_text_to_image.py": _of("sd", PICTURES),
    "text_to_image/train_text_to_image_lora_sdxl.py": _of("sdxl", f"{PICTURES} --train_text_encoder"),
    "text_to_image/train_text_to_image_sdxl.py": _of("sdxl", PICTURES),
    "dreambooth/train_dreambooth.py": _of("sd", f"{INSTANCES} --train_text_encoder"),
    "dreambooth/train_dreambooth_lora.py": _of("sd", f"{INSTANCES} --train_text_encoder"),
    "dreambooth/train_dreambooth_lora_sdxl.py": _of("sdxl", f"{INSTANCES} --train_text_encoder"),
    "dreambooth/train_dreambooth_lora_sd3.py": _of("sd3", INSTANCES),
    "dreambooth/train_dreambooth_sd3.py": _of("sd3", INSTANCES),
    "dreambooth/train_dreambooth_lora_flux.py": _of("flux", INSTANCES),
    "dreambooth/train_dreambooth_flux.py": _of("flux", INSTANCES),
    "dreambooth/train_dreambooth_lora_flux_kontext.py": _of("flux", INSTANCES),
    "controlnet/train_controlnet.py": _of("sd", CONDITIONS),
    "controlnet/train_controlnet_sdxl.py": _of("sdxl", CONDITIONS),
    "controlnet/train_controlnet_sd3.py": _of("sd3_deep", CONDITIONS),
    "controlnet/train_controlnet_flux.py": _of("flux", FLUX_CONTROL),
    "textual_inversion/textual_inversion.py": _of(
        "sd", "--train_data_dir={data}/plain --placeholder_token=<thing> --initializer_token=the"
    ),
    "textual_inversion/textual_inversion_sdxl.py": _of(
        "sdxl", "--train_data_dir={data}/plain --placeholder_token=<thing> --initializer_token=the"
    ),
    "instruct_pix2pix/train_instruct_pix2pix.py": _of("sd", EDITS),
    "instruct_pix2pix/train_instruct_pix2pix_sdxl.py": _of("sdxl", EDITS),
    "unconditional_image_generation/train_unconditional.py": (
        "--train_data_dir={data}/plain --output_dir={out} --resolution=32 --train_batch_size=2 --num_epochs=1 "
        "--model_config_name_or_path={models}/sd/unet_plain --checkpointing_steps=2 --ddpm_num_inference_steps=2 "
        "--logger=tensorboard --save_images_epochs=10"
    ),
    "consistency_distillation/train_lcm_distill_lora_sdxl.py": (
        f"--pretrained_teacher_model={{models}}/sdxl {SMALL} {PICTURES}"
    ),
    "advanced_diffusion_training/train_dreambooth_lora_sd15_advanced.py": _of(
        "sd", f"{INSTANCES} --token_abstraction=TOK --train_text_encoder_ti"
    ),
    "advanced_diffusion_training/train_dreambooth_lora_sdxl_advanced.py": _of(
        "sdxl", f"{INSTANCES} --token_abstraction=TOK --train_text_encoder_ti"
    ),
    "advanced_diffusion_training/train_dreambooth_lora_flux_advanced.py": _of(
        "flux", f"{INSTANCES} --token_abstraction=TOK"
    ),
    "custom_diffusion/train_custom_diffusion.py": _of(
        "sd", f"{INSTANCES} --modifier_token=<new1> --initializer_token=the"
    ),
    "flux-control/train_control_lora_flux.py": _of("flux", f"{FLUX_CONTROL} --gaussian_init_lora"),
    "flux-control/train_control_flux.py": _of("flux", FLUX_CONTROL),
}


@dataclass(frozen=True)
class Result:
    """What came of one run."""

    script: str
    optim: str
    steps: int
    ok: bool
    remark: str
    seconds: float  # on a machine that others may use


def run_case(script, optim, examples, root):
    """Runs one script with one of our optimizers on what [`prepare`] wrote to a folder."""
    out = f"{Path(script).stem}-{optim}"  # some scripts make file names of it, so it is no path
    options = CASES[script].format(models=root / "models", data=root / "data", out=out).split()
    command = [sys.executable, "-m", "hf_sai.run", "--optim", optim, "--optim_args", OPTIMS[optim]]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, str(Path(examples) / script), *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=root / "out",
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"},
    )
    seconds = time.perf_counter() - began
    (root / "out" / f"{out}.log").write_text(done.stdout + done.stderr)
    ran = re.search(r"^hf-sai: \w+ ran, (\d+) steps", done.stderr, re.M)
    last = done.stderr.strip().splitlines()[-1:] or [""]
    report = root / "out" / out / "gsnr_report.json"
    ok = done.returncode == 0 and ran is not None and report.is_file()
    return Result(script, optim, int(ran[1]) if ran else 0, ok, "" if ok else last[0][:160], seconds)


def prepare(root):
    """Pipelines and data for all the scripts."""
    from tiny_pipelines import PIPELINES, sd3, unconditional_unet, write_data

    for name, make in PIPELINES.items():
        make().save_pretrained(root / "models" / name)
    sd3(layers=13).save_pretrained(root / "models" / "sd3_deep")  # ControlNet's copy takes the first twelve
    unconditional_unet().save_config(root / "models" / "sd" / "unet_plain")
    write_data(root / "data")
    (root / "out").mkdir()


def table(results, commit):
    """Markdown: one row per script, one column per optimizer."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "accelerate", "peft")}
    scripts = [script for script in CASES if any(result.script == script for result in results)]
    good = [script for script in scripts if all(result.ok for result in results if result.script == script)]
    lines = [
        "# Diffusers' training scripts",
        "",
        f"Written by `tests/diffusers_scripts.py`: the scripts of diffusers' repository at commit `{commit}`, "
        "unmodified, with tiny random pipelines, four steps each on a CPU, through "
        "`hf-sai run --optim ... --optim_args ... script.py ...`. A number of steps is what the launcher said at the "
        "end of a run that ended well and left `gsnr_report.json` in the script's `--output_dir`. Python "
        f"{platform.python_version()}, {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        f"{len(good)} of {len(scripts)} scripts reached their last step with {' and '.join(OPTIMS)}.",
        "",
        f"| script | {' | '.join(f'`{optim}`' for optim in OPTIMS)} |",
        f"| --- |{' --- |' * len(OPTIMS)}",
    ]
    for script in scripts:
        cells = []
        for optim in OPTIMS:
            found = [each for each in results if (each.script, each.optim) == (script, optim)]
            cells += [f"{each.steps} steps" if each.ok else f"no: {each.remark}" for each in found] or ["not run"]
        lines.append(f"| `{script}` | {' | '.join(cells)} |")
    options = " ".join(f"`--optim {optim} --optim_args {given}`" for optim, given in OPTIMS.items())
    lines += [
        "",
        f"Options: {options}; the scripts' own stand in `tests/diffusers_scripts.py`. To run them again:",
        "",
        "<!-- not run: it needs a checkout of diffusers -->",
        "```bash",
        "pip install --no-deps --target tv torchvision==0.16.2  # one that loads beside a torch for CPUs",
        "PYTHONPATH=tv python tests/diffusers_scripts.py --examples diffusers/examples docs/diffusers-scripts.md",
        "DIFFUSERS_EXAMPLES=diffusers/examples PYTHONPATH=tv pytest tests/test_diffusers_scripts.py",
        "```",
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the table")
    parser.add_argument("--examples", required=True, help="folder of a checkout")
    parser.add_argument("--commit", default="unknown", help="of the checkout")
    parser.add_argument("--root", type=Path, help="where to work, and to find what ran before. Default: a new folder")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of scripts")
    args = parser.parse_args()
    root = args.root or Path(tempfile.mkdtemp())
    if not (root / "models").exists():
        prepare(root)
    kept = root / "results.json"
    results = [Result(**row) for row in json.loads(kept.read_text())] if kept.exists() else []
    for script in CASES:
        for optim in OPTIMS if any(part in script for part in args.only) else ():
            results = [each for each in results if (each.script, each.optim) != (script, optim)]
            results.append(run_case(script, optim, args.examples, root))
            kept.write_text(json.dumps([dataclasses.asdict(each) for each in results], indent=1))
            args.output.write_text(table(results, args.commit))


if __name__ == "__main__":
    main()
