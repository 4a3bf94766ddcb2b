"""The cost model against the published FLOPs of RALU's tables and against counted runs of every family."""

from contextlib import ExitStack

import pytest
import torch

from solver.samplers.cost import (
    NETWORKS,
    decoding_flops,
    evaluation_flops,
    image_tokens,
    network_of,
    run_flops,
    text_length,
)
from tests.flops import flop_counter
from tests.tiny_pipelines import WORDS, run, tiny_pipeline

FULL, LOW = 4096, 1024  # tokens of 1024 x 1024 pixels, and of 512 x 512


def published_tflops(network, evaluations, edges_decoded: bool) -> float:
    """A row of a table: denoiser, text encoders, VAE; of RALU a decoded half-size picture as well. No attention."""
    total = run_flops(network, evaluations, attention=False) + network.text_encoding
    total += decoding_flops(network, 1024, 1024, attention=False)
    total += decoding_flops(network, 512, 512, attention=False) if edges_decoded else 0
    return total / 1e12


DEV, SCHNELL, SD3, TURBO = (NETWORKS[name] for name in ("flux-dev", "flux-schnell", "sd3-medium", "sd3.5-large-turbo"))


@pytest.mark.parametrize(
    ("row", "network", "evaluations", "edges"),
    [
        (2991.0, DEV, [(FULL, 50)], False),
        (610.02, DEV, [(FULL, 10)], False),
        (431.45, DEV, [(FULL, 7)], False),
        (252.88, SCHNELL, [(FULL, 4)], False),
        (540.47, text_length(DEV, 256), [(LOW, 4), (LOW + 3 * 204, 5), (FULL, 6)], True),
        (426.01, DEV, [(LOW, 2), (LOW + 3 * 102, 3), (FULL, 5)], True),
        (187.92, SCHNELL, [(LOW, 1), (LOW + 3 * 307, 1), (FULL, 2)], True),
        (351.66, SD3, [(FULL, 28)], False),
        (123.17, SD3, [(FULL, 9)], False),
        (181.09, SD3, [(LOW, 5), (LOW + 3 * 307, 6), (FULL, 9)], True),
        (116.61, SD3, [(LOW, 3), (LOW + 3 * 204, 3), (FULL, 6)], True),
        (107.93, TURBO, [(FULL, 4)], False),
        (82.23, TURBO, [(LOW, 1), (LOW + 3 * 307, 1), (FULL, 2)], True),
        (571.23, text_length(DEV, 256), [(FULL, 7), (LOW, 10)], False),  # Bottleneck Sampling
        (431.52, DEV, [(FULL, 5), (LOW, 6)], False),
    ],
)
def test_published_rows(row, network, evaluations, edges):
    """Within 0.1 % of the published TFLOPs."""
    assert published_tflops(network, evaluations, edges) == pytest.approx(row, rel=1e-3)


def test_attention_adds_a_quarter_at_full_size():
    """74.4 TFLOPs a step of FLUX.1-dev with attention, 59.51 without."""
    assert evaluation_flops(DEV, FULL) == pytest.approx(74.384653e12, rel=1e-6)  # counted on the model's shape
    assert evaluation_flops(DEV, FULL, attention=False) == pytest.approx(59.512255e12, rel=1e-6)
    assert evaluation_flops(NETWORKS["sdxl"], 128**2) == pytest.approx(6.761236398080e12, rel=1e-6)
    assert evaluation_flops(NETWORKS["sd1.5"], 64**2) == pytest.approx(0.803273441280e12, rel=1e-6)
    assert evaluation_flops(NETWORKS["sd1.5"], 128**2) == pytest.approx(4.674006220800e12, rel=1e-6)
    assert decoding_flops(DEV, 1024, 1024) == pytest.approx(10.472204e12, rel=1e-6)


def counted(module, call) -> tuple[float, float]:
    """FLOPs of the first evaluation of a module in a call, and those of attention among them."""
    open_counters, seen = ExitStack(), []

    def before(_, args, kwargs):
        seen.append(open_counters.enter_context(flop_counter()))

    def after(_, args, output):
        open_counters.close()

    handles = module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    counts = {str(name): flops for name, flops in seen[0].get_flop_counts()["Global"].items()}
    total = sum(counts.values())
    attention = sum(flops for name, flops in counts.items() if "bmm" in name or "attention" in name)
    return total, attention


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen-image", "wan", "hunyuan-video"])
def test_polynomial_equals_a_counted_evaluation(family):
    """The tiny models of every family, attention and all; a batch of two branches where the family guides so."""
    pipe, call = tiny_pipeline(family)
    total, attention = counted(pipe.transformer, lambda: run(pipe, call, num_inference_steps=1))
    branches = 2 if family == "sd3" else 1  # the others call the model once a branch
    pixels = {"flux": 4, "sd3": 4, "qwen-image": 4, "wan": 16, "hunyuan-video": 16}[family]
    network = network_of(pipe.transformer, pixels=pixels, text_tokens=WORDS)
    tokens = image_tokens(network, 32, 32, frames=call.get("num_frames", 1))
    assert branches * evaluation_flops(network, tokens) == pytest.approx(total, rel=1e-9)
    assert branches * evaluation_flops(network, tokens, attention=False) == pytest.approx(total - attention, rel=1e-9)


def test_a_unet_is_refused_by_name():
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        network_of(tiny_pipeline("sd")[0].unet)


def test_sizes():
    assert image_tokens(DEV, 1024, 1024) == FULL
    assert image_tokens(NETWORKS["wan2.1-14b"], 480, 832, frames=81) == 30 * 52 * 21
    with pytest.raises(ValueError, match="height=1000"):
        image_tokens(DEV, 1000, 1024)
    with pytest.raises(ValueError, match="frames=80"):
        image_tokens(NETWORKS["wan2.1-14b"], 480, 832, frames=80)


def test_batches_scale_nothing_but_the_count():
    """Two images cost twice; the model knows one image at a time."""
    with torch.no_grad():
        pipe, call = tiny_pipeline("flux", batch_size=2)
        total, _ = counted(pipe.transformer, lambda: run(pipe, call, num_inference_steps=1))
    network = network_of(pipe.transformer, pixels=4, text_tokens=WORDS)
    assert 2 * evaluation_flops(network, 64) == pytest.approx(total, rel=1e-9)
