"""zoo/mini-flux: what is trained is what the stock pipelines run."""

import json
import math
import random

import pytest
import torch
from diffusers import AutoencoderKL, FluxKontextPipeline, FluxPipeline
from tiny_flux import CLIP, save_tiny_flux, tiny_networks
from torch import nn

from data.scenes import Scene, caption, edit_vocabulary, numbered_edit, render, vocabulary
from solver.samplers.calls import text_length
from zoo import cards, measure, train_mini_flux, training
from zoo.mini_flux import (
    LARGE,
    SMALL,
    WORDS,
    build_networks,
    build_scheduler,
    build_t5_tokenizer,
    noise_levels,
    open_networks,
    tokens_of,
)
from zoo.phrases import VALUES, Phrases
from zoo.train_mini_flux import Kind, MiniFluxRun, draw_batch, encode, flow_loss, kind_of, make_pool, pool_batches
from zoo.train_mini_flux_vae import VaeRun, batch_pictures, build_vae
from zoo.training import is_block_layer

RUN = {"pool": 12, "large_pool": 6, "edit_pool": 8, "captions_per_scene": 2, "batch_size": 16, "width": 32}


@pytest.fixture(scope="module")
def networks():
    return tiny_networks()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_flux(tmp_path_factory.mktemp("tiny") / "flux")


@pytest.fixture
def pool(tmp_path, monkeypatch, networks):
    monkeypatch.setattr(train_mini_flux, "RUNS", tmp_path)
    _, vae, tokenizers = networks
    return make_pool(MiniFluxRun(**RUN), vae, tokenizers)


# -- the pipelines ----------------------------------------------------------------------------------------------------


