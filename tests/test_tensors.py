from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fedtune.federated.cohorts import cohort
from fedtune.federated.pieces import Pieces
from fedtune.tensors import assign_, distance, num_bytes, read_file, snapshot, travelling


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
    assert Pieces(one).length == 5.0
    assert distance(one, {name: torch.zeros_like(tensor) for name, tensor in one.items()}) == 5.0
    assert num_bytes(one) == 12


def test_a_cohort_is_drawn_without_replacement_and_anew_each_round() -> None:
    drawn = [cohort(0, number, 20, 5) for number in range(30)]
    assert all(len(set(clients)) == 5 for clients in drawn)
    assert set().union(*drawn) == set(range(20))
    assert drawn[0] != drawn[1]
    assert cohort(1, 0, 20, 5) != drawn[0]
    assert cohort(0, 0, 20, 5) == drawn[0]
    assert cohort(0, 3, 4, None) == [0, 1, 2, 3]


def test_ctrl_c_waits_until_a_file_is_read_and_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "x.safetensors")
    closed = []

    class Interrupted:
        """Within it Ctrl-C comes; an exception of its handler would be swallowed, as within torch."""

        def __init__(self, *_: object, **__: object) -> None:
            self._file = safe_open(tmp_path / "x.safetensors", framework="pt")

        def __enter__(self) -> Any:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ValueError("could not determine the shape") from None
            return self._file.__enter__()

        def __exit__(self, *_: object) -> None:
            closed.append(True)

    monkeypatch.setattr("fedtune.tensors.safe_open", Interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    with pytest.raises(KeyboardInterrupt):
        read_file(tmp_path / "x.safetensors")
    assert closed == [True]
    with pytest.raises(KeyboardInterrupt):  # and the handler is the one from before
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
