"""What is changed inside the transformer for a stage, and that nothing of it stays."""

import math

import pytest
import torch
from tiny_pipelines import tiny_pipeline

from solver.samplers.hiflow.model_patches import (
    attention_scale,
    exact_positions,
    repeated_text,
    rope_base,
    shifted_patches,
)

GRID = 8  # patches a side
TOKENS = GRID**2
WORDS = 5


@pytest.fixture
def pipe():
    return tiny_pipeline("flux")[0]


def inputs(extra=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    ids = torch.stack([torch.zeros(GRID, GRID), rows, columns], dim=-1).flatten(0, 1)
    condition = torch.zeros(extra, 3)
    condition[:, 0] = 1
    return {
        "hidden_states": torch.randn(2, TOKENS + extra, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, WORDS, 16, generator=generator),
        "pooled_projections": torch.randn(2, 16, generator=generator),
        "timestep": torch.tensor([0.6, 0.6]),
        "guidance": torch.tensor([3.5, 3.5]),
        "txt_ids": torch.zeros(WORDS, 3),
        "img_ids": torch.cat([ids, condition]),
    }


@torch.no_grad()
def evaluate(pipe, **given):
    return pipe.transformer(**given, return_dict=False)[0]


def test_nothing_is_left(pipe):
    given = inputs()
    before = evaluate(pipe, **given)
    patches = [
        rope_base(pipe, 10),
        attention_scale(pipe.transformer, TOKENS, 16),
        repeated_text(pipe.transformer, (2, 2), (4, 4)),
        shifted_patches(pipe, (GRID, GRID), lambda: True),
    ]
    for patch in patches:
        with patch:
            assert not torch.allclose(evaluate(pipe, **given), before, atol=1e-4)
        assert torch.equal(evaluate(pipe, **given), before)
    with pytest.raises(KeyError), rope_base(pipe, 10):
        raise KeyError
    assert pipe.transformer.pos_embed.theta == 10000
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())


def test_rope_base_stretches_the_wavelengths(pipe):
    """cos(p / θ^(2i/d)): after ten-fold θ, dimension 2i of d shows at position p · 10^(2i/d) what it showed at p."""
    positions = torch.tensor([[0.0, 3.0, 5.0]])
    with rope_base(pipe, 10):
        cos, _ = pipe.transformer.pos_embed(positions)
    expected = torch.cos(5.0 / 100000 ** (torch.arange(0, 8, 2) / 8))
    torch.testing.assert_close(cos[0, 8::2].float(), expected)


def test_logits_grow_with_the_logarithm_of_the_keys(pipe):
    """Against attention written out: the same network with queries scaled by hand."""
    given = inputs()
    factor = math.sqrt(math.log(TOKENS + WORDS) / math.log(16 + WORDS))
    with attention_scale(pipe.transformer, TOKENS, 16):
        scaled = evaluate(pipe, **given)
    for block in [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]:
        for name in ("norm_q", "norm_added_q"):
            if getattr(block.attn, name, None) is not None:
                getattr(block.attn, name).weight.data *= factor
    torch.testing.assert_close(evaluate(pipe, **given), scaled, rtol=1e-5, atol=1e-6)


