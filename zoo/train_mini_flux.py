"""Trains zoo/mini-flux: a FLUX-type rectified flow at 64 and 128 px that also edits, for FluxPipeline and
FluxKontextPipeline.

    accelerate launch zoo/train_mini_flux.py --minutes 104 --steps 5000 --pool 16000 --large_pool 3000 \
        --edit_pool 5000                                  # 2 CPU cores; 12 more minutes before it, for the pool
    accelerate launch zoo/train_mini_flux.py --steps 40000 --batch_size 1024 --learning_rate 2e-3 --muon true \
        --large_from 0 --edit_from 0 --pool 300000 --large_pool 100000 --edit_pool 100000 --ema_decay 0.9995 \
        --minutes 7                                       # GPU; expect a minute or two before it, for the pool
    accelerate launch zoo/train_mini_flux.py --start zoo/mini-flux --name mini-flux-2 --warmup_steps 20 ...

On a CPU that multiplies in bfloat16, `--compile true` makes a step about 1.5 times as fast, after a minute for each of
the four kinds of steps.

The landed weights began as those of the first, 3,742 steps on a busy machine; from step 2,650 on with --large_share
0.6 --edit_share 0.25, since its schedule left too little time for 128 px. The third goes on from landed weights, in a
sitting of its own, as they did; their card says how. What a caption says of which noun is decided above σ = 0.8: four
sittings hardly drew such levels and had not begun to learn it, one with `--noise_shift 3` did.

Needs the results of `zoo/train_mini_flux_vae.py` and `zoo/train_clip.py`. The schedule of what is learned when counts
steps: where `--minutes` will end the run before its steps do, let everything begin at once, as the second does.
Estimated, not measured, on an H100: 20,000 small pictures a second.

What does not change from step to step is made once and kept under `runs/zoo`: latents of scenes at both sizes and of
their edited versions, several captions a scene, instructions, all as token ids. Steps are of four kinds, with a batch
of one size: from a caption, small or large; from a source picture and an instruction, small or large. Larger pictures
and edits come in smaller batches, for the same number of tokens.
"""

import hashlib
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from trl import TrlParser

from data.scenes import Scene, caption, numbered_edit, render_batch
from zoo.mini_flux import (
    LARGE,
    SMALL,
    Tokenizers,
    Words,
    assemble,
    build_networks,
    build_scheduler,
    noise_levels,
    open_networks,
    open_tokenizers,
    tokens_of,
)
from zoo.phrases import Phrases
from zoo.training import BF16, ON_GPU, RUNS, ZOO, Run, drawn, fit, parameter_count, seed_of, write_log


@dataclass
class MiniFluxRun(Run):
    name: str = "mini-flux"
    steps: int = 16_000
    batch_size: int = field(default=64, metadata={"help": "small pictures from captions; the other kinds have fewer"})
    learning_rate: float = 1e-3
    ema_decay: float = 0.999
    caption_dropout: float = 0.1
    align_weight: float = field(default=0.1, metadata={"help": "of telling classes from a layer in the middle"})
    phrase_weight: float = field(default=0.1, metadata={"help": "of telling what is said of a noun from its token"})
    noise_shift: float = field(default=1.0, metadata={"help": "of the noise levels, beyond the scheduler's shift"})
    # Networks, where there is no start
    width: int = 160
    joint_layers: int = 1
    single_layers: int = 6
    # What is learned when: shares of the steps, from a fraction of the run on
    large_share: float = field(default=0.25, metadata={"help": "of the steps at 128 px"})
    large_from: float = field(default=0.5, metadata={"help": "fraction of the run without them"})
    edit_share: float = field(default=0.3, metadata={"help": "of the steps that edit"})
    edit_from: float = field(default=0.3, metadata={"help": "fraction of the run without them"})
    # What is kept: scenes 0, 1, 2, ... and as many of them also large, also edited
    pool: int = 30_000
    large_pool: int = 8_000
    edit_pool: int = 12_000
    captions_per_scene: int = 4


