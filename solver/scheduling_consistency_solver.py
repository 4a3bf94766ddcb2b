"""The learned multistep solver of "Image Diffusion Preview with Consistency Solver" as a diffusers scheduler.

One self-contained file: exported pipelines carry a copy of it, so it imports nothing of this package.

One coordinate system for every model. With marginals x = α x_0 + σ ε: for ε- and v-prediction y = x/α, s = σ/α, f = ε;
for flow models y = x, s = σ, f = v. In both dy = f ds, and a step is

    y_{i+1} = y_i + (s_{i+1} - s_i) · Σ_j w_ij f_{i+1-j},     Σ_j w_ij = 1

The weights are those of a classical base rule plus bounded residuals, the grid is the base grid with bounded
residuals on its log-SNR gaps; a small MLP gives both from the noise levels, the history and the guidance scale. It
sees no image, so the whole table of a run is known before its first step.

    scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=4)  # untrained: the base rule
    scheduler = ConsistencySolverScheduler.from_pretrained("path/or/hub-id")        # trained
    scheduler.guidance_scale = 7.5                          # stock pipelines do not tell it to a scheduler
    pipe.scheduler = scheduler.bake(guidance_scale=7.5)     # JSON only: what goes into a pipeline

Shape suffixes: B tables (one a sample), K steps, M order (history, newest first), D actions, F policy inputs.

Source: arXiv 2512.13592. The publication learns the weights only, as bins around DDIM (`head="categorical"`);
continuous residuals on a second-order rule, the learned grid and the guidance input are ours.
"""

import inspect
import math
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from numbers import Number
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils import logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.get_logger(f"diffusers.{__name__}")  # below diffusers' own, so that its verbosity rules here too

WEIGHTS_NAME = "model.safetensors"
SOURCE_NAME = "scheduling_consistency_solver.py"  # this file, where it lies beside a configuration
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
FINAL_SIGMAS_TYPES = ("zero", "sigma_min")
HEADS = ("gaussian", "categorical")
POLICY_INPUTS = {"noise_levels": 5, "published": 2}  # name -> number of inputs F
INPUT_GAIN = 10.0  # see SolverPolicy

# Whose grid the solver stands on. The diffusers class itself makes it, so it is theirs by construction.
GRIDS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmsolver": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "flow": FlowMatchEulerDiscreteScheduler,
}
GRID_OF_CLASS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",  # the same grid, without the timestep that PNDM evaluates twice
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmsolver",
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "flow",
}
# What this solver does not do, and the only value that `from_scheduler` takes over.
UNSUPPORTED = {
    "clip_sample": False,
    "thresholding": False,
    "variance_type": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "lambda_min_clipped": -math.inf,
    "sigma_min": None,
    "sigma_max": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}


