"""Previews of zoo/mini-sd beside its full renders: a contact sheet, and how alike they are.

    python -m zoo.demo                   # what `make demo` runs; 2 CPU cores: 2 minutes

Each row of the sheet is one prompt and one seed; the columns are the second-order multistep DPM-Solver in 3, 5, 8 and
40 steps from the same noise. The table compares each preview with its 40-step picture.
"""

import argparse
import time
from pathlib import Path

import torch

from rewards import load_reward
from solver.contact_sheet import save_contact_sheet
from zoo.measure import GUIDANCE, TEACHER_STEPS, ZOO, check, held_out, load_pipeline, summary

PREVIEW_STEPS = (3, 5, 8)
REWARDS = {"pixels": None, "depth": "depth", "dino": "dino", "clip": "clip", "segmentation": "segmentation"}


def render(pipeline, prompts: list[str], steps: int) -> tuple[torch.Tensor, float]:
    """Pictures x_BCHW in [0, 1], prompt number n from seed n, and the seconds that one took."""
    generators = [torch.Generator().manual_seed(n) for n in range(len(prompts))]
    start = time.perf_counter()
    images = pipeline(
        prompts, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators, output_type="pt"
    ).images
    return images.float().clamp(0, 1), (time.perf_counter() - start) / len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=48, help="held-out captions to compare on")
    parser.add_argument("--rows", type=int, default=8, help="rows of the contact sheet")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder to write to")
    args = parser.parse_args()

    pipeline = load_pipeline()
    captions = held_out(args.prompts)[1]
    words = [caption.text for caption in captions]
    rendered = {steps: render(pipeline, words, steps) for steps in (*PREVIEW_STEPS, TEACHER_STEPS)}
    full, full_seconds = rendered[TEACHER_STEPS]

    rewards = [load_reward(name, model and str(ZOO / model)) for name, model in REWARDS.items()]
    targets = {reward.name: reward.features(full) for reward in rewards}
    segmentation = rewards[-1]
    print(f"{len(words)} held-out prompts, guidance {GUIDANCE:g}, against the same noise in {TEACHER_STEPS} steps")
    print(
        "| steps | " + " | ".join(REWARDS) + " | caption check | of the time |\n" + "|---" * (len(REWARDS) + 3) + "|"
    )
    for steps, (images, seconds) in rendered.items():
        scores = [float(r.similarity(r.features(images), targets[r.name]).mean()) for r in rewards]
        labels = segmentation.features(images)
        right = summary([check(*pair) for pair in zip(labels, captions, strict=True)])["questions"]
        cells = ["" if steps == TEACHER_STEPS else f"{score:.2f}" for score in scores]
        print(f"| {steps} | " + " | ".join(cells) + f" | {right:.2f} | {seconds / full_seconds:.0%} |")

    path = args.output / "contact_sheet.png"
    save_contact_sheet({f"{steps} steps": images[: args.rows] for steps, (images, _) in rendered.items()}, path)
    print("\n".join(["", "The rows of the sheet:", *words[: args.rows], ""]))
    print(f"Look at {path}")


if __name__ == "__main__":
    main()
