"""The classical few-step solvers as linear multistep weights: `rule(grid, order) -> w_KM`.

All of them are y_{i+1} = y_i + (s_{i+1} - s_i) · Σ_j w_ij f_{i+1-j} with Σ_j w_ij = 1, in the coordinates of
`scheduling_consistency_solver`: y = x/α, s = σ/α, f = ε for ε- and v-models; y = x, s = σ, f = v for flow models. A
rule knows the grid and nothing else, so a table of numbers is the whole solver.

A rule written for another quantity than f (DPM-Solver++ for x_0, DEIS on a flow model for ε) reaches further back than
its order, through the states it passed: such a table has M = K columns. An end at σ = 0, and a flow model's start at
σ = 1 (α = 0), are allowed: where a rule has no limit there it is first order for that one step, as in diffusers.

Shape suffixes: K steps, M history (newest first), E network evaluations (oldest first).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from solver.scheduling_consistency_solver import (
    BASE_RULES,
    Grid,
    ddim,
    dpm2m,
    history_lengths,
    live_weights,
    log_snr_gaps,
    past_offsets,
    polynomial_rule,
    second_order_extrapolation,
)

ADAMS_BASHFORTH = (  # on equal steps, orders 1 to 4
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ipndm(grid: Grid, order: int) -> Tensor:
    """iPNDM: Adams-Bashforth with the weights of equal steps, whatever the grid. Shape `(K, order)`, order <= 4.

    Source: arXiv 2204.13902 (improved PNDM), `IPNDMScheduler`.
    """
    if order > len(ADAMS_BASHFORTH):
        raise ValueError(f"ipndm has orders 1 to {len(ADAMS_BASHFORTH)}, got {order}.")
    rows = torch.tensor([[*row, *[0.0] * (order - len(row))] for row in ADAMS_BASHFORTH[:order]], dtype=grid.s.dtype)
    return rows[history_lengths(grid.s.shape[-1] - 1, order) - 1]


def deis(grid: Grid, order: int) -> Tensor:
    """tAB-DEIS in log ρ: w_j = ∫ L_j dn / (n_{i+1} - n_i), L_j the Lagrange basis in log n of the past ε, n = σ/α.

    Shape `(K, order)`; `(K, K)` for flow models, where the past ε are rewritten for v. Source: arXiv 2204.13902,
    `DEISMultistepScheduler`.
    """
    n = grid.u / (1 - grid.u)
    starts_at_noise = n[:-1].isinf()  # no log n to interpolate in: such a prediction serves its own step only
    log_n = torch.where(starts_at_noise, 0.0, n[:-1].log())
    live = live_weights(len(log_n), order)
    if starts_at_noise[0]:
        live = torch.cat([live[:1], live[:-1]])
    offsets = torch.where(live, past_offsets(log_n, order), 0.0)
    ratio = torch.where(starts_at_noise, 0.0, n[1:] / n[:-1])
    weights = polynomial_rule(offsets, _log_moments(ratio, order), live)
    return _epsilon_rule_on_flow(grid, weights) if _is_flow(grid) else weights


def _log_moments(ratio_K: Tensor, order: int) -> Tensor:
    """Mean of log^k x over x from 1 to the ratio, k = 0 .. M-1; by parts, ∫ log^k x = x log^k x - k ∫ log^{k-1} x."""
    log_ratio = torch.where(ratio_K == 0, 1.0, ratio_K).log()  # x log^k x has the limit 0 at 0
    integral = ratio_K - 1
    length = torch.where(integral == 0, 1.0, integral)
    moments = [torch.ones_like(ratio_K)]
    for k in range(1, order):
        integral = ratio_K * log_ratio**k - k * integral
        moments.append(integral / length)
    return torch.stack(moments, dim=-1)


def dpmpp2m(grid: Grid, order: int) -> Tensor:
    """DPM-Solver++(2M), linear in x_0. Shape `(K, K)`, for order 1 `(K, 1)`.

    With q = s_{i-1}/s_i and f̃ the effective prediction of a step, in every family

        f̃_i = (1 + 1/2r) f_i - (1/2r) [q f_{i-1} + (1 - q) f̃_{i-1}]

    UniP-2 in x_0 form is the same. Source: arXiv 2211.01095, `DPMSolverMultistepScheduler`.
    """
    if order == 1:
        return ddim(grid, order)
    extrapolation = second_order_extrapolation(grid)
    unit_EE = torch.eye(len(extrapolation), dtype=grid.s.dtype)
    rows = [unit_EE[0]]
    for i in range(1, len(extrapolation)):
        q = grid.s[i - 1] / grid.s[i]
        before = q * unit_EE[i - 1] + (1 - q) * rows[-1]
        rows.append((1 + extrapolation[i]) * unit_EE[i] - extrapolation[i] * before)
    return _newest_first(torch.stack(rows))


def unipc2(grid: Grid, order: int) -> Tensor:
    """UniPC-2 (B_2(h) = e^h - 1) in ε form, predictor and corrector together. Shape `(K, 3)`.

    The predictor p, UniP-2, is `dpm2m`. The corrector repeats the step just taken with the prediction at its end, with
    weights c on (new, current, previous); a multistep rule makes up for the difference one step later:

        w_i = p_i + (Δ_{i-1}/Δ_i) (c_{i-1} - p_{i-1}),   Δ_i = s_{i+1} - s_i

    Raises:
        ValueError: for order 1 (that is `ddim`), and for flow models, where it has no ε at σ = 1; use `dpmpp2m`.

    Source: arXiv 2302.04867, `UniPCMultistepScheduler(predict_x0=False)`.
    """
    if order == 1 or _is_flow(grid):
        raise ValueError(f"unipc2 has order 2 and no flow form; got order {order}, flow {_is_flow(grid)}.")
    predictor = F.pad(dpm2m(grid, 2), (0, 1))
    length = grid.s.diff()
    correction = _unic2(grid) - F.pad(predictor, (1, 0))[:, :3]
    correction = correction[:-1] * (length[:-1] / length[1:])[:, None]
    return predictor + F.pad(correction, (0, 0, 1, 0))


def unipcpp2(grid: Grid, order: int) -> Tensor:
    """UniPC-2 (B_2(h) = e^h - 1) in x_0 form, predictor and corrector together: diffusers' default. Shape `(K, K)`.

    In every family x_0 = y - s f, and a step keeps the share s_{i+1}/s_i of y and takes the rest from x_0. The
    predictor extrapolates x_0; the corrector repeats the step with the x_0 found at its end, before the next one. The
    last step is first order, as in diffusers.

    Source: arXiv 2302.04867, `UniPCMultistepScheduler`.
    """
    if order == 1:
        return ddim(grid, order)
    steps = len(grid.s) - 1
    gaps, finite = log_snr_gaps(grid)
    share = grid.s[1:] / grid.s[:-1]
    inverse_r = -F.pad(torch.where(finite[1:] & finite[:-1], gaps[1:] / gaps[:-1], 0.0), (1, 0))
    b1 = (torch.expm1(-gaps) / -gaps - 1) / torch.expm1(-gaps)
    b2 = 2 * ((torch.expm1(-gaps) / -gaps - 1) / -gaps - 0.5) / torch.expm1(-gaps)
    unit_EE = torch.eye(steps, dtype=grid.s.dtype)
    y, corrected = torch.zeros_like(unit_EE[0]), torch.zeros_like(unit_EE[0])  # less the initial noise
    rows, found = [], []  # x_0 at every evaluation
    for i in range(steps):
        found.append(y - grid.s[i] * unit_EE[i])
        if i:
            corrected = share[i - 1] * corrected + (1 - share[i - 1]) * found[-2]
            if i == 1:
                change = 0.5 * (found[-1] - found[-2])
            else:
                # ρ_new + ρ_old = b1, ρ_new + r ρ_old = b2
                of_old = (b1[i - 1] - b2[i - 1]) * inverse_r[i - 1] / (inverse_r[i - 1] - 1)
                slope = (found[-3] - found[-2]) * inverse_r[i - 1]
                change = of_old * slope + (b1[i - 1] - of_old) * (found[-1] - found[-2])
            corrected = corrected + (1 - share[i - 1]) * change
        slope = (found[-2] - found[-1]) * inverse_r[i] if 0 < i < steps - 1 else 0.0
        following = share[i] * corrected + (1 - share[i]) * (found[-1] + 0.5 * slope)
        rows.append((following - y) / (grid.s[i + 1] - grid.s[i]))
        y = following
    return _newest_first(torch.stack(rows))


def dpm2s(grid: Grid, order: int) -> Tensor:
    """Singlestep DPM-Solver-2: pairs of evaluations, the first a DDIM step to the pair's middle point. `(K, order)`.

    With r = (λ_i - λ_{i-1}) / (λ_{i+1} - λ_{i-1}) the pair takes its whole way with f_{i-1} + g (f_i - f_{i-1}), where
    g = 1/2r in ε form, and (s_i/s_{i-1}) 1/2r in x_0 form, as diffusers has it on flow models. An odd number of steps
    ends with a DDIM step, and so does a grid that ends at σ = 0.

    Source: arXiv 2206.00927, `DPMSolverSinglestepScheduler`.
    """
    weights = ddim(grid, order)
    if order == 1:
        return weights
    s, log_snr = grid.s, -torch.logit(grid.u)
    for i in range(1, len(s) - 1, 2):
        if log_snr[i + 1].isinf():
            continue
        whole, first, second = s[i + 1] - s[i - 1], s[i] - s[i - 1], s[i + 1] - s[i]
        # r is 1 in the limit of a start at noise.
        r = 1.0 if log_snr[i - 1].isinf() else (log_snr[i] - log_snr[i - 1]) / (log_snr[i + 1] - log_snr[i - 1])
        g = (s[i] / s[i - 1] if _is_flow(grid) else 1.0) / (2 * r)
        weights[i, :2] = torch.stack([whole * g, whole * (1 - g) - first]) / second
    return weights


def _unic2(grid: Grid) -> Tensor:
    """The corrector UniC of each step, order 1 at the first and 2 after it: weights on (new, current, previous) ε."""
    h, _ = log_snr_gaps(grid)
    b1 = (torch.expm1(h) / h - 1) / torch.expm1(h)
    b2 = 2 * ((torch.expm1(h) / h - 1) / h - 0.5) / torch.expm1(h)
    r = -F.pad(h[:-1], (1, 0), value=1.0) / h
    rho_previous = (b1 - b2) / (1 - r)
    rho_new = b1 - rho_previous
    weights = torch.stack([rho_new, 1 - rho_previous / r - rho_new, rho_previous / r], dim=-1)
    return torch.cat([weights.new_tensor([[0.5, 0.5, 0.0]]), weights[1:]])


def _is_flow(grid: Grid) -> bool:
    return torch.equal(grid.s, grid.u)


def _newest_first(rows_KE: Tensor) -> Tensor:
    """Weights on the evaluations 0 .. K-1 as weights on the history: w[i, j] acts on evaluation i - j."""
    return torch.stack([F.pad(row[: i + 1].flip(0), (0, len(row) - i - 1)) for i, row in enumerate(rows_KE)])


def _epsilon_rule_on_flow(grid: Grid, weights_KM: Tensor) -> Tensor:
    """Weights on the past ε as weights on the past v of a flow model, `(K, K)`.

    ε_j = x_j + α_j v_j, and the states x_j between then and now are sums of effective predictions ṽ:

        ṽ_i = (1/α_i) Σ_j w_ij [α_j v_j - Σ_{k=j}^{i-1} (σ_{k+1} - σ_k) ṽ_k]
    """
    alpha, length = 1 - grid.s, grid.s.diff()
    unit_EE = torch.eye(len(length), dtype=grid.s.dtype)
    rows = [unit_EE[0]]
    for i in range(1, len(length)):
        way, row = torch.zeros_like(unit_EE[0]), torch.zeros_like(unit_EE[0])
        for j, weight in enumerate(weights_KM[i, : i + 1]):
            past = i - j
            way = way + length[past] * rows[past] if j else way
            row = row + weight * (alpha[past] * unit_EE[past] - way)
        rows.append(row / alpha[i])
    return _newest_first(torch.stack(rows))


# Every rule by its name. UniP-2 in ε form is the multistep DPM-Solver under another derivation.
RULES: dict[str, Callable[[Grid, int], Tensor]] = {
    **BASE_RULES,
    "ipndm": ipndm,
    "deis": deis,
    "dpmpp2m": dpmpp2m,
    "dpm2s": dpm2s,
    "unip2": dpm2m,
    "unipc2": unipc2,
    "unipcpp2": unipcpp2,
}