def load(pipeline_class, folder):
    pipe = pipeline_class.from_pretrained(folder)  # no dtype: as a newcomer does
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("edits", [False, True], ids=["text", "edit"])
def test_training_evaluates_the_transformer_as_the_pipelines_do(folder, size, edits):
    """The first velocity of a run, and that of the training's forward for the same noise, prompt and source."""
    pipe = load(FluxKontextPipeline if edits else FluxPipeline, folder)
    denoiser, tokenizers = open_networks(folder), tiny_networks()[2]
    noise = torch.randn(2, 8, size // 4, size // 4, generator=torch.Generator().manual_seed(0))
    prompts = ["make the red ball blue", "a striped orange cone on a lawn"]
    call = {"prompt": prompts, "height": size, "width": size, "num_inference_steps": 1, **text_length(pipe)}
    source = None
    if edits:
        source = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        call |= {"image": source, "max_area": size**2, "_auto_resize": False}
        source = (pipe.vae.encode(2 * source - 1).latent_dist.mode() - 0.1) * 1.5
    answers = []
    pipe.transformer.register_forward_hook(lambda module, args, output: answers.append(output[0]))
    pipe(**call, latents=pipe._pack_latents(noise, *noise.shape), output_type="latent")
    with torch.no_grad():
        velocity, classes, said = denoiser(noise, torch.ones(2), tokenizers(prompts), source)
    tokens = tokens_of(size)
    expected = pipe._unpack_latents(answers[0][:, :tokens], size, size, pipe.vae_scale_factor)
    assert text_length(pipe) == {"max_sequence_length": WORDS}
    assert velocity.std() > 0.01 and classes.shape == (2, tokens, 49) and said.shape == (2, WORDS, sum(VALUES))
    torch.testing.assert_close(velocity, expected, rtol=1e-3, atol=1e-4)


def test_the_grid_of_a_run_is_shifted_as_the_training_is(folder):
    """The median of the logit-normal, σ = 1/2 before the shift, is where the pipelines' middle step stands."""
    pipe = load(FluxPipeline, folder)
    for size in (SMALL, LARGE):
        pipe("a red ball", height=size, width=size, num_inference_steps=2, max_sequence_length=8, output_type="latent")
        sigmas = noise_levels(4001, tokens_of(size), build_scheduler(), torch.Generator().manual_seed(0))
        assert sigmas.median().item() == pytest.approx(pipe.scheduler.sigmas[1].item(), abs=0.01)
        assert sigmas.min() > 0 and sigmas.max() < 1
        noisier = noise_levels(4001, tokens_of(size), build_scheduler(), torch.Generator().manual_seed(0), further=3)
        torch.testing.assert_close(noisier.logit(), sigmas.logit() + math.log(3), rtol=0, atol=1e-3)


def test_the_four_step_grid_at_full_size_is_that_of_flux():
    """FLUX at 1024 px: 1, .9045, .7595, .5128, 0."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.15)
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.9045, 0.7595, 0.5128, 0], abs=1e-4)


def test_t5_knows_every_word_and_spells_others():
    tokenizer = build_t5_tokenizer()
    for word in (*vocabulary(), *edit_vocabulary()):
        assert tokenizer.tokenize(word) == [f"▁{word}"]
    assert tokenizer.tokenize("a zebra,") == ["▁a", "▁", "z", "e", "b", "r", "a", ","]
    texts = [caption(Scene.random(i), random.Random(i)).text for i in range(60)]
    texts += [numbered_edit(i)[0] for i in range(60)]
    assert all(tokenizer.unk_token_id not in ids and len(ids) <= WORDS for ids in tokenizer(texts).input_ids)


# -- training ---------------------------------------------------------------------------------------------------------


def test_the_pool_holds_what_its_scenes_are(pool, networks):
    _, vae, tokenizers = networks
    instruction, scene, edited = numbered_edit(5)
    for shown, prefix in ((scene, ""), (edited, "edited_")):
        for size in (SMALL, LARGE):
            latents, classes = encode(vae, [shown], size)
            torch.testing.assert_close(pool[f"{prefix}latents_{size}"][5], latents[0], rtol=0, atol=2e-2)
            assert torch.equal(pool[f"{prefix}classes_{size}"][5], classes[0])
    rows = render(scene, SMALL).segmentation[4::8, 4::8].flatten()
    assert torch.equal(pool["classes_64"][5].long(), rows)
    assert torch.equal(pool["instructions_t5"][5].long(), tokenizers([instruction]).t5[0])
    assert len(pool["latents_64"]) == 12 and len(pool["latents_128"]) == 6 and len(pool["edited_latents_128"]) == 6


def test_batches_depend_on_their_number_and_drop_some_prompts(pool, networks):
    tokenizers = networks[2]
    run = MiniFluxRun(
        **RUN, steps=6, caption_dropout=0.5, large_from=0.0, edit_from=0.0, large_share=0.5, edit_share=0.5
    )
    whole = list(pool_batches(pool, run, tokenizers, 0, torch.device("cpu")))
    resumed = list(pool_batches(pool, run, tokenizers, 4, torch.device("cpu")))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(whole[4:], resumed, strict=True))
    empty = tokenizers([""])
    batch = draw_batch(pool, run, Kind(SMALL, edits=True), empty, torch.Generator().manual_seed(0))
    dropped = (batch.words.t5 == empty.t5).all(1)
    assert 0 < dropped.sum() < len(dropped) == 8  # an edit costs twice as many tokens
    assert torch.equal(dropped, (batch.words.clip == empty.clip).all(1))


def test_the_schedule_begins_small_and_ends_with_all_four_kinds():
    run = MiniFluxRun(steps=1000, large_from=0.5, edit_from=0.3)
    kinds = [kind_of(step, run) for step in range(1000)]
    assert set(kinds[:300]) == {Kind(SMALL, False)}
    assert set(kinds[300:500]) == {Kind(SMALL, False), Kind(SMALL, True)}
    assert set(kinds[500:]) == {Kind(size, edits) for size in (SMALL, LARGE) for edits in (False, True)}
    assert [kind.cost for kind in (Kind(SMALL, False), Kind(SMALL, True), Kind(LARGE, False), Kind(LARGE, True))] == [
        1, 2, 4, 8,
    ]  # fmt: skip


def test_an_untrained_network_says_zero_and_learns(pool, networks):
    """At zero output the error is E|ε - x_0|² = 1 + E|x_0|²."""
    tokenizers = networks[2]
    run = MiniFluxRun(**RUN, steps=24, caption_dropout=0.0, large_share=0.0, edit_share=0.0)
    phrases = Phrases(tokenizers.t5)
    torch.manual_seed(0)
    denoiser = build_networks(CLIP, tokenizers, 32, 1, 1)
    optimizer = torch.optim.Adam(denoiser.parameters(), 3e-3)
    losses = []
    for step, batch in enumerate(pool_batches(pool, run, tokenizers, 0, torch.device("cpu"))):
        terms = flow_loss(denoiser, batch, run, step, build_scheduler(), phrases)
        if step == 0:
            expected = 1 + batch.latents.square().mean()
            assert terms["mse"].item() == pytest.approx(expected.item(), rel=0.05)
            assert terms["classes"].item() == pytest.approx(math.log(49), rel=0.3)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_every_network_is_trained(pool, networks):
    denoiser, _, tokenizers = networks
    run = MiniFluxRun(**RUN)
    batch = draw_batch(pool, run, Kind(SMALL, True), tokenizers([""]), torch.Generator().manual_seed(0))
    terms = flow_loss(denoiser, batch, run, 0, build_scheduler(), Phrases(tokenizers.t5))
    assert terms["mse, 64 px, edits"] is terms["mse"]
    terms["loss"].backward()
    for part in (denoiser.transformer, denoiser.text_encoder, denoiser.text_encoder_2):
        with_gradient = [p for p in part.parameters() if p.grad is not None and p.grad.abs().max() > 0]
        assert len(with_gradient) > 0.8 * len(list(part.parameters()))


def test_muon_gets_the_layers_of_the_blocks(networks):
    adamw, muon = training.make_optimizers(networks[0], training.Run("x", muon=True))
    names = {id(p): name for name, p in networks[0].named_parameters()}
    chosen = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert "transformer.single_transformer_blocks.0.attn.to_q.weight" in chosen
    assert "text_encoder_2.encoder.block.1.layer.0.SelfAttention.k.weight" in chosen
    rest, positions = ({names[id(p)] for p in group["params"]} for group in adamw.param_groups)
    assert {"transformer.x_embedder.weight", "classify.weight"} <= rest
    assert {name.split(".")[-2] for name in positions} == {"relative_attention_bias"} and not rest & positions
    rest |= positions
    assert not chosen & rest and chosen | rest == set(names.values())
    assert not any("norm" in name or "embed" in name for name in chosen)
    assert not is_block_layer("blocks.0.attn.to_q.bias", nn.Parameter(torch.zeros(3)))


# -- the autoencoder --------------------------------------------------------------------------------------------------


def test_the_autoencoder_works_at_both_sizes():
    vae = build_vae(AutoencoderKL.from_pretrained(training.ZOO / "mini-sd" / "vae"))
    for size in (SMALL, LARGE):
        latents = vae.encode(torch.zeros(1, 3, size, size)).latent_dist.mode()
        assert latents.shape == (1, 8, size // 4, size // 4)
        assert vae.decode(latents).sample.shape == (1, 3, size, size)


def test_the_autoencoder_begins_as_the_smaller_one():
    """But for the border, where the folded bias of a 1 x 1 convolution is missing in the padding."""
    smaller = AutoencoderKL.from_pretrained(training.ZOO / "mini-sd" / "vae", dtype=torch.float32).eval()
    vae = build_vae(smaller).eval()
    x_BCHW = training.pictures([Scene.random(10**6)], SMALL, torch.device("cpu"))
    with torch.no_grad():
        ours, theirs = (v.encode(x_BCHW).latent_dist.mode() for v in (vae, smaller))
        torch.testing.assert_close(ours[:, :4], theirs, atol=1e-4, rtol=1e-4)
        assert ours[:, 4:].std() > 0.1
        difference = (vae.decode(ours).sample - smaller.decode(theirs).sample)[..., 16:-16, 16:-16]
    assert difference.square().mean().sqrt() < 0.01


def test_every_third_batch_of_the_autoencoder_is_large():
    run, scenes = VaeRun(large_every=3), [Scene.random(i) for i in range(8)]
    shapes = [tuple(batch_pictures(run, step, scenes, torch.device("cpu")).shape) for step in range(3)]
    assert shapes == [(8, 3, 64, 64), (8, 3, 64, 64), (2, 3, 128, 128)]


# -- measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["mini-sd nothing", "mini-sd --captions 0"])
def test_what_cannot_be_measured_leaves_the_numbers_alone(words, monkeypatch):
    monkeypatch.setattr(measure, "MEASURES", dict.fromkeys(measure.MEASURES))
    monkeypatch.setattr("sys.argv", ["measure.py", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        measure.main()
    assert stopped.value.code == 2


def test_the_measure_runs_and_the_card_says_it(tmp_path, monkeypatch):
    """A whole zoo of one untrained model, with two steps."""
    for name in ("segmentation", "mini-flux"):
        (tmp_path / name).mkdir()
    for path in (measure.ZOO / "segmentation").iterdir():
        (tmp_path / "segmentation" / path.name).write_bytes(path.read_bytes())
    save_tiny_flux(tmp_path / "mini-flux")
    monkeypatch.setattr(measure, "ZOO", tmp_path)
    monkeypatch.setattr(measure, "FLUX_STEPS", 2)
    metrics = measure.measure_mini_flux(4, unrelated=2)
    assert {"vae_psnr_64", "vae_psnr_128", "check_64", "check_128", "same_scene", "edits"} <= metrics.keys()
    assert metrics["edits"]["success"] <= min(metrics["edits"]["done"], metrics["edits"]["untouched"])
    assert metrics["reach"].keys() == {"check_64", "check_128", "edits"}
    log = [{"step": 1, "seconds": 60, "loss": 1.0}, {"step": 2, "seconds": 120, "loss": 0.5}]
    training.write_log(tmp_path / "mini-flux", training.Run("mini-flux"), log, parameters="tiny")
    (tmp_path / "mini-flux" / "metrics.json").write_text(json.dumps(metrics))
    monkeypatch.setattr(cards, "ZOO", tmp_path)
    cards.write_card("mini-flux")
    text = (tmp_path / "mini-flux" / "README.md").read_text()
    assert f"| edits: success | {metrics['edits']['success']} |" in text
    assert all(f"![{file}]" in text and (tmp_path / "mini-flux" / file).exists() for file in cards.SHEETS)


def test_same_scene_counts_solids_only():
    labels, others = torch.zeros(2, 2, 2, dtype=torch.long), torch.zeros(2, 2, 2, dtype=torch.long)
    labels[:, 0] = 5
    others[:, 0] = torch.tensor([5, 7])
    others[1, 1, 1] = 3
    assert measure.same_scene(labels, others).tolist() == pytest.approx([1 / 2, 1 / 3])


def test_pooled_noise_is_noise():
    noise = torch.randn(4, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    assert measure.pooled(noise).std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(measure.pooled(noise)[0, 0, 0, 0], noise[0, 0, :2, :2].sum() / 2)
