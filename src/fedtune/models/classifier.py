"""`TextClassifier`: what all model families share.

Legend: B texts of a batch, L their padded length in tokens, C classes.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import PretrainedConfig, PreTrainedModel

from fedtune.errors import UsageError
from fedtune.models import adapter_files, weights
from fedtune.models.adapters import Lora, lora_of
from fedtune.models.module import PretrainedModule
from fedtune.models.options import check_options, set_labels
from fedtune.models.packed import PackedBatch, from_shortest
from fedtune.models.padding_free import FORWARD
from fedtune.models.pretrained import cause, load_config
from fedtune.models.sizes import check_config, check_room
from fedtune.models.training import forget_activations
from fedtune.randomness import seeded

# arguments that came later, and the values at which they do nothing: there a configuration is what it was before
_LATER = {"keep_head": False, "lora": None, "gradient_checkpointing": False}


class TextClassifier(PretrainedModule):
    """A pretrained encoder with a fresh classification head, as a `LightningModule`.

    Args:
        name: a name of `fedtune.MODELS`, a local folder or a hub id, of the family of the class.
        num_labels: number of classes C.
        init: "pretrained" weights, or "random" ones in the same architecture, for speed work and checks without the hub.
        vocab_size: with random weights: the size of the vocabulary, where the tokenizer is not the model's own.
        optimizer: "adamw" (Loshchilov and Hutter 2019) or "sgd" (plain).
        learning_rate: the learning rate after warm-up.
        weight_decay: decay of the matrices; biases and layer norms are never decayed.
        warmup_steps: steps over which the learning rate rises linearly: step s of W has s / W of it. Steps of the whole
            federation: a client that trains in round r goes on where the clients of round r - 1 stopped.
        label_smoothing: smoothing of the training loss; evaluation never smooths.
        dropout: probability of every dropout, the model's own by default.
        freeze_embeddings: the embeddings stay as they are.
        freeze_layers: the lowest so many encoder layers stay as they are.
        seed: seed of the fresh layers; the same arguments give the same weights.
        padding_free: on a CPU, padding is left out and the last layer is computed for first tokens alone
            (`fedtune.models.padding_free`): the same logits, to rounding. False calls the network as it is, for hooks that want
            a padded batch, second derivatives and `torch.func`. So it is called without a mask, compiled, and with
            gradient checkpointing.
        keep_head: take the head from the model's files, too, where it is for the same classes. It is fresh otherwise, also
            where the files have one.
        label_names: names of the C classes in their order, for the configuration of the network; the data tell them in `fit`.
        lora: low-rank adapters of linear layers, which are trained with the head while all else is frozen: a
            `fedtune.models.adapters.Lora`, or a dictionary of its arguments, as {"rank": 8, "alpha": 16}. The layers of
            `freeze_layers` have none.
        gradient_checkpointing: activations within the layers are computed again in the backward pass: less memory, more time.

    Raises:
        UsageError: a value outside of what is allowed, a model that cannot be read or is of another family.

    Batches are dicts with "input_ids" and "labels", "attention_mask" where there is padding to ignore, and for pairs of texts
    "token_type_ids", which a family without token types leaves out.
    Logged in validation and test: `loss_nats` (mean cross-entropy, a uniform guess has ln C), `accuracy`, `macro_f1`.
    """

    kind: ClassVar[str] = "texts"  # of data
    task_type: ClassVar[str] = "SEQ_CLS"  # as peft calls it
    model_type: ClassVar[str]
    model_class: ClassVar[type[PreTrainedModel]]
    head: ClassVar[tuple[str, ...]] = ("classifier",)  # the parts of the network that make up its head
    _packed: PackedBatch | None = None  # the last batch, where examples are apart

    def __init__(
        self,
        name: str = "minilm",
        num_labels: int = 2,
        init: str = "pretrained",
        optimizer: str = "adamw",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        label_smoothing: float = 0.0,
        dropout: float | None = None,
        freeze_embeddings: bool = False,
        freeze_layers: int = 0,
        seed: int = 0,
        vocab_size: int | None = None,
        padding_free: bool = True,
        keep_head: bool = False,
        label_names: Sequence[str] | None = None,
        lora: Lora | Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        adapters = adapter_files.opened(lora_of(lora), self.model_type)
        lora = None if adapters is None else adapters.plain()  # hyperparameters are plain values
        self.save_hyperparameters()
        check_options(self.hparams)
        with seeded(seed, "model"):
            self.network = self._build()
        self._freeze()
        if adapters is not None:
            frozen = self.layers()[:freeze_layers]
            adapter_files.begin(self.network, adapters, self.model_type, seed, self.trained_whole, frozen)
        if gradient_checkpointing:
            forget_activations(self.network)
        self.accuracy = MulticlassAccuracy(num_labels, average="micro")
        self.macro_f1 = MulticlassF1Score(num_labels, average="macro")

    @abc.abstractmethod
    def embeddings(self) -> nn.Module:
        """The embeddings of the network."""

    @abc.abstractmethod
    def layers(self) -> nn.ModuleList:
        """The encoder layers of the network, lowest first."""

    @abc.abstractmethod
    def set_dropout(self, config: PretrainedConfig, probability: float) -> None:
        """Set every dropout probability of a configuration of the family."""

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as the command line takes them (number and names of labels follow from the task)."""
        asked = {name: value for name, value in self.hparams.items() if name not in ("num_labels", "label_names")}
        return {name: value for name, value in asked.items() if name not in _LATER or value != _LATER[name]}

    @property
    def trained_whole(self) -> list[str]:
        """The parts of the network that are trained beside adapters: the head, and what else the files of the model lack."""
        heads = tuple(f"{part}." for part in self.head)
        fresh = [] if self.hparams["init"] == "random" else sorted(name for name in self._fresh if not name.startswith(heads))
        return [*self.head, *dict.fromkeys(name.rpartition(".")[0] for name in fresh)]

    def name_labels(self, names: Sequence[str]) -> None:
        """Give the C classes their names in the configuration of the network, as a saved model has them."""
        set_labels(self.network.config, names)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        """Logits (B, C) of token ids (B, L) with their mask (B, L), 1 where there is text, and their types (B, L)."""
        self._check_length(input_ids)
        if attention_mask is not None and self._packs(input_ids, attention_mask):
            batch = PackedBatch(input_ids, attention_mask, token_type_ids)
            self._packed = batch if self.apart else None
            return FORWARD[type(self.network)](self.network, batch)
        self._packed, more = None, {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if self.apart and type(self.network) in FORWARD:  # else one row of positions is for all texts
            more["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        logits_BC: Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask, **more).logits
        return logits_BC

    def by_example(self, tensor: Tensor) -> Tensor:
        """What a layer was given or has returned in the last forward pass, as (B, ...)."""
        return tensor if self._packed is None else self._packed.by_text(tensor)

    def _packs(self, ids_BL: Tensor, mask_BL: Tensor) -> bool:
        """Whether a batch is computed packed: on a CPU, every text with its first token, the network an ordinary one."""
        if not self.hparams["padding_free"] or ids_BL.device.type != "cpu" or ids_BL.shape != mask_BL.shape or not len(ids_BL):
            return False
        known = type(self.network) in FORWARD and not getattr(self.network.config, "is_decoder", False)
        return known and not torch.compiler.is_compiling() and not _special(self.network) and bool(mask_BL[:, 0].all())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch in nats (smoothed, where asked for)."""
        batch = from_shortest(batch) if self.apart else batch
        loss = self._loss(self._logits(batch), batch["labels"], self.hparams["label_smoothing"])
        self.log("train_loss_nats", loss, batch_size=len(batch["labels"]))
        return loss

    evaluates_by_batch = True  # `validation_step` leaves nothing behind but what its metrics count

    def _evaluate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log `loss_nats`, `accuracy` and `macro_f1`; returns {"correct": (B,) bool}."""
        logits_BC, labels_B = self._logits(batch), batch["labels"]
        self.accuracy.update(logits_BC, labels_B)
        self.macro_f1.update(logits_BC, labels_B)
        values: dict[str, Any] = {
            "loss_nats": self._loss(logits_BC, labels_B),
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
        }
        self.log_dict(values, batch_size=len(labels_B))
        return {"correct": logits_BC.argmax(-1) == labels_B}

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        typed = getattr(self.network.config, "type_vocab_size", 0) > 1
        return self(batch["input_ids"], batch.get("attention_mask"), batch.get("token_type_ids") if typed else None)

    @staticmethod
    def _loss(logits_BC: Tensor, labels_B: Tensor, smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(logits_BC.float(), labels_B, label_smoothing=smoothing)

    def _build(self) -> PreTrainedModel:
        options = self.hparams
        config = load_config(options["name"])
        if config.model_type != self.model_type:
            allowed = f"a model of the family {self.model_type} (this is {config.model_type!r})"
            raise UsageError("name", options["name"], allowed)
        check_config(options["name"], config)
        if options["keep_head"]:
            weights.check_kept_head(options["name"], options["num_labels"], options["label_names"])
        config.num_labels, config.problem_type = options["num_labels"], "single_label_classification"
        config.return_dict = True  # a folder may say otherwise; here and in a pipeline the outputs have names
        config.output_hidden_states = config.output_attentions = False
        if hasattr(config, "chunk_size_feed_forward"):
            config.chunk_size_feed_forward = 0  # the same values, but for lengths that it divides alone
        set_labels(config, options["label_names"] or [f"LABEL_{number}" for number in range(options["num_labels"])])
        if options["dropout"] is not None:
            self.set_dropout(config, options["dropout"])
        attention = "sdpa" if torch.cuda.is_available() else "eager"  # 12 % faster in bf16 on a CPU: docs/performance.md
        if options["init"] == "random":
            config.vocab_size = options["vocab_size"] or config.vocab_size
            try:
                check_room(options["name"], self.model_class, config)
                network = self.model_class._from_config(config, attn_implementation=attention)
            except UsageError:
                raise
            except Exception as error:  # what Transformers raises for a configuration that does not work is of any type
                raise UsageError("name", options["name"], f"a configuration that works ({cause(error)})") from error
            self._fresh = set(network.state_dict())
            return network.train()
        network, self._fresh = weights.read(
            self.model_class, options["name"], config, attention, self.head, options["keep_head"]
        )
        return network.train()  # from_pretrained hands over a network without dropout

    def _freeze(self) -> None:
        layers, count = self.layers(), self.hparams["freeze_layers"]
        if count > len(layers):
            raise UsageError("freeze_layers", count, f"at most {len(layers)}, the layers of {self.hparams['name']}")
        if self.hparams["freeze_embeddings"]:
            self.embeddings().requires_grad_(False)
        for layer in layers[:count]:
            layer.requires_grad_(False)


def _special(network: nn.Module) -> bool:
    """Whether a part of the network is compiled (by `nn.Module.compile`) or gives up activations to save memory."""
    return any(
        part._compiled_call_impl is not None or getattr(part, "gradient_checkpointing", False) for part in network.modules()
    )