# ---------------------------------------------------------------------------------------------------------------------
# Base rules: weight tables of the classical solvers, as functions of the grid alone
# ---------------------------------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """The K + 1 points of a run, from noise to image.

    Attributes:
        s (`Tensor` of shape `(..., K+1)`): the integration variable, σ/α for ε- and v-prediction, σ for flow models.
        u (`Tensor` of shape `(..., K+1)`): the noise level σ/(α+σ) in [0, 1]; log((1-u)/u) is log(α/σ).
    """

    s: Tensor
    u: Tensor

    @classmethod
    def variance_preserving(cls, s: Tensor) -> "Grid":
        """The grid of an ε- or v-prediction model from s = σ/α."""
        return cls(s, s / (1 + s))

    @classmethod
    def flow(cls, sigmas: Tensor) -> "Grid":
        """The grid of a flow model from its σ; α = 1 - σ."""
        return cls(sigmas, sigmas)


def history_lengths(steps: int, order: int) -> Tensor:
    """How many predictions each step can use, the current one included: min(i + 1, order), shape `(K,)`."""
    return torch.arange(1, steps + 1).clamp(max=order)


def live_weights(steps: int, order: int) -> Tensor:
    """Which of the M weights of each step have a prediction to act on: bool, shape `(K, M)`."""
    return torch.arange(order) < history_lengths(steps, order)[:, None]


def log_snr_gaps(grid: Grid) -> tuple[Tensor, Tensor]:
    """Gaps of log(α/σ) between neighbouring points, `(..., K)`, and which of them are finite and not zero.

    The others (a grid that touches u = 0 or u = 1, a repeated point) are given as 1, so that no NaN enters a gradient.
    """
    inside = (grid.u > 0) & (grid.u < 1)
    gaps = -torch.logit(torch.where(inside, grid.u, 0.5)).diff(dim=-1)
    finite = inside[..., 1:] & inside[..., :-1] & (gaps != 0)
    return torch.where(finite, gaps, 1.0), finite


def polynomial_rule(offsets_KM: Tensor, moments_KM: Tensor, live_KM: Tensor) -> Tensor:
    """Weights that integrate every polynomial through the live history exactly.

    Solves Σ_j w_ij z_ij^k = m_ik for k = 0 .. h_i - 1, where h_i is the number of live entries of row i.

    Args:
        offsets_KM: `(..., K, M)`, positions z of the past predictions relative to the current one.
        moments_KM: `(..., K, M)`, mean of z^k over the step.
        live_KM: bool `(K, M)`; the weights of dead entries are 0.
    """
    order = offsets_KM.shape[-1]
    powers = offsets_KM[..., None, :] ** torch.arange(order)[:, None]
    live = live_KM[:, None, :] & live_KM[:, :, None]
    matrix = torch.where(live, powers, torch.eye(order, dtype=powers.dtype))
    return torch.linalg.solve(matrix, torch.where(live_KM, moments_KM, 0.0))


def past_offsets(points_K: Tensor, order: int) -> Tensor:
    """z_{i-j} - z_i for j = 0 .. M-1, shape `(..., K, M)`; 0 where there is no history."""
    steps = points_K.shape[-1]
    past = torch.stack([F.pad(points_K, (j, 0))[..., :steps] for j in range(order)], dim=-1)
    return torch.where(live_weights(steps, order), past - points_K[..., None], 0.0)


def ddim(grid: Grid, order: int) -> Tensor:
    """DDIM, or Euler in (y, s): w = (1, 0, ...). Shape `(..., K, order)`. Source: arXiv 2010.02502."""
    weights = grid.s.new_zeros(*grid.s.shape[:-1], grid.s.shape[-1] - 1, order)
    weights[..., 0] = 1
    return weights


def adams_bashforth(grid: Grid, order: int, most: int = 4) -> Tensor:
    """Adams-Bashforth of order min(order, most) on the true, non-uniform points s; lower orders at the start.

    Two steps: w = (1 + q, -q), q = (s_{i+1} - s_i) / 2(s_i - s_{i-1}). Shape `(..., K, order)`.
    """
    used = min(order, most)
    steps = grid.s.shape[-1] - 1
    gap = grid.s.diff(dim=-1)
    gap = torch.where(gap == 0, 1.0, gap)  # a step of no length takes any weights
    offsets = past_offsets(grid.s[..., :-1], used) / gap[..., None]
    moments = (1 / torch.arange(1, used + 1, dtype=grid.s.dtype)).expand(offsets.shape)
    return F.pad(polynomial_rule(offsets, moments, live_weights(steps, used)), (0, order - used))


def second_order_extrapolation(grid: Grid) -> Tensor:
    """1/2r_i with r_i = (λ_i - λ_{i-1}) / (λ_{i+1} - λ_i), λ = log(α/σ), shape `(..., K)`.

    0 at the first step and wherever a λ is infinite: at the end of a grid that reaches σ = 0, where the second-order
    rule has no limit, and one step after a start at α = 0, where the limit is 0.
    """
    gaps, finite = log_snr_gaps(grid)
    ratio = torch.where(finite[..., 1:] & finite[..., :-1], gaps[..., 1:] / (2 * gaps[..., :-1]), 0.0)
    return F.pad(ratio, (1, 0))


def dpm2m(grid: Grid, order: int) -> Tensor:
    """Multistep DPM-Solver-2 in its ε form (midpoint): w = (1 + 1/2r, -1/2r). Shape `(..., K, order)`.

    On a flow model the same weights act on v: linear extrapolation to the middle of the log-SNR gap, second order too.
    Source: arXiv 2206.00927 and `DPMSolverMultistepScheduler(algorithm_type="dpmsolver")`.
    """
    if order == 1:
        return ddim(grid, order)
    extrapolation = second_order_extrapolation(grid)
    return F.pad(torch.stack([1 + extrapolation, -extrapolation], dim=-1), (0, order - 2))


BASE_RULES: dict[str, Callable[[Grid, int], Tensor]] = {
    "ddim": ddim,
    "ab2": partial(adams_bashforth, most=2),
    "ab3": partial(adams_bashforth, most=3),
    "ab4": partial(adams_bashforth, most=4),
    "dpm2m": dpm2m,
}


# ---------------------------------------------------------------------------------------------------------------------
# Policy
# ---------------------------------------------------------------------------------------------------------------------


class SolverPolicy(nn.Module):
    """The MLP that answers noise levels with residuals; the last layer starts at zero.

    Args:
        num_inputs (`int`): F.
        ranges (`list` of D pairs): lowest and highest value of each action.
        head (`str`): `"gaussian"`, D bounded means; `"categorical"`, logits over equally spaced bins (as published).
        num_bins (`int`): bins of the categorical head, end points included.
        hidden_dim (`int`): width of the two hidden layers (published: 256).

    The published network uses ReLU, and so does the categorical head, to load published weights; the other SiLU. The
    inputs lie in [0, 1], and neighbouring steps may differ by a few hundredths: with torch's own initialisation the
    features are nearly linear in them, and telling the steps apart takes thousands of updates. So the Gaussian head's
    first layer starts `INPUT_GAIN` times as large.
    """

    def __init__(
        self,
        num_inputs: int,
        ranges: list[tuple[float, float]],
        head: str = "gaussian",
        num_bins: int = 11,
        hidden_dim: int = 256,
    ):
        super().__init__()
        self.head = head
        ranges_D2 = torch.tensor(ranges, dtype=torch.float32).reshape(-1, 2)
        activation = nn.ReLU if head == "categorical" else nn.SiLU
        num_outputs = len(ranges) * (num_bins if head == "categorical" else 1)
        self.mlp = nn.Sequential(
            nn.Linear(num_inputs, hidden_dim),
            activation(),
            nn.Linear(hidden_dim, hidden_dim),
            activation(),
            nn.Linear(hidden_dim, num_outputs),
        )
        if head == "gaussian":
            with torch.no_grad():
                self.mlp[0].weight.mul_(INPUT_GAIN)
                self.mlp[0].bias.mul_(INPUT_GAIN)
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)
        if head == "categorical":
            bins = torch.linspace(0, 1, num_bins)
            self.register_buffer("action_values", ranges_D2[:, :1] + bins * (ranges_D2[:, 1:] - ranges_D2[:, :1]))
        else:
            self.register_buffer("action_bounds", ranges_D2[:, 1], persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """`(..., F)` to bounded means `(..., D)` (gaussian) or logits `(..., D, bins)` (categorical)."""
        outputs = self.mlp(inputs)
        if self.head == "categorical":
            return outputs.unflatten(-1, self.action_values.shape)
        return self.action_bounds * torch.tanh(outputs)

    def deterministic_actions(self, inputs: Tensor) -> Tensor:
        """The actions of inference, `(..., D)`: the mean, for the categorical head the expected value of the bins."""
        outputs = self(inputs)
        if self.head == "categorical":
            return (outputs.softmax(dim=-1) * self.action_values).sum(dim=-1)
        return outputs


class SolverTable(NamedTuple):
    """Everything a run needs to know, for one sampler or for one per sample.

    Attributes:
        timesteps (`Tensor` of shape `([B,] K)`): what the network is told; fractional on a learned grid.
        sigmas (`Tensor` of shape `([B,] K+1)`): diffusers' `sigmas`: σ/α for ε- and v-prediction, σ for flow models.
        weights (`Tensor` of shape `([B,] K, M)`): newest first; every row sums to 1.
    """

    timesteps: Tensor
    sigmas: Tensor
    weights: Tensor


class StepCoefficients(NamedTuple):
    """One step in x: x' = `sample`·x + `output`·f + Σ_j `history`_j·f_{i-j}; and ε = `alpha`·v + `sigma`·x.

    Each a float, or a `(B, 1, ..)` tensor where the samples of a batch have tables of their own.
    """

    sample: float | Tensor
    output: float | Tensor
    history: list
    alpha: float | Tensor
    sigma: float | Tensor


# ---------------------------------------------------------------------------------------------------------------------
# Scheduler
# ---------------------------------------------------------------------------------------------------------------------


def _require(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not supported; it must be one of {', '.join(map(repr, allowed))}.")


def _check_guidance(guidance_scale: float) -> None:
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale} is not a finite number.")


def _check_span(name: str, span, kind: type | tuple[type, ...]) -> None:
    numbers = isinstance(span, (list, tuple)) and len(span) == 2 and all(isinstance(x, kind) for x in span)
    if not numbers or not -math.inf < span[0] <= span[1] < math.inf:
        called = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{name}={span!r}: expected two {called}, the lowest and the highest.")


def _is_whole(value) -> bool:
    """Whether it is a whole number of any type; True and "5" are none."""
    return isinstance(value, Number) and not isinstance(value, bool) and value % 1 == 0


def _span(lowest: float, highest: float) -> str:
    return f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"


def _check_table(table: SolverTable, order: int) -> None:
    shapes = [tuple(part.shape) for part in table]
    *batch, steps = shapes[0] or (0,)
    width = shapes[2][-1:]
    if shapes[1:] != [(*batch, steps + 1), (*batch, steps, *width)]:
        raise ValueError(
            "A table of K steps has timesteps ([B,] K), sigmas ([B,] K+1) and weights ([B,] K, M); "
            f"got {', '.join(map(str, shapes))}."
        )
    if width > (order,):
        raise ValueError(f"The table has {width[0]} weights a step, but solver_order is {order}.")


class ConsistencySolverScheduler(SchedulerMixin, ConfigMixin):
    """A linear multistep solver whose weights and grid a small policy has learned.

    Make it with [`~ConsistencySolverScheduler.from_scheduler`] (untrained, equal to `base_rule`) or
    [`~ConsistencySolverScheduler.from_pretrained`] (trained). `from_config` keeps the configuration only and returns a
    **fresh, untrained** policy, as for every diffusers class; `copy.deepcopy` keeps the weights, and a baked scheduler
    (see [`~ConsistencySolverScheduler.bake`]) survives `from_config` because its table is part of the configuration.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the noise
            schedule the network was trained with, as in diffusers; unused by flow models.
        prediction_type (`str`): `"epsilon"`, `"v_prediction"` or `"flow_prediction"`.
        grid (`str`): whose base grid to stand on, a key of `GRIDS`.
        timestep_spacing, steps_offset, final_sigmas_type: the base grid of ε- and v-models. `"sigma_min"` ends at the
            lowest training noise (`set_alpha_to_one=False`), `"zero"` at none.
        shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len, shift_terminal,
            time_shift_type, use_flow_sigmas: the base grid of flow models; `shift` is also the `flow_shift` of UniPC
            and DPM-Solver, whose grids have `use_flow_sigmas`.
        solver_order (`int`): M, the length of the history.
        base_rule (`str`): a key of `BASE_RULES`; the residuals are added to its weights.
        lower_order_final (`bool`): the base rule is first order in the last step of less than 15 (as in diffusers).
        learn_weights (`bool`): M-1 actions a step, on the weights; without, they are the base rule's on the grid.
        learn_grid (`bool`): one more action a step, on the log-SNR gap.
        head, num_bins, hidden_dim, inputs: the policy; `inputs` is `"noise_levels"` or `"published"` (two timesteps).
        weight_bound, grid_bound (`float`): largest residual on a weight and on the log of a gap.
        weight_ranges (`list` of pairs, *optional*): ranges of the weight residuals of the categorical head; as
            published if not given: [0, 2], [-2, 0], then [-1, 1]; of a flow model [0, 1], where order 2 is published.
        trained_steps (`list` of two, *optional*): fewest and most steps that the policy was trained on, written by
            training; with fewer or more the residuals are zero, so that a run is never worse than the base rule's,
            and a warning says so once.
        trained_guidance_scales (`list` of two, *optional*): lowest and highest guidance scale that the policy was
            trained on, written by training; any other is told to it as the nearer of the two, with a warning.
        trained_model (`str`, *optional*): hub id or folder of the pipeline that it was trained on.
        guidance_scale (`float`): default of the attribute of this name, the guidance scale that the policy is told.
        coefficients (`dict`, *optional*): the baked tables, written by `bake`.

    Raises:
        ValueError: for any value outside of what is named above.
    """

    order = 1  # network evaluations a step; the multistep order is `config.solver_order`

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        grid: str = "ddim",
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        final_sigmas_type: str = "sigma_min",
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
        use_flow_sigmas: bool = False,
        solver_order: int = 4,
        base_rule: str = "dpm2m",
        lower_order_final: bool = True,
        learn_weights: bool = True,
        learn_grid: bool = True,
        head: str = "gaussian",
        num_bins: int = 11,
        hidden_dim: int = 256,
        inputs: str = "noise_levels",
        weight_bound: float = 1.0,
        grid_bound: float = 1.5,
        weight_ranges: list[list[float]] | None = None,
        trained_steps: list[int] | None = None,
        trained_guidance_scales: list[float] | None = None,
        trained_model: str | None = None,
        guidance_scale: float = 1.0,
        coefficients: dict | None = None,
    ):
        self._check_config()
        self._warnings: set[str] = set()
        self._grid_scheduler = self._make_grid_scheduler()
        self.policy = None if coefficients else self._make_policy()
        self.init_noise_sigma = 1.0
        self.table: SolverTable | None = None
        self._pinned: SolverTable | None = None
        self.guidance_scale = guidance_scale
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self.sigmas = self._train_sigmas().flip(0).float()
        self._reset()

    # -- construction -------------------------------------------------------------------------------------------------

    def _check_config(self) -> None:
        config = self.config
        _require("prediction_type", config.prediction_type, PREDICTION_TYPES)
        _require("grid", config.grid, GRIDS)
        _require("timestep_spacing", config.timestep_spacing, TIMESTEP_SPACINGS)
        _require("final_sigmas_type", config.final_sigmas_type, FINAL_SIGMAS_TYPES)
        _require("base_rule", config.base_rule, BASE_RULES)
        _require("head", config.head, HEADS)
        _require("inputs", config.inputs, POLICY_INPUTS)
        if config.trained_betas is None:
            _require("beta_schedule", config.beta_schedule, BETA_SCHEDULES)
        for name, lowest in (("solver_order", 1), ("num_bins", 2), ("hidden_dim", 1), ("num_train_timesteps", 1)):
            if not isinstance(config[name], int) or config[name] < lowest:
                raise ValueError(f"{name}={config[name]!r} must be a whole number of {lowest} or more.")
        for name in ("weight_bound", "grid_bound"):
            if not 0 <= config[name] < math.inf:
                raise ValueError(f"{name}={config[name]} must be a finite number of 0 or more.")
        if self.is_flow != (config.grid == "flow" or config.use_flow_sigmas):
            raise ValueError(
                f"prediction_type={config.prediction_type!r} does not go with grid={config.grid!r}, "
                f"use_flow_sigmas={config.use_flow_sigmas}: flow models, and only they, stand on flow grids."
            )
        if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
            raise ValueError("rescale_betas_zero_snr needs v-prediction: at zero SNR ε says nothing of the image.")
        for name, kind in (("trained_steps", int), ("trained_guidance_scales", (int, float))):
            if config[name] is not None:
                _check_span(name, config[name], kind)
        for count in config.coefficients or ():
            table, expected = self._baked_table(count), (int(count), config.solver_order)
            _check_table(table, config.solver_order)
            if table.weights.shape != expected:
                shape = tuple(table.weights.shape)
                raise ValueError(f"The table baked for {count} steps has weights {shape}, expected {expected}.")

    @property
    def is_flow(self) -> bool:
        """Whether the network predicts a flow velocity (s = σ) rather than ε or v of a diffusion (s = σ/α)."""
        return self.config.prediction_type == "flow_prediction"

    def _make_grid_scheduler(self) -> SchedulerMixin:
        """The diffusers scheduler that makes the base grid and the noise schedule."""
        scheduler_class = GRIDS[self.config.grid]
        known = inspect.signature(scheduler_class.__init__).parameters
        values = {**self.config, "flow_shift": self.config.shift, "clip_sample": False}
        chosen = ("lower_order_final", "solver_order")  # ours by the same name, of another meaning
        return scheduler_class(**{k: v for k, v in values.items() if k in known and k not in chosen})

    def _train_sigmas(self) -> Tensor:
        """s at every training timestep, `(T,)` float64: σ/α, or σ of a flow model."""
        if self.is_flow:
            return torch.arange(1, self.config.num_train_timesteps + 1).double() / self.config.num_train_timesteps
        # Zero terminal SNR would be s = inf; 2^-24 is what diffusers' own multistep schedulers put there.
        alphas_cumprod = self._grid_scheduler.alphas_cumprod.double().clamp(min=2**-24)
        return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()

    def action_ranges(self) -> list[tuple[float, float]]:
        """Lowest and highest value of each of the D actions: M-1 weight residuals, then the grid if it is learned."""
        config, dims = self.config, self._weight_actions
        if config.head == "gaussian":
            ranges = [(-config.weight_bound, config.weight_bound)] * dims
        else:
            published = [(0.0, 1.0)] if self.is_flow else [(0.0, 2.0), (-2.0, 0.0)]
            ranges = (config.weight_ranges or [*published, *[(-1.0, 1.0)] * dims])[:dims]
        if len(ranges) != dims:
            raise ValueError(f"order {config.solver_order} needs {dims} weight_ranges, got {config.weight_ranges}.")
        return [*ranges, *[(-config.grid_bound, config.grid_bound)] * config.learn_grid]

    def _make_policy(self) -> SolverPolicy:
        """A fresh policy, the same in every process, made without touching the global random state."""
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return SolverPolicy(
                POLICY_INPUTS[config.inputs], self.action_ranges(), config.head, config.num_bins, config.hidden_dim
            )

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs) -> "ConsistencySolverScheduler":
        """A scheduler of this configuration: with its tables if it is baked, else with a **fresh, untrained** policy.

        Raises:
            ValueError: for the configuration of another class, whose grid and prediction type it would not understand.
        """
        if config is not None and "base_rule" not in config:
            raise ValueError(
                "This is no configuration of a ConsistencySolverScheduler; use from_scheduler(scheduler)."
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin, order: int = 4, **overrides) -> "ConsistencySolverScheduler":
        """An untrained solver on the noise schedule and the grid of a pipeline's scheduler.

        Args:
            scheduler: a DDIM, PNDM, EulerDiscrete, DPMSolverMultistep, UniPCMultistep (the last two also in flow mode)
                or FlowMatchEulerDiscrete scheduler; all their timestep spacings and terminal conventions are kept.
            order (`int`): the multistep order M.
            overrides: any argument of this class, e.g. `base_rule`, `learn_grid`, `timestep_spacing`.

        Raises:
            ValueError: if the scheduler is none of these, or uses a feature that this solver does not have.
        """
        source = dict(scheduler.config)
        if "base_rule" in source:  # such a solver itself, be it from an exported copy of this file
            fresh = {
                "solver_order": order,
                "coefficients": None,
                "trained_steps": None,
                "trained_guidance_scales": None,
                "trained_model": None,
            }
            return cls.from_config(scheduler.config, **{**fresh, **overrides})
        name = type(scheduler).__name__
        _require("scheduler", name, GRID_OF_CLASS)
        for key, value in UNSUPPORTED.items():
            if source.get(key, value) not in (value, None):
                raise ValueError(f"{name} has {key}={source[key]!r}, but only {key}={value!r} is supported.")
        settings = {k: v for k, v in source.items() if k in inspect.signature(cls.__init__).parameters}
        settings.update(grid=GRID_OF_CLASS[name], solver_order=order)
        if name == "FlowMatchEulerDiscreteScheduler":
            settings["prediction_type"] = "flow_prediction"
        if "flow_shift" in source:
            settings["shift"] = source["flow_shift"]
        if "set_alpha_to_one" in source:
            settings["final_sigmas_type"] = "zero" if source["set_alpha_to_one"] else "sigma_min"
        return cls(**{**settings, **overrides})

    # -- what pipelines read ------------------------------------------------------------------------------------------

    @property
    def step_index(self) -> int | None:
        """The step that comes next; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step a pipeline starts with (image-to-image), None if it has not said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says with which step the run begins. The history is empty there, whatever the number of the step."""
        self._begin_index = begin_index

    @property
    def guidance_scale(self) -> float:
        """The guidance scale that the policy is told; set it before `set_timesteps`, so before the pipeline's call."""
        return self._guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, value: float) -> None:
        _check_guidance(value)
        if self.policy is None:
            self._require_baked_guidance(value)
        self._guidance_scale = value

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ = α² at the training timesteps, `(T,)`; not of flow models."""
        return self._grid_scheduler.alphas_cumprod

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Returns the sample as it is: the networks take x."""
        return sample

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # -- base grid ----------------------------------------------------------------------------------------------------

    def base_grid(
        self,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        mu: float | None = None,
    ) -> tuple[Tensor, Grid]:
        """The grid that the residuals act on.

        Args:
            num_inference_steps (`int`): K; may be left out where `sigmas` or `timesteps` say it.
            sigmas: flow models: K values before the shift, as Flux passes them; ε- and v-models: K+1 values of σ/α,
                the end included, as in `EulerDiscreteScheduler`.
            timesteps: K own timesteps.
            mu (`float`): resolution-dependent shift, for flow models with `use_dynamic_shifting`.

        Returns:
            timesteps `(K,)` and the `Grid`, float64.

        Raises:
            ValueError: if the number of steps is unknown, contradictory, not whole, below 1 or above
                `num_train_timesteps`, or if the noise does not fall from point to point.
        """
        steps = self._number_of_steps(num_inference_steps, sigmas, timesteps)
        base = self._flow_base_grid if self.is_flow else self._diffusion_base_grid
        t, grid = base(steps, sigmas, timesteps, mu)
        most, between = 1 if self.is_flow else math.inf, grid.s[1:-1]
        if not (grid.s.diff() <= 0).all() or grid.s[0] > most or not ((between > 0) & (between < most)).all():
            raise ValueError(
                f"The noise must fall from point to point, from {most} or less, and be 0 at the end only; got sigmas "
                f"{grid.s.tolist()}."
            )
        return t, grid

    def _diffusion_base_grid(self, steps, sigmas, timesteps, mu) -> tuple[Tensor, Grid]:
        if mu is not None:
            raise ValueError(f"mu={mu} shifts the grid of flow models; this one has {self.config.prediction_type}.")
        if sigmas is not None:
            s = torch.as_tensor(sigmas, dtype=torch.float64)
            return self._timestep_of(s[:-1]), Grid.variance_preserving(s)
        if timesteps is None:
            self._grid_scheduler.set_timesteps(steps)
            timesteps = self._grid_scheduler.timesteps
        t = torch.as_tensor(timesteps, dtype=torch.float64)
        if t.max() > self.config.num_train_timesteps - 1 or t.min() < 0:
            raise ValueError(
                f"{steps} steps ask for timesteps {t.max():g} .. {t.min():g}, but the network was trained on "
                f"{self.config.num_train_timesteps - 1} .. 0. Use fewer steps or another timestep_spacing."
            )
        train = self._train_sigmas()
        end = train[:1] if self.config.final_sigmas_type == "sigma_min" else train.new_zeros(1)
        return t, Grid.variance_preserving(torch.cat([_interpolate(train, t), end]))

    def _number_of_steps(self, num_inference_steps, sigmas, timesteps) -> int:
        given = {"num_inference_steps": num_inference_steps}
        if sigmas is not None:
            given["sigmas"] = len(sigmas) - (0 if self.is_flow else 1)
        if timesteps is not None:
            given["timesteps"] = len(timesteps)
        counts = {value for value in given.values() if value is not None}
        if len(counts) != 1:
            raise ValueError(f"The number of steps must be given once, or without contradiction; got {given}.")
        steps = counts.pop()
        if not _is_whole(steps) or not 1 <= steps <= self.config.num_train_timesteps:
            raise ValueError(f"The number of steps must be 1 .. {self.config.num_train_timesteps}, got {steps!r}.")
        return int(steps)

    def _flow_base_grid(self, steps, sigmas, timesteps, mu) -> tuple[Tensor, Grid]:
        given = {"sigmas": sigmas, "timesteps": timesteps, "mu": mu}
        given = {key: value for key, value in given.items() if value is not None}
        unknown = given.keys() - inspect.signature(self._grid_scheduler.set_timesteps).parameters.keys()
        if unknown:
            raise ValueError(f"The {self.config.grid!r} grid of flow models takes no {', '.join(sorted(unknown))}.")
        self._grid_scheduler.set_timesteps(steps, **given)
        return self._grid_scheduler.timesteps.double(), Grid.flow(self._grid_scheduler.sigmas.double())

    def _timestep_of(self, s: Tensor) -> Tensor:
        """The fractional training timestep of s = σ/α, by interpolation of log s; differentiable."""
        log_train = self._train_sigmas().log()
        log_s = s.log()
        above = torch.searchsorted(log_train, log_s.detach().contiguous()).clamp(1, len(log_train) - 1)
        low, high = log_train[above - 1], log_train[above]
        return (above - 1 + (log_s - low) / (high - low)).clamp(0, len(log_train) - 1)

    # -- actions to tables --------------------------------------------------------------------------------------------

    @property
    def num_actions(self) -> int:
        """D: the weight residuals of a step (order - 1), and one for the grid if it is learned (the last)."""
        return self._weight_actions + int(self.config.learn_grid)

    @property
    def _weight_actions(self) -> int:
        return self.config.solver_order - 1 if self.config.learn_weights else 0

    def action_mask(self, num_inference_steps: int) -> Tensor:
        """Which actions matter, bool `(K, D)`: weight residual d (from 1) from history d + 1 on; the grid's always."""
        history_K = history_lengths(num_inference_steps, self.config.solver_order)
        weights = torch.arange(1, 1 + self._weight_actions) < history_K[:, None]
        return F.pad(weights, (0, int(self.config.learn_grid)), value=True)

    def policy_inputs(self, num_inference_steps: int, guidance_scale: float | None = None, **grid) -> Tensor:
        """What the policy sees at each step, float32 `(K, F)`.

        `"noise_levels"`: u_i, u_{i+1}, history/order, 1/K, guidance/10, with u of the *base* grid. `"published"`: the
        two timesteps over T - 1, where the end counts as timestep -1; σ_i, σ_{i+1} for flow models.

        Args:
            num_inference_steps (`int`): K.
            guidance_scale (`float`, *optional*): by default the attribute.
            grid: `sigmas`, `timesteps`, `mu` of `base_grid`.

        Raises:
            ValueError: if the guidance scale is not finite, or as in `base_grid`.
        """
        guidance = self.guidance_scale if guidance_scale is None else guidance_scale
        _check_guidance(guidance)
        timesteps, points = self.base_grid(num_inference_steps, **grid)
        if self.config.inputs == "published":
            level = points.s if self.is_flow else F.pad(timesteps, (0, 1), value=-1) / (len(self) - 1)
            return torch.stack([level[:-1], level[1:]], dim=-1).float()
        steps, order = len(timesteps), self.config.solver_order
        history = history_lengths(steps, order) / order
        constants = torch.tensor([1 / steps, guidance / 10]).expand(steps, 2)
        return torch.cat([torch.stack([points.u[:-1], points.u[1:], history], dim=-1), constants], dim=-1).float()

    def table_from_actions(self, actions: Tensor, num_inference_steps: int, **grid) -> SolverTable:
        """The table of given actions; differentiable. Zero actions give the base grid and the base rule, bit for bit.

        Args:
            actions (`Tensor` of shape `([B,] K, D)`): residuals; those that `action_mask` calls dead are ignored.
            num_inference_steps (`int`): K.
            grid: `sigmas`, `timesteps`, `mu` of `base_grid`.
        """
        timesteps, points = self.base_grid(num_inference_steps, **grid)
        expected = (len(timesteps), self.num_actions)
        if actions.shape[-2:] != expected:
            raise ValueError(f"actions must end in (steps, actions) = {expected}, got {tuple(actions.shape)}.")
        actions = actions.cpu().double()
        if self.config.learn_grid:
            timesteps, points = self._move_grid(timesteps, points, actions[..., -1])
        weights = self._base_weights(points)
        if self.config.learn_weights:
            weights = weights + self._weight_residuals(actions[..., : self._weight_actions])
        timesteps, sigmas = (x.expand(*actions.shape[:-2], x.shape[-1]) for x in (timesteps, points.s))
        return SolverTable(timesteps.float(), sigmas.float(), weights.float())

    def _move_grid(self, timesteps: Tensor, points: Grid, actions: Tensor) -> tuple[Tensor, Grid]:
        """Log-SNR gaps times exp(a), scaled so that both ends stay. Only differences are computed: 0 moves nothing."""
        gaps = -torch.logit(_finite_ends(points.u)).diff()
        stretched = gaps * actions.exp()
        change = stretched * (gaps.sum() / stretched.sum(dim=-1, keepdim=True)) - gaps
        factor = torch.exp(-F.pad(change.cumsum(dim=-1)[..., :-1], (1, 1)))  # of σ/α, at every point
        if self.is_flow:
            sigmas = points.s * factor / (1 + points.s * (factor - 1))
            moved = (sigmas - points.s)[..., :-1] * self.config.num_train_timesteps
            # Some flow grids truncate their timesteps; a moved one must not pass the first for that.
            return torch.minimum(timesteps + moved, timesteps[0]), Grid.flow(sigmas)
        s = points.s * factor
        moved = self._timestep_of(s[..., :-1]) - self._timestep_of(points.s[:-1])
        return timesteps + moved, Grid.variance_preserving(s)

    def _base_weights(self, points: Grid) -> Tensor:
        weights = BASE_RULES[self.config.base_rule](points, self.config.solver_order)
        if self.config.lower_order_final and weights.shape[-2] < 15:
            first_order = ddim(points, self.config.solver_order)[..., -1:, :]
            weights = torch.cat([weights[..., :-1, :], first_order], dim=-2)
        return weights

    def _weight_residuals(self, actions: Tensor) -> Tensor:
        """a_j on w_j for j < h and -Σ a_j on w_h, the oldest weight there is; `(..., K, M)`, rows sum to 0."""
        steps, order = actions.shape[-2], self.config.solver_order
        live = live_weights(steps, order)
        residuals = torch.where(live[:, 1:], actions, 0.0)
        oldest = live & ~F.pad(live[:, 1:], (0, 1))
        return F.pad(residuals, (0, 1)) - oldest * residuals.sum(dim=-1, keepdim=True)

    @torch.no_grad()
    def coefficients(self, num_inference_steps: int, guidance_scale: float | None = None, **grid) -> SolverTable:
        """The table of the policy's deterministic actions. `grid`: `sigmas`, `timesteps`, `mu` of `base_grid`."""
        actions = self._actions(num_inference_steps, guidance_scale, **grid)
        return self.table_from_actions(actions, num_inference_steps, **grid)

    def _actions(self, num_inference_steps: int, guidance_scale: float | None, **grid) -> Tensor:
        if self.policy is None:
            self._require_baked_guidance(guidance_scale)
            return torch.tensor(self._baked(num_inference_steps)["actions"], dtype=torch.float64)
        inputs = self.policy_inputs(num_inference_steps, self._trained_guidance(guidance_scale), **grid)
        if self.config.trained_steps is None:
            self._warn_if_fresh()
        fewest, most = self.config.trained_steps or (1, math.inf)
        if not fewest <= len(inputs) <= most:
            self._warn_once(
                f"This solver was trained on {_span(fewest, most)} steps; at {len(inputs)} it is its base rule "
                f"{self.config.base_rule}."
            )
            return torch.zeros(len(inputs), self.num_actions)
        parameter = next(self.policy.parameters())
        return self.policy.deterministic_actions(inputs.to(parameter)).cpu()

    def _trained_guidance(self, guidance_scale: float | None) -> float:
        """The guidance scale as the policy is told it: within those that it was trained on."""
        given = self.guidance_scale if guidance_scale is None else guidance_scale
        _check_guidance(given)
        if self.config.trained_guidance_scales is None or self.config.inputs == "published":
            return given
        lowest, highest = self.config.trained_guidance_scales
        told = min(max(given, lowest), highest)
        if told != given:
            self._warn_once(
                f"This solver was trained at guidance scales of {_span(lowest, highest)}; {given:g} is told to it as "
                f"{told:g}."
            )
        return told

    def _warn_if_fresh(self) -> None:
        last = self.policy.mlp[-1]
        if self.num_actions and not (last.weight.any() or last.bias.any()):
            self._warn_once("This solver has a fresh, untrained policy; from_pretrained loads a trained one.")

    def _warn_once(self, message: str) -> None:
        if message not in self._warnings:
            self._warnings.add(message)
            logger.warning(message)

    @property
    def known_steps(self) -> list[int]:
        """The numbers of steps that it has tables for or was trained on, rising; 2 to 16 where neither is known."""
        if self.config.coefficients:
            return sorted(map(int, self.config.coefficients))
        fewest, most = self.config.trained_steps or (2, 16)
        return list(range(fewest, most + 1))

    def extend_training(self, steps: Iterable[int], guidance_scales: Iterable[float]) -> None:
        """Notes in the configuration that the policy is being trained on these, beside what it was trained on.

        Where an earlier training noted its steps but not its guidance scales, these stay unknown.
        """
        spans = {"trained_steps": steps, "trained_guidance_scales": guidance_scales}
        if self.config.trained_steps and not self.config.trained_guidance_scales:
            del spans["trained_guidance_scales"]
        for name, values in spans.items():
            known = [*(self.config[name] or []), *values]
            self.register_to_config(**{name: [min(known), max(known)]})

    # -- baking -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def bake(
        self,
        steps: Iterable[int] | None = None,
        guidance_scale: float | None = None,
        mu: float | None = None,
        sigmas: Callable[[int], list[float]] | None = None,
    ) -> "ConsistencySolverScheduler":
        """A scheduler whose JSON configuration carries the tables: no weights, no network, `from_config` keeps it.

        Args:
            steps: the numbers of steps it shall know, by default `known_steps`; others raise in `set_timesteps`.
            guidance_scale (`float`, *optional*): by default the attribute.
            mu, sigmas: the base grid of flow models; `sigmas` is a function of the number of steps (Flux and its kin
                pass `linspace(1, 1/K, K)`). Where a pipeline later names its own grid (as these do, with the `mu` of
                the image size), the baked residuals are applied to that one; else the baked table is used as it is.

        `config.coefficients` has one entry a number of steps, with `timesteps`, `sigmas`, `weights` and `actions`.
        """
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        baked = {}
        for count in self.known_steps if steps is None else steps:
            grid = {"mu": mu, "sigmas": sigmas(count) if sigmas else None}
            actions = self._actions(count, guidance_scale, **grid)
            table = self.table_from_actions(actions, count, **grid)
            numbers = {name: value.tolist() for name, value in table._asdict().items()}
            baked[str(count)] = {**numbers, "actions": actions.tolist()}
        if not baked:
            raise ValueError("bake needs at least one number of steps.")
        return type(self).from_config(self.config, coefficients=baked, guidance_scale=guidance_scale)

    def _baked(self, steps: int) -> dict:
        baked = self.config.coefficients
        if str(steps) not in baked:
            known = ", ".join(map(str, self.known_steps))
            raise ValueError(f"Baked for {known} steps, not for {steps}; bake it for {steps} steps too.")
        return baked[str(steps)]

    def _baked_table(self, steps: int) -> SolverTable:
        return SolverTable(*(torch.tensor(self._baked(steps)[name]) for name in SolverTable._fields))

    def _require_baked_guidance(self, guidance_scale: float | None) -> None:
        baked = self.config.guidance_scale
        if guidance_scale not in (None, baked):
            raise ValueError(f"Baked for guidance_scale={baked}, not {guidance_scale}; bake the trained solver again.")

    # -- a run --------------------------------------------------------------------------------------------------------

    def set_table(self, table: SolverTable) -> None:
        """Pins a table, also one per sample (leading B), for the next runs of as many steps, until `clear_table`.

        Raises:
            ValueError: if its shapes contradict each other, or it has more weights a step than `solver_order`.
        """
        _check_table(table, self.config.solver_order)
        self._pinned = table

    def clear_table(self) -> None:
        """Gives the choice of the table back to the policy."""
        self._pinned = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Fixes the table of the run, from a pinned table, the baked ones or the policy, in this order.

        Args: as in `base_grid`; `device` is where `timesteps` go.

        With a table per sample `timesteps` and `sigmas` are those of the first one, because a pipeline knows one time
        for the batch: give the network `table.timesteps[:, step_index or 0]`.

        Raises:
            ValueError: for a number of steps that is impossible, not baked, or not that of the pinned table.
        """
        steps = self._number_of_steps(num_inference_steps, sigmas, timesteps)
        self.table = self._choose_table(steps, {"sigmas": sigmas, "timesteps": timesteps, "mu": mu})
        one = [x[0] if self.table.timesteps.ndim == 2 else x for x in self.table]
        self.timesteps = one[0].detach().to(device)
        self.sigmas = one[1].detach()
        self.num_inference_steps = steps
        self._reset()

    def _choose_table(self, steps: int, grid: dict) -> SolverTable:
        if self._pinned is not None:
            if self._pinned.timesteps.shape[-1] != steps:
                raise ValueError(f"The pinned table has {self._pinned.timesteps.shape[-1]} steps, the run {steps}.")
            return self._pinned
        if self.policy is None and not any(value is not None for value in grid.values()):
            return self._baked_table(steps)
        if self.policy is not None and self.config.trained_steps:  # `from_config` of a trained solver
            self._warn_if_fresh()
        return self.coefficients(steps, **grid)

    def _reset(self) -> None:
        self._step_index = None
        self._begin_index = None
        self._history: list[Tensor] = []
        self._steps: list[StepCoefficients] = []

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The step of a timestep of this run. Raises ValueError if it is none of `timesteps`."""
        difference = (self.timesteps.cpu().double() - float(timestep)).abs()
        if difference.min() > 1e-3:
            raise ValueError(f"timestep {float(timestep):g} is none of this run's: {self.timesteps.tolist()}.")
        return int(difference.argmin())

    def _begin(self, timestep: float | Tensor, sample: Tensor) -> None:
        """First step of a run: where it is in the table, and the coefficients of all steps that follow."""
        self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        table = self.table
        if table.timesteps.ndim == 2 and len(table.timesteps) != len(sample):
            raise ValueError(f"The table is for {len(table.timesteps)} samples, the batch has {len(sample)}.")
        self._steps = self._step_coefficients(self._step_index, sample)

    def _step_coefficients(self, begin: int, sample: Tensor) -> list[StepCoefficients]:
        """The step in y and s, solved for x. Scalars in float64, so that nothing cancels where α is small."""
        s = self.table.sigmas.double()
        weights = _fold_missing_history(self.table.weights.double(), begin)
        alpha = torch.ones_like(s) if self.is_flow else torch.rsqrt(1 + s**2)
        sigma = s * alpha
        weights = weights * (alpha[..., 1:] * s.diff(dim=-1))[..., None]
        of_sample, of_output = alpha[..., 1:] / alpha[..., :-1], weights[..., 0]
        if self.config.prediction_type == "v_prediction":  # ε = α v + σ x
            of_sample = of_sample + of_output * sigma[..., :-1]
            of_output = of_output * alpha[..., :-1]
        columns = torch.stack([of_sample, of_output, alpha[..., :-1], sigma[..., :-1]], dim=-1)
        rows = torch.cat([columns, weights[..., 1:]], dim=-1).movedim(-2, 0)
        if rows.ndim == 2 and not rows.requires_grad:
            rows = rows.tolist()
        else:
            rows = rows.to(sample.device, torch.float32).movedim(-1, 1)
            rows = [list(row.reshape(*row.shape, *[1] * (sample.ndim - row.ndim + 1))) for row in rows]
        return [StepCoefficients(row[0], row[1], row[4:], row[2], row[3]) for row in rows]

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple:
        """One step of the solver, in float32.

        Args:
            model_output (`Tensor`): what the network predicts, after guidance; ε, v or the flow velocity.
            timestep (`float` or `Tensor`): only read at the first step of a run, to find where it begins.
            sample (`Tensor`): x_i, of the same shape.
            return_dict (`bool`): a `SchedulerOutput`, or a tuple.

        Returns:
            x_{i+1} in the dtype of `sample`.

        Raises:
            ValueError: without `set_timesteps`, beyond the last step, or for a batch that does not fit the table.
        """
        if self.table is None:
            raise ValueError("Call set_timesteps before step.")
        if self._step_index is None:
            self._begin(timestep, sample)
        if self._step_index >= self.num_inference_steps:
            raise ValueError(f"All {self.num_inference_steps} steps are done; call set_timesteps for another run.")
        x, f = sample.float(), model_output.float()
        now = self._steps[self._step_index]
        prev_sample = now.sample * x + now.output * f
        for coefficient, past in zip(now.history, self._history, strict=False):
            prev_sample = prev_sample + coefficient * past
        if self.config.prediction_type == "v_prediction":
            f = now.alpha * f + now.sigma * x
        self._history = [f, *self._history][: self.config.solver_order - 1]
        self._step_index += 1
        prev_sample = prev_sample.to(sample.dtype)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    # -- forward process ----------------------------------------------------------------------------------------------

    def _sigma_of(self, timestep: float | Tensor) -> Tensor:
        """s at a timestep: the run's own where it is one of its timesteps, else the training schedule's."""
        if self.is_flow:
            if self.table is not None and (self.timesteps.cpu() - float(timestep)).abs().min() <= 1e-3:
                return self.sigmas[self.index_for_timestep(timestep)].double()
            return torch.tensor(float(timestep) / len(self), dtype=torch.float64)
        t = torch.tensor(float(timestep), dtype=torch.float64)
        return _interpolate(self._train_sigmas().log(), t).exp()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α x_0 + σ ε at the given timesteps, `(B,)` or one for all; float32 inside, the samples' dtype outside."""
        s = torch.stack([self._sigma_of(t) for t in timesteps.reshape(-1)])
        alpha = 1 - s if self.is_flow else torch.rsqrt(1 + s**2)
        sigma = s if self.is_flow else s * alpha
        shape = (-1, *[1] * (original_samples.ndim - 1))
        alpha, sigma = (x.float().to(original_samples.device).reshape(shape) for x in (alpha, sigma))
        return (alpha * original_samples.float() + sigma * noise.float()).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and with the order of arguments of the flow-matching schedulers."""
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def check_compatible(self, other: SchedulerMixin) -> None:
        """Raises ValueError, naming the values, if the other scheduler belongs to another noise schedule."""
        theirs, mine = _noise_schedule(other), _noise_schedule(self)
        if theirs != mine:
            raise ValueError(f"The noise schedules differ: here {mine}, in {type(other).__name__} {theirs}.")

    # -- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `scheduler_config.json` and, unless baked, `model.safetensors`; then uploads if asked to.

        An upload, this one or that of `push_to_hub`, also has this file, so that others need no package to load it.
        `kwargs`: `repo_id`, `private`, `token`, ... of `push_to_hub`; `safe_serialization` is always true here.
        """
        kwargs.pop("safe_serialization", None)
        os.makedirs(save_directory, exist_ok=True)
        if self.policy is not None:
            state = {key: value.detach().cpu().contiguous() for key, value in self.policy.state_dict().items()}
            save_file(state, os.path.join(save_directory, WEIGHTS_NAME))
        self.save_config(os.fspath(save_directory), push_to_hub=push_to_hub, **kwargs)

    def _upload_folder(self, working_dir: str | os.PathLike, *args, **kwargs):
        """What `PushToHubMixin` uploads, and this file beside it."""
        shutil.copy(__file__, os.path.join(working_dir, SOURCE_NAME))
        return super()._upload_folder(working_dir, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs,
    ) -> "ConsistencySolverScheduler":
        """Loads a solver from a folder or the Hub.

        Raises:
            OSError: if there is no configuration, or no readable weights for one that is not baked; an untrained
                solver is never returned instead.
            ValueError: if the configuration makes no sense, or the weights do not fit it.
        """
        hub = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
        path = str(pretrained_model_name_or_path)
        try:
            scheduler, unused = super().from_pretrained(path, subfolder=subfolder, return_unused_kwargs=True, **kwargs)
        except OSError as error:
            if os.path.exists(path):
                raise
            raise OSError(f"solver {path!r} is no solver folder here, and none on the hub or in its cache.") from error
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            where = os.path.join(path, subfolder or "")
            raise ValueError(f"The configuration of the solver in {where} is of no use: {error}") from error
        if scheduler.policy is not None:
            file = _weights_file(path, subfolder, hub)
            try:
                state = load_file(file)
            except SafetensorError as error:
                raise OSError(f"{file} is not a readable safetensors file: {error}.") from error
            scheduler._load_weights(state, file)
        return (scheduler, unused) if return_unused_kwargs else scheduler

    def _load_weights(self, state: dict[str, Tensor], file: str | os.PathLike) -> None:
        expected, found = ({k: tuple(v.shape) for k, v in x.items()} for x in (self.policy.state_dict(), state))
        if found != expected:
            names = ("solver_order", "learn_weights", "learn_grid", "head", "num_bins", "hidden_dim", "inputs")
            settings = ", ".join(f"{name}={self.config[name]!r}" for name in names)
            wrong = "; ".join(
                f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
                for name in sorted(expected.keys() | found.keys())
                if found.get(name) != expected.get(name)
            )
            raise ValueError(f"{file} does not fit the configuration ({settings}): {wrong}.")
        self.policy.load_state_dict(state)


