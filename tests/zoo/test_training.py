import json
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.scenes import HELD_OUT_PAIRS
from zoo import training
from zoo.muon import Muon, orthogonal
from zoo.train_clip import build_tokenizer
from zoo.train_mini_sd import MiniSdRun, pool_batches
from zoo.training import Run, Scenes, drawn, fit, seed_of


@dataclass
class TinyRun(Run):
    name: str = "tiny"
    steps: int = 12
    warmup_steps: int = 3
    learning_rate: float = 0.05


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "RUNS", tmp_path)
    return tmp_path


def numbers(first, device, last=12):
    for step in range(first, last):
        yield torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def square_loss(network, step, x):
    return {"loss": (network(x) - x.sum(1, keepdim=True)).square().mean()}


def network():
    torch.manual_seed(0)
    return nn.Linear(4, 1)


def test_a_resumed_run_equals_an_uninterrupted_one(runs):
    whole, log = fit(network(), TinyRun(name="whole"), square_loss, numbers)
    fit(network(), TinyRun(name="halves"), square_loss, lambda first, device: numbers(first, device, last=5))
    halves, _ = fit(network(), TinyRun(name="halves"), square_loss, numbers)
    assert torch.equal(whole.weight, halves.weight) and torch.equal(whole.bias, halves.bias)
    assert log[-1]["step"] == 12


def test_the_log_averages_a_term_over_the_steps_that_have_it(runs):
    def loss(network, step, x):
        return square_loss(network, step, x) | ({"third": torch.tensor(float(step))} if step % 3 == 0 else {})

    _, log = fit(network(), TinyRun(name="thirds"), loss, numbers)
    assert log[-1]["third"] == (0 + 3 + 6 + 9) / 4


def test_relative_positions_have_a_rate_of_their_own(runs, monkeypatch):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.relative_attention_bias, self.other = nn.Embedding(1, 1), nn.Embedding(1, 1)

        def forward(self, x):
            return x.sum() * (self.relative_attention_bias.weight + self.other.weight).sum()

    moved = Shifted()
    before = [p.detach().clone() for p in moved.parameters()]
    run = TinyRun(name="positions", steps=1, warmup_steps=1, learning_rate=1e-3, weight_decay=0.0, ema_decay=0.0)
    fit(moved, run, lambda network, step, x: {"loss": network(x)}, lambda first, device: numbers(first, device, 1))
    far, near = (float((p - old).abs()) for p, old in zip(moved.parameters(), before, strict=True))
    assert far == pytest.approx(training.POSITION_RATE * near, rel=1e-3) and near > 1e-4


@pytest.mark.parametrize("is_fused", [True, False])
def test_attention_has_its_gradients_either_way(is_fused, monkeypatch):
    monkeypatch.setattr(training, "FUSED_ATTENTION", is_fused)
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    with training.attention():
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert q.grad.isfinite().all()


def test_a_run_that_is_killed_while_it_writes_keeps_its_last_checkpoint(runs, monkeypatch):
    whole, _ = fit(network(), TinyRun(name="whole"), square_loss, numbers)
    fit(network(), TinyRun(name="killed"), square_loss, lambda first, device: numbers(first, device, last=5))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("zoo.training.save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(network(), TinyRun(name="killed"), square_loss, lambda first, device: numbers(first, device, last=9))
    resumed, _ = fit(network(), TinyRun(name="killed"), square_loss, numbers)
    assert torch.equal(whole.weight, resumed.weight)


def test_minutes_are_those_of_all_its_parts(runs):
    run = TinyRun(name="timed", minutes=1.0)
    fit(network(), run, square_loss, lambda first, device: numbers(first, device, last=5))
    path = runs / "timed" / "checkpoint" / "progress.json"
    progress = json.loads(path.read_text())
    assert 0 < progress["seconds"] < 60
    path.write_text(json.dumps(progress | {"seconds": 60.0}))
    _, log = fit(network(), run, square_loss, numbers)
    assert log[-1]["step"] == 5


def test_a_run_of_another_start_is_not_gone_on_with(runs):
    fit(network(), TinyRun(name="taken"), square_loss, lambda first, device: numbers(first, device, last=2))
    with pytest.raises(ValueError, match="taken is a run that began from None; give this one another --name"):
        fit(network(), TinyRun(name="taken", start="zoo/depth"), square_loss, numbers)


def test_a_step_draws_other_numbers_for_every_purpose_and_in_every_run():
    seeds = {
        seed_of(TinyRun(name=name), what, step) for name in "ab" for what in ("noise", "levels") for step in (0, 1)
    }
    assert len(seeds) == 8
    first, again = (torch.rand(4, generator=drawn(TinyRun(name="a"), "noise", 3)) for _ in range(2))
    assert torch.equal(first, again)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.out = nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.blocks[0](x))


