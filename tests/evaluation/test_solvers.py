"""Classical solvers on their grids, and how runs are counted and kept apart."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline
from tiny_pipelines import run, tiny_pipeline

from evaluation.rendering import Cost, Sampler
from evaluation.solvers import CLASSICAL, FLOW_RULES, SPACINGS, RuleScheduler, by_class_name, classical, learned
from solver import ConsistencySolverScheduler
from solver.prompt_embeddings import PromptEmbeddings

PROMPTS = ["a red ring", "two blue cubes on sand", "a small white star"]
SEEDS = [3, 4, 5]


@pytest.fixture(scope="module")
def sampler(models):
    pipe = StableDiffusionPipeline.from_pretrained(models / "sd")
    pipe.set_progress_bar_config(disable=True)
    return Sampler(pipe)


def pictures(sampler, scheduler, steps=4, guidance_scale=3.0, cost=None):
    return torch.cat(list(sampler.render(scheduler, PROMPTS, SEEDS, steps, guidance_scale, cost)))


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


def test_ddim_never_clips_and_steps_to_the_next_grid_point(sampler):
    own = sampler.pipe.scheduler
    grids = classical("ddim", own)
    for spacing in SPACINGS:
        scheduler = grids[spacing](own, 4, 3.0)
        if isinstance(scheduler, DDIMScheduler):
            assert not scheduler.config.clip_sample
        # The rule w = (1), on the grid of whichever class it is.
        exact = ConsistencySolverScheduler.from_scheduler(scheduler, order=1, base_rule="ddim", learn_grid=False)
        torch.testing.assert_close(
            pictures(sampler, grids[spacing](own, 4, 3.0)), pictures(sampler, exact), rtol=0, atol=2e-3
        )


@pytest.mark.parametrize("spacing", SPACINGS)
def test_rules_equal_diffusers_on_the_same_grid(sampler, spacing):
    stock = DPMSolverMultistepScheduler.from_config(
        sampler.pipe.scheduler.config,
        algorithm_type="dpmsolver",
        final_sigmas_type="sigma_min",
        timestep_spacing=spacing,
        lower_order_final=False,
    )
    rule = RuleScheduler.of("dpm2m", 2, stock, steps=4)
    torch.testing.assert_close(pictures(sampler, rule), pictures(sampler, stock), rtol=0, atol=1e-4)


def test_rules_that_reach_back_to_the_start_keep_their_whole_history(sampler):
    stock = DPMSolverMultistepScheduler.from_config(
        sampler.pipe.scheduler.config, final_sigmas_type="sigma_min", lower_order_final=False
    )
    rule = RuleScheduler.of("dpmpp2m", 2, stock_epsilon(stock), steps=6)
    torch.testing.assert_close(pictures(sampler, rule, 6), pictures(sampler, stock, 6), rtol=0, atol=1e-4)


def stock_epsilon(scheduler):
    return DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="dpmsolver")


@pytest.mark.parametrize("name", FLOW_RULES)
def test_flow_models_have_their_own_grid(name):
    pipe, call = tiny_pipeline("flux")
    (grid,) = classical(name, pipe.scheduler)
    expected = run(pipe, call, num_inference_steps=4)
    pipe.scheduler = classical(name, pipe.scheduler)[grid](pipe.scheduler, 4, 2.5)
    latents = run(pipe, call, num_inference_steps=4)
    assert torch.equal(latents, expected) == (name == "ddim")  # on a flow model it is Euler
    assert latents.isfinite().all()


def test_packed_families_render_too():
    pipe, call = tiny_pipeline("flux")
    prompts = {"prompt_embeds": call["prompt_embeds"], "pooled_prompt_embeds": call["pooled_prompt_embeds"]}
    sampler = Sampler(pipe, height=32, width=32)
    sampler.embeddings = PromptEmbeddings(pipe, encode=lambda prompt: prompts)
    cost = Cost()
    stock = pictures(sampler, pipe.scheduler, cost=cost)
    assert stock.shape == (3, 3, 32, 32) and cost.summary()["nfe"] == 4
    assert torch.equal(stock, pictures(sampler, classical("ddim", pipe.scheduler)["own"](pipe.scheduler, 4, 3.0)))


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
    expected = pipe(PROMPTS, latents=noise, **call).images
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
