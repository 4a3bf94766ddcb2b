"""Captions of the miniature world, and the questions that an image must answer to match one.

A caption is both a sentence and what it claims (`Caption`), and `parse` reads the claims back from the sentence, so a
plain text prompt is enough to check an image. `check` asks a segmentation map GenEval's questions (arXiv 2310.11513).
"""

import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage

from data.world import BACKGROUNDS, COLOURS, SHAPES, Solid, class_id

if TYPE_CHECKING:
    from data.world import Scene

QUESTIONS = ("object", "count", "colour", "position", "colour_binding")

_NUMBERS = ("a", "two", "three", "four")
_NOUNS = {
    "ball": ("ball", "ball", "sphere"),
    "cube": ("cube", "cube", "box"),
    "cone": ("cone",),
    "ring": ("ring", "ring", "hoop"),
    "star": ("star",),
    "cross": ("cross",),
}
_SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
_PLACES = {
    "sky": ("in the sky", "against the sky"),
    "dusk": ("at dusk", "at nightfall"),
    "sand": ("on sand", "on the beach"),
    "studio": ("in a studio", "on a plain backdrop"),
    "brick": ("on a brick wall", "in front of bricks"),
    "grass": ("on grass", "on a lawn"),
}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_CLAIMED_OFFSET, _CHECKED_OFFSET = 0.20, 0.05  # a caption claims a position only where it is clear
_LEAST_AREA, _LEAST_SHARE = 0.003, 0.35  # of the picture, and of the largest piece of the same class

_NOUN_OF = {word: shape for shape, words in _NOUNS.items() for word in words}
_PLURAL = {word: "boxes" if word == "box" else word + ("es" if word == "cross" else "s") for word in _NOUN_OF}
_SHAPE_OF = _NOUN_OF | {_PLURAL[word]: shape for word, shape in _NOUN_OF.items()}
_ADJECTIVES = {word for words in _SIZE_WORDS.values() for word in words} | {"striped", "dotted"}


@dataclass(frozen=True)
class Phrase:
    """`count` solids of one shape; `colour` is None where the caption leaves it open."""

    shape: str
    colour: str | None
    count: int


@dataclass(frozen=True)
class Caption:
    """A sentence and its claims. `relation` (one of `RELATIONS`) holds from the first phrase to the second."""

    text: str
    phrases: tuple[Phrase, ...]
    relation: str | None = None
    background: str | None = None

    def __str__(self) -> str:
        return self.text


def caption(scene: "Scene", rng: random.Random) -> Caption:
    """One of many captions of a scene; every solid is named, sizes, finishes and the background often.

    Args:
        rng: chooses the phrasing; the same state gives the same caption.
    """
    groups = scene.groups()
    rng.shuffle(groups)
    relation = _relation(groups, rng)
    phrases = tuple(_phrase(group, groups, rng) for group in groups)
    words = [_noun_phrase(group, phrase, rng) for group, phrase in zip(groups, phrases, strict=True)]
    background = scene.background if rng.random() < 0.75 else None
    return Caption(_sentence(words, relation, background, rng), phrases, relation, background)


def parse(text: str) -> Caption:
    """Reads a caption's claims from its sentence.

    Raises:
        ValueError: if the text names no solid of the miniature world.
    """
    tokens = re.findall(r"[a-z]+", text.lower())
    phrases, ends = [], []
    count, colour = 1, None
    for position, token in enumerate(tokens):
        if token in _NUMBERS or token == "an":
            count, colour = _NUMBERS.index(token) + 1 if token != "an" else 1, None
        elif token in COLOURS:
            colour = token
        elif token in _SHAPE_OF:
            phrases.append(Phrase(_SHAPE_OF[token], colour, count))
            ends.append(position)
            count, colour = 1, None
    if not phrases:
        raise ValueError(
            f"{text!r} names none of {', '.join(SHAPES)}; only captions of the miniature world are checked."
        )
    between = " ".join(tokens[ends[0] + 1 : ends[1]]) if len(phrases) == 2 else ""
    relation = next((r for r, words in _RELATION_WORDS.items() if any(f"{w} " in f"{between} " for w in words)), None)
    sentence = " ".join(tokens)
    background = next((b for b in BACKGROUNDS if any(place in sentence for place in _PLACES[b])), None)
    return Caption(text, tuple(phrases), relation, background)


def shape_of_word(word: str) -> str | None:
    """The shape that a noun names, in singular or plural; None of any other word."""
    return _SHAPE_OF.get(word)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    words = set(_SHAPE_OF) | set(_NUMBERS) | set(COLOURS) | _ADJECTIVES | {"an"}
    for places in (*_PLACES.values(), *_RELATION_WORDS.values(), _FRAMES, _AND):
        words |= {word for phrase in places for word in re.findall(r"[a-z]+", re.sub(r"{\w*}", "", phrase))}
    return sorted(words)


