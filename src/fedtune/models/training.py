"""How a module is trained, by its options: the optimizer, and activations that are not kept."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from fedtune.errors import UsageError


def optimizers_of(module: pl.LightningModule) -> Any:
    """The optimizer over what is trained, with the warm-up as a schedule over steps; biases and norms are never decayed.

    Args:
        module: with the hyperparameters "optimizer" ("adamw" or "sgd"), "learning_rate", "weight_decay", "warmup_steps".
    """
    options: Any = module.hparams
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": options["weight_decay"]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if options["optimizer"] == "adamw" else torch.optim.SGD
    optimizer = kind(groups, lr=options["learning_rate"], fused=True)
    if not options["warmup_steps"]:
        return {"optimizer": optimizer}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / options["warmup_steps"]))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def forget_activations(network: Any) -> None:
    """Compute activations within the layers of a network of Transformers again in the backward pass.

    Raises:
        UsageError: the network cannot do so.
    """
    if not network.supports_gradient_checkpointing:
        raise UsageError("gradient_checkpointing", True, f"False, as {type(network).__name__} cannot do so")
    if hasattr(network, "activation_checkpointing_enable"):
        network.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:  # an older Transformers
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
