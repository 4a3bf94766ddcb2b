"""Trains zoo/clip: a CLIPModel on pictures and captions of the miniature world, and their tokenizer.

    accelerate launch zoo/train_clip.py                                        # 2 CPU cores: 9 minutes
    accelerate launch zoo/train_clip.py --steps 8000 --batch_size 1024         # GPU

The text tower is also the text encoder of zoo/mini-sd, so this comes first.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from trl import TrlParser

from data.scenes import Scene, vocabulary
from zoo.training import (
    FUSED_ATTENTION,
    ZOO,
    Run,
    captions,
    fit,
    load_start,
    parameter_count,
    pictures,
    scene_batches,
    write_log,
)

TOKENS = 32


@dataclass
class ClipRun(Run):
    name: str = "clip"
    steps: int = 1500
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    ema_decay: float = 0.998


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte pairs merge to just the words of the miniature world; bytes spell all others.

    The numbers of single bytes differ between calls, so weights keep the tokenizer that they were trained with.
    """
    trainer = BpeTrainer(
        vocab_size=1000,
        min_frequency=1,
        initial_alphabet=ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = Whitespace()
    bpe.train_from_iterator([*vocabulary(), *ByteLevel.alphabet()], trainer)
    model = json.loads(bpe.to_str())["model"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(model["vocab"]))
        Path(folder, "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS, "pad_token_id": tokenizer.pad_token_id}
    body = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}
    vision = {"image_size": 64, "patch_size": 8, "num_hidden_layers": 4}
    return CLIPModel(
        CLIPConfig(
            text_config={**body, **text, **special, "num_hidden_layers": 3},
            vision_config={**body, **vision},
            projection_dim=128,
            attn_implementation="sdpa" if FUSED_ATTENTION else "eager",
        )
    )


def main() -> None:
    (run,) = TrlParser((ClipRun,)).parse_args_and_config()
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(run.start) if run.start else build_tokenizer()

    def loss(clip: nn.Module, step: int, scenes: list[Scene]) -> dict[str, torch.Tensor]:
        device = next(clip.parameters()).device
        tokens = tokenizer(captions(scenes, step), padding=True, return_tensors="pt").to(device)
        out = clip(**tokens, pixel_values=pictures(scenes, 64, device))
        with torch.autocast(device.type, enabled=False):
            logits_BB, same = out.logits_per_text.float(), torch.arange(len(scenes), device=device)
            contrast = (F.cross_entropy(logits_BB, same) + F.cross_entropy(logits_BB.T, same)) / 2
        return {"loss": contrast, "top1": (logits_BB.argmax(1) == same).float().mean()}

    clip = load_start(build_clip(tokenizer), run)
    clip, log = fit(clip, run, loss, lambda first, device: scene_batches(run, first, device))
    half = {"shortest_edge": 64}
    pixels = CLIPImageProcessor(size=half, crop_size=64, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    folder = ZOO / "clip"
    clip.to(torch.bfloat16).save_pretrained(folder)
    CLIPProcessor(pixels, tokenizer).save_pretrained(folder)
    write_log(folder, run, log, parameters=parameter_count(clip))


if __name__ == "__main__":
    main()
