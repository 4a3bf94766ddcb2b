"""The solvers of a comparison, as schedulers for a stock pipeline.

Classical ones run on every timestep spacing that diffusers knows, and end where the full-step pictures end: at the
lowest training noise. They are diffusers' own classes where there is one for the noise schedule of the pipeline;
iPNDM, Adams–Bashforth and all rules of flow models are the tables of `solver.multistep`, which are tested to equal
diffusers' where both exist. On a flow model there is one grid, the pipeline's own.
"""

from collections.abc import Callable

import diffusers
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin

from solver import ConsistencySolverScheduler, SolverTable
from solver.multistep import RULES

SPACINGS = ("leading", "trailing", "linspace")
OWN_GRID = "own"
# scheduler of a pipeline, number of steps, guidance scale -> scheduler of the run
Factory = Callable[[SchedulerMixin, int, float], SchedulerMixin]

# The DDIM trap: clip_sample is on by default, and clips latents as if they were pictures.
DDIM = (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False})
DPM = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
# name -> (diffusers class, changes to the config), or (rule of solver.multistep, order)
CLASSICAL = {
    "ddim": DDIM,
    "ipndm": ("ipndm", 4),
    "ab2": ("ab2", 2),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {"final_sigmas_type": "sigma_min"}),
    "dpm2m": (DPMSolverMultistepScheduler, DPM),
    "dpmpp2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "final_sigmas_type": "sigma_min"}),
}
FLOW_RULES = {
    "ddim": ("ddim", 1),
    "ab2": ("ab2", 2),
    "ipndm": ("ipndm", 4),
    "deis": ("deis", 2),
    "dpm2m": ("dpm2m", 2),
    "dpmpp2m": ("dpmpp2m", 2),
}


class RuleScheduler(ConsistencySolverScheduler):
    """A rule of `solver.multistep` as a scheduler: `RuleScheduler.of("ipndm", 4, pipe.scheduler, steps=5)`."""

    rule, rule_order = "ddim", 1

    @classmethod
    def of(cls, rule: str, order: int, scheduler: SchedulerMixin, steps: int) -> "RuleScheduler":
        """The rule on the grid of a scheduler. Some rules reach back as far as there are steps."""
        made = cls.from_scheduler(scheduler, order=max(order, steps), learn_grid=False)
        made.rule, made.rule_order = rule, order
        return made

    def coefficients(self, num_inference_steps: int, guidance_scale: float | None = None, **grid) -> SolverTable:
        timesteps, points = self.base_grid(num_inference_steps, **grid)
        weights_KM = RULES[self.rule](points, self.rule_order)
        return SolverTable(timesteps.float(), points.s.float(), weights_KM.float())


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler belongs to a flow model."""
    return "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("prediction_type") == "flow_prediction"


def classical(name: str, own: SchedulerMixin) -> dict[str, Factory]:
    """Grid -> factory of a classical solver for pipelines with the noise schedule of `own`.

    Raises:
        ValueError: there is no such solver, or it has no form for flow models.
    """
    known = FLOW_RULES if is_flow(own) else CLASSICAL
    if name not in known:
        raise ValueError(f"solver {name!r}: expected one of {', '.join(known)} for {type(own).__name__}.")
    if is_flow(own):
        return {OWN_GRID: lambda own, steps, guidance: RuleScheduler.of(*known[name], own, steps)}
    return {spacing: _on_grid(*known[name], spacing) for spacing in SPACINGS}


def _on_grid(kind: type | str, settings: dict | int, spacing: str) -> Factory:
    def make(own: SchedulerMixin, steps: int, guidance_scale: float) -> SchedulerMixin:
        if isinstance(kind, str):
            grid = DPMSolverMultistepScheduler.from_config(own.config, **DPM, timestep_spacing=spacing)
            return RuleScheduler.of(kind, settings, grid, steps)
        if kind is DDIMScheduler and spacing == "linspace":
            # DDIMScheduler steps to t - T/K, which is no point of this grid; first-order DPM-Solver is DDIM.
            return DPMSolverMultistepScheduler.from_config(own.config, **DPM, solver_order=1, timestep_spacing=spacing)
        return kind.from_config(own.config, **settings, timestep_spacing=spacing)

    return make


def learned(path: str, own: SchedulerMixin, untrained: bool = False) -> dict[str, Factory]:
    """The factory of a solver folder; with `untrained`, of its base rule on its base grid.

    Raises:
        OSError: there is no solver, or it has no weights.
        ValueError: it belongs to another noise schedule than `own`.
    """
    solver = ConsistencySolverScheduler.from_pretrained(path)
    solver.check_compatible(own)
    if untrained:
        solver = ConsistencySolverScheduler.from_config(solver.config, coefficients=None)

    def make(own: SchedulerMixin, steps: int, guidance_scale: float) -> SchedulerMixin:
        solver.guidance_scale = guidance_scale
        return solver

    return {OWN_GRID: make}


def by_class_name(name: str | None, settings: dict) -> dict[str, Factory]:
    """The factory of a diffusers class by its name, from the config of the pipeline's own; None is the own one.

    Raises:
        ValueError: there is no such scheduler.
    """
    if name is None:
        return {OWN_GRID: lambda own, steps, guidance: type(own).from_config(own.config, **settings)}
    scheduler_class = getattr(diffusers, name, None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        raise ValueError(f"scheduler={name!r} is not a scheduler class of diffusers {diffusers.__version__}.")
    return {OWN_GRID: lambda own, steps, guidance: scheduler_class.from_config(own.config, **settings)}


def describe(scheduler: SchedulerMixin, steps: int) -> dict:
    """What decides the pictures of a scheduler: class, config and, of a learned one, its table. Plain JSON values."""
    config = {key: value for key, value in scheduler.config.items() if key != "coefficients"}
    table = None
    if isinstance(scheduler, ConsistencySolverScheduler) and not scheduler.is_flow:
        table = [value.tolist() for value in scheduler.coefficients(steps)]
    elif isinstance(scheduler, ConsistencySolverScheduler) and scheduler.policy is not None:
        table = [
            float(p.double().square().sum()) for p in scheduler.policy.parameters()
        ]  # its grid comes with the call
    rule = getattr(scheduler, "rule", None)
    return {"class": type(scheduler).__name__, "config": config, "table": table, "rule": rule}
