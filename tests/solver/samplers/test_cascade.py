"""Segments put together are the uninterrupted run, bit for bit, on every family and with every kind of solver."""

import copy

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from tiny_pipelines import FAMILIES, tiny_pipeline

from solver import ConsistencySolverScheduler
from solver.samplers.cascade import Segment, encoded_once, is_flow, run_segment, set_grid, sigma_grid
from solver.samplers.latents import latent_shape, pack, unpack

STEPS = 3
SIZE = 32
FLOW_FAMILIES = [name for name in FAMILIES if name not in ("sd", "sdxl")]


def prepared(family, batch_size=1):
    """A pipeline, its call without generators and layout, unpacked noise, and the latents of a stock run."""
    pipe, call = tiny_pipeline(family, batch_size)
    frames = call.get("num_frames")
    shape = latent_shape(pipe, SIZE, SIZE, frames)
    noise = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(7))
    call = {name: value for name, value in call.items() if name not in ("height", "width", "output_type", "generator")}
    return pipe, call, noise


def stock(pipe, call, noise, steps=STEPS):
    size = {"height": SIZE, "width": SIZE, "output_type": "latent"}
    answer = pipe(**call, **size, latents=pack(pipe, noise), num_inference_steps=steps, return_dict=False)[0]
    return unpack(pipe, answer, noise.shape[1:])


def pieces(*cuts, of=STEPS):
    return [Segment(None, SIZE, SIZE, steps=(a, b, of)) for a, b in zip((0, *cuts), (*cuts, of), strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_and_two_segments_equal_the_plain_call(family, dtype):
    pipe, call, noise = prepared(family)
    pipe.to(dtype)
    call = {name: value.to(dtype) if name.endswith("embeds") else value for name, value in call.items()}
    expected = stock(pipe, call, noise)
    own = pipe.scheduler
    assert torch.equal(run_segment(pipe, noise, pieces()[0], **call), expected)
    x = noise
    for piece in pieces(1):
        x = run_segment(pipe, x, piece, **call)
    assert torch.equal(x, expected)
    assert pipe.scheduler is own


@pytest.mark.parametrize("family", FLOW_FAMILIES)
def test_given_sigmas_equal_the_plain_call(family):
    """The grid that the pipeline would make, cut and given back, also to Wan, whose call takes no sigmas."""
    pipe, call, noise = prepared(family)
    sigmas = sigma_grid(pipe, STEPS, SIZE, SIZE, **call)
    assert sigmas.shape == (STEPS + 1,) and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    x = run_segment(pipe, noise, Segment(sigmas[:2], SIZE, SIZE), **call)
    x = run_segment(pipe, x, Segment(sigmas[1:], SIZE, SIZE), **call)
    assert torch.equal(x, stock(pipe, call, noise))


SOLVERS = {
    "unipc": lambda own: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    ),
    "dpm": lambda own: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    ),
    "learned": lambda own: ConsistencySolverScheduler.from_scheduler(own, order=3),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_history_goes_on_from_segment_to_segment(solver, family):
    pipe, call, noise = prepared(family)
    scheduler = SOLVERS[solver](pipe.scheduler)
    pipe.scheduler = copy.deepcopy(scheduler)
    expected = stock(pipe, call, noise, steps=6)
    x = noise
    for piece in pieces(2, 3, of=6):
        x = run_segment(pipe, x, piece, scheduler=scheduler, **call)
    assert torch.equal(x, expected)
    forgetful = noise
    for piece in pieces(3, of=6):
        forgetful = run_segment(pipe, forgetful, piece, scheduler=SOLVERS[solver](pipe.scheduler), **call)
    assert not torch.equal(forgetful, expected)


def test_a_step_function_sees_and_changes_the_step():
    """Euler by hand: x' = x + (σ' - σ) u, with the step function's x and u where it gives some."""
    pipe, call, noise = prepared("flux")
    sigmas = sigma_grid(pipe, STEPS, SIZE, SIZE, **call)
    seen = []

    def look(sample, sigma, sigma_next, model_output):
        seen.append((sample, sigma, sigma_next, model_output))

    end = run_segment(pipe, noise, Segment(sigmas, SIZE, SIZE, on_step=look), **call)
    assert [step[1] for step in seen] == sigmas[:-1].tolist() and [step[2] for step in seen] == sigmas[1:].tolist()
    assert torch.equal(seen[0][0], noise) and torch.equal(end, stock(pipe, call, noise))
    for (x, sigma, sigma_next, u), (after, *_) in zip(seen, [*seen[1:], (end,)], strict=True):
        torch.testing.assert_close(after, x + (sigma_next - sigma) * u)

    def stand_still(sample, sigma, sigma_next, model_output):
        return sample + 1, torch.zeros_like(model_output)

    moved = run_segment(pipe, noise, Segment(sigmas, SIZE, SIZE, on_step=stand_still), **call)
    torch.testing.assert_close(moved, noise + STEPS)


@pytest.mark.parametrize("steps", [(2, 9, 3), (-1, 3, 3), (1, 1, 3), (3, 5, 3), (0, 2, 2)])
def test_steps_that_are_no_piece_of_the_grid_are_refused(steps):
    pipe, call, noise = prepared("flux")
    with pytest.raises(ValueError, match=r"steps=\("):
        run_segment(pipe, noise, Segment([1.0, 0.6, 0.3, 0.0], SIZE, SIZE, steps=steps), **call)
    with pytest.raises(ValueError, match="without sigmas needs steps"):
        run_segment(pipe, noise, Segment(None, SIZE, SIZE), **call)


def test_a_sigma_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="expected two or more that fall"):
        set_grid(FlowMatchEulerDiscreteScheduler(), [1.0, float("nan"), 0.0])


