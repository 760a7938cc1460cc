"""fedtune, with its defaults."""

from __future__ import annotations

import logging
import warnings

import numpy as np
from job import Job, load, report

import fedtune


def data_of(job: Job) -> fedtune.FederatedDataModule:
    """The job's texts and clients as a data module."""
    tested = np.asarray(job.held_out[:64])  # again, as texts of their own: no text is in two parts
    labels = np.concatenate([job.labels.numpy(), job.labels.numpy()[tested]])
    texts = [*job.texts, *(job.texts[text] for text in tested)]
    rows = np.sort(np.concatenate([np.asarray(texts) for texts in job.clients]))
    place = {int(row): number for number, row in enumerate(rows)}
    clients = [np.asarray([place[text] for text in texts]) for texts in job.clients]
    parts = {"train": rows, "validation": np.asarray(job.held_out), "test": np.arange(len(job.texts), len(texts))}
    task = fedtune.TextTask("reference", texts, labels, tuple(map(str, range(job.classes))), parts)
    data = fedtune.FederatedDataModule(task, num_clients=len(clients), split=lambda *_: clients)
    data.setup()
    return data


def module_of(job: Job) -> fedtune.BertClassifier:
    """The job's model, with the weights that every contender starts from; a fresh head where there are adapters."""
    options = {"optimizer": job.optimizer, "learning_rate": job.learning_rate}
    if job.rank:
        return fedtune.BertClassifier("minilm", job.classes, lora={"rank": job.rank}, **options)
    module = fedtune.BertClassifier("minilm", job.classes, **options)
    module.network.load_state_dict(job.network().state_dict())
    return module


def main() -> None:
    job = load()
    logging.getLogger("lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    loop = fedtune.FederatedLoop(max_rounds=job.rounds, seed=job.seed, baselines=(), options=fedtune.RunOptions(progress=False))
    history = loop.fit(module_of(job), data_of(job))
    report(
        [
            {
                "train": record.seconds_train + record.seconds_aggregate,
                "evaluate": record.seconds_evaluate,
                "accuracy": record.accuracy,
                "bytes_up": record.bytes_up / len(record.cohort),
            }
            for record in history
        ]
    )


if __name__ == "__main__":
    main()
