"""The algorithm of Hilmkil et al. 2021, written from their protocol: texts padded to 128 without a mask, fp32, no shuffling,
the parameters averaged with an all-reduce. Two processes share the clients; theirs took one process a client."""

from __future__ import annotations

import copy
import os
import time
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from job import BATCH, Job, load, report
from torch import distributed

PROCESSES = 2
LENGTH = 128


def accuracy(job: Job, model: Any, texts: list[int]) -> float:
    """Mean over batches of 512, as theirs."""
    found = []
    with torch.no_grad():
        for start in range(0, len(texts), 512):
            batch = job.batch(texts[start : start + 512], LENGTH)
            found.append(float((model(batch["input_ids"]).logits.argmax(-1) == batch["labels"]).float().mean()))
    return sum(found) / len(found)


def process(rank: int, job: Job) -> None:
    """The rounds of one process."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getppid() % 20_000)}
    distributed.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // PROCESSES))
    torch.manual_seed(job.seed + rank)
    mine = range(rank, len(job.clients), PROCESSES)
    server, rounds = job.network(), []
    for _ in range(job.rounds):
        distributed.barrier()
        start = time.perf_counter()
        total = [torch.zeros_like(parameter) for parameter in server.parameters()]
        for client in mine:
            model = copy.deepcopy(server)
            optimizer = job.build_optimizer(model.parameters())
            texts = job.clients[client]
            for first in range(0, len(texts) - BATCH + 1, BATCH):
                batch = job.batch(texts[first : first + BATCH], LENGTH)
                loss = model(batch["input_ids"], labels=batch["labels"]).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            for tensor, parameter in zip(total, model.parameters(), strict=True):
                tensor += parameter.detach()
        for tensor, parameter in zip(total, server.parameters(), strict=True):
            distributed.all_reduce(tensor)
            parameter.data.copy_(tensor / len(job.clients))
        middle = time.perf_counter()
        server.eval()
        right = torch.tensor(sum(accuracy(job, server, job.held_out[client :: len(job.clients)]) for client in mine))
        server.train()
        distributed.all_reduce(right)
        rounds.append(
            {"train": middle - start, "evaluate": time.perf_counter() - middle, "accuracy": float(right) / len(job.clients)}
        )
    if rank == 0:
        report(rounds)
    distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(process, (load(),), PROCESSES)
