"""K-step previews of a batch of (prompt, seed), every row under a solver table of its own.

    renderer = Renderer(pipe, scheduler, height=64, width=64)
    table = scheduler.table_from_actions(actions_BKD, steps, **renderer.grid(steps))
    previews = renderer.render(prompts, seeds, guidance_scale=3.0, table=table)

The pipeline is stock. It knows one time for the whole batch, and evaluates every row at every step; a hook on its
denoiser gives each row the time of its own grid, and evaluates rows that are still equal once: members of a group
share prompt, noise and first timestep, so their first evaluation is paid once.

Shape suffixes: B rows, N rows as the denoiser sees them (2 B under classifier-free guidance), K steps, C H W latents.
"""

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from data.noise import initial_noise
from solver.prompt_embeddings import PromptEmbeddings
from solver.samplers.calls import encode_sources, guidance
from solver.samplers.cascade import call_at_size, replaced
from solver.samplers.latents import decode, is_video, latent_shape, pack, unpack
from solver.scheduling_consistency_solver import ConsistencySolverScheduler, SolverTable

HOOK_NAME = "proofsheet_rows"
SHARED_ARGUMENTS = ("img_ids", "txt_ids")  # positions of tokens: no batch, though their length may equal it


class Previews(NamedTuple):
    """What a rollout leaves.

    Attributes:
        latents_BCHW: float32, on the pipeline's device, unpacked for packed families as well.
        images_BCHW: float32 in [0, 1].
        network_evaluations: rows that the denoiser really evaluated; guidance counts twice.
        seconds: of `"rollout"` and `"decode"`.
    """

    latents_BCHW: Tensor
    images_BCHW: Tensor
    network_evaluations: int
    seconds: dict[str, float]


