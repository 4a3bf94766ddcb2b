"""A solver that was learned on one model, for the noise schedule of another.

    solver = transfer(ConsistencySolverScheduler.from_pretrained("runs/mini_sd/best"), pipe.scheduler)

The policy is told noise levels σ/(α + σ), the history, 1/K and the guidance scale, which every family of models has,
and answers with residuals on weights and on gaps of log-SNR, which mean the same in all of them. So it can be asked on
any base grid; how well it does there, `benchmarks/transfer.py` measures. Models of one noise schedule, at whatever
size, need none of this.
"""

from diffusers import SchedulerMixin

from solver.scheduling_consistency_solver import ConsistencySolverScheduler

# What a policy is, and what its answers mean; all else in a configuration is the model's.
POLICY_SETTINGS = (
    "base_rule", "lower_order_final", "learn_weights", "learn_grid", "head", "num_bins", "hidden_dim", "inputs",
    "weight_bound", "grid_bound", "weight_ranges", "trained_steps", "trained_guidance_scales", "trained_model",
    "guidance_scale",
)  # fmt: skip


def transfer(solver: ConsistencySolverScheduler, scheduler: SchedulerMixin, **overrides) -> ConsistencySolverScheduler:
    """The policy of a solver on the noise schedule and the base grid of another scheduler.

    Args:
        solver: a trained one.
        scheduler: of a pipeline, or a solver that was learned there; as `ConsistencySolverScheduler.from_scheduler`.
        overrides: of the base grid, as of `from_scheduler`, e.g. `timestep_spacing="trailing"`.

    Raises:
        ValueError: an override would change the policy, the solver is baked, or its policy sees timesteps as
            published, which other families number otherwise; or as in `from_scheduler`.
    """
    if solver.policy is None:
        raise ValueError("A baked solver has no policy to ask on another grid; take the one that it was baked from.")
    if fixed := overrides.keys() & {*POLICY_SETTINGS, "order"}:
        raise ValueError(f"{', '.join(sorted(fixed))}: part of the policy, which stays what it is.")
    settings = {name: solver.config[name] for name in POLICY_SETTINGS}
    moved = ConsistencySolverScheduler.from_scheduler(
        scheduler, order=solver.config.solver_order, **settings, **overrides
    )
    if solver.config.inputs == "published" and moved.is_flow != solver.is_flow:
        raise ValueError(
            "inputs='published': this policy sees timesteps of a diffusion model or σ of a flow model, which are not "
            "each other's. Train one with inputs='noise_levels'."
        )
    moved.policy.load_state_dict(solver.policy.state_dict())
    return moved
