"""Weights on their way from a learner to actors: one contiguous array per module and dtype, copied once at each end.

    parameters and buffers ──1──▶ flat arrays ──2──▶ object store ══ once per node ══▶ read-only view ──3──▶ parameters

1 is `pack_weights` on the learner, 2 is Ray's (or the transfer to another node), 3 is `load_weights` on every actor, straight from
shared memory.
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

PackedWeights = dict[str, dict[str, np.ndarray]]
"""Of each module: by the name of a dtype, all its values of that dtype `[N]`; and `layout`, uint32 `[1]`."""


def pack_weights(modules: Mapping[str, Any], *, inference_only: bool = True) -> PackedWeights:
    """Copies parameters and buffers of modules into contiguous arrays.

    Args:
        modules: by name, an RLlib `TorchRLModule` each, on any device.
        inference_only: leave out what actors never use (`get_non_inference_attributes`, e.g. target networks).

    Source: design.
    """
    packed: PackedWeights = {}
    for name, module in modules.items():
        tensors = _tensors(module, inference_only=inference_only)
        packed[name] = {kind: _flatten(group) for kind, group in _by_dtype(tensors).items()}
        packed[name][LAYOUT] = _layout(tensors)
    return packed


def load_weights(modules: Mapping[str, Any], packed: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Copies packed weights into parameters and buffers, in place; modules that are not packed stay as they are.

    Args:
        modules: by name, networks of the same architecture as those that were packed.
        packed: from `pack_weights` with `inference_only`; the arrays may be read-only.

    Raises:
        InputError: a packed module is unknown, or has other names or shapes than its own.

    Source: design.
    """
    for name, arrays in packed.items():
        if name not in modules:
            raise InputError(
                f"Weights of the module '{name}' came, but the modules here are {', '.join(modules.keys())}."
            )
        tensors = _tensors(modules[name], inference_only=True)
        if not np.array_equal(arrays[LAYOUT], _layout(tensors)):
            raise InputError(
                f"The weights of the module '{name}' have other names or shapes than the module here: "
                "learner and actor were built from different settings or versions of raysseg."
            )
        for kind, group in _by_dtype(tensors).items():
            _fill(group, arrays[kind])


def weights_bytes(packed: Mapping[str, Mapping[str, np.ndarray]]) -> int:
    """Returns the bytes of all arrays. Source: design."""
    return sum(array.nbytes for arrays in packed.values() for array in arrays.values())


def _tensors(module: Any, *, inference_only: bool) -> dict[str, torch.Tensor]:
    """Returns parameters and buffers by name, those that `state_dict` has, without what actors never use."""
    left_out: tuple[str, ...] = ()
    if inference_only and isinstance(module, InferenceOnlyAPI):
        left_out = tuple(f"{attribute}." for attribute in module.get_non_inference_attributes())
    return {name: value for name, value in module.state_dict().items() if not f"{name}.".startswith(left_out)}


def _by_dtype(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    groups: dict[str, list[torch.Tensor]] = {}
    for tensor in tensors.values():
        groups.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(tensor)
    return groups


def _flatten(tensors: list[torch.Tensor]) -> np.ndarray:
    """Copies tensors of one dtype and device into one array."""
    if tensors[0].is_cuda:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        return torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat).numpy()
    # NumPy's large arrays lie in huge pages and its copies go past the cache: a fraction of what torch takes for both.
    array: np.ndarray = np.empty(sum(tensor.numel() for tensor in tensors), dtype=tensors[0].numpy().dtype)
    for part, tensor in zip(_parts(array, tensors), tensors, strict=True):
        np.copyto(part, tensor.numpy())
    return array


def _fill(tensors: list[torch.Tensor], array: np.ndarray) -> None:
    """Copies an array into tensors of one dtype and device."""
    if not tensors[0].is_cuda:
        for part, tensor in zip(_parts(array, tensors), tensors, strict=True):
            np.copyto(tensor.numpy(), part)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        flat = torch.from_numpy(array).to(tensors[0].device)
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])


def _parts(array: np.ndarray, like: list[torch.Tensor]) -> list[np.ndarray]:
    """Returns the parts of a flat array in the shapes of tensors."""
    edges = np.cumsum([0, *(tensor.numel() for tensor in like)])
    return [
        array[start:stop].reshape(tensor.shape) for start, stop, tensor in zip(edges[:-1], edges[1:], like, strict=True)
    ]


def _layout(tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    text = ";".join(f"{name}:{tensor.dtype}:{list(tensor.shape)}" for name, tensor in tensors.items())
    return np.array([zlib.crc32(text.encode())], dtype=np.uint32)
