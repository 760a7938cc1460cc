"""The networks of the families of the paper on packed batches: the same logits and gradients, to rounding, for less work.

Embeddings, linear layers, activations and norms work on single tokens; in a padded batch of short texts much of what they do
is for padding. And a classifier reads first tokens only, so the last layer is computed for them alone. What is called are the
parts of the Hugging Face network, in its order.

Legend as in `packed`. A network is one function in `FORWARD`; one that has none is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AlbertForSequenceClassification, BertForSequenceClassification, DistilBertForSequenceClassification

from fedtune.models.packed import PackedBatch

Layer = Callable[[Any, Tensor, Tensor, PackedBatch], Tensor]


def _through(layers: Sequence[Any], hidden_TH: Tensor, batch: PackedBatch, apply: Layer) -> Tensor:
    """(B, H): the first tokens after all layers. `apply` gives one layer's result for some rows of its input."""
    *lower, last = layers
    for layer in lower:
        hidden_TH = apply(layer, hidden_TH, hidden_TH, batch)
    return apply(last, hidden_TH, hidden_TH[batch.first_B], batch)[batch.back_B]


def _places(batch: PackedBatch) -> dict[str, Tensor | None]:
    """Positions and types of the tokens, as the embeddings take them; without types all are of the first."""
    return {
        "position_ids": batch.positions_T[None],
        "token_type_ids": None if batch.types_T is None else batch.types_T[None],
    }


def _bert_layer(layer: Any, hidden_TH: Tensor, rows_RH: Tensor, batch: PackedBatch) -> Tensor:
    part = layer.attention.self
    projected = part.query(rows_RH), part.key(hidden_TH), part.value(hidden_TH)
    context_RH = batch.attend(*projected, part.num_attention_heads, part.dropout)
    result_RH: Tensor = layer.feed_forward_chunk(layer.attention.output(context_RH, rows_RH))
    return result_RH


def bert(network: Any, batch: PackedBatch) -> Tensor:
    """Logits (B, C) of a `BertForSequenceClassification`."""
    hidden_1TH = network.bert.embeddings(batch.ids_T[None], **_places(batch))
    first_BH = _through(network.bert.encoder.layer, hidden_1TH[0], batch, _bert_layer)
    logits_BC: Tensor = network.classifier(network.dropout(network.bert.pooler(first_BH[:, None])))
    return logits_BC


def _distilbert_layer(layer: Any, hidden_TH: Tensor, rows_RH: Tensor, batch: PackedBatch) -> Tensor:
    part = layer.attention
    projected = part.q_lin(rows_RH), part.k_lin(hidden_TH), part.v_lin(hidden_TH)
    context_RH = part.out_lin(batch.attend(*projected, part.n_heads, part.dropout))
    attended_RH = layer.sa_layer_norm(context_RH + rows_RH)
    result_RH: Tensor = layer.output_layer_norm(layer.ffn.ff_chunk(attended_RH) + attended_RH)
    return result_RH


def distilbert(network: Any, batch: PackedBatch) -> Tensor:
    """Logits (B, C) of a `DistilBertForSequenceClassification`."""
    hidden_1TH = network.distilbert.embeddings(batch.ids_T[None], position_ids=batch.positions_T[None])
    first_BH = _through(network.distilbert.transformer.layer, hidden_1TH[0], batch, _distilbert_layer)
    logits_BC: Tensor = network.classifier(network.dropout(network.pre_classifier(first_BH).relu()))
    return logits_BC


def _albert_layer(layer: Any, hidden_TH: Tensor, rows_RH: Tensor, batch: PackedBatch) -> Tensor:
    part = layer.attention
    projected = part.query(rows_RH), part.key(hidden_TH), part.value(hidden_TH)
    context_RH = part.dense(batch.attend(*projected, part.num_attention_heads, part.attention_dropout))
    attended_RH = part.LayerNorm(rows_RH + part.output_dropout(context_RH))
    result_RH: Tensor = layer.full_layer_layer_norm(layer.ff_chunk(attended_RH) + attended_RH)
    return result_RH


def albert(network: Any, batch: PackedBatch) -> Tensor:
    """Logits (B, C) of an `AlbertForSequenceClassification`, where the layers of a group are applied again and again."""
    model = network.albert
    embedded_1TE = model.embeddings(batch.ids_T[None], **_places(batch))
    groups, count = model.encoder.albert_layer_groups, network.config.num_hidden_layers
    used = [groups[int(number / (count / len(groups)))] for number in range(count)]
    layers = [layer for group in used for layer in group.albert_layers]
    first_BH = _through(layers, model.encoder.embedding_hidden_mapping_in(embedded_1TE)[0], batch, _albert_layer)
    logits_BC: Tensor = network.classifier(network.dropout(model.pooler_activation(model.pooler(first_BH))))
    return logits_BC


FORWARD: dict[type[nn.Module], Callable[[Any, PackedBatch], Tensor]] = {
    BertForSequenceClassification: bert,
    DistilBertForSequenceClassification: distilbert,
    AlbertForSequenceClassification: albert,
}
