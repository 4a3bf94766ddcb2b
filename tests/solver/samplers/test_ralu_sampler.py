"""RALU on tiny pipelines of every family it covers: identities, exact fields, combinations, and bad input."""

import inspect
from types import MethodType

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_taylorseer_cache
from peft import LoraConfig

from solver import ConsistencySolverScheduler
from solver.samplers.cascade import set_grid
from solver.samplers.cost import network_of, run_flops
from solver.samplers.latents import decode
from solver.samplers.prompts import encoded
from solver.samplers.ralu.edges import canny_scores, select
from solver.samplers.ralu.mixed_resolution import require_mixable
from solver.samplers.ralu.noise import siblings, white_noise
from solver.samplers.ralu.plan import stage_tokens
from solver.samplers.ralu.sampler import (
    PUBLISHED,
    Choices,
    _full_at_last,
    fine_cells,
    own_choices,
    own_preset,
    prepare,
    ralu,
)
from solver.samplers.ralu.schedule import PRESETS, Schedule, scheduler_shift, solve
from tests.flops import flop_counter
from tests.tiny_pipelines import SIZE, WORDS, tiny_pipeline

FAMILIES = ("flux", "flux-kontext", "sd3", "sd35", "qwen-image")
SHORT = Schedule((2, 2, 2), (0.3, 0.45, 1.0), 0.3, (5.0, 2.6, 2.2), 6.0)


def tiny(family, batch_size=1):
    """A pipeline, and what `ralu` takes as `call`."""
    pipe, call = tiny_pipeline(family, batch_size)
    said_otherwise = ("height", "width", "generator", "output_type", "max_area")
    return pipe, {name: value for name, value in call.items() if name not in said_otherwise}


def run(pipe, call, seed=7, schedule=SHORT, **changes):
    return ralu(pipe, None, seed, schedule, SIZE, SIZE, call=call, **changes)


