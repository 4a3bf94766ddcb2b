"""What HiFlow's large pictures are worth, against rendered scenes of the same size.

    python -m benchmarks.hiflow_quality --output runs/hiflow_quality/mini-sd         # 64 -> 128 px
    python -m benchmarks.hiflow_quality --model zoo/mini-flux --sizes 128 256 512 --num_prompts 200 \\
        --guidance_scale 4 --also presets acceleration --output runs/hiflow_quality/mini-flux
    python -m benchmarks.hiflow_quality --also cutoff alpha beta --output runs/hiflow_quality/mini-sd   # sweeps

Prompts are captions of the miniature world's test scenes, and the reference is as many others, rendered at the large
size. Rows: the pipeline by itself; a picture straight from noise, with the changes inside the network; the base
picture enlarged, and sharpened; HiFlow with its initialization, with its direction alignment, and whole. Measured (see
`hiflow_measures`): Fréchet distances in DINO's features, of whole pictures and of 64 px patches; the caption check,
after shrinking to the base's size; correlation of the low band, and of a wider one, with the base picture; sharpness
of edges. Intervals are of paired bootstraps over prompts.

Writes metrics.json, table.md and a contact sheet a size. All rows share one base run, but those that begin from noise
at the large size or take other numbers of steps; finished batches of rows are kept in `cache/`, so that an
interrupted command goes on and a sweep pays for its own rows only.
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from benchmarks.hiflow_measures import PATCH, Looker
from benchmarks.hiflow_report import OTHERS, RENDERED, draw_sheet, summary, table
from benchmarks.hiflow_rows import GROUPS, STOCK, Artist, Row, few_steps, main_rows, variants
from data.command_line import DTYPES
from data.scenes import Scene, caption, render_batch
from evaluation.cache import digest, load, store
from evaluation.rendering import load_pipeline
from evaluation.solvers import describe
from rewards import load_reward
from solver.samplers.digest import reward_digest, weights_digest
from solver.samplers.hiflow import HiFlowResult, Recipe, with_steps
from solver.samplers.hiflow.plan import as_recipe
from solver.samplers.latents import vae_factor

VERSION = 2  # of what is measured: another one makes the cache void
Seen = dict[str, Tensor]


def captioned_scenes() -> Iterator[tuple[Scene, str]]:
    """Test scenes with their captions, as `scenes:test` counts them: none comes twice."""
    known = set()
    for seed in count():
        scene = Scene.random(seed, "test")
        text = caption(scene, random.Random(seed)).text
        if text not in known:
            known.add(text)
            yield scene, text


class Bench:
    """Makes and looks at pictures, batch by batch, and remembers what it saw.

    Args:
        artist: makes them.
        looker: looks at them.
        recipe: of the base run.
        num_prompts, batch_size: of pictures.
        sheet_rows: of how many prompts pictures are kept.
        folder: of the cache.
        facts: what every result depends on, beside the row and the batch.
    """

    def __init__(
        self,
        artist: Artist,
        looker: Looker,
        recipe: Recipe,
        num_prompts: int,
        batch_size: int,
        sheet_rows: int,
        folder: Path,
        facts: dict,
    ):
        self.artist, self.looker, self.recipe = artist, looker, recipe
        self.batch_size, self.sheet_rows, self.folder, self.facts = batch_size, sheet_rows, folder, facts
        # As many again, of other captions, to be the reference: none has a row's own captions.
        scenes, texts = zip(*islice(captioned_scenes(), 2 * num_prompts), strict=True)
        self.scenes, self.others, self.prompts = scenes[:num_prompts], scenes[num_prompts:], texts[:num_prompts]

    def run(self, rows: list[Row]) -> dict[str, Seen]:
        """What was seen of each row, `{size}.{name}` -> (N, ...); of the rendered scenes and of others too."""
        made: dict[str, Row | None] = {RENDERED: None, OTHERS: None, **{row.name: row for row in rows}}
        parts: dict[str, list[Seen]] = {name: [] for name in made}
        start = time.perf_counter()
        for first in range(0, len(self.prompts), self.batch_size):
            numbers = range(first, min(first + self.batch_size, len(self.prompts)))
            base = None
            for name, row in made.items():
                path = self.folder / f"{self._digest(name, row, numbers)}.safetensors"
                if (known := load(path)) is None:
                    base = base or self.artist.base(self.recipe, self._prompts(numbers), numbers)
                    known = self._look(self._pictures(name, row, numbers, base), base.images[0], numbers), {}
                    store(path, *known)
                parts[name].append(known[0])
            minutes = (time.perf_counter() - start) / 60
            print(f"{numbers.stop} of {len(self.prompts)} prompts, {minutes:.1f} minutes", flush=True)
        return {
            name: {key: torch.cat([part[key] for part in seen]) for key in seen[0]} for name, seen in parts.items()
        }

    def _prompts(self, numbers: range) -> list[str]:
        return [self.prompts[number] for number in numbers]

    def _pictures(self, name: str, row: Row | None, numbers: range, base: HiFlowResult) -> list[Tensor]:
        if row is not None:
            return self.artist.draw(row, base, self._prompts(numbers), numbers)
        scenes = [(self.scenes if name == RENDERED else self.others)[number] for number in numbers]
        return [render_batch(scenes, size).image.float() / 255 for size in self.artist.sizes[1:]]

    def _look(self, pictures: list[Tensor], base_BChw: Tensor, numbers: range) -> Seen:
        """What is seen at each size, and the pictures of the first prompts themselves."""
        kept = max(0, self.sheet_rows - numbers.start)
        seen = {"base.shown": _bytes(base_BChw[:kept])}
        for size, images in zip(self.artist.sizes[1:], pictures, strict=True):
            looked = self.looker(images, base_BChw.to(images.device), self._prompts(numbers), numbers)
            seen |= {f"{size}.{key}": value for key, value in looked.items()}
            seen[f"{size}.shown"] = _bytes(images[:kept])
        return seen

    def _digest(self, name: str, row: Row | None, numbers: range) -> str:
        """By what is drawn: two rows with the same numbers are the same pictures, whatever they are called."""
        made = [name] if row is None else [row.alignment, row.alignment and asdict(row.recipe)]
        if row is not None and row.scheduler is not None:
            made.append(describe(row.scheduler, row.recipe.steps))
        here = {"batch": [numbers.start, numbers.stop], "prompts": self._prompts(numbers), "sheet": self.sheet_rows}
        return digest({**self.facts, **here, "base": asdict(self.recipe), "row": made})


def _processor() -> str:
    return f"{platform.machine()} processor, threads: {torch.get_num_threads()}"


def _bytes(images_BCHW: Tensor) -> Tensor:
    return images_BCHW.clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def budget(artist: Artist, rows: list[Row], num_prompts: int) -> str:
    """Evaluations of the network by size, and how long they take; a few are made to know."""
    steps = dict.fromkeys(artist.sizes, 0)
    for row in rows:
        for size, number in artist.evaluations(row):
            steps[size] += number
    steps[artist.sizes[0]] += rows[0].recipe.steps  # shared
    seconds = {size: artist.seconds_per_evaluation(rows[0].recipe, size) for size in steps}
    minutes = num_prompts * sum(number * seconds[size] for size, number in steps.items()) / 60
    words = [f"{num_prompts * n:,} at {size} px ({1 / seconds[size]:.2g} a second)" for size, n in steps.items()]
    return (
        f"Budget: {len(rows)} rows of {num_prompts} pictures; evaluations of the network, guidance included: "
        f"{', '.join(words)}. {minutes:.0f} minutes, less what is in the cache."
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo/mini-sd", help="pipeline: hub id or local folder")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="in pixels, the model's own first")
    parser.add_argument("--num_prompts", type=int, default=200)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--preset", default="code", help="code or paper: the numbers of the main rows")
    parser.add_argument("--also", nargs="+", choices=GROUPS, default=[], help="groups of further rows")
    parser.add_argument("--without_stock", action="store_true", help="leaves out the pipeline's own call")
    parser.add_argument("--solver", help="folder of a learned solver; adds rows of few steps, without and with it")
    parser.add_argument("--steps", type=int, help="of the base; the larger stages keep their share of it")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[3.0], help="one, or one a size")
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--patches", type=int, default=4, help="of a picture")
    parser.add_argument("--sheet_rows", type=int, default=8, help="of the contact sheet")
    parser.add_argument("--dino", default="zoo/dino", help="network of the Fréchet distances")
    parser.add_argument("--segmentation", default="zoo/segmentation", help="network of the caption check")
    parser.add_argument("--device", help="the GPU if there is one, by default")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    args = parser.parse_args(arguments)
    if args.num_prompts < 2 or args.batch_size < 1 or args.patches < 1:
        parser.error("--num_prompts has to be at least 2, --batch_size and --patches at least 1.")
    if len(args.sizes) < 2:
        parser.error(f"--sizes {args.sizes}: the model's own size and a larger one are needed.")
    if min(args.sizes[1:]) < PATCH:
        parser.error(f"--sizes {args.sizes}: patches of {PATCH} px are cut out of all sizes but the first.")
    return args


def main(arguments: list[str] | None = None) -> dict:
    args = parse(arguments)
    pipe = load_pipeline(args.model, args.dtype, args.device)
    recipe = as_recipe(args.preset)
    recipe = recipe if args.steps is None else with_steps(recipe, args.steps)
    guidance = args.guidance_scale if len(args.guidance_scale) > 1 else args.guidance_scale[0]
    artist = Artist(pipe, args.sizes, guidance)
    rows = [*main_rows(recipe), *(row for group in args.also for row in variants(group, recipe, pipe, args.sizes))]
    if args.without_stock:
        rows = [row for row in rows if row.alignment != STOCK]
    if args.solver:
        rows += few_steps(recipe, pipe, args.solver, args.guidance_scale[0])
    dino = load_reward("dino", model=args.dino, device=pipe.device)
    segmentation = load_reward("segmentation", model=args.segmentation, device=pipe.device)
    shape = {"sizes": args.sizes, "guidance_scale": guidance, "patches": args.patches, "dtype": args.dtype}
    networks = {
        "model": weights_digest(pipe),
        "dino": reward_digest(dino),
        "segmentation": reward_digest(segmentation),
    }

    print(budget(artist, rows, args.num_prompts), flush=True)
    bench = Bench(
        artist,
        Looker(dino, segmentation, args.patches, vae_factor(pipe)),
        recipe,
        args.num_prompts,
        args.batch_size,
        args.sheet_rows,
        args.output / "cache",
        {"version": VERSION, "scheduler": describe(pipe.scheduler, recipe.steps), **shape, **networks},
    )
    start = time.perf_counter()
    seen = bench.run(rows)
    probe = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)  # what becomes of a picture's size
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    report = {
        "model": args.model,
        **shape,
        "num_prompts": args.num_prompts,
        "preset": args.preset,
        "recipes": {row.name: asdict(row.recipe) for row in rows if row.alignment},
        "device": torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else _processor(),
        "looked_at": {reward.name: reward.preprocess(probe).shape[-1] for reward in (dino, segmentation)},
        "minutes": (time.perf_counter() - start) / 60,
        **versions,
        "gflops": {str(size): {row.name: artist.gflops(row, size) for row in rows} for size in args.sizes[1:]},
        "results": {str(size): summary(seen, size) for size in args.sizes[1:]},
    }
    text = table(report)
    (args.output / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.output / "table.md").write_text(text + "\n")
    for size in args.sizes[1:]:
        draw_sheet(seen, size, bench.prompts[: args.sheet_rows], args.output / f"contact_sheet_{size}.png")
    print(text)
    return report


if __name__ == "__main__":
    main()
