"""`FederatedDataModule`: one task, tokenised once, divided among clients."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fedtune.data import holdings
from fedtune.data.answers import instruction_tokens
from fedtune.data.batches import LengthGroupedBatches, Texts
from fedtune.data.contract import whole_at_least
from fedtune.data.instructions import InstructionTask
from fedtune.data.registry import load_task
from fedtune.data.splits import DEFAULTS, Split, check_options, divide, options_of
from fedtune.data.task import IntArray, TextTask
from fedtune.data.tokens import TokenStore, tokens_of
from fedtune.errors import UsageError, one_of, warn
from fedtune.models.agreement import tokenizer_for
from fedtune.randomness import stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING = ("longest", "max_length")
_WHOLE = ("num_clients", "batch_size", "eval_batch_size", "max_length", "seed", "limit", "pad_to_multiple_of")
_LEAST = {"max_length": 3, "seed": 0}  # of the others 1


class FederatedDataModule(pl.LightningDataModule):
    """The texts of a task as batches: for each client, pooled, for validation and for test.

    It is an ordinary `LightningDataModule`: in a plain `Trainer` the clients' data are pooled. Nothing is read before
    the first use; `num_labels` and the like count as a use.

    Args:
        task: a name of `fedtune.TASKS`, or a `TextTask`, or an `InstructionTask`.
        model: the model whose tokenizer is used: a name of `fedtune.MODELS`, a local folder or a hub id.
        num_clients: number of clients.
        split: a name of `fedtune.SPLITS`, or a callable (columns, num_clients, seed) -> list of row arrays.
        skew: for `by_author`, `by_author_and_label`: the probability that a text goes to its author's home client; for
            `by_length`: that it stays in its place among the sorted ones. 0 is not skewed.
        alpha: for `dirichlet`, `by_author_and_label`: the concentration; small is skewed.
        batch_size: texts in a training batch.
        eval_batch_size: texts in a validation or test batch.
        max_length: longest sequence in tokens, special ones included; longer texts are cut, conversations so that tokens of
            answers are left (`fedtune.data.answers`).
        padding: to the "longest" text of the batch, or to "max_length".
        pad_to_multiple_of: with padding "longest", lengths of batches are rounded up to multiples, so that there are few
            (`torch.compile` takes 8 shapes by default: 16 suits a max_length of 128, with `drop_last`).
        mask: whether batches say what is padding; without the mask, padding is attended to, as in the paper's code.
        shuffle: new random batches each epoch; False keeps the same batches in the same order, those of the split.
        drop_last: leave out texts that do not fill a training batch.
        group_by_length: random batches of texts of similar length, for networks that compute the padding (on a GPU; compiled).
            It can cost some points of accuracy (`docs/performance.md`).
        limit: at most so many training texts, drawn at random; all by default.
        tokenizer: another tokenizer than the model's, named like a model.
        seed: seed of the split and of `limit`.
        folder: where the files of the task lie, for tasks that are read from files; by default below `FEDTUNE_DATA`.
        task_options: more keyword arguments for the task's builder, for example {"path": "my.csv", "label": "stars"}.
        shards_per_client: for `shards`: pieces of the sorted texts for each client; 2 by default.
        exponent: for `quantity`: sizes fall as rank ** -exponent; 0 is equal sizes, 1 (the default) Zipf's law.
        min_size: for `quantity`: texts that every client has at least; for `natural`: that an author needs for a client of its
            own; 1 by default.
        small_authors: for `natural`: those with fewer are left out ("drop", the default), or are one client ("pool").

    Raises:
        UsageError: a value outside of what is allowed; on first use also what task, tokenizer and split refuse. A parameter of
            a split that is given to another one is a warning.

    Batches are dicts: "input_ids" and "attention_mask" (B, L) int64, "labels" (B,) int64; of an `InstructionTask`, of which a
    text is a conversation, "labels" (B, L): the token ids of its answers, -100 elsewhere.
    """

    def __init__(
        self,
        task: str | holdings.Task = "authors",
        model: str = "minilm",
        num_clients: int = 8,
        split: str | Split = "iid",
        skew: float = 1.0,
        alpha: float = 0.5,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_length: int = 128,
        padding: str = "longest",
        mask: bool = True,
        shuffle: bool = True,
        drop_last: bool = False,
        limit: int | None = None,
        tokenizer: str | None = None,
        seed: int = 0,
        folder: str | None = None,
        task_options: dict[str, Any] | None = None,
        pad_to_multiple_of: int | None = None,
        group_by_length: bool = False,
        shards_per_client: int | None = None,
        exponent: float | None = None,
        min_size: int | None = None,
        small_authors: str | None = None,
    ) -> None:
        super().__init__()
        for name in _WHOLE:
            if locals()[name] is not None or name not in ("limit", "pad_to_multiple_of"):
                whole_at_least(name, locals()[name], _LEAST.get(name, 1))
        if padding not in PADDING:
            raise one_of("padding", padding, PADDING)
        if group_by_length and (padding == "max_length" or not shuffle):
            raise UsageError("group_by_length", True, "False, with padding to max_length or without shuffle")
        self.save_hyperparameters(ignore=["task", "split"], logger=False)  # a seed of the module's own would clash
        for line in check_options(split, self.hparams):
            warn(line)
        self._task, self._split = task, split
        self._kept: tuple[TokenStore, Tensor | None] | None = None
        self.hparams["task"] = task.name if isinstance(task, (TextTask, InstructionTask)) else task
        self.hparams["split"] = split if isinstance(split, str) else getattr(split, "__name__", repr(split))

    @functools.cached_property
    def task(self) -> holdings.Task:
        """The task, loaded."""
        options = self.hparams
        given = {} if options["folder"] is None else {"folder": options["folder"]}
        return load_task(self._task, given | (options["task_options"] or {}))

    @functools.cached_property
    def tokens(self) -> TokenStore:
        """All texts of the task as tokens; rows as in the task."""
        tokenizer, of = self.tokenizer, instruction_tokens if self.kind == "instructions" else tokens_of
        return of(lambda: self.task, tokenizer, self.hparams["max_length"])

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, of the model or the other one that was asked for; it fits the model."""
        return tokenizer_for(self.hparams["model"], self.hparams["tokenizer"], self.hparams["max_length"])

    @functools.cached_property
    def client_indices(self) -> list[IntArray]:
        """For each client the row numbers of its texts in the task."""
        rows, limit, size = self.task.parts["train"], self.hparams["limit"], self.hparams["batch_size"]
        if limit is not None:
            rows = np.sort(stream(self.hparams["seed"], "limit").permutation(rows)[:limit])
        parts = self._divide(rows)
        split, smallest = self.hparams["split"], min(map(len, parts))
        self._left_out = holdings.left_out_said(self.task, split, rows, parts, options_of(split, self.hparams))
        if split == "natural" and self._left_out:
            warn(self._left_out)
        if smallest < size:
            warn(f"batch_size {size} is larger than the smallest client (texts: {smallest}), which has one batch")
        return parts

    @property
    def left_out(self) -> str:
        """In a line, which training texts the split leaves out, or which authors have no client of their own; mostly empty."""
        self.client_indices  # noqa: B018 - reading them makes it
        return self._left_out

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, but for parameters of splits that are not given."""
        given = {key: value for key, value in self.hparams.items() if value is not None or key not in DEFAULTS}
        return {**given, "split": self._split}

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that name the content of the task: tokens, labels, authors, parts, second texts if any."""
        return holdings.digest_of(self.task, self.tokens)

    @property
    def kind(self) -> str:
        """ "texts", to be classified, or "instructions", of which the answers are learned."""
        return self.task.kind

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return int(self.hparams["num_clients"])

    @property
    def num_labels(self) -> int:
        """Number of classes; 0 where the task has none."""
        return len(self.task.label_names)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.task.label_names

    def majority_accuracy(self, part: str = "test") -> float | None:
        """Accuracy on a part of always answering the most frequent training label; None where no labels are learned."""
        return holdings.majority_of(self.task, self.client_indices, part)

    def setup(self, stage: str | None = None) -> None:
        """Load, tokenise and divide, where that has not been done."""
        self.tokens, self.client_indices  # noqa: B018 - reading them makes them

    def keep_on(self, device: torch.device) -> None:
        """Keep token ids and labels on a device, where batches are made from then on. `FederatedLoop` does it on a GPU."""
        labels = holdings.labels_of(self.task)
        self._kept = self.tokens.to(device), None if labels is None else labels.to(device)

    @functools.cached_property
    def client_test_indices(self) -> list[IntArray]:
        """For each client its share of the test part, by the same split, without `min_size`; with `natural` its authors'."""
        return self._shares("test")

    def client_test_dataloader(self, client: int) -> DataLoader[dict[str, Tensor]]:
        """One client's share of the test part, in the order of the split."""
        return self._share(self.client_test_indices[client])

    def client_val_dataloader(self, client: int) -> DataLoader[dict[str, Tensor]]:
        """The same of the validation part."""
        return self._share(self._shares("validation")[client])

    def client_dataloader(self, client: int) -> DataLoader[dict[str, Tensor]]:
        """Training batches of one client, in a new random order each time it is iterated."""
        return self._training(self.client_indices[client])

    def client_tokens(self, client: int) -> int:
        """Tokens of a client's texts, as they are cut to `max_length`."""
        return int(self.tokens.lengths_of(torch.from_numpy(self.client_indices[client])).sum())

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Training batches of all clients' texts, pooled."""
        return self._training(np.sort(np.concatenate(self.client_indices)))  # the same whatever the split

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The validation part, sorted by length."""
        if not len(self.task.parts["validation"]):
            raise UsageError("evaluate_on", "validation", f"test, as the task {self.task.name} has no validation part")
        return self._evaluation(self.task.parts["validation"])

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The test part, sorted by length."""
        return self._evaluation(self.task.parts["test"])

    def describe(self) -> holdings.SplitTable:
        """The split as a table, a list of one row a client; it shows itself, and `pandas.DataFrame(data.describe())` takes it.

        Returns:
            rows with `client`, `examples`, `tokens`, `mean_characters`, of conversations `answer_tokens`, and where there are
                such `label_entropy_bits`, `labels` and `authors`: examples by name.
        """
        return holdings.table_of(self.task, self.client_indices, self.tokens, self._characters)

    def client_accuracy(self, part: str, correct_N: Tensor) -> list[float | None]:
        """How accurate a model is for each client: on texts of a part, mixed like the client's training texts.

        That is the mean, over the client's training texts, of the accuracy on the part's texts of the same label (with the
        splits `by_author`, `natural` and `by_author_and_label`: of the same author). It needs no held-out texts of the
        client's own, so it is there for any number of clients.

        Args:
            part: "validation" or "test".
            correct_N: (N,) whether each text of the part was answered rightly, in the order of the part's loader.

        Returns:
            a fraction for each client; None where the part has no text of any of its labels (authors), or there are none.
        """
        rows = self._by_length(self.task.parts[part])
        return holdings.accuracy_of_clients(self.task, self.hparams["split"], self.client_indices, rows, correct_N.numpy())

    @functools.cached_property
    def _characters(self) -> IntArray:
        return holdings.characters_of(self.task)

    def _shares(self, part: str) -> list[IntArray]:
        if self._split == "natural":
            return holdings.shares_of_authors(self.task, self.client_indices, self.task.parts[part])
        return self._divide(self.task.parts[part], min_size=None)

    def _share(self, rows: IntArray) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self._texts(rows), batch_size=self.hparams["eval_batch_size"], collate_fn=_as_is)

    def _divide(self, rows: IntArray, **others: Any) -> list[IntArray]:
        columns = holdings.columns_for(self.task, self._split, rows, self._characters)
        choice = {name: self.hparams[name] for name in ("num_clients", "seed", *DEFAULTS)} | others
        return [rows[part] for part in divide(self._split, columns, **choice)]

    def _training(self, rows: IntArray) -> DataLoader[dict[str, Tensor]]:
        texts, size = self._texts(rows), self.hparams["batch_size"]
        shuffle, drop = self.hparams["shuffle"], self.hparams["drop_last"]
        if self.hparams["group_by_length"]:
            return DataLoader(texts, batch_sampler=LengthGroupedBatches(texts.lengths, size, drop), collate_fn=_as_is)
        return DataLoader(texts, batch_size=size, shuffle=shuffle, drop_last=drop, collate_fn=_as_is)

    def _evaluation(self, rows: IntArray) -> DataLoader[dict[str, Tensor]]:
        return self._share(self._by_length(rows))

    def _by_length(self, rows: IntArray) -> IntArray:
        return rows[self.tokens.lengths[rows].argsort(stable=True).numpy()]

    def _texts(self, rows: IntArray) -> Texts:
        tokens, labels = self._kept or (self.tokens, holdings.labels_of(self.task))
        places = torch.from_numpy(rows)
        return Texts(tokens, labels, places, self.tokens.lengths_of(places), self._padded_length, self.hparams["mask"])

    def _padded_length(self, longest: int) -> int:
        most, multiple = self.hparams["max_length"], self.hparams["pad_to_multiple_of"] or 1
        return most if self.hparams["padding"] == "max_length" else min(-(-longest // multiple) * multiple, most)


def _as_is(batch: Any) -> Any:
    return batch
