"""Triton kernels compiled for an H100 without one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

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


class _Driver:
    """What of Triton's driver is asked before a kernel is run."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def _stand_in(out: Any) -> Any:
    """Something of the kind and size of a graph's output."""
    value = out.meta["val"] if isinstance(out, torch.fx.Node) else out
    if isinstance(value, Tensor):
        return torch.zeros([_stand_in(size) for size in value.shape], dtype=value.dtype)
    return value.node.hint if isinstance(value, torch.SymInt) else value


def traced(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    dynamic: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, set[str]]:
    """The kernels in the graphs of a function and its gradient, and the arguments they write.

    Nothing is run: the kernels have no interpreter here, and the tensors are the CPU's.
    """
    import triton
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    found: dict[str, set[str]] = {}

    def noted(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            assert "attnproc" not in str(node.target), "an operator that is called as it is"
            if node.target is wrap.triton_kernel_wrapper_functional:
                kernel = wrap.kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                # With options of its launch a kernel comes as one that is tuned, to these alone.
                kernel = kernel.fn if hasattr(kernel, "configs") else kernel
                found[kernel.__name__] = set(node.kwargs["tensors_to_clone"])
        outs: Any = graph.graph.output_node().args[0]
        return make_boxed_func(lambda *args: [_stand_in(out) for out in outs])

    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver(), raising=False)
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=noted)
    out = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    if out.requires_grad:
        out.sum().backward()
    return found
