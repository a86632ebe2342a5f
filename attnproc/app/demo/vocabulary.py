"""The words the demo model knows: one normaliser for captions, prompts and the tokenizer file."""

import difflib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["LENGTH", "SPECIAL", "WEIGHTS", "Word", "build", "split", "suggest", "words"]

LENGTH = 24
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNKNOWN = range(4)
WEIGHTS = Path(__file__).parent / "weights"


class Word(NamedTuple):
    """One word of a prompt.

    Attributes:
        text: The word as the model reads it (lower case, no accents).
        token: Its position in the token sequence, hence its column in attention maps.
        known: Whether the model has seen it in training.
    """

    text: str
    token: int
    known: bool


def build(vocabulary: list[str]) -> "Tokenizer":
    """Makes the word-level tokenizer.

    Args:
        vocabulary: The words, each as `split` returns it; the special tokens go in front.

    Returns:
        A tokenizer that lowers case, strips accents and apostrophes, cuts at everything but
        letters and digits, and wraps the words in `<bos>` and `<eos>`.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {word: index for index, word in enumerate([*SPECIAL, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("['\u2019]"), ""),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z0-9]+"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A {SPECIAL[EOS]}",
        special_tokens=[(SPECIAL[BOS], BOS), (SPECIAL[EOS], EOS)],
    )
    return tokenizer


def split(text: str) -> list[str]:
    """Cuts a text into words exactly as the tokenizer does."""
    cutter = _cutter()
    plain: str = cutter.normalizer.normalize_str(text)
    pieces: list[tuple[str, Any]] = cutter.pre_tokenizer.pre_tokenize_str(plain)
    return [piece for piece, _ in pieces]


def words(prompt: str) -> list[Word]:
    """The words of a prompt with their token positions.

    Args:
        prompt: Any text.

    Returns:
        One `Word` each, in order; words past the model's 24 tokens are left out.
    """
    known = _known()
    return [
        Word(text, index, text in known)
        for index, text in enumerate(split(prompt)[: LENGTH - 2], start=1)
    ]


def suggest(word: str, count: int = 3) -> list[str]:
    """Known words that look like `word`, nearest first.

    Args:
        word: A word the model may not know.
        count: How many to return at most.
    """
    pieces = split(word)
    if not pieces:
        return []
    return difflib.get_close_matches(pieces[0], sorted(_known()), n=count, cutoff=0.6)


@cache
def _cutter() -> Any:
    return build([])


@cache
def _known() -> frozenset[str]:
    saved = json.loads((WEIGHTS / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    return frozenset(saved["model"]["vocab"]) - frozenset(SPECIAL)
