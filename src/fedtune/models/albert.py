"""ALBERT (Lan et al. 2020): one layer's weights used by all layers; pretrained pooler with tanh, then a fresh linear layer."""

from __future__ import annotations

from typing import final

from torch import nn
from transformers import AlbertForSequenceClassification, PretrainedConfig

from fedtune.models.classifier import TextClassifier


@final
class AlbertClassifier(TextClassifier):
    """An ALBERT sequence classifier; arguments and errors as in `TextClassifier`, where a group of layers counts as one."""

    model_type = "albert"
    model_class = AlbertForSequenceClassification

    def embeddings(self) -> nn.Module:
        """Word, position and token-type embeddings."""
        return self.network.albert.embeddings

    def layers(self) -> nn.ModuleList:
        """The groups of layers; the layers of a group share their weights, so they freeze together."""
        return self.network.albert.encoder.albert_layer_groups

    def set_dropout(self, config: PretrainedConfig, probability: float) -> None:
        """Of hidden states, of attention, and before the head."""
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = config.classifier_dropout_prob = probability
