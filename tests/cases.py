"""The table of configurations, which the package holds for `attnproc verify`."""

from attnproc.verify.cases import CASES, CLASSES, Case, ModuleSpec, select

__all__ = ["CASES", "CLASSES", "Case", "ModuleSpec", "select"]
