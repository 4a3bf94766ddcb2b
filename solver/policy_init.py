"""How an untrained policy is made ready to be fitted."""

import torch

from solver.scheduling_consistency_solver import SolverPolicy


@torch.no_grad()
def widen_first_layer(policy: SolverPolicy, gain: float) -> None:
    """Multiplies the first layer of an untrained policy by `gain`; a trained one stays as it is.

    The inputs lie in [0, 1], and two steps of a run may differ by a few hundredths in each. Under torch's own
    initialisation the hidden features are nearly linear in them, so that neighbouring steps can hardly be told apart,
    and fitting different coefficients for them takes thousands of updates. The answer does not change: the last layer
    of an untrained policy is zero.

    Args:
        policy: changed in place.
        gain: above 0; 1 leaves the initialisation as it is.

    Raises:
        ValueError: `gain` is not above 0.
    """
    if not gain > 0:
        raise ValueError(f"input_gain={gain}: expected a number above 0.")
    first, last = policy.mlp[0], policy.mlp[-1]
    if not last.weight.any() and not last.bias.any():
        first.weight.mul_(gain)
        first.bias.mul_(gain)
