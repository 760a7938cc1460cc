"""ModernBERT (Warner et al. 2024): linear, GELU and norm as in pretraining, then a fresh linear layer."""

from __future__ import annotations

from typing import final

from torch import nn
from transformers import ModernBertForSequenceClassification, PretrainedConfig

from fedtune.models.classifier import TextClassifier


@final
class ModernBertClassifier(TextClassifier):
    """A ModernBERT sequence classifier; arguments and errors as in `TextClassifier`. Its network is called as it is.

    Files of the language model have the part `head`, those of the encoder alone have not: there it is fresh.
    """

    model_type = "modernbert"
    model_class = ModernBertForSequenceClassification

    def embeddings(self) -> nn.Module:
        """Word embeddings; positions are rotations of queries and keys."""
        return self.network.model.embeddings

    def layers(self) -> nn.ModuleList:
        """The encoder layers, lowest first."""
        return self.network.model.layers

    def set_dropout(self, config: PretrainedConfig, probability: float) -> None:
        """Of embeddings, of attention, of what comes of the layers' two parts, and before the last layer of the head."""
        config.embedding_dropout = config.attention_dropout = config.mlp_dropout = probability
        config.classifier_dropout = probability
