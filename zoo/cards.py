"""Writes the model card of every folder of the zoo: what was trained, on what, for how long, and what it measures.

    python -m zoo.cards

Numbers come from the training log (training.json) and from `zoo.measure` (metrics.json); nothing is typed in by hand.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ZOO = Path(__file__).parent

ABOUT = {
    "mini-sd": (
        "StableDiffusionPipeline in miniature",
        "text-to-image",
        "A latent-diffusion UNet pipeline (`StableDiffusionPipeline`): ε-prediction, SD1.5's noise schedule, "
        "classifier-free guidance, 64 × 64 px in 16 × 16 × 4 latents. Its text encoder "
        "starts from the text tower of `zoo/clip`. Trained on the training split only; the six held-out pairs of "
        "shape and colour were never shown to it. The second run had `--muon true --pool 20000 --minutes 114`.",
        "StableDiffusionPipeline.from_pretrained('zoo/mini-sd')",
        "zoo/train_mini_sd.py",
    ),
    "mini-flux": (
        "FluxPipeline and FluxKontextPipeline in miniature",
        "text-to-image",
        "A rectified flow of FLUX's kind: joint and single transformer blocks on packed 2 × 2 latents, rotary "
        "positions, a pooled CLIP text and a T5 encoder with a tokenizer of its own, dynamic shifting. From one set "
        "of weights: 128 × 128 px (256 tokens), 64 × 64 px (64 tokens), and edits in Kontext's way, the picture to "
        "edit as more tokens. Give it the size and `max_sequence_length=32`, its tokenizer's length, since the "
        "pipelines' own defaults are those of the big model; it is guided by `true_cfg_scale` with an empty negative "
        "prompt. Trained on the training split only; the six held-out pairs of shape and colour were never shown "
        "to it. From step 2,650 of the first run on `--large_share 0.6 --edit_share 0.25` replaced the shares of the "
        "command below. The second run: `--start zoo/mini-flux --name mini-flux-2 --minutes 101 --batch_size 96 "
        "--large_share 0.45 --edit_share 0.35 --large_from 0 --edit_from 0 --muon true --warmup_steps 20` and the "
        "same pools. The third: `--start zoo/mini-flux --name mini-flux-3 --minutes 96 --steps 10000 --batch_size 96 "
        "--large_share 0.3 --large_from 0.25 --edit_share 0.25 --edit_from 0.15 --align_weight 0.2 --phrase_weight "
        "0 --muon true --compile true --warmup_steps 20 --pool 60000 --large_pool 8000 --edit_pool 20000`, on cores "
        "that multiply in bfloat16. The fourth: `--name mini-flux-4 --minutes 25 --large_share 0.2 --large_from 0 "
        "--edit_from 0 --phrase_weight 0.2 --learning_rate 7e-4`, the rest as the third, before relative positions "
        "had a rate of their own; its logged loss holds that of the phrases, so it jumps. The fifth: `--name "
        "mini-flux-5 --minutes 119 --edit_share 0.2 --learning_rate 1e-3`, the rest as the fourth; from step 3,348 on "
        "with `--noise_shift 3`, which moves the loss up, from step 6,973 on with `--large_share 0.4`. The "
        "autoencoder had been trained for 15 minutes before, and its decoder alone for 22 minutes of one thread "
        "beside the second run.",
        "FluxPipeline.from_pretrained('zoo/mini-flux')",
        "zoo/train_mini_flux.py --minutes 104 --steps 5000 --pool 16000 --large_pool 3000 --edit_pool 5000",
    ),
    "depth": (
        "Relative inverse depth",
        "depth-estimation",
        "A U-Net of segmentation_models_pytorch, 64 × 64 px to relative inverse depth in (0, 1], nearer is larger. "
        "A measuring instrument: it has seen all pairs of shape and colour. The later runs had `--muon true` and "
        "learning rates of 1e-3 and 6e-4; the first weighed the logarithm of depth a fifth as much as the script does "
        "now.",
        "load_reward('depth', model='zoo/depth')",
        "zoo/train_depth.py",
    ),
    "segmentation": (
        "Shape and colour of every pixel",
        "image-segmentation",
        "A U-Net of segmentation_models_pytorch, 49 classes: background, and 6 shapes × 8 colours. A measuring "
        "instrument: it has seen all pairs of shape and colour. The second run had `--muon true --learning_rate "
        "1e-3`; the first weighed background a quarter as much as the script does now.",
        "load_reward('segmentation', model='zoo/segmentation')",
        "zoo/train_segmentation.py",
    ),
    "clip": (
        "Pictures and captions",
        "zero-shot-image-classification",
        "A `CLIPModel` for 64 × 64 px with a tokenizer of its own. Trained on the training split only, so that the "
        "text encoder of `zoo/mini-sd`, which started from its text tower, has not read of held-out pairs either. The "
        "second run had `--muon true --learning_rate 8e-4`.",
        "load_reward('clip', model='zoo/clip')",
        "zoo/train_clip.py",
    ),
    "dino": (
        "Features without labels",
        "image-feature-extraction",
        "An XCiT of timm (arXiv 2106.09681), trained without labels by contrast of views (arXiv 2002.05709): two "
        "sightings of a solid, before and after its scene was rearranged, or two renders of a whole scene.",
        "load_reward('dino', model='zoo/dino')",
        "zoo/train_dino.py --minutes 45",
    ),
}


SHEETS = {
    "samples.png": "The captions, row by row, are in `samples.txt`.",
    "samples_128.png": "The same captions at 128 × 128 px; the pictures above start from the pooled noise of these.",
    "edits.png": "Pictures to edit, what they should become, and what they became; `edits.txt` has the instructions.",
}


def write_card(name: str) -> None:
    """README.md of a folder, and loss.png beside it."""
    title, task, text, usage, script = ABOUT[name]
    folder = ZOO / name
    training, metrics = (json.loads((folder / f"{part}.json").read_text()) for part in ("training", "metrics"))
    count = training.get("runs", 1)
    runs = f", in {count} runs" if count > 1 else ""
    start = f"`--start {folder.relative_to(ZOO.parent)}`"
    reproduced = f"This command began it, {start} went on" if count > 1 else "One command reproduces it"
    plot_loss(training["log"], folder / "loss.png")
    sheets = "".join(f"\n![{file}]({file})\n\n{text}\n" for file, text in SHEETS.items() if (folder / file).exists())
    (folder / "README.md").write_text(
        f"""---
