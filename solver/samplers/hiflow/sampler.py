"""HiFlow: pictures of two and four times the size that a model knows, without training.

    result = hiflow(pipe, "a lighthouse at dusk", seed=7, sizes=(1024, 2048, 4096))
    result.images[-1]                                    # (1, 3, 4096, 4096) in [0, 1]; result.images[0] is the 1K one

The base picture is rendered as ever, and its predictions of the clean image are kept. Each larger stage enlarges the
finished picture, puts noise on it, and walks the tail of the same grid, its flow aligned with the smaller one's
(`alignment`). Every stage is one stock call of the pipeline (`solver.samplers.cascade`), so LoRA, ControlNet and
quantised models work as they do without. What the recipes change inside FLUX is in `model_patches`.

Source: arXiv 2504.06232; paper and public code disagree, `plan.PRESETS` has both.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SchedulerMixin
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from solver.samplers.calls import guidance, guides_by_true_cfg
from solver.samplers.cascade import Segment, encoded_once, run_segment, set_grid, sigma_grid
from solver.samplers.digest import networks_digest, tensors_digest, weights_digest
from solver.samplers.hiflow import model_patches
from solver.samplers.hiflow.alignment import StageAlignment, Trajectory, enlarge, sharpen
from solver.samplers.hiflow.edges_first import edge_cells, edges_first
from solver.samplers.hiflow.memory import check_memory
from solver.samplers.hiflow.noise import (
    check_rule,
    clean_image,
    diffusion_sigmas,
    first_order,
    model_output_of,
    noised,
    prediction_type,
    stage_solver,
)
from solver.samplers.hiflow.pixels import encode, tiled_where_needed
from solver.samplers.hiflow.plan import (
    Recipe,
    Size,
    Stage,
    as_recipe,
    as_size,
    few_tokens,
    known_size,
    plan_stages,
    with_steps,
)
from solver.samplers.latents import (
    as_seeds,
    decode,
    default_size,
    denoiser,
    is_video,
    latent_shape,
    patch_size,
    seeded,
    vae_factor,
)
from solver.samplers.ralu.prompts import encoded, row_of

OURS = (
    *("prompt", "latents", "height", "width", "num_inference_steps", "sigmas", "timesteps", "guidance_scale"),
    *("generator", "num_images_per_prompt", "output_type", "return_dict", "denoising_start", "denoising_end"),
)  # arguments of a pipeline that are said in another way here
FEW_STEPS = 4  # of FLUX schnell
ENLARGING = "start and acceleration"  # of a recipe; a base alone has neither
# One a picture, or one for all.
TEXTS = ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")


class HiFlowResult(NamedTuple):
    """What a cascade leaves.

    Attributes:
        images: float32 (B, 3, H, W) in [0, 1] for each size, base first (a given image first). NaN stays NaN.
        latents_BCHW: of the last size, unpacked.
        stages: the plan that was run, base first.
        sigmas: noise levels that each stage walked: σ of flow models, σ/α of the others.
        predictions: of x_0 at the last size, by noise level: what a larger stage would follow.
        made_by: fingerprints of what was asked of what: a run that goes on from here has to have the same.
    """

    images: list[Tensor]
    latents_BCHW: Tensor
    stages: list[Stage]
    sigmas: list[list[float]]
    predictions: Trajectory
    made_by: dict[str, str]


@torch.no_grad()
def hiflow(
    pipe: DiffusionPipeline,
    prompt: str | Sequence[str] | None,
    seed: int | Sequence[int],
    sizes: Sequence[Size] = (1024, 2048, 4096),
    preset: str | Recipe = "code",
    image: Tensor | Image | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    alignment: str = "full",
    scheduler: SchedulerMixin | None = None,
    call: dict | None = None,
    ignore_memory: bool = False,
    smaller: HiFlowResult | None = None,
) -> HiFlowResult:
    """Pictures of growing size from one prompt and one seed, or from a batch of both.

    They are decoded here: a pipeline's safety checker and watermark do not see them.

    Args:
        pipe: a stock pipeline of images: FLUX.1 (dev, Kontext, schnell), SD3, SDXL, SD, with or without ControlNet.
            Afterwards it is as it was.
        prompt: one, or B. None where `call` has embeddings.
        seed: one a picture, or B; the same picture whatever else is in the batch. One prompt can have several seeds.
        sizes: in pixels, the one that the model knows first: sides of squares, or (height, width).
        preset: "code" or "paper", in as many steps as the model is distilled to; or a `plan.Recipe`, as it is; with
            other numbers of steps see `plan.with_steps`.
        image: a picture of the first size to start from instead of rendering it: PIL, or (B or 1, 3, H, W) in [0, 1].
            Its latents are the reference at every noise level. It may be smaller or larger than what the model knows.
        guidance_scale: one, or one a stage; by default the recipe's for FLUX.1-dev, else the pipeline's own. Where a
            pipeline calls it `true_cfg_scale`, it is that, with an empty negative prompt unless `call` has one.
        alignment: "full", or less of it, to see what it does: "none" (the last size alone, from noise), "init",
            "init+direction".
        scheduler: the solver of all stages: FlowMatchEulerDiscreteScheduler, DDIMScheduler or a learned
            ConsistencySolverScheduler. By default the pipeline's own, or the first two in its configuration.
        call: further arguments of the pipeline: embeddings, a negative prompt, a control image (which is resized for
            each stage), Kontext's image to edit.
        ignore_memory: go on where the estimate says that it cannot fit.
        smaller: what an earlier call left that was the same with fewer of these sizes: only the others are rendered,
            and the pictures are those of a single call. To choose before enlarging, or to enlarge one base in several
            ways.

    Raises:
        ValueError: anything that does not fit together, said before the first step: sizes, steps, strengths, numbers
            of prompts and seeds, arguments in `call` that are said otherwise here, more memory than there is.
    """
    _check_pipeline(pipe)
    recipe = as_recipe(preset)
    if isinstance(preset, str) and is_distilled_to_few_steps(pipe):
        recipe = with_steps(recipe, FEW_STEPS)
    known = None if image is None else _native_size(pipe)  # of a rendered base the first size is the model's own
    stages = plan_stages(
        sizes,
        recipe,
        multiple=vae_factor(pipe) * patch_size(pipe),
        guidance_scale=guidance_scale,
        alignment=alignment,
        distilled_guidance=bool(denoiser(pipe).config.get("guidance_embeds")),
        model_patches=model_patches.takes_patches(pipe),
        known=known,
    )
    if image is not None and alignment == "none":
        raise ValueError('alignment="none" renders the last size from noise, so it takes no image.')
    if image is not None and len(stages) == 1:
        raise ValueError(f"sizes={tuple(sizes)} with an image: give its own size and a larger one.")
    first = as_size(sizes[0])
    base = known_size(first, known, vae_factor(pipe) * patch_size(pipe))
    _check_positions(pipe, stages[-1])
    if stages[-1].edge_steps:
        _check_mixable(pipe)
    call, seeds = _picture_call(pipe, prompt, seed, call or {})
    if guidance_scale is not None:
        _check_guidance(pipe, call)
    start = None if image is None else _given_image(image, first, len(seeds)).to(pipe._execution_device)
    made_by = _made_by(pipe, recipe, scheduler, call, seeds, start)
    rendered = stages if start is None else stages[1:]
    if smaller is not None:
        _check_smaller(smaller, rendered, made_by)
    if not ignore_memory:
        check_memory(pipe, rendered[len(smaller.stages) if smaller else 0 :], len(seeds), call)

    with encoded_once(pipe):
        run = _Run(pipe, recipe, base, scheduler, call, seeds)
        return _cascade(run, rendered, start, smaller)._replace(made_by=made_by)


def _cascade(run: "_Run", stages: list[Stage], start: Tensor | None, smaller: HiFlowResult | None) -> HiFlowResult:
    """All stages but those that were run before, larger than a first picture that is given."""
    pipe = run.pipe
    generators = [seeded(seed) for seed in run.seeds]
    images, walked, reference, latents = [], [], None, None
    if start is not None:
        images = [start]
    if smaller is not None:
        images, walked, reference = [*smaller.images], [*smaller.sigmas], smaller.predictions
    rendered = len(walked)
    for i, stage in enumerate(stages):
        noise = torch.stack(
            [torch.randn(latent_shape(pipe, stage.height, stage.width), generator=g) for g in generators]
        )
        if i < rendered:  # its noise is drawn all the same, so that the next one is what it would be in a single call
            continue
        with tiled_where_needed(pipe, stage.height, stage.width):
            clean, sample = None, noise
            if images:
                clean, reference = run.enlarged(stage, images[-1], reference)
                sample = noised(clean, noise.to(clean.device), run.levels[stage.first], run.kind)
            if stage.edge_steps:
                latents, reference, sigmas = run.walk_edges_first(stage, sample, reference, clean, images[-1])
            else:
                latents, reference, sigmas = run.walk(stage, sample, reference)
            images.append(decode(pipe, latents))
            pipe.maybe_free_model_hooks()
        walked.append(sigmas)
    return HiFlowResult(images, latents, stages, walked, reference, {})


class _Run:
    """What all stages share: what was given, and the noise levels.

    Attributes:
        base: the size whose shift and positions all stages keep.
        kind: what the model predicts.
        grid: of a flow model's base run, before a learned solver moves it. No stage shifts it again for its own size:
            at 4096² FLUX's shift would leave next to nothing but noise until the last step.
        levels: the noise levels that the solver walks, (N+1,).
    """

    def __init__(self, pipe, recipe: Recipe, base: tuple[int, int], scheduler, call: dict, seeds: list[int]):
        self.pipe, self.recipe, self.base, self.seeds = pipe, recipe, base, seeds
        self.scheduler, self.call = scheduler, call
        solver = stage_solver(pipe, scheduler)
        self.kind, self.grid = prediction_type(solver), None
        check_rule(recipe.acceleration, self.kind)
        if self.kind == "flow":
            plain = first_order(pipe.scheduler)
            self.grid = sigma_grid(pipe, recipe.steps, *base, scheduler=plain, **self._call(*base))
            set_grid(solver, self.grid)
            self.levels = solver.sigmas.tolist()
        else:
            self.levels = diffusion_sigmas(solver, recipe.steps).tolist()

    def enlarged(self, stage: Stage, image: Tensor, reference: Trajectory | None) -> tuple[Tensor, Trajectory]:
        """The clean latents that the stage puts noise on, and what it follows."""
        _, height, width = latent_shape(self.pipe, stage.height, stage.width)
        if reference is None:  # a given image: its latents are all that is known, at every noise level
            reference = Trajectory({0.0: encode(self.pipe, image)})
        if self.recipe.start == "prediction":
            return enlarge(reference.at(self.levels[stage.first]), height, width), reference
        return encode(self.pipe, sharpen(enlarge(image, stage.height, stage.width))), reference

    def walk_edges_first(self, stage: Stage, sample: Tensor, reference: Trajectory, clean: Tensor, smaller: Tensor):
        """As `walk`, picture by picture, since each has other edges."""
        pixels = vae_factor(self.pipe) * patch_size(self.pipe)
        fine_Bhw = edge_cells(smaller, stage.height, stage.width, pixels, stage.edge_ratio)
        call, walked = encoded(self.pipe, self.call), []
        for i, fine_hw in enumerate(fine_Bhw):
            alone = copy.copy(self)
            alone.call, alone.seeds = row_of(call, i, len(fine_Bhw)), self.seeds[i : i + 1]
            rows = slice(i, i + 1)
            walked.append(alone.walk(stage, sample[rows], reference.row(i), (fine_hw, clean[rows])))
        latents, predictions, sigmas = zip(*walked, strict=True)
        return torch.cat(latents), Trajectory.of_rows(predictions), sigmas[0]

    def walk(
        self,
        stage: Stage,
        sample: Tensor,
        reference: Trajectory | None,
        edges: tuple[Tensor, Tensor] | None = None,
    ):
        """The stage's latents, its raw predictions, and the noise levels it saw.

        Args:
            stage: whose steps are walked.
            sample: latents at its first noise level.
            reference: predictions of the stage before.
            edges: where the stage begins with few tokens, the fine cells and the clean latents that noise was put on.
        """
        align = StageAlignment(
            reference,
            stage.ramp(stage.alpha),
            stage.ramp(stage.beta),
            stage.cutoff or 1.0,
            self.recipe.acceleration,
        )
        kind, seen = self.kind, []
        fine_hw, anchor = edges or (None, None)

        def on_step(sample, s, s_next, model_output):
            nonlocal anchor
            seen[:] = [*seen[: align.step], s, s_next]
            x = sample.float()
            x0 = anchor = align(clean_image(x, model_output.float(), s, kind), s)
            return (sample, model_output_of(x, x0, s, kind)) if align.active else None

        solver = stage_solver(self.pipe, self.scheduler)
        if kind != "flow" and not hasattr(solver, "sigmas"):  # DDIM has none of its own
            solver.sigmas = torch.tensor(self.levels)

        def here() -> tuple[Tensor, float]:
            return anchor, self.levels[stage.first + align.step]

        call = self._call(stage.height, stage.width, stage.guidance_scale) | _control_of_stage(self.call, stage)
        cut = stage.first + (stage.edge_steps if edges else 0)
        for first, stop in ((stage.first, cut), (cut, stage.stop)):
            if first == stop:
                continue
            with ExitStack() as inside:
                few = stop == cut
                patched = replace(stage, shifted_patches=False) if few else replace(stage, edge_steps=0)
                inside.enter_context(_patches(self.pipe, patched, self.base, lambda: align.step % 2 == 0))
                if few:
                    inside.enter_context(edges_first(denoiser(self.pipe), fine_hw, here))
                segment = Segment(self.grid, stage.height, stage.width, on_step, (first, stop, stage.stop))
                sample = run_segment(self.pipe, sample, segment, scheduler=solver, **call)
        return sample.float(), align.predictions, seen

    def _call(self, height: int, width: int, guidance_scale: float | None = None) -> dict:
        """The pipeline's arguments at this size."""
        call = dict(self.call)
        if guidance_scale is not None:
            given = any(call.get(f"negative_prompt{end}") is not None for end in ("", "_embeds"))
            call |= guidance(self.pipe, guidance_scale, () if given else [""] * len(self.seeds))
        # For what a pipeline draws by itself, such as the latents of a control image.
        call["generator"] = [seeded(seed) for seed in self.seeds]
        if self.pipe.components.get("controlnet") is not None:
            for name in ("control_image", "image"):
                if name in call:
                    call[name] = _resized(call[name], height, width)
        return call