class Renderer:
    """Renders previews with a stock pipeline and the learned solver. Between calls the pipeline is as it was.

    Args:
        pipe: a pipeline of images that `solver.samplers.latents` knows, on its device. Its progress bar is turned off.
        scheduler: gives the pinned tables their meaning; need not be the pipeline's own.
        height, width: of the images, in pixels; the pipeline's own where they are None.
        batch_size: rows a pipeline call.
        encode: as in `PromptEmbeddings`.

    Raises:
        ValueError: the pipeline makes videos, or latents of the size cannot be.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        scheduler: ConsistencySolverScheduler,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 64,
        encode: Callable[[str], dict[str, Tensor]] | None = None,
    ):
        if is_video(pipe):
            raise ValueError(f"{type(pipe).__name__} makes videos; solvers are trained and compared on pictures.")
        self.pipe, self.scheduler, self.batch_size = pipe, scheduler, batch_size
        self.latent_shape = latent_shape(pipe, height, width)
        self.height, self.width = (side * pipe.vae_scale_factor for side in self.latent_shape[1:])
        self.embeddings = PromptEmbeddings(pipe, encode)
        self._grids: dict[int, dict] = {}
        pipe.set_progress_bar_config(disable=True)

    def render(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance_scale: float,
        table: SolverTable,
        sources: Sequence[Tensor] | None = None,
    ) -> Previews:
        """Previews of B rows in as many steps as the table has.

        Args:
            prompts, seeds: B each. Rows that share both (and the source) share their first evaluation, if they are in
                one batch.
            guidance_scale: of the pipeline's call.
            table: with a leading B, one a row; or without, one for all.
            sources: of an editing pipeline, B pictures to edit, uint8 (3, H, W) each.
        """
        batches = [slice(start, start + self.batch_size) for start in range(0, len(prompts), self.batch_size)]
        parts = [
            self._render(prompts[b], seeds[b], guidance_scale, rows_of(table, b), sources and sources[b])
            for b in batches
        ]
        latents, images, evaluations, seconds = zip(*parts, strict=True)
        seconds = {phase: sum(part[phase] for part in seconds) for phase in seconds[0]}
        return Previews(torch.cat(latents), torch.cat(images), sum(evaluations), seconds)

    def _render(self, prompts, seeds, guidance_scale: float, table: SolverTable, sources) -> Previews:
        seconds: dict[str, float] = {}
        with stopwatch(seconds, "rollout", self.pipe.device):
            call = self._call(prompts, seeds, guidance_scale, table.timesteps.shape[-1])
            rows = list(zip(prompts, seeds, strict=True))
            if sources is not None:
                call["image"], which = self._encode_once(sources)
                rows = list(zip(prompts, seeds, which, strict=True))
            with solving_rows(self.pipe, self.scheduler, table, rows) as hook:
                latents = self.pipe(**call)[0]
            latents_BCHW = unpack(self.pipe, latents, self.latent_shape).float()
        with stopwatch(seconds, "decode", self.pipe.device):
            images_BCHW = decode(self.pipe, latents_BCHW)
        return Previews(latents_BCHW, images_BCHW, hook.network_evaluations, seconds)

    def _encode_once(self, sources: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Latents (B, C, H, W) of pictures to edit, each distinct one encoded once, and which one a row has."""
        positions: dict[bytes, int] = {}
        which = [positions.setdefault(source.numpy().tobytes(), len(positions)) for source in sources]
        distinct = [sources[which.index(position)] for position in positions.values()]
        latents = torch.cat([encode_sources(self.pipe, source[None]) for source in distinct])
        return latents[which], which

    def _call(self, prompts: Sequence[str], seeds: Sequence[int], guidance_scale: float, steps: int) -> dict:
        call = {
            **self.embeddings(prompts),
            **guidance(self.pipe, guidance_scale),
            "latents": pack(self.pipe, initial_noise(seeds, self.latent_shape)),
            "num_inference_steps": steps,
        }
        return call_at_size(self.pipe, call, self.height, self.width)

    def grid(self, steps: int, prompt: str = "") -> dict:
        """What the pipeline says of its grid besides the number of steps: `sigmas`, `mu`, or nothing.

        Asked from the pipeline itself: its call is begun, and ended where it sets the timesteps.

        Args:
            steps: K.
            prompt: any; its embedding is needed to begin the call.
        """
        if not self.scheduler.is_flow:
            return {}
        if steps not in self._grids:
            self._grids[steps] = self._ask_for_grid(self._call([prompt], [0], 1.0, steps))
        return self._grids[steps]

    def _ask_for_grid(self, call: dict) -> dict:
        @functools.wraps(self.scheduler.set_timesteps)  # pipelines look at its signature
        def set_timesteps(num_inference_steps=None, device=None, **grid):
            raise _GridKnown({name: value for name, value in grid.items() if value is not None})

        with replaced(self.pipe, "scheduler", self.scheduler):
            self.scheduler.set_timesteps = set_timesteps
            try:
                self.pipe(**call)
            except _GridKnown as known:
                return known.args[0]
            finally:
                del self.scheduler.set_timesteps
        raise ValueError(f"{type(self.pipe).__name__} never called set_timesteps of its scheduler.")


class _GridKnown(Exception):
    """Ends a pipeline's call; carries the arguments of `set_timesteps`."""


