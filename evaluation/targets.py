"""Full-step pictures and what the instruments see in them: once, on disk, for every run that asks the same.

Shape suffixes: N images, C H W.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin
from tqdm import tqdm

from data.teacher import library_versions, weights_digest
from evaluation.cache import digest, load, store
from evaluation.instruments import Instruments
from evaluation.rendering import Cost, Sampler, Samples
from evaluation.solvers import describe
from solver.samplers.latents import denoiser


class Target(NamedTuple):
    """Full-step pictures.

    Attributes:
        key: identifies them.
        images: uint8 (N, 3, H, W).
        seen: what the instruments see in them, by name.
        cost: `nfe`, `seconds_per_image`, `solver_share` of rendering them.
    """

    key: str
    images: torch.Tensor
    seen: dict[str, torch.Tensor]
    cost: dict


class Targets:
    """Renders full-step pictures, or reads them.

    Args:
        sampler: of the pipeline.
        scheduler: with which it renders full-step pictures.
        steps: of that scheduler.
        instruments: that look at them.
        folder: of the cache.
    """

    def __init__(
        self, sampler: Sampler, scheduler: SchedulerMixin, steps: int, instruments: Instruments, folder: Path
    ):
        self.sampler, self.scheduler, self.steps = sampler, scheduler, steps
        self.instruments, self.folder = instruments, folder
        self.identity = {
            "weights": weights_digest(sampler.pipe),
            "scheduler": describe(scheduler, steps),
            "steps": steps,
            "latent_shape": sampler.latent_shape,
            "dtype": str(denoiser(sampler.pipe).dtype),
            "autocast": sampler.autocast,
            "batch_size": sampler.batch_size,
            "device": sampler.pipe.device.type,
            "versions": library_versions(),
        }

    def __call__(self, samples: Samples, instruments: Instruments | None = None) -> Target:
        """The full-step pictures of samples, from the cache as far as they are there."""
        instruments = instruments or self.instruments
        key = digest({**self.identity, "samples": samples.identity})
        name = f"full-step pictures, guidance {samples.guidance_scale:g}"
        parts = tqdm(self._parts(samples), desc=name, leave=False)
        batches = [load(path) or self._render(batch, path) for batch, path in parts]
        images = torch.cat([tensors["images"] for tensors, _ in batches])
        costs = [facts for _, facts in batches]
        medians = torch.tensor([[c["seconds_per_image"], c["solver_share"]] for c in costs]).median(dim=0).values
        cost = {"nfe": costs[0]["nfe"], "seconds_per_image": float(medians[0]), "solver_share": float(medians[1])}
        return Target(key, images, self._seen(key, images, samples, instruments), cost)

    def _render(self, batch: Samples, path: Path) -> tuple[dict[str, torch.Tensor], dict]:
        """Renders a batch; it is on disk before the next begins."""
        cost = Cost()
        (images,) = self.sampler.render(self.scheduler, batch, self.steps, batch.guidance_scale, cost)
        store(path, {"images": to_8_bits(images)}, cost.summary())
        return load(path)

    def _seen(
        self, key: str, images: torch.Tensor, samples: Samples, instruments: Instruments
    ) -> dict[str, torch.Tensor]:
        path = self.folder / f"{key}-seen-{digest(instruments.identity)}.safetensors"
        if (known := load(path)) is not None:
            return known[0]
        seen = instruments.look(images.float() / 255, samples, self.sampler.batch_size)
        store(path, seen, {})
        return seen

    def _parts(self, samples: Samples) -> list[tuple[Samples, Path]]:
        """The batches, each with its file: samples that begin with the same batches share them."""
        size = self.sampler.batch_size
        batches = [samples.rows(first, first + size) for first in range(0, len(samples.prompts), size)]
        known = {**self.identity, "kind": "batch"}
        return [(b, self.folder / f"{digest({**known, 'samples': b.identity})}.safetensors") for b in batches]


def to_8_bits(images_NCHW: torch.Tensor) -> torch.Tensor:
    """uint8, rounded as in a PNG file."""
    return images_NCHW.mul(255).round().to(torch.uint8).cpu()


def reference_images(source: str, count: int, size: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Pictures that a Fréchet distance compares with, float32 (1, 3, H, W) each.

    Args:
        source: `scenes:SPLIT`, rendered scenes of the miniature world, or a folder of images.
        count: of scenes; of a folder all images are taken.
        size: height and width.

    Raises:
        ValueError: the folder has fewer than two images.
    """
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2.functional import center_crop, resize

    if source.startswith("scenes:"):
        from data.scenes import Scene, render_batch

        for seed in range(count):
            scene = Scene.random(seed, source.removeprefix("scenes:"))
            yield render_batch([scene], size).image.float() / 255
        return
    files = sorted(
        path for path in Path(source).glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    )
    if len(files) < 2:
        raise ValueError(f"reference={source!r} has {len(files)} images; a Fréchet distance needs two or more.")
    for path in files:
        image = resize(decode_image(str(path), ImageReadMode.RGB), [min(size)])
        yield center_crop(image, list(size))[None].float() / 255
