"""How alike a small preview and the full-size picture of one seed are, against everything else at the same cost.

    python -m benchmarks.quality.preview                                    # 10 minutes on 2 CPU cores
    python -m benchmarks.quality.preview --num_prompts 200 --sweep --dtype bfloat16 --solver runs/mini_flux/best
    python -m benchmarks.quality.preview --num_prompts 32 --seeds_each 8 --rows "naive nearest" "Euler, 5 steps"

The second makes the table of record, in an hour of a core that knows bfloat16; the third compares the ranks of 8
candidates a prompt. 128 -> 64 px on zoo/mini-flux and held-out captions; whatever a row makes is compared at 64 px
with the picture of the full run, area-downsampled. Writes metrics.json, table.md, figure.png and contact_sheet.png;
finished rows are kept.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, SchedulerMixin
from scipy.stats import wilcoxon
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from benchmarks.quality import pooled_latents
from benchmarks.quality.command import finish, open_instruments, open_model, parser_of, run
from benchmarks.quality.lines import Line, lines_of, network_of_pipeline
from benchmarks.quality.study import Batch, Drawn, Measured, Row
from evaluation.solvers import OWN_GRID, classical, describe, learned
from solver.samplers.cascade import Segment, fresh_copy, run_segment
from solver.samplers.cost import evaluation_flops, image_tokens
from solver.samplers.latents import decode, initial_noise, latent_shape
from solver.samplers.preview import PreviewOptions, preview

FULL, OURS, MEAN = "full run", "ours", "mean"  # ours: the paper's setting
MINE = "mean, guidance"  # the default of `PreviewOptions`
# Steps as fractions of the run; of 30: D = 10, m = 5.
SWITCH, GUIDED = 1 / 3, 1 / 6
SWITCHES = (1 / 6, 1 / 3, 1 / 2)
MEAN_SWITCHES = (0, 0.1, 1 / 6, 0.2, 1 / 3)
SWEPT_M, SWEPT_KAPPA = (1 / 30, 0.1, 1 / 6, 1 / 3), (0.5, 1.0, 2.0, 4.0)
MEAN_SWEPT_M, MEAN_SWEPT_KAPPA = (0.1, 1 / 6, 1 / 3), (0.5, 1.0, 2.0)
FEW = 8  # small steps of a multistep solver
FEWER = (2, 3, 5, 7)  # full-size steps: what previews in few small steps have to beat
CONSISTENCY = ("pixels", "ssim", "dino", "dino_patches", "clip", "depth", "segmentation")
ONLY_MEASURED = 1e-30  # a strength that corrects nothing, for the norm of the commutator where there is no guidance


@dataclass
class Painter:
    """Makes the rows' pictures.

    Attributes:
        pipe: of a flow model.
        size: of the full picture, in pixels.
        steps: of the full run.
        guidance_scale: for the learned solver.
        solver: folder of a learned solver, or None.
    """

    pipe: DiffusionPipeline
    size: int
    steps: int
    guidance_scale: float
    solver: str | None = None

    def scheduler(self, name: str, steps: int) -> SchedulerMixin:
        """Euler's is the pipeline's own."""
        own = self.pipe.scheduler
        if name == "Euler":
            return fresh_copy(own)
        factory = learned(self.solver, own) if name == "learned" else classical("dpmpp2m", own)
        return factory[OWN_GRID](own, steps, self.guidance_scale)

    def plain(self, name: str, solver: str, steps: int, size: int, **row) -> Row:
        """The stock run, of the full size or directly of the small one."""
        scheduler = self.scheduler(solver, steps)

        def draw(batch: Batch) -> Drawn:
            noise = initial_noise(batch.seeds, latent_shape(self.pipe, size, size)).to(self.pipe.device)
            segment = Segment(None, size, size, steps=(0, steps, steps))
            latents = run_segment(self.pipe, noise, segment, fresh_copy(scheduler), **batch.call)
            images = decode(self.pipe, latents)
            return Drawn(F.avg_pool2d(images, 2) if size == self.size else images)

        facts = {"solver": describe(scheduler, steps), "steps": steps, "size": size}
        return Row(name, draw=draw, facts=facts, **row)

    def preview(self, name: str, curve: str = "", stepper: str = "Euler", in_sheet: bool = False, **options) -> Row:
        """A preview with options, compared with `OURS`."""
        options = PreviewOptions(
            **{"num_inference_steps": self.steps, "switch": SWITCH, "guided_steps": GUIDED, "method": "subsample"}
            | options
        )
        scheduler = self.scheduler(stepper, options.number_of_small_steps)

        def draw(batch: Batch) -> Drawn:
            made = preview(
                self.pipe,
                None,
                batch.seeds,
                options,
                height=self.size,
                width=self.size,
                stepper=scheduler,
                **batch.call,
            )
            images = torch.stack([pil_to_tensor(one.image) for one in made]).float() / 255
            return Drawn(images, _norms([one.report for one in made]))

        facts = {"options": asdict(options), "stepper": describe(scheduler, options.number_of_small_steps)}
        facts |= {"size": self.size}
        return Row(name, curve, draw, facts, OURS if name != OURS else None, in_sheet)

    def equal_steps(self) -> int:
        """Full-size steps that cost as much as a preview."""
        setting = {"num_inference_steps": self.steps, "switch": SWITCH, "guided_steps": GUIDED}
        options = PreviewOptions(**setting, method="subsample")
        network = network_of_pipeline(self.pipe)
        sizes = (self.size, self.size // 2)
        full, small = (evaluation_flops(network, image_tokens(network, side, side)) for side in sizes)
        return max(1, round(options.full_steps + options.small_evaluations * small / full))


def _norms(reports: Sequence[dict]) -> dict[str, Tensor]:
    """Norms of the commutator at the switch and m steps later, where the network was asked for both."""
    numbers = {}
    if reports[0]["candidate_norms"] is not None and reports[0]["chosen"] is not None:
        numbers["norm_at_switch"] = torch.tensor([r["candidate_norms"][r["chosen"]] for r in reports])
    if reports[0]["guidance_norms"]:
        numbers["norm_after"] = torch.tensor([r["guidance_norms"][-1] for r in reports])
    return numbers


def rows_of(paint: Painter, gain: tuple, sweep: bool) -> list[Row]:
    """The rows of the table, the full run first."""
    size, steps, equal = paint.size, paint.steps, paint.equal_steps()
    solvers = {"Euler": "Euler", "DPM-Solver++(2M)": "dpmpp2m"} | ({"learned": "learned"} if paint.solver else {})
    rows = [paint.plain(FULL, "Euler", steps, size, curve=FULL)]
    for label, solver in solvers.items():
        for fewer in sorted({*FEWER, max(2, equal // 2), equal}):
            shown = fewer == FEWER[2] and solver != "dpmpp2m"
            name = f"{label}, {fewer} steps"
            rows.append(paint.plain(name, solver, fewer, size, curve=label, against=OURS, in_sheet=shown))
    rows += [
        paint.plain("direct small", "Euler", steps, size // 2, curve="direct small", against=OURS, in_sheet=True),
        paint.preview("naive nearest", curve="naive nearest", in_sheet=True, selection="nearest", guided_steps=0),
        paint.preview(OURS, curve=OURS, in_sheet=True),
    ]
    rows += [paint.preview(f"{OURS}, D = {_of(s, steps)}", curve=OURS, switch=s) for s in SWITCHES if s != SWITCH]
    multistep = [solver for solver in solvers.values() if solver != "Euler"]
    for solver in multistep:
        name = f"direct small, {FEW} steps of {solver}"
        rows.append(paint.plain(name, solver, FEW, size // 2, curve="direct small", against=OURS))
        rows.append(paint.preview(f"{OURS}, {FEW} small steps of {solver}", stepper=solver, small_steps=FEW))
    rows += _controls(paint)
    rows += _means(paint, gain, multistep)
    if sweep:
        rows += [
            paint.preview(f"{OURS}, m = {_of(m, steps)}, κ = {kappa:g}", guided_steps=m, kappa=kappa)
            for m in SWEPT_M
            for kappa in SWEPT_KAPPA
        ]
        rows += [
            _mean(paint, f"{MEAN}, m = {_of(m, steps)}, κ = {kappa:g}", SWITCH, guided_steps=m, kappa=kappa)
            for m in MEAN_SWEPT_M
            for kappa in MEAN_SWEPT_KAPPA
        ]
    return list({row.name: row for row in rows}.values())  # of few steps, some fractions are the same step


def chosen(rows: list[Row], names: Sequence[str] | None) -> list[Row]:
    """The rows of these names, and those that all are compared with; all rows where there are no names.

    Raises:
        ValueError: there is no such row.
    """
    if names is None:
        return rows
    if unknown := {*names} - {row.name for row in rows}:
        raise ValueError(f"--rows {', '.join(sorted(unknown))}: there are {', '.join(row.name for row in rows)}.")
    return [row for row in rows if row.name in (FULL, OURS, *names)]


def _controls(paint: Painter) -> list[Row]:
    """Other choices of D, with and without guidance."""
    rows = [paint.preview(f"{choice}", selection=choice) for choice in ("argmax", "random", "nearest", "blockwise")]
    for choice in ("argmin", "argmax"):
        rows.append(paint.preview(f"{choice}, no guidance", selection=choice, alpha=ONLY_MEASURED))
    rows.append(paint.preview("random, no guidance", selection="random", guided_steps=0))
    return [*rows, paint.preview("argmin of phases", candidates="phases")]


def _means(paint: Painter, gain: tuple, multistep: list[str]) -> list[Row]:
    """The block mean at its own noise level: without and with guidance and gain; then with few small steps."""
    steps, rows = paint.steps, []
    for switch in MEAN_SWITCHES:
        rows.append(_mean(paint, f"{MEAN}, D = {_of(switch, steps)}", switch, curve=MEAN))
    for switch in SWITCHES:
        name = f"{MEAN}, D = {_of(switch, steps)}, guidance"
        rows.append(_mean(paint, name, switch, curve=MINE, in_sheet=switch == SWITCH, guided_steps=None))
    rows.append(_mean(paint, f"{MEAN}, D = {_of(SWITCH, steps)}, gain", SWITCH, gain=gain))
    for solver in multistep:
        few, last = {"stepper": solver, "small_steps": FEW}, solver == multistep[-1]  # the figure has one of them
        name = f"{MEAN}, {FEW} small steps of {solver}"
        for switch in MEAN_SWITCHES:
            at, shown = f"{name}, D = {_of(switch, steps)}", last and switch == 0
            rows.append(_mean(paint, at, switch, curve=name if last else "", in_sheet=shown, **few))
            if switch:
                curve = f"{name}, guidance" if last else ""
                rows.append(_mean(paint, f"{at}, guidance", switch, curve=curve, guided_steps=None, **few))
    return rows


def _mean(paint: Painter, name: str, switch: float, **settings) -> Row:
    return paint.preview(name, **{"method": "mean", "guided_steps": 0, "switch": switch} | settings)


def _of(fraction: float, steps: int) -> int:
    return round(fraction * steps)


# ---------------------------------------------------------------------------------------------------------------------
# Beside the table
# ---------------------------------------------------------------------------------------------------------------------


def commutators(measured: Sequence[Measured]) -> dict[str, dict]:
    """Norm of the commutator at the switch and before the last correction, and whether it changed (Wilcoxon)."""
    found = {}
    for one in measured:
        if {"norm_at_switch", "norm_after"} <= one.values.keys() and "κ" not in one.row.name:
            before, after = one.values["norm_at_switch"], one.values["norm_after"]
            found[one.row.name] = {
                "at_switch": [float(before.mean()), float(before.std())],
                "after": [float(after.mean()), float(after.std())],
                "fell": float((after < before).double().mean()),
                "p": float(wilcoxon(after.double(), before.double()).pvalue),
            }
    return found


def bars(lines: Sequence[Line], equal: int) -> list[str]:
    """What was expected of previews and what was found, as rows of a table."""
    by_name = {line.name: line for line in lines}

    def less(one: str, other: str) -> str:
        estimate = by_name[one].estimates["pixels"] - by_name[other].estimates["pixels"]
        return f"{estimate.value:+.2f} [{estimate.ci95[0]:+.2f}, {estimate.ci95[1]:+.2f}] dB"

    unguided = [f"{choice}, no guidance" for choice in ("argmin", "random", "argmax")]
    found = [(f"{one} - {other}", less(one, other)) for one, other in pairwise(unguided)]
    found += [(f"{OURS} - {other}", less(OURS, other)) for other in (unguided[0], "naive nearest")]
    rivals = [line.name for line in lines if line.name.endswith(f", {equal} steps")]
    for rival in rivals:
        ahead, behind = (_surely(by_name[one], by_name[other]) for one, other in ((OURS, rival), (rival, OURS)))
        found.append((f"{OURS} against {rival}: metrics surely ahead, behind", f"{ahead}, {behind}"))
    asked = by_name[OURS]
    as_good = [line for line in lines[1:] if not _surely(asked, line)]
    small = [line for line in as_good if line.measured.row.facts.get("options")]
    for label, kept in (("half-size", small), ("any", as_good)):
        best = min(kept, key=lambda line: line.gflops)
        ratios = f"{lines[0].gflops / best.gflops:.2f}, {asked.gflops / best.gflops:.2f}"
        found.append(
            (f"cheapest {label} row that {OURS} is ahead of in no metric: {best.name}", f"{ratios} times less")
        )
    head = [
        "## What was expected",
        "",
        "| | PSNR, paired; or compute against the full run and against ours |",
        "|---|---|",
    ]
    return [*head, *(f"| {what} | {value} |" for what, value in found), ""]


def _surely(one: Line, other: Line) -> int:
    """In how many metrics of consistency one is ahead of another, the whole interval above 0."""
    shared = [name for name in CONSISTENCY if name in one.estimates]
    return sum((one.estimates[name] - other.estimates[name]).ci95[0] > 0 for name in shared)


def remarks(assumption: dict, norms: dict[str, dict]) -> list[str]:
    """What stands below the table."""
    lines = ["## Norm of the commutator", ""]
    lines += ["| | at the switch | m steps later | fell in | Wilcoxon p |", "|---|---|---|---|---|"]
    for name, entry in norms.items():
        values = ["{:.2f} ± {:.2f}".format(*entry[key]) for key in ("at_switch", "after")]
        lines.append(f"| {name} | " + " | ".join(values) + f" | {entry['fell']:.0%} | {entry['p']:.2g} |")
    lines += [
        "",
        f"## Mean of 2 x 2 latents against the latent of the half-size picture, {assumption['scenes']} scenes",
    ]
    channels = range(len(assumption["relative_error"]))
    lines += ["", "| channel | " + " | ".join(map(str, channels)) + " |", "|---" * (len(channels) + 1) + "|"]
    shown = {"relative error": "relative_error", "with the fitted gain": "with_gain", "correlation": "correlation"}
    for label, key in shown.items():
        lines.append(f"| {label} | " + " | ".join(f"{value:.3f}" for value in assumption[key]) + " |")
    for label, values in zip(("factor", "offset"), assumption["gain"], strict=True):
        lines.append(f"| {label} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> dict:
    parser = parser_of(__doc__, "runs/preview_quality", num_prompts=56)
    parser.add_argument("--solver", help="folder of a learned solver, for rows of its own")
    parser.add_argument("--sweep", action="store_true", help="also m x κ")
    parser.add_argument("--rows", nargs="+", help=f"only these, besides {FULL!r} and {OURS!r}, by the table's names")
    parser.add_argument("--seeds_each", type=int, default=1, help="pictures a prompt; from 2 on, ranks are compared")
    parser.add_argument("--scenes", type=int, default=200, help="on which pooled latents are measured")
    args = parser.parse_args(arguments)
    pipe = open_model(args)
    assumption = pooled_latents.measure(pipe, args.size, args.scenes)
    paint = Painter(pipe, args.size, args.steps, args.guidance_scale, args.solver)
    rows = chosen(rows_of(paint, assumption["gain"], args.sweep), args.rows)
    study, measured = run(args, pipe, rows, open_instruments(args, pipe.device), args.seeds_each)
    norms = commutators(measured)
    more = {"pooled_latents": assumption, "commutators": norms, "equal_steps": paint.equal_steps()}
    lines = lines_of(study, measured, args.seeds_each)
    below = [] if args.rows else bars(lines, paint.equal_steps())
    below += remarks(assumption, norms)
    return finish(args, study, lines, f"Preview, {args.size} to {args.size // 2} px", MINE, more, below)


if __name__ == "__main__":
    main()
