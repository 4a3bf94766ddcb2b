"""Evaluations of the network in an experiment: made once, and counted for every row that asked.

    with kept_account(pipe) as ledger:
        with ledger.bill(pictures=8) as bill:
            images = draw()
    bill.calls, bill.seconds  # {256: 60.0}, calls of the transformer a picture by its image tokens; seconds a picture

Rows of an experiment have much in common: previews share the first steps of the full-size run, and selections their
candidates. A question is known by all its tensors to the last bit, so sharing changes no picture. A bill is what the
row would have cost alone: an answer from memory counts with the mean time of one that was computed.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor

from solver.samplers.latents import denoiser

HOOK = "ledger"


@dataclass
class Bill:
    """Attributes:
    calls: of the transformer for one picture, by its number of image tokens; both branches of the guidance count.
    seconds: of one picture, decoding included.
    made: calls that were computed, times the pictures in each, by number of image tokens.
    """

    calls: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    made: Counter = field(default_factory=Counter)


class Ledger(ModelHook):
    """Answers what was asked before from memory.

    Attributes:
        stand_in: answer new questions with sines instead of the network, once a shape has been timed: the same
            questions are asked, and cost nothing. That plans an experiment.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.stand_in = device, False
        self.times: dict[tuple, list[float]] = {}
        self.forget()

    def forget(self) -> None:
        """Drops all answers."""
        self._answers: dict[bytes, tuple[Tensor, ...]] = {}

    @contextmanager
    def bill(self, pictures: int) -> Iterator[Bill]:
        """The account of what happens inside, for that many pictures."""
        self._asked, self._made, self._saved = Counter(), Counter(), []
        bill, start = Bill(), self._now()
        yield bill
        elapsed = self._now() - start
        bill.calls = {tokens: count / pictures for tokens, count in sorted(self._asked.items())}
        bill.seconds = (elapsed + sum(map(self.seconds, self._saved))) / pictures
        bill.made = self._made

    def seconds(self, shape: tuple) -> float:
        """Mean time of a call; the first one of a shape is a warm-up."""
        times = self.times[shape]
        return sum(times[1:] or times) / len(times[1:] or times)

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        shape, question = tuple(kwargs["hidden_states"].shape), _digest(kwargs)
        self._asked[shape[1]] += shape[0]
        if question in self._answers:
            self._saved.append(shape)
        else:
            self._made[shape[1]] += shape[0]
            self._answers[question] = self._answer(shape, args, kwargs)
        return self._answers[question]

    def _answer(self, shape: tuple, args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
        if self.stand_in and len(self.times.get(shape, ())) > 1:
            return (torch.sin(kwargs["hidden_states"] + kwargs["encoder_hidden_states"].mean()),)
        start = self._now()
        answer = self.fn_ref.original_forward(*args, **kwargs)
        self.times.setdefault(shape, []).append(self._now() - start)
        return answer

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def kept_account(pipe: DiffusionPipeline) -> Iterator[Ledger]:
    """Inside, the pipeline's transformer has a ledger. Later hooks, as those of RALU, come before it."""
    transformer, ledger = denoiser(pipe), Ledger(pipe.device)
    HookRegistry.check_if_exists_or_initialize(transformer).register_hook(ledger, HOOK)
    try:
        yield ledger
    finally:
        transformer._diffusers_hook.remove_hook(HOOK, recurse=False)


def _digest(arguments: dict) -> bytes:
    """Tells questions apart, by the values of all tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(arguments.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()
