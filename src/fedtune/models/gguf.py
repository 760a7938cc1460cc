"""A Llama in a GGUF file as what Transformers reads: plain weights, config.json, tokenizer and chat template.

GGUF is the format of llama.cpp. Its matrices may be quantised (blocks of 32 numbers share a scale), and the rows of queries and
keys lie in another order: there the two numbers that a rotary position turns together are neighbours, in Transformers they are
half a head apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedtune.tensors import Tensors

_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # of a block: its name there -> its name within a layer here
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL = 3  # the type of a token that stands for no text
_SPLITS_DIGITS = "smollm"  # how this pre-tokenizer is called there; others are not known here


class Gguf:
    """An open GGUF file of a Llama.

    Args:
        file: its path. The package gguf must be installed.

    Raises:
        ValueError: it is no GGUF file, of another architecture, or lacks something; numpy and gguf may raise others.
    """

    def __init__(self, file: Path) -> None:
        from gguf import GGUFReader

        self.reader = GGUFReader(file)
        if self.field("general.architecture") != "llama":
            raise ValueError(f"{file.name} is of the architecture {self.field('general.architecture')}, not of llama")

    def field(self, name: str) -> Any:
        """A value of the file's head. Raises `ValueError` where it is not there."""
        found = self.reader.get_field(name)
        if found is None:
            raise ValueError(f"it has no {name}")
        return found.contents()

    def config(self) -> dict[str, Any]:
        """What config.json says of the network."""
        heads, hidden = self.field("llama.attention.head_count"), self.field("llama.embedding_length")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(self.field("tokenizer.ggml.tokens")),
            "hidden_size": hidden,
            "intermediate_size": self.field("llama.feed_forward_length"),
            "num_hidden_layers": self.field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.field("llama.attention.head_count_kv"),
            "head_dim": hidden // heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.field("llama.context_length"),
            "rms_norm_eps": _shortest(self.field("llama.attention.layer_norm_rms_epsilon")),
            "rope_parameters": {"rope_type": "default", "rope_theta": _shortest(self.field("llama.rope.freq_base"))},
            "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in self.reader.tensors),
            "bos_token_id": self.field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.field("tokenizer.ggml.padding_token_id"),
        }

    def weights(self, dtype: torch.dtype) -> Tensors:
        """The tensors of a `LlamaForCausalLM` in one type of numbers."""
        from gguf import dequantize

        heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
        found = {}
        for tensor in self.reader.tensors:
            part = tensor.name.split(".")[-2]
            values = dequantize(tensor.data, tensor.tensor_type)
            if part in heads:
                values = halves(values, self.field(heads[part]))
            found[_name_of(tensor.name)] = torch.from_numpy(np.array(values, dtype=np.float32)).to(dtype)
        return found

    def tokenizer(self) -> dict[str, str]:
        """The files of the tokenizer: their names and texts."""
        import json

        tokens = self.field("tokenizer.ggml.tokens")
        special = {
            f"{name}_token": tokens[self.field(f"tokenizer.ggml.{place}_token_id")]
            for name, place in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        }
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.field("llama.context_length"),
            "clean_up_tokenization_spaces": False,
            **special,
        }
        return {
            "tokenizer.json": self._backend(tokens),
            "tokenizer_config.json": json.dumps(settings, indent=2),
            "chat_template.jinja": self.field("tokenizer.chat_template"),
        }

    def _backend(self, tokens: list[str]) -> str:
        """tokenizer.json: byte-level pairs, each digit a token of its own."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        known = (self.field("tokenizer.ggml.model"), self.field("tokenizer.ggml.pre"))
        if known != ("gpt2", _SPLITS_DIGITS):
            raise ValueError(f"its tokenizer is {' '.join(known)}, which is not known here")
        vocabulary = {token: number for number, token in enumerate(tokens)}
        pairs = [tuple(pair.split(" ")) for pair in self.field("tokenizer.ggml.merges")]
        backend = Tokenizer(models.BPE(vocabulary, pairs))
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
        backend.decoder = decoders.ByteLevel()
        kinds = self.field("tokenizer.ggml.token_type")
        control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
        return str(backend.to_str(pretty=False))


def halves(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """The rows of queries or keys, (heads * D, in), in the order of Transformers: of each head first those that were at even
    places.

    >>> halves(np.arange(8.0).reshape(8, 1), heads=2).ravel().tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _name_of(name: str) -> str:
    """The name of a tensor in Transformers. Raises `ValueError` for one that a Llama does not have."""
    *block, part, kind = name.split(".")
    if not block and part in _WHOLE:
        return f"{_WHOLE[part]}.{kind}"
    if len(block) == 2 and block[0] == "blk" and part in _PARTS:
        return f"model.layers.{block[1]}.{_PARTS[part]}.{kind}"
    raise ValueError(f"it has a tensor {name}, which no Llama has")


def _shortest(value: float) -> float:
    """A number that was kept in fp32, in the digits that it had before.

    >>> _shortest(9.999999747378752e-06)
    1e-05
    """
    return float(str(np.float32(value)))
