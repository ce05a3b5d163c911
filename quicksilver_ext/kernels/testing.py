"""For tests, here and elsewhere: which backends there are, running on one of them, and comparing results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import (
    ops,
    reference,  # noqa: F401  (registers itself)
)


def on_device(table: Mapping[str, Callable[..., Any]], device: torch.device) -> dict[str, Callable[..., Any]]:
    """Operators for CPU tensors that run on a device: arguments are copied there, and results, and what was written to
    the arguments, back."""

    def moving(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            there = [a.to(device, copy=True) if isinstance(a, Tensor) else a for a in args]
            result = call(*there, **kwargs)
            for mine, theirs in zip(args, there):
                if isinstance(mine, Tensor):
                    mine.copy_(theirs)
            return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.cpu(), result)

        return run

    return {name: moving(call) for name, call in table.items()}


if hasattr(_C, "cuda") and torch.cuda.is_available():
    ops.register_python_backend("cuda", on_device(ops.compiled("quicksilver"), torch.device("cuda")))


def backends() -> list[str]:
    """The backends that can run on this machine."""
    names = ["reference", *(f"cpu-{isa}" for isa in _C.supported_isas())]
    if hasattr(_C, "emulated"):
        names.append("cuda-emulated")
    if hasattr(_C, "cuda") and torch.cuda.is_available():
        names.append("cuda")
    return names


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operator in quicksilver_ext.ops on a backend, and puts the former one back at the end."""
    before, isa = ops.current_backend(), _C.isa()
    ops.set_backend(name)
    try:
        yield
    finally:
        _C.set_isa(isa)
        ops.set_backend(before)


def _at(index: Tensor, shape: torch.Size) -> list[int]:
    return [int(i) for i in torch.unravel_index(index, shape)]


def assert_equal(got: Tensor, want: Tensor, what: str = "result") -> None:
    """Bit for bit, NaN equal to NaN; names the first coordinate that differs."""
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{what}: {got.dtype} {list(got.shape)}, wanted {want.dtype} {list(want.shape)}"
    )
    differs = (got != want) & ~((got != got) & (want != want))
    if differs.any():
        at = differs.nonzero()[0].tolist()
        have, wanted = got[tuple(at)].item(), want[tuple(at)].item()
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {got.numel()} differ, first at {at}: {have}, wanted {wanted}"
        )


def assert_close(got: Tensor, exact: Tensor, same_precision: Tensor, what: str = "result") -> None:
    """Compares with an exact result, by the error that PyTorch makes at the same precision.

    got             what is judged
    exact           the same in float64 (or float32, for half types)
    same_precision  what PyTorch gets in the dtype of ``got``

    NaN and infinities must be at the same places; the largest error may be at most twice PyTorch's, or a few units in
    the last place of the largest value. The worst coordinate is in the message.
    """
    assert got.shape == exact.shape, f"{what}: shape {list(got.shape)}, wanted {list(exact.shape)}"
    for kind, place in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        differs = place(got) != place(exact)
        if differs.any():
            at = differs.nonzero()[0].tolist()
            raise AssertionError(
                f"{what}: {kind} differs at {at}: {got[tuple(at)].item()}, wanted {exact[tuple(at)].item()}"
            )
    finite = exact.isfinite()
    if not finite.any():
        return
    want = exact.double().where(finite, 0.0)
    error = (got.double().where(finite, 0.0) - want).abs()
    theirs = (same_precision.double().where(finite, 0.0) - want).abs().nan_to_num(0.0, 0.0).max().item()
    floor = 4 * torch.finfo(got.dtype).eps * want.abs().max().item()
    if error.max().item() > 2 * theirs + floor:
        at = _at(error.argmax(), error.shape)
        pair = f"{got[tuple(at)].item()}, wanted {exact[tuple(at)].item()}"
        raise AssertionError(
            f"{what}: error {error.max().item():.3e} at {at} ({pair}); PyTorch's at this precision is {theirs:.3e}"
        )
