"""`CausalLM`: a decoder that learns the answers of conversations.

Legend: B conversations of a batch, L their padded length in tokens, H hidden size, V vocabulary, A answer tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from fedtune.errors import UsageError
from fedtune.models import adapter_files, weights
from fedtune.models.adapters import Lora, adapted, lora_of
from fedtune.models.module import PretrainedModule
from fedtune.models.options import check_causal_options
from fedtune.models.perplexity import Perplexity
from fedtune.models.pretrained import cause, load_config
from fedtune.models.rows import Rows, check_apart, makes_logits_alone
from fedtune.models.sizes import check_config, check_room
from fedtune.models.training import forget_activations
from fedtune.randomness import seeded

NO_LABEL = -100
_DROPOUTS = ("dropout", "_pdrop", "dropout_prob")
_ASIDE = ("classifier", "summary", "cls")  # dropouts of heads that a causal model does not have


@final
class CausalLM(PretrainedModule):
    """A pretrained decoder (Llama, Qwen, GPT-2, or another that Transformers maps), as a `LightningModule`.

    Args:
        name: a name of `fedtune.MODELS`, a local folder or a hub id.
        init, optimizer, learning_rate, weight_decay, warmup_steps, seed, vocab_size: as in `TextClassifier`.
        dropout: probability of every dropout that the family has, the model's own by default.
        lora: low-rank adapters of linear layers, which alone are trained: a `fedtune.models.adapters.Lora`, or a dictionary of
            its arguments, as {"rank": 8, "alpha": 16}.
        gradient_checkpointing: activations within the layers are computed again in the backward pass: less memory, more time.
        half_base: with `lora`, all that is frozen is in bf16, half the memory; then the network computes in bf16, whatever the
            precision of the run. Adapters stay in fp32.
        packing: several short conversations are computed as one row, of at most so many tokens, without attending to each
            other: the same losses and gradients, to rounding, with less padding. It is how a batch is computed, not
            what is in it.
        exact_match: log `exact_match`, too: the share of conversations whose answers greedy generation would write, token by
            token. That is so where at each place of an answer, given what stands before it, its token is the likeliest: so it
            is known from the one pass that gives the loss.

    Raises:
        UsageError: a value outside of what is allowed; a model that cannot be read, or is no causal language model.

    Batches are dicts with "input_ids" (B, L), "labels" (B, L): the ids of answers, -100 elsewhere, and "attention_mask" (B, L)
    where there is padding. A step minimises the mean over the batch's answer tokens (A); a client's weight in a federated mean
    is its number of conversations, as everywhere.
    Logged in validation and test: `loss_nats`, the mean cross-entropy over all answer tokens; `perplexity`, exp of that mean;
    `token_accuracy`, the share of answer tokens that are the likeliest, given the true ones before. There is no `accuracy`:
    a run that says nothing else monitors `loss_nats`, whose best is the least.
    """

    kind: ClassVar[str] = "instructions"
    task_type: ClassVar[str] = "CAUSAL_LM"  # as peft calls it
    trained_whole: ClassVar[tuple[str, ...]] = ()  # beside adapters
    monitor: ClassVar[tuple[str, str]] = ("loss_nats", "min")
    evaluates_by_batch = True  # evaluation leaves nothing behind but what its metrics count

    def __init__(
        self,
        name: str,
        init: str = "pretrained",
        optimizer: str = "adamw",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        dropout: float | None = None,
        seed: int = 0,
        vocab_size: int | None = None,
        lora: Lora | Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        half_base: bool = False,
        packing: int | None = None,
        exact_match: bool = False,
    ) -> None:
        super().__init__()
        family = load_config(name).model_type
        adapters = adapter_files.opened(lora_of(lora), family)
        lora = None if adapters is None else adapters.plain()  # hyperparameters are plain values
        self.save_hyperparameters()
        check_causal_options(self.hparams)
        with seeded(seed, "model"):
            self.network = self._build()
        if adapters is not None:
            adapter_files.begin(self.network, adapters, family, seed)
        if half_base:
            halve_(self.network)
        self.perplexity = Perplexity()
        self._selects = makes_logits_alone(self.network)
        if packing is not None:
            check_apart(self.network, family, packing)
        if gradient_checkpointing:
            forget_activations(self.network)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as the command line takes them, without details that are not chosen."""
        return {name: value for name, value in self.hparams.items() if name not in DETAILS or value != DETAILS[name]}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of token ids (B, L) with their mask (B, L), 1 where there is text."""
        self._check_length(input_ids)
        logits_BLV: Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits_BLV

    def answer_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What is predicted for the answers of a batch: nothing is computed of the vocabulary for other tokens.

        Returns:
            logits (A, V), the tokens that come (A,), and the number of the conversation (A,) of each.
        """
        ids_BL, mask_BL, labels_BL = batch["input_ids"], batch.get("attention_mask"), batch["labels"]
        self._check_length(ids_BL)
        conversation_A, before_A = (labels_BL[:, 1:] != NO_LABEL).nonzero(as_tuple=True)
        target_A = labels_BL[conversation_A, before_A + 1]
        if not self._selects:
            return self(ids_BL, mask_BL)[conversation_A, before_A], target_A, conversation_A
        packing = None if self.apart else self.hparams["packing"]
        rows = None if packing is None else Rows.of(ids_BL, mask_BL, packing)
        if rows is None:
            given = {"input_ids": ids_BL, "attention_mask": mask_BL}
            place = conversation_A, before_A
        else:
            given = {"input_ids": rows.ids_RW, "position_ids": rows.positions_RW}
            place = rows.row_B[conversation_A], rows.first_B[conversation_A] + before_A
        hidden_AH = self.network.base_model(**given, use_cache=False).last_hidden_state[place]
        return self.network.get_output_embeddings()(hidden_AH), target_A, conversation_A

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy over the answer tokens of the batch, in nats; where examples are `apart`, the mean over
        conversations of the mean over the answer tokens of each."""
        logits_AV, target_A, conversation_A = self.answer_logits(batch)
        if self.apart:
            each_A = F.cross_entropy(logits_AV.float(), target_A, reduction="none")
            tokens_B = torch.bincount(conversation_A, minlength=len(batch["labels"]))
            loss = (each_A / tokens_B[conversation_A]).sum() / len(batch["labels"])
        else:
            loss = F.cross_entropy(logits_AV.float(), target_A)
        self.log("train_loss_nats", loss, batch_size=len(batch["labels"]))
        return loss

    def _evaluate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log `loss_nats`, `perplexity` and `token_accuracy`; with `exact_match` that, and return {"correct": (B,) bool}."""
        logits_AV, target_A, conversation_A = self.answer_logits(batch)
        loss_A = F.cross_entropy(logits_AV.float(), target_A, reduction="none")
        right_A = logits_AV.argmax(-1) == target_A
        self.perplexity.update(loss_A)
        self.log("loss_nats", loss_A.double().mean() if loss_A.device.type != "mps" else loss_A.mean(), batch_size=len(loss_A))
        self.log("perplexity", self.perplexity, batch_size=len(loss_A))
        self.log("token_accuracy", right_A.float().mean(), batch_size=len(loss_A))
        if not self.hparams["exact_match"]:
            return {}
        wrong_B = torch.zeros(len(batch["labels"]), device=target_A.device).index_add_(0, conversation_A, (~right_A).float())
        self.log("exact_match", (wrong_B == 0).float().mean(), batch_size=len(wrong_B))
        return {"correct": wrong_B == 0}

    def _build(self) -> PreTrainedModel:
        options = self.hparams
        config = load_config(options["name"])
        kind = causal_class(options["name"], config)
        check_config(options["name"], config)
        config.return_dict = True
        config.output_hidden_states = config.output_attentions = False
        if options["dropout"] is not None:
            set_dropout(config, options["dropout"])
        attention = "sdpa" if torch.cuda.is_available() else "eager"  # no slower on a CPU, as in a classifier
        if options["init"] == "pretrained":
            network, self._fresh = weights.read(kind, options["name"], config, attention, (), False)
            if self._fresh:
                lacking = f"weights that fit the configuration (these lack {', '.join(sorted(self._fresh)[:3])})"
                raise UsageError("name", options["name"], lacking)
            return network.train()  # from_pretrained hands over a network without dropout
        config.vocab_size = options["vocab_size"] or config.vocab_size
        try:
            check_room(options["name"], kind, config)
            network = kind._from_config(config, attn_implementation=attention)
        except UsageError:
            raise
        except Exception as error:  # what Transformers raises for a configuration that does not work is of any type
            raise UsageError("name", options["name"], f"a configuration that works ({cause(error)})") from error
        self._fresh = set(network.state_dict())
        return network.train()