def rows(call, keep):
    return {
        name: value[keep] if isinstance(value, torch.Tensor) and "prompt" in name else value
        for name, value in call.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds_and_batches(family):
    """The same seed gives the same picture, alone or in a batch; other seeds give others."""
    pipe, call = tiny(family, batch_size=2)
    both = run(pipe, call, seed=[3, 4])
    assert both.images_BCHW.shape == (2, 3, SIZE, SIZE) and both.latents_BCHW.isfinite().all()
    for i in range(2):
        alone = run(pipe, rows(call, slice(i, i + 1)), seed=3 + i)
        assert torch.equal(alone.fine_Bhw[0], both.fine_Bhw[i])
        assert (alone.latents_BCHW[0] - both.latents_BCHW[i]).abs().max() < 2e-5
    again = run(pipe, call, seed=[3, 4])
    assert torch.equal(again.latents_BCHW, both.latents_BCHW)
    other = run(pipe, call, seed=[3, 5])
    assert not torch.equal(other.latents_BCHW[1], both.latents_BCHW[1])
    assert (both.fine_Bhw.flatten(1).sum(1) == 4).all()  # floor(0.3 · 16)


def test_noise_between_stages_is_the_seeds_own():
    """The initial noise is the plain run's; what is injected comes after it from the same generator."""
    pipe, call = tiny("flux")
    prepared = prepare(pipe, None, 7, SIZE, SIZE, call)
    first, second = (white_noise(prepared.generators, prepared.shape) for _ in range(2))
    assert torch.equal(first[0], torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(first, second)


def test_random_cells_are_drawn_beside_the_noise():
    """Each picture's own, the same again, and the noise that comes later is that of a run with edges."""
    pipe, call = tiny("flux", batch_size=2)
    drawn = {}
    for edges in ("random", "canny"):
        prepared = prepare(pipe, None, [3, 4], SIZE, SIZE, call)
        small = white_noise(prepared.generators, prepared.shape)[..., ::2, ::2]
        cells = fine_cells(prepared, small, 0.3, Choices(edges=edges))
        drawn[edges] = cells, white_noise(prepared.generators, prepared.shape)
    assert torch.equal(drawn["random"][1], drawn["canny"][1])
    cells = drawn["random"][0]
    assert not torch.equal(cells[0], cells[1])
    alone = prepare(pipe, None, 4, SIZE, SIZE, rows(call, slice(1, 2)))
    assert torch.equal(fine_cells(alone, small[1:], 0.3, Choices(edges="random"))[0], cells[1])


def test_edges_are_those_of_the_predicted_picture():
    """The first stage's last velocity taken to the end, decoded: its Canny cells are the mask."""
    pipe, call = tiny("flux")
    prepared = prepare(pipe, None, 7, SIZE, SIZE, call)
    small = white_noise(prepared.generators, prepared.shape)[..., ::2, ::2]
    sigmas = SHORT.stage_sigmas()[0]
    x, x0 = prepared.stage(small, sigmas)
    before, _ = prepared.stage(small, sigmas[:-1])
    velocity = (x - before) / (sigmas[-1] - sigmas[-2])
    assert torch.allclose(x0, x - sigmas[-1] * velocity, atol=1e-4)
    assert torch.equal(run(pipe, call).fine_Bhw, select(canny_scores(decode(pipe, x0), "full", 4), 0.3))


def gaussian_field(mean: float, std: float):
    """FLUX's exact velocity for pictures whose 2 x 2 latents are equal, and N(mean, std²) otherwise independent.

    At half size those are independent latents. A token of the full picture is one block: its latents are the mean of
    one Gaussian. Which tokens are large says the fraction of their ids, 0.25 in the middle of a cell, or their number.
    """

    def forward(self, hidden_states, timestep, img_ids, **_):
        x_BNC4 = hidden_states.unflatten(-1, (-1, 4))
        sigma = timestep.view(-1, 1, 1, 1)
        small = img_ids[:, 1].frac() == 0.25 if img_ids[:, 1].frac().any() else torch.tensor([len(img_ids) == 256])
        block = x_BNC4.mean(-1, keepdim=True)  # of 4 equal latents the noise of the mean has a quarter of the variance
        seen, noise = (torch.where(small[:, None, None], *pair) for pair in ((x_BNC4, block), (1.0, 0.25)))
        gain = (1 - sigma) * std**2 / ((1 - sigma) ** 2 * std**2 + sigma**2 * noise)
        x0 = mean + gain * (seen - (1 - sigma) * mean)
        return (((x_BNC4 - x0) / sigma).flatten(2),)

    return forward


@pytest.mark.parametrize("Z", [2.0, 6.0])
def test_gaussian_field_keeps_its_moments(Z):
    """Exact velocities through all three stages end at the data's mean, variance and perfect correlation in blocks."""
    pipe, call = tiny("flux")
    pipe.transformer.forward = MethodType(gaussian_field(0.7, 0.5), pipe.transformer)
    schedule = Schedule((40, 40, 80), (0.3, 0.45, 1.0), 0.3, (3.0, 2.0, 2.0), Z)
    x = ralu(pipe, None, 1, schedule, 128, 128, call=call).latents_BCHW
    assert x.shape == (1, 4, 64, 64)
    assert x.mean().item() == pytest.approx(0.7, abs=0.015)
    blocks = siblings(x, "pixel")
    assert blocks.mean(-1).std().item() == pytest.approx(0.5, rel=0.03)
    assert blocks.std(-1).mean().item() < 0.01
    means = blocks.mean(-1)[0, :, :, :, 0].flatten(1) - 0.7  # one block a cell
    correlation = torch.corrcoef(torch.stack([means[0], means[1]]))[0, 1]
    assert abs(correlation) < 0.1
    field = blocks.mean(-1).unflatten(-1, (2, 2)).permute(0, 1, 2, 4, 3, 5).flatten(-2).flatten(-3, -2) - 0.7
    right, down = field[..., 1:] * field[..., :-1], field[..., 1:, :] * field[..., :-1, :]
    for products in (right, down, right[..., 1::2], down[..., 1::2, :]):  # all neighbours; those of different cells
        assert abs(products.mean().item()) < 0.1 * 0.5**2


def test_unscaled_noise_is_seen_in_the_field():
    """At c = 1/4 the public code's noise on untouched tokens makes the outcome too wide, where it was untouched."""
    spread = {}
    for scaled in (True, False):
        pipe, call = tiny("flux")
        pipe.transformer.forward = MethodType(gaussian_field(0.0, 0.5), pipe.transformer)
        schedule = Schedule((40, 40, 80), (0.3, 0.8, 1.0), 0.3, (3.0, 2.0, 2.0), 2.0)
        result = ralu(pipe, None, 1, schedule, 128, 128, call=call, choices=Choices(scaled_noise=scaled))
        spread[scaled] = siblings(result.latents_BCHW, "pixel").mean(-1).std().item()
    assert spread[True] == pytest.approx(0.5, rel=0.03)
    assert spread[False] > 1.05 * spread[True]


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_a_run_are_the_plans(family):
    """Counted in the transformer, all stages and branches, and the tokens that its blocks really see."""
    pipe, call = tiny(family)
    flops, seen = [], []
    forward = pipe.transformer.forward

    def counted(*args, **kwargs):
        with flop_counter() as counter:
            output = forward(*args, **kwargs)
        flops.append(counter.get_total_flops())
        return output

    pipe.transformer.forward = counted
    pipe.transformer.norm_out.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    run(pipe, call)
    tokens = stage_tokens(SHORT, 64)
    reference = 64 if family == "flux-kontext" else 0  # the picture to edit runs along
    branches = 2 if family in ("sd3", "sd35", "qwen-image") else 1
    calls = 2 if family == "qwen-image" else 1
    assert seen == [n + reference for n in tokens for _ in range(2 * calls)]
    assert tokens == (16, 28, 64)
    network = network_of(pipe.transformer, pixels=4, text_tokens=WORDS)
    planned = run_flops(network, [(n + reference, 2) for n in tokens], branches=branches)
    assert sum(flops) == pytest.approx(planned, rel=1e-9)


@pytest.mark.parametrize(
    "choices",
    [
        PUBLISHED,
        Choices(edges="sobel"),
        Choices(edges="random"),
        Choices(lift=True),
        Choices(units="full"),
        Choices(anchor="corner"),
        Choices(copy="token"),
        Choices(scaled_noise=False),
    ],
)
def test_choices_change_the_picture(choices):
    pipe, call = tiny("flux")
    ours, other = run(pipe, call), run(pipe, call, choices=choices)
    assert other.latents_BCHW.isfinite().all()
    assert not torch.equal(ours.latents_BCHW, other.latents_BCHW)


def test_schedules():
    """A preset as it is, or solved for a shift; one's own is solved for the shift that the scheduler really has."""
    pipe, call = tiny("flux")
    own = run(pipe, call, steps=(2, 2, 2), ends=(0.3, 0.45, 1.0)).schedule
    shift = scheduler_shift(pipe.scheduler, 64)
    assert own == solve((2, 2, 2), (0.3, 0.45, 1.0), 0.3, shift)
    assert run(pipe, call, schedule="turbo", shift="own", ratio=0.2).schedule.shift == shift
    assert run(pipe, call, schedule="turbo").schedule.Z == 2


def test_order_one_of_the_learned_solver_is_euler():
    """In every stage, on its own grid."""
    pipe, call = tiny("flux")
    solver = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=1)
    assert torch.equal(run(pipe, call).latents_BCHW, run(pipe, call, scheduler=solver).latents_BCHW)
    second = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=2)
    longer = Schedule((4, 4, 4), (0.3, 0.45, 1.0), 0.3, (5.0, 2.6, 2.2), 6.0)
    euler, other = (run(pipe, call, schedule=longer, scheduler=one).latents_BCHW for one in (solver, second))
    assert not torch.equal(euler, other)


