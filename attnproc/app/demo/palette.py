"""Colour words of the demo model, and the combinations it never sees in training."""

__all__ = ["GROUNDS", "NOVEL_LOOKS", "NOVEL_PAIRS", "TINTS"]

Colour = tuple[int, int, int]

TINTS: dict[str, Colour] = {
    "red": (222, 32, 38),
    "orange": (245, 130, 20),
    "yellow": (250, 210, 30),
    "green": (50, 160, 60),
    "teal": (20, 160, 165),
    "blue": (40, 95, 220),
    "purple": (130, 60, 180),
    "pink": (245, 105, 170),
}

GROUNDS: dict[str, Colour] = TINTS | {
    "white": (255, 255, 255),
    "gray": (150, 150, 150),
    "grey": (150, 150, 150),
    "black": (20, 20, 20),
    "brown": (125, 80, 45),
}

# Tint and ground: every thing in these two colours is unseen.
NOVEL_LOOKS = (
    ("red", "yellow"),
    ("blue", "orange"),
    ("green", "pink"),
    ("purple", "green"),
    ("yellow", "blue"),
    ("pink", "black"),
    ("orange", "purple"),
    ("teal", "red"),
)

# Neither order of such a pair is ever shown together.
NOVEL_PAIRS = (
    ("rocket", "pizza"),
    ("octopus", "strawberry"),
    ("cactus", "bell"),
    ("fox", "mushroom"),
    ("guitar", "banana"),
    ("penguin", "balloon"),
    ("cat", "umbrella"),
    ("sunflower", "key"),
    ("turtle", "hamburger"),
    ("ghost", "lemon"),
    ("owl", "candle"),
    ("snowman", "bicycle"),
    ("whale", "avocado"),
    ("robot", "rose"),
    ("crab", "anchor"),
    ("lion", "doughnut"),
)
