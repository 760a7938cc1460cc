"""The modules of the study: BERT's encoder under four heads, and DistilBERT's own, each with scaled features.

    fedtune run --model.class_path experiments.question.heads.Bert --model.init_args.head relu --model.init_args.gamma 2

Everything but the head and the scale is `TextClassifier`'s; the embeddings are frozen.

Legend: B texts, L tokens, H width of the hidden states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification, DistilBertForSequenceClassification, PretrainedConfig

from fedtune.errors import UsageError, one_of
from fedtune.models.classifier import TextClassifier
from fedtune.randomness import seeded

HEADS = ("pooler", "tanh", "saturated", "trained", "relu", "none")


class ScaledLinear(nn.Linear):
    """A linear layer of gamma times its input: the same function at first but for the scale, gamma squared the speed."""

    def __init__(self, layer: nn.Linear, gamma: float) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.gamma = gamma

    def forward(self, features_BH: Tensor) -> Tensor:
        return F.linear(self.gamma * features_BH, self.weight, self.bias)


class FirstToken(nn.Module):
    """(B, L, H) -> (B, H): in the place of a pooler, what the encoder says of the first token."""

    def forward(self, hidden_BLH: Tensor) -> Tensor:
        return hidden_BLH[:, 0]


def _drawn_seed() -> int:
    """A seed out of torch's generator, which a run seeds with `--model.seed` before it builds a module."""
    return int(torch.randint(2**31, ()))


class Bert(TextClassifier):
    """BERT's encoder.

    Args:
        head: "pooler" (what the checkpoint has, tanh), "tanh" (a fresh layer, tanh), "saturated" (ten times as large a fresh
            layer, tanh: features near 1 and -1), "trained" (a layer of `pooler`, tanh), "relu" (a fresh layer, ReLU), or
            "none".
        pooler: for "trained": file of its `dense.weight` and `dense.bias`, as torch saves them.
        gamma: what features are multiplied with before the last layer.
        optimizer, learning_rate, dropout: as in `TextClassifier`.
    """

    model_type = "bert"
    model_class = BertForSequenceClassification

    def __init__(
        self,
        name: str = "minilm",
        num_labels: int = 2,
        head: str = "pooler",
        gamma: float = 1.0,
        optimizer: str = "sgd",
        learning_rate: float = 0.1,
        dropout: float | None = 0.0,
        pooler: str | None = None,
    ) -> None:
        if head not in HEADS:
            raise one_of("head", head, HEADS)
        if (head == "trained") != (pooler is not None):
            raise UsageError("pooler", pooler, "a file with the head trained, else nothing")
        drawn = _drawn_seed()
        super().__init__(
            name,
            num_labels,
            optimizer=optimizer,
            learning_rate=learning_rate,
            dropout=dropout,
            freeze_embeddings=True,
            seed=drawn,
        )
        bert = self.network.bert
        if head == "none":
            bert.pooler = FirstToken()
        elif pooler is not None:
            bert.pooler.load_state_dict(torch.load(pooler, weights_only=True))
        elif head != "pooler":
            std = self.network.config.initializer_range * (10 if head == "saturated" else 1)
            with seeded(drawn, "head"):
                nn.init.normal_(bert.pooler.dense.weight, std=std)
                nn.init.zeros_(bert.pooler.dense.bias)
            bert.pooler.activation = nn.ReLU() if head == "relu" else nn.Tanh()
        self.network.classifier = ScaledLinear(self.network.classifier, gamma)

    def embeddings(self) -> nn.Module:
        return self.network.bert.embeddings

    def layers(self) -> nn.ModuleList:
        return self.network.bert.encoder.layer

    def set_dropout(self, config: PretrainedConfig, probability: float) -> None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = config.classifier_dropout = probability


class DistilBert(TextClassifier):
    """DistilBERT, whose head is a fresh layer with ReLU; arguments as of `Bert`, but for `head`.

    Args:
        scaled_start: the fresh `pre_classifier` begins as an orthogonal matrix, which keeps lengths, and not as N(0, 0.02).
    """

    model_type = "distilbert"
    model_class = DistilBertForSequenceClassification
    head = ("pre_classifier", "classifier")

    def __init__(
        self,
        name: str = "minilm-distilbert",
        num_labels: int = 2,
        gamma: float = 1.0,
        optimizer: str = "sgd",
        learning_rate: float = 0.1,
        dropout: float | None = 0.0,
        scaled_start: bool = False,
    ) -> None:
        drawn = _drawn_seed()
        super().__init__(
            name,
            num_labels,
            optimizer=optimizer,
            learning_rate=learning_rate,
            dropout=dropout,
            freeze_embeddings=True,
            seed=drawn,
        )
        if scaled_start:
            with seeded(drawn, "head"):
                nn.init.orthogonal_(self.network.pre_classifier.weight, gain=2**0.5)  # ReLU passes half
        self.network.classifier = ScaledLinear(self.network.classifier, gamma)

    def embeddings(self) -> nn.Module:
        return self.network.distilbert.embeddings

    def layers(self) -> nn.ModuleList:
        return self.network.distilbert.transformer.layer

    def set_dropout(self, config: PretrainedConfig, probability: float) -> None:
        config.dropout = config.attention_dropout = config.seq_classif_dropout = probability
