"""The solvers of a comparison, as schedulers for a stock pipeline.

Classical ones are the tables of `solver.multistep`, which are tested to equal diffusers' schedulers, on one grid for
all: each timestep spacing that diffusers knows, ending where the full-step pictures end, at the lowest training noise;
on a flow model the pipeline's own, and that of diffusers' DPM-Solver++ in flow mode. Solvers on one grid so begin with
the same step, to the last bit.

The pipeline's own grid of a flow model begins at σ = 1, where log-SNR is infinite: there the second step of a rule in
log-SNR is Euler's, and in 3 steps with a first-order end all of them are. The other one begins at 0.999.
(diffusers' DEIS repeats its last σ in flow mode, so that its last evaluation is for nothing; ours goes on to 0.)

The number of steps is that of network evaluations. Solvers of two evaluations a step take every second point of the
grid: singlestep DPM-Solver-2 spends exactly as many as it is given, Heun one less where that number is even, since its
last step is Euler's.
"""

import inspect
from collections.abc import Callable, Mapping

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

from evaluation.cache import fingerprint
from solver import ConsistencySolverScheduler, SolverTable
from solver.multistep import RULES
from solver.samplers.cascade import is_flow
from solver.scheduling_consistency_solver import Grid

SPACINGS = ("leading", "trailing", "linspace")
OWN_GRID, FLOW_MODE_GRID = "own", "flow_mode"
# scheduler of a pipeline, number of steps, guidance scale -> scheduler of the run
Factory = Callable[[SchedulerMixin, int, float], SchedulerMixin]

# name -> rule of solver.multistep and its order
CLASSICAL = {
    "ddim": ("ddim", 1),
    "ab2": ("ab2", 2),
    "ipndm": ("ipndm", 4),
    "deis": ("deis", 2),
    "dpm2m": ("dpm2m", 2),
    "dpm2s": ("dpm2s", 2),
    "dpmpp2m": ("dpmpp2m", 2),
    "unipc": ("unipcpp2", 2),
}
LOWER_ORDER_FINAL = ("deis", "dpm2m", "dpmpp2m")  # the last of less than 15 steps is first order, as in diffusers
GRID = {"final_sigmas_type": "sigma_min", "use_karras_sigmas": False}
HEUN = "heun"
FLOW_RULES = {**CLASSICAL, "euler": CLASSICAL["ddim"]}  # the same there
FLOW_SOLVERS = (*FLOW_RULES, HEUN)


class RuleScheduler(ConsistencySolverScheduler):
    """A rule of `solver.multistep` as a scheduler: `RuleScheduler.of("ipndm", 4, pipe.scheduler, steps=5)`."""

    rule, rule_order = "ddim", 1

    @classmethod
    def of(cls, rule: str, order: int, scheduler: SchedulerMixin, steps: int) -> "RuleScheduler":
        """The rule on the grid of a scheduler. Some rules reach back as far as there are steps."""
        settings = {"learn_grid": False, "lower_order_final": rule in LOWER_ORDER_FINAL}
        made = cls.from_scheduler(scheduler, order=max(order, steps), **settings)
        made.rule, made.rule_order = rule, order
        return made

    def _base_weights(self, points: Grid) -> torch.Tensor:
        weights_KM = RULES[self.rule](points, self.rule_order)
        if self.config.lower_order_final and len(weights_KM) < 15:
            weights_KM = torch.cat([weights_KM[:-1], RULES["ddim"](points, weights_KM.shape[1])[-1:]])
        return weights_KM

    def coefficients(self, num_inference_steps: int, guidance_scale: float | None = None, **grid) -> SolverTable:
        timesteps, points = self.base_grid(num_inference_steps, **grid)
        return SolverTable(timesteps.float(), points.s.float(), self._base_weights(points).float())


class FlowModeScheduler(RuleScheduler):
    """A rule on the grid of diffusers' flow mode, shifted for the size. Pipelines may name a grid: Kontext does."""

    def base_grid(self, num_inference_steps=None, sigmas=None, timesteps=None, mu=None) -> tuple[torch.Tensor, Grid]:
        """As of `ConsistencySolverScheduler`, without the pipeline's sigmas."""
        return super().base_grid(num_inference_steps, None, timesteps, mu)


class FlowHeunScheduler(FlowMatchEulerDiscreteScheduler):
    """Heun's method on every second point of a flow model's own grid: Euler's step, then the mean of both slopes.

    Two evaluations a step, the second with the time of the point it is made at; the last step is Euler's. (diffusers'
    `FlowMatchHeunDiscreteScheduler` does not take the grids that pipelines name.)
    """

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self.points = [*self.sigmas[:-1:2].tolist(), float(self.sigmas[-1])]
        t = self.timesteps[::2]
        self.timesteps = torch.cat([t[:1], t[1:].repeat_interleave(2)])
        self.calls = 0

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        """As of `FlowMatchEulerDiscreteScheduler`; the answer to every second call is that of the Euler step."""
        f, n = model_output.float(), self.calls // 2
        if self.calls % 2 == 0:
            self.start, self.slope = sample.float(), f
            x = self.start + (self.points[n + 1] - self.points[n]) * f
        else:
            x = self.start + (self.points[n + 1] - self.points[n]) * (self.slope + f) / 2
        self.calls += 1
        x = x.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x) if return_dict else (x,)


