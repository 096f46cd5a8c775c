"""A GPU that is not there, for what can be known of a GPU's code without one: where tensors lie, and who waits.

Its tensors hold their values in the CPU's memory and say that they lie on ``pretend:0``. As on a GPU, an operator that
is given tensors of both refuses; and as on a GPU, the host waits for all that it asked for before wherever it needs a
value: a number, a shape that depends on values, a copy from the device, or one to it that is not ``non_blocking``.
Kernels, streams, pinned memory and speed are not pretended: those need the GPU.

torch must know of the device before it first computes a gradient: :func:`register` in a new process.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from spconv.core import ConvAlgo
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import clip2scene

NAME = "pretend"
_CPU = torch.device("cpu")
_SOURCES = Path(clip2scene.__file__).parent
_WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
"""ATen's operators whose CUDA kernels end with a copy to the host."""
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_waits: list[str] = []
"""So far. Of the process, because gradients are computed in a thread of their own."""


def register() -> None:
    """Make the device known to torch, once a process."""
    backend: Any = ModuleType(NAME)
    backend.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    backend.is_available = backend.is_initialized = lambda: True
    backend._is_in_bad_fork = lambda: False
    backend.manual_seed_all = lambda seed: None
    backend.device_count, backend.current_device = lambda: 1, lambda: 0
    _setup_privateuseone_for_python_backend(NAME, backend_module=backend)


def device() -> torch.device:
    """The device; see :func:`register`."""
    return torch.device(NAME, 0)


@contextmanager
def pretended() -> Iterator[list[str]]:
    """Operators may use the device; the list fills with the places of ours that made the host wait for it, in order.

    A place is ``file: line of code``. spconv's operators on a GPU (MaskImplicitGemm) are done by those for CPUs (its
    native algorithm); the place of their waits is ``spconv``. They wait at least once for each table of neighbours, as
    sorting by thrust does; convolutions do not.
    """
    import spconv.pytorch.ops as ops

    def on_cpu(operator: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return tree_map(_there, operator(*tree_map(_here, args), **tree_map(_here, kwargs)))

        return run

    native = ConvAlgo.Native
    pairs_of, convolve, differentiate = map(on_cpu, (ops.get_indice_pairs, ops.indice_conv, ops.indice_conv_backward))

    def tables(indices_V4: Any, clouds: int, shape: Any, algorithm: Any, **given: Any) -> Any:
        _waits.append("spconv")
        names = ("ksize", "stride", "padding", "dilation", "out_padding", "subm", "transpose")
        indices, pairs, counts = pairs_of(indices_V4, clouds, shape, native, *(given[name] for name in names))
        # Where the others have masks of the neighbours of each voxel, these have numbers of pairs.
        return indices, counts, pairs, pairs.flip(0), [counts], [counts], [], [], []

    def forward(
        features: Any, weights: Any, pairs: Any, counts: Any, order: Any, size: int, *given: Any, **_: Any
    ) -> Any:
        _, is_training, is_submanifold = given[:3]
        out = convolve(features, weights, pairs, counts[0], size, False, is_submanifold, native)
        return out, out if is_training else None, 0

    def backward(features: Any, weights: Any, gradient: Any, pairs: Any, *given: Any, is_subm: bool, **_: Any) -> Any:
        return differentiate(features, weights, gradient, pairs, given[1][0], False, is_subm, native)

    _waits.clear()
    with (
        _Factories(),
        patch.multiple(
            ops, get_indice_pairs_implicit_gemm=tables, implicit_gemm=forward, implicit_gemm_backward=backward
        ),
        # In inference mode an operator that is made of others would come here whole.
        patch.multiple(torch.inference_mode, __enter__=_no_grad_begins, __exit__=_no_grad_ends),
    ):
        yield _waits


def _no_grad_begins(mode: Any) -> None:
    mode.instead = torch.no_grad()
    mode.instead.__enter__()


def _no_grad_ends(mode: Any, *error: Any) -> None:
    mode.instead.__exit__(*error)


class _There(torch.Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=device(),
        )

    def __init__(self, here: torch.Tensor):
        self.here = here

    def __repr__(self) -> str:
        return f"{self.here!r} on {self.device}"

    def tolist(self) -> Any:
        """As of any tensor of a GPU: one copy."""
        return self.cpu().tolist()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["here"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], about: None, size: Any, stride: Any) -> Any:
        return _There(inner["here"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """For operators without a tensor of the device among their arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do on the CPU what was asked of either device; a wait is noted."""
    name = func.overloadpacket.__name__
    there = _on_device((args, kwargs))
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    to_there = target is not None and target.type == NAME
    copies = name in ("_to_copy", "copy_")
    # A single number of the CPU's is sent along with the operator.
    if there and not copies and any(map(_is_on_cpu, tree_leaves((args, kwargs)))):
        raise RuntimeError(f"{func}: some of its tensors are on {device()} and some on the CPU")
    if _is_wait(name, args, kwargs, target):
        _waits.append(_place())
    if to_there:
        kwargs = kwargs | {"device": _CPU}
    elif target is not None or name == "_local_scalar_dense":
        there = False
    out = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    if name == "copy_":
        return args[0]
    if there or to_there:
        out = tree_map(_there, out)
    return out if copies else return_and_correct_aliasing(func, args, kwargs, out)


def _on_device(arguments: Any) -> bool:
    return any(isinstance(leaf, _There) for leaf in tree_leaves(arguments))


def _is_on_cpu(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not isinstance(leaf, _There) and leaf.dim() > 0


def _here(leaf: Any) -> Any:
    return leaf.here if isinstance(leaf, _There) else leaf


def _there(leaf: Any) -> Any:
    return _There(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _is_wait(name: str, args: Any, kwargs: dict[str, Any], target: torch.device | None) -> bool:
    if name in ("_to_copy", "copy_"):
        source = args[0] if name == "_to_copy" else args[1]
        goes_there = target is not None and target.type == NAME if name == "_to_copy" else isinstance(args[0], _There)
        stays = target is None and name == "_to_copy"
        asynchronous = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
        from_there = isinstance(source, _There)
        return not stays and from_there != goes_there and not (goes_there and asynchronous)
    if not _on_device((args, kwargs)):
        return False
    if name in _INDEXING:
        return any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in args[1])
    return name in _WAITING


def _place() -> str:
    """The innermost line of ours that led here."""
    for frame in reversed(traceback.extract_stack()):
        if Path(frame.filename).is_relative_to(_SOURCES):
            return f"{Path(frame.filename).relative_to(_SOURCES)}: {frame.line}"
    return "elsewhere"
