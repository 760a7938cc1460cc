"""Weights of one family in the architecture of another that computes the same."""

from __future__ import annotations

from fedtune.tensors import Tensors


def bert_to_distilbert(bert: Tensors) -> Tensors:
    """The weights of a BERT encoder in the architecture of DistilBERT, which computes the same hidden states.

    DistilBERT is BERT without pooler and token-type embeddings. Texts here are of token type 0 throughout, so its embedding
    is added to every position embedding; all else changes its name only.

    Args:
        bert: state of a `BertModel`.

    Returns:
        state of a `DistilBertModel` (names as within `DistilBertForSequenceClassification`, that is with "distilbert.").
    """
    renamed = {
        "attention.self.query": "attention.q_lin",
        "attention.self.key": "attention.k_lin",
        "attention.self.value": "attention.v_lin",
        "attention.output.dense": "attention.out_lin",
        "attention.output.LayerNorm": "sa_layer_norm",
        "intermediate.dense": "ffn.lin1",
        "output.dense": "ffn.lin2",
        "output.LayerNorm": "output_layer_norm",
    }
    moved = {
        f"embeddings.{name}": bert[f"embeddings.{name}"]
        for name in ("word_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
    }
    types = bert["embeddings.token_type_embeddings.weight"]
    moved["embeddings.position_embeddings.weight"] = bert["embeddings.position_embeddings.weight"] + types[0]
    for name, tensor in bert.items():
        if name.startswith("encoder.layer."):
            number, inner = name.removeprefix("encoder.layer.").split(".", 1)
            part, kind = inner.rsplit(".", 1)
            moved[f"transformer.layer.{number}.{renamed[part]}.{kind}"] = tensor
    return {f"distilbert.{name}": tensor for name, tensor in moved.items()}