def test_a_learned_solver_walks_each_stage_on_its_own_history():
    """Every step of its third order, its weights moved, is the one that it makes alone of the same model outputs."""
    pipe, call = tiny("flux")
    longer = Schedule((4, 4, 4), (0.3, 0.45, 1.0), 0.3, (5.0, 2.6, 2.2), 6.0)
    solver = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=3)
    with torch.no_grad():
        solver.policy.mlp[-1].bias.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    inputs, outputs = [], []

    def look(_, args, given, out):
        inputs.append(given["hidden_states"])
        outputs.append(out[0])

    hook = pipe.transformer.register_forward_hook(look, with_kwargs=True)
    learned = run(pipe, call, schedule=longer, scheduler=solver).latents_BCHW
    hook.remove()
    for stage, sigmas in enumerate(longer.stage_sigmas()):
        set_grid(solver, sigmas)
        for i in range(4 * stage, 4 * stage + 3):
            stepped = solver.step(outputs[i], solver.timesteps[i - 4 * stage], inputs[i], return_dict=False)[0]
            torch.testing.assert_close(stepped, inputs[i + 1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(learned, run(pipe, call, schedule=longer).latents_BCHW)


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
def test_taylorseer(family):
    """A cache that never forecasts changes nothing; one that does starts afresh in each stage, and is then off."""
    pipe, call = tiny(family)
    plain = run(pipe, call).latents_BCHW
    always = TaylorSeerCacheConfig(cache_interval=1, taylor_factors_dtype=torch.float32)
    assert torch.equal(run(pipe, call, cache=always).latents_BCHW, plain)
    computed = []
    pipe.transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: computed.append(step[0]))
    step = [-1]
    pipe.transformer.register_forward_pre_hook(lambda *_: step.__setitem__(0, step[0] + 1))
    long = Schedule((5, 4, 4), (0.3, 0.45, 1.0), 0.3, (5.0, 2.6, 2.2), 6.0)
    sparse = TaylorSeerCacheConfig(cache_interval=9, disable_cache_before_step=2, taylor_factors_dtype=torch.float32)
    cached = run(pipe, call, schedule=long, cache=sparse).latents_BCHW
    calls = 2 if family == "qwen-image" else 1
    steps = sorted({index // calls for index in computed})
    # Two steps to warm up, the step after the first forecast (diffusers counts so), and in the first stage its last.
    assert [index for index in steps if index < 5] == [0, 1, 3, 4]
    assert (
        [index - 5 for index in steps if 5 <= index < 9] == [index - 9 for index in steps if index >= 9] == [0, 1, 3]
    )
    assert not pipe.transformer.is_cache_enabled
    assert torch.equal(run(pipe, call).latents_BCHW, plain)
    assert cached.isfinite().all()
    pipe, call = tiny("sd3")
    with pytest.raises(ValueError, match="SD3Transformer2DModel takes no feature cache"):
        run(pipe, call, cache=always)


def test_last_step_of_the_first_stage_is_full():
    assert _full_at_last(TaylorSeerCacheConfig(), 5).disable_cache_after_step == 4
    assert _full_at_last(TaylorSeerCacheConfig(disable_cache_after_step=2), 5).disable_cache_after_step == 2
    assert _full_at_last(None, 5) is None


def test_lora():
    """A LoRA that does nothing changes nothing; one that does counts in all stages."""
    pipe, call = tiny("flux")
    plain = run(pipe, call).latents_BCHW
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=True))
    assert (run(pipe, call).latents_BCHW - plain).abs().max() < 1e-6
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    assert (run(pipe, call).latents_BCHW - plain).abs().max() > 1e-3


@pytest.mark.slow
def test_compiled_blocks():
    """Blocks compiled one by one, whole graphs, static lengths: the same picture."""
    pipe, call = tiny("flux")
    plain = run(pipe, call).latents_BCHW
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True, dynamic=False)
    assert (run(pipe, call).latents_BCHW - plain).abs().max() < 1e-5
    torch._dynamo.reset()


