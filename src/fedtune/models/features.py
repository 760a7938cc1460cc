"""How fast a classifier would begin to learn: what its last layer reads, and how steeply its loss falls at the start.

Legend: n texts, B texts of a batch, C classes, H width of what the last layer reads.

At the start the logits are nearly the same for all texts, so what there is to learn is r = (frequencies of the classes) - (the
class of the text as a unit vector), of mean square 1 - sum of squared frequencies. A small step of plain gradient descent of
rate e changes the mean loss by -e |g|^2 with g = mean of r^T df/dweights. `speed` is |g|^2 / mean |r|^2: the share of r that
is learned by a step, divided by the rate. Where only the last layer learns, a loss that is lower by d needs rate x steps of
d / (speed x mean |r|^2); where all of the network does, its features grow, and a slow classifier needs less.
It is the Rayleigh quotient of the neural tangent kernel (Jacot et al. 2018) at the labels, a sum over parts of the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.errors import UsageError

LAST, HEAD, ENCODER, EMBEDDINGS = "last layer", "rest of the head", "encoder", "embeddings"


@dataclass(frozen=True)
class Features:
    """Of a classifier on some texts, in evaluation mode.

    Args:
        texts: n.
        square: mean of |phi|^2, phi (H,) what the last layer reads.
        variance: mean of |phi - mean phi|^2: what differs between texts.
        between: mean over texts of |mean phi of the text's class - mean phi|^2, without what chance gives: what differs between
            classes.
        speed: part of the network -> its share of the speed, per step and unit of learning rate.
    """

    texts: int
    square: float
    variance: float
    between: float
    speed: dict[str, float]


def features(module: Any, batches: Iterable[dict[str, Tensor]]) -> Features:
    """Measure a `TextClassifier`, which stays as it is.

    Args:
        module: with `network` and `head`, its trained weights those that require gradients.
        batches: as its `training_step` takes them; an even number of two or more of about one size, as both halves are
            compared: the product of gradients of different texts is free of the noise that is in the square of one gradient.

    Raises:
        UsageError: no classifier with a linear last layer; fewer than two batches; texts of one class, in all or in a half.
    """
    found, last = list(batches), _last_layer(module)
    if len(found) < 2:
        raise UsageError("batches", len(found), "two or more")
    order_n = torch.cat(_labels_of_halves(found))
    kept: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda layer, given: kept.append(given[0].detach().float()))
    was = module.training
    module.eval()
    try:
        halves = [_gradient(module, found[start::2], last.out_features) for start in (0, 1)]
    finally:
        hook.remove()
        module.train(was)
        module.zero_grad()
    phi_nH = torch.cat(kept)
    residual = 1 - float((torch.bincount(order_n) / len(order_n)).square().sum())
    speed = dict.fromkeys((LAST, HEAD, ENCODER, EMBEDDINGS), 0.0)
    for name, one in halves[0].items():
        speed[_part(module, name, last)] += float((one * halves[1][name]).sum()) / residual
    return Features(len(order_n), *_moments(phi_nH, order_n), speed)


def _labels_of_halves(batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The labels of each half. Raises `UsageError` where all, or those of one half, are alike: no gradient would tell them."""
    halves = [torch.cat([batch["labels"] for batch in batches[start::2]]) for start in (0, 1)]
    if len(torch.cat(halves).unique()) < 2:
        raise UsageError("batches", f"{sum(map(len, halves))} texts of one class", "texts of two classes or more")
    for labels_n in halves:
        if len(labels_n.unique()) < 2:
            came = f"{len(labels_n)} texts of one class in every second batch"
            raise UsageError("batches", came, "texts of two classes or more in each half of the batches (are they shuffled?)")
    return halves


def _last_layer(module: Any) -> nn.Linear:
    """The linear layer that makes the logits: the last one of the head."""
    heads = [module.network.get_submodule(name) for name in getattr(module, "head", ())]  # in their order
    layers = [layer for head in heads for layer in head.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise UsageError("model", type(module).__name__, "a classifier whose head ends in a linear layer")
    return layers[-1]


def _gradient(module: Any, batches: Sequence[dict[str, Tensor]], classes: int) -> dict[str, Tensor]:
    """Name -> mean of r^T df/dweight over the texts of some batches, r of their own frequencies.

    With those of both halves, one half would have too many of a class where the other has too few, and the product of their
    gradients would be too small by what all texts have in common.
    """
    labels_n = torch.cat([batch["labels"] for batch in batches])
    frequency_C = torch.bincount(labels_n, minlength=classes) / len(labels_n)
    module.zero_grad()
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits_BC = module(**inputs).float()
        residual_BC = frequency_C - F.one_hot(batch["labels"], classes)
        ((residual_BC * logits_BC).sum() / len(labels_n)).backward()
    return {name: one.grad.clone() for name, one in module.named_parameters() if one.grad is not None}


def _part(module: Any, name: str, last: nn.Linear) -> str:
    weight = module.get_parameter(name)
    if any(weight is one for one in last.parameters()):
        return LAST
    if any(weight is one for one in module.embeddings().parameters()):
        return EMBEDDINGS
    encoder = any(weight is one for one in module.network.base_model.parameters()) and ".pooler." not in f".{name}"
    return ENCODER if encoder else HEAD  # a pretrained pooler stands between the encoder and the last layer


def _moments(phi_nH: Tensor, labels_n: Tensor) -> tuple[float, float, float]:
    """Mean square, variance, and variance between classes, each summed over H."""
    mean_H, count = phi_nH.mean(0), len(phi_nH)
    variance, between = float((phi_nH - mean_H).square().sum(1).mean()), 0.0
    for label in labels_n.unique():
        of_class = phi_nH[labels_n == label]
        size = len(of_class)
        noise = float((of_class - of_class.mean(0)).square().sum()) / max(size - 1, 1) / size  # of the class's mean
        between += size / count * (float((of_class.mean(0) - mean_H).square().sum()) - noise * (1 - size / count))
    return float(phi_nH.square().sum(1).mean()), variance, between
