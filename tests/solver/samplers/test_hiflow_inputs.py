"""What HiFlow refuses, and says of it."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    TCDScheduler,
)
from hiflow_cases import CODE, K, N, prepared
from PIL import Image
from tiny_pipelines import tiny_pipeline
from torch import nn

from solver.samplers.calls import is_distilled_to_few_steps
from solver.samplers.hiflow import hiflow, memory, with_steps
from solver.samplers.hiflow.continuing import _fingerprint
from solver.samplers.hiflow.inputs import given_image
from solver.samplers.hiflow.memory import check_memory, decoder_bytes
from solver.samplers.hiflow.plan import plan_stages


def test_bad_input_is_refused_before_anything_runs():
    pipe, call = prepared("sd")
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network was evaluated"))
    image = torch.rand(3, 32, 32)
    cases = [
        ("2 seeds", {"seed": [1, 2]}),
        ("3 prompts, but 1 seeds", {"prompt": ["a", "b", "c"]}),
        ("neither a prompt nor", {"call": {}}),
        ("latents: hiflow says these itself", {"call": {**call, "latents": torch.zeros(1)}}),
        ("eta=0.5: .* deterministic", {"call": {**call, "eta": 0.5}}),
        ("true_cfg_scale, which StableDiffusionPipeline does not take", {"call": {**call, "true_cfg_scale": 2}}),
        ("multiples of 8", {"sizes": (32, 60)}),  # the stock pipeline's, though a latent has two pixels
        ("sizes begin with 48 x 48", {"sizes": (48, 64), "image": image}),
        ("expected .3, H, W.", {"image": torch.rand(1, 32, 32)}),
        ("values from", {"image": image * 255}),
        ("image is a ndarray", {"image": image.numpy()}),
        ("takes no image", {"image": image, "alignment": "none"}),
        ("give its own size and a larger one", {"image": image, "sizes": (32,)}),
        ("preset='codes'", {"preset": "codes"}),
        ("smaller is a str: expected what an earlier hiflow", {"smaller": "x"}),
        (
            r"needs about .* GiB on cpu.*helps: smaller sizes, half precision; ignore",
            {"sizes": (32, 2**16)},
        ),
    ]
    for message, changes in cases:
        given = {"prompt": None, "seed": 1, "sizes": (32, 64), "preset": CODE, "call": call, **changes}
        with pytest.raises(ValueError, match=message):
            hiflow(pipe, **given)


def test_memory_counts_the_text_and_what_kontext_edits():
    pipe, call = prepared("flux-kontext")
    stages = plan_stages((32, 64), CODE, 4)
    check_memory(pipe, stages, 1, call)
    del call["image"]
    long = {**call, "prompt_embeds": torch.empty(1, 10**10, 16, device="meta")}
    large = {**call, "image": torch.empty(1, 4, 10**5, 10**5, device="meta")}
    for given in (long, large):
        with pytest.raises(ValueError, match="64 x 64 in a batch of 1 needs about"):
            check_memory(pipe, stages, 1, given)


def test_only_what_lowers_the_estimate_is_offered(monkeypatch):
    """The tiny decoder needs more than the tiny transformer; above 1536² it works in tiles whatever is said."""
    pipe, call = prepared("flux")
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 0)

    def offered(size, batch=1):
        with pytest.raises(ValueError, match="What helps") as refused:
            check_memory(pipe, plan_stages((32, size), CODE, 4), batch, call)
        return str(refused.value).partition("helps: ")[2].partition(";")[0].split(", ")

    always, tiles, slices = (
        ["smaller sizes", "half precision"],
        "pipe.vae.enable_tiling()",
        "pipe.vae.enable_slicing()",
    )
    pipe.vae.register_to_config(block_out_channels=(400, 800))  # the decoder's estimate, beyond the transformer's
    assert offered(1280) == ["smaller sizes", tiles, "half precision"]
    assert offered(1024) == offered(2048) == always
    assert offered(1280, batch=2) == ["fewer pictures at once", "smaller sizes", tiles, slices, "half precision"]
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    assert offered(1280) == always and offered(1280, batch=2) == always  # its one row is the hungriest
    pipe.vae.register_to_config(block_out_channels=(4, 8))
    assert offered(1280, batch=2) == ["fewer pictures at once", *always]


def test_offloaded_networks_count_one_at_a_time():
    """The text encoder too, which may be the largest of them, but not together with what the others compute."""
    pipe, call = prepared("flux")
    stages = plan_stages((32, 64), CODE, 4)
    setting = memory.Setting(1, False, False)
    staying, offloaded = (memory._stage_bytes(pipe, stages[1], setting._replace(offloaded=x), call) for x in (0, 1))
    weights = [memory._bytes(part) for part in (pipe.transformer, pipe.vae)]
    assert max(weights) < offloaded <= staying + max(weights)
    pipe.text_encoder = nn.Linear(10**5, 10**5, device="meta")
    assert memory._stage_bytes(pipe, stages[1], setting._replace(offloaded=True), call) == 4 * (10**10 + 10**5)


def test_a_given_picture_is_upright_and_on_white():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    upright = given_image(Image.fromarray(pixels), (32, 32), 1)
    file = BytesIO()
    turned = Image.fromarray(np.rot90(pixels).copy())  # as a camera that was held on its side has it
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    turned.save(file, "PNG", exif=exif)
    assert torch.equal(given_image(Image.open(file), (32, 32), 1), upright)
    alpha = Image.fromarray(np.full((32, 32), 128, dtype=np.uint8))
    seen = Image.fromarray(pixels)
    seen.putalpha(alpha)
    expected = 1 - (1 - upright) * 128 / 255
    torch.testing.assert_close(given_image(seen, (32, 32), 1), expected, rtol=0, atol=1.01 / 255)


def test_arrays_are_told_apart_by_all_their_values():
    """Of a large one, the repr has only the corners."""
    array = np.zeros((64, 64, 3), dtype=np.float32)
    other = array.copy()
    other[20:40, 20:40] = 1
    assert repr(array) == repr(other) and _fingerprint(array) == _fingerprint(array.copy()) != _fingerprint(other)
    assert _fingerprint([array]) != _fingerprint([other])


def test_families_that_cannot():
    with pytest.raises(ValueError, match="'fixed-noise' is for flow models, and this one predicts epsilon"):
        pipe, call = prepared("sd")
        hiflow(pipe, None, 1, (32, 64), replace(CODE, acceleration="fixed-noise"), call=call)
    with pytest.raises(ValueError, match="makes videos"):
        pipe, call = prepared("wan")
        hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    with pytest.raises(ValueError, match="positions for 384"):
        pipe, call = prepared("sd3")
        hiflow(pipe, None, 1, (32, 512), CODE, call=call)
    with pytest.raises(ValueError, match="positions for 384 pixels a side, so 208 x 32 cannot be doubled"):
        hiflow(pipe, None, 1, preset=CODE, image=torch.rand(3, 208, 32), call=call)


def test_pipelines_and_solvers_that_do_not_fit():
    pipe, call = prepared("sd")
    image_to_image = StableDiffusionImg2ImgPipeline(**pipe.components)
    with pytest.raises(ValueError, match="does not begin with noise that it is given; take the text-to-image"):
        hiflow(image_to_image, None, 1, (32, 64), CODE, call=call)
    pipe, call = prepared("sdxl")
    with pytest.raises(ValueError, match="call has denoising_end"):
        hiflow(pipe, None, 1, (32, 64), CODE, call={**call, "denoising_end": 0.5})
    pipe, call = prepared("flux")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    with pytest.raises(ValueError, match="draws noise at every step"):
        hiflow(pipe, None, 1, (32, 64), CODE, call=call)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (LCMScheduler, "LCMScheduler walks"),
        (TCDScheduler, "TCDScheduler walks"),
        *(
            (lambda name=name: DPMSolverMultistepScheduler(**{name: True}), f"with {name} walks")
            for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
        ),
    ],
)
def test_a_grid_that_ddim_does_not_have_is_not_swapped_for_another(scheduler, words):
    pipe, call = prepared("sd")
    own, pipe.scheduler = pipe.scheduler, scheduler()
    with pytest.raises(ValueError, match=f"{words} a grid of its own.*scheduler=DDIMScheduler.from_config"):
        hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    assert hiflow(pipe, None, 1, (32, 64), CODE, scheduler=own, call=call).images[-1].isfinite().all()


def test_a_switch_that_a_scheduler_only_remembers_does_not_count():
    pipe, call = prepared("sd")
    karras = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.scheduler = DDIMScheduler.from_config(karras.config)
    assert pipe.scheduler.config.use_karras_sigmas
    hiflow(pipe, None, 1, (32, 64), CODE, call=call)


def test_a_feature_cache_that_is_on_is_refused_before_the_first_step():
    pipe, call = prepared("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.9))
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the network was evaluated"))
    with pytest.raises(ValueError, match="feature cache is on from before"):
        hiflow(pipe, None, 1, (32, 64), CODE, call=call)


def test_a_preset_has_the_few_steps_that_a_model_is_distilled_to():
    pipe, call = prepared("flux")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert not is_distilled_to_few_steps(pipe)  # it is told its guidance: FLUX dev
    schnell = FluxTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=False)
    pipe.register_modules(transformer=schnell)
    assert is_distilled_to_few_steps(pipe)
    result = hiflow(pipe, None, 1, (32, 64), "code", call=call)
    assert [stage.steps for stage in result.stages] == [4, 2]
    assert [stage.steps for stage in hiflow(pipe, None, 1, (32, 64), CODE, call=call).stages] == [N, K]


def test_memory_of_a_small_decoder():
    """As many values a pixel as its first channels make: 32 of the miniature's against 128."""
    assert decoder_bytes(512, 512, 4, channels=32) == decoder_bytes(512, 512, 4) / 4
    pipe, call = prepared("flux")
    pipe.vae.register_to_config(block_out_channels=(4, 8))
    check_memory(pipe, plan_stages((32, 1024), CODE, 4), 20, call)  # 100 MB each, and not 2.5 GB


