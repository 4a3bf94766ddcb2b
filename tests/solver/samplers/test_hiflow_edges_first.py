"""HiFlow's last stage with few tokens first."""

from dataclasses import replace

import pytest
import torch
from tiny_pipelines import tiny_pipeline
from torch import nn

from solver.samplers.hiflow import PRESETS, hiflow, with_steps
from solver.samplers.hiflow.edges_first import cell_means, edge_cells, edges_first
from solver.samplers.hiflow.explain import explain
from solver.samplers.hiflow.plan import few_tokens, plan_stages
from solver.samplers.latents import to_grid, to_tokens
from solver.samplers.ralu.mixed_resolution import hooked
from solver.samplers.ralu.noise import on_grid

CODE = replace(with_steps(PRESETS["code"], 5), stage_steps=(4,))
FEW = replace(CODE, edges_first=(0.5, 0.25))
S = 0.6
OURS = ("height", "width", "generator", "output_type", "guidance_scale")


@pytest.fixture
def flux():
    pipe, call = tiny_pipeline("flux", batch_size=2)
    return pipe, {name: value for name, value in call.items() if name not in OURS}


class Oracle(nn.Module):
    """A network that sees one picture in every token: v = (x - c) / s."""

    def __init__(self, c: float):
        super().__init__()
        self.c, self.seen = c, None

    def forward(self, hidden_states, img_ids=None):
        self.seen = hidden_states, img_ids
        return ((hidden_states - self.c) / S,)


Oracle.__name__ = "FluxTransformer2DModel"  # as far as tokens go


def ask(network, x_1CHW, **patch):
    """Velocity of a grid from the network, through a patch if there is one."""
    h, w = (side // 2 for side in x_1CHW.shape[-2:])
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(h)), torch.arange(float(w)))
    return to_grid(network(hidden_states=to_tokens(x_1CHW), img_ids=ids)[0], h, w)


def test_coarse_cells_have_the_noise_of_the_level_and_move_their_anchor():
    torch.manual_seed(0)
    anchor, noise = torch.randn(1, 4, 64, 64), torch.randn(1, 4, 64, 64)
    x = (1 - S) * anchor + S * noise
    fine = torch.rand(16, 16) < 0.25
    network = Oracle(c=0.3)
    with edges_first(network, fine, lambda: (anchor, S)) as mixed:
        v = ask(network, x)
    shown, ids = network.seen
    coarse, whole = len(mixed.coarse), len(mixed.fine)
    assert shown.shape[1] == coarse + whole == few_tokens(32 * 32, float(fine.float().mean()))
    assert ids[:coarse, 1:].frac().unique().tolist() == [0.5] and not ids[coarse:].frac().any()
    # What a coarse token shows, less the mean of the anchor, is white noise at the noise level.
    is_fine = on_grid(fine[None])
    cells = to_tokens(cell_means((1 - S) * anchor)[..., ::2, ::2])[:, mixed.coarse]
    assert (shown[:, :coarse] - cells).std().item() == pytest.approx(S, rel=0.03)
    # Fine cells get what the network says; coarse ones keep the anchor's detail around what it says.
    x0 = x - S * v
    assert torch.allclose(x0[:, :, is_fine[0, 0]], torch.tensor(0.3), atol=1e-5)
    moved = anchor + 0.3 - cell_means(anchor)
    assert torch.allclose(x0[:, :, ~is_fine[0, 0]], moved[:, :, ~is_fine[0, 0]], atol=1e-5)


def test_with_all_cells_fine_it_is_the_plain_network(flux):
    pipe, call = flux
    x = torch.randn(1, 4, 32, 32)
    arguments = {
        "encoder_hidden_states": call["prompt_embeds"][:1],
        "pooled_projections": call["pooled_prompt_embeds"][:1],
        "timestep": torch.tensor([S]),
        "txt_ids": torch.zeros(call["prompt_embeds"].shape[1], 3),
        "guidance": torch.tensor([3.5]) if pipe.transformer.config.guidance_embeds else None,
        "return_dict": False,
    }
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0))
    packed = to_tokens(x)
    with torch.no_grad():
        plain = pipe.transformer(hidden_states=packed, img_ids=ids, **arguments)[0]
        with edges_first(pipe.transformer, torch.ones(8, 8, dtype=torch.bool), lambda: (torch.zeros_like(x), S)):
            mixed = pipe.transformer(hidden_states=packed, img_ids=ids, **arguments)[0]
        again = pipe.transformer(hidden_states=packed, img_ids=ids, **arguments)[0]
    assert torch.allclose(mixed, plain, atol=2e-6)
    assert torch.equal(again, plain) and "_diffusers_hook" not in vars(pipe.transformer)


