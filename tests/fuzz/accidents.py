"""What can happen to a folder of a model in hub format: to its JSON, its tensors, its vocabulary, and to its files as such."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import SPECIAL, WORDS
from safetensors.torch import load_file, save_file
from test_folders import NEW, OTHERS, WAYS

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 4, -1, -100, 7, 44, 45, 10**5, 10**9, 2**31, 2**63, 10**30, 0.5, 1.5, 1e300, -1e-12),
    *(float("nan"), float("inf"), "", "0", "16", "nan", "x" * 5000, "a\u2028b", "\ud800", "🙂", "/dev/zero", "../..", "[UNK]"),
    *("gelu", "relu", "bert", "roberta", "longest_first", "left", "flash_attention_2", "float16", "LABEL_0", "word3"),
    *([], {}, [[]], [None], [1, 2], {"a": None}, {"0": "a"}, {"x": "a"}, {"0": 1, "1": None}, {"": {"": {"": []}}}),
    *([["word1", "word2"]], {"content": "word3"}, {"type": "Sequence"}, {"word1": 5, "word2": 5}, [{"id": 1}]),
]
SETTINGS: dict[str, list[tuple[str, list[Any]]]] = {
    "adapter_config.json": [
        ("r", [1, 2, 3, 4, 0, -1, None, "2", 2.0, True, 10**9]),
        ("lora_alpha", [1, 2.5, 0, -3, None, "4", True, 10**30]),
        (
            "target_modules",
            [["query"], ["query", "value", "key"], ["value", "query"], "query", "all-linear", [], [1], None, {}],
        ),
        ("use_rslora", [True, False, None, 1, "true"]),
        ("lora_dropout", [0.5, 0, None, -1, "x", 2]),
        ("modules_to_save", [None, [], ["classifier", "pooler"], ["x"], "classifier"]),
        ("fan_in_fan_out", [True, None]),
        ("init_lora_weights", [True, False, "gaussian", "pissa", "olora", "loftq", None, 5, []]),
        ("bias", ["none", "all", "lora_only", None, 5]),
        ("peft_type", ["LORA", "IA3", "lora", None, 5, []]),
        ("task_type", ["SEQ_CLS", "CAUSAL_LM", None, 5]),
        ("use_dora", [True, False, None]),
        ("lora_bias", [True]),
        ("rank_pattern", [{}, {"query": 1}, None, "query"]),
        ("alpha_pattern", [{}, {"query": 1}, None]),
        ("layers_to_transform", [None, 0, [0], []]),
        ("exclude_modules", [None, ["query"], "x"]),
        ("layer_replication", [None, [[0, 1]]]),
        ("target_parameters", [None, ["query.weight"]]),
        ("trainable_token_indices", [None, [1, 2]]),
        ("base_model_name_or_path", ["nobody/none", None, 5, "/dev/zero"]),
    ],
    "config.json": [
        ("model_type", ["bert", "distilbert", "albert", "roberta", "gpt2", "t5", "mine", "auto", "longformer", "xlm-roberta"]),
        ("auto_map", [{"AutoConfig": "mine.Config"}, {"AutoModel": "mine.Model"}, "mine", [], ["a"]]),
        ("trust_remote_code", [True]),
        ("architectures", [["GPT2LMHeadModel"], ["BertForMaskedLM"], None, "x"]),
        ("id2label", [{"0": "a", "1": "b", "2": "c"}, {"0": 1, "1": 2, "2": 3}, {"x": "a"}, {"0": None}, ["a", "b", "c"], {}]),
        ("label2id", [{"a": 0}, {"a": "0"}, [], None]),
        ("num_labels", [3, 2, -1, "3", 10**9, None, 0]),
        ("quantization_config", [{}, {"quant_method": "fp8"}, {"load_in_8bit": True}, {"quant_method": "gptq", "bits": 4}, 5]),
        ("layer_norm_eps", [float("nan"), -1.0, 0, 1e300, "1e-12", 1]),
        ("hidden_dropout_prob", [float("nan"), 2, -1, 1, 1.0, "0.1", None]),
        ("attention_probs_dropout_prob", [float("nan"), 2, 1, "0.1"]),
        ("classifier_dropout", [float("nan"), 2, 1, "0.1"]),
        ("classifier_dropout_prob", [float("nan"), 2, 1, "0.1"]),
        ("seq_classif_dropout", [float("nan"), 2, 1, "0.1"]),
        ("initializer_range", [float("nan"), float("inf"), -1, 0, 1e300, "0.02"]),
        ("hidden_act", ["relu", "gelu_new", "tanh", "none", "linear", None, 5, ["gelu"], "quick_gelu"]),
        ("activation", ["relu", "none", None]),
        ("num_hidden_layers", [0, 1, 3, 10**4, 10**9, -1]),
        ("n_layers", [0, 1, 3, 10**9, -1]),
        ("num_attention_heads", [1, 4, 3, 0, -2, 10**9]),
        ("hidden_size", [0, 8, 32, 10**9, 65536]),
        ("dim", [0, 8, 32, 10**9, 65536]),
        ("embedding_size", [0, 16, 10**9]),
        ("intermediate_size", [0, 8, 10**9, 10**8]),
        ("vocab_size", [0, 1, 44, 46, 64, 10**9, 10**8]),
        ("max_position_embeddings", [0, 1, 8, 64, 10**9, -5, None, "512", 512.0]),
        ("type_vocab_size", [0, 1, 3, 10**9]),
        ("pad_token_id", [None, 44, 45, -1, -46, 1.0, "0"]),
        ("num_hidden_groups", [0, 2, 10**9]),
        ("inner_group_num", [0, 2, 10**9]),
        ("is_decoder", [True]),
        ("add_cross_attention", [True]),
        ("torchscript", [True]),
        ("output_attentions", [True]),
        ("output_hidden_states", [True, "yes"]),
        ("return_dict", [False]),
        ("use_return_dict", [False]),
        ("gradient_checkpointing", [True]),
        ("chunk_size_feed_forward", [3, -1, "x"]),
        ("pruned_heads", [{"0": [0]}, {"9": [0]}, [1]]),
        ("position_embedding_type", ["relative_key", "none"]),
        ("tie_word_embeddings", [False]),
        ("dtype", ["float16", "int8", "float8_e4m3fn", "x", None, 5]),
        ("torch_dtype", ["float16", "int8", "x"]),
        ("_attn_implementation", ["flash_attention_2", "x"]),
        ("attn_implementation", ["flash_attention_2", "sdpa", "x"]),
        ("_name_or_path", ["/dev/zero", 5]),
        ("problem_type", ["regression", "x"]),
        ("per_layer_config", [{}, [1]]),
    ],
    "tokenizer_config.json": [
        (
            "tokenizer_class",
            ["BertTokenizer", "RobertaTokenizer", "GPT2Tokenizer", "AlbertTokenizer", "T5Tokenizer", "Mine", None],
        ),
        ("auto_map", [{"AutoTokenizer": ["mine.T", None]}, [], "mine"]),
        ("model_max_length", [0, -1, 5, None, "x", 1e300]),
        ("do_lower_case", [True, False, "x"]),
        ("unk_token", ["[NONE]", "word3", None, 5, {"content": "word3", "__type": "AddedToken"}, ["a"]]),
        ("pad_token", ["[NONE]", "word3", None, "", 5]),
        ("cls_token", ["[NONE]", "word3", None, ["a"]]),
        ("sep_token", ["[NONE]", "word3", None, {}]),
        ("mask_token", ["[NONE]", None, {"content": 3}]),
        ("extra_special_tokens", [["word1"], {"x": "word1"}, {"x": 5}, [5], "x"]),
        ("additional_special_tokens", [["word1"], [None], {}]),
        (
            "added_tokens_decoder",
            [{"7": {"content": "word3"}}, {"x": {}}, {"99": {"content": "new"}}, {"-1": {"content": "a"}}, []],
        ),
        ("model_input_names", [None, [], ["input_ids"], ["x"], "input_ids", [5]]),
        ("padding_side", ["left", "middle", None]),
        ("truncation_side", ["left", "middle", None]),
        ("split_special_tokens", [True, "x"]),
        ("clean_up_tokenization_spaces", [True]),
        ("tokenizer_file", ["/dev/zero", "../x"]),
        ("vocab_file", ["/dev/zero", 5]),
        ("backend", ["x", None, "sentencepiece", "mistral-common"]),
        ("chat_template", ["{{", 5, [1]]),
        ("add_prefix_space", [True]),
        ("name_or_path", [5, "x"]),
        ("is_fast", [False]),
    ],
    "special_tokens_map.json": [
        ("unk_token", ["[NONE]", "word3", None, {"content": "word3"}]),
        ("pad_token", ["[NONE]", "word3", 5]),
        ("cls_token", ["word4"]),
        ("additional_special_tokens", [["word1"], [None]]),
    ],
    "tokenizer.json": [
        (
            "model",
            [{}, {"type": "WordLevel", "vocab": {}, "unk_token": "[UNK]"}, {"type": "BPE", "vocab": {}, "merges": []}, None],
        ),
        (
            "normalizer",
            [{"type": "Lowercase"}, {"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}],
        ),
        ("pre_tokenizer", [None, {"type": "ByteLevel"}, {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated"}]),
        ("post_processor", [None, {"type": "BertProcessing", "sep": ["x", 999], "cls": ["y", 10**9]}, {"type": "ByteLevel"}]),
        ("truncation", [{"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}]),
        ("padding", [{"strategy": {"Fixed": 50}, "direction": "Left", "pad_id": 7, "pad_type_id": 3, "pad_token": "word2"}]),
        ("added_tokens", [[], [{"id": 5, "content": "word39"}], [{"id": 99, "content": "new", "special": True}]]),
        ("version", ["2.0", None]),
    ],
}
SETTINGS["model.safetensors.index.json"] = [
    (
        "weight_map",
        [{}, {"a": "../elsewhere.safetensors"}, {"a": "/dev/zero"}, {"a": 5}, {"a": None}, ["a"], {"a": "config.json"}],
    )
]


def change_json(file: Path, rng: random.Random) -> str:
    """One to three accidents in a file of JSON."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not content:
        return "nothing"
    name, value = rng.choice(list(content)), rng.choice(VALUES)
    known = SETTINGS.get(file.name, [])
    way = rng.choice(["known", "known", "known", "value", "deep", "deep", "gone", "renamed", "extra", "twice"])
    if way == "known" and known:
        here = [one for one in known if one[0] in content]
        name, values = rng.choice(here if here and rng.random() < 0.6 else known)
        content[name] = value = rng.choice(values)
    elif way == "deep":
        content = another(content, rng)
    elif way == "gone":
        del content[name]
    elif way == "renamed":
        content[rng.choice([name[:-1], name.upper(), f"{name} ", f"_{name}"])] = content.pop(name)
    elif way == "extra":
        content[rng.choice(["x", "", "a b", "self", "__class__", "trust_remote_code", "forward", "kwargs", "name"])] = value
    else:
        content[name] = value
    text = json.dumps(content)
    if way == "twice":
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(value)}}}"
    file.write_text(text)
    return f"{way} {name}={str(value)[:40]!r}"


