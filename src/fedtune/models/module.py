"""`PretrainedModule`: what classifiers and causal language models share."""

from __future__ import annotations

import abc
import functools
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from transformers import PreTrainedModel

from fedtune.errors import UsageError
from fedtune.models import adapter_files
from fedtune.models.adapters import is_adapter, plain_name
from fedtune.models.agreement import check_data
from fedtune.models.pretrained import max_tokens
from fedtune.models.training import optimizers_of


class PretrainedModule(pl.LightningModule, abc.ABC):
    """A network of Transformers, `network`, as a `LightningModule`; `_fresh` names those of its tensors that no file has.

    `apart` is true while a client trains with privacy of examples. The loss of a training step is then the mean over examples
    of a loss that depends on no other example, and what layers are given begins with the examples, or `by_example` makes it so.
    """

    network: PreTrainedModel
    apart: bool = False
    _fresh: set[str]

    @functools.cached_property
    def content(self) -> dict[str, str]:
        """What names the content of the files that the weights come from, by file; nothing for random weights."""
        return adapter_files.content_of_model(self.hparams)

    @property
    def from_files(self) -> frozenset[str]:
        """The tensors of the state that are as those files have them, as long as they are frozen."""
        names = [name for name in self.network.state_dict() if not is_adapter(name)]
        return frozenset(f"network.{name}" for name in names if plain_name(name) not in self._fresh)

    def setup(self, stage: str) -> None:
        """In a `Trainer`, check that its data module is for this module."""
        trainer = getattr(self, "_trainer", None)
        if trainer is not None and getattr(trainer, "datamodule", None) is not None:
            self.check_data(trainer.datamodule)

    def check_data(self, data: Any) -> None:
        """Raise `UsageError` where a `FederatedDataModule` is for other tokens, lengths or classes; learn their names."""
        check_data(self, data)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Log the metrics of the class; what it returns is said there, too."""
        return self._evaluate(batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`."""
        return self._evaluate(batch)

    def configure_optimizers(self) -> Any:
        """The optimizer over what is trained, with the warm-up as a schedule over steps."""
        return optimizers_of(self)

    def by_example(self, tensor: Tensor) -> Tensor:
        """What a layer was given or has returned in the last forward pass, with the examples as the first dimension."""
        return tensor

    @abc.abstractmethod
    def _evaluate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log the metrics of a batch."""

    def _check_length(self, ids_BL: Tensor) -> None:
        """Raise `UsageError` for token ids (B, L) that are more than the network takes."""
        longest = max_tokens(self.network.config)
        if longest is not None and ids_BL.shape[1] > longest:
            raise UsageError("max_length", ids_BL.shape[1], f"at most {longest}, the maximum of {self.hparams['name']}")
