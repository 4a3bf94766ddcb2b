"""What a stock call must be told beside its prompt: the guidance, the length of the text, the picture to edit.

call = call_at_size(pipe, {"prompt": prompts, **guidance(pipe, 3.0, [""] * len(prompts)), **text_length(pipe)}, 64, 64)
call |= {"image": encode_sources(pipe, sources_BCHW)}            # an editing pipeline
"""

import inspect
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline
from diffusers.utils.torch_utils import get_module_execution_device

from solver.samplers.latents import denoiser, has_flux_transformer


def guides_by_true_cfg(pipe: DiffusionPipeline) -> bool:
    """Whether guidance is `true_cfg_scale`: FLUX and Qwen-Image, where the denoiser is not told a guidance scale."""
    takes = "true_cfg_scale" in inspect.signature(pipe.__call__).parameters
    return takes and not denoiser(pipe).config.get("guidance_embeds")


def guidance(pipe: DiffusionPipeline, scale: float, negative_prompts: Sequence[str] = ()) -> dict:
    """The arguments of a call that guide by `scale`.

    Args:
        pipe: a stock pipeline.
        scale: 1 is no guidance.
        negative_prompts: one a picture; empty ones are given where the guidance needs them. None at all where the call
            has their embeddings.

    Raises:
        ValueError: one is not empty, and the pipeline or the scale has no use for it.
    """
    takes, true_cfg = inspect.signature(pipe.__call__).parameters, guides_by_true_cfg(pipe)
    if any(negative_prompts):
        if "negative_prompt" not in takes or ("true_cfg_scale" in takes and not true_cfg):
            raise ValueError(f"This {type(pipe).__name__} is guided without a negative prompt; leave it empty.")
        if scale <= 1:
            raise ValueError(f"guidance_scale={scale:g}: a negative prompt needs more than 1.")
    call = {"true_cfg_scale" if true_cfg else "guidance_scale": scale}
    if any(negative_prompts) or (true_cfg and negative_prompts):
        call["negative_prompt"] = [*negative_prompts]
    return call


def is_distilled_to_few_steps(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline is of FLUX schnell's kind: its grid is not shifted, and it is told no guidance."""
    config = pipe.scheduler.config
    plain = not config.get("use_dynamic_shifting") and config.get("shift") == 1.0
    return plain and has_flux_transformer(pipe) and not denoiser(pipe).config.get("guidance_embeds")


def branches(pipe: DiffusionPipeline, scale: float) -> int:
    """Rows of the denoiser that a picture takes at a guidance scale: two, where an empty prompt guides."""
    return 1 if scale <= 1 or denoiser(pipe).config.get("guidance_embeds") else 2


def text_length(pipe: DiffusionPipeline) -> dict[str, int]:
    """`max_sequence_length`, where the pipeline's own default is more than its last tokenizer is made for."""
    parameter = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    names = sorted(name for name in pipe.components if name.startswith("tokenizer"))
    tokenizer = pipe.components[names[-1]] if names else None
    if parameter is None or tokenizer is None or tokenizer.model_max_length >= parameter.default:
        return {}
    return {"max_sequence_length": tokenizer.model_max_length}


def check_edits(pipe: DiffusionPipeline) -> None:
    """Raises ValueError if the pipeline edits no pictures."""
    if not isinstance(pipe, FluxKontextPipeline):
        raise ValueError(
            f"{type(pipe).__name__} does not edit: rows with a source picture need pipeline: FluxKontextPipeline."
        )


@torch.no_grad()
def encode_sources(pipe: DiffusionPipeline, sources_BCHW: torch.Tensor) -> torch.Tensor:
    """Pictures to edit as `pipe(image=...)` takes them with nothing left to do: as latents.

    Pictures would be scaled to the sizes that the big model knows, encoded anew in every call, and in the dtype of the
    prompt instead of the VAE's.

    Args:
        pipe: a pipeline that edits.
        sources_BCHW: uint8, or floating point in [0, 1]; of the size of the picture to make, or another.

    Returns:
        latents (B, C, H, W) on the pipeline's device, not packed: the call does that.

    Raises:
        ValueError: the pipeline edits no pictures.
    """
    check_edits(pipe)
    pictures = sources_BCHW.to(get_module_execution_device(pipe.vae))  # not where an offloaded one waits
    pictures = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures
    return pipe._encode_vae_image(image=(2 * pictures - 1).to(pipe.vae.dtype), generator=None)
