"""The floor: one bare training loop in torch over all texts, with fedtune's settings and no federation.

Packed network, precision, dropout masks, batches and use of malloc are fedtune's. `pooled` draws the batches from all texts
instead of within each client.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from job import load, report
from ours import data_of, module_of

from fedtune.federated.dropout import FastDropout
from fedtune.runs.hardware import freed_memory_kept, resolve_precision


def main() -> None:
    job = load()
    data, module = data_of(job), module_of(job)
    optimizer = module.configure_optimizers()["optimizer"]
    loaders = (
        [data.train_dataloader()] if job.pooled else [data.client_dataloader(client) for client in range(data.num_clients)]
    )
    bf16 = resolve_precision("auto", "cpu") == "bf16-mixed"

    def logits(batch: dict[str, Any]) -> Any:
        return module(batch["input_ids"], batch["attention_mask"]).float()

    rounds = []
    for _ in range(job.rounds):
        start = time.perf_counter()
        with FastDropout():
            for loader in loaders:
                for batch in loader:
                    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                        loss = torch.nn.functional.cross_entropy(logits(batch), batch["labels"])
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
        middle = time.perf_counter()
        module.eval()
        right = torch.zeros((), dtype=torch.int64)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for batch in data.val_dataloader():
                right += (logits(batch).argmax(-1) == batch["labels"]).sum()
        module.train()
        rounds.append(
            {"train": middle - start, "evaluate": time.perf_counter() - middle, "accuracy": int(right) / len(job.held_out)}
        )
    report(rounds)


if __name__ == "__main__":
    with freed_memory_kept():
        main()