def test_attention_scale_is_that_of_flux_at_2k_and_4k():
    """The public code's numbers, 1.074 and 1.147 for 512 words, seen on the queries themselves."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_q = torch.nn.Identity()

        def forward(self, hidden_states, encoder_hidden_states):
            return self.norm_q(torch.ones(1))

    network, text = Attention(), torch.empty(1, 512, 0)
    for tokens, expected in ((4096, 1.0), (16384, 1.0745), (65536, 1.1473)):
        with attention_scale(network, tokens, 4096):
            got = network(hidden_states=torch.empty(1, tokens, 0), encoder_hidden_states=text)
        assert got.item() == pytest.approx(expected, abs=1e-3)
    with attention_scale(network, 65536, 4096, present=16384):  # the others are taken away further inside
        got = network(hidden_states=torch.empty(1, 65536, 0), encoder_hidden_states=text)
    assert got.item() == pytest.approx(1.0745, abs=1e-3)
    with pytest.raises(ValueError, match="proportional_attention"), attention_scale(torch.nn.Identity(), 4, 2):
        pass


def test_text_copies_sit_where_their_tiles_are(pipe):
    seen = {}

    def look(_, args, kwargs):
        seen.update(kwargs)

    with repeated_text(pipe.transformer, (2, 3), (4, 2)):
        handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
        given = inputs()
        evaluate(pipe, **given)
        handle.remove()
    assert seen["encoder_hidden_states"].shape == (2, 6 * WORDS, 16)
    assert torch.equal(seen["encoder_hidden_states"][:, -WORDS:], given["encoder_hidden_states"])
    assert seen["txt_ids"][::WORDS, 1:].tolist() == [[0, 0], [0, 2], [0, 4], [4, 0], [4, 2], [4, 4]]
    assert given["txt_ids"].shape == (WORDS, 3)


@pytest.mark.parametrize("extra", [0, 6])
def test_a_shifted_network_that_only_looks_at_pixels_answers_the_same(pipe, extra):
    """With attention and positions out of the way, patches shifted there and back leave every pixel in its place."""
    given = inputs(extra)
    network = pipe.transformer
    network.transformer_blocks, network.single_transformer_blocks = torch.nn.ModuleList(), torch.nn.ModuleList()
    linear = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))  # mixes channels, not pixels
    weight = torch.kron(linear, torch.eye(4))
    network.x_embedder = torch.nn.Linear(16, 16, bias=False)
    network.x_embedder.weight.data = weight
    network.norm_out = type("Plain", (torch.nn.Module,), {"forward": lambda self, x, temb: x})()
    network.proj_out = torch.nn.Identity()
    expected = evaluate(pipe, **given)
    shapes = []
    network.x_embedder.register_forward_hook(lambda _, args, output: shapes.append(output.shape[1]))
    with shifted_patches(pipe, (GRID, GRID), lambda: True):
        torch.testing.assert_close(evaluate(pipe, **given), expected)
    assert shapes == [(GRID + 1) ** 2 + extra]


def test_shifted_positions_are_half_a_patch_off(pipe):
    seen = []
    pipe.transformer.pos_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with shifted_patches(pipe, (GRID, GRID), lambda: True):
        evaluate(pipe, **inputs(extra=2))
    ids = seen[0][WORDS:]
    assert ids[0].tolist() == [0, -0.5, -0.5] and ids[(GRID + 1) ** 2 - 1].tolist() == [0, GRID - 0.5, GRID - 0.5]
    assert ids[-2:, 0].tolist() == [1, 1]


def test_shift_only_when_asked(pipe):
    given, steps = inputs(), iter([False, False])
    before = evaluate(pipe, **given)
    with shifted_patches(pipe, (GRID, GRID), lambda: next(steps)):
        assert torch.equal(evaluate(pipe, **given), before)


def test_parts_that_are_compiled_are_patched_once(pipe):
    network = pipe.transformer
    attention = network.transformer_blocks[0].attn
    norm = attention.norm_q
    network.pos_embed = torch.compile(network.pos_embed, backend="eager")
    network.transformer_blocks[0].attn = torch.compile(attention, backend="eager")
    with rope_base(pipe, 10), attention_scale(network, TOKENS, 16):
        assert network.pos_embed.theta == 100000
        assert attention.norm_q.norm is norm  # wrapped once
    assert network.pos_embed.theta == 10000 and attention.norm_q is norm


def test_blocks_that_were_compiled_before_notice(pipe):
    """Graphs of the unscaled network are there already, for this very size."""
    given = inputs()
    before = evaluate(pipe, **given)
    with attention_scale(pipe.transformer, TOKENS, 16):
        expected = evaluate(pipe, **given)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    evaluate(pipe, **given)
    with attention_scale(pipe.transformer, TOKENS, 16):
        torch.testing.assert_close(evaluate(pipe, **given), expected)
    torch.testing.assert_close(evaluate(pipe, **given), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_told_apart(dtype):
    """In bfloat16, of 384 rows there are 321."""
    seen = []

    class Network(torch.nn.Module):
        def forward(self, img_ids):
            seen.append(img_ids)

    ids = torch.cartesian_prod(torch.arange(384.0), torch.arange(2.0))
    ids = torch.cat([torch.zeros(len(ids), 1), ids], dim=1).to(dtype)
    condition = torch.tensor([[1.0, 5.0, 6.0]], dtype=dtype)
    network = Network()
    with exact_positions(network, (384, 2)):
        network(img_ids=torch.cat([ids, condition]))
    assert seen[0].dtype == torch.float32 and len(seen[0][:-1, 1].unique()) == 384
    assert seen[0][-1].tolist() == [1.0, 5.0, 6.0] and not network._forward_pre_hooks
