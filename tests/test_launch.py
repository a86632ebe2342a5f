"""Launches that are remembered give the kernel the same; what differs is compiled anew."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton, which is for Linux", allow_module_level=True)

from attnproc.kernels.triton.launch import Launcher, Repeated, _bound


class Compiled:
    """What Triton gives for a kernel that it compiled."""

    def __init__(self, runs: list[Any]) -> None:
        self.runs = runs

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def run(*args: Any) -> None:
            self.runs.append((grid, args))

        return run


class Kernel:
    """A kernel that counts how often Triton looks at its arguments."""

    def __init__(self) -> None:
        self.looks: list[Any] = []
        self.runs: list[Any] = []

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def look(*args: Any) -> Compiled:
            self.looks.append((grid, args))
            return Compiled(self.runs)

        return look


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def call(launcher: Launcher, x: Tensor, other: Tensor | None = None, **more: Any) -> None:
    launcher(more.get("grid", (4, 2)), (x, other), more.get("numbers", (5, 0.5)), (True, 16))


def test_a_second_call_gets_pointers_and_no_look(kernel: Kernel) -> None:
    launcher = Launcher(kernel)
    x, y = torch.zeros(4), torch.ones(4)
    call(launcher, x)
    call(launcher, y)
    assert len(kernel.looks) == 1
    assert kernel.looks[0][1][0] is x
    assert kernel.runs == [((4, 2, 1), (y.data_ptr(), None, 5, 0.5, True, 16))]


CHANGES: dict[str, dict[str, Any]] = {
    "dtype": {"x": torch.zeros(4, dtype=torch.float16)},
    "a tensor more": {"other": torch.zeros(4)},
    "a number": {"numbers": (6, 0.5)},
    "the grid": {"grid": (4, 3)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_looked_at(kernel: Kernel, change: str) -> None:
    launcher = Launcher(kernel)
    call(launcher, torch.zeros(4))
    call(launcher, **{"x": torch.zeros(4), **CHANGES[change]})
    assert len(kernel.looks) == 2
    assert not kernel.runs


def test_a_tensor_on_another_device_is_looked_at(kernel: Kernel) -> None:
    class Elsewhere(Tensor):
        def get_device(self) -> int:
            return 1

    launcher = Launcher(kernel)
    call(launcher, torch.zeros(4), torch.zeros(4))
    call(launcher, torch.zeros(4), torch.zeros(4).as_subclass(Elsewhere))
    assert len(kernel.looks) == 2
    assert not kernel.runs


def test_pointers_off_16_bytes_are_of_another_kind(kernel: Kernel) -> None:
    launcher = Launcher(kernel)
    even, odd = torch.zeros(8), torch.zeros(8)[1:]
    assert odd.data_ptr() % 16
    kinds = [(even, even), (odd, even), (even, odd), (odd, odd), (odd, None)]
    for _ in range(2):
        for x, other in kinds:
            call(launcher, x, other)
    assert [look[1][:2] for look in kernel.looks] == kinds
    pointers = [tuple(t if t is None else t.data_ptr() for t in kind) for kind in kinds]
    assert [args[:2] for _, args in kernel.runs] == pointers


def test_a_repeated_launch_is_looked_at_once(kernel: Kernel) -> None:
    launcher = Launcher(kernel)
    launch = Repeated(launcher, (4, 2), (5, 0.5), (True, 16))
    x, y = torch.zeros(4), torch.ones(4)
    launch(x, None)
    launcher.ready.clear()
    launch(y, None)
    assert kernel.looks == [((4, 2), (x, None, 5, 0.5, True, 16))]
    assert kernel.runs == [((4, 2, 1), (y.data_ptr(), None, 5, 0.5, True, 16))]


def test_a_repeated_launch_off_16_bytes_is_looked_at(kernel: Kernel) -> None:
    launch = Repeated(Launcher(kernel), (4, 2), (5, 0.5), (True, 16))
    even, odd = torch.zeros(8), torch.zeros(8)[1:]
    for x in (odd, even, odd, even):
        launch(x, None)
    assert [look[1][0] is odd for look in kernel.looks] == [True, False]
    assert [args[0] for _, args in kernel.runs] == [odd.data_ptr(), even.data_ptr()]


class Bound(Compiled):
    """With what Triton itself hands to the launch."""

    function, packed_metadata = 7, "packed"

    def __init__(self) -> None:
        super().__init__([])
        self.direct: list[Any] = []

    def run(self, *args: Any) -> None:
        self.direct.append(args)


class Driver:
    """What gives the stream of a device."""

    def get_current_stream(self, device: int) -> int:
        return 100 + device


def test_hooks_are_called_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(), raising=False)
    chain = triton.knobs.runtime.launch_enter_hook
    if not hasattr(chain, "calls"):
        pytest.skip("hooks of this Triton are no chains")
    compiled = Bound()
    launch = _bound(compiled, (4, 2), 1)
    launch(5, 0.5)
    assert compiled.direct == [(4, 2, 1, 101, 7, "packed", None, None, None, 5, 0.5)]
    assert not compiled.runs
    monkeypatch.setattr(chain, "calls", [print])
    launch(6, 0.5)
    assert len(compiled.direct) == 1
    assert compiled.runs == [((4, 2, 1), (6, 0.5))]


def test_launches_kept_are_bounded(kernel: Kernel) -> None:
    launcher = Launcher(kernel)
    for length in range(1100):
        call(launcher, torch.zeros(4), numbers=(length, 0.5))
    assert len(launcher.ready) <= 512
