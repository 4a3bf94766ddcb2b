"""Rows of an experiment on the same prompts and seeds: drawn batch by batch, looked at, and kept on disk.

    study = Study(pipe, rows, instruments, samples, folder, batch_size=20)
    print(study.plan())
    measured = study.measure()        # the first row is what all are compared with

A (batch, row) is on disk before the next begins, so an interrupted command goes on where it was. Files are named by
all that decides the pictures except the code: after a change of a sampler, delete the folder `cache`.

Shape suffixes: B pictures of a batch, N of all, C H W.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from benchmarks.quality.ledger import Bill, Ledger, kept_account
from data.teacher import library_versions
from evaluation.cache import digest, load, store
from evaluation.instruments import CAPTION_CHECK, SCORE, Instruments
from evaluation.rendering import Samples
from evaluation.solvers import describe
from evaluation.targets import to_8_bits
from solver.prompt_embeddings import PromptEmbeddings
from solver.samplers.calls import guidance
from solver.samplers.digest import weights_digest
from solver.samplers.latents import denoiser

AGREEMENT = "check_agreement"
PLANNED = 4  # pictures with which a run is planned


class Batch(NamedTuple):
    """What a row is asked to draw: prompts, seeds, and the pipeline's call with their embeddings and the guidance."""

    prompts: tuple[str, ...]
    seeds: list[int]
    call: dict


