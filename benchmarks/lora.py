"""Question: what do the aggregations of LoRA send and cost, and how much memory do the adapters of 1,000 clients take?

Adapters of the size of MiniLM's (6 layers, query and value, 384 x 384, rank 8) without the rest of the network, so that nothing
else is measured; random data, a batch a client. Bytes and seconds: 8 clients, all in each round, 4 rounds. Memory: 1,000
clients, all in one round, each case in a process of its own: FedSA-LoRA, whose clients keep their B, on the disk and in memory;
FLoRA, whose server needs the factors of all.
Run it from the project's folder: .venv/bin/python benchmarks/lora.py
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from machine import about, write
from torch import Tensor, nn
from torch.nn import functional as F

import fedtune
from fedtune.tensors import num_bytes, trainable
from fedtune.testing import Adapted

WIDTH, LAYERS, RANK, CLASSES = 384, 6, 8, 4
ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedit": {},
    "ffa_lora": {},
    "rolora": {},
    "fedsa_lora": {},
    "flora": {},
    "flora, ranks 2 to 8": {"name": "flora", "ranks": [2, 4, 8]},
    "fedex_lora": {},
    "flexlora": {},
    "flexlora, ranks 2 to 8": {"name": "flexlora", "ranks": [2, 4, 8]},
    "hetlora, ranks 2 to 8": {"name": "hetlora", "ranks": [2, 4, 8]},
}
CASES = {"fedsa_lora, on the disk": "fedsa_lora", "fedsa_lora, in memory": "fedsa_lora", "flora": "flora"}


class Adapters(pl.LightningModule):
    """Query and value layers with adapters, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Adapted(nn.Linear(WIDTH, WIDTH), RANK, 2.0) for _ in range(2 * LAYERS)])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0]
        for layer in self.layers:
            x = F.layer_norm(x + torch.tanh(layer(x)), (WIDTH,))
        return F.cross_entropy(x[:, :CLASSES], batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Noise(pl.LightningDataModule):
    """A batch of noise for each client."""

    def __init__(self, num_clients: int) -> None:
        super().__init__()
        self.num_clients = num_clients
        self.client_indices = [range(8)] * num_clients

    def client_dataloader(self, client: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(client)
        return [(torch.randn(8, WIDTH, generator=generator), torch.randint(CLASSES, (8,), generator=generator))]

    def val_dataloader(self) -> list[tuple[Tensor, Tensor]]:
        return self.client_dataloader(0)


def fitted(algorithm: Any, clients: int, rounds: int, run_dir: str | None = None) -> Any:
    """The loop after a run."""
    options = fedtune.RunOptions(progress=False)
    loop = fedtune.FederatedLoop(
        max_rounds=rounds,
        algorithm=algorithm,
        run_dir=run_dir,
        baselines=(),
        check_val_every_n_rounds=10**6,
        accelerator="cpu",
        precision="32-true",
        options=options,
    )
    loop.fit(Adapters(), Noise(clients))
    return loop


def peak_mb() -> float:
    """Highest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mb() -> float:
    """Resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def memory(case: str) -> dict[str, float]:
    """Of one case, in this process."""
    fitted(CASES[case], 4, 1)  # what a small run takes
    before = resident_mb()
    with tempfile.TemporaryDirectory() as folder:
        fitted(CASES[case], 1000, 1, folder if "disk" in case else None)
    return {"peak, MB": peak_mb(), "before, MB": before, "after, MB": resident_mb()}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(memory(sys.argv[1])))
        return
    factors = num_bytes(trainable(Adapters()))
    raw: dict[str, Any] = {"bytes of A and B": factors, "rounds": {}, "1,000 clients": {}}
    for name, values in ALGORITHMS.items():
        records = fitted({"name": name} | values, 8, 4).history
        last = records[-1]
        raw["rounds"][name] = {
            "up a client, bytes": [record.bytes_up / 8 for record in records],
            "down a client, bytes": [record.bytes_down / 8 for record in records],
            "adapter_error": last.diagnostics.get("adapter_error"),
            "aggregation, s": last.seconds_aggregate,
        }
        print(name, raw["rounds"][name])
    for case in CASES:
        command = [sys.executable, __file__, case]
        raw["1,000 clients"][case] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(case, raw["1,000 clients"][case])
    write("lora", about() | {"raw": raw})


if __name__ == "__main__":
    main()