def test_true_cfg_of_flux():
    """Both branches see the same mask: equal prompts on both sides are no guidance."""
    pipe, call = tiny("flux")
    same = {f"negative_{name}": call[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    guided = run(pipe, {**call, **same, "true_cfg_scale": 3.0}).latents_BCHW
    assert (guided - run(pipe, call).latents_BCHW).abs().max() < 1e-5
    other = {name: -value for name, value in same.items()}
    assert (run(pipe, {**call, **other, "true_cfg_scale": 3.0}).latents_BCHW - guided).abs().max() > 1e-3


def test_other_shapes():
    """Wide pictures, and sides that are odd numbers of cells."""
    for family in FAMILIES:
        pipe, call = tiny(family)
        result = ralu(pipe, None, 7, SHORT, 24, 40, call=call)
        assert result.images_BCHW.shape == (1, 3, 24, 40) and result.fine_Bhw.shape == (1, 3, 5)


def test_embeddings_pass_through():
    """Of prompts, and of negative prompts beside prompts; a prompt beside its embeddings is left to the pipeline."""
    pipe, call = tiny("flux")
    assert encoded(pipe, call) == call
    pipe.encode_prompt = lambda prompts, prompt_2, **_: (call["prompt_embeds"], call["pooled_prompt_embeds"], None)
    negative = {f"negative_{name}": -call[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    half_encoded = encoded(pipe, {"prompt": ["a"], **negative})
    assert half_encoded["prompt_embeds"] is call["prompt_embeds"]
    assert all(half_encoded[name] is value for name, value in negative.items())
    twice = {"prompt": ["a"], **call}
    assert encoded(pipe, twice) is twice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 28}, "height=28, width=32: RALU needs positive multiples of 8"),
        ({"height": 0}, "height=0, width=32: RALU needs positive"),
        ({"width": -32}, "height=32, width=-32: RALU needs positive"),
        ({"shift": "auto"}, "shift='auto': expected a number"),
        ({"seed": [1, 2]}, "1 prompts and 2 seeds"),
        ({"preset": "6x"}, "preset='6x': expected one of 4x"),
        ({"preset": SHORT, "ratio": 1.0}, "ratio=1.0"),
        ({"preset": SHORT, "ratio": 0.01}, "16 cells is none"),
        ({"steps": (2, 2, 2)}, "needs both"),
        ({"steps": (2, 2, 2, 2), "ends": (0.1, 0.2, 0.3, 1.0)}, "three stages"),
    ],
)
def test_bad_input(change, message):
    pipe, call = tiny("flux")
    given = {"prompt": None, "seed": 7, "height": SIZE, "width": SIZE, "call": call, **change}
    with pytest.raises(ValueError, match=message):
        ralu(pipe, **given)


