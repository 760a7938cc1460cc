"""Federated averaging as most researchers write it first: a copy of the model for each client, a list of state dicts."""

from __future__ import annotations

import copy
import time

from job import BATCH, load, report
from torch.utils.data import DataLoader


def main() -> None:
    job = load()
    server = job.network()
    rounds = []
    for _ in range(job.rounds):
        start = time.perf_counter()
        states = []
        for texts in job.clients:
            model = copy.deepcopy(server)
            optimizer = job.build_optimizer(model.parameters())
            total = 0.0
            for batch in DataLoader(texts, batch_size=BATCH, shuffle=True, collate_fn=job.batch):
                with job.autocast():
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                total += loss.item()
            states.append(model.state_dict())
        examples = sum(map(len, job.clients))
        mean = {}
        for name in states[0]:
            mean[name] = sum(state[name] * (len(texts) / examples) for state, texts in zip(states, job.clients, strict=True))
        server.load_state_dict(mean)
        middle = time.perf_counter()
        accuracy = job.accuracy(server)
        rounds.append({"train": middle - start, "evaluate": time.perf_counter() - middle, "accuracy": accuracy})
    report(rounds)


if __name__ == "__main__":
    main()
