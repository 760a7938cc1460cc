"""A decoder learns from four clients who wrote a passage: low-rank adapters (LoRA) on SmolLM2-135M, averaged factor by factor
(FedIT) and exactly (FLoRA), beside pooled training and each client alone.

Run it with `make demo-llm`. Settings were chosen on the validation part; experiments/demo_llm/README.md has the trials.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning_fabric
import torch
from rich.console import Console
from rich.table import Table

import fedtune
from fedtune.data.author_instructions import author_instructions
from fedtune.models.pretrained import load_tokenizer

AUTHORS = (
    "Alexander Hamilton",
    "Charlotte Brontë",
    "Fyodor Dostoevsky",
    "Homer (Samuel Butler)",
    "Mark Twain",
    "Nathaniel Hawthorne",
    "Washington Irving",
    "William Shakespeare",
)
WORDS = 25  # of a passage
DATA: dict[str, Any] = {
    "num_clients": 4,
    "split": "by_author",
    "skew": 1.0,
    "batch_size": 8,
    "eval_batch_size": 16,
    "limit": 192,
}
MODEL: dict[str, Any] = {"learning_rate": 2e-3, "lora": {"rank": 8, "alpha": 16}, "half_base": True, "exact_match": True}
LOOP: dict[str, Any] = {"max_rounds": 3, "local_epochs": 1, "monitor": "exact_match", "mode": "max"}
ALGORITHMS = {"FedIT": "fedit", "FLoRA": "flora"}
SAMPLES = ("Alexander Hamilton", "Homer", "William Shakespeare")  # the first test passage of each is shown
LONGEST = 12  # tokens of an answer that is shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="runs/demo_llm", help="where the runs are kept")
    parser.add_argument("--model", default="smollm2", help="another decoder: a folder or a hub id")
    parser.add_argument("--quick", action="store_true", help="one round of few passages, to see that all works")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    folder = Path(given.runs) / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    logging.getLogger(lightning_fabric.__name__).setLevel(logging.WARNING)
    console = Console(highlight=False, width=100)
    start = time.perf_counter()
    demo = Demo(given.model, given.seed, folder, given.quick)
    console.print(demo.introduction(), soft_wrap=True)
    before, samples = demo.untrained()
    loops = {}
    for name, algorithm in ALGORITHMS.items():
        loops[name], answers = demo.run(algorithm)
        samples = [(*row, answer) for row, answer in zip(samples, answers, strict=True)]
    curves = {name: loop.history for name, loop in loops.items()}
    curves["centralised"] = loops["FedIT"].baseline_runs["centralised"]
    levels = {"each client alone, mean, test part": loops["FedIT"].summary["local_exact_match"]}
    fedtune.plot_curves(curves, folder / "curves.png", levels, "Who wrote this? Validation part", monitor="exact_match")
    console.print(results(before, loops))
    console.print(sample_table(samples))
    console.print(f"All curves in one picture: {(folder / 'curves.png').resolve()}", soft_wrap=True)
    console.print(f"Records and weights: {folder.resolve()}", soft_wrap=True)
    console.print(f"{time.perf_counter() - start:.0f} s in all")


class Demo:
    """The runs of the demo, all on the same data, from the same weights."""

    def __init__(self, model: str, seed: int, folder: Path, quick: bool) -> None:
        self.model, self.seed, self.folder = model, seed, folder
        few = {"limit": 64} if quick else {}
        self.task = author_instructions(AUTHORS, WORDS)
        self.data = fedtune.FederatedDataModule(self.task, model, **{**DATA, **few}, seed=seed)
        self.options = {**LOOP, "max_rounds": 1} if quick else LOOP
        self.tokenizer = load_tokenizer(model)
        tests = [int(row) for row in self.task.parts["test"]]
        self.shown = [next(row for row in tests if self.answer(row) == author) for author in SAMPLES]

    def answer(self, row: int) -> str:
        return self.task.conversations[row][-1]["content"]

    def introduction(self) -> str:
        task, clients = self.task, self.data.client_indices
        train, validation, test = sum(map(len, clients)), *(len(task.parts[part]) for part in ("validation", "test"))
        lines = [
            f"{task.conversations[0][0]['content']} {len(task.author_names)} authors, passages of {WORDS} words,",
            f"whole documents held out; {train} passages to train on, {validation} to validate, {test} to test.",
        ]
        for client, rows in enumerate(clients):
            counts = Counter(map(self.answer, rows)).most_common(3)
            lines.append(f"Client {client}: {len(rows)} passages, most by {', '.join(f'{name} {n}' for name, n in counts)}")
        return "\n".join(lines) + "\n"

    def module(self) -> fedtune.CausalLM:
        """The decoder as it begins."""
        return fedtune.CausalLM(self.model, **MODEL, seed=self.seed)

    def untrained(self) -> tuple[dict[str, float], list[tuple[str, ...]]]:
        """What the model says before: its metrics on the test part, and passage, author and answer of each sample."""
        module = self.module()
        metrics = fedtune.FederatedLoop(**self.options, seed=self.seed, baselines=()).test(module, self.data)[0]
        turns = [self.task.conversations[row] for row in self.shown]
        answers = self.answers(module)
        return metrics, [(one[1]["content"], one[2]["content"], said) for one, said in zip(turns, answers, strict=True)]

    def run(self, algorithm: str) -> tuple[fedtune.FederatedLoop, list[str]]:
        """One federated run, and what its model answers. The baselines are the same for both, and done once."""
        module = self.module()
        loop = fedtune.FederatedLoop(
            **self.options,
            algorithm=algorithm,
            seed=self.seed,
            run_dir=str(self.folder / algorithm),
            baselines=["centralised", "local"] if algorithm == "fedit" else [],
        )
        loop.fit(module, self.data)
        return loop, self.answers(module)

    @torch.no_grad()
    def answers(self, module: fedtune.CausalLM) -> list[str]:
        """What a model answers to the passages that are shown: at each place the likeliest token."""
        module.eval()
        found = []
        for row in self.shown:
            asked = self.task.conversations[row][:2]
            text = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            written = module.network.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST, do_sample=False, use_cache=True
            )
            found.append(self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip())
        module.train()
        return found


def results(before: dict[str, float], loops: dict[str, fedtune.FederatedLoop]) -> Table:
    table = Table(title="Test part: passages of held-out documents", title_justify="left")
    for column in ("", "exact match", "loss, nats a token", "perplexity", "MB sent a client and round"):
        table.add_column(column, justify="right" if column else "left")
    summary = loops["FedIT"].summary
    rows: list[tuple[str, float, float, float | None]] = [("before training", before["exact_match"], before["loss_nats"], None)]
    rows.append(("each client alone, mean", summary["local_exact_match"], summary["local_loss_nats"], None))
    for name, loop in loops.items():
        sent = sum(record.bytes_up for record in loop.history) / sum(len(record.cohort) for record in loop.history)
        rows.append((f"federated, {name}", loop.summary["exact_match"], loop.summary["loss_nats"], sent / 1e6))
    rows.append(("centralised", summary["centralised_exact_match"], summary["centralised_loss_nats"], None))
    for name, matched, loss, megabytes in rows:
        sent_ = "" if megabytes is None else f"{megabytes:.2f}"
        table.add_row(name, f"{matched:.3f}", f"{loss:.3f}", f"{math.exp(loss):.2f}", sent_)
    return table


def sample_table(samples: list[tuple[str, ...]]) -> Table:
    table = Table(title="Answers of the models to passages of the test part", title_justify="left")
    for column in ("passage", "author", "before", *ALGORITHMS):
        table.add_column(column)
    for sample in samples:
        table.add_row(*sample)
    return table


if __name__ == "__main__":
    main()
