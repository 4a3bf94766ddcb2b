"""A run cut into segments, each a stock pipeline call at its own size, on its own piece of the grid of sigmas.

    sigmas = sigma_grid(pipe, 30, height=1024, width=1024, **call)              # (31,), 1 → 0
    x = run_segment(pipe, noise_BCHW, Segment(sigmas[:11], 1024, 1024), **call)
    x = run_segment(pipe, x[..., ::2, ::2], Segment(sigmas[10:], 512, 512, on_step=guide), **call)

`call` is what the pipeline takes besides: prompts or embeddings, guidance, frames, an image to edit. The scheduler is
the only thing that is replaced, and only during the call: by a `SegmentScheduler`, which runs the given sigmas
whatever the pipeline asks for, and lets `on_step` change the sample and the model output before the solver's step.
Families differ in how a grid is named (Wan names none), not in how it is walked, so this works on all of them.

Segments with `steps` instead of sigmas are pieces of the grid that the pipeline itself makes for a number of steps.
There the solver can be any scheduler, and its history goes on where the segment before left it: pieces put together
are the uninterrupted run, bit for bit.

Time: σ runs from 1 (noise) to 0, as in diffusers.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    SchedulerMixin,
)
from torch import Tensor

from solver.samplers.latents import is_packed, latent_shape, pack, unpack
from solver.scheduling_consistency_solver import ConsistencySolverScheduler, Grid, SolverTable

# (sample, sigma, sigma_next, model_output) -> (sample, model_output) for the solver's step, or None to change nothing.
# Both are unpacked, (B, C, H, W) or (B, C, T, H, W), in the dtypes of the pipeline; model_output is after guidance.
StepFunction = Callable[[Tensor, float, float, Tensor], tuple[Tensor, Tensor] | None]


class Segment(NamedTuple):
    """A piece of a run.

    Attributes:
        sigmas: (K+1,) falling, both ends included; flow models only. None for the pipeline's own grid.
        height, width: of the picture, in pixels.
        on_step: called before each of the solver's steps.
        steps: (first, stop, of): only steps first .. stop-1 of the `of` steps of the grid; all of them where it is
            None, which needs sigmas.
    """

    sigmas: Sequence[float] | Tensor | None
    height: int
    width: int
    on_step: StepFunction | None = None
    steps: tuple[int, int, int] | None = None


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler belongs to a flow model; of one that walks a segment, the solver behind it."""
    if isinstance(scheduler, SegmentScheduler):
        return is_flow(scheduler._solver)
    named = any("FlowMatch" in kind.__name__ for kind in type(scheduler).__mro__)
    return named or scheduler.config.get("prediction_type") == "flow_prediction"


@torch.no_grad()
def run_segment(
    pipe: DiffusionPipeline,
    latents: Tensor,
    segment: Segment,
    scheduler: SchedulerMixin | None = None,
    **call,
) -> Tensor:
    """One segment, from latents to latents.

    Args:
        pipe: a stock pipeline; afterwards it has its own scheduler again.
        latents: unpacked, (B, C, H, W) or (B, C, T, H, W), of the segment's size.
        segment: which sigmas, at which size.
        scheduler: the solver; a copy of the pipeline's own if None. Where it stands at the first step of the segment,
            because it walked the one before of as many steps, it goes on with its grid and its history; else it starts
            afresh.
        call: of the pipeline, besides latents, size, steps and output.

    Returns:
        the latents at the segment's end, unpacked, in the dtype of the pipeline's run.

    Raises:
        ValueError: the latents are not of the segment's size, the sigmas do not fall, there are no such steps, or the
            solver cannot walk a given grid, or evaluates the network more than once a step.
    """
    shape = latent_shape(pipe, segment.height, segment.width, call.get("num_frames"))
    if tuple(latents.shape[1:]) != shape:
        raise ValueError(
            f"latents of shape {tuple(latents.shape)}: a picture of {segment.height} x {segment.width} pixels has "
            f"(B, {', '.join(map(str, shape))})."
        )
    stand_in = SegmentScheduler(
        fresh_copy(pipe.scheduler) if scheduler is None else scheduler,
        segment,
        to_grid=lambda tokens: unpack(pipe, tokens, shape),
        from_grid=lambda grid: pipe._pack_latents(grid, *grid.shape) if is_packed(pipe) else grid,
        # It tells its network the time in the dtype of the latents, which are float32 again where a call begins.
        time_dtype=latents.dtype if isinstance(pipe, HunyuanVideoPipeline) else None,
    )
    with replaced(pipe, "scheduler", stand_in):
        answer = pipe(
            **call_at_size(pipe, call, segment.height, segment.width),
            latents=pack(pipe, latents),
            num_inference_steps=_piece(segment)[2],
        )[0]
    return unpack(pipe, answer, shape)


