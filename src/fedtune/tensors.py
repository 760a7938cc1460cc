"""Tensors by name: what of a module travels between server and clients, and the arithmetic done on it.

Trainable parameters and floating-point buffers travel; frozen parameters and counters stay where they are.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import math
import zlib
from collections.abc import Callable, Container, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedtune.files import regular
from fedtune.threads import uninterrupted

Tensors = dict[str, Tensor]
Groups = dict[str, Tensors]

_BLOCK = 2**17  # elements


def travelling(module: nn.Module) -> Tensors:
    """The tensors of `module` that travel: live references, not copies (tied parameters once)."""
    return trainable(module) | buffers(module)


def trainable(module: nn.Module) -> Tensors:
    """The parameters of `module` that are trained: live references."""
    return {name: tensor.detach() for name, tensor in module.named_parameters() if tensor.requires_grad}


def buffers(module: nn.Module) -> Tensors:
    """The floating-point buffers of `module` that are part of its state: live references."""
    kept = module.state_dict(keep_vars=True).keys()
    return {name: tensor for name, tensor in module.named_buffers() if name in kept and tensor.is_floating_point()}


def resting(module: nn.Module) -> Tensors:
    """What does not travel: frozen parameters, buffers of whole numbers or not part of the state. Live, tied ones once."""
    known = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    known |= {id(buffer) for buffer in buffers(module).values()}
    found: Tensors = {}
    for name, tensor in {**module.state_dict(keep_vars=True), **dict(module.named_buffers())}.items():
        if isinstance(tensor, Tensor) and id(tensor) not in known:
            known.add(id(tensor))
            found[name] = tensor.detach()
    return found


def frozen(module: nn.Module) -> Tensors:
    """The parameters of `module` that are not trained: live references."""
    return {name: tensor.detach() for name, tensor in module.named_parameters() if not tensor.requires_grad}


def carried(module: nn.Module, names: Container[str]) -> Tensors:
    """What travels, and of the frozen parameters those with these names: all that the server has. Live references."""
    return travelling(module) | {name: tensor for name, tensor in frozen(module).items() if name in names}


def counters(module: nn.Module) -> Tensors:
    """The buffers of `module` that do not travel, as they are whole numbers, flags or not part of its state, and which training
    may change all the same: live references."""
    travel = buffers(module)
    return {name: tensor for name, tensor in module.named_buffers() if name not in travel}


@torch.no_grad()
def restore_counters(module: nn.Module, kept: Tensors) -> None:
    """Give a module the counters of a snapshot; those that are of another shape by now are replaced."""
    for name, tensor in counters(module).items():
        before = kept.get(name)
        if before is None or torch.equal(before, tensor):
            continue
        if before.shape == tensor.shape and before.dtype == tensor.dtype and torch._debug_has_internal_overlap(tensor) != 1:
            tensor.copy_(before)
        else:
            owner, _, last = name.rpartition(".")
            module.get_submodule(owner)._buffers[last] = before.clone()


def sharing(written: Tensors, read: Tensors) -> tuple[str, str] | None:
    """The names of two tensors that share an element, of which the first is written to, or of one (twice) whose own elements
    share memory; None where there are none.

    Args:
        written: what is written to.
        read: others of the module.
    """
    owners: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in {**written, **read}.items():
        if tensor.numel() and tensor.layout == torch.strided and tensor.device.type != "meta":
            if name in written and torch._debug_has_internal_overlap(tensor) == 1:
                return name, name
            owners.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    for tensors in owners.values():
        for (name, tensor), (other, another) in itertools.combinations(tensors, 2):
            if name in written and torch.isin(_places(tensor), _places(another)).any():
                return name, other
    return None


def _places(tensor: Tensor) -> Tensor:
    """The bytes of a storage at which the elements of a tensor begin."""
    found = torch.tensor([tensor.storage_offset()])
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = (found[:, None] + torch.arange(size) * stride).view(-1)
    return found * tensor.element_size()


def snapshot(tensors: Mapping[str, Tensor]) -> Tensors:
    """An independent copy."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def assign_(target: Tensors, source: Tensors) -> None:
    """Copy `source` into the tensors of `target`: 0.09 s for BERT-base, where `load_state_dict` takes 0.60 s."""
    if target:
        torch._foreach_copy_(list(target.values()), [source[name] for name in target])


@torch.no_grad()
def subtract_(target: Tensors, source: Tensors) -> None:
    """target -= source; 0 where both are the same infinity, or both no number."""
    for name, tensor in target.items():
        same = (tensor == source[name]) | (tensor.isnan() & source[name].isnan())
        tensor.sub_(source[name]).masked_fill_(same, 0)


@torch.no_grad()
def distance(one: Tensors, other: Tensors) -> float:
    """The Euclidean distance, without a copy of the tensors."""
    square = 0.0
    for name, tensor in one.items():
        ours, theirs = tensor.reshape(-1), other[name].reshape(-1)
        for start in range(0, len(ours), _BLOCK):
            difference = (ours[start : start + _BLOCK] - theirs[start : start + _BLOCK]).double()
            square += float(torch.dot(difference, difference))
    return math.sqrt(square)


def digest(tensors: Tensors) -> str:
    """Sixteen hexadecimal digits that name these tensors, in their order."""
    return _hashed(tensors)[:16]


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, shapes, types and bytes, whatever the order: what a file says of its own content."""
    return _hashed({name: tensors[name] for name in sorted(tensors)})


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Eight hexadecimal digits of names, shapes, types and bytes, whatever the order: enough for damage, at half the cost."""
    names = sorted(tensors)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        sums = pool.map(lambda name: zlib.crc32(_bytes(tensors[name])), names)
        said = [
            f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype} {one}" for name, one in zip(names, sums, strict=True)
        ]
    return f"{zlib.crc32(' '.join(said).encode()):08x}"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _hashed(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def misfit(found: Tensors, expected: Tensors) -> str | None:
    """How tensors differ from others in names, shapes or types; None where they don't."""
    for name in {**expected, **found}:
        one, other = found.get(name), expected.get(name)
        if one is None or other is None:
            return f"{name} is {'missing' if one is None else 'not expected'}"
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{name} is {tuple(one.shape)} {one.dtype}, where {tuple(other.shape)} {other.dtype} belongs"
    return None


def mapped(groups: Groups, change: Callable[[str, Tensor], Tensor]) -> Groups:
    """New groups of changed tensors; `change` is given the name and the tensor."""
    return {group: {name: change(name, tensor) for name, tensor in tensors.items()} for group, tensors in groups.items()}


def joined(groups: Groups) -> Tensors:
    """Groups as one, named "group/tensor", as files keep them."""
    return {f"{group}/{name}": tensor.contiguous() for group, tensors in groups.items() for name, tensor in tensors.items()}


def parted(tensors: Tensors) -> Groups:
    """The groups that `joined` made one."""
    found: Groups = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        found.setdefault(group, {})[name] = tensor
    return found


def without(tensors: Tensors, names: Container[str]) -> Tensors:
    """The tensors with other names."""
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def read_file(file: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Raises:
        OSError, SafetensorError, ValueError, RuntimeError: it is none, or cannot be read.
    """
    regular(file)
    with uninterrupted(), safe_open(file, framework="pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}  # noqa: SIM118 - no dictionary


def num_bytes(tensors: Tensors) -> int:
    """Bytes that one transfer of the tensors takes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
