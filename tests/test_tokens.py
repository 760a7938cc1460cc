from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SPECIAL, WORDS
from tokenizers import normalizers, pre_tokenizers, processors
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

import fedtune
from fedtune.data import token_cache, tokens
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
    with pytest.warns(UserWarning, match=rf"{entry} is damaged .*tokenised again"):
        assert torch.equal(tokenise(TEXTS, tokenizer, max_length=12).ids_T, first.ids_T)
    assert torch.equal(tokenise(TEXTS, tokenizer, max_length=12).ids_T, first.ids_T)  # and without a warning


def test_the_entry_of_other_texts_is_not_taken_for_one(tiny_bert: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    tokenizer = load_tokenizer(tiny_bert)
    first = tokenise(["word1", "word2"], tokenizer, max_length=12)
    entry = next(tmp_path.glob("tokens-*"))
    tokenise(["word3", "word4"], tokenizer, max_length=12)
    (other,) = set(tmp_path.glob("tokens-*")) - {entry}
    other.replace(entry)
    with pytest.warns(UserWarning, match=rf"{entry} is damaged .*not what was written"):
        assert torch.equal(tokenise(["word1", "word2"], tokenizer, max_length=12).ids_T, first.ids_T)


def test_no_flipped_bit_of_a_cache_entry_gives_other_tokens(
    tiny_bert: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    tokenizer = load_tokenizer(tiny_bert)
    first = tokenise(TEXTS, tokenizer, 12, second_texts=TEXTS[::-1])
    entry = next(tmp_path.glob("tokens-*"))
    whole, warned = entry.read_bytes(), 0
    for bit in range(0, 8 * len(whole), 7):
        entry.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = tokenise(TEXTS, tokenizer, 12, second_texts=TEXTS[::-1])
        warned += len(caught)
        assert torch.equal(again.ids_T, first.ids_T), bit
        assert torch.equal(again.offsets, first.offsets), bit
    assert warned > 0.9 * len(range(0, 8 * len(whole), 7))  # a blank in the padding of the header says nothing of the tokens


def entry_with(tmp_path: Path, **tensors: torch.Tensor) -> Path:
    path = tmp_path / "entry.safetensors"
    token_cache.write(path, tensors)
    return path


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"ids": [1, 2, 99], "offsets": [0, 1, 3]}, "ids beyond the vocabulary of 45"),
        ({"ids": [1, 2, -1], "offsets": [0, 1, 3]}, "ids beyond the vocabulary of 45"),
        ({"ids": [1, 2, 3], "offsets": [0, 1, 2]}, "its texts do not add up"),
        ({"ids": [1, 2, 3], "offsets": [0, 4, 3]}, "its texts do not add up"),
        ({"ids": [1, 2, 3], "offsets": [0, 3]}, "its texts do not add up"),
        ({"ids": [1, 2, 3]}, r"it has \['ids'\]"),
    ],
)
def test_an_entry_of_another_shape_or_range_is_none_though_its_checksum_is_right(
    tmp_path: Path, tensors: dict[str, list[int]], said: str
) -> None:
    kinds = {"ids": torch.int32, "offsets": torch.int64}
    path = entry_with(tmp_path, **{name: torch.tensor(values, dtype=kinds[name]) for name, values in tensors.items()})
    with pytest.warns(UserWarning, match=said):
        assert token_cache.read(path, texts=2, pairs=False, vocabulary=45) is None


def test_an_entry_of_other_types_is_none(tmp_path: Path) -> None:
    path = entry_with(tmp_path, ids=torch.tensor([1, 2]), offsets=torch.tensor([0, 1, 2]))  # int64 ids
    with pytest.warns(UserWarning, match="it has"):
        assert token_cache.read(path, texts=2, pairs=False, vocabulary=45) is None


