"""What a user can put right: reported in one line, with exit status 2."""

__all__ = ["EXTRAS", "Fault", "missing"]

EXTRAS = {
    "accelerate": "diffusers",
    "diffusers": "diffusers",
    "matplotlib": "viz",
    "numpy": "viz",
    "PIL": "viz",
    "safetensors": "diffusers",
    "tokenizers": "diffusers",
    "transformers": "diffusers",
}
"""The extra that brings a package, by the package's import name."""


class Fault(Exception):
    """The message is one line that says what is wrong and what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def missing(error: ModuleNotFoundError) -> Fault | None:
    """What to install for a module that is not here; None for one that no extra brings."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return Fault(f"{package} is not installed: pip install 'attnproc[{EXTRAS[package]}]'")
