"""Parts that steer a picture through its attention; each goes with every other part."""

from ..places import Box
from .perturb import BlurredQueries, Fading, Nearby
from .prompt_to_prompt import Alignment, PromptToPrompt, align
from .reference import SharedKeys
from .regions import Region, Regional
from .text import TextBefore
from .wording import Weighted, parse, tokens_of
from .words import WordWeights

__all__ = [
    "Alignment",
    "BlurredQueries",
    "Box",
    "Fading",
    "Nearby",
    "PromptToPrompt",
    "Region",
    "Regional",
    "SharedKeys",
    "TextBefore",
    "Weighted",
    "WordWeights",
    "align",
    "parse",
    "tokens_of",
]
