from dataclasses import dataclass

import pytest
import torch
from torch import nn

from data.scenes import HELD_OUT_PAIRS
from zoo import training
from zoo.train_clip import build_tokenizer
from zoo.train_mini_sd import MiniSdRun, pool_batches
from zoo.training import Run, Scenes, fit


@dataclass
class TinyRun(Run):
    name: str = "tiny"
    steps: int = 12
    warmup_steps: int = 3
    learning_rate: float = 0.05


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "RUNS", tmp_path)


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


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.out = nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.blocks[0](x))


def test_a_run_with_two_optimisers_resumes_too(runs, monkeypatch):
    """Muon for the matrix of the block, AdamW for the rest."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "BF16", True)  # so that this processor may, slow as it is
        undivided, run = TinyRun(name="whole", muon=True), TinyRun(name="halves", muon=True)
    whole, _ = fit(Blocks(), undivided, square_loss, numbers)
    fit(Blocks(), run, square_loss, lambda first, device: numbers(first, device, last=5))
    halves, _ = fit(Blocks(), run, square_loss, numbers)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))
    assert not torch.allclose(whole.blocks[0].weight, Blocks().blocks[0].weight)


def test_muon_is_refused_where_bfloat16_is_slow(monkeypatch):
    monkeypatch.setattr(training, "BF16", False)
    with pytest.raises(ValueError, match="bfloat16"):
        TinyRun(muon=True)


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
