"""The low band of an image: a Butterworth filter in the frequency domain.

    low_BCHW = lowpass(x_BCHW, cutoff=0.2)

The mask is 1 / (1 + (d / D)^2n), d² = f_h² + f_w², in units of the Nyquist frequency of an axis (d = 1: two pixels a
period). It is 1 at d = 0 and 0.5 at d = D. Frequencies are those of `fftfreq`, so that odd sizes are centred too.

Source: section 3 of arXiv 2504.06232; the order is that of the public code, n = 4. Its cutoff is 0.2, the paper's
0.4: which Nyquist frequency the paper means, that of the large or of the small image, it does not say. At twice the
size, 0.4 of the small one is 0.2 of the large one. Here it is always that of the tensor that is filtered.
"""

import functools
import math

import torch
from torch import Tensor


@functools.lru_cache(maxsize=16)
def butterworth_mask(
    height: int, width: int, cutoff: float, order: int = 4, device: torch.device | str = "cpu"
) -> Tensor:
    """The mask over the half spectrum of `torch.fft.rfft2`; cached, do not write to it.

    Args:
        height, width: H and W of the tensor to be filtered.
        cutoff: D > 0, in Nyquist frequencies; `math.inf` lets everything pass.
        order: n of the filter.
        device: where the mask lies.

    Returns:
        float32 (H, W // 2 + 1).

    Raises:
        ValueError: the cutoff is not above 0.
    """
    if not cutoff > 0:  # also true for NaN
        raise ValueError(f"cutoff={cutoff}: expected a number above 0; 0.2 is the public code's, 0.4 the paper's.")
    if math.isinf(cutoff):
        return torch.ones(height, width // 2 + 1, device=device)
    f_h = 2 * torch.fft.fftfreq(height, dtype=torch.float64)
    f_w = 2 * torch.fft.rfftfreq(width, dtype=torch.float64)
    d2 = f_h[:, None] ** 2 + f_w[None, :] ** 2
    return (1 / (1 + (d2 / cutoff**2) ** order)).float().to(device)


def lowpass(x_BCHW: Tensor, cutoff: float, order: int = 4) -> Tensor:
    """The low band of each channel; linear in x, and the mean stays.

    Args:
        x_BCHW: any leading dimensions; float32 or float64.
        cutoff: D > 0, in Nyquist frequencies of `x_BCHW`.
        order: n of the filter.

    Raises:
        ValueError: the cutoff is not above 0.
    """
    height, width = x_BCHW.shape[-2:]
    mask = butterworth_mask(height, width, cutoff, order, x_BCHW.device)
    return torch.fft.irfft2(torch.fft.rfft2(x_BCHW) * mask, s=(height, width))
