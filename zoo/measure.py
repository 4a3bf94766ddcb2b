"""Measures the models of the zoo on held-out scenes, and writes what it finds into their folders as metrics.json.

    python -m zoo.measure                       # all of them, 2 CPU cores: 8 minutes
    python -m zoo.measure clip dino             # some
    python -m zoo.measure mini-flux --captions 150      # on fewer pictures than 500; 2 CPU cores: 10 minutes

Everything runs as a user would run it: rewards through `load_reward`, pictures through the pipelines.
"""

import argparse
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, FluxKontextPipeline, FluxPipeline, StableDiffusionPipeline
from torchvision.utils import make_grid, save_image
from tqdm import trange
from transformers import CLIPModel, CLIPProcessor

from data.scenes import (
    COLOURS,
    HELD_OUT_PAIRS,
    NUM_CLASSES,
    QUESTIONS,
    SHAPES,
    Caption,
    Scene,
    caption,
    check,
    check_edit,
    numbered_edit,
    render_batch,
)
from rewards import load_reward
from solver.samplers.calls import encode_sources, guidance, text_length
from solver.samplers.cascade import call_at_size
from solver.samplers.latents import decode, latent_shape, pack, unpack
from zoo.training import BF16, Scenes

ZOO = Path(__file__).parent
TEACHER_STEPS, GUIDANCE = 40, 3.0
FLUX_STEPS, FLUX_GUIDANCE, EDIT_GUIDANCE = 30, 4.0, 2.0  # guidance chosen on the validation split


def images(scenes: list[Scene], size: int = 64) -> torch.Tensor:
    """x_BCHW in [0, 1]."""
    return render_batch(scenes, size).image.float() / 255


def held_out(count: int, split: str = "test") -> tuple[list[Scene], list[Caption]]:
    """Scenes of a split, and one caption each."""
    scenes = [Scene.random(i, split) for i in range(count)]
    return scenes, [caption(scene, random.Random(i)) for i, scene in enumerate(scenes)]


def measure_depth(count: int = 1000) -> dict:
    """Share of pixels within a factor 1.25, and the mean relative error, on relative inverse depth."""
    reward = load_reward("depth", model=str(ZOO / "depth"))
    scenes, _ = held_out(count)
    within, relative = [], []
    for i in range(0, count, 100):
        render = render_batch(scenes[i : i + 100], 64)
        with torch.no_grad():
            depth = reward.network(reward.preprocess(render.image))[:, 0].clamp(min=1e-3)
        ratio = torch.maximum(depth / render.depth, render.depth / depth)
        within.append((ratio < 1.25).float().mean())
        relative.append(((depth - render.depth).abs() / render.depth).mean())
    return {"scenes": count, "delta_1.25": mean(within), "relative_error": mean(relative)}


def measure_segmentation(count: int = 1000) -> dict:
    """Mean intersection over union of the 49 classes at the network's resolution, and caption checks on its maps."""
    reward = load_reward("segmentation", model=str(ZOO / "segmentation"))
    scenes, claims = held_out(count)
    confusion = torch.zeros(NUM_CLASSES**2, dtype=torch.int64)
    answers = []
    for i in range(0, count, 100):
        labels = reward.features(images(scenes[i : i + 100])).long()
        truth = render_batch(scenes[i : i + 100], labels.shape[-1]).segmentation
        confusion += torch.bincount((truth * NUM_CLASSES + labels).flatten(), minlength=NUM_CLASSES**2)
        answers += [check(*pair) for pair in zip(labels, claims[i : i + 100], strict=True)]
    table = confusion.reshape(NUM_CLASSES, NUM_CLASSES).double()
    iou = table.diag() / (table.sum(0) + table.sum(1) - table.diag())
    pixels = float(table.diag().sum() / table.sum())
    return {"scenes": count, "miou": float(iou.nanmean()), "pixel_accuracy": pixels, "check": summary(answers)}


