"""Low-rank adapters in every family: what is trained, what travels, what a run is known by, and what peft says of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from conftest import GivenLoaders, assert_equal, assert_near, make_loop, save_tokenizer, weights_of, without_times
from safetensors.torch import load_file, save_file
from test_families import TINY
from test_loop import plain_trainer
from test_padding_free import CONFIGS, LENGTHS, assert_alike, batch_of, result_of
from torch.utils.data import DataLoader

import fedtune
from fedtune.models import FAMILIES, packed, padding_free
from fedtune.models.adapters import DEFAULT_TARGETS, Lora, adapted, lora_of, merge_
from fedtune.runs.flags import name_of, resolve
from fedtune.storage import checkpoint

peft = pytest.importorskip("peft", reason="the extra fedtune[lora] is not installed")

# of peft 0.21, by which a network is asked whether it computes activations again
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

Make = Callable[..., Any]
LORA = {"rank": 4, "alpha": 8}
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of each family in hub format."""
    place, found = tmp_path_factory.mktemp("families"), {}
    for name, config in {**TINY, **CONFIGS}.items():
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(place / name)
        save_tokenizer(place / name)
        found[name] = str(place / name)
    return found


@pytest.fixture(params=sorted(FAMILIES))
def folder(request: pytest.FixtureRequest, folders: dict[str, str]) -> str:
    return folders[request.param]


def built(folder: str, lora: Any = LORA, moved: float = 0, **options: Any) -> Any:
    """A classifier with adapters; moved ones do something, the larger the number the more."""
    module = fedtune.build_classifier(folder, 3, **{"dropout": 0.0, "learning_rate": 5e-3, **options}, lora=lora)
    if moved:
        with torch.no_grad():
            for number, (_, layer) in enumerate(adapted(module.network)):
                torch.nn.init.normal_(
                    layer.lora_B["default"].weight, std=moved, generator=torch.Generator().manual_seed(number)
                )
    return module


def assert_close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-4) -> None:
    """To a part of the largest."""
    assert (one - other).abs().max() <= tolerance * other.abs().max()


def assert_far(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() > 3e-3 * other.abs().max()


def logits_of(module: Any) -> torch.Tensor:
    batch = batch_of([9, 2, 12, 5])
    with torch.inference_mode():
        return module.eval()(batch["input_ids"], batch["attention_mask"])


def network_logits(network: Any) -> torch.Tensor:
    batch = batch_of([9, 2, 12, 5])
    with torch.inference_mode():
        return network.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# ---------------------------------------------------------------- the network


def test_adapters_and_head_are_trained_and_a_fresh_adapter_changes_nothing(folder: str) -> None:
    module, plain = built(folder), fedtune.build_classifier(folder, 3, dropout=0.0)
    assert torch.equal(logits_of(module), logits_of(plain))
    trained = {name for name, parameter in module.network.named_parameters() if parameter.requires_grad}
    whole = tuple(f"{part}." for part in module.trained_whole)
    targets = DEFAULT_TARGETS[module.model_type]
    for name, parameter in module.network.named_parameters():
        adapter = ".lora_A.default." in name or ".lora_B.default." in name
        assert (name in trained) == (adapter or name.startswith(whole)), name
        if adapter:
            path = name.split(".lora_")[0]
            assert path.endswith(targets)
            assert parameter.shape[0 if "lora_A" in name else 1] == 4
    linear = [name for name, part in plain.network.named_modules() if isinstance(part, torch.nn.Linear)]
    assert [name for name, _ in adapted(module.network)] == [name for name in linear if name.endswith(targets)]
    assert {layer.scaling["default"] for _, layer in adapted(module.network)} == {2.0}


def test_the_layers_of_an_albert_share_their_adapters(folders: dict[str, str]) -> None:
    assert [name.rpartition(".")[2] for name, _ in adapted(built(folders["albert"]).network)] == ["query", "value"]


def test_the_start_is_pefts_and_seeded(folder: str) -> None:
    def start(**options: Any) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in weights_of(built(folder, **options)).items() if "lora_" in name}

    first = start()
    assert_equal(first, start())
    other = start(seed=1)
    for name, tensor in first.items():
        if "lora_B" in name:
            assert not tensor.any()
        else:
            most = 1 / math.sqrt(tensor.shape[1])
            assert not torch.equal(tensor, other[name])
            assert 0.7 * most < float(tensor.abs().max()) <= most
            assert float(tensor.std()) == pytest.approx(most / math.sqrt(3), rel=0.25)


def test_what_else_is_drawn_does_not_depend_on_adapters(folder: str) -> None:
    module, plain = built(folder), fedtune.build_classifier(folder, 3, dropout=0.0)
    for name, parameter in plain.network.named_parameters():
        ours = dict(module.network.named_parameters())
        assert (
            torch.equal(ours.get(name, ours.get(f"{name.rpartition('.')[0]}.base_layer.weight")), parameter) or "bias" in name
        )


