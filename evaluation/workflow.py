"""Preview and refine, simulated: what it saves a user who draws seeds until a picture is right.

The user of this simulation accepts a picture when the caption check passes. With full renders only, every seed costs a
full render. With previews first, every seed costs a preview, and a full render only where the preview passes; that
render is checked again. (Published study with people: about half the time, arXiv 2512.13592.)

Not every prompt ends with a picture, and previews that never pass are cheap. So what counts is the cost of an accepted
picture: all that was spent on all prompts, over the number of those that ended with a picture.

* A *false accept* is a preview that passes and whose full render does not: its refinement was for nothing.
* A *false reject* is a preview that fails and whose full render would have passed: a good seed is lost.

Shape suffixes: P prompts, S seeds of each, in the order in which they are drawn, R resamples.
"""

import math

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
    refine_cost: float | None = None,
) -> dict[str, dict]:
    """Both ways of working on the same prompts and seeds.

    Args:
        preview_PS, full_PS: which previews and full renders pass the check, bool.
        preview_cost, full_cost: of one picture, in any unit: network evaluations, seconds.
        resamples: of the bootstrap over prompts.
        refine_cost: of finishing a preview, if that is not `full_cost`: a half-size one has begun its full render.

    Returns:
        Each with `mean` and `ci95`, in which None stands for infinity: `full_only` and `preview_first`, the cost of an
        accepted picture; `saving`, the share of it that previews save; `false_accepts` and `false_rejects`, shares of
        all previews; `full_only_success` and `preview_first_success`, shares of prompts that end with a picture.
    """
    seeds = torch.arange(preview_PS.shape[1])
    both_PS = preview_PS & full_PS
    full_draws_P, draws_P = draws_until_accepted(full_PS), draws_until_accepted(both_PS)
    refined_P = (preview_PS & (seeds < draws_P[:, None])).sum(dim=1)
    success = {"full_only": full_PS.any(dim=1), "preview_first": both_PS.any(dim=1)}
    refine_cost = full_cost if refine_cost is None else refine_cost
    cost = {"full_only": full_draws_P * full_cost, "preview_first": draws_P * preview_cost + refined_P * refine_cost}
    succeeded = {way: mean(found_P, resamples) for way, found_P in success.items()}
    paid = {way: _ratio(mean(cost[way], resamples), succeeded[way]) for way in cost}
    fraction = _ratio(paid["preview_first"], paid["full_only"])
    estimates = {
        **paid,
        "saving": Estimate(1 - fraction.value, 1 - fraction.replicates),
        "false_accepts": mean((preview_PS & ~full_PS).double().mean(dim=1), resamples),
        "false_rejects": mean((~preview_PS & full_PS).double().mean(dim=1), resamples),
        **{f"{way}_success": estimate for way, estimate in succeeded.items()},
    }
    return {name: _described(estimate) for name, estimate in estimates.items()}


def _ratio(a: Estimate, b: Estimate) -> Estimate:
    """a / b, infinite where b is zero."""
    return Estimate(a.value / b.value if b.value else math.inf, a.replicates / b.replicates)


def _described(estimate: Estimate) -> dict:
    """What a report says of it. An order statistic instead of an interpolated one, which infinity would make NaN."""
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    replicates_R = estimate.replicates.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)  # ∞/∞: none saved
    interval = torch.quantile(replicates_R, ends, interpolation="nearest").tolist()
    numbers = [number if math.isfinite(number) else None for number in (estimate.value, *interval)]
    return {"mean": numbers[0], "ci95": numbers[1:]}