def test_a_smaller_result_that_is_no_beginning_is_refused():
    pipe, call = prepared("sd")
    small = hiflow(pipe, None, 1, (32,), CODE, call=call)
    given = {"prompt": None, "seed": 1, "sizes": (32, 64), "preset": CODE, "call": call, "smaller": small}
    other_prompt = {**call, "prompt_embeds": call["prompt_embeds"] + 1}
    elsewhere = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=0)
    cases = [
        ("32 x 32, and 48 x 48, 64 x 64 are to be rendered", {"sizes": (48, 64)}),
        ("another run: its steps differed", {"preset": with_steps(CODE, 7)}),
        ("the same guidance", {"guidance_scale": 5.0}),
        ("another run: its prompts and seeds differed", {"seed": 2}),
        ("another run: its prompts and seeds differed", {"call": other_prompt}),
        ("another run: its scheduler differed", {"scheduler": elsewhere}),
        ("another run: its pipeline differed", {"pipe": tiny_pipeline("sd", seed=1)[0]}),
        ("has to be the beginning", {"alignment": "none"}),
        ("has to be the beginning", {"sizes": (32,)}),
        ("another run: its prompts and seeds differed", {"seed": [1, 2], "call": prepared("sd", 2)[1]}),
        ("another run: its image differed", {"image": torch.rand(3, 32, 32)}),
    ]
    for message, changes in cases:
        with pytest.raises(ValueError, match=message):
            hiflow(**{"pipe": pipe, **given, **changes})
