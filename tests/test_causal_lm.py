"""`CausalLM`: losses of answers alone, pooled metrics, rows of several conversations, and a federation of decoders."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import assert_equal, assert_near, make_loop, weights_of, without_times
from decoders import make_chats, save_decoder
from torch.nn import functional as F

import fedtune
from fedtune.models import causal_lm
from fedtune.models.generation import greedy
from fedtune.models.perplexity import Perplexity
from fedtune.models.rows import Rows
from fedtune.storage import checkpoint
from fedtune.tensors import assign_, travelling

Command = Callable[..., tuple[int, str, str]]
FAMILIES = ["llama", "qwen2", "qwen3", "gpt2"]


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("decoders")
    return {family: save_decoder(folder / family, family) for family in FAMILIES}


def data_of(model: str, task: Any = None, **more: Any) -> fedtune.FederatedDataModule:
    options = {"task": task or make_chats(), "model": model, "num_clients": 3, "batch_size": 8, "max_length": 64}
    return fedtune.FederatedDataModule(**(options | more))


def module_of(model: str, **more: Any) -> fedtune.CausalLM:
    return fedtune.CausalLM(model, **({"learning_rate": 1e-2, "dropout": 0.0 if "gpt2" in model else None} | more))


def batch_of(model: str, rows: int = 8) -> dict[str, torch.Tensor]:
    data = data_of(model)
    return data.tokens.batch(torch.arange(rows))


def loss_of(module: fedtune.CausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits, target, _ = module.answer_logits(batch)
    return F.cross_entropy(logits, target)


# ---- the loss


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_transformers_own_over_the_answers(family: str, decoders: dict[str, str]) -> None:
    module, batch = module_of(decoders[family]), batch_of(decoders[family])
    theirs = module.network(**batch, use_cache=False).loss
    torch.testing.assert_close(loss_of(module, batch), theirs)
    assert module._selects  # and it was computed without the logits of other tokens


def test_a_network_that_does_more_behind_its_output_layer_is_called_as_a_whole(tmp_path: Path) -> None:
    import transformers

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = transformers.Gemma2Config(**sizes, head_dim=8, vocab_size=268, final_logit_softcapping=2.0, pad_token_id=0)
    model = save_decoder(tmp_path)
    config.save_pretrained(tmp_path)
    module = module_of(model, init="random")
    assert not module._selects
    batch = batch_of(model)
    torch.testing.assert_close(loss_of(module, batch), module.network(**batch, use_cache=False).loss)


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary(decoders: dict[str, str]) -> None:
    module = module_of(decoders["llama"])
    torch.nn.init.zeros_(module.network.get_output_embeddings().weight)
    loop = make_loop()
    [found] = loop.validate(module, data_of(decoders["llama"]))
    size = module.network.config.vocab_size
    assert found["loss_nats"] == pytest.approx(math.log(size), rel=1e-6)
    assert found["perplexity"] == pytest.approx(size, rel=1e-5)


def test_perplexity_is_of_the_mean_over_all_tokens_whatever_the_batches(decoders: dict[str, str]) -> None:
    module, found = module_of(decoders["llama"], exact_match=True), []
    for size in (1, 3, 100):
        found.append(make_loop().validate(module, data_of(decoders["llama"], eval_batch_size=size))[0])
    for one in found:
        assert one == pytest.approx(found[-1], rel=1e-5)
        assert one["perplexity"] == pytest.approx(math.exp(one["loss_nats"]), rel=1e-6)
    data = data_of(decoders["llama"])
    tokens = [loss_of(module, data.tokens.batch(torch.tensor([int(row)]))).item() for row in data.task.parts["validation"]]
    counts = [int(data.tokens.answers[row]) for row in data.task.parts["validation"]]
    pooled = sum(loss * count for loss, count in zip(tokens, counts, strict=True)) / sum(counts)
    assert len(set(counts)) > 1
    assert found[0]["loss_nats"] == pytest.approx(pooled, rel=1e-5)
    assert abs(sum(map(math.exp, tokens)) / len(tokens) / found[0]["perplexity"] - 1) > 1e-4  # which is another number


def test_perplexity_adds_up_in_any_pieces() -> None:
    losses = torch.rand(50)
    found = Perplexity()
    for piece in losses.split([1, 30, 19]):
        found.update(piece)
    assert float(found.compute()) == pytest.approx(math.exp(losses.double().mean()), rel=1e-6)
    orders = [Perplexity(), Perplexity()]
    for piece in losses.split(7):
        orders[0].update(piece)
    for piece in losses.flip(0).split(11):
        orders[1].update(piece)
    assert orders[0].total == orders[1].total == found.total  # to the bit
    found.update(torch.tensor([1.0, math.nan]))
    assert math.isnan(found.compute())


def test_exact_match_is_what_greedy_generation_would_write(decoders: dict[str, str]) -> None:
    rows, model = list(range(24)), decoders["llama"]
    said = ["no" if row % 3 else "yes" for row in rows]  # it learns what is said more often
    prompts = [f"word{row}" + " and so on" * (row % 4) for row in rows]
    task = fedtune.InstructionTask("x", prompts, said, {"train": rows[:20], "test": rows[20:]})
    data, module = data_of(model, task, num_clients=1), module_of(model, exact_match=True, learning_rate=3e-2)
    make_loop(max_rounds=20, evaluate_on="test").fit(module, data)
    batch = data.tokens.batch(torch.tensor(rows))
    firsts = [int((row != -100).nonzero()[0]) for row in batch["labels"]]
    prompts = [ids[:first].tolist() for ids, first in zip(batch["input_ids"], firsts, strict=True)]
    written = greedy(module.network, prompts, 12, [data.tokenizer.eos_token_id], 0)
    expected = [row[row != -100].tolist() for row in batch["labels"]]
    right = [one == other[:-1] for one, other in zip(written, expected, strict=True)]
    with torch.no_grad():
        logits, target, conversation = module.eval().answer_logits(batch)
    wrong = set(conversation[logits.argmax(-1) != target].tolist())
    assert [row not in wrong for row in range(len(task))] == right
    assert 0 < sum(right) < len(right)


def test_shares_are_of_all_tokens_and_of_all_conversations_whatever_the_batches(decoders: dict[str, str]) -> None:
    said, model = ["no" if row % 3 else "yes" for row in range(31)], decoders["llama"]
    prompts = [f"word{row}" + " and so on" * (row % 4) for row in range(31)]
    task = fedtune.InstructionTask("x", prompts, said, {"train": list(range(20)), "test": list(range(20, 31))})
    data, module = data_of(model, task, num_clients=1), module_of(model, exact_match=True, learning_rate=3e-2)
    make_loop(max_rounds=20, evaluate_on="test").fit(module, data)
    with torch.no_grad():
        logits, target, conversation = module.eval().answer_logits(data.tokens.batch(torch.arange(20, 31)))
    right = logits.argmax(-1) == target
    whole = [bool(right[conversation == number].all()) for number in range(11)]
    assert 0 < sum(whole) < right.float().mean() * 11 < 11
    assert len(set(conversation.bincount().tolist())) > 1
    for size in (1, 4, 100):
        [found] = make_loop().test(module, data_of(model, task, num_clients=1, eval_batch_size=size))
        assert found["token_accuracy"] == pytest.approx(float(right.float().mean()), rel=1e-6)
        assert found["exact_match"] == pytest.approx(sum(whole) / 11, rel=1e-6)


# ---- rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [1, 30, 48, 200])
def test_packed_conversations_have_the_losses_and_gradients_of_unpacked_ones(
    family: str, budget: int, decoders: dict[str, str]
) -> None:
    batch, found = batch_of(decoders[family], 10), []
    for packing in (None, budget):
        module = module_of(decoders[family], packing=packing)
        loss = loss_of(module, batch)
        loss.backward()
        found.append((loss.detach(), {name: one.grad for name, one in module.named_parameters() if one.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert_near(found[0][1], found[1][1], 1e-5)


def test_rows_are_within_the_budget_and_hold_every_token_once() -> None:
    lengths = [5, 3, 9, 2, 7, 1]
    ids = torch.zeros(6, 9, dtype=torch.int64)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    for number, length in enumerate(lengths):
        ids[number, :length] = 10 * number + torch.arange(length) + 1
    rows = Rows.of(ids, mask, 9)
    assert rows is not None
    assert rows.ids_RW.shape == (3, 9)  # 9, 7 + 2, 5 + 3 + 1: all full
    for number, length in enumerate(lengths):
        row, first = int(rows.row_B[number]), int(rows.first_B[number])
        assert torch.equal(rows.ids_RW[row, first : first + length], ids[number, :length])
        assert rows.positions_RW[row, first : first + length].tolist() == list(range(length))
    assert Rows.of(ids[2:3], mask[2:3], 9) is None  # nothing to save
    assert Rows.of(ids, mask.flip(1), 9) is None  # padding in front


def test_a_network_that_would_attend_across_a_row_is_refused(decoders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    plain = transformers.LlamaModel.forward

    def without_positions(self: Any, *given: Any, position_ids: Any = None, **more: Any) -> Any:
        return plain(self, *given, **more)

    monkeypatch.setattr(transformers.LlamaModel, "forward", without_positions)
    with pytest.raises(fedtune.UsageError, match=r"packing: got 64; allowed: nothing, with a model of the family llama"):
        module_of(decoders["llama"], packing=64)


# ---- options


@pytest.mark.parametrize("options", [{}, {"lora": {"rank": 2}}, {"lora": {"rank": 2}, "half_base": True}])
def test_gradients_are_the_same_with_activations_computed_again(options: dict[str, Any], decoders: dict[str, str]) -> None:
    batch, found = batch_of(decoders["llama"]), []
    for again in (False, True):
        module = module_of(decoders["llama"], gradient_checkpointing=again, **options)
        loss_of(module, batch).backward()
        found.append({name: one.grad for name, one in module.named_parameters() if one.grad is not None})
    assert_equal(*found)


def test_of_adapters_alone_there_are_gradients_and_a_half_base_is_in_bf16(decoders: dict[str, str]) -> None:
    whole, half = (module_of(decoders["llama"], lora={"rank": 2}, half_base=half) for half in (False, True))
    trained = {name for name, one in half.named_parameters() if one.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert {one.dtype for name, one in half.named_parameters() if name not in trained} == {torch.bfloat16}
    assert {one.dtype for name, one in half.named_parameters() if name in trained} == {torch.float32}
    batch = batch_of(decoders["llama"])
    assert loss_of(half, batch).item() == pytest.approx(loss_of(whole, batch).item(), rel=1e-2)


def test_the_dropout_of_a_family_is_set_and_a_family_without_is_one_line(decoders: dict[str, str]) -> None:
    import transformers

    module = module_of(decoders["gpt2"], dropout=0.3)
    assert {part.p for part in module.modules() if isinstance(part, torch.nn.Dropout)} == {0.3}
    assert module.network.config.summary_first_dropout == transformers.GPT2Config().summary_first_dropout  # of another head
    with pytest.raises(fedtune.UsageError, match=r"dropout: got 0\.3; allowed: nothing, as the family mamba has no dropout"):
        causal_lm.set_dropout(transformers.MambaConfig(), 0.3)
    assert module_of(decoders["llama"], dropout=0.2).network.config.attention_dropout == 0.2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"packing": 0}, "packing: got 0"),
        ({"packing": True}, "packing: got True"),
        ({"half_base": True}, "False, without lora"),
        ({"optimizer": "adam"}, "optimizer: got 'adam'"),
        ({"learning_rate": 0}, "learning_rate: got 0"),
        ({"lora": {"rang": 8}}, "lora: got 'rang'; allowed: rank"),
        ({"vocab_size": 9}, "vocab_size: got 9; allowed: nothing, with pretrained weights"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(options: dict[str, Any], match: str, decoders: dict[str, str]) -> None:
    with pytest.raises(fedtune.UsageError, match=match):
        module_of(decoders["llama"], **options)


def test_an_encoder_is_no_causal_model_and_a_decoder_no_classifier(tiny_bert: str, decoders: dict[str, str]) -> None:
    with pytest.raises(fedtune.UsageError, match=r"name: got .*; allowed: a causal language model, .* \(this is 'bert'\)"):
        fedtune.CausalLM(tiny_bert)
    with pytest.raises(fedtune.UsageError, match=r"\(this is 'llama'\); a causal language model is for a task of instructions"):
        fedtune.build_classifier(decoders["llama"], 2)


def test_weights_that_lack_the_output_layer_are_one_line(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = save_decoder(tmp_path, tie_word_embeddings=False)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(fedtune.UsageError, match=r"these lack lm_head\.weight"):
        fedtune.CausalLM(model)


def test_the_configuration_has_no_details_that_were_not_chosen(decoders: dict[str, str]) -> None:
    plain = module_of(decoders["llama"]).config
    assert not plain.keys() & causal_lm.DETAILS.keys()
    assert module_of(decoders["llama"], packing=64).config == plain | {"packing": 64}


# ---- a federation


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_federation_learns_and_tied_weights_travel_once(family: str, decoders: dict[str, str]) -> None:
    module = module_of(decoders[family])
    tied = module.network.get_input_embeddings().weight is module.network.get_output_embeddings().weight
    history = make_loop(max_rounds=3).fit(module, data_of(decoders[family]))
    assert tied
    assert history[-1].loss_nats < history[0].loss_nats
    assert history[0].bytes_up == 3 * 4 * sum(one.numel() for one in module.parameters())
    assert not hasattr(history[0], "accuracy")


def test_a_run_monitors_the_loss_unless_it_says_something_else(tmp_path: Path, decoders: dict[str, str]) -> None:
    loop = make_loop(max_rounds=2, run_dir=str(tmp_path / "one"), baselines=("centralised", "local"))
    loop.fit(module_of(decoders["llama"]), data_of(decoders["llama"]))
    summary = loop.summary
    assert (summary["monitor"], summary["mode"], summary["best_round"]) == ("loss_nats", "min", 2)
    assert summary["best_loss_nats"] == loop.history[-1].loss_nats
    assert summary["centralised_loss_nats"] < summary["local_loss_nats"]
    assert summary["majority_accuracy"] is None
    other = make_loop(max_rounds=1, monitor="token_accuracy", run_dir=str(tmp_path / "two"))
    other.fit(module_of(decoders["llama"]), data_of(decoders["llama"]))
    assert (other.summary["monitor"], other.summary["mode"]) == ("token_accuracy", "max")
    with pytest.raises(fedtune.UsageError, match="monitor: got 'f1'; allowed: loss_nats, token_accuracy, perplexity"):
        make_loop(max_rounds=1, monitor="f1").fit(module_of(decoders["llama"]), data_of(decoders["llama"]))


@pytest.mark.parametrize("options", [{}, {"lora": {"rank": 2}, "half_base": True, "packing": 48}])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(options: dict[str, Any], tmp_path: Path, decoders: dict[str, str]) -> None:
    def run(rounds: int, folder: str) -> tuple[Any, Any]:
        module = module_of(decoders["llama"], **options)
        loop = make_loop(max_rounds=rounds, run_dir=str(tmp_path / folder), seed=3)
        loop.fit(module, data_of(decoders["llama"], split="by_author"))
        return module, loop.history

    run(2, "parts")
    (whole, records), (parts, again) = run(4, "whole"), run(4, "parts")
    assert_equal(weights_of(whole), weights_of(parts))
    assert without_times(records) == without_times(again)


def test_a_trainer_is_the_centralised_baseline(decoders: dict[str, str]) -> None:
    data = data_of(decoders["llama"], shuffle=False, num_clients=1)
    one = module_of(decoders["llama"], optimizer="sgd", learning_rate=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(one, datamodule=data)
    other = module_of(decoders["llama"], optimizer="sgd", learning_rate=0.1)
    loop = make_loop(max_rounds=2, baselines=("centralised",))
    loop.fit(other, data_of(decoders["llama"], shuffle=False, num_clients=1))
    pooled = loop.baseline_runs["centralised"][-1]
    assert float(trainer.callback_metrics["loss_nats"]) == pytest.approx(pooled.loss_nats, rel=1e-5)
    assert float(trainer.callback_metrics["perplexity"]) == pytest.approx(pooled.perplexity, rel=1e-5)


def test_evaluation_by_clients_would_be_a_mean_of_exponentials(decoders: dict[str, str]) -> None:
    loop = make_loop(max_rounds=1, evaluation="clients", evaluate_on="test")
    with pytest.raises(fedtune.UsageError, match="evaluation: got 'clients'; allowed: pooled"):
        loop.fit(module_of(decoders["llama"]), data_of(decoders["llama"]))


# ---- the command line


def chats(folder: Path) -> list[str]:
    rows = [{"messages": one, "who": f"w{number % 3}"} for number, one in enumerate(make_chats().messages)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data.task", "instructions", "--data.task_options.path", str(folder / "chats.jsonl"), "--data.num_clients", "3"]


QUICK = ["--data.batch_size", "8", "--data.max_length", "64", "--loop.precision", "32-true", "--loop.accelerator", "cpu"]


def test_a_command_runs_and_reports_by_the_loss(tmp_path: Path, decoders: dict[str, str], command: Command) -> None:
    given = [*chats(tmp_path), "--model.name", decoders["llama"], *QUICK, "--loop.max_rounds", "2", "--model.packing", "64"]
    code, out, _ = command(
        "run", *given, "--data.split", "by_author", "--data.task_options.author", "who", "--runs_dir", str(tmp_path / "runs")
    )
    assert code == 0
    assert "test part: loss_nats" in out
    assert "centralised_loss_nats" in out
    [run] = (tmp_path / "runs").iterdir()
    again, _, _ = command("run", "--config", str(run / "config.yaml"), "--runs_dir", str(tmp_path / "runs"))
    assert again == 0
    assert [one.name for one in (tmp_path / "runs").iterdir()] == [run.name]
    assert command("report", str(tmp_path / "runs"), "--out", str(tmp_path / "report"))[0] == 0
    table = (tmp_path / "report" / "tables.md").read_text()
    assert "| loss, nats | perplexity | token accuracy |" in table
    assert "| accuracy |" not in table


def test_a_command_describes_conversations(tmp_path: Path, decoders: dict[str, str], command: Command) -> None:
    code, out, _ = command(
        "describe",
        *chats(tmp_path),
        "--data.batch_size",
        "8",
        "--model.name",
        decoders["llama"],
        "--picture",
        str(tmp_path / "split.png"),
    )
    assert code == 0
    sizes = re.search(r"conversations: (\d+) for training, (\d+) for validation, (\d+) for the test", out)
    assert sizes is not None
    assert sum(map(int, sizes.groups())) == 60
    assert "answer" in out


def test_a_sweep_compares_by_the_loss(tmp_path: Path, decoders: dict[str, str], command: Command) -> None:
    words = [*chats(tmp_path), "--model.name", decoders["llama"], *QUICK, "--loop.max_rounds", "1"]
    values = {
        name[2:]: {"value": int(value) if value.isdigit() else value}
        for name, value in zip(words[::2], words[1::2], strict=True)
    }
    parameters = values | {"model.learning_rate": {"values": [0.01, 0.001]}}
    content = {"method": "grid", "metric": {"name": "loss_nats", "goal": "minimize"}, "parameters": parameters}
    (tmp_path / "sweep.yaml").write_text(json.dumps(content))
    code, _out, err = command("sweep", str(tmp_path / "sweep.yaml"), "--runs_dir", str(tmp_path / "runs"))
    assert code == 0, err
    assert len([one for one in (tmp_path / "runs").iterdir() if (one / "summary.json").exists()]) == 2


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--model.label_smoothing", "0.1"], "--model.label_smoothing: got 0.1; allowed: 0.0, for a causal language model"),
        (["--model.name", "minilm"], "--model.name: got 'minilm'; allowed: a causal language model"),
        (["--data.split", "dirichlet"], "--data.split: got 'dirichlet'; allowed: a split that needs no labels"),
        (["--data.task_options.prompt", "x"], "--data.task_options.answer: got None"),
        (["--model.packing", "none"], "--model.packing: got 'none'; allowed: a whole number"),
    ],
)
def test_a_wrong_flag_is_one_line(
    given: list[str], match: str, tmp_path: Path, decoders: dict[str, str], command: Command
) -> None:
    names = given[::2]
    first = [*chats(tmp_path), *([] if "--model.name" in names else ["--model.name", decoders["llama"]]), *QUICK]
    code, _, err = command("run", *first, *given, "--loop.max_rounds", "1")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert match in err


def test_options_of_causal_models_are_refused_for_classifiers(
    tmp_path: Path, decoders: dict[str, str], command: Command
) -> None:
    code, _, err = command("run", "--model.packing", "64")
    assert code == 2
    assert "--model.packing: got 64; allowed: None, for a classifier, which has no such option" in err
    code, _, err = command("run", "--model.name", decoders["llama"])
    assert code == 2
    assert "is for a task of instructions" in err


@pytest.mark.parametrize("more", [[], ["--model.lora.rank", "2"]])
def test_an_exported_run_has_the_logits_of_its_module(
    more: list[str], tmp_path: Path, decoders: dict[str, str], command: Command
) -> None:
    import transformers

    given = [*chats(tmp_path), "--model.name", decoders["llama"], *QUICK, "--loop.max_rounds", "1", *more]
    assert command("run", *given, "--loop.baselines", "[]", "--run_dir", str(tmp_path / "run"))[0] == 0
    code, out, err = command("export", str(tmp_path / "run"), str(tmp_path / "model"), *(["--merge"] if more else []))
    assert code == 0, err
    assert "text-generation" in out
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert again.config.use_cache
    module = module_of(decoders["llama"], lora={"rank": 2} if more else None)
    ids = batch_of(decoders["llama"], 2)["input_ids"]
    theirs = again(ids).logits
    state = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert state is not None
    assign_(travelling(module), state.weights)
    torch.testing.assert_close(module.eval()(ids), theirs)


def test_an_exported_adapter_is_opened_by_peft(tmp_path: Path, decoders: dict[str, str], command: Command) -> None:
    import peft
    import transformers

    given = [*chats(tmp_path), "--model.name", decoders["llama"], *QUICK, "--loop.max_rounds", "1", "--model.lora.rank", "2"]
    assert command("run", *given, "--loop.baselines", "[]", "--run_dir", str(tmp_path / "run"))[0] == 0
    assert command("export", str(tmp_path / "run"), str(tmp_path / "adapter"))[0] == 0
    assert command("export", str(tmp_path / "run"), str(tmp_path / "whole"), "--merge")[0] == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(decoders["llama"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks Transformers by an old name
        adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    ids = batch_of(decoders["llama"], 2)["input_ids"]
    torch.testing.assert_close(adapted(ids).logits, whole(ids).logits)