def test_a_network_with_adapters_computes_what_the_merged_one_computes(folder: str) -> None:
    for lora in (LORA, {**LORA, "rslora": True}, {"rank": 3, "alpha": 0.5}):
        module, plain = built(folder, lora, moved=10), fedtune.build_classifier(folder, 3, dropout=0.0)
        found = logits_of(module)
        scale = Lora(**lora).scaling
        weights = plain.network.state_dict()
        for name, layer in adapted(module.network):  # W + s B A, by hand
            weights[f"{name}.weight"] += scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert_far(found, logits_of(built(folder, None)))
        assert_close(found, logits_of(plain))
        merge_(module.network)
        assert module.network.state_dict().keys() == weights.keys()
        assert_close(logits_of(module), found)


def test_the_dropout_of_adapters_is_theirs_alone_and_drawn_in_training(folders: dict[str, str]) -> None:
    batch, found = batch_of([9, 2, 12, 5]), {}
    for dropout in (0.0, 0.5):
        module = built(folders["bert"], {**LORA, "dropout": dropout}, moved=10)
        with torch.no_grad():
            once, again = (module.train()(batch["input_ids"], batch["attention_mask"]) for _ in range(2))
        assert torch.equal(once, again) == (dropout == 0)
        found[dropout] = logits_of(module)
    assert torch.equal(found[0.0], found[0.5])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("block", [1, 2**18])
def test_without_padding_adapters_have_the_same_logits_and_gradients(
    name: str, lengths: list[int], block: int, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_BLOCK", block)
    module, batch = (
        built(folders[name], {"rank": 4, "targets": [*DEFAULT_TARGETS[name.split()[0]]]}, moved=0.3),
        batch_of(lengths),
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(5 if parameter.ndim > 1 and not parameter.requires_grad else 1)
    called: list[Any] = []
    own = padding_free.FORWARD[type(module.network)]
    monkeypatch.setitem(padding_free.FORWARD, type(module.network), lambda *given: called.append(1) or own(*given))
    (logits, gradients), (expected, slopes) = (result_of(module, batch, free) for free in (True, False))
    assert called == [1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert_alike(gradients, slopes)
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == gradients.keys()


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["query"], 2),
        ("query", 2),
        (("query", "value", "query"), 4),
        (["attention.output.dense"], 2),
        (["dense"], 7),  # the pooler's, too, but not the head
        (["bert.encoder.layer.1.intermediate.dense"], 1),
        (["layer.1.attention.self.key", "query"], 3),
    ],
)
def test_targets_are_names_or_their_ends(folders: dict[str, str], targets: Any, count: int) -> None:
    module = built(folders["bert"], {"targets": targets})
    assert len(list(adapted(module.network))) == count
    assert module.config["lora"]["targets"] == list(dict.fromkeys([targets] if isinstance(targets, str) else targets))


def test_the_head_has_no_adapters_and_frozen_layers_have_none(folders: dict[str, str]) -> None:
    names = [name for name, _ in adapted(built(folders["roberta"], {"targets": ["dense"]}).network)]
    assert names
    assert not [name for name in names if name.startswith("classifier")]
    module = built(folders["bert"], freeze_layers=1, freeze_embeddings=True)
    assert {name.split(".")[3] for name, _ in adapted(module.network)} == {"1"}
    with pytest.raises(fedtune.UsageError, match=r"lora.targets: got 'query'; .* ends of these: dense$"):
        built(folders["bert"], freeze_layers=2)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank": 0}, "lora.rank: got 0; allowed: a whole number, 1 or more"),
        ({"rank": 2.0}, "lora.rank: got 2.0"),
        ({"rank": True}, "lora.rank: got True"),
        ({"alpha": 0}, "lora.alpha: got 0; allowed: a number above 0"),
        ({"alpha": math.inf}, "lora.alpha: got inf"),
        ({"alpha": "16"}, "lora.alpha: got '16'"),
        ({"rslora": 1}, "lora.rslora: got 1; allowed: true or false"),
        ({"dropout": 1.0}, r"lora.dropout: got 1.0; allowed: at least 0 and below 1"),
        ({"targets": []}, r"lora.targets: got \[\]; allowed: a list of names"),
        ({"targets": [1]}, r"lora.targets: got \[1\]"),
        ({"targets": ["query", "q_proj"]}, "lora.targets: got 'q_proj'; .*: dense, key, query, value$"),
        ({"targets": ["classifier"]}, "lora.targets: got 'classifier'; allowed: names of linear layers beside the head"),
        ({"targets": ["word_embeddings"]}, "lora.targets: got 'word_embeddings'"),
        ({"targets": ["uery"]}, "lora.targets: got 'uery'"),
        ({"rnk": 4}, r"lora: got 'rnk'; allowed: rank \(nearest\)"),
        (8, "lora: got 8; allowed: a dictionary"),
        ({"adapter": ""}, "lora.adapter: got ''"),
        ({"adapter": "/nowhere"}, "lora.adapter: got '/nowhere'; .*No such file"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folders: dict[str, str], lora: Any, said: str) -> None:
    with pytest.raises(fedtune.UsageError, match=said) as caught:
        built(folders["bert"], lora)
    assert "\n" not in str(caught.value)


