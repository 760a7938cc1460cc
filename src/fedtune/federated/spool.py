"""All updates of a round side by side, on the disk: as many clients as there are, in the memory of a few blocks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import RunError
from fedtune.federated.parts import Runtime
from fedtune.tensors import Tensors

_BLOCK = 2**20  # elements of a block of all clients: the caches hold it


class Spool:
    """Updates as rows of a matrix, by client number, in a file without a name that is gone when it is closed.

    Legend: n clients of all workers, d elements of an update.

    The file is in the folder for temporary files (TMPDIR).

    Args:
        runtime: whose workers have the other rows.
        most: the most rows, to know in time whether the disk has room.
        home: the device of what is made of them, where this worker has no row.

    Attributes:
        clients: (n,) the numbers of the clients, ascending, once all rows are there; rows are in this order.
    """

    def __init__(self, runtime: Runtime, most: int, home: torch.device | str = "cpu") -> None:
        self._runtime, self._most, self._home = runtime, most, torch.device(home)
        self._file = tempfile.TemporaryFile(prefix="fedtune-")  # noqa: SIM115 - closed by __exit__
        self._rows: dict[int, int] = {}  # of this worker's clients, in the file
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
        exact = torch.float64 if self._type == np.float64 else torch.float32
        try:
            for name in self._like:
                self._file.write(update[name].detach().to("cpu", exact).contiguous().view(-1).numpy().data)
        except OSError as error:
            raise RunError(f"the update of client {client} cannot be kept in {tempfile.gettempdir()}: {error}") from error
        self._rows[client] = len(self._rows)

    def complete(self) -> None:
        """All rows are there."""
        self._file.flush()
        self.clients = sorted(self._runtime.gather(list(self._rows)))
        types = self._runtime.gather([(self._type.str, {name: shape for name, (shape, _) in self._like.items()})])
        shapes = next((one for _, one in types if one), {})
        self._type = np.dtype(max((kind for kind, one in types if one), default="<f4"))
        if not self._like:  # no client of this worker
            self._like = {name: (shape, self._home) for name, shape in shapes.items()}

    def blocks(self, rows: Sequence[int] | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Columns, and the (n, columns) values there, fp32 or fp64 as they came; of some rows, or of all of them."""
        clients = self.clients if rows is None else [self.clients[row] for row in rows]
        mine = [client for client in clients if client in self._rows]
        columns = max(1, _BLOCK // max(1, len(clients)))
        for start in range(0, self.width, columns):
            place = slice(start, min(start + columns, self.width))
            values = self._read(mine, place)
            if len(mine) < len(clients):  # each row is one worker's, and zeros elsewhere: the sums of their bits are the rows
                all_rows = np.zeros((len(clients), values.shape[1]), dtype=self._type)
                all_rows[[row for row, client in enumerate(clients) if client in self._rows]] = values
                values = all_rows
            self._runtime.add_up_([torch.from_numpy(values).view(torch.int64 if self._type.itemsize == 8 else torch.int32)])
            yield place, torch.from_numpy(values)

    def _read(self, clients: list[int], place: slice) -> np.ndarray[tuple[int, int], np.dtype[np.floating]]:
        """(clients, columns) of this worker's rows."""
        values = np.empty((len(clients), place.stop - place.start), dtype=self._type)
        for client, row in zip(clients, values, strict=True):
            self._file.seek((self._rows[client] * self.width + place.start) * self._type.itemsize)
            if self._file.readinto(row.data) != row.nbytes:
                raise RunError(f"the updates in {tempfile.gettempdir()} cannot be read back")
        return values

    def flat(self, update: Tensors) -> Tensor:
        """(d,) fp64 values of an update, as rows have them."""
        return torch.cat([update[name].detach().cpu().double().view(-1) for name in self._like])

    def shaped(self, values: Tensor) -> Tensors:
        """(d,) values as an update."""
        parts = values.split([shape.numel() for shape, _ in self._like.values()])
        return {
            name: part.view(shape).to(device) for (name, (shape, device)), part in zip(self._like.items(), parts, strict=True)
        }
