"""Every processor in every configuration, compared with diffusers or with stored results."""

from attnproc.verify.cases import CASES, CLASSES, Case, select

__all__ = ["CASES", "CLASSES", "Case", "select"]
