"""Apple's pfl-research (`pip install pfl`): its simulated backend in one process, texts padded to the longest of a batch."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from job import BATCH, Job, load, report
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel


class Texts(Dataset):
    """One user's texts, in new random batches each time."""

    def __init__(self, job: Job, texts: list[int]) -> None:
        super().__init__(raw_data=[np.asarray(texts)])
        self.job, self.texts = job, texts

    def iter(self, batch_size: int | None) -> Iterator[dict[str, Any]]:
        """Batches as dicts of tensors."""
        order = random.sample(self.texts, len(self.texts))
        for start in range(0, len(order), batch_size or len(order)):
            yield self.job.batch(order[start : start + (batch_size or len(order))])


class Network(torch.nn.Module):
    """The network with the two methods that pfl asks for; nothing is measured on the users' data, which would take time."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, **batch: Any) -> Any:
        """Mean cross-entropy."""
        return self.network(**batch).loss

    def metrics(self, **_: Any) -> dict[str, Any]:
        """None."""
        return {}


class Clock(TrainingProcessCallback):
    """Takes the time and evaluates after each round."""

    def __init__(self, job: Job, network: torch.nn.Module) -> None:
        self.job, self.network, self.rounds = job, network, []
        self.start = time.perf_counter()

    def after_central_iteration(self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int) -> Any:
        """Evaluate the averaged model."""
        middle = time.perf_counter()
        accuracy = self.job.accuracy(self.network)
        now = time.perf_counter()
        self.rounds.append({"train": middle - self.start, "evaluate": now - middle, "accuracy": accuracy})
        self.start = time.perf_counter()
        return False, Metrics()


def main() -> None:
    job = load()
    network = job.network()

    model = PyTorchModel(
        Network(network),
        lambda parameters, lr: job.build_optimizer(parameters),  # lr is the job's, see below
        torch.optim.SGD(network.parameters(), lr=1.0),
        amp_dtype=torch.bfloat16 if job.precision == "bf16" else None,
    )
    users = list(range(len(job.clients)))
    federated = FederatedDataset(lambda user: Texts(job, job.clients[user]), get_user_sampler("minimize_reuse", users))
    backend = SimulatedBackend(training_data=federated, val_data=federated)
    clock = Clock(job, network)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job.rounds,
            evaluation_frequency=job.rounds + 1,
            train_cohort_size=len(users),
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=job.learning_rate, local_batch_size=BATCH
        ),
        callbacks=[clock],
    )
    report(clock.rounds)


if __name__ == "__main__":
    main()
