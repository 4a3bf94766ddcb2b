"""What a RALU run will do and cost, known before any weights are loaded.

schedule = as_schedule("4x")
plan(NETWORKS["flux-dev"], schedule, 1024, 1024, plain_steps=50)["tflops"]["ratio"]
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace

from solver.samplers.cost import Network, decoding_flops, image_tokens, run_flops, text_length
from solver.samplers.ralu.edges import number_of_fine
from solver.samplers.ralu.schedule import FAR, LARGEST_SHIFT, PRESETS, Schedule, at_bound, js_distance, solve

LONGEST_TEXT = 2**16  # tokens
USUAL_GUIDANCE = 3.0


def default_preset(sd3: bool, few_steps: bool) -> str:
    """The preset where none is named: of a model of SD3's family, or of another; `few_steps` if distilled to four."""
    if few_steps:
        return "turbo"
    return "2x" if sd3 else "4x"


def default_guidance(preset: str | None, few_steps: bool, told: bool) -> float:
    """The guidance scale of `sample.py ralu` where none is given: none at all for models distilled to a few steps.

    Args:
        preset: that was named; "turbo" is for these models, some of which do not say that they are.
        few_steps: whether the model says it.
        told: whether the model is told its guidance scale, as FLUX.1-dev, which makes no second evaluation.
    """
    return 1.0 if (few_steps or preset == "turbo") and not told else USUAL_GUIDANCE


def as_schedule(
    preset: str | Schedule | None = "4x",
    steps: Sequence[int] | None = None,
    ends: Sequence[float] | None = None,
    ratio: float | None = None,
    shift: float | None = None,
) -> Schedule:
    """The schedule that is meant: a preset as published, or one that NT-matching solves.

    Args:
        preset: a name of `PRESETS`, or a schedule.
        steps, ends: of a schedule of one's own, instead of the preset's.
        ratio: instead of the preset's; 0.3 for a schedule of one's own.
        shift: of the plain run. A preset is solved anew for it; without it, presets are as published, and schedules of
            one's own are solved for 3.

    Raises:
        ValueError: there is no such preset, `ends` without `steps` or the reverse, or numbers that make no schedule.
    """
    if (steps is None) != (ends is None):
        raise ValueError(f"steps={steps}, ends={ends}: a schedule of one's own needs both.")
    if not isinstance(preset, Schedule | None) and not (isinstance(preset, str) and preset in PRESETS):
        raise ValueError(f"preset={preset!r}: expected one of {', '.join(PRESETS)}, or a Schedule.")
    if preset is None and steps is None:
        raise ValueError("preset=None: expected a preset, or steps and ends of a schedule of one's own.")
    known = PRESETS[preset] if isinstance(preset, str) else preset
    if steps is None and shift is None:
        return known if ratio is None else replace(known, ratio=ratio)
    if steps is None:
        steps, ends, ratio = known.steps, known.ends, known.ratio if ratio is None else ratio
    schedule = solve(steps, ends, 0.3 if ratio is None else ratio, 3.0 if shift is None else shift)
    if bound := at_bound(schedule, Z_max=20.0):
        warnings.warn(f"NT-matching left {', '.join(bound)} on its bound: {schedule}.", stacklevel=2)
    return schedule


def stage_tokens(schedule: Schedule, tokens: int) -> tuple[int, int, int]:
    """Image tokens of each stage, of a picture that has `tokens` at full size."""
    small = tokens // 4
    return small, small + 3 * number_of_fine(schedule.ratio, small), tokens


