"""Rollouts: a batch whose rows have tables of their own is what its rows are alone, for fewer evaluations."""

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from tiny_pipelines import FAMILIES, SIZE, run, tiny_pipeline

from data.noise import initial_noise
from solver import ConsistencySolverScheduler
from solver.prompt_embeddings import PromptEmbeddings
from solver.rollout import Renderer, rows_of, solving_rows

STEPS = 3
GUIDED = {"sd": 2, "sdxl": 2, "sd3": 2, "flux": 1}  # rows that the denoiser sees of each


def make_solver(pipe):
    return ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=3)


def random_tables(scheduler, count, steps=STEPS, seed=0, **grid):
    noise = torch.randn(count, steps, scheduler.num_actions, generator=torch.Generator().manual_seed(seed))
    return scheduler.table_from_actions(0.3 * noise, steps, **grid)


def make_renderer(family, prompts=2, **kwargs):
    """A renderer whose prompts are the numbers "0", "1", ..., and the arguments that all prompts share."""
    pipe, call = tiny_pipeline(family, batch_size=prompts)
    embeddings = {name: value for name, value in call.items() if name.endswith("embeds")}

    def encode(prompt):
        rows = {name: 0 if name.startswith("negative") else int(prompt) for name in embeddings}
        return {name: embeddings[name][row][None] for name, row in rows.items()}

    renderer = Renderer(pipe, make_solver(pipe), SIZE, SIZE, encode=encode, **kwargs)
    return renderer, encode, call["guidance_scale"]


def count_rows(denoiser):
    """Rows that a denoiser is really asked for, in a list that grows."""
    counted = []
    first_layers = ("conv_in", "x_embedder", "pos_embed.proj")
    inner = next(module for name, module in denoiser.named_modules() if name in first_layers)
    inner.register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
    return counted


# -- every row its own time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_with_mixed_tables_equals_its_members_alone(family):
    pipe, call = tiny_pipeline(family, batch_size=2)
    scheduler = make_solver(pipe)
    if family in ("flux", "flux-kontext", "qwen-image"):
        tables = random_tables(scheduler, 2, mu=0.6)
    else:
        tables = random_tables(scheduler, 2)
    with solving_rows(pipe, scheduler, tables, rows=["a", "b"]):
        together = run(pipe, call, num_inference_steps=STEPS)
    for row in range(2):
        member = {name: _row(value, row) for name, value in call.items()}
        scheduler.set_table(rows_of(tables, torch.tensor(row)))
        pipe.scheduler = scheduler
        alone = run(pipe, member, num_inference_steps=STEPS)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def _row(value, row):
    """One row of what belongs to two images; a single value, or an image for all, as it is."""
    return value[row : row + 1] if isinstance(value, list | torch.Tensor) and len(value) == 2 else value


