"""What a preview will do and cost, without loading any weights.

    explain("flux", 1024, 1024)

    {"phases": [{"name", "size": [height, width], "steps", "network_calls", "sigmas"}, ...],
     "tflops": {"preview", "refine", "full", "ratio"}}

The last phase is the refinement. FLOPs are the denoiser's, attention and both branches of guidance counted; `ratio` is
full over preview. All are of one picture; of several candidates `tflops` also says `sheet`, what all previews cost.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from solver.samplers.cost import NETWORKS, Network, image_tokens, run_flops
from solver.samplers.grids import QWEN_SHIFT, own_grid, shifted, unipc_grid
from solver.samplers.preview.options import Phase, PreviewOptions, plan


class Family(NamedTuple):
    """A published model: key of `cost.NETWORKS`, grid, and a usual size, which halves into tokens, and frames."""

    network: str
    grid: Callable[..., Tensor]
    settings: dict
    size: tuple[int, int] = (1024, 1024)
    frames: int = 1


FAMILIES = {
    "flux": Family("flux-dev", shifted, {"use_dynamic_shifting": True}),
    "sd3": Family("sd3-medium", own_grid, {"shift": 3.0}),
    "sd3.5-medium": Family("sd3.5-medium", own_grid, {"shift": 3.0}),
    "sd3.5-large": Family("sd3.5-large", own_grid, {"shift": 3.0}),
    "qwen-image": Family("qwen-image", shifted, QWEN_SHIFT),
    "wan": Family("wan2.1-14b", unipc_grid, {"shift": 5.0}, (480, 832), 81),
    "wan-1.3b": Family("wan2.1-1.3b", unipc_grid, {"shift": 3.0}, (480, 832), 81),
    "hunyuan-video": Family("hunyuan-video", shifted, {"shift": 7.0}, (544, 960), 129),
}


def explain(
    family: str,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    options: PreviewOptions | None = None,
    candidates: int = 1,
    branches: int | None = None,
) -> dict:
    """The phases of a preview and of its refinement, and their FLOPs.

    Args:
        family: a key of `FAMILIES`.
        height, width: of the full-size picture, in pixels; a usual size where they are None.
        num_frames: of a video; likewise.
        options: those of `PreviewOptions()` by default.
        candidates: how many previews.
        branches: of guidance, evaluations a step; the family's usual number where it is None.

    Raises:
        ValueError: there is no such family, or the size does not shrink into whole tokens.
    """
    options, known = options or PreviewOptions(), family_of(family)
    network = NETWORKS[known.network]
    given = zip((height, width, num_frames), (*known.size, known.frames), strict=True)
    height, width, frames = (own if value is None else value for value, own in given)
    multiple = network.pixels * options.scale
    if height % multiple or width % multiple:
        raise ValueError(
            f"height={height}, width={width}: a preview of 1/{options.scale} the size needs multiples of {multiple}."
        )
    sizes = ((height, width), (height // options.scale, width // options.scale))
    tokens = [image_tokens(network, *size, frames) for size in sizes]
    full, native = (known.grid(options.num_inference_steps, n, **known.settings) for n in tokens)
    phases = plan(options, height, width, full, native)
    costs = [cost(phase, network, frames, branches) for phase in phases]
    whole = run_flops(network, [(tokens[0], options.num_inference_steps)], branches=branches) / 1e12
    preview = math.fsum(costs[:-1])
    tflops = {"preview": preview, "refine": costs[-1], "full": whole, "ratio": whole / preview}
    if candidates > 1:
        tflops["sheet"] = candidates * preview
    return {"phases": [{**phase._asdict(), "size": list(phase.size)} for phase in phases], "tflops": tflops}


def cost(phase: Phase, network: Network, frames: int = 1, branches: int | None = None) -> float:
    """TFLOPs of a phase."""
    tokens = image_tokens(network, *phase.size, frames)
    return run_flops(network, [(tokens, phase.network_calls)], branches=branches) / 1e12


def family_of(name: str) -> Family:
    """Raises ValueError if there is none of that name."""
    if name not in FAMILIES:
        raise ValueError(f"family {name!r}: expected one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def branches_at(family: str, guidance_scale: float | None, true_cfg_scale: float | None) -> int | None:
    """Evaluations a step at the scales of a call; None, the family's usual number, where they do not tell.

    Models that were taught to answer at a guidance scale (FLUX, HunyuanVideo) are asked once whatever it is.
    """
    scale = true_cfg_scale
    if scale is None and NETWORKS[family_of(family).network].branches > 1:
        scale = guidance_scale
    return None if scale is None else 1 + (scale > 1)


def as_table(report: dict) -> str:
    """The report of `explain` for people."""
    lines = [f"{'phase':<16}{'size':>12}{'steps':>7}{'calls':>7}   sigmas"]
    for phase in report["phases"]:
        size, sigmas = "x".join(map(str, phase["size"])), phase["sigmas"]
        ends = f"{sigmas[0]:.3f}" if len(sigmas) == 1 else f"{sigmas[0]:.3f} - {sigmas[-1]:.3f}"
        lines.append(f"{phase['name']:<16}{size:>12}{phase['steps']:>7}{phase['network_calls']:>7}   {ends}")
    tflops = report["tflops"]
    lines.append(f"TFLOPs: preview {tflops['preview']:.0f}, refine {tflops['refine']:.0f}, full {tflops['full']:.0f}")
    lines.append(f"the preview costs 1/{tflops['ratio']:.2f} of the full picture")
    if "sheet" in tflops:
        lines.append(
            f"all previews: {tflops['sheet']:.0f} TFLOPs, {tflops['sheet'] / tflops['full']:.2f} full pictures"
        )
    return "\n".join(lines)
