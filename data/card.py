"""The dataset card: what someone who finds the folder, or its copy on the hub, needs to know."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.build import Report

CARD = """\
---
task_categories: [text-to-image]
tags: [proofsheet, diffusers, consistency-solver]
configs:
- config_name: default
  data_files: shard-*.parquet
---

# Full-step pictures of {model}

{report.rows} rows, one for each (prompt, seed): the picture that {steps} steps of {scheduler} make of it, \
{width} x {height} pixels, {dtype}, guidance scale {guidance}. {count} prompts from `{source}`. Left out: \
{report.empty} empty and {report.duplicates} repeated prompts, {report.not_finite} rows with NaN or infinite latents. \
`teacher.json` has all the rest.

| column | content |
|---|---|
| `prompt`, `seed`, `guidance_scale` | what was asked for |
{edited}| `target` | the picture, PNG |
| `target_latents`, `latent_shape` | its latents as the denoiser sees them, raw float16, and their (C, H, W) |
| `noise_check` | first values of the initial noise, which the seed gives back |
{features}
```python
from data.dataset import PreviewDataset

dataset = PreviewDataset("path/of/this/folder")
dataset[0]["target"], dataset.noise([dataset[0]["seed"]])
```
"""
SOURCE = "| `source` | the picture that the prompt is to change, PNG |\n"
FEATURES = "| `features_{name}` | what the {name} reward sees in the picture, raw {dtype}, {shape} |\n"


def dataset_card(description: dict, report: "Report") -> str:
    """The text of README.md.

    Args:
        description: content of teacher.json.
        report: of the finished build. Which run rendered a shard is left out: the card is the same after a resume.
    """
    rewards = description["rewards"].items()
    between, scales = description["guidance_range"], description["guidance_scale"]
    return CARD.format(
        model=description["model"],
        report=report,
        steps=description["num_inference_steps"],
        scheduler=description["scheduler"]["_class_name"],
        width=description["width"],
        height=description["height"],
        dtype=description["dtype"],
        guidance=f"{between[0]} to {between[1]} by {description['guidance_step']}"
        if between
        else ", ".join(map(str, scales)),
        count=description["prompts"]["count"],
        source=description["prompts"]["source"],
        edited=SOURCE if description["prompts"].get("edits") else "",
        features="".join(FEATURES.format(name=name, **layout) for name, layout in rewards),
    )