def _control_of_stage(call: dict, stage: Stage) -> dict:
    """Where a ControlNet begins and ends, as shares of the stage's steps instead of the whole grid's."""

    def share(value):
        if isinstance(value, list | tuple):
            return [share(one) for one in value]
        return min(max((value * stage.stop - stage.first) / stage.steps, 0.0), 1.0)

    names = ("control_guidance_start", "control_guidance_end")
    return {name: share(call[name]) for name in names if call.get(name) is not None}


@contextmanager
def _patches(pipe: DiffusionPipeline, stage: Stage, base: tuple[int, int], is_shifted) -> Iterator[None]:
    """The changes inside the transformer that the stage asks for. Hooks run in the order of this list."""
    with ExitStack() as stack:
        if model_patches.takes_patches(pipe) and stage.height * stage.width > base[0] * base[1]:
            pixels = vae_factor(pipe) * patch_size(pipe)
            rows, columns = stage.height // pixels, stage.width // pixels
            base_rows, base_columns = base[0] // pixels, base[1] // pixels
            down, right = stage.text_copies
            scale = (rows / base_rows, columns / base_columns)
            stack.enter_context(model_patches.rope_base(pipe, stage.ntk_factor))
            for network in model_patches.networks(pipe):
                stack.enter_context(model_patches.exact_positions(network, (rows, columns)))
                stack.enter_context(model_patches.stretched_condition(network, rows * columns, scale))
                if stage.proportional_attention:
                    tokens = (rows * columns, base_rows * base_columns)
                    present = few_tokens(tokens[0], stage.edge_ratio) if stage.edge_steps else None
                    stack.enter_context(model_patches.attention_scale(network, *tokens, down * right, present))
                if down * right > 1:
                    tile = (base_rows, base_columns)
                    stack.enter_context(model_patches.repeated_text(network, stage.text_copies, tile))
            if stage.shifted_patches:
                stack.enter_context(model_patches.shifted_patches(pipe, (rows, columns), is_shifted))
        yield


