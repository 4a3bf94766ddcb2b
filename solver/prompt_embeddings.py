"""Text embeddings, each prompt encoded once and kept.

    embeddings = PromptEmbeddings(pipe)
    latents = pipe(**embeddings(["a red ring", "two blue cubes"]), output_type="latent").images

The result is what the pipeline would have computed itself, for the families in `ENCODED`.
"""

import inspect
from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline, FluxPipeline, StableDiffusionXLPipeline
from diffusers import StableDiffusion3Pipeline as SD3Pipeline
from diffusers import StableDiffusionPipeline as SDPipeline
from torch import Tensor

from solver.samplers.calls import guides_by_true_cfg, text_length

# What the `encode_prompt` of a family returns, as arguments of its call; None for what the call makes itself.
POSITIVE_NEGATIVE = ("prompt_embeds", "negative_prompt_embeds")
FLUX = ("prompt_embeds", "pooled_prompt_embeds", None)
WITH_POOLED = (*POSITIVE_NEGATIVE, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
ENCODED: dict[type[DiffusionPipeline], tuple[str | None, ...]] = {
    SDPipeline: POSITIVE_NEGATIVE,
    StableDiffusionXLPipeline: WITH_POOLED,
    SD3Pipeline: WITH_POOLED,
    FluxPipeline: FLUX,
    FluxKontextPipeline: FLUX,
}


class PromptEmbeddings:
    """Embeddings of prompts as keyword arguments of a pipeline's call, kept on the CPU once computed.

    A prompt is encoded alone, so that its embedding does not depend on its neighbours, nor on what is kept already.
    The negative embeddings are those of the empty prompt, the same for all. Where a pipeline guides by
    `true_cfg_scale`, they are encoded beside the first prompt.

    Args:
        pipe: the pipeline.
        encode: `encode(prompt) -> {argument: tensor (1, ...)}`; the pipeline's own text encoders where it is None.

    Raises:
        ValueError: at the first prompt, if the pipeline's family is not in `ENCODED` and there is no `encode`.
    """

    def __init__(self, pipe: DiffusionPipeline, encode: Callable[[str], dict[str, Tensor]] | None = None):
        self.pipe = pipe
        self.encode = encode or self._encode
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._negative: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The arguments for a batch of prompts, each `(B, ...)`, on the pipeline's device."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._kept:
                self._keep(prompt)
        names = self._kept[prompts[0]]
        batch = {name: torch.stack([self._kept[prompt][name] for prompt in prompts]) for name in names}
        batch |= {name: value.expand(len(prompts), *value.shape) for name, value in self._negative.items()}
        return {name: value.to(self.pipe.device) for name, value in batch.items()}

    @torch.no_grad()
    def _keep(self, prompt: str) -> None:
        encoded = {name: value[0].cpu() for name, value in self.encode(prompt).items()}
        if not self._negative and self.encode == self._encode and guides_by_true_cfg(self.pipe):
            encoded |= {f"negative_{name}": value[0].cpu() for name, value in self.encode("").items()}
        if not self._negative:
            self._negative = {name: value for name, value in encoded.items() if name.startswith("negative_")}
        self._kept[prompt] = {name: value for name, value in encoded.items() if not name.startswith("negative_")}

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        names = next((names for family, names in ENCODED.items() if isinstance(self.pipe, family)), None)
        if names is None:
            raise ValueError(
                f"{type(self.pipe).__name__} is not one of {', '.join(family.__name__ for family in ENCODED)}; "
                "pass encode=, a function from a prompt to the embeddings that the pipeline's call takes."
            )
        wanted = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": True, **text_length(self.pipe)}
        known = inspect.signature(self.pipe.encode_prompt).parameters
        arguments = {name: value for name, value in wanted.items() if name in known}
        encoded = self.pipe.encode_prompt([prompt], device=self.pipe.device, num_images_per_prompt=1, **arguments)
        return {name: value for name, value in zip(names, encoded, strict=True) if name is not None}
