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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from PIL.Image import Image
from torch import Tensor

from solver.samplers.caches import require_cache
from solver.samplers.calls import guidance, is_distilled_to_few_steps
from solver.samplers.cascade import Segment, diffusion_sigmas, encoded_once, run_segment, set_grid, sigma_grid
from solver.samplers.hiflow import model_patches
from solver.samplers.hiflow.alignment import StageAlignment, Trajectory, enlarge, sharpen
from solver.samplers.hiflow.continuing import check_smaller, fingerprints
from solver.samplers.hiflow.controls import control_of_stage, resized
from solver.samplers.hiflow.edges_first import edge_cells, edges_first
from solver.samplers.hiflow.inputs import (
    FEW_STEPS,
    check_guidance,
    check_mixable,
    check_negatives,
    check_pipeline,
    check_positions,
    given_image,
    native_size,
    picture_call,
    size_multiple,
    usual_sizes,
)
from solver.samplers.hiflow.memory import check_memory
from solver.samplers.hiflow.noise import (
    check_rule,
    clean_image,
    first_order,
    model_output_of,
    noised,
    prediction_type,
    stage_solver,
)
from solver.samplers.hiflow.pixels import encode, encoded_as_modes, tiled_where_needed
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
    decode,
    denoiser,
    has_flux_transformer,
    latent_shape,
    patch_size,
    seeded,
    vae_factor,
)
from solver.samplers.prompts import encoded, row_of


class HiFlowResult(NamedTuple):
    """What a cascade leaves.

    Attributes:
        images: float32 (B, 3, H, W) in [0, 1] for each size, base first (a given image first). NaN stays NaN.
        latents_BCHW: of the last size, unpacked.
        stages: the plan that was run, base first; of a given image only those after it.
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
    sizes: Sequence[Size] | None = None,
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
        sizes: in pixels, the one that the model knows first: sides of squares, or (height, width). By default that one
            or, with an image, the image's, twice and four times it a side, as far as the model has positions: 1024,
            2048 and 4096 of FLUX.1.
        preset: "code" or "paper", in as many steps as the model is distilled to; or a `plan.Recipe`, as it is; with
            other numbers of steps see `plan.with_steps`.
        image: a picture of the first size to start from instead of rendering it: PIL (turned as its EXIF says, on
            white where it is transparent), or (B or 1, 3, H, W) in [0, 1]. Its latents are the reference at every
            noise level. It may be smaller or larger than what the model knows.
        guidance_scale: one, or one a stage; by default the recipe's for FLUX.1-dev, else the pipeline's own. Where a
            pipeline calls it `true_cfg_scale`, it is that, with an empty negative prompt unless `call` has one.
        alignment: "full", or less of it, to see what it does: "none" (the last size alone, from noise), "init",
            "init+direction".
        scheduler: the solver of all stages: FlowMatchEulerDiscreteScheduler with its own shift, DDIMScheduler or a
            learned ConsistencySolverScheduler. By default the pipeline's own, or the first two in its configuration.
        call: further arguments of the pipeline: embeddings, a negative prompt, a control image (which is resized for
            each stage, and encoded without noise), Kontext's image to edit.
        ignore_memory: go on where the estimate says that it cannot fit.
        smaller: what an earlier call left that was the same with fewer of these sizes: only the others are rendered,
            and the pictures are those of a single call. To choose before enlarging, or to enlarge one base in several
            ways.

    Raises:
        ValueError: anything that does not fit together, said before the first step: sizes, steps, strengths, numbers
            of prompts and seeds, arguments in `call` that are said otherwise here, a scheduler that cannot walk the
            stages, a feature cache that is on, more memory than there is.
    """
    check_pipeline(pipe)
    require_cache(pipe, None)
    recipe = as_recipe(preset)
    if isinstance(preset, str) and is_distilled_to_few_steps(pipe):
        recipe = with_steps(recipe, FEW_STEPS)
    sizes = usual_sizes(pipe, image) if sizes is None else sizes
    known = None if image is None else native_size(pipe)  # of a rendered base the first size is the model's own
    stages = plan_stages(
        sizes,
        recipe,
        multiple=size_multiple(pipe),
        guidance_scale=guidance_scale,
        alignment=alignment,
        distilled_guidance=bool(denoiser(pipe).config.get("guidance_embeds")),
        model_patches=has_flux_transformer(pipe),
        known=known,
    )
    if image is not None and alignment == "none":
        raise ValueError('alignment="none" renders the last size from noise, so it takes no image.')
    if image is not None and len(stages) == 1:
        raise ValueError(f"sizes={tuple(sizes)} with an image: give its own size and a larger one.")
    first = as_size(sizes[0])
    base = known_size(first, known, vae_factor(pipe) * patch_size(pipe))
    check_positions(pipe, stages[-1])
    if stages[-1].edge_steps:
        check_mixable(pipe)
    call, seeds = picture_call(pipe, prompt, seed, call or {})
    if guidance_scale is not None:
        check_guidance(pipe, call)
    start = None if image is None else given_image(image, first, len(seeds)).to(pipe._execution_device)
    made_by = fingerprints(pipe, recipe, scheduler, call, seeds, start)
    rendered = stages if start is None else stages[1:]
    check_negatives(pipe, call, rendered)
    if smaller is not None and not isinstance(smaller, HiFlowResult):
        raise ValueError(f"smaller is a {type(smaller).__name__}: expected what an earlier hiflow() left.")
    if smaller is not None:
        check_smaller(smaller.stages, smaller.made_by, rendered, made_by)
    if not ignore_memory:
        check_memory(pipe, rendered[len(smaller.stages) if smaller else 0 :], len(seeds), call)

    with encoded_once(pipe), encoded_as_modes(pipe):
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
        grid: of a flow model's base run, before a learned solver moves it: a given Euler's, else the pipeline's. No
            stage shifts it again for its own size: at 4096² FLUX's shift would leave next to nothing but noise until
            the last step.
        levels: the noise levels that the solver walks, (N+1,).
    """

    def __init__(self, pipe, recipe: Recipe, base: tuple[int, int], scheduler, call: dict, seeds: list[int]):
        self.pipe, self.recipe, self.base, self.seeds = pipe, recipe, base, seeds
        self.scheduler, self.call = scheduler, call
        solver = stage_solver(pipe, scheduler)
        self.kind, self.grid = prediction_type(solver), None
        check_rule(recipe.acceleration, self.kind)
        if self.kind == "flow":
            own = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
            plain = first_order(scheduler if own else pipe.scheduler)
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

        call = self._call(stage.height, stage.width, stage.guidance_scale) | control_of_stage(self.call, stage)
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
        call["generator"] = [seeded(seed) for seed in self.seeds]  # for whatever a pipeline draws by itself
        # An `image` is a control image only beside a ControlNet: Kontext edits one.
        for name in ("control_image", *(("image",) if self.pipe.components.get("controlnet") is not None else ())):
            if name in call:
                call[name] = resized(call[name], height, width)
        return call


@contextmanager
def _patches(pipe: DiffusionPipeline, stage: Stage, base: tuple[int, int], is_shifted) -> Iterator[None]:
    """The changes inside the transformer that the stage asks for. Hooks run in the order of this list."""
    with ExitStack() as stack:
        if has_flux_transformer(pipe) and stage.height * stage.width > base[0] * base[1]:
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