def another(content: Any, rng: random.Random) -> Any:
    """Nested values, one of them another."""
    if isinstance(content, dict) and content and rng.random() < 0.9:
        name = rng.choice(list(content))
        if rng.random() < 0.15:
            return {key: value for key, value in content.items() if key != name}
        if rng.random() < 0.15:
            return {(f"{key}s" if key == name else key): value for key, value in content.items()}
        return content | {name: another(content[name], rng)}
    if isinstance(content, list) and content and rng.random() < 0.9:
        place = rng.randrange(len(content))
        return [*content[:place], another(content[place], rng), *content[place + 1 :]]
    return rng.choice(VALUES)


def change_tensors(file: Path, rng: random.Random) -> str:
    """One accident in a file of tensors."""
    try:
        weights = load_file(file)
    except Exception:
        return "nothing"
    if not weights:
        return "nothing"
    name = rng.choice(sorted(weights))
    tensor = weights[name]
    way = rng.choice(sorted(TENSORS))
    changed = TENSORS[way](rng, name, tensor)
    weights = {one: value for one, value in (weights | changed).items() if value is not None}
    format_ = rng.choice([{"format": "pt"}, {"format": "pt"}, None, {"format": "tf"}])
    save_file({one: value.contiguous().clone() for one, value in weights.items()}, file, metadata=format_)
    return f"{way} {name}"