def classical(name: str, own: SchedulerMixin) -> dict[str, Factory]:
    """Grid -> factory of a classical solver for pipelines with the noise schedule of `own`.

    Raises:
        ValueError: there is no such solver, or it has no form for this kind of model.
    """
    known = FLOW_SOLVERS if is_flow(own) else CLASSICAL
    if name not in known:
        raise ValueError(f"solver {name!r}: expected one of {', '.join(known)} for {type(own).__name__}.")
    if name == HEUN:
        return {OWN_GRID: lambda own, *_: FlowHeunScheduler.from_config(own.config, shift=flow_shift(own))}
    if is_flow(own):
        return {grid: _on_flow_grid(*FLOW_RULES[name], grid) for grid in (OWN_GRID, FLOW_MODE_GRID)}
    return {spacing: _on_grid(*CLASSICAL[name], spacing) for spacing in SPACINGS}


def _on_grid(rule: str, order: int, spacing: str) -> Factory:
    def make(own: SchedulerMixin, steps: int, guidance_scale: float) -> SchedulerMixin:
        grid = DPMSolverMultistepScheduler.from_config(own.config, **GRID, timestep_spacing=spacing)
        return RuleScheduler.of(rule, order, grid, steps)

    return make


def _on_flow_grid(rule: str, order: int, name: str) -> Factory:
    def make(own: SchedulerMixin, steps: int, guidance_scale: float) -> SchedulerMixin:
        if name == OWN_GRID:
            return RuleScheduler.of(rule, order, own, steps)
        return FlowModeScheduler.of(rule, order, flow_mode(own), steps)

    return make


def flow_shift(own: SchedulerMixin) -> float:
    """How far a flow model's scheduler shifts its grid; diffusers has two names for it."""
    return own.config.get("flow_shift", own.config.get("shift", 1.0))


def flow_mode(own: SchedulerMixin) -> DPMSolverMultistepScheduler:
    """diffusers' DPM-Solver++(2M) for a flow model, shifted as the pipeline's own scheduler is."""
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": flow_shift(own)}
    return DPMSolverMultistepScheduler.from_config(own.config, **settings)


def learned(path: str, own: SchedulerMixin, untrained: bool = False) -> dict[str, Factory]:
    """The factory of a solver folder; with `untrained`, of its base rule on its base grid.

    Raises:
        OSError: there is no solver, or it has no weights.
        ValueError: it belongs to another noise schedule than `own`.
    """
    solver = load_solver(path, own)
    if untrained:
        solver = ConsistencySolverScheduler.from_config(solver.config, coefficients=None, trained_guidance_scales=None)

    def make(own: SchedulerMixin, steps: int, guidance_scale: float) -> SchedulerMixin:
        solver.guidance_scale = guidance_scale
        return solver

    return {OWN_GRID: make}


def load_solver(path: str, own: SchedulerMixin, only_here: bool = False) -> ConsistencySolverScheduler:
    """A learned solver for pipelines with the noise schedule of `own`, `only_here` not from the hub.

    Raises as `learned` does.
    """
    try:
        solver = ConsistencySolverScheduler.from_pretrained(path, local_files_only=only_here)
    except OSError as error:
        raise OSError(f"{path!r} is no learned solver: {error}") from error
    solver.check_compatible(own)
    return solver


def by_class_name(name: str | None, settings: Mapping) -> dict[str, Factory]:
    """The factory of a diffusers class by its name, from the config of the pipeline's own; None is the own one.

    Raises:
        ValueError: there is no such scheduler, or it takes no such setting; of the own one its factory says so.
    """
    named = None if name is None else getattr(diffusers, name, None)
    if name is not None:
        if not (isinstance(named, type) and issubclass(named, SchedulerMixin)):
            raise ValueError(f"scheduler={name!r} is not a scheduler class of diffusers {diffusers.__version__}.")
        _check_settings(named, settings)

    def make(own: SchedulerMixin, steps: int, guidance_scale: float) -> SchedulerMixin:
        _check_settings(named or type(own), settings)
        return (named or type(own)).from_config(own.config, **settings)

    return {OWN_GRID: make}


def _check_settings(scheduler_class: type[SchedulerMixin], settings: Mapping) -> None:
    """`from_config` ignores what its class does not know."""
    if unknown := settings.keys() - inspect.signature(scheduler_class.__init__).parameters.keys():
        raise ValueError(f"scheduler_kwargs: {scheduler_class.__name__} takes no {', '.join(sorted(unknown))}.")


def check_run(scheduler: SchedulerMixin, steps: int) -> None:
    """Raises ValueError where a scheduler has no run of so many steps. A flow model's grid comes with the call."""
    flow = is_flow(scheduler)
    baked = scheduler.config.get("coefficients")
    if flow and baked and str(steps) not in baked:
        raise ValueError(f"baked for {', '.join(baked)} steps only.")
    if not flow:
        scheduler.set_timesteps(steps)


def describe(scheduler: SchedulerMixin, steps: int) -> dict:
    """What decides the pictures of a scheduler, in plain JSON values: a table, or else class and config.

    Two solvers with one table are one. On a flow model the grid comes with the pipeline's call, so that config, rule
    and weights have to do.
    """
    if isinstance(scheduler, ConsistencySolverScheduler) and not scheduler.is_flow:
        scheduler.set_timesteps(steps)
        timesteps, sigmas, weights = scheduler.table
        used = weights[:, : int(weights.any(0).nonzero().max()) + 1]
        table = [float(f"{x:.5g}") for values in (timesteps, sigmas, used) for x in values.flatten().tolist()]
        return {"table": table, "prediction_type": scheduler.config.prediction_type}
    # With an underscore: notes of diffusers, whose order changes from process to process, and with it a cache's key.
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    described = {"class": type(scheduler).__name__, "config": config}
    if isinstance(scheduler, ConsistencySolverScheduler) and scheduler.policy is not None:
        described |= {"policy": fingerprint(scheduler.policy), "rule": getattr(scheduler, "rule", None)}
    return described