def check(segmentation: torch.Tensor | np.ndarray, claims: Caption | str) -> dict[str, bool]:
    """Which of GenEval's questions an image answers as its caption says.

    * `object`: every named shape is there;
    * `count`: every phrase has exactly as many solids as it says, of its colour where it names one;
    * `colour` (one coloured phrase) or `colour_binding` (several): every shape is there in the colour it is given;
    * `position`: the first phrase's solid lies where the relation says, seen from the second's.

    Args:
        segmentation: class ids (H, W), as `render` gives them or a segmentation network predicts them.
        claims: a `Caption`, or a sentence for `parse`.

    Returns:
        The questions that the caption raises, in the order of `QUESTIONS`, with the answers.

    Raises:
        ValueError: if `segmentation` is not two-dimensional, or the sentence cannot be parsed.
    """
    classes_HW = np.asarray(segmentation)
    if classes_HW.ndim != 2:
        raise ValueError(f"segmentation has shape {classes_HW.shape}; expected one map (H, W) of class ids.")
    claims = parse(claims) if isinstance(claims, str) else claims
    seen = [centres(classes_HW, phrase.shape, phrase.colour) for phrase in claims.phrases]
    coloured = [bool(pieces) for phrase, pieces in zip(claims.phrases, seen, strict=True) if phrase.colour]

    answers = {
        "object": all(centres(classes_HW, phrase.shape, None) for phrase in claims.phrases),
        "count": all(len(pieces) == phrase.count for phrase, pieces in zip(claims.phrases, seen, strict=True)),
    }
    if len(coloured) == 1:
        answers["colour"] = coloured[0]
    if claims.relation:
        answers["position"] = bool(seen[0] and seen[1]) and _holds(claims.relation, seen[0][0], seen[1][0])
    if len(coloured) > 1:
        answers["colour_binding"] = all(coloured)
    return answers


def centres(classes_HW: np.ndarray, shape: str, colour: str | None) -> list[tuple[float, float]]:
    """Centres (x, y) of the solids of a shape in a segmentation map, largest first.

    In units of the shorter side. Pieces too small to be a solid do not count; `colour` None takes any.
    """
    found = []
    for name in COLOURS if colour is None else (colour,):
        mask = classes_HW == class_id(shape, name)
        if not mask.any():
            continue
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        areas = ndimage.sum_labels(mask, labels, range(1, count + 1))
        least = max(_LEAST_AREA * min(mask.shape) ** 2, _LEAST_SHARE * areas.max())
        for index in np.flatnonzero(areas >= least):
            y, x = ndimage.center_of_mass(labels == index + 1)
            found.append((areas[index], x / min(mask.shape), y / min(mask.shape)))
    return [(x, y) for _, x, y in sorted(found, reverse=True)]


def _holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    towards = RELATIONS[relation]
    return bool((first[0] - second[0]) * towards[0] + (first[1] - second[1]) * towards[1] > _CHECKED_OFFSET)


def _relation(groups: list[list[Solid]], rng: random.Random) -> str | None:
    if len(groups) != 2 or any(len(group) > 1 for group in groups) or rng.random() < 0.35:
        return None
    (first,), (second,) = groups
    dx, dy = first.x - second.x, first.y - second.y
    clear = [
        relation
        for relation, (x, y) in RELATIONS.items()
        if dx * x + dy * y > max(_CLAIMED_OFFSET, 0.6 * abs(dx * y + dy * x))
    ]
    return rng.choice(clear) if clear else None


def _phrase(group: list[Solid], groups: list[list[Solid]], rng: random.Random) -> Phrase:
    """Leaves the colour out now and then, but only where the shape alone still counts right."""
    shape, colour = group[0].pair
    alone = all(other is group or other[0].shape != shape for other in groups)
    return Phrase(shape, None if alone and rng.random() < 0.06 else colour, len(group))


def _noun_phrase(group: list[Solid], phrase: Phrase, rng: random.Random) -> str:
    first = group[0]
    noun = rng.choice(_NOUNS[phrase.shape])
    words = [rng.choice(_SIZE_WORDS[first.size])] if rng.random() < 0.6 else []
    if first.finish != "plain" and rng.random() < 0.7:
        words.append(first.finish)
    if phrase.colour:
        words.append(phrase.colour)
    words.append(noun if phrase.count == 1 else _PLURAL[noun])
    number = _NUMBERS[phrase.count - 1]
    if number == "a" and words[0][0] in "aeiou":
        number = "an"
    return " ".join([number, *words])


_FRAMES = ("{}", "{}", "a picture of {}", "{} {place}", "there is {}", "we see {}")
_AND = ("{}, {}", "{} and {}", "{} next to {}", "{} with {}")


def _sentence(nouns: list[str], relation: str | None, background: str | None, rng: random.Random) -> str:
    if relation:
        text = f"{nouns[0]} {rng.choice(_RELATION_WORDS[relation])} {nouns[1]}"
    elif len(nouns) == 2:
        text = rng.choice(_AND[1:]).format(*nouns)
    else:
        text = _AND[1].format(", ".join(nouns[:-1]), nouns[-1]) if len(nouns) > 1 else nouns[0]
    place = rng.choice(_PLACES[background]) if background else ""
    frame = rng.choice(_FRAMES)
    if place and frame == "{}" and rng.random() < 0.3:
        return f"{place}, {text}"
    text = frame.format(text, place=place).strip()
    return f"{text} {place}" if place and not text.endswith(place) else text
