"""What is said of a noun, read off the tokens of a prompt."""

import random

import pytest
import torch

from data.scenes import Scene, caption
from zoo.mini_flux import WORDS, build_t5_tokenizer
from zoo.phrases import NOTHING, NUMBERS, VALUES, WORDS_OF, Phrases


@pytest.fixture(scope="module")
def tokenizer():
    return build_t5_tokenizer()


def ids_of(tokenizer, *texts):
    settings = {"padding": "max_length", "max_length": WORDS, "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(texts), **settings).input_ids


def read(tokenizer, text):
    """[(noun, {attribute: word of its value or None}), ...]"""
    ids = ids_of(tokenizer, text)
    labels = Phrases(tokenizer).labels(ids)[0]
    words = [word.removeprefix("▁") for word in tokenizer.convert_ids_to_tokens(ids[0].tolist())]
    found = []
    for word, values in zip(words, labels.tolist(), strict=True):
        if values[0] != NOTHING:
            said = zip(WORDS_OF.items(), values, strict=True)
            found.append((word, {name: known[value - 1][0] if value else None for (name, known), value in said}))
        else:
            assert set(values) == {NOTHING}
    return found


def test_words_belong_to_the_noun_that_they_come_before(tokenizer):
    assert read(tokenizer, "we see a small striped red cube over two big rings on the beach") == [
        ("cube", {"colour": "red", "number": "a", "size": "small", "finish": "striped", "side": "above"}),
        ("rings", {"colour": None, "number": "two", "size": "large", "finish": None, "side": "below"}),
    ]
    assert read(tokenizer, "move the blue ball to the left") == [
        ("ball", {"colour": "blue", "number": "a", "size": None, "finish": None, "side": "left"}),
    ]
    assert read(tokenizer, "a cone, a green star and a dotted cross")[1:] == [
        ("star", {"colour": "green", "number": "a", "size": None, "finish": None, "side": None}),
        ("cross", {"colour": None, "number": "a", "size": None, "finish": "dotted", "side": None}),
    ]
    assert read(tokenizer, "") == []


def test_captions_say_what_their_phrases_claim(tokenizer):
    for seed in range(200):
        claims = caption(Scene.random(seed), random.Random(seed))
        found = read(tokenizer, claims.text)
        assert len(found) == len(claims.phrases)
        for (_, said), phrase in zip(found, claims.phrases, strict=True):
            assert said["colour"] == phrase.colour and said["number"] == NUMBERS[phrase.count - 1][0]
        if claims.relation:
            sides = [said["side"] for _, said in found]
            assert sides[0] == claims.relation.split()[0]
            assert {sides[0], sides[1]} in ({"left", "right"}, {"above", "below"})


def test_the_loss_is_that_of_guessing_where_nothing_is_known(tokenizer):
    phrases = Phrases(tokenizer)
    ids = ids_of(tokenizer, "a red cube above a ball", "a star")
    logits = torch.zeros(2, WORDS, sum(VALUES), requires_grad=True)
    loss = phrases.loss(logits, ids)
    assert loss.item() == pytest.approx(torch.tensor(VALUES).float().log().mean().item())
    loss.backward()
    assert (logits.grad.abs().sum(-1) > 0).sum() == 3
    empty = phrases.loss(logits, ids_of(tokenizer, "", ""))
    assert empty.item() == 0