class Kind(NamedTuple):
    """What a step trains."""

    size: int
    edits: bool

    @property
    def cost(self) -> int:
        """Tokens of a picture, in units of a small one from a caption."""
        return (self.size // SMALL) ** 2 * (1 + self.edits)


class Batch(NamedTuple):
    """Latents (B, C, H, W) in float32, classes (B, N) of their tokens, prompts; sources where it edits."""

    latents: Tensor
    classes: Tensor
    words: Words
    source: Tensor | None


def kind_of(step: int, run: MiniFluxRun) -> Kind:
    """The kind of step number `step`, a function of it and of the schedule."""
    draw = random.Random(seed_of(run, "kind", step))
    large = draw.random() < run.large_share and step >= run.large_from * run.steps
    edits = draw.random() < run.edit_share and step >= run.edit_from * run.steps
    return Kind(LARGE if large else SMALL, edits)


# ------------------------------------------------------------------------------------------------------- the pool


class Described(Dataset):
    """Scenes by number, their edited versions, and the token ids of what is said of both; fetched in batches."""

    def __init__(self, run: MiniFluxRun, tokenizers: Tokenizers):
        self.run, self.tokenizers = run, tokenizers

    def __len__(self) -> int:
        return self.run.pool

    def __getitems__(self, numbers: list[int]) -> tuple[list[Scene], list[Scene], Words, Words | None]:
        scenes = [Scene.random(i) for i in numbers]
        per_scene = self.run.captions_per_scene
        drawn = [random.Random(f"caption:{i}") for i in numbers]
        texts = [caption(scene, rng).text for scene, rng in zip(scenes, drawn, strict=True) for _ in range(per_scene)]
        captions = Words(*(ids.to(torch.int16).unflatten(0, (-1, per_scene)) for ids in self.tokenizers(texts)))
        edits = [numbered_edit(i) for i in numbers if i < self.run.edit_pool]
        instructions = self.tokenizers([instruction for instruction, _, _ in edits]) if edits else None
        if instructions:
            instructions = Words(*(ids.to(torch.int16) for ids in instructions))
        return scenes, [edited for _, _, edited in edits], captions, instructions


def _as_it_is(batch):
    return batch


@torch.no_grad()
def make_pool(run: MiniFluxRun, vae: AutoencoderKL, tokenizers: Tokenizers) -> dict[str, Tensor]:
    """Latents float16 and classes uint8, token ids int16; kept for all runs with the same encoder and numbers.

    Keys: latents_64, classes_64, latents_128, classes_128, the same with `edited_` before it, and captions_clip,
    captions_t5 (pool, captions, L), instructions_clip, instructions_t5 (edits, L). Row n belongs to scene n.
    """
    facts = (run.pool, run.large_pool, run.edit_pool, run.captions_per_scene, vae.config.shift_factor)
    digest = hashlib.sha256(repr((*facts, vae.config.scaling_factor)).encode())
    for parameter in vae.encoder.state_dict().values():
        digest.update(parameter.cpu().contiguous().numpy().tobytes())
    path = RUNS / "mini-flux-pool" / f"{digest.hexdigest()[:16]}.safetensors"
    if path.exists():
        return load_file(path)
    counts = {SMALL: run.pool, LARGE: run.large_pool}
    workers = max(1, (os.cpu_count() or 1) - 2) if ON_GPU else 0
    parts: dict[str, list[Tensor]] = {}

    def keep(name: str, rows: Tensor) -> None:
        parts.setdefault(name, []).append(rows.contiguous().cpu())

    first = 0
    batches = DataLoader(Described(run, tokenizers), 250, num_workers=workers, collate_fn=_as_it_is)
    for scenes, edited, captions, instructions in tqdm(batches, desc="pool", mininterval=10):
        for size, count in counts.items():
            for prefix, shown in (("", scenes), ("edited_", edited)):
                if shown := shown[: max(0, count - first)]:
                    latents, classes = encode(vae, shown, size)
                    keep(f"{prefix}latents_{size}", latents)
                    keep(f"{prefix}classes_{size}", classes)
        for name, words in (("captions", captions), ("instructions", instructions)):
            if words is not None:
                keep(f"{name}_clip", words.clip)
                keep(f"{name}_t5", words.t5)
        first += len(scenes)
    pool = {name: torch.cat(rows) for name, rows in parts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(pool, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    return pool


def encode(vae: AutoencoderKL, scenes: list[Scene], size: int) -> tuple[Tensor, Tensor]:
    """Latents float16 (B, C, H, W), shifted and scaled as pipelines do it, and the class (B, N) at each token."""
    picture = render_batch(scenes, size, vae.device)
    x_BCHW = picture.image.float() / 127.5 - 1
    with torch.autocast(vae.device.type, torch.bfloat16, enabled=BF16):
        latents = torch.cat([vae.encode(x).latent_dist.mode() for x in x_BCHW.split(32)]).float()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return latents.half(), picture.segmentation[:, 4::8, 4::8].flatten(1).to(torch.uint8)


def pool_batches(pool: dict[str, Tensor], run: MiniFluxRun, tokenizers: Tokenizers, first: int, device: torch.device):
    """Batches from step `first` on, on the device; batch number n is a function of n."""
    pool = {name: rows.to(device) for name, rows in pool.items()}
    empty = Words(*(ids[0].to(device) for ids in tokenizers([""])))
    for step in range(first, run.steps):
        yield draw_batch(pool, run, kind_of(step, run), empty, drawn(run, "batch", step))


def draw_batch(pool: dict[str, Tensor], run: MiniFluxRun, kind: Kind, empty: Words, draw: torch.Generator) -> Batch:
    """Random rows of the pool. Some prompts are empty, so that there is guidance to turn towards the others."""
    prefix = "edited_" if kind.edits else ""
    latents, classes = pool[f"{prefix}latents_{kind.size}"], pool[f"{prefix}classes_{kind.size}"]
    count = max(1, run.batch_size // kind.cost)
    rows = torch.randint(len(latents), (count,), generator=draw)
    phrasing = torch.randint(run.captions_per_scene, (count,), generator=draw)
    kept = (torch.rand(count, 1, generator=draw) >= run.caption_dropout).to(latents.device)
    rows, phrasing = rows.to(latents.device), phrasing.to(latents.device)
    if kind.edits:
        chosen = (pool["instructions_clip"][rows], pool["instructions_t5"][rows])
    else:
        chosen = (pool["captions_clip"][rows, phrasing], pool["captions_t5"][rows, phrasing])
    words = Words(*(torch.where(kept, ids.long(), none) for ids, none in zip(chosen, empty, strict=True)))
    source = pool[f"latents_{kind.size}"][rows].float() if kind.edits else None
    return Batch(latents[rows].float(), classes[rows].long(), words, source)


# ------------------------------------------------------------------------------------------------------- training


def flow_loss(
    denoiser: nn.Module, batch: Batch, run: MiniFluxRun, step: int, scheduler, phrases: Phrases
) -> dict[str, Tensor]:
    """Squared error of the velocity ε - x_0 at random noise levels; cross-entropy of the classes in the middle, and of
    what the words say of each noun.
    """
    x0 = batch.latents
    tokens, draw = tokens_of(4 * x0.shape[-1]), drawn(run, "levels", step)
    sigma_B = noise_levels(len(x0), tokens, scheduler, draw, run.noise_shift).to(x0.device)
    noises = torch.Generator(x0.device).manual_seed(seed_of(run, "noise", step))
    noise = torch.randn(x0.shape, generator=noises, device=x0.device)
    s = sigma_B[:, None, None, None]
    velocity, logits_BNK, logits_BLV = denoiser((1 - s) * x0 + s * noise, sigma_B, batch.words, batch.source)
    mse = F.mse_loss(velocity, noise - x0)
    told = F.cross_entropy(logits_BNK.flatten(0, 1), batch.classes.flatten())
    bound = phrases.loss(logits_BLV, batch.words.t5)
    own = f"{4 * x0.shape[-1]} px" + (", edits" if batch.source is not None else "")
    loss = mse + run.align_weight * told + run.phrase_weight * bound
    terms = {"loss": loss, "mse": mse, "classes": told, "phrases": bound}
    return terms | {f"mse, {own}": mse, f"classes, {own}": told}


def main() -> None:
    (run,) = TrlParser((MiniFluxRun,)).parse_args_and_config()
    torch.manual_seed(0)
    start = Path(run.start) if run.start else None
    folder = start / "vae" if start else RUNS / "mini-flux-vae" / "vae"
    vae = AutoencoderKL.from_pretrained(folder, dtype=torch.bfloat16).float()  # as it will be landed
    vae.to("cuda" if ON_GPU else "cpu")
    tokenizers = open_tokenizers(start / "tokenizer" if start else ZOO / "clip", start and start / "tokenizer_2")
    if start:
        denoiser = open_networks(start)
    else:
        denoiser = build_networks(ZOO / "clip", tokenizers, run.width, run.joint_layers, run.single_layers)
    pool = make_pool(run, vae, tokenizers)
    scheduler, phrases = build_scheduler(), Phrases(tokenizers.t5)

    def loss(denoiser: nn.Module, step: int, batch: Batch) -> dict[str, Tensor]:
        return flow_loss(denoiser, batch, run, step, scheduler, phrases)

    def batches(first: int, device: torch.device) -> Iterator[Batch]:
        return pool_batches(pool, run, tokenizers, first, device)

    denoiser, log = fit(denoiser, run, loss, batches)
    assemble(denoiser.cpu(), vae.cpu(), tokenizers, ZOO / "mini-flux")
    parameters = f"{parameter_count(denoiser.transformer)} transformer"
    write_log(ZOO / "mini-flux", run, log, parameters=parameters)


if __name__ == "__main__":
    main()
