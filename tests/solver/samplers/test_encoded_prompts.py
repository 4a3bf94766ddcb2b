"""Prompts instead of embeddings: encoded once, the pictures are those of pipelines that encode in every stage."""

import json

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import sample
from evaluation.remembered import read, recipe_of
from solver.samplers.calls import guidance, text_length
from solver.samplers.prompts import row_of
from solver.samplers.ralu import sampler
from solver.samplers.ralu.sampler import ralu
from solver.samplers.ralu.schedule import Schedule
from tests.tiny_pipelines import SIZE, tiny_pipeline
from zoo.mini_flux import build_t5, build_t5_tokenizer

SHORT = Schedule((2, 2, 2), (0.3, 0.45, 1.0), 0.3, (5.0, 2.6, 2.2), 6.0)
PROMPTS = ["a small red ring above a blue cube", "two white stars"]


def clip(cls, tokenizer, width):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width, "num_hidden_layers": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return cls(CLIPTextConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes, **ends)).eval()


def with_text_encoders(family):
    """A tiny pipeline that reads: CLIP and T5, random weights, the zoo's tokenizers."""
    pipe, _ = tiny_pipeline(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer, t5_tokenizer = CLIPTokenizer.from_pretrained("zoo/clip"), build_t5_tokenizer()
        t5 = build_t5(t5_tokenizer).eval()
        parts = {name: part for name, part in pipe.components.items() if part is not None}
        if family == "flux":
            parts["transformer"] = rebuilt(pipe.transformer, joint_attention_dim=128, guidance_embeds=False)
            parts |= {"text_encoder": clip(CLIPTextModel, tokenizer, 16), "tokenizer": tokenizer}
            parts |= {"text_encoder_2": t5, "tokenizer_2": t5_tokenizer}
            pipe = FluxPipeline(**parts)
        else:
            parts["transformer"] = rebuilt(pipe.transformer, joint_attention_dim=128)
            for name in ("", "_2"):
                parts[f"text_encoder{name}"] = clip(CLIPTextModelWithProjection, tokenizer, 8)
                parts[f"tokenizer{name}"] = tokenizer
            pipe = StableDiffusion3Pipeline(**parts, text_encoder_3=t5, tokenizer_3=t5_tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rebuilt(transformer, **config):
    return type(transformer).from_config({**transformer.config, **config}).eval()


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_encoding_once_changes_nothing(family, monkeypatch):
    """Guided, with negative prompts, two rows; and each row alone."""
    pipe = with_text_encoders(family)
    call = {**guidance_of(pipe), **text_length(pipe)}
    encodings = []
    encoder = pipe.text_encoder
    encoder.register_forward_hook(lambda *_: encodings.append(1))
    once = ralu(pipe, PROMPTS, [3, 4], SHORT, SIZE, SIZE, call=call).latents_BCHW
    count = len(encodings)
    assert count == 2  # the prompts and the negative prompts
    monkeypatch.setattr(sampler, "encoded", lambda pipe, call: call)
    every = ralu(pipe, PROMPTS, [3, 4], SHORT, SIZE, SIZE, call=call).latents_BCHW
    assert len(encodings) - count == 2 * (1 + 2 + 1)  # both at once, each alone, both at once
    assert (once - every).abs().max() < 2e-5
    monkeypatch.undo()
    alone = {name: value[1:] if isinstance(value, list) else value for name, value in call.items()}
    second = ralu(pipe, PROMPTS[1], 4, SHORT, SIZE, SIZE, call=alone).latents_BCHW
    assert (second[0] - once[1]).abs().max() < 2e-5


def test_rows_of_pictures_to_edit():
    """One a prompt, in a batch or a list; one picture of three channels is no batch of three."""
    batch = torch.rand(3, 3, 8, 8)
    assert torch.equal(row_of({"image": batch}, 1, 3)["image"], batch[1:2])
    assert torch.equal(row_of({"image": list(batch)}, 1, 3)["image"][0], batch[1])
    for one in (batch[0], batch[0].numpy()):
        assert row_of({"image": one}, 1, 3)["image"] is one
    assert row_of({"prompt_embeds": batch[0]}, 1, 3)["prompt_embeds"].shape == (1, 8, 8)


def guidance_of(pipe):
    if isinstance(pipe, StableDiffusion3Pipeline):
        return {"guidance_scale": 3.0, "negative_prompt": ["a cube", "a star"]}
    return guidance(pipe, 3.0, ["a cube", "a star"])


def test_command_renders(tmp_path):
    """From a folder, by prompt and seed, into a PNG; twice the same."""
    pipe = with_text_encoders("sd3")
    pipe.save_pretrained(tmp_path / "model")
    line = "--prompt x --seed 3 --height 32 --width 32 --preset turbo --device cpu --output"
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path in paths:
        sample.main(["ralu", "--model", str(tmp_path / "model"), *line.split(), str(path)])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    _, facts = read(paths[0])
    assert facts["guidance_scale"] == "1.0"  # of four steps, in one branch as the plan has it
    assert json.loads(facts["ralu"])["Z"] == 2 and json.loads(facts["ralu"])["copy"] == "pixel"
    with pytest.raises(ValueError, match="no recipe holds its schedule; proofsheet:ralu says it"):
        recipe_of(facts)
