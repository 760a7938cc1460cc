"""The main job on the embedded default: who wrote this passage? Federated averaging over eight clients, with texts dealt
out at random (IID) and by author (skew 0.8), beside pooled training and each client alone.

Run it with `make demo`. Settings were chosen on the validation part; experiments/demo/README.md has the trials.
"""

from __future__ import annotations

import argparse
import logging
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning_fabric
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torchmetrics.functional.classification import multiclass_f1_score

import fedtune

DATA: dict[str, Any] = {"task": "authors", "model": "minilm", "num_clients": 8, "batch_size": 16, "limit": 1280}
MODEL: dict[str, Any] = {"learning_rate": 7e-4, "dropout": 0.0, "freeze_embeddings": True, "freeze_layers": 5}
LOOP: dict[str, Any] = {"max_rounds": 4, "local_epochs": 1}
SPLITS: dict[str, dict[str, Any]] = {
    "iid": {"split": "iid"},
    "by author": {"split": "by_author", "skew": 0.8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="runs/demo", help="where the runs are kept")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(arguments.runs) / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    logging.getLogger(lightning_fabric.__name__).setLevel(logging.WARNING)
    console = Console(highlight=False, width=100)
    start = time.perf_counter()
    loops = {name: run(name, folder, arguments.seed, console) for name in SPLITS}
    curves = {f"federated, {name}": loop.history for name, loop in loops.items()}
    curves["centralised"] = loops["iid"].baseline_runs["centralised"]
    data = fedtune.FederatedDataModule(**DATA, seed=arguments.seed)
    levels = {
        "each client alone (by author), mean, test part": loops["by author"].summary["local_accuracy"],
        "majority class": data.majority_accuracy("validation"),
    }
    title = "Author identification, 16 authors, 8 clients: validation part"
    fedtune.plot_curves(curves, folder / "curves.png", levels, title)
    console.print(results(loops, data))
    console.print(f"All curves in one picture: {(folder / 'curves.png').resolve()}", soft_wrap=True)
    console.print(f"Records and weights: {folder.resolve()}", soft_wrap=True)
    console.print(f"{time.perf_counter() - start:.0f} s in all")


def run(name: str, folder: Path, seed: int, console: Console) -> fedtune.FederatedLoop:
    """One federated run. The centralised baseline is the same for both splits and runs once; clients alone train on the
    skewed split, where they need the federation most."""
    data = fedtune.FederatedDataModule(**DATA, **SPLITS[name], seed=seed)
    if name == "iid":
        console.print(introduction(data), soft_wrap=True)
    console.print(split_table(name, data))
    module = fedtune.BertClassifier("minilm", num_labels=data.num_labels, **MODEL, seed=seed)
    loop = fedtune.FederatedLoop(
        **LOOP,
        seed=seed,
        run_dir=str(folder / name.replace(" ", "_")),
        baselines=["centralised"] if name == "iid" else ["centralised", "local"],
        options=fedtune.RunOptions(baseline_dir=str(folder / "baselines")),
    )
    loop.fit(module, data)
    return loop


def introduction(data: fedtune.FederatedDataModule) -> str:
    task = data.task
    sizes = {part: len(rows) for part, rows in task.parts.items()} | {"train": sum(map(len, data.client_indices))}
    return (
        f"Author identification: {len(task.label_names)} authors, passages of about 50 words, whole documents held out;\n"
        f"{sizes['train']} passages to train on, {sizes['validation']} to validate, {sizes['test']} to test.\n"
        "A pretrained 6-layer BERT (MiniLM) learns it four times, over the same number of examples each time:\n"
        "federated over 8 clients with texts dealt out at random, and by author; centralised; and each client alone.\n"
    )


def split_table(name: str, data: fedtune.FederatedDataModule) -> Table:
    table = Table(title=f"Split: {name}", title_justify="left")
    for column in ("client", "examples", "tokens", "entropy, bits"):
        table.add_column(column, justify="right")
    table.add_column("authors (two most frequent)")
    for row in data.describe():
        authors = sorted(row["authors"].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{author} {count}" for author, count in authors[:2])
        numbers = (row["client"], row["examples"], row["tokens"], f"{row['label_entropy_bits']:.2f}")
        table.add_row(*map(str, numbers), f"{len(authors)}: {shown}")
    return table


def results(loops: dict[str, fedtune.FederatedLoop], data: fedtune.FederatedDataModule) -> Table:
    labels = torch.from_numpy(np.asarray(data.task.labels))
    truth, train = labels[data.task.parts["test"]], labels[np.concatenate(data.client_indices)]
    majority = torch.full_like(truth, int(train.bincount().argmax()))
    f1 = float(multiclass_f1_score(majority, truth, data.num_labels, average="macro"))
    skewed, iid = loops["by author"].summary, loops["iid"].summary
    table = Table(title=f"Test part: {len(truth)} passages of held-out documents", title_justify="left")
    for column in ("", "accuracy", "macro-F1"):
        table.add_column(column, justify="right" if column else "left")
    for name, accuracy, macro_f1 in (
        ("majority class", skewed["majority_accuracy"], f1),
        ("each client alone (by author), mean", skewed["local_accuracy"], skewed["local_macro_f1"]),
        ("federated, by author", skewed["accuracy"], skewed["macro_f1"]),
        ("federated, IID", iid["accuracy"], iid["macro_f1"]),
        ("centralised", iid["centralised_accuracy"], iid["centralised_macro_f1"]),
    ):
        table.add_row(name, f"{accuracy:.3f}", f"{macro_f1:.3f}")
    return table


if __name__ == "__main__":
    main()
