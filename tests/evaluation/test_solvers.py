"""Classical solvers on their grids, and how runs are counted and kept apart."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from tiny_pipelines import run, tiny_pipeline

from evaluation.rendering import Cost, Sampler, Samples
from evaluation.solvers import (
    CLASSICAL,
    FLOW_SOLVERS,
    FlowHeunScheduler,
    by_class_name,
    classical,
    describe,
    learned,
)
from solver import ConsistencySolverScheduler
from solver.prompt_embeddings import PromptEmbeddings

PROMPTS = ("a red ring", "two blue cubes on sand", "a small white star")
SEEDS = (3, 4, 5)


@pytest.fixture(scope="module")
def sampler(models):
    pipe = StableDiffusionPipeline.from_pretrained(models / "sd")
    pipe.set_progress_bar_config(disable=True)
    return Sampler(pipe)


def pictures(sampler, scheduler, steps=4, guidance_scale=3.0, cost=None):
    return torch.cat(list(sampler.render(scheduler, Samples(PROMPTS, SEEDS, 3.0), steps, guidance_scale, cost)))


@pytest.mark.parametrize("name", CLASSICAL)
def test_a_step_is_an_evaluation_on_every_grid(sampler, name):
    own = sampler.pipe.scheduler
    for grid, make in classical(name, own).items():
        cost = Cost()
        images = pictures(sampler, make(own, 4, 3.0), cost=cost)
        assert cost.summary()["nfe"] == 4, grid
        assert images.isfinite().all() and images.std() > 0
    assert sampler.pipe.scheduler is own


def test_evaluations_are_counted_not_assumed(sampler):
    """PNDM calls the network once more than it has steps."""
    own, cost = sampler.pipe.scheduler, Cost()
    (make,) = by_class_name("PNDMScheduler", {"skip_prk_steps": True}).values()
    scheduler = make(own, 4, 3.0)
    assert isinstance(scheduler, PNDMScheduler)
    pictures(sampler, scheduler, cost=cost)
    assert cost.summary()["nfe"] == 5
    assert 0 < cost.summary()["solver_share"] < 1


# The DDIM trap: clip_sample is on by default, and clips latents as if they were pictures.
END = {"final_sigmas_type": "sigma_min"}
STOCK = {
    "ddim": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "solver_order": 1, **END}),
    "deis": (DEISMultistepScheduler, {}),
    "dpm2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", **END}),
    "dpmpp2m": (DPMSolverMultistepScheduler, END),
    "unipc": (UniPCMultistepScheduler, END),
}


@pytest.mark.parametrize("name", STOCK)
def test_rules_equal_diffusers_on_the_same_grid(sampler, name):
    own, (stock_class, settings) = sampler.pipe.scheduler, STOCK[name]
    for spacing, make in classical(name, own).items():
        stock = stock_class.from_config(own.config, **settings, timestep_spacing=spacing)
        mine = pictures(sampler, make(own, 6, 3.0), 6)
        torch.testing.assert_close(mine, pictures(sampler, stock, 6), rtol=0, atol=5e-4, msg=f"{name}, {spacing}")


def test_ddim_is_the_stock_scheduler_on_its_trailing_grid(sampler):
    own = sampler.pipe.scheduler
    settings = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing"}
    stock = DDIMScheduler.from_config(own.config, **settings)
    mine = pictures(sampler, classical("ddim", own)["trailing"](own, 5, 3.0), 5)
    torch.testing.assert_close(mine, pictures(sampler, stock, 5), rtol=0, atol=5e-4)


@pytest.mark.parametrize("name", FLOW_SOLVERS)
def test_flow_models_have_their_own_grid(name):
    pipe, call = tiny_pipeline("flux")
    own, expected = pipe.scheduler, run(pipe, call, num_inference_steps=4)
    for grid, make in classical(name, own).items():
        pipe.scheduler = make(own, 4, 2.5)
        latents = run(pipe, call, num_inference_steps=4)
        assert torch.equal(latents, expected) == (name in ("ddim", "euler") and grid == "own")
        assert latents.isfinite().all()


def test_dpmpp2m_on_a_flow_model_is_diffusers_own_in_flow_mode():
    """Through the pipeline, dynamic shifting included."""
    pipe, call = tiny_pipeline("flux")
    own = pipe.scheduler
    pipe.scheduler = classical("dpmpp2m", own)["flow_mode"](own, 5, 2.5)
    mine = run(pipe, call, num_inference_steps=5)
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(own.config, **settings)
    torch.testing.assert_close(mine, run(pipe, call, num_inference_steps=5), rtol=1e-3, atol=1e-4)
    assert pipe.scheduler.sigmas[0] < 1


def test_heun_on_a_flow_model_has_second_order_and_asks_at_the_right_times():
    """dx/dσ = -2x + 3σ from 1 to 0; diffusers counts Heun's evaluations alike: 2N - 1 for N steps."""
    errors = []
    for steps in (33, 65):
        scheduler = FlowHeunScheduler()
        scheduler.set_timesteps(steps, sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
        x = torch.ones(1).double()
        for t in scheduler.timesteps:
            x = scheduler.step((-2 * x + 3 * t / 1000).double(), t, x)[0]
        assert len(scheduler.timesteps) == steps
        errors.append(abs(float(x) - 0.25 * math.exp(2) + 0.75))
    assert 3 < errors[0] / errors[1] < 5


def flux_sampler(**options):
    pipe, call = tiny_pipeline("flux")
    prompts = {"prompt_embeds": call["prompt_embeds"], "pooled_prompt_embeds": call["pooled_prompt_embeds"]}
    sampler = Sampler(pipe, height=32, width=32, **options)
    sampler.embeddings = PromptEmbeddings(pipe, encode=lambda prompt: prompts)
    return sampler


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_what_solvers_have_in_common_is_evaluated_once(family, sampler):
    """They all begin with one DDIM step, so that the second evaluation on a grid is shared too; nothing changes."""
    flow = family == "flux"
    alone, together = (flux_sampler(share=s) if flow else Sampler(sampler.pipe, share=s) for s in (False, True))
    own = together.pipe.scheduler
    names = ("ddim", "dpm2m", "unipc") + ("deis", "dpmpp2m", "ab2", "ipndm", "dpm2s") * (not flow)
    for i, name in enumerate(names):
        make = classical(name, own)["own" if flow else "trailing"]
        before, costs = together.evaluations, (Cost(), Cost())
        one, other = (pictures(s, make(own, 4, 3.0), cost=c) for s, c in zip((alone, together), costs, strict=True))
        assert torch.equal(one, other)
        assert together.evaluations - before == len(PROMPTS) * (2 if i else 4)
        assert [cost.summary()["nfe"] for cost in costs] == [4, 4]
    assert alone.evaluations == len(names) * 4 * len(PROMPTS)
    together.shared.forget(first=1)
    make = classical(names[0], own)["own" if flow else "trailing"]
    before = together.evaluations
    pictures(together, make(own, 4, 3.0))
    assert together.evaluations - before == 3 * len(PROMPTS)


def test_other_prompts_noise_or_guidance_share_nothing(sampler):
    mine = Sampler(sampler.pipe)
    make = classical("ddim", sampler.pipe.scheduler)["trailing"]
    runs = [(PROMPTS, SEEDS, 3.0), (PROMPTS[::-1], SEEDS, 3.0), (PROMPTS, SEEDS[::-1], 3.0), (PROMPTS, SEEDS, 5.0)]
    for prompts, seeds, guidance in runs:
        samples = Samples(prompts, seeds, guidance)
        list(mine.render(make(sampler.pipe.scheduler, 2, guidance), samples, 2, guidance))
    assert mine.evaluations == len(runs) * 2 * len(PROMPTS)


def test_equal_tables_are_one_solver(models, sampler):
    """The base rule of an untrained solver, and the classical rule of that name on its grid."""
    own = sampler.pipe.scheduler
    base = learned(str(models / "solver"), own, untrained=True)["own"](own, 5, 3.0)
    rules = {grid: make(own, 5, 3.0) for grid, make in classical("dpm2m", own).items()}
    assert describe(base, 5) == describe(rules["trailing"], 5) != describe(rules["linspace"], 5)
    assert describe(base, 5) != describe(learned(str(models / "solver"), own)["own"](own, 5, 3.0), 5)


def test_packed_families_render_too():
    sampler, cost = flux_sampler(), Cost()
    own = sampler.pipe.scheduler
    stock = pictures(sampler, own, cost=cost)
    assert stock.shape == (3, 3, 32, 32) and cost.summary()["nfe"] == 4
    assert torch.equal(stock, pictures(sampler, classical("ddim", own)["own"](own, 4, 3.0)))


def test_pictures_do_not_depend_on_the_batch(sampler):
    own = sampler.pipe.scheduler
    one = Sampler(sampler.pipe, batch_size=1)
    make = classical("unipc", own)["trailing"]
    torch.testing.assert_close(
        pictures(one, make(own, 3, 3.0)), pictures(sampler, make(own, 3, 3.0)), rtol=0, atol=1e-4
    )


def test_pictures_are_those_of_the_stock_call(sampler):
    pipe = sampler.pipe
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    expected = pipe(list(PROMPTS), latents=noise, **call).images
    torch.testing.assert_close(pictures(sampler, pipe.scheduler, 3), expected, rtol=0, atol=1e-5)


def test_autocast_keeps_the_pictures_close(sampler):
    coarse = Sampler(sampler.pipe, autocast=True)
    difference = pictures(coarse, sampler.pipe.scheduler) - pictures(sampler, sampler.pipe.scheduler)
    assert 0 < difference.abs().mean() < 0.02


def test_learned_is_told_the_guidance_scale(models, sampler):
    own = sampler.pipe.scheduler
    make = learned(str(models / "solver"), own)["own"]
    assert make(own, 4, 7.5).guidance_scale == 7.5
    untrained = learned(str(models / "solver"), own, untrained=True)["own"](own, 4, 3.0)
    base = learned(str(models / "untrained"), own)["own"](own, 4, 3.0)
    assert torch.equal(pictures(sampler, untrained), pictures(sampler, base))


def test_unknown_names(sampler):
    own = sampler.pipe.scheduler
    with pytest.raises(ValueError, match="'heun': expected one of ddim"):
        classical("heun", own)
    with pytest.raises(ValueError, match="'AutoencoderKL' is not a scheduler class"):
        by_class_name("AutoencoderKL", {})
    with pytest.raises(ValueError, match="The noise schedules differ"):
        learned_flow = DDIMScheduler(beta_schedule="linear")
        ConsistencySolverScheduler.from_scheduler(own).check_compatible(learned_flow)


def test_a_description_is_the_same_in_every_process():
    """diffusers notes which values are defaults in an order that depends on the process."""
    assert not [name for name in describe(DDIMScheduler(), 5)["config"] if name.startswith("_")]
