"""A prompt checked against the words that the demo model knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnproc.app.faults import Fault

if TYPE_CHECKING:
    from attnproc.app.demo.vocabulary import Word

__all__ = ["Prompt", "read"]


@dataclass(frozen=True)
class Prompt:
    """What the model is given, and what the user is told about it.

    Attributes:
        text: The known words.
        positions: Where each word stands in the token sequence.
        notes: A line for each thing that was left out.
    """

    text: str
    positions: dict[str, int]
    notes: tuple[str, ...] = ()


def read(text: str) -> Prompt:
    """Checks a prompt; goes on without the words that the model has never seen.

    Raises:
        Fault: The prompt is empty, none of its words is known, or the model's list of words can't
            be read.
    """
    from attnproc.app.demo import vocabulary

    if not text.strip():
        raise Fault('the prompt is empty, give a few words such as "red heart"')
    try:
        found = vocabulary.words(text)
    except (OSError, ValueError, KeyError) as error:
        raise Fault(
            f"demo model: its words can't be read ({error}); reinstall attnproc"
        ) from error

    known = [word.text for word in found if word.known]
    unknown = list(dict.fromkeys(word.text for word in found if not word.known))
    if not known:
        raise Fault(f"the model knows no word of {text!r}{_near(unknown)}")
    notes: list[str] = []
    if unknown:
        named = ", ".join(map(repr, unknown))
        notes.append(f"the model has never seen {named}{_near(unknown)}; going on without")
    longer = vocabulary.split(text)[len(found) :]
    if longer:
        notes.append(f"the prompt is cut after {len(found)} words, before {longer[0]!r}")
    return Prompt(" ".join(known), _labelled(vocabulary.words(" ".join(known))), tuple(notes))


def _near(unknown: Sequence[str]) -> str:
    from attnproc.app.demo import vocabulary

    near = {word: vocabulary.suggest(word) for word in unknown}
    hints = [f"near {word!r}: {', '.join(found)}" for word, found in near.items() if found]
    return f" ({'; '.join(hints)})" if hints else ""


def _labelled(words: Sequence[Word]) -> dict[str, int]:
    """Positions by word; a word that comes again is numbered."""
    seen: Counter[str] = Counter()
    positions: dict[str, int] = {}
    for word in words:
        seen[word.text] += 1
        again = seen[word.text]
        positions[word.text if again == 1 else f"{word.text} ({again})"] = word.token
    return positions