class RowsHook(ModelHook):
    """Gives every row its own timestep, and evaluates each distinct row once at the first step.

    Under classifier-free guidance in one batch the denoiser sees the rows twice, unconditional ones first; pipelines
    that call it twice, or have no guidance, need nothing special.

    Args:
        scheduler: its `table` and `step_index` say which time it is for whom.
        rows: B hashable values; equal ones start from the same noise and prompt.
    """

    def __init__(self, scheduler: ConsistencySolverScheduler, rows: Sequence):
        super().__init__()
        self.scheduler = scheduler
        self.batch_size = len(rows)
        self.network_evaluations = 0
        positions: dict = {}
        self.member_of_B = torch.tensor([positions.setdefault(row, len(positions)) for row in rows])
        self.first_of = torch.tensor([rows.index(row) for row in positions])
        self.time_unit = 1  # of the pipeline's timesteps, in training timesteps

    def new_forward(self, module: nn.Module, *args, **kwargs):
        call = inspect.signature(self.fn_ref.original_forward).bind(*args, **kwargs)
        sample = next(iter(call.arguments.values()))
        first = not self.scheduler.step_index
        if len(sample) % self.batch_size:
            raise ValueError(f"The denoiser was given {len(sample)} rows, which is no multiple of {self.batch_size}.")
        call.arguments["timestep"] = self._timestep(call.arguments["timestep"], len(sample), first)
        if not first or len(self.first_of) == self.batch_size or not self._same_start():
            self.network_evaluations += len(sample)
            return self.fn_ref.original_forward(*call.args, **call.kwargs)

        copies = torch.arange(len(sample) // self.batch_size)[:, None]
        chosen = (self.first_of + self.batch_size * copies).flatten()
        back = (self.member_of_B + len(self.first_of) * copies).flatten()
        for name, value in call.arguments.items():
            if name not in SHARED_ARGUMENTS:
                call.arguments[name] = _take(value, chosen, len(sample))
        self.network_evaluations += len(chosen)
        output = self.fn_ref.original_forward(*call.args, **call.kwargs)
        return type(output)(_take(value, back, len(chosen)) for value in output)

    def _timestep(self, given, size: int, first: bool):
        """The table's timesteps of this step, `(N,)`, in the unit and dtype of the pipeline's own."""
        timesteps = self.scheduler.table.timesteps
        if timesteps.ndim == 1:  # one table for all: the pipeline's time is right
            return given
        now = 0 if first else self.scheduler.step_index
        if first:
            # Flux and its kin divide by the number of training timesteps.
            largest = float(self.scheduler.timesteps[0])
            self.time_unit = len(self.scheduler) if largest > 10 * float(given.max()) else 1
        return timesteps[:, now].to(given.device, given.dtype).repeat(size // self.batch_size) / self.time_unit

    def _same_start(self) -> bool:
        """Whether rows that are equal also have equal first timesteps; a learned grid keeps its ends."""
        timesteps = self.scheduler.table.timesteps
        if timesteps.ndim == 1:
            return True
        return torch.equal(timesteps[:, 0], timesteps[self.first_of, 0][self.member_of_B])


def _take(value, index: Tensor, size: int):
    """The chosen rows of an argument of the denoiser, whose batch is `size`; what has no batch stays as it is."""
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.ndim and len(value) == size else value
    if isinstance(value, dict):
        return {name: _take(item, index, size) for name, item in value.items()}
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        return type(value)(_take(item, index, size) for item in value)
    if isinstance(value, list) and len(value) == size:
        return [value[i] for i in index.tolist()]
    return value


@contextmanager
def solving_rows(
    pipe: DiffusionPipeline, scheduler: ConsistencySolverScheduler, table: SolverTable, rows: Sequence
) -> Iterator[RowsHook]:
    """Inside, `pipe` runs the given table with a `RowsHook`; afterwards it is as before.

    Args:
        pipe: a stock pipeline.
        scheduler: takes the place of the pipeline's own.
        table: pinned to it.
        rows: as in `RowsHook`.

    Raises:
        ValueError: the table is for another number of rows.
    """
    if table.timesteps.ndim == 2 and len(table.timesteps) != len(rows):
        raise ValueError(f"The table is for {len(table.timesteps)} rows, but there are {len(rows)}.")
    unet = pipe.components.get("unet")
    denoiser = pipe.transformer if unet is None else unet
    before = {name: vars(denoiser)[name] for name in ("forward", "_diffusers_hook") if name in vars(denoiser)}
    hook = RowsHook(scheduler, rows)
    HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(hook, HOOK_NAME)
    scheduler.set_table(table)
    try:
        with replaced(pipe, "scheduler", scheduler):
            yield hook
    finally:
        scheduler.clear_table()
        denoiser._diffusers_hook.remove_hook(HOOK_NAME, recurse=False)
        for name in ("forward", "_diffusers_hook"):
            if name not in before:
                delattr(denoiser, name)


@contextmanager
def stopwatch(seconds: dict[str, float], phase: str, device: torch.device) -> Iterator[None]:
    """Adds the seconds inside to `seconds[phase]`, waiting for the device at both ends."""
    _wait_for(device)
    start = time.perf_counter()
    yield
    _wait_for(device)
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows_of(table: SolverTable, rows: slice | Tensor) -> SolverTable:
    """The tables of some rows; a table for all stays as it is."""
    if table.timesteps.ndim == 1:
        return table
    return SolverTable(*(value[rows] for value in table))