def _resized(control, height: int, width: int):
    """A control image of the stage's size. PIL images are left to the pipeline, which resamples them well."""
    if isinstance(control, list | tuple):
        return [_resized(one, height, width) for one in control]
    if not isinstance(control, Tensor):
        return control
    batch = control if control.ndim == 4 else control[None]
    resized = F.interpolate(batch, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(control.min(), control.max())  # bicubic overshoots


# ---- what was given ----


def _check_pipeline(pipe: DiffusionPipeline) -> None:
    """Raises ValueError unless the pipeline makes pictures from noise that it is given."""
    if is_video(pipe):
        raise ValueError(f"{type(pipe).__name__} makes videos; HiFlow is for pipelines that make images.")
    takes = inspect.signature(pipe.__call__).parameters
    if "latents" not in takes or "strength" in takes:
        raise ValueError(
            f"{type(pipe).__name__} does not begin with noise that it is given; take the text-to-image pipeline of "
            "the same model, and image= for a picture to enlarge."
        )


def _check_mixable(pipe: DiffusionPipeline) -> None:
    """Raises ValueError where the tokens of the picture cannot be mixed, or are not all that there is."""
    if pipe.components.get("controlnet") is not None:
        raise ValueError("edges_first: a ControlNet sees all tokens at every step; leave one of the two out.")
    network = denoiser(pipe)
    if type(network) is not FluxTransformer2DModel:
        raise ValueError(
            f"edges_first mixes tokens of a FluxTransformer2DModel and cannot see into a {type(network).__name__}. "
            "A compiled one works with transformer.compile_repeated_blocks()."
        )
    if network.config.in_channels != latent_shape(pipe, *default_size(pipe))[0] * patch_size(pipe) ** 2:
        raise ValueError(
            f"edges_first: the tokens of {type(pipe).__name__} hold a control image beside the picture; leave "
            "edges_first out."
        )


def _native_size(pipe: DiffusionPipeline) -> tuple[int, int] | None:
    """What a transformer is made for. None of UNets and PixArt, which keep neither shift nor positions.

    The autoencoder says it: FluxPipeline has a constant instead.
    """
    if not hasattr(pipe, "default_sample_size"):
        return None
    side = pipe.vae.config.get("sample_size")
    return (side, side) if side else default_size(pipe)


def is_distilled_to_few_steps(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline is of FLUX schnell's kind: its grid is not shifted, and it is told no guidance."""
    config = pipe.scheduler.config
    plain = not config.get("use_dynamic_shifting") and config.get("shift") == 1.0
    return plain and model_patches.takes_patches(pipe) and not denoiser(pipe).config.get("guidance_embeds")


def _made_by(pipe, recipe: Recipe, scheduler, call: dict, seeds: list[int], start: Tensor | None) -> dict[str, str]:
    """What decides the pictures, sizes and guidance apart, which the stages have."""
    solver = pipe.scheduler if scheduler is None else scheduler
    policy = getattr(solver, "policy", None)
    return {
        "pipeline": f"{type(pipe).__name__} {weights_digest(pipe)}",
        "scheduler": f"{type(solver).__name__} {dict(solver.config)} {policy and networks_digest({'': policy})}",
        "steps": str(recipe.steps),
        ENLARGING: f"{recipe.start}, {recipe.acceleration}",
        "prompts and seeds": f"{seeds} {[(name, _fingerprint(value)) for name, value in sorted(call.items())]}",
        "image": "" if start is None else tensors_digest({"": start}),
    }


def _fingerprint(value) -> str:
    if isinstance(value, Tensor):
        return tensors_digest({"": value})
    if isinstance(value, Image):
        return tensors_digest({value.mode: to_tensor(value)})
    return str([_fingerprint(one) for one in value]) if isinstance(value, list | tuple) else repr(value)


def _picture_call(pipe, prompt, seed, call: dict) -> tuple[dict, list[int]]:
    """The pipeline's arguments for B pictures, and their seeds."""
    if ours := sorted(set(call) & set(OURS)):
        raise ValueError(f"call has {', '.join(ours)}: hiflow says these itself, through its own arguments.")
    if unknown := sorted(set(call) - set(inspect.signature(pipe.__call__).parameters)):
        raise ValueError(f"call has {', '.join(unknown)}, which {type(pipe).__name__} does not take.")
    if call.get("eta"):
        raise ValueError(f"eta={call['eta']}: HiFlow's stages are deterministic, leave it out.")
    seeds = as_seeds(seed)
    if prompt is None:
        if call.get("prompt_embeds") is None:
            raise ValueError("There is neither a prompt nor prompt_embeds in call.")
        if len(call["prompt_embeds"]) != len(seeds):
            raise ValueError(f"{len(call['prompt_embeds'])} rows of prompt_embeds, but {len(seeds)} seeds: one each.")
        return call, seeds
    prompts = [prompt] * len(seeds) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(seeds) or not seeds:
        raise ValueError(f"{len(prompts)} prompts, but {len(seeds)} seeds: every picture has one of each.")
    spread = {name: [call[name]] * len(seeds) for name in TEXTS if isinstance(call.get(name), str)}
    return {**call, **spread, "prompt": prompts}, seeds


def _check_guidance(pipe, call: dict) -> None:
    """A guidance scale of FLUX schnell or Qwen-Image is a `true_cfg_scale`, which needs a negative prompt."""
    if not guides_by_true_cfg(pipe):
        return
    if "true_cfg_scale" in call:
        raise ValueError(
            f"call has true_cfg_scale={call['true_cfg_scale']}, which is what guidance_scale is for "
            f"{type(pipe).__name__} with this model: give one of the two."
        )
    if call.get("prompt") is None and call.get("negative_prompt_embeds") is None:
        raise ValueError("guidance_scale with prompt_embeds needs negative_prompt_embeds in call as well.")


def _given_image(image, base: tuple[int, int], batch: int) -> Tensor:
    """float32 (B, 3, H, W) of the base size."""
    if not isinstance(image, Tensor | Image):
        raise ValueError(f"image is a {type(image).__name__}: expected a PIL image or a tensor.")
    picture = image if isinstance(image, Tensor) else to_tensor(image.convert("RGB"))
    picture = (picture if picture.ndim == 4 else picture[None]).float()
    if picture.ndim != 4 or picture.shape[1] != 3 or len(picture) not in (1, batch):
        raise ValueError(
            f"image of shape {tuple(picture.shape)}: expected (3, H, W), (1, 3, H, W) or ({batch}, 3, H, W)."
        )
    if tuple(picture.shape[-2:]) != base:
        raise ValueError(
            f"image of {picture.shape[-2]} x {picture.shape[-1]} pixels, but sizes begin with {base[0]} x {base[1]}: "
            "resize the image, or let sizes begin with its own."
        )
    if not (picture.min() >= 0 and picture.max() <= 1):
        raise ValueError(f"image has values from {picture.min():g} to {picture.max():g}: expected [0, 1].")
    return picture.expand(batch, -1, -1, -1)


def _check_smaller(smaller: HiFlowResult, stages: list[Stage], made_by: dict[str, str]) -> None:
    """Raises ValueError unless the earlier result is the beginning of this run."""
    done = smaller.stages
    counts = [name for name in made_by if name != ENLARGING or any(stage.cutoff is not None for stage in done)]
    if differing := [name for name in counts if smaller.made_by.get(name) != made_by[name]]:
        raise ValueError(f"smaller is of another run: its {', '.join(differing)} differed.")
    if len(done) >= len(stages) or done != stages[: len(done)]:
        sizes = [[f"{stage.height} x {stage.width}" for stage in plan] for plan in (done, stages)]
        raise ValueError(
            f"smaller has {', '.join(sizes[0])}, and {', '.join(sizes[1])} are to be rendered: it has to be the "
            "beginning of that, with the same guidance and alignment, and edges_first is of the last size alone."
        )


def _check_positions(pipe: DiffusionPipeline, largest: Stage) -> None:
    """SD3's table of positions ends somewhere."""
    table = getattr(getattr(denoiser(pipe), "pos_embed", None), "pos_embed_max_size", None)
    pixels = vae_factor(pipe) * patch_size(pipe)
    if table is not None and max(largest.height, largest.width) > table * pixels:
        raise ValueError(
            f"{largest.height} x {largest.width}: {type(denoiser(pipe)).__name__} has positions for {table * pixels} "
            "pixels a side and no more."
        )
