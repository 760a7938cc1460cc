"""DistilBERT (Sanh et al. 2019): no pooler; a fresh `pre_classifier` with ReLU, then a fresh linear layer."""

from __future__ import annotations

from typing import final

from torch import nn
from transformers import DistilBertForSequenceClassification, PretrainedConfig

from fedtune.models.classifier import TextClassifier


@final
class DistilBertClassifier(TextClassifier):
    """A DistilBERT sequence classifier; arguments and errors as in `TextClassifier`."""

    model_type = "distilbert"
    model_class = DistilBertForSequenceClassification
    head = ("pre_classifier", "classifier")

    def embeddings(self) -> nn.Module:
        """Word and position embeddings."""
        return self.network.distilbert.embeddings

    def layers(self) -> nn.ModuleList:
        """The encoder layers, lowest first."""
        return self.network.distilbert.transformer.layer

    def set_dropout(self, config: PretrainedConfig, probability: float) -> None:
        """Of hidden states, of attention, and before the last layer of the head."""
        config.dropout = config.attention_dropout = config.seq_classif_dropout = probability
