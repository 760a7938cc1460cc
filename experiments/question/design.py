"""The design of the study: which runs there are, by part."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

STEPS = 64  # of an epoch over 1,024 texts in batches of 16


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run.

    Args:
        part: of the design, as in plan.md.
        head: of `heads.HEADS` on BERT's encoder; "distilbert", "orthogonal" on DistilBERT's.
        rate: the learning rate.
        gamma: scale of the features.
        clients: K, all in every round.
        steps: of a client in a round; None: one epoch of its own texts. More than those are several epochs.
        rounds: in all.
        every: rounds from one evaluation to the next.
        trained: "all", or the "last" layer alone.
    """

    part: str
    task: str = "spooky_author"
    head: str = "pooler"
    rate: float = 0.05
    gamma: float = 1.0
    clients: int = 1
    steps: int | None = 8
    rounds: int = 16
    every: int = 1
    optimizer: str = "sgd"
    dropout: float = 0.0
    mask: bool = True
    shuffle: bool = True
    probe: int = 0
    trained: str = "all"
    seed: int = 0

    @property
    def name(self) -> str:
        """What differs from the defaults, as the name of a file."""
        default = Cell(self.part)
        given = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return "-".join([self.part, *(f"{name}_{value}" for name, value in given.items() if name != "part")])

    @property
    def client_steps(self) -> int:
        """Steps of a client in a round."""
        return STEPS // self.clients if self.steps is None else self.steps


def dose() -> Iterator[Cell]:
    """One client: how do head, rate and scale of the features move the step at which it leaves chance?"""
    for seed in (0, 1):
        for head, (rate, steps) in itertools.product(("pooler", "distilbert"), ((0.1, 4), (0.05, 8), (0.02, 20))):
            yield Cell("dose", head=head, rate=rate, steps=steps, seed=seed)
        for head in ("tanh", "relu"):
            yield Cell("dose", head=head, seed=seed)
        for head, (rate, steps) in itertools.product(("none", "orthogonal"), ((0.01, 4), (0.005, 8), (0.002, 20))):
            yield Cell("dose", head=head, rate=rate, steps=steps, seed=seed)
        for head in ("none", "orthogonal"):  # added when these had not left chance: a larger budget
            yield Cell("dose", head=head, rate=0.02, seed=seed)
        for head, gamma in itertools.product(("pooler", "distilbert"), (0.5, 2.0, 4.0)):
            yield Cell("dose", head=head, rate=0.05 / gamma**2, gamma=gamma, seed=seed)
        for head, gamma in itertools.product(("pooler", "distilbert"), (0.5, 2.0)):  # the rate as it was
            yield Cell("dose", head=head, gamma=gamma, steps=32 if gamma < 1 else 2, seed=seed)


def clients() -> Iterator[Cell]:
    """K clients, an epoch a round: is the round of leaving chance proportional to K? And does averaging itself slow?"""
    for seed in (0, 1):
        for head in ("pooler", "distilbert"):
            yield Cell("clients", head=head, clients=4, steps=None, rounds=8, seed=seed)
            yield Cell("clients", head=head, clients=16, steps=None, rounds=20, every=2, seed=seed)
            yield Cell("clients", head=head, clients=32, steps=None, rounds=36, every=2, seed=seed)
            yield Cell(
                "clients", head=head, clients=1, steps=2, rounds=60, every=3, seed=seed
            )  # the steps of 32 clients, by one


def remedies() -> Iterator[Cell]:
    """DistilBERT with 32 clients and the budget of 12 epochs at a rate with which it stays on the plateau: what helps?"""
    given: tuple[dict[str, Any], ...] = (
        {},
        {"rate": 0.2},
        {"steps": 16, "rounds": 2, "every": 1},
        {"optimizer": "adamw", "rate": 1e-4},
        {"head": "orthogonal"},
        {"gamma": 2.0},
        {"probe": 1},
    )
    for seed, more in itertools.product((0, 1), given):
        yield Cell(
            "remedies", **{"head": "distilbert", "clients": 32, "steps": None, "rounds": 12, "every": 2, "seed": seed} | more
        )


def last_layer() -> Iterator[Cell]:
    """Where only the last layer learns, does the scale of the features count squared?"""
    for seed, (head, rate), gamma in itertools.product((0, 1), (("none", 0.02), ("distilbert", 0.3)), (0.5, 1.0, 2.0)):
        steps = {0.5: 32, 1.0: 8, 2.0: 2}[gamma]
        yield Cell("last_layer", head=head, rate=rate, gamma=gamma, steps=steps, rounds=32, trained="last", seed=seed)


def fast() -> Iterator[Cell]:
    """Speeds of 0.4 to 2, which the paper's cell needs for 16 and 32 clients."""
    for seed, head, (gamma, rate) in itertools.product((0, 1), ("none", "orthogonal"), ((2.0, 0.01), (4.0, 0.005))):
        yield Cell("fast", head=head, rate=rate, gamma=gamma, steps=4, seed=seed)


def started() -> Iterator[Cell]:
    """How a head begins: MiniLM's own pooler is random; here a trained one, and one with features near 1 and -1."""
    for seed, (head, rates) in itertools.product((0, 1), {"trained": (0.05, 0.02), "saturated": (0.01, 0.005)}.items()):
        for rate in rates:
            yield Cell("started", head=head, rate=rate, steps=4, rounds=24, seed=seed)


def small_steps() -> Iterator[Cell]:
    """The fast heads with steps so small that the loss falls without going up and down: rate x |gamma phi|^2 below 0.5."""
    given = (
        ("trained", 1.0, 0.005),
        ("saturated", 1.0, 0.002),
        ("none", 2.0, 0.002),
        ("none", 4.0, 0.0005),
        ("orthogonal", 2.0, 0.002),
        ("orthogonal", 4.0, 0.0005),
    )
    for seed, (head, gamma, rate) in itertools.product((0, 1), given):
        yield Cell("small_steps", head=head, rate=rate, gamma=gamma, seed=seed)


def fixed_budget() -> Iterator[Cell]:
    """Many steps between two averagings, and in all those of twelve epochs, as the other remedies have."""
    for seed in (0, 1):
        yield Cell("remedies", head="distilbert", clients=32, steps=12, rounds=2, every=1, seed=seed)


def screening() -> Iterator[Cell]:
    """A fractional factorial of resolution IV, eight factors of two levels in sixteen runs, on two tasks and two seeds.

    Generators E = BCD, F = ACD, G = ABC, H = ABD.
    """
    for seed, task in itertools.product((0, 1), ("spooky_author", "authors")):
        for a, b, c, d in itertools.product((-1, 1), repeat=4):
            e, f, g, h = b * c * d, a * c * d, a * b * c, a * b * d
            clients = 4 if c < 0 else 16
            yield Cell(
                "screening",
                task=task,
                head="pooler" if a < 0 else "distilbert",
                gamma=1.0 if b < 0 else 2.0,
                clients=clients,
                steps=None if d < 0 else 8,
                rounds=6 if d < 0 else 6 * STEPS // (8 * clients),  # six epochs either way
                every=1 if d < 0 or clients == 16 else 2,
                mask=e < 0,
                shuffle=f < 0,
                dropout=0.0 if g < 0 else 0.1,
                optimizer="sgd" if h < 0 else "adamw",
                rate=0.05 if h < 0 else 1e-4,
                seed=seed,
            )


PARTS = {
    "dose": dose, "clients": clients, "remedies": remedies, "screening": screening, "last_layer": last_layer, "fast": fast,
    "started": started, "small_steps": small_steps, "fixed_budget": fixed_budget,
}  # fmt: skip