def test_a_family_without_default_targets_asks_for_them(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(DEFAULT_TARGETS, "bert")
    with pytest.raises(
        fedtune.UsageError, match=r"lora.targets: got None; .* \(there are default ones for distilbert, .*'bert'"
    ):
        built(folders["bert"])
    assert len(list(adapted(built(folders["bert"], {"targets": ["key"]}).network))) == 2


def test_a_layer_that_shares_its_weights_with_another_is_refused() -> None:
    from fedtune.models.adapters import target_layers

    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9))
    assert target_layers(network, DEFAULT_TARGETS["gpt2"]) == ["transformer.h.0.attn.c_attn"]
    with pytest.raises(fedtune.UsageError, match="layers with weights of their own"):
        target_layers(network, ["lm_head"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_causal_networks_have_adapters_that_do_what_merged_ones_do(family: str) -> None:
    from fedtune.models.adapters import add_adapters

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 11}
    sizes |= {"num_key_value_heads": 1, "head_dim": 4} if family != "gpt2" else {}
    torch.manual_seed(0)
    network: Any = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[family](**sizes)).eval()
    before = set(network.state_dict())
    assert len(add_adapters(network, Lora(rank=2), family)) == (2 if family == "gpt2" else 4)
    ids = torch.arange(10)[None]
    for _, layer in adapted(network):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    with torch.inference_mode():
        found = network(input_ids=ids).logits
        merge_(network)
        torch.testing.assert_close(network(input_ids=ids).logits, found)
    assert set(network.state_dict()) == before


def test_adapters_are_fp32_where_the_base_is_not(folders: dict[str, str]) -> None:
    from fedtune.models.adapters import add_adapters

    network: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folders["bert"], dtype=torch.bfloat16)
    add_adapters(network, Lora(), "bert", ("classifier",))
    assert {p.dtype for name, p in network.named_parameters() if "lora_" in name} == {torch.float32}
    assert network_logits(network).dtype == torch.bfloat16


@pytest.mark.parametrize("name", sorted(set(TINY) - {"albert"}))
@pytest.mark.parametrize("lora", [None, LORA])
def test_activations_computed_again_give_the_same_gradients(folders: dict[str, str], name: str, lora: Any) -> None:
    batch, results = batch_of([9, 2, 12, 5]), []
    for again in (False, True):
        module = built(
            folders[name], lora, moved=0.3 * (lora is not None), gradient_checkpointing=again, padding_free=False
        ).train()
        assert ("gradient_checkpointing" in module.config) == again
        assert any(getattr(part, "gradient_checkpointing", False) for part in module.network.modules()) == again
        results.append(result_of(module, batch, padding_free=again))  # which is left out where activations are not kept
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_alike(results[1][1], results[0][1])


def test_activations_are_not_kept_and_dropout_is_drawn_once(folders: dict[str, str]) -> None:
    batch, kept, gradients = batch_of([12] * 4), [], []
    for again in (False, True):
        module = built(folders["bert"], dropout=0.3, gradient_checkpointing=again, padding_free=False).train()
        sizes: list[int] = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = module(batch["input_ids"], batch["attention_mask"]).square().sum()
        loss.backward()
        kept.append(sum(sizes))
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert kept[1] < 0.5 * kept[0]
    assert_near(gradients[0], gradients[1])


def test_a_network_that_cannot_compute_activations_again_is_refused(folders: dict[str, str]) -> None:
    with pytest.raises(fedtune.UsageError, match="gradient_checkpointing: got True; allowed: False, as AlbertFor"):
        built(folders["albert"], gradient_checkpointing=True)


# ---------------------------------------------------------------- configuration


def test_adapters_are_absent_from_a_configuration_that_has_none(make_module: Make) -> None:
    assert not {"lora", "gradient_checkpointing"} & make_module().config.keys()
    plain = resolve({"model": {"name": "bert"}})
    assert plain["model"]["lora"] is None
    assert name_of(plain) == name_of(
        {**plain, "model": {k: v for k, v in plain["model"].items() if k not in ("lora", "gradient_checkpointing")}}
    )


def test_every_way_to_say_the_same_adapters_is_one_run() -> None:
    ways: list[Any] = [
        {},
        {"rank": 8},
        {"alpha": 16},
        {"alpha": 16.0, "rslora": False},
        {"targets": None, "rank": 8, "adapter": None},
    ]
    names = {name_of(resolve({"model": {"lora": lora}})) for lora in ways}
    names |= {name_of(resolve({"model": {"lora": {"targets": targets}}})) for targets in ("query", ["query"])}
    others: list[Any] = [None, {"rank": 4}, {"alpha": 8}, {"rslora": True}, {"dropout": 0.1}, {"targets": ["key"]}]
    assert len(names) == 2
    assert len(names | {name_of(resolve({"model": {"lora": lora}})) for lora in others}) == 8
    assert len({name_of(resolve({"model": {"gradient_checkpointing": flag}})) for flag in (True, False)}) == 2


