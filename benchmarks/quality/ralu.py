"""What RALU's pictures are worth, against fewer steps, Bottleneck Sampling and naive upsampling at equal FLOPs.

    python -m benchmarks.quality.ralu                                       # 15 minutes on 2 CPU cores
    python -m benchmarks.quality.ralu --num_prompts 500                     # the table of record, 1.5 hours
    python -m benchmarks.quality.ralu --num_prompts 200 --ablations         # what each choice does, 1.5 hours
    python -m benchmarks.quality.ralu --dtype bfloat16                      # half of that where the CPU knows the type

128 px on zoo/mini-flux and held-out captions, the low stage at 64 px; the presets are solved anew for the shift that
its scheduler really uses. Caption check, Fréchet distances in DINO's features (to the full run's pictures and to
rendered scenes), and consistency with the full run of the same seed; and, stage by stage, what RALU's loss is made of.
GFLOPs, at which rivals are equal, are the denoiser's; RALU also decodes its small picture to find edges, and what that
costs stands beside the presets.
Writes metrics.json, table.md, figure.png and contact_sheet.png; finished rows are kept.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.quality.command import finish, open_instruments, open_model, parser_of, run
from benchmarks.quality.lines import lines_of, network_of_pipeline
from benchmarks.quality.study import Batch, Drawn, Row
from data.scenes import Scene, render_batch
from evaluation.instruments import Instruments
from solver.samplers.calls import branches
from solver.samplers.cost import evaluation_flops, image_tokens
from solver.samplers.latents import decode, latent_shape
from solver.samplers.ralu import rivals
from solver.samplers.ralu.plan import as_schedule, stage_tokens
from solver.samplers.ralu.sampler import PUBLISHED, Choices, ralu
from solver.samplers.ralu.schedule import (
    PRESETS,
    Z_MIN,
    Schedule,
    published_search,
    scheduler_shift,
    sigma_grid,
    solve,
)

FULL, PLAIN, NAIVE, BOTTLENECK, RALU = "full run", "plain", "naive upsampling", "Bottleneck", "RALU"
SHOWN = ("4x", "5x", "7x")
# Rivals at the FLOPs of these presets. Bottleneck's nominal steps: its own setting, and that of RALU's 7x table.
RIVALLED = {"4x": (4, 13, 8), "7x": (3, 8, 4)}
STAGED = ("4x", "7x")  # whose loss is shown stage by stage
NAIVE_END = 0.3  # RALU's first stage ends there too
ABLATED = "4x"
LEAST_Z = "Z = 2"
ABLATIONS = {
    "luma clipped": {"luma": "clipped"},
    "noise of untouched tokens not scaled": {"scaled_noise": False},
    "anchor in the corner": {"anchor": "corner"},
    "copies of whole tokens": {"copy": "token"},
    "positions in full units": {"units": "full"},
    "Sobel in latent space": {"edges": "sobel"},
    "random cells": {"edges": "random"},
    "predicted picture and new noise": {"lift": True},
    "all as published": asdict(PUBLISHED),
}
RATIOS = (0.1, 0.2, 0.4, 0.5)
DISTANCES = (0.026, 0.032, 0.04)  # of the smallest Z that comes so close; the best that there is at 4x is 0.016


@dataclass
class Painter:
    """Makes the rows' pictures.

    Attributes:
        pipe: of a family that RALU knows.
        size: of the pictures, in pixels.
    """

    pipe: DiffusionPipeline
    size: int

    def __post_init__(self):
        self.network = network_of_pipeline(self.pipe)
        self.tokens = image_tokens(self.network, self.size, self.size)
        self.shift = scheduler_shift(self.pipe.scheduler, self.tokens)

    def row(self, name: str, curve: str, function, against: str | None = None, in_sheet=True, **arguments) -> Row:
        """A row of one of the rivals, or of RALU."""

        def draw(batch: Batch) -> Drawn:
            size = {"height": self.size, "width": self.size}
            return Drawn(function(self.pipe, None, batch.seeds, call=batch.call, **size, **arguments).images_BCHW)

        facts = {name: asdict(x) if isinstance(x, Schedule | Choices) else x for name, x in arguments.items()}
        facts |= {"function": function.__name__, "size": self.size}
        return Row(name, curve, draw, facts, against, in_sheet)

    def steps_of(self, evaluations: Sequence[tuple[int, int]]) -> float:
        """FLOPs of pairs (image tokens, steps), in steps of the full size."""
        total = sum(steps * evaluation_flops(self.network, tokens) for tokens, steps in evaluations)
        return total / evaluation_flops(self.network, self.tokens)

    def schedule_steps(self, schedule: Schedule) -> float:
        return self.steps_of(list(zip(stage_tokens(schedule, self.tokens), schedule.steps, strict=True)))

    def small_decoding_steps(self, guidance_scale: float) -> float:
        """FLOPs of decoding the small picture, counted, in guided steps of the full size."""
        small = torch.zeros(1, *latent_shape(self.pipe, self.size // 2, self.size // 2))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            decode(self.pipe, small)
        step = branches(self.pipe, guidance_scale) * evaluation_flops(self.network, self.tokens)
        return counter.get_total_flops() / step

    def naive_steps(self, cost: float) -> tuple[int, int]:
        """Steps of the small and the full part of a naive run at this cost, as dense as those of a plain run."""
        parts = [len([t for t in sigma_grid(1.0, 0.0, self.shift, 1000) if t > 1 - NAIVE_END]) / 1000]
        candidates = [(max(1, round(parts[0] * n)), max(1, n - round(parts[0] * n))) for n in range(2, 200)]
        return min(
            candidates, key=lambda n: abs(self.steps_of([(self.tokens // 4, n[0]), (self.tokens, n[1])]) - cost)
        )


def rows_of(paint: Painter, full_steps: int, schedules: dict[str, Schedule], ablations: bool) -> list[Row]:
    """The rows of the table, the full run first."""
    rows = [paint.row(FULL, FULL, rivals.plain, steps=full_steps)]
    for preset, schedule in schedules.items():
        mine = f"{RALU} {preset}"
        rows.append(paint.row(mine, RALU, ralu, preset=schedule, choices=Choices()))
        if preset in STAGED:
            rows += _stages(paint, preset, schedule)
        if preset not in RIVALLED:
            continue
        cost = paint.schedule_steps(schedule)
        plain, naive, bottleneck = round(cost), paint.naive_steps(cost), RIVALLED[preset]
        rows += [
            paint.row(f"{PLAIN}, {plain} steps", PLAIN, rivals.plain, mine, steps=plain),
            paint.row(f"{BOTTLENECK} {bottleneck}", BOTTLENECK, rivals.bottleneck, mine, steps=bottleneck),
            paint.row(f"{NAIVE} {naive}", NAIVE, rivals.naive, mine, False, steps=naive, end=NAIVE_END),
        ]
    return rows + (_ablations(paint, schedules[ABLATED]) if ablations else [])


def _stages(paint: Painter, preset: str, schedule: Schedule) -> list[Row]:
    """What the loss is made of, each row compared with the next: other grids and restarts; a small first stage; mixed
    sizes in the second, which is RALU."""
    steps = sum(schedule.steps)
    first, second, third = f"{PLAIN}, {steps} steps", f"{preset}, all in full", f"{preset}, only the first small"
    return [
        paint.row(first, PLAIN, rivals.plain, second, False, steps=steps),
        paint.row(second, "", rivals.unmixed, third, False, schedule=schedule, small=False),
        paint.row(third, "", rivals.unmixed, f"{RALU} {preset}", False, schedule=schedule, small=True),
    ]


def _ablations(paint: Painter, schedule: Schedule) -> list[Row]:
    """One choice changed at a time, against `ABLATED`; rows that would be one that is there already are left out.

    Only where c is large does it matter whether the noise of untouched tokens is scaled: at Z = 2, the largest c that
    the noise allows, which is compared with itself.
    """
    changed = {name: (schedule, Choices(**choices)) for name, choices in ABLATIONS.items()}
    changed |= {f"r = {ratio}": (replace(schedule, ratio=ratio), Choices()) for ratio in RATIOS}
    settings = schedule.steps, schedule.ends, schedule.ratio, schedule.shift
    changed["best match, whatever Z"] = solve(*settings, slack=0.0, enough=0.0), Choices()
    for distance in DISTANCES:
        changed[f"smallest Z at JS {distance}"] = solve(*settings, slack=0.0, enough=distance), Choices()
    shifts, Z = published_search(schedule.steps, schedule.ends, schedule.shift)
    changed["published search at this shift"] = replace(schedule, shifts=shifts, Z=Z), Choices()
    least = solve(*settings, Z_max=Z_MIN)
    changed[LEAST_Z] = least, Choices()
    changed[f"{LEAST_Z}, noise not scaled"] = least, Choices(scaled_noise=False)
    changed["preset as published"] = PRESETS[ABLATED], Choices()
    seen, rows = [paint.row("", "", ralu, preset=schedule, choices=Choices()).facts], []
    for name, (other, choices) in changed.items():
        against = LEAST_Z if name.startswith(f"{LEAST_Z},") else f"{RALU} {ABLATED}"
        row = paint.row(name, "", ralu, against, False, preset=other, choices=choices)
        if row.facts not in seen:
            seen.append(row.facts)
            rows.append(row)
    return rows


def scene_features(instruments: Instruments, count: int, size: int, batch_size: int) -> Tensor:
    """DINO's features of rendered held-out scenes, (M, D)."""
    parts = []
    for first in range(0, count, batch_size):
        scenes = [Scene.random(seed, "test") for seed in range(first, min(first + batch_size, count))]
        parts.append(instruments.rewards["dino"].features(render_batch(scenes, size).image.float() / 255).cpu())
    return torch.cat(parts).float()