license: apache-2.0
pipeline_tag: {task}
tags: [miniature, proofsheet]
---

# {title}

{text}

It is for learning, testing and measuring relative effects; nothing about large models follows from it.

    {usage}

## Training

Data: the miniature world of `data/scenes.py`, rendered as training goes. {reproduced}:

    accelerate launch {script}

| | |
|---|---|
| parameters | {training["parameters"]} |
| steps | {training["steps"]:,}{runs} |
| minutes | {training["minutes"]} |
| hardware | {training["hardware"]} |

![loss](loss.png)

## Measured on held-out scenes

{metrics_table(metrics)}

`python -m zoo.measure {name}` measures this again.
{sheets}"""
    )


def plot_loss(log: list[dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5, 2.4), dpi=80)
    axis.plot([row["step"] for row in log], [row["loss"] for row in log], color="#2a5d9f")
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def metrics_table(metrics: dict) -> str:
    rows = ["| | |", "|---|---|"]
    for key, value in metrics.items():
        if isinstance(value, dict):
            rows += [f"| {key}: {kind} | {share} |" for kind, share in value.items()]
        else:
            rows.append(f"| {key} | {value} |")
    return "\n".join(rows)


if __name__ == "__main__":
    for name in ABOUT:
        if (ZOO / name / "metrics.json").exists():
            write_card(name)
