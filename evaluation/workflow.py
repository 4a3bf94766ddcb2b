"""Preview and refine, simulated: what it saves a user who draws seeds until a picture is right.

The user of this simulation accepts a picture when the caption check passes. With full renders only, every seed costs a
full render. With previews first, every seed costs a preview, and a full render only where the preview passes; that
render is checked again. (Published study with people: about half the time, arXiv 2512.13592.)

* A *false accept* is a preview that passes and whose full render does not: its refinement was for nothing.
* A *false reject* is a preview that fails and whose full render would have passed: a good seed is lost.

Shape suffixes: P prompts, S seeds of each, in the order in which they are drawn.
"""

import torch

from evaluation.bootstrap import Estimate, mean


def draws_until_accepted(accepted_PS: torch.Tensor) -> torch.Tensor:
    """How many seeds are drawn, (P,): up to the first accepted one, or all where none is."""
    seeds = accepted_PS.shape[1]
    first = torch.where(accepted_PS, torch.arange(1, seeds + 1), seeds)
    return first.amin(dim=1)


def simulate(
    preview_PS: torch.Tensor,
    full_PS: torch.Tensor,
    preview_cost: float,
    full_cost: float,
    resamples: int = 2000,
) -> dict:
    """Both ways of working on the same prompts and seeds.

    Args:
        preview_PS, full_PS: which previews and full renders pass the check, bool.
        preview_cost, full_cost: of one picture, in any unit: network evaluations, seconds.
        resamples: of the bootstrap over prompts.

    Returns:
        `full_only` and `preview_first`, mean cost of a prompt, with ci95; `saving`, the share of the cost saved, with
        ci95; `false_accepts` and `false_rejects`, shares of all previews; `full_only_success` and
        `preview_first_success`, shares of prompts that end with an accepted picture.
    """
    seeds = torch.arange(preview_PS.shape[1])
    both_PS = preview_PS & full_PS
    full_draws_P, draws_P = draws_until_accepted(full_PS), draws_until_accepted(both_PS)
    refined_P = (preview_PS & (seeds < draws_P[:, None])).sum(dim=1)
    full_only = mean(full_draws_P * full_cost, resamples)
    preview_first = mean(draws_P * preview_cost + refined_P * full_cost, resamples)
    saving = Estimate(1 - preview_first.value / full_only.value, 1 - preview_first.replicates / full_only.replicates)
    estimates = {"full_only": full_only, "preview_first": preview_first, "saving": saving}
    return {name: {"mean": estimate.value, "ci95": estimate.ci95} for name, estimate in estimates.items()} | {
        "false_accepts": float((preview_PS & ~full_PS).double().mean()),
        "false_rejects": float((~preview_PS & full_PS).double().mean()),
        "full_only_success": float(full_PS.any(dim=1).double().mean()),
        "preview_first_success": float(both_PS.any(dim=1).double().mean()),
    }