def sigma_grid(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    height: int,
    width: int,
    scheduler: SchedulerMixin | None = None,
    **call,
) -> Tensor:
    """The sigmas that the pipeline's own call would walk at this size: float32 (K+1,), from noise to image.

    Asked from the pipeline itself: its call is begun, and ended where it sets the timesteps. The denoiser is not
    evaluated; prompts are encoded.

    Args: as in `run_segment`.

    Raises:
        ValueError: the pipeline is of no flow model.
    """
    scheduler = fresh_copy(pipe.scheduler) if scheduler is None else scheduler
    require_flow(pipe, scheduler)
    shape = latent_shape(pipe, height, width, call.get("num_frames"))
    with replaced(pipe, "scheduler", _AskedScheduler(scheduler)), suppress(_GridKnown):
        latents = pack(pipe, torch.zeros(number_of_pictures(call), *shape))
        pipe(**call_at_size(pipe, call, height, width), latents=latents, num_inference_steps=num_inference_steps)
    return scheduler.sigmas.detach().cpu().float()


def diffusion_sigmas(scheduler: SchedulerMixin, steps: int, device: torch.device | None = None) -> Tensor:
    """σ/α at the points of the scheduler's own grid of an ε- or v-model, (K+1,), and sets it."""
    scheduler.set_timesteps(steps, device=device)
    if not isinstance(scheduler, DDIMScheduler):
        return scheduler.sigmas.cpu().float()
    signal = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps.cpu()], scheduler.final_alpha_cumprod[None]])
    return ((1 - signal) / signal).sqrt().float()


