"""What the trainer asks of its datasets: which rows have which guidance scale, and whether their teacher is the
pipeline that is trained on.

A dataset is a `data.dataset.PreviewDataset`, a `torch.utils.data.Subset` of one, or any sequence of such rows.
"""

from collections.abc import Sequence

from diffusers import DiffusionPipeline
from torch.utils.data import Subset
from transformers.utils import logging

from data.dataset import PreviewDataset
from rewards import Reward
from solver.samplers.digest import reward_digest, weights_digest

logger = logging.get_logger(__name__)


def guidance_scales(dataset) -> list[float]:
    """The guidance scale of every row, without decoding pictures."""
    if isinstance(dataset, Subset):
        scales = guidance_scales(dataset.dataset)
        return [scales[i] for i in dataset.indices]
    if isinstance(dataset, PreviewDataset):
        return list(dataset.rows["guidance_scale"])
    return [row["guidance_scale"] for row in dataset]


def rows_by_guidance(dataset, only: Sequence[float] | None = None, at_least: int = 1) -> dict[float, list[int]]:
    """Guidance scale -> its row numbers, in order; scales of fewer than `at_least` rows are left out, with a warning.

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
    if left_out := [f"{scale:g}" for scale in wanted if scale not in enough]:
        logger.warning(f"Guidance {', '.join(left_out)} is left out: fewer than {at_least} rows.")
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


def check_features(dataset, reward_funcs: Sequence) -> None:
    """Compares the reward networks with those whose features of the targets the dataset has kept.

    Raises:
        ValueError: features of another network than the reward's would be compared with its own.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if not isinstance(dataset, PreviewDataset):
        return
    for reward in reward_funcs:
        kept = dataset.teacher["rewards"].get(reward.name) if isinstance(reward, Reward) else None
        if kept is not None and kept.get("weights") != reward_digest(reward):
            raise ValueError(
                f"{dataset.folder} keeps features of another {reward.name} network than the reward's, that of model "
                f"{kept['model']!r}. Use that one, or build the dataset again."
            )


def image_size(rows: Sequence[dict]) -> tuple[int, int]:
    """Height and width of the pictures of a dataset."""
    return tuple(rows[0]["target"].shape[-2:])
