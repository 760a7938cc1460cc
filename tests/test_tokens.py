from __future__ import annotations

from collections.abc import Callable
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import fedtune
from fedtune.data import tokens
from fedtune.data.batches import LengthGroupedBatches
from fedtune.data.tokens import tokenise
from fedtune.models.pretrained import load_tokenizer

TEXTS = ["word1", "word2 word3 word4 word5", "word6 nothing", "word7 " * 50]


def test_a_batch_is_what_the_tokenizer_itself_would_pad(tiny_bert: str) -> None:
    tokenizer = load_tokenizer(tiny_bert)
    store = tokenise(TEXTS, tokenizer, max_length=12)
    rows = torch.tensor([2, 0, 3])
    expected = tokenizer([TEXTS[i] for i in rows], truncation=True, max_length=12, padding=True, return_tensors="pt")
    got = store.batch(rows)
    assert torch.equal(got["input_ids"], expected["input_ids"])
    assert torch.equal(got["attention_mask"], expected["attention_mask"])
    assert store.batch(rows, pad_to=20)["input_ids"].shape == (3, 20)


def test_a_second_start_does_not_tokenise(tiny_bert: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    tokenizer = load_tokenizer(tiny_bert)
    first = tokenise(TEXTS, tokenizer, max_length=12)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_tokenise", lambda *_: pytest.fail("tokenised again"))
        again = tokenise(TEXTS, load_tokenizer(tiny_bert), max_length=12)
    assert torch.equal(first.ids_T, again.ids_T)
    assert torch.equal(first.offsets, again.offsets)


def test_other_texts_lengths_or_boundaries_are_other_cache_entries(
    tiny_bert: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    for texts, length in ((["ab", "c"], 12), (["a", "bc"], 12), (["ab", "c"], 13), (["ab"], 12)):
        tokenise(texts, load_tokenizer(tiny_bert), length)  # a used tokenizer remembers how it cut
    assert len(list(tmp_path.glob("tokens-*"))) == 4


def test_a_damaged_cache_entry_is_made_anew(tiny_bert: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    tokenizer = load_tokenizer(tiny_bert)
    first = tokenise(TEXTS, tokenizer, max_length=12)
    entry = next(tmp_path.glob("tokens-*"))
    entry.write_bytes(entry.read_bytes()[:40])
    assert torch.equal(tokenise(TEXTS, tokenizer, max_length=12).ids_T, first.ids_T)


def test_a_cache_that_cannot_be_written_only_warns(tiny_bert: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="tokens were not cached"):
        assert len(tokenise(TEXTS, load_tokenizer(tiny_bert), max_length=12).lengths) == 4


def test_length_grouped_batches_hold_every_text_once_and_differ_between_epochs() -> None:
    lengths = torch.from_numpy(np.random.default_rng(0).integers(3, 60, size=101))
    batches = LengthGroupedBatches(lengths, 8)
    torch.manual_seed(0)
    first, second = list(batches), list(batches)
    assert len(first) == len(batches) == 13
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(101))
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    torch.manual_seed(0)
    assert list(batches) == first


@pytest.mark.parametrize("texts", [128, 384, 1024])
def test_a_text_has_other_batch_mates_in_the_next_epoch_also_where_there_are_few_batches(texts: int) -> None:
    batches = LengthGroupedBatches(torch.from_numpy(np.random.default_rng(0).integers(5, 80, size=texts)), 32)
    torch.manual_seed(0)
    first, second = ({frozenset(pair) for batch in batches for pair in combinations(batch, 2)} for _ in range(2))
    assert len(first & second) < 0.3 * len(first)


def test_length_grouped_batches_that_drop_the_last_drop_texts_at_random_not_the_longest() -> None:
    batches = LengthGroupedBatches(torch.arange(3, 104), 8, drop_last=True)
    torch.manual_seed(0)
    epochs = [list(batches) for _ in range(20)]
    assert all(len(batches) == len(epoch) == 12 and {len(batch) for batch in epoch} == {8} for epoch in epochs)
    dropped = [set(range(101)) - set(chain(*epoch)) for epoch in epochs]
    assert all(len(one) == 5 for one in dropped)
    assert 30 < np.mean([place for one in dropped for place in one]) < 70


def test_length_grouped_batches_waste_less_than_random_ones() -> None:
    lengths = torch.from_numpy(np.random.default_rng(0).integers(3, 60, size=400))

    def padded(batches: list[list[int]]) -> int:
        return sum(int(lengths[batch].max()) * len(batch) for batch in batches)

    torch.manual_seed(0)
    grouped, random = list(LengthGroupedBatches(lengths, 8)), [b.tolist() for b in torch.randperm(400).split(8)]
    assert padded(grouped) < 0.75 * padded(random)


def test_bucketed_padded_masked_batches_give_the_logits_of_one_text_at_a_time(
    make_data: Callable[..., fedtune.FederatedDataModule], make_module: Callable[..., fedtune.BertClassifier]
) -> None:
    data, module = make_data(), make_module().eval()
    store = data.tokens
    with torch.inference_mode():
        for batch in data.val_dataloader():
            together = module(batch["input_ids"], batch["attention_mask"])
            for row, mask in enumerate(batch["attention_mask"].bool()):
                alone = module(batch["input_ids"][row][mask][None])
                torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-6)
    assert len(store.lengths.unique()) > 5  # there was something to pad
