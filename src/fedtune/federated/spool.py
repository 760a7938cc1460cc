"""All updates of a round side by side, on the disk: as many clients as there are, in the memory of a few blocks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import RunError
from fedtune.federated.parts import Runtime
from fedtune.tensors import Tensors

_BLOCK = 2**22  # elements of a block of all clients


class Spool:
    """Updates as rows of a matrix, by client number, in a file without a name that is gone when it is closed.

    Legend: n clients of all workers, d elements of an update.

    Args:
        runtime: whose workers have the other rows.
        most: the most rows, to know in time whether the disk has room.

    The file is in the folder for temporary files (TMPDIR).
    """

    def __init__(self, runtime: Runtime, most: int) -> None:
        self._runtime, self._most = runtime, most
        self._file = tempfile.TemporaryFile(prefix="fedtune-")  # noqa: SIM115 - closed by __exit__
        self._mine: list[int] = []
        self._like: dict[str, tuple[torch.Size, torch.device]] = {}
        self._type: np.dtype[np.floating] = np.dtype(np.float32)
        self.clients: list[int] = []

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    @property
    def width(self) -> int:
        """d."""
        return sum(shape.numel() for shape, _ in self._like.values())

    def add(self, client: int, update: Tensors) -> None:
        """Keep one client's update.

        Raises:
            RunError: the disk has no room for all.
        """
        if not self._like:
            self._like = {name: (update[name].shape, update[name].device) for name in sorted(update)}
            if any(tensor.dtype == torch.float64 for tensor in update.values()):
                self._type = np.dtype(np.float64)
            needed, free = self._most * self.width * self._type.itemsize, shutil.disk_usage(tempfile.gettempdir()).free
            if needed > free:
                raise RunError(
                    f"the updates of {self._most:,} clients take {needed / 1e9:,.1f} GB side by side; "
                    f"{tempfile.gettempdir()} has {free / 1e9:,.1f} GB left (TMPDIR names another folder)"
                )
        for name in self._like:
            values = update[name].detach().cpu().contiguous().view(-1).numpy()
            self._file.write(values.astype(self._type, copy=False).data)
        self._mine.append(client)

    def close(self) -> None:
        """All rows are there."""
        self._file.flush()
        self.clients = sorted(self._runtime.gather(self._mine))
        known = [one for one in self._runtime.gather([self._like]) if one]
        self._like = known[0] if known else {}

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns and their (n, columns) fp64 values, row by row in the order of `clients`."""
        columns = max(1, _BLOCK // max(1, len(self.clients)))
        for start in range(0, self.width, columns):
            place = slice(start, min(start + columns, self.width))
            mine = [(client, self._part(row, place)) for row, client in enumerate(self._mine)]
            everyone = dict(self._runtime.gather(mine))
            yield place, torch.from_numpy(np.stack([everyone[client] for client in self.clients]).astype(np.float64))

    def _part(self, row: int, place: slice) -> np.ndarray[tuple[int], np.dtype[np.floating]]:
        size = self._type.itemsize
        self._file.seek((row * self.width + place.start) * size)
        return np.frombuffer(self._file.read((place.stop - place.start) * size), dtype=self._type)

    def flat(self, update: Tensors) -> Tensor:
        """(d,) fp64 values of an update, as rows have them."""
        return torch.cat([update[name].detach().cpu().double().view(-1) for name in self._like])

    def shaped(self, values: Tensor) -> Tensors:
        """(d,) values as an update."""
        parts = values.split([shape.numel() for shape, _ in self._like.values()])
        return {
            name: part.view(shape).to(device) for (name, (shape, device)), part in zip(self._like.items(), parts, strict=True)
        }
