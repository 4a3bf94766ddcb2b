"""What the training scripts of the zoo share: the world as batches, and one resumable loop on accelerate.

The loop keeps an exponential moving average of the weights, runs in bf16 autocast where the hardware multiplies in it,
and writes a checkpoint every few minutes under `runs/zoo/<name>`; the same command started again goes on from there.
Batch number n is a function of n, and its noise of the run's name too: a resumed run sees what an uninterrupted one
would have seen, a later one something else. That begins with landed weights: `--start zoo/<name> --name <name>-2`.
"""

import json
import math
import random
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.scenes import COLOURS, Scene, caption, render_batch
from zoo.muon import Muon

ZOO = Path(__file__).parent
RUNS = ZOO.parent / "runs" / "zoo"

ON_GPU = torch.cuda.is_available()
BF16 = ON_GPU or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # elsewhere hundreds of times slower than float32
FUSED_ATTENTION = ON_GPU or not BF16  # in bf16 on a CPU, the fused kernel is two to three times slower backwards
POSITION_RATE = 30  # of relative position biases, in learning rates


@dataclass
class Run:
    """The knobs of a training run, shared by every script of the zoo."""

    name: str = field(metadata={"help": "folder under runs/zoo for checkpoints and the log"})
    steps: int = field(default=1000, metadata={"help": "optimiser steps in all"})
    batch_size: int = field(default=64, metadata={"help": "samples a step"})
    learning_rate: float = field(default=6e-4, metadata={"help": "peak of the schedule"})
    warmup_steps: int = field(default=100, metadata={"help": "linear warm-up, then cosine decay to a fiftieth"})
    weight_decay: float = field(default=0.01, metadata={"help": "of AdamW, and of Muon"})
    ema_decay: float = field(default=0.999, metadata={"help": "of the moving average that is saved"})
    minutes: float = field(default=math.inf, metadata={"help": "stop after so many minutes, schedule included"})
    save_minutes: float = field(default=3.0, metadata={"help": "between checkpoints"})
    start: str | None = field(default=None, metadata={"help": "folder of landed weights to go on from"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the network"})
    muon: bool = field(default=False, metadata={"help": "Muon for the layers of blocks, AdamW for the rest"})


class Scenes(Dataset):
    """Training scenes, by number; a batch is a list of scenes.

    Measuring instruments must know every pair of shape and colour: with `all_pairs`, every second scene has its solids
    repainted in colours drawn from its number alone, held-out pairs among them.
    """

    def __init__(self, count: int, first: int = 0, all_pairs: bool = False):
        self.count, self.first, self.all_pairs = count, first, all_pairs

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        scene = Scene.random(self.first + index)
        if not self.all_pairs or index % 2:
            return scene
        rng = random.Random(self.first + index)
        colour = dict(zip(COLOURS, rng.sample(COLOURS, len(COLOURS)), strict=True))
        return replace(scene, solids=tuple(replace(s, colour=colour[s.colour]) for s in scene.solids))


def scene_batches(run: Run, first_batch: int, device: torch.device, all_pairs: bool = False) -> DataLoader:
    """Lists of `run.batch_size` scenes, batch `first_batch` and on; drawn by worker processes beside a GPU."""
    count, first = (run.steps - first_batch) * run.batch_size, first_batch * run.batch_size
    workers = 8 if device.type == "cuda" else 0
    return DataLoader(Scenes(count, first, all_pairs), run.batch_size, collate_fn=list, num_workers=workers)


def pictures(scenes: list[Scene], size: int, device: torch.device) -> torch.Tensor:
    """Images x_BCHW in [-1, 1]."""
    return render_batch(scenes, size, device).image.float() / 127.5 - 1


def captions(scenes: list[Scene], seed: int) -> list[str]:
    """One caption for each scene, the phrasing drawn from the seed."""
    rng = random.Random(seed)
    return [caption(scene, rng).text for scene in scenes]


def seed_of(run: Run, purpose: str, step: int) -> int:
    """Of what a step of a run draws for one purpose: other numbers in every sitting, and for every purpose."""
    return random.Random(f"{run.name}:{purpose}:{step}").getrandbits(32)


def drawn(run: Run, purpose: str, step: int) -> torch.Generator:
    """A generator on the CPU with that seed."""
    return torch.Generator().manual_seed(seed_of(run, purpose, step))


def fit(
    network: nn.Module,
    run: Run,
    loss: Callable[[nn.Module, int, Any], dict[str, torch.Tensor]],
    batches: Callable[[int, torch.device], Iterable],
) -> tuple[nn.Module, list[dict]]:
    """Trains a network and returns it with the averaged weights in place, and the log.

    Args:
        loss: `loss(network, step, batch)` gives named terms, of which "loss" is minimised.
        batches: `batches(first_step, device)` iterates over batches from that step on.

    Raises:
        ValueError: several processes, or there is a run of that name with another start.
    """
    accelerator = Accelerator(mixed_precision="bf16" if BF16 else "no", log_with=None)
    if accelerator.num_processes > 1:
        raise ValueError("The zoo is trained by one process: accelerate launch --num_processes 1.")
    folder = RUNS / run.name
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in network.parameters() if p.requires_grad]
    network, *optimizers = accelerator.prepare(network, *make_optimizers(network, run))
    plain = accelerator.unwrap_model(network)
    ema = EMAModel(plain.parameters(), decay=run.ema_decay, use_ema_warmup=True, power=0.75, foreach=ON_GPU)
    ema.to(accelerator.device)
    step, log, spent = _restore(folder, run, accelerator, ema)
    callable_network = torch.compile(network, dynamic=False) if run.compile else network

    network.train()
    started = saved = time.monotonic()
    values: dict[str, list[torch.Tensor]] = defaultdict(list)
    bar = tqdm(total=run.steps, initial=step, desc=run.name, disable=not accelerator.is_main_process, mininterval=10)
    for batch in batches(step, accelerator.device):
        elapsed = spent + time.monotonic() - started
        progress = max(step / run.steps, elapsed / (60 * run.minutes))
        if progress >= 1:
            break
        scale = min((step + 1) / run.warmup_steps, 0.51 + 0.49 * math.cos(math.pi * progress))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate * scale * group.get("factor", 1)
        with attention():
            with accelerator.autocast():
                terms = loss(callable_network, step, batch)
            accelerator.backward(terms["loss"])
        accelerator.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.step(plain.parameters())
        step += 1
        for name, value in terms.items():
            values[name].append(value.detach().float())
        bar.update()
        if step % 100 == 0:
            log.append(_row(step, spent + time.monotonic() - started, values))
            bar.set_postfix(log[-1])
            values.clear()
        if time.monotonic() - saved > 60 * run.save_minutes:
            _store(folder, run, accelerator, ema, step, log, spent + time.monotonic() - started)
            saved = time.monotonic()
    bar.close()
    if values:
        log.append(_row(step, spent + time.monotonic() - started, values))
    _store(folder, run, accelerator, ema, step, log, spent + time.monotonic() - started)
    ema.copy_to(plain.parameters())
    return plain.eval(), log


def attention() -> AbstractContextManager:
    """Inside, attention is computed in the way that is quickest to train here, forwards and backwards."""
    return nullcontext() if FUSED_ATTENTION else sdpa_kernel(SDPBackend.MATH)


def make_optimizers(network: nn.Module, run: Run) -> list[torch.optim.Optimizer]:
    """AdamW; with `run.muon`, Muon for the layers of numbered blocks and AdamW for the rest, at one learning rate.

    Relative position biases, which are logits, have `POSITION_RATE` times that: from it alone they hardly move, and
    zoo/mini-flux's T5 does not come to know neighbours. On its task of phrases, 300 steps: 0.33 without, 0.05 with it.
    """
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    layers = [p for name, p in named if run.muon and is_block_layer(name, p)]
    chosen = {id(p) for p in layers}
    biases = [p for name, p in named if "relative_attention_bias" in name]
    chosen |= {id(p) for p in biases}
    groups = [{"params": [p for _, p in named if id(p) not in chosen]}]
    groups += [{"params": biases, "factor": POSITION_RATE}] if biases else []
    adamw = torch.optim.AdamW(groups, run.learning_rate, betas=(0.9, 0.99), weight_decay=run.weight_decay)
    return [adamw, Muon(layers, run.learning_rate, weight_decay=run.weight_decay)] if layers else [adamw]


def is_block_layer(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the weight of a layer in a numbered list of modules: no modulation, embedding, scale."""
    layer = parameter.ndim >= 2 and re.search(r"\.\d+\.", name)
    return bool(layer) and not re.search(r"norm|emb|bias|temperature", name)


def load_start(network: nn.Module, run: Run) -> nn.Module:
    """The network with the landed weights of `run.start`, where it is given. Raises OSError if there are none."""
    if run.start:
        network.load_state_dict(load_file(Path(run.start) / "model.safetensors"))
    return network


def _row(step: int, seconds: float, values: dict[str, list[torch.Tensor]]) -> dict:
    """A line of the log: means since the last one, each over the steps that have the term."""
    means = {name: round(float(torch.stack(those).mean()), 5) for name, those in values.items()}
    return {"step": step, "seconds": round(seconds), **means}


def _store(folder: Path, run: Run, accelerator: Accelerator, ema: EMAModel, step: int, log: list[dict], spent: float):
    """Writes aside and puts in place, so that a run that is killed here leaves its last checkpoint."""
    part, place, before = (folder / name for name in ("checkpoint.part", "checkpoint", "checkpoint.old"))
    shutil.rmtree(part, ignore_errors=True)
    accelerator.save_state(str(part / "state"))
    save_file({str(i): p.contiguous() for i, p in enumerate(ema.shadow_params)}, part / "ema.safetensors")
    progress = {"step": step, "ema_step": ema.optimization_step, "seconds": spent, "start": run.start, "log": log}
    (part / "progress.json").write_text(json.dumps(progress))
    shutil.rmtree(before, ignore_errors=True)
    if place.exists():
        place.rename(before)
    part.rename(place)


def _restore(folder: Path, run: Run, accelerator: Accelerator, ema: EMAModel) -> tuple[int, list[dict], float]:
    """Steps, log and seconds of the last checkpoint; nothing of each where there is none."""
    place = next((p for p in (folder / "checkpoint", folder / "checkpoint.old") if p.exists()), None)
    if place is None:
        return 0, [], 0.0
    progress = json.loads((place / "progress.json").read_text())
    if progress["start"] != run.start:
        raise ValueError(f"{folder} is a run that began from {progress['start']}; give this one another --name.")
    accelerator.load_state(str(place / "state"))
    shadow = load_file(place / "ema.safetensors", device=str(accelerator.device))
    ema.shadow_params = [shadow[str(i)] for i in range(len(shadow))]
    ema.optimization_step = progress["ema_step"]
    return progress["step"], progress["log"], progress["seconds"]


def write_log(folder: Path, run: Run, log: list[dict], **facts) -> None:
    """Leaves what a model card says about a training run beside its weights, after what it said of runs before it.

    A row of the log says of which run it is; a run that was resumed takes the place of what it left before.
    """
    before = Path(run.start or "", "training.json")
    earlier = json.loads(before.read_text()) if run.start and before.exists() else {"log": []}
    rows = [{"run": folder.name, **row} for row in earlier["log"]]
    rows = [row for row in rows if row["run"] != run.name]
    step, seconds = (rows[-1]["step"], rows[-1]["seconds"]) if rows else (0, 0)
    rows += [{**row, "run": run.name, "step": step + row["step"], "seconds": seconds + row["seconds"]} for row in log]
    machines = earlier["hardware"].split(", then ") if "hardware" in earlier else []
    if (machine := hardware()) not in machines[-1:]:
        machines.append(machine)
    facts |= {
        "hardware": ", then ".join(machines),
        "runs": len({row["run"] for row in rows}),
        "minutes": round(rows[-1]["seconds"] / 60, 1),
        "steps": rows[-1]["step"],
        "log": rows,
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=1))


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Weights in bf16, which load as float32 where nobody names a type.

    That is what diffusers does; transformers would leave the text encoders in the type that they are stored in, and
    FluxPipeline does not mix the two.
    """
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    for path in folder.glob("text_encoder*/config.json"):
        config = json.loads(path.read_text()) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2) + "\n")


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"{count} CPU core{'s' * (count > 1)}"


def parameter_count(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