def _noise_schedule(scheduler: SchedulerMixin) -> dict:
    """What decides whether two schedulers belong to the same network; ᾱ at five timesteps stands for the betas."""
    prediction_type = scheduler.config.get("prediction_type", "flow_prediction")  # only flow matching has no such key
    steps = scheduler.config.num_train_timesteps
    schedule = {"prediction_type": prediction_type, "num_train_timesteps": steps}
    if prediction_type != "flow_prediction":
        where = torch.linspace(0, steps - 1, 5).long()
        schedule["alphas_cumprod"] = [float(f"{x:.4g}") for x in scheduler.alphas_cumprod.cpu()[where]]
    return schedule


def _interpolate(values: Tensor, position: Tensor) -> Tensor:
    """`values` (T,) read at fractional positions 0 .. T-1, linearly; exact at integers."""
    low = position.floor().long().clamp(0, len(values) - 2)
    return values[low] + (position - low) * (values[low + 1] - values[low])


def _finite_ends(u: Tensor) -> Tensor:
    """Noise levels with their ends drawn into [0.01, 0.99], or nearer to 0 and 1 where the grid goes on beyond that.

    Where the log-SNR at an end is infinite, or almost (0.999 or 1 - 1e-6 in some flow grids), its gap would be all
    there is; this way an action moves a point about as far in every family.
    """
    lowest, highest = torch.clamp(u[-2] / 2, max=0.01), torch.clamp((1 + u[1]) / 2, min=0.99)
    return torch.cat([u[:1].clamp(max=highest), u[1:-1], u[-1:].clamp(min=lowest)])