def test_a_cache_entry_follows_the_umask(tiny_bert: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    before = os.umask(0o027)
    try:
        tokenise(TEXTS, load_tokenizer(tiny_bert), 12)
    finally:
        os.umask(before)
    assert [file.stat().st_mode & 0o777 for file in tmp_path.iterdir()] == [0o640]


def named(tokenizer: Any) -> str:
    path = token_cache.entry_of(["Word1 wörd"], None, tokenizer, 12)
    assert path is not None
    return path.name


def slow(vocabulary: Path, **options: Any) -> Any:
    return BertTokenizerLegacy(str(vocabulary), **options)


def test_every_setting_of_a_tokenizer_in_python_is_in_the_key(tmp_path: Path) -> None:
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("\n".join([*SPECIAL, "word1", "word2"]))
    other.write_text("\n".join([*SPECIAL, "word2", "word1"]))
    added, changed = slow(one), slow(one)
    added.add_tokens(["wörd"])
    changed.basic_tokenizer.do_lower_case = False  # after it was made
    made = [
        slow(one),
        slow(one, do_lower_case=False),
        slow(one, strip_accents=False),
        slow(one, never_split=["Word1"]),
        slow(one, truncation_side="left"),
        slow(one, split_special_tokens=True),
        slow(other),
        added,
        changed,
    ]
    assert len({named(tokenizer) for tokenizer in made}) == len(made)
    assert named(slow(one)) == named(made[0])


class Pieces:
    """What a processor of SentencePiece has to say of itself."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialized_model_proto(self) -> bytes:
        return self._content


def test_pieces_and_options_of_sentencepiece_are_in_the_key(tmp_path: Path) -> None:
    (tmp_path / "vocabulary.txt").write_text("\n".join([*SPECIAL, "word1"]))
    made = [slow(tmp_path / "vocabulary.txt") for _ in range(4)]
    for tokenizer, content, options in zip(made, (b"one", b"other", b"one", b"one"), ({}, {}, {"alpha": 0.1}, {}), strict=True):
        tokenizer.sp_model, tokenizer.sp_model_kwargs = Pieces(content), options
    assert len({named(tokenizer) for tokenizer in made}) == 3
    assert named(made[0]) == named(made[3])


def test_every_setting_of_a_tokenizer_with_a_backend_is_in_the_key(tiny_bert: str) -> None:
    made = [load_tokenizer(tiny_bert) for _ in range(7)]
    made[1].truncation_side = "left"
    made[2].add_tokens(["wörd"])
    made[3].backend_tokenizer.normalizer = normalizers.Lowercase()
    made[4].backend_tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    made[5].split_special_tokens = True
    made[6].backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert len({named(tokenizer) for tokenizer in made}) == len(made)
    used = load_tokenizer(tiny_bert)
    used(["word1"], padding="max_length", truncation=True, max_length=3)
    assert named(used) == named(made[0])


def test_a_tokenizer_that_nothing_can_name_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "vocabulary.txt").write_text("\n".join([*SPECIAL, "word1"]))
    mine = type("Mine", (BertTokenizerLegacy,), {"__module__": "mine"})(str(tmp_path / "vocabulary.txt"))
    with pytest.warns(UserWarning, match="tokens were not cached.*mine.Mine is not a tokenizer of Transformers"):
        assert tokenise(["word1"], mine, 12).ids_T.tolist() == [2, 5, 3]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kind", ["backend", "python"])
def test_tokens_are_those_of_a_call_of_the_tokenizer(tiny_bert: str, tmp_path: Path, kind: str, pairs: bool, side: str) -> None:
    (tmp_path / "vocabulary.txt").write_text("\n".join(SPECIAL + WORDS))
    tokenizer = load_tokenizer(tiny_bert) if kind == "backend" else slow(tmp_path / "vocabulary.txt")
    tokenizer.truncation_side, tokenizer.model_input_names = side, ["input_ids", "token_type_ids", "attention_mask"]
    texts = [*TEXTS, "word1 [SEP] word2"]
    others = [*texts[1:], "word9 " * 9] if pairs else None
    store = tokenise(texts, tokenizer, 12, second_texts=others)
    expected = tokenizer(
        texts, others, truncation="longest_first", max_length=12, padding=True, return_tensors="pt", return_token_type_ids=True
    )
    got = store.batch(torch.arange(len(texts)))
    assert torch.equal(got["input_ids"], expected["input_ids"])
    assert torch.equal(got["attention_mask"], expected["attention_mask"])
    assert ("token_type_ids" in got) == pairs
    if pairs:
        assert torch.equal(got["token_type_ids"], expected["token_type_ids"])
        assert got["token_type_ids"].max() == 1


def test_special_tokens_in_a_text_are_taken_as_the_tokenizer_is_set(tiny_bert: str) -> None:
    tokenizer = load_tokenizer(tiny_bert)
    tokenizer.split_special_tokens = True
    text = ["word1 [SEP] word2"]
    assert tokenise(text, tokenizer, 12).ids_T.tolist() == tokenizer(text, truncation=True, max_length=12)["input_ids"][0]


def test_pairs_must_be_complete(tiny_bert: str) -> None:
    with pytest.raises(fedtune.UsageError, match="second_texts: got 1; allowed: as many as there are texts, 4"):
        tokenise(TEXTS, load_tokenizer(tiny_bert), 12, second_texts=["word1"])


def test_texts_are_handed_over_in_pieces_that_bound_memory(tiny_bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["word1 " * count for count in (1, 30, 2, 3, 500, 1)]
    whole, sizes, encode = tokenise(texts, load_tokenizer(tiny_bert), 60), [], tokens._encode
    monkeypatch.setattr(tokens, "_CHARACTERS", 200)
    monkeypatch.setattr(tokens, "_encode", lambda given, *rest: sizes.append(list(map(len, given))) or encode(given, *rest))
    monkeypatch.setenv("FEDTUNE_CACHE", "/dev/null/none")
    with pytest.warns(UserWarning, match="tokens were not cached"):
        assert torch.equal(tokenise(texts, load_tokenizer(tiny_bert), 60).ids_T, whole.ids_T)
    assert sizes == [[6, 180, 12], [18], [3000], [6]]


def test_texts_of_which_the_tokenizer_knows_next_to_nothing_are_refused(tiny_bert: str) -> None:
    tokenizer = load_tokenizer(tiny_bert)
    strange = tokenise(["nobody knows these words"] * 9 + ["word1"], tokenizer, 12)
    with pytest.raises(fedtune.UsageError, match=r"tokenizer that knows the texts \(97% of their tokens are \[UNK\]\)"):
        tokens.check_known(strange, tokenizer)
    with pytest.warns(UserWarning, match=r"50% of the tokens are \[UNK\]"):
        tokens.check_known(tokenise(["word1 unknown"], tokenizer, 12), tokenizer)
    tokens.check_known(tokenise(["word1 word2 word3 word4 word5 unknown"], tokenizer, 12), tokenizer)


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


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_long_text_only_what_its_tokens_are_made_of_is_tokenised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, side: str
) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    tokenizer, rng = load_tokenizer("minilm"), np.random.default_rng(0)
    tokenizer.truncation_side = side
    letters = np.array(list("abcdefghij klmnopqrs tuvwxyz ABC äöü .,-!\n 0123 東京 ́ "))
    long = ["".join(letters[rng.integers(len(letters), size=20_000)]) for _ in range(5)]
    long += ["x" * 20_000 + " end", "start " + "y" * 20_000, " " * 20_000 + "middle" + " " * 20_000, "東" * 20_000]
    seen, encode = [], tokens._encode
    monkeypatch.setattr(tokens, "_encode", lambda given, *rest: seen.append(sum(map(len, given))) or encode(given, *rest))
    store = tokenise(long, tokenizer, 16)
    expected = tokenizer(long, truncation=True, max_length=16)["input_ids"]
    assert [part.tolist() for part in store.ids_T.split(store.lengths.tolist())] == expected
    assert sum(seen) < 1.5 * sum(map(len, long[5:8]))  # of the ordinary ones next to nothing


@pytest.mark.parametrize("pairs", [False, True])
def test_a_length_that_special_tokens_fill_is_refused(tiny_bert: str, pairs: bool) -> None:
    tokenizer = load_tokenizer("minilm")
    least = 5 if pairs else 3
    others = ["it rains"] if pairs else None
    assert len(set(tokenise(["the sun"], tokenizer, least, second_texts=others).ids_T.tolist())) == least - pairs
    with pytest.raises(fedtune.UsageError, match=f"max_length: got {least - 1}; allowed: at least {least}"):
        tokenise(["the sun"], tokenizer, least - 1, second_texts=others)


def test_texts_without_a_token_are_counted_in_a_warning() -> None:
    tokenizer = load_tokenizer("minilm")
    with pytest.warns(UserWarning, match="2 texts have no tokens"):
        tokens.check_known(tokenise(["the sun", "\u200b", "\u0007"], tokenizer, 12), tokenizer)
