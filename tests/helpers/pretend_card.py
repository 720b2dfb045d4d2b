"""A CUDA card that is not there: tensors that say they are on one, and compute on the CPU.

What holds on a card and not on a CPU holds here too, so that code for cards runs, with real numbers, where
there is none: tensors of two devices do not mix, a tensor on the card is no NumPy array, a CPU generator
draws nothing there, and what is copied to the host without waiting is garbage until somebody has waited.
What it cannot do is autograd's backward pass, whose threads ask for the driver.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("cuda", 0)
_aten = torch.ops.aten
_INDEXED = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default)
_MIXING = (_aten._to_copy.default, _aten.copy_.default)
_under_way: list[tuple[torch.Tensor, torch.Tensor]] = []  # copies to the host, and what they will hold


class CardTensor(torch.Tensor):
    """A tensor on the card; `values` are its numbers, on the CPU."""

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "CardTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=CARD,
        )

    def __init__(self, values: torch.Tensor) -> None:
        self.values_ = values

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"CardTensor({self.values_})"

    def tolist(self) -> Any:
        return self.values_.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __format__(self, spec: str) -> str:
        return format(self.values_, spec)


class _Card(TorchDispatchMode):
    """Sees what makes tensors out of nothing as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:  # in inference mode such functions are not yet taken apart here
                return func.decompose(*args, **(kwargs or {}))
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    here = any(isinstance(tensor, CardTensor) for tensor in tensors)
    if not here and (asked is None or asked.type == "cpu"):
        return func(*args, **kwargs)
    _refuse_mixed(func, args, tensors)
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if asked is not None:
        kwargs = {**kwargs, "device": "cpu"}
    found = func(*tree_map(_values, args), **tree_map(_values, kwargs))
    copies = func is _aten.copy_.default
    if (asked is not None and asked.type == "cpu") or (copies and not isinstance(args[0], CardTensor)):
        if here and (kwargs.get("non_blocking") or (copies and args[2:] == (True,))):
            _under_way.append((found, found.clone()))
            found.fill_(float("nan") if found.is_floating_point() else 77)
        return found
    same = {id(_values(tensor)): tensor for tensor in tensors}  # written to in place, or by out=
    return tree_map(lambda x: same[id(x)] if id(x) in same else _wrapped(x), found)


def _refuse_mixed(func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    if func in _MIXING:
        return
    if func in _INDEXED and isinstance(args[0], CardTensor):  # its indices may be on the CPU
        tensors = [tensor for tensor in (args[0], *args[2:3]) if isinstance(tensor, torch.Tensor)]
    on_card = {
        isinstance(tensor, CardTensor) for tensor in tensors if tensor.ndim or isinstance(tensor, CardTensor)
    }
    if len(on_card) == 2:
        raise RuntimeError(
            f"{func}: Expected all tensors to be on the same device, but found cuda:0 and cpu!"
        )


def _values(x: Any) -> Any:
    return x.values_ if isinstance(x, CardTensor) else x


def _wrapped(x: Any) -> Any:
    return CardTensor(x) if isinstance(x, torch.Tensor) else x


@torch.inference_mode()
def wait() -> None:
    """Let everything under way arrive."""
    for target, values in _under_way:
        target.copy_(values)
    _under_way.clear()


def _pinned(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
    if isinstance(tensor, CardTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return tensor.clone()


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.synchronize = self.wait = wait

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        wait()
        return True


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.synchronize = wait

    def record_event(self, event: Any = None) -> _Event:
        return _Event()

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass


class _Within:
    def __init__(self, *args: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass


@contextmanager
def pretend_card(free_bytes: int = 8 << 30) -> Iterator[None]:
    """Have torch believe that there is one card, with so much free memory and fast bfloat16."""
    torch.ones((), requires_grad=True).backward()  # lest autograd's threads, begun later, know of the card
    torch._C._ensureCUDADeviceGuardSet()
    with pytest.MonkeyPatch.context() as patch, _Card():
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_name": lambda device=None: "a card that is not there",
            "is_bf16_supported": lambda including_emulation=True: True,
            "mem_get_info": lambda device=None: (free_bytes, free_bytes),
            "max_memory_allocated": lambda device=None: 0,
            "synchronize": lambda device=None: wait(),
            "current_stream": lambda device=None: _Stream(),
            "Stream": _Stream,
            "Event": _Event,
            "device": _Within,
            "stream": _Within,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.backends.cudnn, "enabled", False)
        for name, value in {  # loaders ask these whether, and for what, to pin memory
            "is_available": lambda: True,
            "current_accelerator": lambda *args, **kwargs: torch.device("cuda"),
            "current_device_index": lambda: 0,
            "set_device_index": lambda device: None,
        }.items():
            patch.setattr(torch.accelerator, name, value)
        patch.setattr(torch.Tensor, "pin_memory", _pinned)
        patch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
        lifts = torch._C._only_lift_cpu_tensors()
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") then comes by here
        torch.__future__.set_overwrite_module_params_on_conversion(
            True
        )  # a Parameter cannot become another type
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
            _under_way.clear()