def plan(
    network: Network,
    schedule: Schedule,
    height: int,
    width: int,
    plain_steps: int,
    text_tokens: int | None = None,
    attention: bool = True,
    reference_tokens: int = 0,
    branches: int | None = None,
    own_shift: float | None = None,
) -> dict:
    """Stages, NT-matching and TFLOPs of one picture: text encoders, denoiser, decoders of the small and the full one.

    Encoders and decoders that `network` does not know count nothing, in either run.

    Args:
        network: what an evaluation costs.
        schedule: of the run.
        height, width: in pixels.
        plain_steps: of the run that it is compared with.
        text_tokens: the network's usual number where it is None.
        attention: whether attention is counted; publications often leave it out.
        reference_tokens: of a picture to edit, which run along in every stage.
        branches: evaluations a step, as many prompts are encoded; the network's usual number where it is None.
        own_shift: that the scheduler really uses; what is matched to another one has a distance to it too.

    Raises:
        ValueError: the size does not divide by twice a token, or a number is too small.
    """
    if height % (2 * network.pixels) or width % (2 * network.pixels):
        raise ValueError(f"height={height}, width={width}: expected multiples of {2 * network.pixels} pixels.")
    if plain_steps < 1:
        raise ValueError(f"plain_steps={plain_steps}: expected at least 1.")
    if text_tokens is not None and not 0 < text_tokens <= LONGEST_TEXT:
        raise ValueError(f"text_tokens={text_tokens}: expected 1 to {LONGEST_TEXT}.")
    if branches is not None:
        encoding = network.text_encoding * branches / network.branches
        network = replace(network, branches=branches, text_encoding=encoding)
    network = network if text_tokens is None else text_length(network, text_tokens)
    full = image_tokens(network, height, width)
    tokens = stage_tokens(schedule, full)

    def tflops(evaluations, *decoded) -> float:
        with_reference = [(n + reference_tokens, steps) for n, steps in evaluations]
        denoiser = run_flops(network, with_reference, attention=attention)
        pictures = sum(decoding_flops(network, *size, attention) for size in decoded)
        return (network.text_encoding + denoiser + pictures) / 1e12

    small_size, full_size = (height // 2, width // 2), (height, width)
    total = tflops(list(zip(tokens, schedule.steps, strict=True)), small_size, full_size)
    plain = tflops([(full, plain_steps)], full_size)
    return {
        "stages": [
            {"tokens": n, "steps": steps, "sigmas": sigmas}
            for n, steps, sigmas in zip(tokens, schedule.steps, schedule.stage_sigmas(), strict=True)
        ],
        "nt_matching": _nt_matching(schedule, own_shift),
        "tflops": {"total": total, "plain": plain, "ratio": plain / total, "attention_counted": attention},
    }


def _nt_matching(schedule: Schedule, own_shift: float | None) -> dict:
    facts = {"h": list(schedule.shifts), "Z": schedule.Z, "c": schedule.c, "js_distance": schedule.js_distance}
    if own_shift is not None and own_shift != schedule.shift and own_shift <= LARGEST_SHIFT:
        distance = js_distance(schedule.steps, schedule.ends, schedule.shifts, schedule.Z, own_shift)
        facts["own_shift"] = {"shift": own_shift, "js_distance": distance}
    return facts


def as_table(planned: dict) -> str:
    """A plan for people."""
    rows = ["stage  tokens  steps  sigmas"]
    for number, stage in enumerate(planned["stages"], 1):
        sigmas = " ".join(f"{sigma:.4f}" for sigma in stage["sigmas"])
        rows.append(f"{number:5d}  {stage['tokens']:6d}  {stage['steps']:5d}  {sigmas}")
    match, cost = planned["nt_matching"], planned["tflops"]
    shifts = ", ".join(f"{h:.3f}" for h in match["h"])
    rows.append(f"NT-matching: h = {shifts}; Z = {match['Z']:.3f}, c = {match['c']:.4f}")
    rows.append(f"             Jensen-Shannon distance {match['js_distance']:.4f}")
    distance = match["js_distance"]
    if (own := match.get("own_shift")) is not None:
        distance = own["js_distance"]
        rows.append(f"             {distance:.4f} to the scheduler's own shift, {own['shift']:.3f}")
    if distance > FAR:
        rows.append(f"Farther than {FAR} from the plain run's timesteps: artefacts are said to show.")
    counted = "with" if cost["attention_counted"] else "without"
    rows.append(f"TFLOPs {counted} attention: {cost['total']:.1f}, plain {cost['plain']:.1f}: {cost['ratio']:.2f}x")
    if cost["ratio"] < 1:
        rows.append("This costs more than the plain run: take a preset with fewer steps.")
    return "\n".join(rows)