def misspelt(rng: random.Random, name: str) -> str:
    return rng.choice([f"{name}s", f"model.{name}", name.replace("weight", "wieght"), name.upper(), name.replace(".", "_")])


def poisoned(tensor: torch.Tensor, value: float) -> torch.Tensor:
    found = tensor.clone().float().reshape(-1)
    found[0 if len(found) < 6 else 5] = value
    return found.reshape(tensor.shape)


DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.complex64,
]
TENSORS: dict[str, Callable[[random.Random, str, torch.Tensor], dict[str, Any]]] = {
    "gone": lambda rng, name, tensor: {name: None},
    "misspelt": lambda rng, name, tensor: {misspelt(rng, name): tensor.clone(), name: None},
    "prefixed": lambda rng, name, tensor: {f"{rng.choice(['bert', 'distilbert', 'albert'])}.{name}": tensor.float() + 1},
    "shape": lambda rng, name, tensor: {
        name: rng.choice([tensor[:-1], tensor[None], tensor.reshape(-1), tensor.T, tensor[:0], torch.cat([tensor, tensor])])
    },
    "dtype": lambda rng, name, tensor: {name: tensor.to(rng.choice(DTYPES))},
    "nan": lambda rng, name, tensor: {name: poisoned(tensor, rng.choice([float("nan"), float("inf"), -float("inf")]))},
    "large": lambda rng, name, tensor: {name: poisoned(tensor, 1e38)},
    "beyond": lambda rng, name, tensor: {name: tensor.double() * 1e300},
    "extra": lambda rng, name, tensor: {
        rng.choice(["x", "classifier.weight", "cls.bias", "encoder.y", "pooler.z"]): tensor.float() + 1
    },
    "old": lambda rng, name, tensor: {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.clone()
    },
}


