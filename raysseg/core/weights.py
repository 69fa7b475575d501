"""Weights on their way from a learner to actors: one contiguous array per module and dtype, with as few copies as there can be.

    learner's parameters ──1──▶ object store ══ once per node ══▶ read-only view ──2──▶ actor's parameters

1 is Ray's (on a GPU after one copy to the host), 2 is `load_weights`, straight from shared memory. Neither end gathers
anything: parameters and buffers of a module that is published or loaded lie in one block of memory, in which they keep
their shapes and names.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI

from raysseg.errors import InputError

LAYOUT = "layout"
"""Key of the checksum of names and shapes, by which a loader knows that the arrays are its own."""

_ALIGNMENT = 64
"""Bytes at whose multiples torch itself lets tensors begin."""

PackedWeights = dict[str, dict[str, np.ndarray]]
"""Of each module: by the name of a dtype, all its values of that dtype `[N]`; and `layout`, uint32 `[1]`."""


def pack_weights(modules: Mapping[str, Any]) -> PackedWeights:
    """Returns parameters and buffers of modules as contiguous arrays, without what actors never use (target networks).

    The arrays of a module on the CPU are its own memory: they say what the module is at the time they are read, so they
    belong into the object store before it learns on.

    Args:
        modules: by name, an RLlib `TorchRLModule` each, on any device; its tensors may be moved to another place in memory.

    Source: design.
    """
    packed: PackedWeights = {}
    for name, module in modules.items():
        tensors = _tensors(module)
        packed[name] = {kind: _to_host(_block(group)) for kind, group in _by_dtype(tensors).items()}
        packed[name][LAYOUT] = _layout(tensors)
    return packed


@torch.no_grad()
def load_weights(modules: Mapping[str, Any], packed: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Copies packed weights into parameters and buffers, in place; modules that are not packed stay as they are.

    Args:
        modules: by name, networks of the same architecture as those that were packed; their tensors may be moved to another
            place in memory.
        packed: from `pack_weights`; the arrays may be read-only.

    Raises:
        InputError: a packed module is unknown, or has other names or shapes than its own.

    Source: design.
    """
    for name, arrays in packed.items():
        if name not in modules:
            raise InputError(
                f"Weights of the module '{name}' came, but the modules here are {', '.join(modules.keys())}."
            )
        tensors = _tensors(modules[name])
        if not np.array_equal(arrays[LAYOUT], _layout(tensors)):
            raise InputError(
                f"The weights of the module '{name}' have other names or shapes than the module here: "
                "learner and actor were built from different settings or versions of raysseg."
            )
        for kind, group in _by_dtype(tensors).items():
            _fill(_block(group), arrays[kind])


def weights_bytes(packed: Mapping[str, Mapping[str, np.ndarray]]) -> int:
    """Returns the bytes of all arrays. Source: design."""
    return sum(array.nbytes for arrays in packed.values() for array in arrays.values())


def _tensors(module: Any) -> dict[str, torch.Tensor]:
    """Returns parameters and buffers themselves by name, those that `state_dict` has, without what actors never use."""
    left_out: tuple[str, ...] = ()
    if isinstance(module, InferenceOnlyAPI):
        left_out = tuple(f"{attribute}." for attribute in module.get_non_inference_attributes())
    state = module.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if not f"{name}.".startswith(left_out)}


def _by_dtype(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    groups: dict[str, list[torch.Tensor]] = {}
    for tensor in tensors.values():
        groups.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(tensor)
    return groups


def _block(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Returns the block of memory `[N]` that holds tensors of one dtype and device one after the other; moves them into one where
    they are not.
    """
    starts, size = _places(tensors)
    first = tensors[0]
    base, width = first.data_ptr(), first.element_size()
    storage = first.untyped_storage()
    lies_in_one = storage.nbytes() == size * width and all(
        tensor.untyped_storage().data_ptr() == storage.data_ptr() and tensor.data_ptr() == base + start * width
        for tensor, start in zip(tensors, starts, strict=True)
    )
    if lies_in_one:
        return first.detach().as_strided((size,), (1,), 0)
    block = torch.zeros(size, dtype=first.dtype, device=first.device)
    for tensor, start in zip(tensors, starts, strict=True):
        part = block[start : start + tensor.numel()].view(tensor.shape)
        part.copy_(tensor.detach())
        tensor.data = part
    return block


def _places(tensors: list[torch.Tensor]) -> tuple[list[int], int]:
    """Returns where each tensor starts in a block, and the block's length, in elements; each at a line of the cache."""
    line = _ALIGNMENT // tensors[0].element_size()
    edges = np.cumsum([0, *(-(-tensor.numel() // line) * line for tensor in tensors)]).tolist()
    return edges[:-1], edges[-1]


def _to_host(block: torch.Tensor) -> np.ndarray:
    if block.is_cuda:
        return torch.empty(block.shape, dtype=block.dtype, pin_memory=True).copy_(block).numpy()
    return block.numpy()


def _fill(block: torch.Tensor, array: np.ndarray) -> None:
    """Copies an array into a block of memory."""
    if not block.is_cuda:
        # NumPy copies past the cache, in two thirds of the time that torch takes.
        np.copyto(block.numpy(), array)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        block.copy_(torch.from_numpy(array))


def _layout(tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    text = ";".join(f"{name}:{tensor.dtype}:{list(tensor.shape)}" for name, tensor in tensors.items())
    return np.array([zlib.crc32(text.encode())], dtype=np.uint32)
