"""Triton kernels compiled for an H100 without one."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest

NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is for Linux"
)


def compiled(
    launcher: Any,
    fixed: tuple[Any, ...],
    types: dict[str, str],
    absent: Sequence[str] = (),
    ones: Sequence[str] = (),
) -> Any:
    """The kernel's binary for an H100, made here.

    Triton compiles a pointer that is absent and a number that is one as constants.
    """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launcher.fn
    names = kernel.arg_names
    # Arguments of compilation are the last ones.
    constants = dict(zip(names[-len(fixed) :], fixed, strict=True)) | dict.fromkeys(absent)
    constants |= dict.fromkeys(ones, 1)
    constants = {name: constants[name] for name in names if name in constants}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    return compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