def test_the_configuration_is_plain_and_makes_the_same_module(folders: dict[str, str]) -> None:
    one = built(folders["bert"], Lora(rank=3, targets=("key",), rslora=True))
    config = yaml.safe_load(yaml.safe_dump(one.config))
    assert config["lora"] == {"rank": 3, "alpha": 16.0, "targets": ["key"], "rslora": True, "dropout": 0.0, "adapter": None}
    assert_equal(weights_of(one), weights_of(fedtune.build_classifier(config.pop("name"), 3, **config)))


def test_the_flags_of_a_run(
    folders: dict[str, str], task: Any, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fedtune.TASKS, "tiny", lambda: task)
    given = ["run", "--data.task", "tiny", "--data.num_clients=2", "--data.max_length=16", f"--model.name={folders['bert']}"]
    given += ["--loop.max_rounds=1", "--loop.baselines=[]", "--loop.options.progress=false", "--loop.precision=32-true"]
    flags = [
        "--model.lora.rank",
        "2",
        "--model.lora.alpha=4",
        "--model.lora.targets",
        "[query,value]",
        "--model.lora.rslora",
        "true",
    ]
    code, _, error = command(*given, *flags, "--run_dir", str(tmp_path / "flags"))
    assert (code, error) == (0, "")
    config = yaml.safe_load((tmp_path / "flags" / "config.yaml").read_text())
    values = {"rank": 2, "alpha": 4.0, "targets": ["query", "value"], "rslora": True, "dropout": 0.0, "adapter": None}
    assert config["model"]["lora"] == values
    (tmp_path / "model.yaml").write_text(
        yaml.safe_dump({"model": {"lora": {"rank": 2, "alpha": 4, "targets": ["query", "value"]}}})
    )
    more = ["--config", str(tmp_path / "model.yaml"), "--model.lora.rslora=true", "--run_dir", str(tmp_path / "yaml")]
    assert command(*given, *more)[0] == 0
    names = ("round", "loss_nats", "train_loss_nats", "bytes_up")
    records = [json.loads((tmp_path / run / "rounds.jsonl").read_text()) for run in ("flags", "yaml")]
    assert [{name: record[name] for name in names} for record in records] == [{name: records[0][name] for name in names}] * 2
    again = command("run", "--config", str(tmp_path / "flags" / "config.yaml"), "--run_dir", str(tmp_path / "flags"))
    assert again[0] == 0
    for words, said in (
        (["--model.lora.rank=0"], "--model.lora.rank: got 0; allowed: a whole number, 1 or more"),
        (["--model.lora.rnk=1"], "--model.lora: got 'rnk'; allowed: rank (nearest)"),
        (["--model.lora=query"], "--model.lora: got 'query'; allowed: a dictionary, null"),
        (["--model.lora.targets=[q_lin]"], "--model.lora.targets: got 'q_lin'; allowed: names of linear layers"),
        (["--model.lora.adapter=/nowhere"], "--model.lora.adapter: got '/nowhere'"),
        (["--model.gradient_checkpointing=maybe"], "--model.gradient_checkpointing: got 'maybe'"),
    ):
        code, _, error = command(*given, *words)
        assert (code, error.count("\n")) == (2, 1)
        assert said in error
    code, _, error = command(*given, *flags, "--model.lora.dropout=0.1", "--run_dir", str(tmp_path / "flags"))
    assert code == 2
    assert "model.lora.dropout: 0.0 -> 0.1" in error


def test_a_sweep_goes_over_ranks_and_over_all_weights_beside_them(tmp_path: Path) -> None:
    from fedtune.sweeps import grid

    file = tmp_path / "sweep.yaml"
    for parameters, count in (
        ({"model.lora.rank": {"values": [2, 4, 8]}}, 3),
        ({"model.lora": {"values": [None, {"rank": 2}, {"rank": 8, "rslora": True}]}}, 3),
        ({"model": {"parameters": {"lora": {"parameters": {"rank": {"values": [2, 4]}, "alpha": {"value": 4}}}}}}, 2),
    ):
        file.write_text(yaml.safe_dump({"method": "grid", "parameters": parameters}))
        cells = grid.read(str(file), []).cells
        assert len({cell.name for cell in cells}) == count
        assert all(cell.arguments["model"]["lora"] is None or cell.arguments["model"]["lora"]["rank"] for cell in cells)


def test_without_peft_one_line_says_what_to_install(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else find(name, *more))
    with pytest.raises(fedtune.UsageError, match=r"lora: .*; allowed: after: pip install 'fedtune\[lora\]'"):
        built(folders["bert"])
    with pytest.raises(fedtune.UsageError, match=r"pip install 'fedtune\[lora\]'"):
        lora_of({})
    fedtune.build_classifier(folders["bert"], 3)


def test_peft_is_imported_where_adapters_are_asked_for_and_not_before(folders: dict[str, str]) -> None:
    lines = (
        "import sys, fedtune, fedtune.models, fedtune.runs.flags",
        f"fedtune.build_classifier({folders['bert']!r}, 3)",
        "print('peft' in sys.modules)",
        f"fedtune.build_classifier({folders['bert']!r}, 3, lora={{}})",
        "print('peft' in sys.modules, sorted({'datasets', 'wandb'} & sys.modules.keys()))",
    )
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["False", "True []"]


# ---------------------------------------------------------------- training


