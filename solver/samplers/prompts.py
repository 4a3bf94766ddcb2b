"""The arguments of a pipeline's call, for calls that are made several times: prompts encoded once, rows of a batch."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
)
from torch import Tensor

PROMPTS = ("prompt", "negative_prompt")


def encoded(pipe: DiffusionPipeline, call: dict) -> dict:
    """The call with embeddings in place of prompts, so that three stages encode them once.

    Embeddings that the call has already, of negative prompts for instance, stay. Of pipelines that are not known here,
    where a LoRA's scale is in the call, and where a prompt comes with its embeddings, which the pipeline refuses, the
    call stays as it is.
    """
    if call.get("prompt") is None or "scale" in (call.get("joint_attention_kwargs") or {}):
        return call
    if any(call.get(name) is not None and call.get(f"{name}_embeds") is not None for name in PROMPTS):
        return call
    embed = {
        FluxPipeline: _flux_embeds,
        FluxKontextPipeline: _flux_embeds,
        QwenImagePipeline: _qwen_embeds,
        StableDiffusion3Pipeline: _sd3_embeds,
    }.get(type(pipe))
    if embed is None:
        return call
    text = {name: call[name] for name in call if name.startswith(("prompt", "negative_prompt"))}
    length = {name: call[name] for name in ("max_sequence_length",) if name in call}
    rest = {name: value for name, value in call.items() if name not in text}
    given = {name: value for name, value in text.items() if "embeds" in name and value is not None}
    return rest | embed(pipe, call, text, length) | given


def _flux_embeds(pipe, call, text, length) -> dict:
    found = {}
    for sign in ("", "negative_"):
        if text.get(f"{sign}prompt") is not None:
            prompts = _as_list(text[f"{sign}prompt"], call)
            embeds, pooled, _ = pipe.encode_prompt(prompts, text.get(f"{sign}prompt_2"), **length)
            found |= {f"{sign}prompt_embeds": embeds, f"{sign}pooled_prompt_embeds": pooled}
    return found


def _qwen_embeds(pipe, call, text, length) -> dict:
    found = {}
    for sign in ("", "negative_"):
        if text.get(f"{sign}prompt") is not None:
            embeds, mask = pipe.encode_prompt(_as_list(text[f"{sign}prompt"], call), **length)
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
            found |= {f"{sign}prompt_embeds": embeds, f"{sign}prompt_embeds_mask": mask}
    return found


def _sd3_embeds(pipe, call, text, length) -> dict:
    prompts = {"prompt_2": None, "prompt_3": None, **text}
    guided = call.get("guidance_scale", 7.0) > 1  # the pipeline's own default
    skipped = {name: call[name] for name in ("clip_skip",) if name in call}
    names = [f"{sign}{kind}prompt_embeds" for kind in ("", "pooled_") for sign in ("", "negative_")]
    embeds = pipe.encode_prompt(**prompts, do_classifier_free_guidance=guided, **skipped, **length)
    return {name: value for name, value in zip(names, embeds, strict=True) if value is not None}


def _as_list(prompts: str | Sequence[str], call: dict) -> list[str]:
    return [prompts] * len(call["prompt"]) if isinstance(prompts, str) else list(prompts)


def row_of(call: dict, i: int, rows: int) -> dict:
    """The arguments of one picture: a row of whatever has one a picture."""

    def row(name, value):
        if name.endswith("ip_adapter_image_embeds") and value is not None:  # a tensor an adapter
            return [one[i : i + 1] if len(one) == rows else one for one in value]
        single = isinstance(value, Tensor | np.ndarray) and value.ndim < 4  # one picture, channels first
        batched = "prompt" in name or (name == "image" and not single)
        if batched and isinstance(value, Tensor | np.ndarray | list | tuple) and len(value) == rows:
            return value[i : i + 1]
        return value

    return {name: row(name, value) for name, value in call.items()}