class Drawn(NamedTuple):
    """Pictures in [0, 1], and further numbers (B, ...) of each."""

    images_BCHW: Tensor
    numbers: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: of the row.
        curve: that it is on in the figure; not there if it is empty.
        draw: makes the pictures.
        facts: what decides them besides model, prompts and seeds, in plain JSON values.
        against: name of the row that it is compared with, pair by pair.
        in_sheet: whether the contact sheet shows it.
    """

    name: str
    curve: str
    draw: Callable[[Batch], Drawn]
    facts: dict
    against: str | None = None
    in_sheet: bool = False


@dataclass
class Measured:
    """A row's results.

    Attributes:
        images: uint8 (N, 3, H, W).
        values: a number a picture, (N,), by metric.
        features: of DINO, (N, D).
        calls: of the transformer for a picture, by image tokens.
        seconds: of a picture, alone; the median of the batches.
    """

    row: Row
    images: Tensor
    values: dict[str, Tensor]
    features: Tensor
    calls: dict[int, float]
    seconds: float


@dataclass
class Study:
    """An experiment.

    Attributes:
        pipe: a transformer's pipeline, on its device.
        rows: the first one is the target.
        instruments: with DINO among their rewards.
        samples: prompts, seeds and guidance.
        folder: of the cache.
        batch_size: pictures drawn together.
    """

    pipe: DiffusionPipeline
    rows: Sequence[Row]
    instruments: Instruments
    samples: Samples
    folder: Path
    batch_size: int = 20
    embeddings: PromptEmbeddings = field(init=False)

    def __post_init__(self):
        names = [row.name for row in self.rows]
        unknown = {row.against for row in self.rows} - {None, *names}
        if len(set(names)) < len(names) or unknown:
            raise ValueError(f"rows {names}: expected different names, and against={unknown or None} among them.")
        self.embeddings = PromptEmbeddings(self.pipe)
        self._identity = {
            "weights": weights_digest(self.pipe),
            "dtype": str(denoiser(self.pipe).dtype),  # the digest is of values, whatever holds them
            "scheduler": describe(self.pipe.scheduler, PLANNED),
            "instruments": self.instruments.identity,
            "versions": library_versions(),
            "device": self.pipe.device.type,
        }

    def measure(self) -> list[Measured]:
        """All rows on all samples."""
        parts: dict[str, list] = {row.name: [] for row in self.rows}
        with kept_account(self.pipe) as ledger:
            for samples in tqdm(self._batches(), desc="batches", mininterval=10):
                target = None
                for row in self.rows:
                    path = self._path(samples, row)
                    result = load(path)
                    if result is None:
                        images, numbers, bill = self._draw(row, samples, ledger)
                        result = self._looked_at(images, numbers, samples, target), _facts(bill)
                        store(path, *result)
                    if target is None:
                        target = self._look(result[0]["images"].float() / 255, samples)
                    parts[row.name].append(result)
                ledger.forget()
        return [_together(row, parts[row.name]) for row in self.rows]

    def plan(self) -> str:
        """What is left to do and how long it takes, found by asking all rows for some pictures without the network."""
        left = [(samples, row) for samples in self._batches() for row in self.rows if self._misses(samples, row)]
        pictures = sum(len(samples.prompts) for samples, _ in left)
        if not pictures:
            return f"budget: all {len(self.rows)} rows of {len(self.samples.prompts)} pictures are there"
        few = self.samples.rows(0, PLANNED)
        count, made, start = len(few.prompts), Counter(), time.perf_counter()
        with kept_account(self.pipe) as ledger:
            ledger.stand_in = True
            for row in self.rows:
                images, numbers, bill = self._draw(row, few, ledger)
                self._looked_at(images, numbers, few, None)
                made += bill.made
            networks = {tokens: _fastest(ledger.times, tokens) for tokens in made}
            in_network = sum(sum(times) for times in ledger.times.values())
        rest = (time.perf_counter() - start - in_network) / count  # decoding, looking, and what solvers do
        seconds = rest + sum(networks[tokens] * calls for tokens, calls in made.items()) / count
        share = pictures / len(self.rows)  # rows that are there are taken for as dear as the others
        calls = ", ".join(f"{calls / count:.0f} of {tokens} tokens" for tokens, calls in sorted(made.items()))
        return (
            f"budget: {share:.0f} prompts in {len(self.rows)} rows; calls of the network a prompt: {calls}; "
            f"{seconds:.1f} s a prompt, {share * seconds / 60:.0f} minutes on {self.pipe.device.type}, "
            f"{torch.get_num_threads()} threads"
        )

    def _batches(self) -> list[Samples]:
        size = self.batch_size
        return [self.samples.rows(i, i + size) for i in range(0, len(self.samples.prompts), size)]

    def _path(self, samples: Samples, row: Row) -> Path:
        known = {**self._identity, "target": self.rows[0].facts, "row": row.facts, "samples": samples.identity}
        return self.folder / f"{digest(known)}.safetensors"

    def _misses(self, samples: Samples, row: Row) -> bool:
        return not self._path(samples, row).is_file()

    @torch.no_grad()
    def _draw(self, row: Row, samples: Samples, ledger: Ledger) -> tuple[Tensor, dict[str, Tensor], Bill]:
        call = {**self.embeddings(samples.prompts), **guidance(self.pipe, samples.guidance_scale)}
        with ledger.bill(len(samples.prompts)) as bill:
            images_BCHW, numbers = row.draw(Batch(samples.prompts, list(samples.seeds), call))
        if not images_BCHW.isfinite().all():
            raise ValueError(f"row {row.name!r}: a picture is not finite.")
        return images_BCHW.cpu(), numbers, bill

    def _look(self, images_BCHW: Tensor, samples: Samples) -> dict[str, Tensor]:
        return self.instruments.look(images_BCHW, samples, self.batch_size)

    def _looked_at(self, images_BCHW: Tensor, numbers: dict, samples: Samples, target: dict | None) -> dict:
        """What is kept of a batch: pictures, DINO's features, and a number a picture by metric."""
        images_BCHW = to_8_bits(images_BCHW)
        seen = self._look(images_BCHW.float() / 255, samples)
        target = seen if target is None else target
        values = {**self.instruments.compare(seen, target), **numbers}
        if CAPTION_CHECK in seen:
            values[CAPTION_CHECK] = 100 * seen[CAPTION_CHECK]
            values[AGREEMENT] = 100 * (seen[CAPTION_CHECK] == target[CAPTION_CHECK]).float()
        values |= {name: seen[name] for name in (SCORE,) if name in seen}
        return {"images": images_BCHW, "features": seen["dino"].float()} | {f"value.{k}": v for k, v in values.items()}


def _facts(bill: Bill) -> dict:
    return {"calls": list(bill.calls.items()), "seconds": bill.seconds}


def _together(row: Row, parts: list[tuple[dict, dict]]) -> Measured:
    """The batches of a row as one."""
    tensors = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
    values = {name.removeprefix("value."): x for name, x in tensors.items() if name.startswith("value.")}
    seconds = torch.tensor([facts["seconds"] for _, facts in parts[1:] or parts]).median()  # the first is a warm-up
    calls = dict(parts[0][1]["calls"])
    return Measured(row, tensors["images"], values, tensors["features"], calls, float(seconds))


def _fastest(times: dict[tuple, list[float]], tokens: int) -> float:
    """Seconds of a call for one picture, by the largest batch that was tried."""
    shape = max((shape for shape in times if shape[1] == tokens), key=lambda shape: shape[0])
    return min(times[shape]) / shape[0]
