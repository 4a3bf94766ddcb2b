"""What the trainer asks of its datasets: which rows have which guidance scale, and whether their teacher is the
pipeline that is trained on.

A dataset is a `data.dataset.PreviewDataset`, a `torch.utils.data.Subset` of one, or any sequence of such rows.
"""

from collections.abc import Sequence

from diffusers import DiffusionPipeline
from torch.utils.data import Subset

from data.dataset import PreviewDataset
from data.teacher import weights_digest


def guidance_scales(dataset) -> list[float]:
    """The guidance scale of every row, without decoding pictures."""
    if isinstance(dataset, Subset):
        scales = guidance_scales(dataset.dataset)
        return [scales[i] for i in dataset.indices]
    if isinstance(dataset, PreviewDataset):
        return list(dataset.rows["guidance_scale"])
    return [row["guidance_scale"] for row in dataset]


def rows_by_guidance(dataset, only: Sequence[float] | None = None, at_least: int = 1) -> dict[float, list[int]]:
    """Guidance scale -> its row numbers, in order; scales of fewer than `at_least` rows are left out.

    Args:
        dataset: its rows have a guidance scale each.
        only: the scales to use; all where it is None.
        at_least: rows a scale needs.

    Raises:
        ValueError: one of `only` has too few rows, or all scales have.
    """
    rows: dict[float, list[int]] = {}
    for i, scale in enumerate(guidance_scales(dataset)):
        rows.setdefault(float(scale), []).append(i)
    wanted = sorted(rows) if only is None else [float(scale) for scale in only]
    enough = {scale: rows[scale] for scale in wanted if len(rows.get(scale, [])) >= at_least}
    if not enough or (only is not None and len(enough) < len(wanted)):
        counts = {scale: len(rows[scale]) for scale in sorted(rows)}
        which = "No guidance scale has" if only is None else f"Not all of guidance_scales={list(only)} have"
        raise ValueError(f"{which} {at_least} rows; the dataset has (scale: rows) {counts}.")
    return enough


def check_teacher(dataset, pipe: DiffusionPipeline) -> None:
    """Compares the pipeline with the one that rendered the dataset, weights included.

    Raises:
        ValueError: they differ. Rows that are no `PreviewDataset` name no teacher, and pass.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, PreviewDataset):
        unet = pipe.components.get("unet")
        denoiser = pipe.transformer if unet is None else unet
        dtype = str(denoiser.dtype).removeprefix("torch.")
        dataset.check_teacher(pipeline=type(pipe).__name__, dtype=dtype, weights=weights_digest(pipe))


def image_size(rows: Sequence[dict]) -> tuple[int, int]:
    """Height and width of the pictures of a dataset."""
    return tuple(rows[0]["target"].shape[-2:])