def _fold_missing_history(weights: Tensor, begin: int) -> Tensor:
    """Where a run begins in the middle, the oldest prediction there is takes the weights of those that are missing."""
    if begin == 0:
        return weights
    steps, order = weights.shape[-2:]
    history_K = (torch.arange(steps) - begin + 1).clamp(1, order)
    position = torch.arange(order)
    missing = torch.where(position >= history_K[:, None], weights, 0.0).sum(dim=-1, keepdim=True)
    return torch.where(position < history_K[:, None], weights, 0.0) + missing * (position == history_K[:, None] - 1)


def _weights_file(path: str, subfolder: str | None, hub: dict) -> str:
    """Where the weights of a solver lie, downloaded if need be. Raises OSError naming the file if there are none."""
    advice = "An untrained solver comes from from_scheduler or from_config, a baked one needs no weights."
    if os.path.exists(path):
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        file = os.path.join(folder, subfolder or "", WEIGHTS_NAME)
        if not os.path.isfile(file):
            raise OSError(f"The weights of the solver are missing: no file {file}. {advice}")
        return file
    try:
        return hf_hub_download(path, WEIGHTS_NAME, subfolder=subfolder, **hub)
    except EntryNotFoundError as error:
        raise OSError(f"The weights of the solver are missing: {path} has no {WEIGHTS_NAME}. {advice}") from error