@pytest.fixture
def make_data(folder: str, task: Any) -> Make:
    def make(**changes: Any) -> Any:
        options = {"task": task, "model": folder, "num_clients": 3, "batch_size": 8, "max_length": 24}
        return fedtune.FederatedDataModule(**(options | changes))

    return make


@pytest.mark.filterwarnings("ignore")  # a plain Trainer has opinions on loaders without workers
def test_one_client_in_one_round_is_local_training_by_a_trainer(folder: str, make_data: Make) -> None:
    data, federated, ordinary = make_data(num_clients=1), built(folder), built(folder)
    loader = DataLoader(list(data.train_dataloader()), batch_size=None)
    make_loop(max_rounds=1, local_epochs=2).fit(federated, GivenLoaders([loader], data.val_dataloader()))
    plain_trainer(max_epochs=2, limit_val_batches=0).fit(ordinary, loader)
    assert_near(weights_of(federated), weights_of(ordinary))
    changed = [name for name, value in weights_of(built(folder)).items() if not torch.equal(value, weights_of(federated)[name])]
    assert {name for name, parameter in federated.named_parameters() if parameter.requires_grad} == set(changed)


@pytest.mark.filterwarnings("ignore")
def test_training_by_a_trainer_is_the_centralised_baseline(folder: str, make_data: Make, tmp_path: Path) -> None:
    data, ordinary = make_data(num_clients=1), built(folder)
    loader = DataLoader(list(data.train_dataloader()), batch_size=None)
    given = GivenLoaders([loader], data.val_dataloader())
    loop = make_loop(max_rounds=3, baselines=["centralised"], run_dir=str(tmp_path / "run"))
    loop.fit(built(folder), given)
    plain_trainer(max_epochs=3, limit_val_batches=0).fit(ordinary, loader)
    (baseline,) = (tmp_path / "run" / "baselines").glob("centralised-*")
    state = checkpoint.latest(baseline / "checkpoints")
    assert state is not None
    trained = {name: value for name, value in weights_of(ordinary).items() if name in state.weights}
    assert_near(dict(state.weights), trained)
    found = make_loop().validate(ordinary, given)[0]
    assert loop.baseline_runs["centralised"][-1].loss_nats == pytest.approx(found["loss_nats"], rel=1e-5)