def test_nothing_is_left_of_two_hooks_on_one_network():
    network = nn.Linear(2, 2)
    before = dict(vars(network))
    from diffusers.hooks import ModelHook

    with hooked(network, ModelHook(), "outer"), hooked(network, ModelHook(), "inner"):
        assert len(network._diffusers_hook.hooks) == 2
    assert vars(network) == before


def test_edges_are_those_of_the_smaller_picture():
    image = torch.zeros(2, 3, 64, 64)
    image[0, :, :, 20:] = 1
    image[1, :, 40:] = 1
    for size in (128, 192):  # twice its side, and not
        across, down = edge_cells(image, size, size, pixels=8, ratio=0.2)
        assert across.sum() == down.sum() == int(0.2 * (size // 16) ** 2)
        assert across.any(0).sum() < across.any(1).sum() and down.any(1).sum() < down.any(0).sum()


@pytest.mark.parametrize("start", ["image", "prediction"])
def test_a_cascade_with_few_tokens_first(flux, start):
    pipe, call = flux
    lengths = []
    pipe.transformer.x_embedder.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    recipe = replace(FEW, start=start)
    both = hiflow(pipe, None, [7, 8], (32, 64), recipe, guidance_scale=2.0, call=call)
    few, whole, moved = few_tokens(256, 0.25), 16 * 16, 17 * 17
    assert lengths[-8:] == [few, few, moved, whole] * 2  # picture by picture, patches moved at every other step
    second = {name: value[1:] if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    alone = hiflow(pipe, None, 8, (32, 64), recipe, guidance_scale=2.0, call=second)
    torch.testing.assert_close(alone.images[-1], both.images[-1][1:], rtol=1e-3, atol=1e-3)
    plain = hiflow(pipe, None, 8, (32, 64), replace(recipe, edges_first=None), guidance_scale=2.0, call=second)
    assert torch.equal(plain.images[0], alone.images[0]) and plain.sigmas == alone.sigmas
    assert not torch.equal(plain.images[-1], alone.images[-1])
    assert both.predictions.at(both.sigmas[-1][0]).shape[0] == 2


def test_the_plan_counts_few_tokens():
    stages = plan_stages((1024, 2048, 4096), replace(PRESETS["code"], edges_first=(0.5, 0.3)), 16)
    assert [(stage.edge_steps, stage.edge_ratio) for stage in stages] == [(0, 0.0), (0, 0.0), (5, 0.3)]
    for given in ({"alignment": "none"}, {"sizes": (1024,)}):
        with pytest.raises(ValueError, match="a smaller picture, and there is none"):
            plan_stages(**{"sizes": (1024, 2048), "recipe": FEW, "multiple": 16, **given})
    plain = explain("flux", (1024, 2048, 4096))["tflops"]["per_stage"]
    few = explain("flux", (1024, 2048, 4096), replace(PRESETS["code"], edges_first=(0.5, 0.3)))
    assert few["tflops"]["per_stage"][:2] == plain[:2] and few["tflops"]["per_stage"][2] < 0.7 * plain[2]
    assert few["stages"][2]["edges_first"] == {"steps": 5, "ratio": 0.3}


SHARES = [(0, 0.3), (0.5, 1), (0.5,), 0.5, (1.5, 0.3), (0.5, float("nan")), ("0.5", 0.3), (None, 0.3), (True, 0.3)]


@pytest.mark.parametrize("shares", SHARES)
def test_shares_that_are_none(shares):
    with pytest.raises(ValueError, match=r"edges_first=.*expected .share of the last stage's steps"):
        plan_stages((32, 64), replace(CODE, edges_first=shares), 4)


def test_a_pipeline_that_cannot_be_mixed_is_told_before_the_first_step(flux):
    pipe, call = flux

    class Other(type(pipe.transformer)):
        pass

    pipe.transformer.__class__ = Other
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the network was evaluated"))
    with pytest.raises(ValueError, match="cannot see into a Other"):
        hiflow(pipe, None, [7, 8], (32, 64), FEW, call=call)
    pipe.transformer.__class__ = Other.__base__
    pipe.transformer.register_to_config(in_channels=32)  # as of FluxControlPipeline
    with pytest.raises(ValueError, match="hold a control image beside the picture"):
        hiflow(pipe, None, [7, 8], (32, 64), FEW, call=call)


def test_what_cannot_be_mixed():
    with pytest.raises(ValueError, match="FLUX-type"):
        explain("sdxl", (1024, 2048), FEW)
    with pytest.raises(ValueError, match="72 x 72 has to divide into cells of 16 pixels"):
        plan_stages((64, 72), FEW, 8)
    with pytest.raises(ValueError, match="take a larger ratio"):
        plan_stages((16, 32), replace(FEW, edges_first=(0.5, 0.2)), 8)