def test_bad_pipelines():
    for family, message in (("sd", "UNet2DConditionModel: it has no tokens"), ("wan", "WanTransformer3DModel")):
        pipe, call = tiny(family)
        with pytest.raises(ValueError, match=message):
            ralu(pipe, None, 7, call=call)
    pipe, call = tiny("flux")
    with pytest.raises(ValueError, match="call has latents, generator"):
        run(pipe, {**call, "latents": None, "generator": None})
    with pytest.raises(ValueError, match="0 prompts and 0 seeds"):
        ralu(pipe, [], [], SHORT, SIZE, SIZE)
    with pytest.raises(ValueError, match="compile_repeated_blocks"):
        require_mixable(torch.compile(pipe.transformer, backend="eager"))
    for name in ("edges", "luma", "copy", "anchor", "units"):
        with pytest.raises(ValueError, match=f"{name}='other': expected one of"):
            Choices(**{name: "other"})
    pipe.transformer.enable_cache(TaylorSeerCacheConfig())
    with pytest.raises(ValueError, match="cache is on from before"):
        run(pipe, call)


@pytest.mark.parametrize(
    ("family", "other"),
    [
        ("flux", FluxImg2ImgPipeline),
        ("flux", FluxFillPipeline),
        ("flux", FluxControlPipeline),
        ("sd3", StableDiffusion3Img2ImgPipeline),
        ("qwen-image", QwenImageInpaintPipeline),
    ],
)
def test_pipelines_that_begin_with_a_picture(family, other):
    """They would go on from pure noise, and leave the picture out."""
    pipe, call = tiny(family)
    known = inspect.signature(other.__init__).parameters
    other = other(**{name: part for name, part in pipe.components.items() if name in known})
    with pytest.raises(ValueError, match=f"{type(other).__name__}: RALU begins with noise and a prompt"):
        run(other, call)


def test_pipelines_of_ones_own():
    """What inherits a pipeline is one, unless it asks for more."""

    class Mine(FluxPipeline):
        pass

    class Edits(FluxPipeline):
        def __call__(self, *args, strength=0.6, **others):
            return super().__call__(*args, **others)

    pipe, call = tiny("flux")
    expected = run(pipe, call).latents_BCHW
    mine, edits = (one.from_pipe(pipe) for one in (Mine, Edits))
    mine.set_progress_bar_config(disable=True)
    assert torch.equal(run(mine, call).latents_BCHW, expected)
    with pytest.raises(ValueError, match="Edits: RALU begins with noise"):
        run(edits, call)


def test_guided_qwen_image_copies_whole_tokens():
    """Its guidance is scaled token by token; unguided, or of other families, latents are copied."""
    pipe, call = tiny("qwen-image")
    assert own_choices(pipe, call) == Choices(copy="token")
    assert torch.equal(run(pipe, call).latents_BCHW, run(pipe, call, choices=Choices(copy="token")).latents_BCHW)
    assert own_choices(pipe, {**call, "true_cfg_scale": 1.0}) == own_choices(pipe) == Choices()
    usual = {name: value for name, value in call.items() if name != "true_cfg_scale"}  # the pipeline's own is 4
    assert own_choices(pipe, usual) == own_choices(pipe, {"negative_prompt": [""]}) == Choices(copy="token")
    for family in ("flux", "sd3"):
        assert own_choices(*tiny(family)) == Choices()


