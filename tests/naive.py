"""The plain oracle, which the package holds for `attnproc verify`."""

from attnproc.verify.naive import attend, naive

__all__ = ["attend", "naive"]
