"""What a module finds in `self.trainer`: the part of Lightning's `Trainer` that has a meaning in a federation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.utilities import GradClipAlgorithmType
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from fedtune.errors import UsageError
from fedtune.federated.messages import Position

# hooks that a `Trainer` calls in `fit`, and a federation does not
_REFUSED_OF_MODULES = {
    "configure_callbacks": "callbacks given to the loop",
    "configure_sharded_model": "configure_model",
    "on_load_checkpoint": "buffers, which are part of every checkpoint",
    "on_save_checkpoint": "buffers, which are part of every checkpoint",
}
_REFUSED_OF_DATA = dict.fromkeys(("load_state_dict", "state_dict"), "data that follow from its arguments")


class ModuleTrainer:
    """Stands in for the `Trainer` of a module that is trained for a client, or evaluated.

    Args:
        module, fabric, data: what is trained, where and on what.
        accumulate_grad_batches, gradient_clip_val, gradient_clip_algorithm: as a `Trainer` has them.

    `current_epoch` and `global_step` count along the federation's schedule, as `Position` does.
    """

    world_size = num_devices = num_nodes = 1
    global_rank = local_rank = node_rank = 0
    is_global_zero, sanity_checking, predicting, barebones, interrupted = True, False, False, False, False
    fast_dev_run: bool | int = False
    max_steps, min_epochs, min_steps = -1, None, None
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    limit_test_batches: int | float = 1.0

    def __init__(
        self,
        module: pl.LightningModule,
        fabric: Fabric,
        data: Any = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.model = self.lightning_module = module
        self.datamodule = data if isinstance(data, pl.LightningDataModule) else None
        self.accumulate_grad_batches, self.gradient_clip_val = accumulate_grad_batches, gradient_clip_val
        self.gradient_clip_algorithm = GradClipAlgorithmType(gradient_clip_algorithm) if gradient_clip_algorithm else None
        self.precision, self.precision_plugin = str(fabric._precision.precision), Precision()
        self.strategy = Strategy(self, fabric.device)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.lr_scheduler_configs: list[Any] = []
        self.training = self.validating = self.testing = False
        self.current_epoch = self.global_step = 0
        self.num_training_batches: float = math.inf
        self.train_dataloader: Any = None
        self.callback_metrics: dict[str, Tensor] = {}
        self.max_epochs_, self.steps_in_all = 1, _unknown
        self.asked_for_the_end, self.on_horizon = False, _nothing
        self.loggers: list[Any] = []
        self.callbacks: list[Any] = []
        self._results: Any = None  # where `self.log` leads
        self._takes_index: dict[str, bool] = {}
        self._logger_connector = SimpleNamespace(should_reset_tensors=lambda hook: False, _current_fx=None)
        self._accelerator_connector = SimpleNamespace(is_distributed=False)
        self.default_root_dir = "."
        self.progress_bar_callback = Line(print)

    def at(self, position: Position) -> None:
        """The federation has come so far."""
        self.global_step, self.current_epoch = position.steps, position.epochs

    def plan(self, max_epochs: int, steps_in_all: Callable[[], float]) -> None:
        """Begin a phase of so many epochs; `steps_in_all` finds its optimizer steps once they are wanted."""
        self.max_epochs_, self.steps_in_all = max_epochs, functools.cache(steps_in_all)

    def takes_index(self, step: str) -> bool:
        """Whether a step of the module asks for the number of the batch."""
        if step not in self._takes_index:
            method = getattr(self.lightning_module, step)
            self._takes_index[step] = is_param_in_hook_signature(method, "batch_idx", min_args=2)
        return self._takes_index[step]

    def call(self, hook: str, *values: Any) -> Any:
        """Call a hook or a step of the module, which may log in it."""
        module = self.lightning_module
        attributes = vars(module)  # past `nn.Module.__setattr__`, which takes longer than most hooks
        before, attributes["_current_fx_name"] = attributes.get("_current_fx_name"), hook
        try:
            return getattr(module, hook)(*values)
        finally:
            attributes["_current_fx_name"] = before

    @property
    def max_epochs(self) -> int:
        """Epochs of the whole federation."""
        self._asked()
        return self.max_epochs_

    def _asked(self) -> None:
        self.asked_for_the_end = True
        self.on_horizon()

    @property
    def logger(self) -> Any:
        """The first logger, where there is one."""
        return self.loggers[0] if self.loggers else None

    @property
    def log_dir(self) -> str | None:
        """The directory of the run."""
        return self.default_root_dir

    @property
    def evaluating(self) -> bool:
        """Whether the module is being evaluated."""
        return self.validating or self.testing

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """What the last evaluation logged."""
        return self.callback_metrics

    @property
    def estimated_stepping_batches(self) -> float:
        """Optimizer steps of the whole federation: of its rounds, each as long as the client with most batches takes; infinite
        where loaders have no length."""
        self._asked()
        return self.steps_in_all()

    @property
    def should_stop(self) -> bool:
        """False: a client does its epochs."""
        return False

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        if value:
            raise UsageError("self.trainer.should_stop", value, "nothing; a FederatedCallback ends a run with run.should_stop")

    def __getattr__(self, name: str) -> Any:
        known = sorted(one for one in {*vars(type(self)), *vars(self)} if not one.startswith("_") and not one.endswith("_"))
        raise AttributeError(f"self.trainer has no {name!r} in a federation; it has {', '.join(known)}")


class Strategy:
    """The one process of a module, as its optimizers and Lightning's own methods know it."""

    def __init__(self, trainer: ModuleTrainer, device: torch.device) -> None:
        self._trainer, self.root_device = trainer, device
        self._lightning_optimizers: list[LightningOptimizer] = []
        self.before_step: Callable[[], None] = _nothing

    @property
    def lightning_module(self) -> pl.LightningModule:
        """The module."""
        return self._trainer.lightning_module

    def wrapped(self, optimizer: torch.optim.Optimizer) -> LightningOptimizer:
        """The optimizer as modules get it from `self.optimizers()`."""
        found = LightningOptimizer(optimizer)
        found._strategy = self  # type: ignore[assignment]  # what it needs of one is here
        self._lightning_optimizers = [found]
        return found

    def optimizer_step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any], **more: Any) -> Any:
        """Step; between the closure, which makes the gradients, and the step come the hooks that may change them."""

        def whole() -> Any:
            found = closure()
            self.before_step()
            return found

        return optimizer.step(closure=whole, **more)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """The tensor: there is one process."""
        return tensor

    def reduce(self, tensor: Any, *_: Any, **__: Any) -> Any:
        """The tensor: there is one process."""
        return tensor

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """The value."""
        return value

    def barrier(self, name: str | None = None) -> None:
        """Nothing."""