# what a run need not say, and the value at which it does nothing
DETAILS: dict[str, Any] = {
    "lora": None,
    "gradient_checkpointing": False,
    "half_base": False,
    "packing": None,
    "exact_match": False,
}


def halve_(network: nn.Module) -> None:
    """Keep what is frozen of a network in bf16, in place; an algorithm that moves some may make that fp32 again."""
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    for _, layer in adapted(network):
        layer.base_layer.register_forward_pre_hook(lambda layer, given: (given[0].to(layer.weight.dtype), *given[1:]))
        layer.base_layer.register_forward_hook(lambda layer, given, output: output.bfloat16())


def causal_class(name: str, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The causal language model of Transformers for a configuration.

    Raises:
        UsageError: it is of a family that reads texts in both directions, or that has no such model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if not is_causal(config):
        allowed = f"a causal language model, as llama, qwen2 or gpt2, for instructions (this is {config.model_type!r})"
        raise UsageError("name", name, allowed)
    found: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found


def is_causal(config: PretrainedConfig) -> bool:
    """Whether a configuration is of a family that reads texts in one direction, as Transformers has it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    both = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not both and not getattr(config, "is_encoder_decoder", False)


def set_dropout(config: PretrainedConfig, probability: float) -> None:
    """Set every dropout probability of a configuration.

    Raises:
        UsageError: it has none.
    """
    names = [name for name in config.to_dict() if name.endswith(_DROPOUTS) and not name.startswith(_ASIDE)]
    if not names:
        raise UsageError("dropout", probability, f"nothing, as the family {config.model_type} has no dropout")
    for name in names:
        setattr(config, name, probability)
