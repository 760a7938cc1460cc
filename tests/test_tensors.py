from __future__ import annotations

import pytest
import torch
from torch import nn

from fedtune.federated.cohorts import cohort
from fedtune.federated.pieces import norm
from fedtune.tensors import assign_, moved, num_bytes, snapshot, travelling


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = nn.Linear(2, 3), nn.Linear(2, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.tied = self.trained
        self.register_buffer("scratch", torch.zeros(7), persistent=False)


def test_trainable_parameters_and_persistent_float_buffers_travel() -> None:
    names = set(travelling(Mixed()))
    assert names == {"trained.weight", "trained.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}


def test_travelling_tensors_are_live_and_a_snapshot_is_not() -> None:
    module = Mixed()
    live, copy = travelling(module), snapshot(travelling(module))
    assign_(live, {name: torch.ones_like(tensor) for name, tensor in live.items()})
    assert (module.trained.weight == 1).all()
    assert not (copy["trained.weight"] == 1).all()


def test_norm_and_bytes() -> None:
    one = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert norm(one) == 5.0
    assert num_bytes(one) == 12


def test_what_is_moved_is_new_and_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.tensors._BLOCK", 2)
    weights = {"w": torch.tensor([[1.0, 1.0, 1.0], [2.0, 3.0, 4.0]]).t()}  # not contiguous
    step = {"w": torch.full((3, 2), 2.0**-25 + 2.0**-30, dtype=torch.float64)}
    found = moved(weights, step)["w"]
    assert torch.equal(found, (weights["w"].double() + step["w"]).float())
    assert (weights["w"][:, 0] == 1).all()


def test_a_cohort_is_drawn_without_replacement_and_anew_each_round() -> None:
    drawn = [cohort(0, number, 20, 5) for number in range(30)]
    assert all(len(set(clients)) == 5 for clients in drawn)
    assert set().union(*drawn) == set(range(20))
    assert drawn[0] != drawn[1]
    assert cohort(1, 0, 20, 5) != drawn[0]
    assert cohort(0, 0, 20, 5) == drawn[0]
    assert cohort(0, 3, 4, None) == [0, 1, 2, 3]