class Line:
    """Where `self.print` goes: above the progress bar."""

    is_enabled = True

    def __init__(self, line: Callable[[str], None]) -> None:
        self._line = line

    def print(self, *values: Any, sep: str = " ", **_: Any) -> None:
        """A line of text."""
        self._line(sep.join(map(str, values)))


def _nothing() -> None:
    return None


def _unknown() -> float:
    return math.inf


def check_module(module: Any, data: Any) -> None:
    """Refuse what a `Trainer` would do with a module and a federation doesn't, before anything is computed.

    Raises:
        UsageError: no `LightningModule`, a step that is missing, manual optimisation, a hook that nobody would call.
    """
    name = type(module).__name__
    if not isinstance(module, pl.LightningModule):
        raise UsageError("module", name, "a pytorch_lightning.LightningModule")
    for step in ("training_step", "configure_optimizers"):
        if not is_overridden(step, module):
            raise UsageError("module", name, f"a module with {step} ({name} has none)")
    if not module.automatic_optimization:
        raise UsageError("module", name, "automatic optimisation (this one optimises manually)")
    for step in ("training_step", "validation_step", "test_step"):
        if is_param_in_hook_signature(getattr(module, step), "dataloader_iter", explicit=True):
            raise UsageError("module", name, f"steps that take a batch ({step} takes dataloader_iter)")
    _refuse("module", module, _REFUSED_OF_MODULES)
    if isinstance(data, pl.LightningDataModule):
        _refuse("data", data, _REFUSED_OF_DATA)


def _refuse(argument: str, part: Any, refused: dict[str, str]) -> None:
    for hook, instead in refused.items():
        if is_overridden(hook, part):
            name = type(part).__name__
            raise UsageError(argument, name, f"one that does not override {hook}, which nobody calls; instead: {instead}")