def test_presets_of_families():
    """As `--explain` has them; schnell's grid is not shifted, and it is told no guidance."""
    pipes = {family: tiny(family)[0] for family in FAMILIES}
    found = {family: own_preset(pipe) for family, pipe in pipes.items()}
    assert found == {"flux": "4x", "flux-kontext": "4x", "sd3": "2x", "sd35": "2x", "qwen-image": "4x"}
    schnell, call = tiny("flux")
    schnell.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    config = {**schnell.transformer.config, "guidance_embeds": False}
    schnell.register_modules(transformer=FluxTransformer2DModel.from_config(config).eval())
    assert own_preset(schnell) == "turbo"
    assert run(schnell, call, schedule=None).schedule == PRESETS["turbo"]
    assert run(*tiny("sd3"), schedule=None).schedule == PRESETS["2x"]


def count_evaluations(pipe):
    evaluations = []
    pipe.transformer.register_forward_pre_hook(lambda *_: evaluations.append(1))
    return evaluations


def test_positions_that_are_missing_are_said_before_the_first_step():
    """A foreign table, one that ends too soon for the last stage, and Qwen-Image with two timesteps."""
    pipe, call = tiny("sd3")
    evaluations = count_evaluations(pipe)
    with pytest.raises(ValueError, match="A grid of 104 x 4 tokens: the position table ends at 96"):
        ralu(pipe, None, 7, SHORT, 416, 16, call=call)
    pipe.transformer.pos_embed.pos_embed = torch.rand_like(pipe.transformer.pos_embed.pos_embed)
    with pytest.raises(ValueError, match="position table of this SD3 checkpoint"):
        run(pipe, call)
    pipe.transformer.pos_embed.to("meta")  # as it is offloaded: looked at in the stage
    prepare(pipe, None, 7, SIZE, SIZE, call)
    assert not evaluations
    pipe, call = tiny("qwen-image")
    evaluations = count_evaluations(pipe)
    pipe.transformer.zero_cond_t = True
    with pytest.raises(ValueError, match="one timestep for all tokens"):
        run(pipe, call)
    assert not evaluations


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_that_fails_leaves_no_trace(family):
    """In the second stage, where the hooks are: the pipeline is as it was, and so is the next picture."""
    pipe, call = tiny(family)
    expected, own = run(pipe, call).latents_BCHW, pipe.scheduler
    attributes = {name: sorted(vars(module)) for name, module in pipe.transformer.named_modules()}
    calls = []

    def fail_in_the_second_stage(*_):
        calls.append(1)
        if len(calls) > len(SHORT.stage_sigmas()[0]):
            raise RuntimeError("out of memory")

    handle = pipe.transformer.register_forward_pre_hook(fail_in_the_second_stage)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(pipe, call)
    handle.remove()
    assert {name: sorted(vars(module)) for name, module in pipe.transformer.named_modules()} == attributes
    assert pipe.scheduler is own and torch.equal(run(pipe, call).latents_BCHW, expected)


def test_what_does_not_fit_is_said_before_the_work():
    pipe, call = tiny("flux")
    noisy = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    cases = [
        ("draws noise at every step", {"scheduler": noisy}),
        (r"choices='token': expected Choices", {"choices": "token"}),
        (f"height={SIZE}.0, width={SIZE}", {"height": float(SIZE)}),
        ("preset=4: expected one of", {"preset": 4}),
    ]
    for message, changes in cases:
        with pytest.raises(ValueError, match=message):
            ralu(**{"pipe": pipe, "prompt": None, "seed": 1, "height": SIZE, "width": SIZE, "call": call, **changes})
    pipe.scheduler = noisy
    with pytest.raises(ValueError, match="draws noise at every step"):
        ralu(pipe, None, 1, height=SIZE, width=SIZE, call=call)
    pipe, call = tiny("flux")
    apply_taylorseer_cache(pipe.transformer, TaylorSeerCacheConfig())  # by hand, so that the model does not know
    with pytest.raises(ValueError, match="cache is on from before"):
        ralu(pipe, None, 1, height=SIZE, width=SIZE, call=call)
