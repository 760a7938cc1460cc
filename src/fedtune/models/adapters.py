"""Low-rank adapters in a network: W + s B A in place of W, in chosen linear layers (Hu et al. 2022, LoRA), by the package peft.

Legend: r the rank, s = alpha / r the scaling, or alpha / sqrt(r) (Kalajdzievski 2023, rsLoRA). A (r, in) begins uniform within
1 / sqrt(in), B (out, r) at 0, so that a fresh adapter changes nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.errors import UsageError, one_of

ADAPTER = "default"  # peft's name of the one adapter of a layer
# family -> the layers that are adapted where none are named: what makes queries and values
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "bert": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "albert": ("query", "value"),
    "roberta": ("query", "value"),
    "modernbert": ("Wqkv",),
    "llama": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
}


@dataclass(frozen=True)
class Lora:
    """Adapters of a network, in plain values.

    Args:
        rank: r.
        alpha: a number above 0, which the scaling is made of.
        targets: the linear layers that have an adapter, by their whole names or the ends of these ("query", or
            "layer.0.attention.self.query"); those of the family in `DEFAULT_TARGETS` by default.
        rslora: the scaling is alpha / sqrt(r) rather than alpha / r.
        dropout: probability of the dropout before A.
        adapter: directory of an adapter in peft's format to begin with; rank, alpha, targets and rslora are those of its
            adapter_config.json.

    Raises:
        UsageError: a value outside of what is allowed.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    rslora: bool = False
    dropout: float = 0.0
    adapter: str | None = None

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise UsageError("lora.rank", self.rank, "a whole number, 1 or more")
        if not _number(self.alpha) or not 0 < self.alpha < math.inf:
            raise UsageError("lora.alpha", self.alpha, "a number above 0")
        if type(self.rslora) is not bool:
            raise UsageError("lora.rslora", self.rslora, "true or false")
        if not _number(self.dropout) or not 0 <= self.dropout < 1:
            raise UsageError("lora.dropout", self.dropout, "at least 0 and below 1")
        if self.adapter is not None and (not isinstance(self.adapter, str) or not self.adapter):
            raise UsageError("lora.adapter", self.adapter, "a directory of an adapter, with adapter_config.json")
        object.__setattr__(self, "targets", _names(self.targets))
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "dropout", float(self.dropout))

    @property
    def scaling(self) -> float:
        """s.

        >>> Lora(rank=4, alpha=8).scaling, Lora(rank=4, alpha=8, rslora=True).scaling
        (2.0, 4.0)
        """
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def plain(self) -> dict[str, Any]:
        """As a configuration has it."""
        found = dataclasses.asdict(self)
        return found | {"targets": None if self.targets is None else list(self.targets)}


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _names(given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) and name for name in names):
        raise UsageError("lora.targets", given, "a list of names of linear layers, or of ends of these")
    return tuple(dict.fromkeys(names))


def lora_of(given: Lora | Mapping[str, Any] | None) -> Lora | None:
    """Adapters from what a configuration has: a dictionary of some of the arguments of `Lora`, {} for all defaults.

    Raises:
        UsageError: it is something else, an argument that `Lora` does not have, or peft is not installed.
    """
    if given is None:
        return None
    if not isinstance(given, Lora):
        if not isinstance(given, Mapping):
            raise UsageError("lora", given, "a dictionary of names and values, as in {rank: 8, alpha: 16}")
        known = [item.name for item in dataclasses.fields(Lora)]
        for name in given:
            if name not in known:
                raise one_of("lora", name, known)
        given = Lora(**given)
    if importlib.util.find_spec("peft") is None:
        raise UsageError("lora", given.plain(), "after: pip install 'fedtune[lora]' (the package peft is not installed)")
    return given


def completed(lora: Lora, model_type: str) -> Lora:
    """With the default targets of a family, where none are named.

    Raises:
        UsageError: there are none.
    """
    if lora.targets is not None:
        return lora
    if model_type not in DEFAULT_TARGETS:
        allowed = f"names of linear layers (there are default ones for {', '.join(DEFAULT_TARGETS)}, this is {model_type!r})"
        raise UsageError("lora.targets", None, allowed)
    return dataclasses.replace(lora, targets=DEFAULT_TARGETS[model_type])


def target_layers(
    network: nn.Module, targets: Sequence[str], head: Sequence[str] = (), still: Iterable[nn.Module] = ()
) -> list[str]:
    """The names of the linear layers that are meant.

    Args:
        head: parts of the network that are trained whole, and so have no adapters.
        still: modules that stay as they are, and so have none, either.

    Raises:
        UsageError: a target that means none, or one that shares its weights with another layer.
    """
    left_out = {id(part) for module in still for part in module.modules()}
    heads = tuple(f"{part}." for part in head)
    known = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and not f"{name}.".startswith(heads) and id(layer) not in left_out
    }
    found: dict[str, None] = {}
    for target in targets:
        meant = [name for name in known if f".{name}".endswith(f".{target}")]
        if not meant:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in known})) or "none, as there is no linear layer"
            raise UsageError("lora.targets", target, f"names of linear layers beside the head, or ends of these: {ends}")
        found |= dict.fromkeys(meant)
    owners = [id(one) for _, one in network.named_parameters(remove_duplicate=False)]
    for name in found:
        if owners.count(id(known[name].weight)) > 1:
            raise UsageError("lora.targets", name, "layers with weights of their own (it shares them with another layer)")
    return [name for name in known if name in found]


def add_adapters(
    network: nn.Module, lora: Lora, model_type: str, head: Sequence[str] = (), still: Iterable[nn.Module] = ()
) -> list[str]:
    """Give a network adapters, in place: they and the head are trained, all else is frozen.

    A layer `query` becomes `query.base_layer`, `query.lora_A.default` and `query.lora_B.default` (peft's `LoraLayer`). Adapters
    are in fp32 and drawn from torch's global generator, so the caller seeds it; a base in half precision is made so afterwards.

    Args:
        lora: its `adapter` is not read here, see `adapter_files.load`.
        head, still: as in `target_layers`.

    Returns:
        the names of the adapted layers.

    Raises:
        UsageError: as `target_layers` and `completed`, or peft is not installed.
    """
    lora_of(lora)
    from peft import LoraConfig, inject_adapter_in_model

    names = target_layers(network, completed(lora, model_type).targets or (), head, still)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=names,
        fan_in_fan_out=any(isinstance(network.get_submodule(name), Conv1D) for name in names),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # it is, as each layer needs it
        inject_adapter_in_model(config, network, ADAPTER)
    for _, layer in adapted(network):
        layer.lora_A.float(), layer.lora_B.float()
    for part in head:
        network.get_submodule(part).requires_grad_(True)
    return names


def adapted(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have adapters, with their names."""
    for name, layer in network.named_modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "lora_A"):
            yield name, layer


def is_adapter(name: str) -> bool:
    """Whether a tensor of a network is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def plain_name(name: str) -> str:
    """The name that a tensor has in a network without adapters.

    >>> plain_name("bert.encoder.layer.0.attention.self.query.base_layer.weight")
    'bert.encoder.layer.0.attention.self.query.weight'
    """
    return name.replace(".base_layer.", ".")


def merge_(network: nn.Module) -> None:
    """Add each adapter to the weights of its layer, and leave a network without adapters, in place."""
    for name, layer in list(adapted(network)):
        layer.merge()
        network.set_submodule(name, layer.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config
