"""What the nouns of a prompt stand for, as labels at their tokens: what a text encoder has to know to bind words.

    phrases = Phrases(tokenizers.t5)
    labels_BLA = phrases.labels(words.t5)       # at "cube" in "a small red cube above a ball": red, 1, small, ...

A colour, a number, a size and a finish belong to the noun that they come before; a relation to the nouns on its two
sides, the other way round at the second. Where no noun is, labels are `NOTHING`, which a cross-entropy can ignore.

Shape suffixes: B prompts, L tokens, A attributes, V words of the vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.captions import shape_of_word
from data.world import COLOURS, FINISHES, SIZES

NOTHING = -100  # what `F.cross_entropy` ignores
UNSAID = 0
NUMBERS = (("a", "an", "the"), ("two", "both"), ("three",), ("four",))
SIDES = (("left",), ("right",), ("above", "over", "up"), ("below", "under", "down"))
OPPOSITE = (0, 2, 1, 4, 3)  # of the sides, 0 where nothing is said
WORDS_OF = {  # attribute -> the words of each of its values; value 0 is that nothing is said
    "colour": tuple((colour,) for colour in COLOURS),
    "number": NUMBERS,
    "size": tuple({"small": ("small", "little"), "large": ("large", "big")}[size] for size in SIZES),
    "finish": tuple((finish,) for finish in FINISHES),
    "side": SIDES,
}
VALUES = [1 + len(words) for words in WORDS_OF.values()]


class Phrases:
    """Reads labels off the token ids of a tokenizer that has a token a word.

    Args:
        tokenizer: T5's of the miniature.
    """

    def __init__(self, tokenizer):
        words = [word.removeprefix("▁") for word in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
        self.is_noun_V = torch.tensor([shape_of_word(word) is not None for word in words])
        self.values_AV = torch.zeros(len(WORDS_OF), len(words), dtype=torch.long)
        for row, values in zip(self.values_AV, WORDS_OF.values(), strict=True):
            for value, spellings in enumerate(values, start=1):
                for spelling in spellings:
                    row[[word == spelling for word in words]] = value

    def labels(self, ids_BL: Tensor) -> Tensor:
        """(B, L, A): values of `WORDS_OF` at nouns, `NOTHING` elsewhere."""
        ids_BL = ids_BL.cpu()
        is_noun_BL, said_ABL = self.is_noun_V[ids_BL], self.values_AV[:, ids_BL]
        labels_BLA = torch.full((*ids_BL.shape, len(WORDS_OF)), NOTHING)
        last_AB = said_ABL.new_zeros(said_ABL.shape[:2])
        for position in range(ids_BL.shape[1]):
            said_AB, is_noun_B = said_ABL[..., position], is_noun_BL[:, position]
            last_AB = torch.where(said_AB > 0, said_AB, last_AB)
            labels_BLA[is_noun_B, position] = last_AB.T[is_noun_B]
            last_AB = torch.where(is_noun_B, UNSAID, last_AB)
        labels_BLA[..., -1] = _sides(is_noun_BL, said_ABL[-1])
        return labels_BLA

    def loss(self, logits_BLV: Tensor, ids_BL: Tensor) -> Tensor:
        """Cross-entropy of all attributes at the nouns, from logits side by side: the mean over what there is."""
        labels_BLA = self.labels(ids_BL).to(logits_BLV.device)
        count = (labels_BLA[..., 0] != NOTHING).sum().clamp(min=1)
        parts = zip(logits_BLV.split(VALUES, dim=-1), labels_BLA.unbind(-1), strict=True)
        total = sum(F.cross_entropy(part.flatten(0, 1), labels.flatten(), reduction="sum") for part, labels in parts)
        return total / (count * len(VALUES))


def _sides(is_noun_BL: Tensor, said_BL: Tensor) -> Tensor:
    """The relation at the first noun, its opposite at the second one, nothing said at others, (B, L)."""
    relation_B = said_BL.gather(1, (said_BL > 0).int().argmax(1, keepdim=True)).squeeze(1)
    number_BL = is_noun_BL.cumsum(1)
    sides = torch.where(number_BL == 1, relation_B[:, None], UNSAID)
    sides = torch.where(number_BL == 2, torch.tensor(OPPOSITE)[relation_B][:, None], sides)
    return torch.where(is_noun_BL, sides, NOTHING)
