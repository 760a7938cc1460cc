"""Flower (`pip install "flwr[simulation]==1.41.0"`): its simulation, one client at a time on all cores, NumPy clients."""

from __future__ import annotations

import os
import sys
import time
from collections import OrderedDict
from typing import Any

import torch
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation
from job import BATCH, load, report, resident
from torch.utils.data import DataLoader

JOB = os.path.abspath(sys.argv[1])


def arrays(network: torch.nn.Module) -> list[Any]:
    """The weights as Flower sends them."""
    return [tensor.detach().numpy() for tensor in network.state_dict().values()]


def put(network: torch.nn.Module, values: list[Any]) -> None:
    """Put weights that Flower has sent."""
    names = network.state_dict().keys()
    network.load_state_dict(OrderedDict((name, torch.tensor(value)) for name, value in zip(names, values, strict=True)))


class Client(NumPyClient):
    """One client; the first call in a worker process reads the job and makes the network."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.job, self.network = resident(JOB)

    def get_parameters(self, config: dict[str, Any]) -> list[Any]:
        """The weights to begin with: the server asks one client, before the first round, so the worker is up by then."""
        return arrays(self.network)

    def fit(self, parameters: list[Any], config: dict[str, Any]) -> Any:
        """One local epoch."""
        job, network = self.job, self.network
        put(network, parameters)
        optimizer = job.build_optimizer(network.parameters())
        texts = job.clients[self.number]
        for batch in DataLoader(texts, batch_size=BATCH, shuffle=True, collate_fn=job.batch):
            with job.autocast():
                loss = network(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return arrays(network), len(texts), {}


def main() -> None:
    job = load()
    network = job.network()
    rounds: list[dict[str, float]] = []
    clock = [0.0]

    def evaluate(number: int, parameters: list[Any], config: dict[str, Any]) -> Any:
        middle = time.perf_counter()
        put(network, parameters)
        accuracy = job.accuracy(network)
        if number:  # Flower also evaluates the weights it begins with
            taken = time.perf_counter() - middle
            rounds.append({"train": middle - clock[0], "evaluate": taken, "accuracy": accuracy})
        clock[0] = time.perf_counter()
        return 0.0, {"accuracy": accuracy}

    def server(context: Context) -> ServerAppComponents:
        strategy = FedAvg(
            fraction_fit=1.0,
            fraction_evaluate=0.0,
            min_fit_clients=len(job.clients),
            min_available_clients=len(job.clients),
            evaluate_fn=evaluate,
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=job.rounds))

    cores = os.cpu_count() or 1
    run_simulation(
        server_app=ServerApp(server_fn=server),
        client_app=ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client()),
        num_supernodes=len(job.clients),
        backend_config={"client_resources": {"num_cpus": cores, "num_gpus": 0.0}, "init_args": {"num_cpus": cores}},
    )
    report(rounds)


if __name__ == "__main__":
    main()