def fresh_copy(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A copy that stands nowhere in a run, whatever the original last did."""
    scheduler = copy.deepcopy(scheduler)
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = None
    return scheduler


def call_at_size(pipe: DiffusionPipeline, call: dict, height: int, width: int) -> dict:
    """The call at a size in pixels, in latents. FLUX Kontext would scale any size to the area it knows best."""
    area = {"max_area": height * width} if "max_area" in inspect.signature(pipe.__call__).parameters else {}
    return {**call, **area, "height": height, "width": width, "output_type": "latent", "return_dict": False}


def number_of_pictures(call: dict) -> int:
    """How many pictures a call asks for.

    Raises:
        ValueError: it has neither prompts nor embeddings.
    """
    given = next((call[name] for name in ("prompt", "prompt_embeds") if call.get(name) is not None), None)
    if given is None:
        raise ValueError("The pipeline's call has neither prompt nor prompt_embeds.")
    return 1 if isinstance(given, str) else len(given)


def require_flow(pipe: DiffusionPipeline, scheduler: SchedulerMixin) -> None:
    """Raises ValueError unless the scheduler is one of flow models."""
    if not is_flow(scheduler):
        raise ValueError(
            f"{type(pipe).__name__} with {type(scheduler).__name__} is no flow model; grids of sigmas, and with them "
            "previews, are for rectified-flow models such as FLUX, SD3, Qwen-Image, Wan and HunyuanVideo."
        )


def require_deterministic(scheduler: SchedulerMixin) -> None:
    """Raises ValueError if the scheduler draws noise at every step, from no seed that it is given here."""
    config = scheduler.config
    if config.get("stochastic_sampling") or str(config.get("algorithm_type")).startswith("sde"):
        raise ValueError(
            f"This {type(scheduler).__name__} draws noise at every step, so that no two runs are the same; use one "
            "without stochastic_sampling or an sde algorithm_type."
        )


class SegmentScheduler:
    """Stands in for a pipeline's scheduler: walks a segment, whatever grid the pipeline asks for.

    Everything else is answered by the scheduler behind it, so the pipeline sees the configuration it knows.

    Args:
        scheduler: the solver. It is used as it is, so that its history can go on from segment to segment.
        segment: what to walk.
        to_grid, from_grid: between the pipeline's layout and the one of `on_step`.
        time_dtype: what the times are rounded to, after the first segment.

    Raises:
        ValueError: the solver evaluates the network more than once a step.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        segment: Segment,
        to_grid: Callable[[Tensor], Tensor],
        from_grid: Callable[[Tensor], Tensor],
        time_dtype: torch.dtype | None = None,
    ):
        self._solver, self._segment, self._to_grid, self._from_grid = scheduler, segment, to_grid, from_grid
        self._time_dtype = time_dtype
        if scheduler.order != 1:
            raise ValueError(
                f"{type(scheduler).__name__} evaluates the network {scheduler.order} times a step; segments need one."
            )
        self._done, self._walked = 0, []
        self._first, self._stop, self._of = _piece(segment)

    def __getattr__(self, name: str):
        return getattr(self._solver, name)

    def __len__(self) -> int:
        return len(self._solver)

    @property
    def timesteps(self) -> Tensor:
        timesteps = self._solver.timesteps[self._first : self._stop]
        return timesteps.to(self._time_dtype).to(timesteps.dtype) if self._time_dtype and self._first else timesteps

    @property
    def sigmas(self) -> Tensor:
        return self._solver.sigmas[self._first : self._stop + 1]

    @property
    def init_noise_sigma(self) -> float:
        """Only the first segment starts from noise that may have to be scaled."""
        return self._solver.init_noise_sigma if self._first == 0 else 1.0

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, timesteps=None, mu=None) -> None:
        """Sets the solver to the segment's grid, unless it is there: given sigmas, or what the pipeline asks for."""
        self._done = 0
        stands_here = getattr(self._solver, "step_index", None) == self._first
        if self._first > 0 and stands_here and len(self._solver.timesteps) == self._of:
            return
        if self._segment.sigmas is not None:
            set_grid(self._solver, self._segment.sigmas, device)
        else:
            set_own_grid(self._solver, num_inference_steps, device, sigmas=sigmas, timesteps=timesteps, mu=mu)
        if len(self._solver.timesteps) != self._of:
            raise ValueError(
                f"{type(self._solver).__name__} makes {len(self._solver.timesteps)} evaluations of {self._of} steps; "
                "segments need one a step."
            )
        if hasattr(self._solver, "set_begin_index"):
            self._solver.set_begin_index(self._first)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The pipeline's begin is the segment's, which is set already."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True):
        """The solver's step, after `on_step`."""
        if self._segment.on_step is not None:
            if self._done == 0:
                self._walked = self.sigmas.tolist()  # once: a GPU would be waited for
            sigma, sigma_next = self._walked[self._done : self._done + 2]
            changed = self._segment.on_step(self._to_grid(sample), sigma, sigma_next, self._to_grid(model_output))
            if changed is not None:
                sample, model_output = (
                    self._from_grid(new).to(old.dtype)
                    for new, old in zip(changed, (sample, model_output), strict=True)
                )
        self._done += 1
        return self._solver.step(model_output, timestep, sample, return_dict=return_dict)


def _piece(segment: Segment) -> tuple[int, int, int]:
    """First step, stop, and number of steps of the segment's grid. Raises ValueError for a piece that is none."""
    if segment.steps is None and segment.sigmas is None:
        raise ValueError("A segment without sigmas needs steps=(first, stop, of) of the pipeline's own grid.")
    first, stop, of = segment.steps or (0, len(segment.sigmas) - 1, len(segment.sigmas) - 1)
    if not 0 <= first < stop <= of:
        raise ValueError(f"steps={(first, stop, of)}: expected 0 <= first < stop <= of.")
    if segment.sigmas is not None and len(segment.sigmas) != of + 1:
        raise ValueError(f"steps={(first, stop, of)} of {len(segment.sigmas)} sigmas: expected {of + 1} of them.")
    return first, stop, of


class _GridKnown(Exception):
    """Ends a pipeline's call when its grid is set."""