def about_schedules(paint: Painter, schedules: dict[str, Schedule], guidance_scale: float) -> dict[str, dict]:
    """What NT-matching found, and what it costs."""
    found, decoding = {}, paint.small_decoding_steps(guidance_scale)
    for name, schedule in schedules.items():
        values = asdict(schedule) | {"c": schedule.c, "js_distance": schedule.js_distance}
        costs = {"cost_in_full_steps": paint.schedule_steps(schedule), "small_decoding_in_full_steps": decoding}
        found[name] = values | costs
    return found


def remarks(about: dict[str, dict], shift: float) -> list[str]:
    """What stands below the table."""
    lines = [f"## Presets, solved for a shift of {shift:.3f}", ""]
    heads = ["steps", "ends", "r", "h", "Z", "JS distance", "cost in full steps", "decoding for edges, in full steps"]
    lines += ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, entry in about.items():
        shifts = ", ".join(f"{h:.2f}" for h in entry["shifts"])
        facts = [name, str(entry["steps"]), str(entry["ends"]), f"{entry['ratio']:g}", shifts, f"{entry['Z']:.2f}"]
        facts += [f"{entry['js_distance']:.4f}", f"{entry['cost_in_full_steps']:.2f}"]
        lines.append("| " + " | ".join([*facts, f"{entry['small_decoding_in_full_steps']:.2f}"]) + " |")
    text = (
        "GFLOPs, and costs that are called equal, are the denoiser's; RALU also decodes its small picture for edges."
    )
    return [*lines, "", text]


def main(arguments: Sequence[str] | None = None) -> dict:
    parser = parser_of(__doc__, "runs/ralu_quality", num_prompts=80)
    parser.add_argument("--ablations", action="store_true", help=f"also every choice apart, at {ABLATED}")
    parser.add_argument("--scenes", type=int, default=1000, help="rendered ones, for the Fréchet distance")
    args = parser.parse_args(arguments)
    pipe = open_model(args)
    paint = Painter(pipe, args.size)
    schedules = {preset: as_schedule(preset, shift=paint.shift) for preset in SHOWN}
    instruments = open_instruments(args, pipe.device)
    study, measured = run(args, pipe, rows_of(paint, args.steps, schedules, args.ablations), instruments)
    scenes_MD = scene_features(instruments, args.scenes, args.size, args.batch_size)
    about = about_schedules(paint, schedules, args.guidance_scale)
    more = {"shift": paint.shift, "schedules": about, "scenes": args.scenes}
    title = f"RALU at {args.size} px"
    lines = lines_of(study, measured, scenes_MD=scenes_MD)
    return finish(args, study, lines, title, RALU, more, remarks(about, paint.shift))


if __name__ == "__main__":
    main()