def convert_public_checkpoint(path: str | os.PathLike, **overrides) -> ConsistencySolverScheduler:
    """The public checkpoint (`model.ckpt` of `wangfuyun/consolver`: SD1.5, order 4, 11 bins, CFG 3) as a solver.

    Order, bins and width are read from the shapes. The public code samples an action even at inference; here it is the
    expected value of the bins, and the step goes to the true next grid point.

    Args:
        path: a state dict of `action_values` (D, bins), `mlp.{0,2,4}.weight` and `.bias`; no other pickle is read.
        overrides: any argument of `ConsistencySolverScheduler`.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is none that torch reads, if a key is missing or of an unexpected name, or if a shape does
            not fit.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} is no checkpoint that torch can read ({type(error).__name__}).") from error
    expected = {f"mlp.{layer}.{kind}": ndim for layer in (0, 2, 4) for kind, ndim in (("weight", 2), ("bias", 1))}
    expected["action_values"] = 2
    found = {key: getattr(value, "ndim", None) for key, value in state.items()} if isinstance(state, dict) else None
    if found != expected:
        raise ValueError(f"{path} has {found}, a public checkpoint has {expected} (names, and their dimensions).")
    dims, bins = state["action_values"].shape
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "final_sigmas_type": "sigma_min",
        "solver_order": dims + 1,
        "base_rule": "ddim",
        "learn_grid": False,
        "head": "categorical",
        "inputs": "published",
        "num_bins": bins,
        "hidden_dim": state["mlp.0.weight"].shape[0],
        "guidance_scale": 3.0,
    }
    scheduler = ConsistencySolverScheduler(**{**settings, **overrides})
    scheduler._load_weights({key: value.float() for key, value in state.items()}, path)
    return scheduler