class _AskedScheduler(SegmentScheduler):
    """Lets the pipeline set its grid, and then ends the call."""

    def __init__(self, scheduler: SchedulerMixin):
        self._solver = scheduler

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, timesteps=None, mu=None) -> None:
        set_own_grid(self._solver, num_inference_steps, device, sigmas=sigmas, timesteps=timesteps, mu=mu)
        raise _GridKnown


def set_own_grid(scheduler: SchedulerMixin, num_inference_steps: int | None, device, **asked) -> None:
    """`set_timesteps` as `retrieve_timesteps` of the pipelines calls it: what was not asked for is not passed."""
    asked = {name: value for name, value in asked.items() if value is not None}
    if "sigmas" in asked or "timesteps" in asked:  # then the number of steps is not said
        scheduler.set_timesteps(device=device, **asked)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device, **asked)


def set_grid(scheduler: SchedulerMixin, sigmas: Sequence[float] | Tensor, device=None) -> None:
    """Sets a solver of a flow model to exactly these sigmas, and empties its history.

    A `ConsistencySolverScheduler` takes them as its base grid: its weights are those that the policy has for it, and a
    learned grid moves the points between the ends. Zero-length steps are allowed.

    Args:
        scheduler: a `FlowMatchEulerDiscreteScheduler`, or a `ConsistencySolverScheduler` of a flow model.
        sigmas: (K+1,), falling, in [0, 1].
        device: of the timesteps.

    Raises:
        ValueError: the sigmas do not fall, or the solver cannot walk a given grid.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float32).cpu()
    if len(sigmas) < 2 or not (sigmas.diff() <= 0).all() or sigmas[0] > 1 or sigmas[-1] < 0:  # NaN falls nowhere
        raise ValueError(f"sigmas {sigmas.tolist()}: expected two or more that fall from at most 1 to at least 0.")
    if isinstance(scheduler, ConsistencySolverScheduler):
        table = _table_on(scheduler, sigmas)
        scheduler.set_table(table)
        try:
            scheduler.set_timesteps(len(sigmas) - 1, device=device)
        finally:
            scheduler.clear_table()
        return
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"{type(scheduler).__name__} cannot be set to given sigmas; use FlowMatchEulerDiscreteScheduler or "
            "ConsistencySolverScheduler."
        )
    scheduler.num_inference_steps = len(sigmas) - 1
    # The product in float32 on the device, as in its own set_timesteps.
    scheduler.sigmas = sigmas.to(device)
    scheduler.timesteps = scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps
    scheduler._step_index = scheduler._begin_index = None


def _table_on(scheduler: ConsistencySolverScheduler, sigmas: Tensor) -> SolverTable:
    """The solver's table with these sigmas as the base grid."""
    if not scheduler.is_flow:
        raise ValueError(
            f"This ConsistencySolverScheduler has prediction_type={scheduler.config.prediction_type!r}; grids of "
            "sigmas are for flow models."
        )
    timesteps = sigmas[:-1] * scheduler.config.num_train_timesteps
    here = copy.copy(scheduler)
    here.base_grid = lambda *args, **grid: (timesteps.double(), Grid.flow(sigmas.double()))
    return here.coefficients(len(timesteps))


@contextmanager
def encoded_once(pipe: DiffusionPipeline) -> Iterator[None]:
    """Inside, the pipeline encodes the same prompts once, however many calls a cascade makes."""
    encode, own, kept = pipe.encode_prompt, vars(pipe).get("encode_prompt"), {}

    def encode_prompt(*args, **kwargs):
        # Tensors are told apart by identity: those of the cascade's call live as long as this does.
        values = [*args, *itertools.chain.from_iterable(kwargs.items())]
        key = tuple(id(value) if isinstance(value, Tensor) else repr(value) for value in values)
        if key not in kept:
            kept[key] = (encode(*args, **kwargs), values)
        return kept[key][0]

    pipe.encode_prompt = encode_prompt
    try:
        yield
    finally:
        if own is None:
            del pipe.encode_prompt
        else:  # somebody's own stands in for the class's
            pipe.encode_prompt = own


@contextmanager
def replaced(pipe: DiffusionPipeline, name: str, component) -> Iterator[None]:
    """Inside, a component of the pipeline is another one. Its record of where components come from stays."""
    own = pipe.components[name]
    object.__setattr__(pipe, name, component)
    try:
        yield
    finally:
        object.__setattr__(pipe, name, own)