@pytest.mark.parametrize("family", GUIDED)
def test_groups_share_their_first_evaluation_and_nothing_else_changes(family):
    renderer, _, guidance_scale = make_renderer(family)
    pipe, scheduler = renderer.pipe, renderer.scheduler
    tables = random_tables(scheduler, 6, **renderer.grid(STEPS, "0"))
    prompts, seeds = ["0"] * 3 + ["1"] * 3, [7] * 3 + [8] * 3
    counted = count_rows(pipe.components.get("unet") or pipe.transformer)
    previews = renderer.render(prompts, seeds, guidance_scale, tables)

    copies = GUIDED[family]
    assert counted == [2 * copies] + [6 * copies] * (STEPS - 1)
    assert previews.network_evaluations == sum(counted)
    assert previews.images_BCHW.shape == (6, 3, SIZE, SIZE)
    for row in range(6):
        alone = renderer.render([prompts[row]], [seeds[row]], guidance_scale, rows_of(tables, slice(row, row + 1)))
        torch.testing.assert_close(previews.latents_BCHW[row], alone.latents_BCHW[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(previews.latents_BCHW[0], previews.latents_BCHW[1], atol=1e-3)


def test_without_guidance_every_row_counts_once():
    renderer, *_ = make_renderer("sd")
    previews = renderer.render(["0", "0"], [1, 1], 1.0, random_tables(renderer.scheduler, 2))
    assert previews.network_evaluations == 1 + 2 * (STEPS - 1)


def test_one_table_for_all_is_the_stock_call():
    renderer, encode, guidance_scale = make_renderer("sd")
    table = random_tables(renderer.scheduler, 1)
    one = rows_of(table, torch.tensor(0))
    previews = renderer.render(["0", "1"], [3, 4], guidance_scale, one)
    renderer.pipe.scheduler = renderer.scheduler
    renderer.scheduler.set_table(one)
    call = {name: torch.cat([encode("0")[name], encode("1")[name]]) for name in encode("0")}
    call |= {"latents": initial_noise([3, 4], renderer.latent_shape), "guidance_scale": guidance_scale}
    expected = renderer.pipe(**call, num_inference_steps=STEPS, output_type="latent").images
    assert torch.equal(previews.latents_BCHW, expected)


def test_batch_size_changes_nothing_but_the_sharing():
    renderer, _, guidance_scale = make_renderer("sd")
    tables = random_tables(renderer.scheduler, 4)
    prompts, seeds = ["0"] * 4, [5] * 4
    together = renderer.render(prompts, seeds, guidance_scale, tables)
    renderer.batch_size = 3
    cut = renderer.render(prompts, seeds, guidance_scale, tables)
    torch.testing.assert_close(together.images_BCHW, cut.images_BCHW, rtol=1e-4, atol=1e-5)
    assert cut.network_evaluations == together.network_evaluations + 2  # one more first evaluation, guided


# -- what is left behind ----------------------------------------------------------------------------------------------


def test_pipeline_is_as_before_also_after_an_error():
    renderer, _, guidance_scale = make_renderer("sd")
    pipe, stock = renderer.pipe, renderer.pipe.scheduler
    before = set(vars(pipe.unet))
    table = random_tables(renderer.scheduler, 1)
    renderer.render(["0"], [0], guidance_scale, table)
    with pytest.raises(RuntimeError, match="on the way"), solving_rows(pipe, renderer.scheduler, table, ["a"]):
        raise RuntimeError("on the way")
    assert set(vars(pipe.unet)) == before
    assert pipe.scheduler is stock
    assert pipe.unet.forward.__func__ is type(pipe.unet).forward
    assert renderer.scheduler._pinned is None


def test_table_for_another_batch_is_refused():
    renderer, *_ = make_renderer("sd")
    with pytest.raises(ValueError, match="table is for 3 rows, but there are 4"):
        renderer.render(["0"] * 4, [0] * 4, 3.0, random_tables(renderer.scheduler, 3))


# -- prompts and grids ------------------------------------------------------------------------------------------------


def test_each_prompt_is_encoded_once():
    encoded = []

    def encode(prompt):
        encoded.append(prompt)
        return {"prompt_embeds": torch.full((1, 2, 3), float(prompt)), "negative_prompt_embeds": torch.zeros(1, 2, 3)}

    embeddings = PromptEmbeddings(tiny_pipeline("sd")[0], encode)
    embeddings(["1", "2", "1"])
    batch = embeddings(["2", "3"])
    assert encoded == ["1", "2", "3"]
    assert batch["prompt_embeds"][:, 0, 0].tolist() == [2.0, 3.0]
    assert batch["negative_prompt_embeds"].shape == (2, 2, 3)


def test_unknown_family_needs_encode():
    with pytest.raises(ValueError, match="WanPipeline is not one of"):
        PromptEmbeddings(tiny_pipeline("wan")[0])(["a ring"])


def test_grid_is_what_the_pipeline_says():
    renderer, *_ = make_renderer("flux")
    config = renderer.scheduler.config
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    tokens = (renderer.latent_shape[1] // 2) * (renderer.latent_shape[2] // 2)
    grid = renderer.grid(4, "0")
    assert grid["mu"] == calculate_shift(tokens, *(config[key] for key in keys))
    assert list(grid["sigmas"]) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert make_renderer("sd3")[0].grid(4, "0") == {}
    assert make_renderer("sd")[0].grid(4, "0") == {}
    assert "set_timesteps" not in vars(renderer.scheduler)
