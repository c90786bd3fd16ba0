"""The GPU, or a device that no machine has: its tensors are held on the CPU, and refuse to mix with the CPU's.

What runs on it unchanged, with the CPU's figures, has every tensor where it belongs. PyTorch learns of the device for
the rest of the process, so tests with it run in one of their own (`test_devices.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

CPU = torch.device("cpu")


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


GPU = torch.cuda.is_available()

if not GPU:
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is NaN: whoever reads what nobody wrote fails
    backend_registration._setup_privateuseone_for_python_backend("elsewhere", _Backend())

#: The device.
ELSEWHERE = torch.device("cuda:0" if GPU else "elsewhere:0")

#: What brings tensors from one device to another.
_CROSSING = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}


class _There(Tensor):
    """A tensor that is `ELSEWHERE`, as far as anybody can see."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _There:
        seen = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=ELSEWHERE
        )
        seen.held = held
        return seen

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Python(TorchFunctionMode):
    """What no dispatch mode sees: where `torch.tensor` allocates, and what `tolist` reads."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.tolist:
            return func(args[0].cpu())
        return func(*args, **kwargs)


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """The device, for the time of a `with` block."""
    if GPU:
        yield ELSEWHERE
        return
    with _Mode(), _Python():
        yield ELSEWHERE


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(tensor.held): tensor for tensor in given if isinstance(tensor, _There)}
    strays = [tuple(tensor.shape) for tensor in given if not isinstance(tensor, _There) and tensor.ndim]
    if there and strays and func not in _CROSSING:
        raise RuntimeError(f"{func}: expected all tensors on one device, but some of shapes {strays} are on the CPU")
    device = kwargs.get("device")
    goes_there = bool(there) if device is None else torch.device(device).type == ELSEWHERE.type
    if device is not None and goes_there:
        kwargs = {**kwargs, "device": CPU}  # and no other device: transformers makes its models on `meta` first
    if func is aten.copy_.default:
        goes_there = isinstance(args[0], _There)

    def seen(value: Any) -> Any:
        if not goes_there or not isinstance(value, Tensor):
            return value
        return there.get(id(value)) if id(value) in there else _There(value)

    return tree_map(seen, func(*tree_map(_held, args), **tree_map(_held, kwargs)))


def _held(value: Any) -> Any:
    return value.held if isinstance(value, _There) else value
