"""BERT (Devlin et al. 2019): pretrained pooler with tanh, then a fresh linear layer."""

from __future__ import annotations

from typing import final

from torch import nn
from transformers import BertForSequenceClassification, PretrainedConfig

from fedtune.models.classifier import TextClassifier


@final
class BertClassifier(TextClassifier):
    """A BERT sequence classifier; arguments and errors as in `TextClassifier`."""

    model_type = "bert"
    model_class = BertForSequenceClassification

    def embeddings(self) -> nn.Module:
        """Word, position and token-type embeddings."""
        return self.network.bert.embeddings

    def layers(self) -> nn.ModuleList:
        """The encoder layers, lowest first."""
        return self.network.bert.encoder.layer

    def set_dropout(self, config: PretrainedConfig, probability: float) -> None:
        """Of hidden states, of attention, and before the head."""
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = probability
        config.classifier_dropout = probability