def test_a_run_with_two_optimisers_resumes_too(runs):
    """Muon for the matrix of the block, AdamW for the rest."""
    undivided, run = TinyRun(name="whole", muon=True), TinyRun(name="halves", muon=True)
    whole, _ = fit(Blocks(), undivided, square_loss, numbers)
    fit(Blocks(), run, square_loss, lambda first, device: numbers(first, device, last=5))
    halves, _ = fit(Blocks(), run, square_loss, numbers)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))
    assert not torch.allclose(whole.blocks[0].weight, Blocks().blocks[0].weight)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_orthogonal_is_nearly_u_v(shape):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    near = orthogonal(u @ torch.diag(s.clamp(min=0.2 * s.max())) @ v)
    assert torch.linalg.svdvals(near).sub(1).abs().max() < 0.35
    assert F.cosine_similarity(near.flatten(), (u @ v).flatten(), dim=0) > 0.97


def test_muon_reads_a_kernel_as_a_matrix_and_steps_as_far_as_adamw():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.zeros(16, 8, 3, 3))
    matrix = nn.Parameter(torch.zeros(16, 72))
    kernel.grad = torch.randn(16, 8, 3, 3)
    matrix.grad = kernel.grad.flatten(1)
    Muon([kernel, matrix], lr=0.01).step()
    assert torch.equal(kernel.flatten(1), matrix)
    assert 0.2 * 0.01 * 0.7 < matrix.square().mean().sqrt() < 0.2 * 0.01 * 1.2


def test_the_average_is_what_comes_back_and_training_helps(runs):
    trained, log = fit(network(), TinyRun(steps=300), square_loss, lambda first, device: numbers(first, device, 300))
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    assert square_loss(trained, 0, x)["loss"] < 0.1 * square_loss(network(), 0, x)["loss"]
    assert log[-1]["loss"] < log[0]["loss"]
    assert not trained.training


def test_only_measuring_instruments_see_held_out_pairs():
    plain, instruments = Scenes(400), Scenes(400, all_pairs=True)
    seen = {solid.pair for i in range(400) for solid in plain[i].solids}
    assert not seen & HELD_OUT_PAIRS
    assert {solid.pair for i in range(400) for solid in instruments[i].solids} >= HELD_OUT_PAIRS


def test_the_pool_is_used_once_an_epoch_and_resumes():
    latents = torch.arange(32.0)
    run = MiniSdRun(steps=8, batch_size=8)
    batches = [rows for _, rows in pool_batches(latents, run, 0)]
    assert torch.equal(torch.cat(batches[:4]).sort().values, latents)
    assert not torch.equal(torch.cat(batches[:4]), torch.cat(batches[4:]))
    resumed = [rows for _, rows in pool_batches(latents, run, 3)]
    assert all(torch.equal(a, b) for a, b in zip(batches[3:], resumed, strict=True))


def test_the_tokenizer_knows_the_words_of_the_world_and_spells_the_rest():
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("Two small striped boxes, on a brick wall") == [
        f"{word}</w>" for word in ["two", "small", "striped", "boxes", ",", "on", "a", "brick", "wall"]
    ]
    unknown = tokenizer("a zebra!").input_ids
    assert unknown.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(unknown, skip_special_tokens=True).strip() == "a zebra !"


def test_a_later_run_adds_to_what_the_card_says(tmp_path, monkeypatch):
    machines = iter(["2 CPU cores", "1 CPU core", "1 CPU core"])
    monkeypatch.setattr(training, "hardware", lambda: next(machines))
    first = [{"step": 100, "seconds": 60, "loss": 2.0}, {"step": 150, "seconds": 90, "loss": 1.0}]
    training.write_log(tmp_path, Run("x"), first, parameters="1 M")
    again = Run("x-2", start=str(tmp_path))
    training.write_log(tmp_path, again, [{"step": 40, "seconds": 30, "loss": 0.7}])
    training.write_log(tmp_path, again, [{"step": 100, "seconds": 60, "loss": 0.5}])  # the same run, gone on with
    card = json.loads((tmp_path / "training.json").read_text())
    assert card["runs"] == 2 and card["steps"] == 250 and card["minutes"] == 2.5
    assert [row["step"] for row in card["log"]] == [100, 150, 250]
    assert card["hardware"] == "2 CPU cores, then 1 CPU core"
