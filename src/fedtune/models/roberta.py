"""RoBERTa (Liu et al. 2019): the whole head is fresh: linear, tanh, dropout, linear."""

from __future__ import annotations

from typing import final

from torch import nn
from transformers import PretrainedConfig, RobertaForSequenceClassification

from fedtune.models.classifier import TextClassifier


@final
class RobertaClassifier(TextClassifier):
    """A RoBERTa sequence classifier; arguments and errors as in `TextClassifier`. Its network is called as it is."""

    model_type = "roberta"
    model_class = RobertaForSequenceClassification

    def embeddings(self) -> nn.Module:
        """Word, position and token-type embeddings."""
        return self.network.roberta.embeddings

    def layers(self) -> nn.ModuleList:
        """The encoder layers, lowest first."""
        return self.network.roberta.encoder.layer

    def set_dropout(self, config: PretrainedConfig, probability: float) -> None:
        """Of hidden states, of attention, and in the head."""
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = probability
        config.classifier_dropout = probability