def measure_clip(sets: int = 30, among: int = 64) -> dict:
    """Text-to-image and image-to-text retrieval, top-1 among 64 held-out pairs."""
    clip = CLIPModel.from_pretrained(ZOO / "clip", dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(ZOO / "clip")
    scenes, claims = held_out(sets * among)
    to_image, to_text = [], []
    for i in range(0, len(scenes), among):
        words = [claim.text for claim in claims[i : i + among]]
        pixels = render_batch(scenes[i : i + among], 64).image
        inputs = processor(text=words, images=pixels, padding="max_length", return_tensors="pt")
        with torch.no_grad():
            logits = clip(**inputs).logits_per_text
        same = torch.arange(among)
        to_image.append((logits.argmax(1) == same).float().mean())
        to_text.append((logits.argmax(0) == same).float().mean())
    return {
        "pairs": len(scenes),
        "among": among,
        "text_to_image_top1": mean(to_image),
        "image_to_text_top1": mean(to_text),
    }


def measure_dino(train: int = 6000, test: int = 1500) -> dict:
    """Linear probes of shape and of colour on frozen features of scenes with one solid; training and test scenes.

    Those of training are the repainted ones, where all pairs are equally frequent: a probe that rarely sees a cyan
    ball learns that cyan is no ball.
    """
    reward = load_reward("dino", model=str(ZOO / "dino"))
    known = Scenes(10**9, all_pairs=True)
    x, targets = probe_set(reward, (known[i] for i in itertools.count(step=2)), train)
    y, truth = probe_set(reward, (Scene.random(i, "test") for i in itertools.count()), test)
    result = {"train_scenes": train, "test_scenes": test}
    for name, classes in targets.items():
        predicted = linear_probe(x, classes, y)
        result[f"probe_{name}"] = float((predicted == truth[name]).float().mean())
    return result


def probe_set(reward, scenes: Iterator[Scene], count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features of the first scenes with one solid, and its shape and colour as numbers."""
    scenes = list(itertools.islice((scene for scene in scenes if len(scene.solids) == 1), count))
    x = torch.cat([reward.features(images(scenes[i : i + 250])) for i in range(0, count, 250)])
    return x, {
        "shape": torch.tensor([SHAPES.index(scene.solids[0].shape) for scene in scenes]),
        "colour": torch.tensor([COLOURS.index(scene.solids[0].colour) for scene in scenes]),
    }


def linear_probe(x: torch.Tensor, classes: torch.Tensor, y: torch.Tensor, decay: float = 1e-4) -> torch.Tensor:
    """Multinomial logistic regression on standardised features, by L-BFGS; the classes of y."""
    centre, spread = x.mean(0), x.std(0) + 1e-6
    x, y = (x - centre) / spread, (y - centre) / spread
    probe = torch.nn.Linear(x.shape[1], int(classes.max()) + 1)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(x), classes) + decay * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe(y).argmax(1)


def measure_mini_sd(count: int = 500) -> dict:
    """Reconstruction PSNR of the autoencoder; caption check of 40-step pictures at guidance 3 on held-out captions."""
    pipeline = load_pipeline()
    scenes, claims = held_out(count)
    segmentation = load_reward("segmentation", model=str(ZOO / "segmentation"))
    answers, shown = [], []
    for first, batch in generate(pipeline, [claim.text for claim in claims]):
        labels = segmentation.features(batch)
        answers += [check(*pair) for pair in zip(labels, claims[first : first + len(batch)], strict=True)]
        shown.append(batch)
    novel = [any((p.shape, p.colour) in HELD_OUT_PAIRS for p in claim.phrases) for claim in claims]
    save_image(make_grid(torch.cat(shown)[:48], nrow=12, padding=2), ZOO / "mini-sd" / "samples.png")
    (ZOO / "mini-sd" / "samples.txt").write_text("\n".join(claim.text for claim in claims[:48]) + "\n")
    return {
        "captions": count,
        "steps": TEACHER_STEPS,
        "guidance_scale": GUIDANCE,
        "vae_psnr": vae_psnr(pipeline.vae, scenes),
        "check": summary(answers),
        "check_held_out_pairs": summary([a for a, is_novel in zip(answers, novel, strict=True) if is_novel]),
        "check_seen_pairs": summary([a for a, is_novel in zip(answers, novel, strict=True) if not is_novel]),
    }


def load_pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(ZOO / "mini-sd", dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, prompts: list[str], batch: int = 50) -> Iterator[tuple[int, torch.Tensor]]:
    """(number of the first, images in [0, 1]) of batches of pictures; prompt number n has seed n."""
    for first in trange(0, len(prompts), batch, desc="pictures", mininterval=10):
        words = prompts[first : first + batch]
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(words))]
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            yield (
                first,
                pipeline(
                    words,
                    num_inference_steps=TEACHER_STEPS,
                    guidance_scale=GUIDANCE,
                    generator=generators,
                    output_type="pt",
                )
                .images.float()
                .clamp(0, 1),
            )


def measure_mini_flux(count: int = 500, unrelated: int = 200) -> dict:
    """Autoencoder, caption checks at both sizes, edits, and how alike the two sizes of one seed are.

    `reach` is what the checks say of the true scenes after the autoencoder: of a flow that drew them exactly.
    The small picture of a prompt starts from the pooled noise of its large one: means of 2 x 2 latents, times 2. An
    unrelated one has another seed. `same_scene` is the share of pixels that two pictures show of one class, over all
    pixels that show a solid in either.
    """
    unrelated = min(unrelated, count)
    pipeline = open_flux(FluxPipeline)
    scenes, claims = held_out(count)
    prompts = [claim.text for claim in claims]
    segmentation = load_reward("segmentation", model=str(ZOO / "segmentation"))
    large_noise = torch.cat([seeded_noise(pipeline, seed, 128) for seed in range(count)])
    other_noise = torch.cat([seeded_noise(pipeline, seed, 128) for seed in range(count, count + unrelated)])
    drawn = {
        "128": draw_flux(pipeline, prompts, large_noise, 128),
        "64": draw_flux(pipeline, prompts, pooled(large_noise), 64),
        "other": draw_flux(pipeline, prompts[:unrelated], pooled(other_noise), 64),
    }
    labels = {name: in_batches(segmentation.features, shown) for name, shown in drawn.items()}
    related = same_scene(labels["64"], labels["128"])
    other = same_scene(labels["other"], labels["128"][:unrelated])
    folder = ZOO / "mini-flux"
    for name, file in (("64", "samples.png"), ("128", "samples_128.png")):
        save_image(make_grid(drawn[name][:48], nrow=12, padding=2), folder / file)
    (folder / "samples.txt").write_text("\n".join(prompts[:48]) + "\n")
    return {
        "captions": count,
        "steps": FLUX_STEPS,
        "guidance_scale": FLUX_GUIDANCE,
        "guidance_scale of edits": EDIT_GUIDANCE,
        "vae_psnr_64": vae_psnr(pipeline.vae, scenes, 64),
        "vae_psnr_128": vae_psnr(pipeline.vae, scenes[: count // 2], 128),
        "check_64": summary([check(*pair) for pair in zip(labels["64"], claims, strict=True)]),
        "check_128": summary([check(*pair) for pair in zip(labels["128"], claims, strict=True)]),
        "same_scene": float(related.mean()),
        "same_scene_unrelated_seed": float(other.mean()),
        "related_seed_closer": float((related[:unrelated] > other).float().mean()),
        "edits": measure_edits(segmentation, count),
        "reach": measure_reach(pipeline.vae, segmentation, count),
    }


def measure_reach(vae, segmentation, count: int) -> dict:
    """Checks of true scenes and of true edits that have only been through the autoencoder."""
    scenes, claims = held_out(count)
    found = {}
    for size in (64, 128):
        labels = in_batches(lambda x: segmentation.features(through(vae, x)), images(scenes, size))
        found[f"check_{size}"] = summary([check(*pair) for pair in zip(labels, claims, strict=True)])["questions"]
    _, before, after = zip(*(numbered_edit(i, "test") for i in range(count)), strict=True)
    drawn = in_batches(lambda x: through(vae, x), images(list(after)))
    labels = in_batches(segmentation.features, drawn)
    answers = [check_edit(*row) for row in zip(drawn, labels, before, after, strict=True)]
    return found | {"edits": share([all(answer.values()) for answer in answers])}


def measure_edits(segmentation, count: int) -> dict:
    """Held-out edits at 64 px: shares of those that are done, that leave the rest untouched, and both; by kind too."""
    pipeline = open_flux(FluxKontextPipeline)
    instructions, before, after = zip(*(numbered_edit(i, "test") for i in range(count)), strict=True)
    sources = images(list(before))
    noise = torch.cat([seeded_noise(pipeline, seed, 64) for seed in range(count)])
    drawn = draw_flux(pipeline, list(instructions), noise, 64, sources)
    labels = in_batches(segmentation.features, drawn)
    answers = [check_edit(*row) for row in zip(drawn, labels, before, after, strict=True)]
    kinds = defaultdict(list)
    for instruction, answer in zip(instructions, answers, strict=True):
        kinds[instruction.split()[0]].append(all(answer.values()))
    rows = torch.stack([sources[:16], images(list(after[:16])), drawn[:16]]).flatten(0, 1)
    save_image(make_grid(rows, nrow=16, padding=2), ZOO / "mini-flux" / "edits.png")
    (ZOO / "mini-flux" / "edits.txt").write_text("\n".join(instructions[:16]) + "\n")
    return {
        "success": share([all(answer.values()) for answer in answers]),
        **{name: share([answer[name] for answer in answers]) for name in ("done", "untouched")},
        **{f"success of '{kind} ...'": share(kinds[kind]) for kind in sorted(kinds)},
    }


def open_flux(pipeline_class):
    pipeline = pipeline_class.from_pretrained(ZOO / "mini-flux", dtype=torch.float32)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded_noise(pipeline, seed: int, size: int) -> torch.Tensor:
    """Noise (1, C, H, W) of a picture of `size` pixels."""
    return torch.randn(1, *latent_shape(pipeline, size, size), generator=torch.Generator().manual_seed(seed))


def pooled(noise_BCHW: torch.Tensor) -> torch.Tensor:
    """Noise of half the size, of unit variance again."""
    return 2 * F.avg_pool2d(noise_BCHW, 2)


def draw_flux(pipeline, prompts: list[str], noise_BCHW: torch.Tensor, size: int, sources=None) -> torch.Tensor:
    """Pictures x_BCHW in [0, 1] on the CPU; edits of `sources` where they are given."""
    batch = 250 if torch.cuda.is_available() else 50
    shown = []
    for first in trange(0, len(prompts), batch, desc=f"{size} px", mininterval=10):
        words, noise = prompts[first : first + batch], noise_BCHW[first : first + batch]
        call = {
            "prompt": words,
            "latents": pack(pipeline, noise),
            "num_inference_steps": FLUX_STEPS,
            **guidance(pipeline, FLUX_GUIDANCE if sources is None else EDIT_GUIDANCE, [""] * len(words)),
            **text_length(pipeline),
        }
        if sources is not None:
            call["image"] = encode_sources(pipeline, sources[first : first + batch])
        latents = pipeline(**call_at_size(pipeline, call, size, size))[0]
        shown.append(decode(pipeline, unpack(pipeline, latents, noise.shape[1:])).cpu())
    return torch.cat(shown)


def in_batches(function, rows: torch.Tensor, size: int = 100) -> torch.Tensor:
    return torch.cat([function(part).cpu() for part in rows.split(size)])


def same_scene(labels_BHW: torch.Tensor, others_BHW: torch.Tensor) -> torch.Tensor:
    """Share of the pixels that show a solid in either map where both show one of the same class, (B,)."""
    solid = (labels_BHW > 0) | (others_BHW > 0)
    same = (labels_BHW == others_BHW) & solid
    return same.flatten(1).sum(1) / solid.flatten(1).sum(1).clamp(min=1)


def share(answers: list[bool]) -> float:
    return round(sum(answers) / max(len(answers), 1), 4)


@torch.no_grad()
def through(vae, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1], encoded and decoded."""
    x = 2 * images_BCHW.to(vae.device) - 1
    return (vae.decode(vae.encode(x).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1)


def vae_psnr(vae, scenes: list[Scene], size: int = 64) -> float:
    """Mean over images of the PSNR of encoding and decoding, in decibels."""
    values = []
    for i in range(0, len(scenes), 50):
        x = images(scenes[i : i + 50], size)
        values.append(-10 * torch.log10((through(vae, x).cpu() - x).square().mean((1, 2, 3))))
    return float(torch.cat(values).mean())


def summary(answers: list[dict[str, bool]]) -> dict:
    """Share of right answers: of all questions, of each kind, and of captions with every answer right."""
    kinds = {kind: [a[kind] for a in answers if kind in a] for kind in QUESTIONS}
    every = [value for values in kinds.values() for value in values]
    shares = {kind: round(sum(values) / len(values), 4) for kind, values in kinds.items() if values}
    whole = sum(all(a.values()) for a in answers) / max(len(answers), 1)
    return {"questions": round(sum(every) / max(len(every), 1), 4), **shares, "whole_caption": round(whole, 4)}


def mean(values: list[torch.Tensor]) -> float:
    return float(torch.stack(values).mean())


MEASURES = {
    "depth": measure_depth,
    "segmentation": measure_segmentation,
    "clip": measure_clip,
    "dino": measure_dino,
    "mini-sd": measure_mini_sd,
    "mini-flux": measure_mini_flux,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m zoo.measure", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MEASURES)}; all by default")
    parser.add_argument("--captions", type=int, default=500, help="held-out ones, of the pipelines")
    given = parser.parse_args()
    if unknown := [name for name in given.models if name not in MEASURES]:
        parser.error(f"{unknown[0]!r}: expected some of {', '.join(MEASURES)}.")
    if given.captions < 1:
        parser.error(f"--captions {given.captions}: expected at least 1.")
    for name in given.models or MEASURES:
        count = {"count": given.captions} if name.startswith("mini") else {}
        metrics = MEASURES[name](**count)
        metrics = {key: round(value, 4) if isinstance(value, float) else value for key, value in metrics.items()}
        (ZOO / name / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        print(name, json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
