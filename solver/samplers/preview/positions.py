"""Position ids of the small tokens as they were at full size: every s-th row and column."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook

from solver.samplers.latents import denoiser
from solver.samplers.preview.options import PreviewOptions

HOOK_NAME = "proofsheet_positions"


class StridedPositions(ModelHook):
    """Multiplies rows and columns of the image's ids; those of a reference image (first id 1) stay."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def pre_forward(self, module, *args, **kwargs):
        ids = kwargs["img_ids"]
        own = ids[:, :1] == 0
        scaled = ids.clone()
        scaled[:, 1:] = ids[:, 1:] * (1 + own * (self.stride - 1))
        return args, {**kwargs, "img_ids": scaled}


@contextmanager
def strided_positions(pipe: DiffusionPipeline, options: PreviewOptions) -> Iterator[None]:
    """Inside, the denoiser is told full-size ids if the options say so.

    Raises:
        ValueError: the denoiser is not told ids.
    """
    if options.positions == "native":
        yield
        return
    model = denoiser(pipe)
    if "Flux" not in type(model).__name__:
        raise ValueError(f"positions='strided': {type(model).__name__} is not told the positions of its tokens.")
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(StridedPositions(options.scale), HOOK_NAME)
    try:
        yield
    finally:
        registry.remove_hook(HOOK_NAME, recurse=False)