def change_words(file: Path, rng: random.Random) -> str:
    """One accident in a vocabulary, a word a line."""
    try:
        lines = file.read_text().split("\n")
    except (OSError, ValueError):
        return "nothing"
    place, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    way = rng.choice(["gone", "twice", "exchanged", "empty", "word", "fewer", "more"])
    if way == "gone":
        del lines[place]
    elif way == "twice":
        lines[place] = lines[other]
    elif way == "exchanged":
        lines[place], lines[other] = lines[other], lines[place]
    elif way == "fewer":
        lines = lines[:place]
    else:
        lines.insert(place, {"empty": "", "word": "new\u2028", "more": "\n".join(f"more{n}" for n in range(40))}[way])
    file.write_text("\n".join(lines))
    return way


ADDED: dict[str, Callable[[random.Random, Path], Any]] = {
    "pytorch_model.bin": lambda rng, file: file.write_bytes(b"\x80\x04\x95"),
    "mine.py": lambda rng, file: file.write_text("open('../victim', 'w').write('run')"),
    "adapter_config.json": lambda rng, file: file.write_text('{"base_model_name_or_path": "nobody/none", "peft_type": "LORA"}'),
    "generation_config.json": lambda rng, file: file.write_text(rng.choice(OTHERS)),
    "added_tokens.json": lambda rng, file: file.write_text(
        rng.choice(['{"new": 45}', '{"word3": 7}', '{"x": "y"}', "[]", "{}"])
    ),
    "merges.txt": lambda rng, file: file.write_text("#version\nw o\n"),
    "vocab.json": lambda rng, file: file.write_text(json.dumps({word: n for n, word in enumerate(WORDS)})),
    "vocab.txt": lambda rng, file: file.write_text("\n".join(rng.sample(SPECIAL + WORDS, 45))),
    "spiece.model": lambda rng, file: file.write_bytes(b"\n\x0e\n\x05<unk>"),
    "tokenizer.model": lambda rng, file: file.write_bytes(b"nothing"),
    "chat_template.jinja": lambda rng, file: file.write_text("{{"),
    "special_tokens_map.json": lambda rng, file: file.write_text(
        rng.choice(['{"unk_token": "word3"}', '{"pad_token": "new"}', '{"cls_token": {"content": "word1"}}', "[]", "{}"])
    ),
    "tokenizer.json": lambda rng, file: file.write_text(
        rng.choice(['{"a":' * 20_000 + "1" + "}" * 20_000, "[" * 100_000, '{"model": "' + "x" * 10**6 + '"}', *OTHERS])
    ),
    "model.safetensors.index.json": lambda rng, file: file.write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}'),
    "model.safetensors": lambda rng, file: save_file({"x": torch.ones(1)}, file),
}


def accident(rng: random.Random, folder: Path, victim: Path) -> str:
    """Something happens in a folder; what."""
    files = sorted(folder.iterdir())
    if rng.random() < 0.12 or not files:
        name = rng.choice(sorted(ADDED))
        if (folder / name).is_symlink() or ((folder / name).exists() and not (folder / name).is_file()):
            return "nothing"
        ADDED[name](rng, folder / name)
        return f"added {name}"
    path = rng.choice(files)
    if not path.is_file() or path.resolve() != path.absolute() or rng.random() < 0.2:
        way = rng.choice(tuple(WAYS) if path.is_file() else NEW)
        if path.is_symlink() or path.is_fifo() or path.is_socket():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        if not path.exists() and way not in NEW:
            return "nothing"
        WAYS[way](rng, path, victim)
        return f"{way} {path.name}"
    kind = change_json if path.suffix == ".json" else change_tensors if path.suffix == ".safetensors" else change_words
    return f"{path.name}: {kind(path, rng)}"