def test_two_rounds_are_one_a_stop_and_one_more_bit_for_bit(folder: str, make_data: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {"clients_per_round": 2}
    lora = {**LORA, "dropout": 0.1}
    one, other = built(folder, lora), built(folder, lora)
    through = make_loop(max_rounds=2, run_dir=str(tmp_path / "a"), **options)
    through.fit(one, make_data())
    make_loop(max_rounds=1, run_dir=str(tmp_path / "b"), **options).fit(built(folder, lora), make_data())
    resumed = make_loop(max_rounds=2, run_dir=str(tmp_path / "b"), **options)
    resumed.fit(other, make_data())
    assert_equal(weights_of(one), weights_of(other))
    assert without_times(through.history) == without_times(resumed.history)
    first = weights_of(built(folder, lora))
    assert all(not torch.equal(first[name], tensor) for name, tensor in weights_of(one).items() if "lora_B" in name)


def sizes_of(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_only_adapters_and_head_travel_and_are_kept(folder: str, make_data: Make, tmp_path: Path) -> None:
    module = built(folder)
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    size = sizes_of({name: tensor for name, tensor in weights_of(module).items() if name in names})
    history = make_loop(max_rounds=2, run_dir=str(tmp_path), clients_per_round=2).fit(module, make_data())
    assert [(record.bytes_up, record.bytes_down) for record in history] == [(2 * size, 2 * size)] * 2
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert {path.name for path in files} == {"weights.safetensors", "resting.safetensors"}
    for file in files:
        kept = load_file(file)
        if file.name == "weights.safetensors":
            assert kept.keys() == names
            assert sizes_of(kept) == size
        else:
            assert not [name for name in kept if "weight" in name or "bias" in name]  # of the base there are digests
    resting = json.loads((tmp_path / "start" / "resting.json").read_text())
    base = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    assert base <= resting.keys()
    assert base & module.from_files == base
    assert any(name.endswith(".base_layer.weight") for name in base)
    assert not names & module.from_files


def test_a_changed_base_is_refused_by_name(folders: dict[str, str], task: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folders["bert"], model)
    data = fedtune.FederatedDataModule(task, str(model), num_clients=2, batch_size=8, max_length=16)

    def fit(change: Callable[[Any], None] = lambda _: None) -> None:
        module = built(str(model))
        with torch.no_grad():
            change(module.network.bert.encoder.layer[0])
        make_loop(max_rounds=1, run_dir=str(tmp_path / "run")).fit(module, data)

    fit()
    fit()
    name = "network.bert.encoder.layer.0.attention.self.query.base_layer.weight"
    with pytest.raises(fedtune.UsageError, match=rf"a module whose {name} is what the run began with"):
        fit(lambda layer: layer.attention.self.query.base_layer.weight[0, 0].add_(1))
    weights = load_file(model / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.weight"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fedtune.UsageError, match=r"content.model.model.safetensors: '\w{16}' -> '\w{16}'"):
        fit()


def test_a_fresh_pooler_is_trained_with_the_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.BertModel(TINY["bert"], add_pooling_layer=False).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    module = built(str(tmp_path))
    assert module.trained_whole == ["classifier", "bert.pooler.dense"]
    assert module.network.bert.pooler.dense.weight.requires_grad
    assert built(str(tmp_path), init="random").trained_whole == ["classifier"]


def test_the_head_of_a_language_model_is_modernberts_pretrained_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = transformers.ModernBertForMaskedLM(TINY["modernbert"])
    whole.save_pretrained(tmp_path)
    module = built(str(tmp_path))
    assert torch.equal(module.network.head.dense.weight, whole.head.dense.weight)
    assert module.trained_whole == ["classifier"]
    weights = load_file(tmp_path / "model.safetensors")
    del weights["head.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fedtune.UsageError, match=r"these lack head.norm.weight, but have head.dense.weight"):
        built(str(tmp_path))


# ---------------------------------------------------------------- out and in


def finished(folder: str, run: Path, make_data: Make, lora: Any = LORA, algorithm: str = "fedavg", **options: Any) -> Any:
    module = built(folder, lora, **options)
    make_loop(max_rounds=2, run_dir=str(run), algorithm=algorithm).fit(module, make_data())
    return module


def opened_by_peft(base: str, folder: Path, classes: int = 3) -> Any:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=classes, attn_implementation="eager"
    )
    return peft.PeftModel.from_pretrained(model, folder)


OTHERS = {
    "bert": [{**LORA, "rslora": True, "targets": ["dense"]}, {"rank": 2, "alpha": 0.5, "dropout": 0.2}],
    "roberta": [{"targets": ["dense"]}],  # as a part of its head is called
    "modernbert": [{"targets": ["Wo"]}],
}


@pytest.mark.parametrize(
    ("folder", "lora"),
    [(name, one) for name in sorted(FAMILIES) for one in (LORA, *OTHERS.get(name, []))],
    indirect=["folder"],
)
def test_peft_opens_the_exported_adapters_with_the_logits_of_the_run(
    folder: str, make_data: Make, tmp_path: Path, lora: Any
) -> None:
    module = finished(folder, tmp_path / "run", make_data, lora)
    fedtune.export(tmp_path / "run", tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {*FILES, "README.md", "tokenizer.json"}
    assert not files & {"model.safetensors", "config.json"}
    found = opened_by_peft(folder, tmp_path / "out")
    assert torch.equal(network_logits(found), network_logits(module.network))
    assert not torch.equal(network_logits(module.network), network_logits(built(folder, None).network))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == folder
    assert (config["task_type"], config["r"], config["use_rslora"]) == (
        "SEQ_CLS",
        lora.get("rank", 8),
        lora.get("rslora", False),
    )
    assert set(config["modules_to_save"]) == set(module.trained_whole)
    assert {name for name in load_file(tmp_path / "out" / FILES[1]) if "lora_" in name} == {
        f"base_model.model.{name}.lora_{which}.weight" for name, _ in adapted(module.network) for which in "AB"
    }
    assert_close(network_logits(found.merge_and_unload()), network_logits(module.network))


def test_plain_transformers_opens_the_merged_model_with_the_logits_of_the_run(
    folder: str, make_data: Make, tmp_path: Path
) -> None:
    module = finished(folder, tmp_path / "run", make_data)
    fedtune.export(tmp_path / "run", tmp_path / "out", merge=True)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"model.safetensors", "config.json", "README.md", "tokenizer.json"}
    assert not files & set(FILES)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_close(network_logits(whole), network_logits(module.network), 1e-5)
    assert whole.config.id2label == {number: f"label {number}" for number in range(3)}
    plain = fedtune.build_classifier(folder, 3).network.state_dict()
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == plain.keys()
    again = fedtune.build_classifier(str(tmp_path / "out"), 3, keep_head=True)
    assert torch.equal(network_logits(again.network), network_logits(whole))


def test_the_card_says_how_to_open_the_adapters(folders: dict[str, str], task: Any, tmp_path: Path) -> None:
    data = fedtune.FederatedDataModule(task, folders["bert"], num_clients=2, batch_size=8, max_length=16)
    module = finished(folders["bert"], tmp_path / "run", lambda: data)
    fedtune.export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(code.replace('"."', repr(str(tmp_path / "out"))), found)
    torch.testing.assert_close(network_logits(found["model"]), network_logits(module.network))
    assert found["model"].config.id2label[2] == "label 2"
    assert "library_name: peft" in card


def test_what_adapters_alone_cannot_say_is_refused_with_the_way_out(
    folders: dict[str, str], task: Any, tmp_path: Path, command: Any
) -> None:
    data = fedtune.FederatedDataModule(task, folders["bert"], num_clients=2, batch_size=8, max_length=16)
    module = finished(folders["bert"], tmp_path / "run", lambda: data, algorithm="flora")
    name = "network.bert.encoder.layer.0.attention.self.query.base_layer.weight"
    with pytest.raises(fedtune.UsageError, match=rf"merge: got False; allowed: True, .* moved weights of its base \({name}\)"):
        fedtune.export(tmp_path / "run", tmp_path / "out")
    code, _, error = command("export", str(tmp_path / "run"), str(tmp_path / "out"))
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("fedtune: --merge: got False; allowed: True, for the whole model")
    assert not (tmp_path / "out").exists()
    assert command("export", str(tmp_path / "run"), str(tmp_path / "out"), "--merge")[0] == 0
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_close(network_logits(whole), network_logits(module.network), 1e-5)
    state = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert state is not None
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "round-0002")
    weights = state.weights | {name: state.weights[name][:3]}
    checkpoint.save(tmp_path / "run" / "checkpoints", dataclasses.replace(state, weights=weights), keep=2)
    with pytest.raises(fedtune.UsageError, match="a run whose weights fit the base"):
        fedtune.export(tmp_path / "run", tmp_path / "other", merge=True)


def test_a_base_that_nobody_could_open_is_merged(folders: dict[str, str], task: Any, tmp_path: Path) -> None:
    data = fedtune.FederatedDataModule(task, folders["bert"], num_clients=2, batch_size=8, max_length=16)
    module = finished(folders["bert"], tmp_path / "run", lambda: data, init="random")
    with pytest.raises(fedtune.UsageError, match=r"merge: got False; .* the base of the run has random weights"):
        fedtune.export(tmp_path / "run", tmp_path / "out")
    fedtune.export(tmp_path / "run", tmp_path / "out", merge=True)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_close(network_logits(whole), network_logits(module.network), 1e-5)


def test_a_run_without_adapters_has_none_to_merge(tiny_bert: str, task: Any, tmp_path: Path) -> None:
    data = fedtune.FederatedDataModule(task, tiny_bert, num_clients=2, batch_size=8, max_length=16)
    make_loop(max_rounds=1, run_dir=str(tmp_path / "run")).fit(fedtune.BertClassifier(tiny_bert, 3), data)
    with pytest.raises(fedtune.UsageError, match="merge: got True; allowed: False, as the run has no adapters"):
        fedtune.export(tmp_path / "run", tmp_path / "out", merge=True)


def test_a_run_begins_with_an_adapter_and_its_head(folder: str, make_data: Make, tmp_path: Path) -> None:
    lora = {"rank": 3, "alpha": 7, "rslora": True}
    module = finished(folder, tmp_path / "run", make_data, lora)
    fedtune.export(tmp_path / "run", tmp_path / "out")
    begun = built(folder, {"adapter": str(tmp_path / "out"), "dropout": 0.1})
    assert torch.equal(network_logits(begun.network), network_logits(module.network))
    targets = list(DEFAULT_TARGETS[module.model_type])
    assert begun.config["lora"] == {
        **{"rank": 3, "alpha": 7.0, "rslora": True, "dropout": 0.1, "adapter": str(tmp_path / "out")},
        "targets": begun.config["lora"]["targets"],
    }
    assert sorted(begun.config["lora"]["targets"]) == sorted(targets)
    assert begun.content.keys() >= {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    history = make_loop(max_rounds=1, run_dir=str(tmp_path / "more")).fit(begun, make_data())
    assert history[0].bytes_up > 0
    again = built(folder, {"adapter": str(tmp_path / "out"), "dropout": 0.1})
    make_loop(max_rounds=1, run_dir=str(tmp_path / "more")).fit(again, make_data())  # goes on
    assert_equal(weights_of(begun), weights_of(again))
    weights = load_file(tmp_path / "out" / FILES[1])
    shutil.rmtree(tmp_path / "out")
    fedtune.export(tmp_path / "more", tmp_path / "last")  # what it began with is not needed any more
    assert torch.equal(network_logits(opened_by_peft(folder, tmp_path / "last")), network_logits(begun.network))
    assert load_file(tmp_path / "last" / FILES[1]).keys() == weights.keys()


def test_another_adapter_of_the_same_name_is_another_run(folders: dict[str, str], task: Any, tmp_path: Path) -> None:
    data = fedtune.FederatedDataModule(task, folders["bert"], num_clients=2, batch_size=8, max_length=16)
    finished(folders["bert"], tmp_path / "run", lambda: data)
    fedtune.export(tmp_path / "run", tmp_path / "out")

    def fit() -> None:
        make_loop(max_rounds=1, run_dir=str(tmp_path / "more")).fit(
            built(folders["bert"], {"adapter": str(tmp_path / "out")}), data
        )

    fit()
    weights = {name: tensor + 1 for name, tensor in load_file(tmp_path / "out" / FILES[1]).items()}
    save_file(weights, tmp_path / "out" / FILES[1])
    with pytest.raises(fedtune.UsageError, match=r"content.model.adapter/adapter_model.safetensors: '\w{16}' -> '\w{16}'"):
        fit()


@pytest.fixture
def saved_by_peft(folders: dict[str, str], tmp_path: Path) -> tuple[Path, Any]:
    """An adapter that peft itself made and saved, and its model."""
    torch.manual_seed(3)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        folders["bert"], num_labels=3, attn_implementation="eager"
    )
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["key", "intermediate.dense"], task_type="SEQ_CLS", init_lora_weights=False
    )
    model = peft.get_peft_model(network, config)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_an_adapter_of_peft_begins_a_run(saved_by_peft: tuple[Path, Any], folders: dict[str, str]) -> None:
    path, model = saved_by_peft
    module = built(folders["bert"], {"adapter": str(path)})
    assert torch.equal(network_logits(module.network), network_logits(model))
    assert sorted(module.config["lora"]["targets"]) == ["intermediate.dense", "key"]
    weights = {name: tensor for name, tensor in load_file(path / FILES[1]).items() if "classifier" not in name}
    save_file(weights, path / FILES[1])
    headless = built(folders["bert"], {"adapter": str(path)})
    assert torch.equal(headless.network.classifier.weight, built(folders["bert"]).network.classifier.weight)
    same = built(folders["bert"], {"adapter": str(path), "rank": 3, "targets": ["intermediate.dense", "key"]})
    assert_equal(weights_of(headless), weights_of(same))


def test_a_folder_of_adapters_is_no_model(saved_by_peft: tuple[Path, Any], folders: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders["bert"], tmp_path / "both")
    shutil.copy(saved_by_peft[0] / FILES[0], tmp_path / "both")
    for path in (saved_by_peft[0], tmp_path / "both"):
        with pytest.raises(fedtune.UsageError, match=r"as adapters have: a run begins with one by model.lora.adapter"):
            fedtune.build_classifier(str(path), 3)


def config_with(**values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / FILES[0]
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def weights_with(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        weights = load_file(path / FILES[1])
        change(weights)
        save_file(weights, path / FILES[1])

    return changed


KEY = "base_model.model.bert.encoder.layer.0.attention.self.key.lora_A.weight"
HEAD = "base_model.model.classifier.bias"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (config_with(r=4), r"key.lora_A.weight has the shape \(3, 16\), the network asks for \(4, 16\)"),
        (config_with(r=0), "adapter_config.json says 0 for rank"),
        (config_with(r=None), "adapter_config.json says None for rank"),
        (config_with(lora_alpha=-1), "adapter_config.json says -1 for alpha"),
        (config_with(target_modules="all-linear"), "its target_modules are 'all-linear', which must be a list of names"),
        (config_with(target_modules=["key"]), "has a weight for what is not adapted here, .*intermediate"),
        (config_with(target_modules=["key", "intermediate.dense", "query"]), "lacks .*query.lora_A.weight"),
        (config_with(peft_type="IA3"), "its peft_type is 'IA3', which must be 'LORA'"),
        (config_with(use_dora=True), "its use_dora is True, which is not known here"),
        (config_with(rank_pattern={"query": 2}), "its rank_pattern is {'query': 2}"),
        (config_with(alpha_pattern={"query": 2}), "its alpha_pattern is"),
        (config_with(bias="all"), "its bias is 'all'"),
        (config_with(layers_to_transform=[0]), r"its layers_to_transform is \[0\]"),
        (config_with(init_lora_weights="pissa"), "its init_lora_weights is 'pissa', which changes the weights of the base"),
        (config_with(something_new=True), "its something_new is True"),
        (lambda path: (path / FILES[0]).write_text("["), "adapter_config.json cannot be read"),
        (lambda path: (path / FILES[0]).write_text("[]"), "has no JSON object"),
        (lambda path: (path / FILES[1]).write_bytes(b"x" * 50), "adapter_model.safetensors: "),
        (lambda path: (path / FILES[1]).unlink(), "adapter_model.safetensors: it is not there"),
        (weights_with(lambda weights: weights.pop(KEY)), f"lacks {KEY}"),
        (weights_with(lambda weights: weights.pop(HEAD)), f"lacks {HEAD}"),
        (weights_with(lambda weights: weights[KEY].fill_(math.nan)), "has other values than finite numbers"),
        (weights_with(lambda weights: weights.update({HEAD: torch.zeros(2)})), r"classifier.bias has the shape \(2,\)"),
        (weights_with(lambda weights: weights.update({KEY: weights[KEY].long()})), "has other values than finite numbers"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(
    saved_by_peft: tuple[Path, Any], folders: dict[str, str], change: Callable[[Path], None], said: str
) -> None:
    path, _ = saved_by_peft
    change(path)
    with pytest.raises(fedtune.UsageError, match=said) as caught:
        built(folders["bert"], {"adapter": str(path)})
    assert str(caught.value).startswith(f"lora.adapter: got '{path}'; allowed: a directory of a LoRA adapter that fits")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [{"rank": 4}, {"alpha": 4}, {"targets": ["query"]}, {"rslora": True}])
def test_other_values_than_those_of_the_adapter_are_refused(
    saved_by_peft: tuple[Path, Any], folders: dict[str, str], given: dict[str, Any]
) -> None:
    with pytest.raises(fedtune.UsageError, match=rf"lora.{next(iter(given))}: got .* as its adapter .* says, or nothing"):
        built(folders["bert"], {"adapter": str(saved_by_peft[0]), **given})