def test_a_scheduler_that_asks_twice_in_a_step_is_refused():
    """PNDM, whose order is 1, evaluates the second of its timesteps twice."""
    pipe, call, noise = prepared("sd")
    scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    with pytest.raises(ValueError, match="PNDMScheduler makes 7 evaluations of 6 steps"):
        run_segment(pipe, noise, Segment(None, SIZE, SIZE, steps=(0, 6, 6)), scheduler, **call)


def test_the_learned_solver_walks_given_sigmas():
    """Order 1 without learned grid is Euler; the untrained solver keeps the grid; a trained one keeps its ends."""
    sigmas = torch.tensor([0.8, 0.6, 0.3, 0.1, 0.0])
    own = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    solver = ConsistencySolverScheduler.from_scheduler(own, order=3)
    set_grid(solver, sigmas)
    assert torch.equal(solver.sigmas, sigmas) and torch.equal(solver.timesteps, sigmas[:-1] * 1000)
    torch.testing.assert_close(solver.table.weights.sum(dim=-1), torch.ones(4))
    with torch.no_grad():
        solver.policy.mlp[-1].bias.copy_(torch.tensor([0.3, -0.2, 0.4]))
        solver.policy.mlp[-1].weight.normal_(0, 0.03, generator=torch.Generator().manual_seed(0))
    set_grid(solver, sigmas)
    assert solver.sigmas[0] == sigmas[0] and solver.sigmas[-1] == 0
    assert (solver.sigmas[1:-1] - sigmas[1:-1]).abs().min() > 1e-4
    pipe, call, noise = prepared("flux")
    order_one = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=1, learn_grid=False)
    segment = Segment(sigmas, SIZE, SIZE)
    euler = run_segment(pipe, noise, segment, **call)
    assert torch.equal(run_segment(pipe, noise, segment, scheduler=order_one, **call), euler)


def test_a_pipeline_is_a_flow_model_while_it_walks_a_segment():
    pipe, call, noise = prepared("flux")
    seen = []
    segment = Segment(None, SIZE, SIZE, lambda *step: seen.append(is_flow(pipe.scheduler)), steps=(0, STEPS, STEPS))
    run_segment(pipe, noise, segment, **call)
    assert seen == [True] * STEPS


def test_prompts_are_encoded_once_and_who_encodes_them_stays():
    pipe, asked = prepared("flux")[0], []
    own = pipe.encode_prompt
    pipe.encode_prompt = mine = lambda prompt: asked.append(prompt)
    with encoded_once(pipe):
        for prompt in ("a", "b", "a"):
            pipe.encode_prompt(prompt)
    assert asked == ["a", "b"] and pipe.encode_prompt is mine
    del pipe.encode_prompt
    with encoded_once(pipe):
        assert pipe.encode_prompt != own
    assert pipe.encode_prompt == own


def test_bad_segments_are_refused():
    pipe, call, noise = prepared("flux")
    with pytest.raises(ValueError, match=r"latents of shape \(1, 4, 16, 16\).*64 x 32 pixels has \(B, 4, 32, 16\)"):
        run_segment(pipe, noise, Segment([1.0, 0.0], 64, 32), **call)
    with pytest.raises(ValueError, match="expected two or more that fall"):
        run_segment(pipe, noise, Segment([0.5, 0.7], SIZE, SIZE), **call)
    with pytest.raises(ValueError, match="UniPCMultistepScheduler cannot be set to given sigmas"):
        set_grid(UniPCMultistepScheduler(), [1.0, 0.0])
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler evaluates the network 2 times a step"):
        run_segment(pipe, noise, pieces()[0], **call)
    unet, unet_call, _ = prepared("sd")
    with pytest.raises(ValueError, match="StableDiffusionPipeline with DDIMScheduler is no flow model"):
        sigma_grid(unet, STEPS, SIZE, SIZE, **unet_call)


def test_a_solver_that_stands_in_another_run_starts_afresh():
    """At step 2 of 6, it is not at step 2 of 3."""
    pipe, call, noise = prepared("sd3")
    scheduler = copy.deepcopy(pipe.scheduler)
    run_segment(pipe, noise, pieces(2, of=6)[0], scheduler=scheduler, **call)
    last = pieces(2, of=3)[1]
    expected = run_segment(pipe, noise, last, **call)
    assert torch.equal(run_segment(pipe, noise, last, scheduler=scheduler, **call), expected)
