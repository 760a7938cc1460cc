"""The ranks of a run as processes of torch.distributed: gloo on CPUs, nccl between GPUs of which each rank has one of its own.

The groups are fedtune's own. The default group of torch.distributed is left alone: where there is one, torchmetrics, samplers
and modules change what they do, and add up over processes what is no sum here.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from fedtune.errors import Elsewhere, RunError, UsageError
from fedtune.federated.ranks import Alone, Ranks
from fedtune.federated.sums import Value
from fedtune.files import said
from fedtune.runtimes.environment import Place, place_of, timeout
from fedtune.runtimes.signs import Signs

_BUCKET = 2**22  # elements: tensors with fewer travel together
_CHUNK = 2**28  # bytes of one message


def ranks_of(runtime: str) -> Ranks:
    """The ranks of a run, which this process joins.

    Args:
        runtime: "auto", "serial" or "torchrun".

    Raises:
        UsageError: as `place_of`.
        RunError: the others do not come.
    """
    place = place_of(runtime)
    return Alone() if place is None else _joined(place)


def voice(error: BaseException, code: int) -> str | None:
    """Which rank a command names before it says why it ends; "" where it is the only process, None where another one says it.

    Args:
        code: the exit code.
    """
    if not _JOINED:  # a command line that cannot be used is the same on all ranks
        place = place_of("auto")
        return "" if place is None or place.rank == 0 else None
    signs = _JOINED[0].signs
    signs.fail(error, code)
    if not signs.speaks(error):
        return None
    return "" if str(error).startswith("rank ") else f"rank {_JOINED[0].rank}: "


_JOINED: list[Processes] = []  # one at most


def _joined(place: Place) -> Processes:
    if not _JOINED:
        _JOINED.append(Processes(place))
    return _JOINED[0]


@final
class Processes(Ranks):
    """Processes that were started together.

    Every meeting begins at the meeting point (`Signs`), where to wait costs nothing; messages are exchanged once all are there.
    """

    def __init__(self, place: Place) -> None:
        self.rank, self.size, self.local_rank = place.rank, place.size, place.local_rank
        self._patience = timedelta(seconds=timeout())
        self.signs, self._meetings = Signs(place, self._patience.total_seconds()), 0
        with self._connected():
            self._group: Any = dist.ProcessGroupGloo(self._store("gloo"), self.rank, self.size, self._patience)
        self._between_gpus: Any = None
        atexit.register(self._leave)
        sys.excepthook = functools.partial(self._shown, sys.excepthook)

    def on_device(self, device: torch.device) -> None:
        """Say on which device this rank computes. GPUs talk to each other where each rank has one of its own."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        mine = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
        known = self.gather([mine])
        if self._between_gpus is None and all(known) and len(set(known)) == self.size:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._patience
            with self._connected():
                self._between_gpus = dist.ProcessGroupNCCL(self._store("nccl"), self.rank, self.size, options)

    def add_up_(self, tensors: list[Tensor]) -> None:
        """Make whole numbers the sums over all ranks, in place; small tensors in one message."""
        self._meet()
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() < _BUCKET:
                kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
            else:
                self._add_up_one_(tensor)
        for small in kinds.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in small])
            self._add_up_one_(flat)
            for tensor, part in zip(small, flat.split([tensor.numel() for tensor in small]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _add_up_one_(self, tensor: Tensor) -> None:
        on_gpu = tensor.device.type == "cuda" and self._between_gpus is not None
        there = (tensor if on_gpu else tensor.cpu()).contiguous()
        with self._connected():
            (self._between_gpus if on_gpu else self._group).allreduce([there]).wait()
            if on_gpu:
                torch.cuda.synchronize()
        if there is not tensor:
            tensor.copy_(there)

    def gather(self, values: list[Value]) -> list[Value]:
        """The values of all ranks."""
        self._meet()
        own = torch.frombuffer(bytearray(pickle.dumps(values)), dtype=torch.uint8)
        with self._connected():
            sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
            self._group.allgather([sizes], [torch.tensor([len(own)])]).wait()
            longest = int(max(sizes))
            found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            self._group.allgather([found], [torch.nn.functional.pad(own, (0, longest - len(own)))]).wait()
        parts = (bytes(part[: int(size)].numpy()) for part, size in zip(found, sizes, strict=True))
        return [value for part in parts for value in pickle.loads(part)]

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What `make` returns on rank 0, tensors on the device of each rank."""
        made = make() if self.leads else None
        self._meet()
        tensors: list[Tensor] = []
        head = _packed(made, tensors) if self.leads else b""
        with self._connected():
            size = self._sent(torch.tensor([len(head)]))
            content = torch.frombuffer(bytearray(head or bytes(int(size))), dtype=torch.uint8)
            self._sent(content)
            if self.leads:
                for tensor in tensors:
                    self._sent(tensor.detach().cpu().contiguous())
                return made  # type: ignore[return-value]
            found: Value = _Unpacker(io.BytesIO(content.numpy().tobytes()), self._received).load()
            return found

    def first_here(self, do: Callable[[], object]) -> None:
        """Do something once a machine."""
        if self.local_rank == 0:
            do()
        self._meet()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Inside the block an error of one rank ends all."""
        self.signs.begin()
        self._meetings = 0
        try:
            yield
            self._meet()
        except BaseException as error:
            self.signs.fail(error, 130 if isinstance(error, KeyboardInterrupt) else 2)
            raise

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the block each batch is a sign."""
        before, self.signs.watched = self.signs.watched, True
        try:
            yield
        finally:
            self.signs.watched = before

    def step(self) -> None:
        """Give a sign, where it is time."""
        self.signs.step()

    def _meet(self) -> None:
        self._meetings += 1
        self.signs.wait_for_all(str(self._meetings))
        if self.leads:
            self.signs.forget(str(self._meetings - 1))

    def _store(self, name: str) -> dist.Store:
        return dist.PrefixStore(name, self.signs.store)

    def _sent(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0, in the memory of each rank's own."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        for part in tensor.reshape(-1).view(torch.uint8).split(_CHUNK):
            self._group.broadcast([part], options).wait()
        return tensor

    def _received(self, shape: torch.Size, kind: torch.dtype, on_gpu: bool) -> Tensor:
        found = self._sent(torch.empty(shape, dtype=kind))
        return found.cuda() if on_gpu else found

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Inside the block an error of torch.distributed is one of the run."""
        try:
            yield
        except RuntimeError as error:
            self.signs.step()
            raise RunError(
                f"rank {self.rank}: another rank broke off, or cannot be reached ({said(error)}); the next start goes on from "
                "the last complete round"
            ) from error

    def _shown(
        self, hook: Callable[..., Any], kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """What ends a script is shown by one rank: by the one where it happened."""
        if not isinstance(error, (Elsewhere, RunError, UsageError)) or self.signs.speaks(error):
            hook(kind, error, trace)

    def _leave(self) -> None:
        self.signs.leave()


def _packed(value: Any, tensors: list[Tensor]) -> bytes:
    """A value without its tensors, which are added to a list."""
    stream = io.BytesIO()
    _Packer(stream, tensors).dump(value)
    return stream.getvalue()


class _Packer(pickle.Pickler):
    """Leaves tensors out."""

    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_id(self, found: Any) -> Any:
        """Shape, type and place of a tensor that is sent after the value."""
        if not isinstance(found, Tensor):
            return None
        self._tensors.append(found)
        return len(self._tensors), found.shape, found.dtype, found.device.type == "cuda"


class _Unpacker(pickle.Unpickler):
    """Asks for each tensor that was left out, in their order."""

    def __init__(self, stream: io.BytesIO, receive: Callable[[torch.Size, torch.dtype, bool], Tensor]) -> None:
        super().__init__(stream)
        self._receive = receive

    def persistent_load(self, name: Any) -> Tensor:
        """The next tensor."""
        return self._receive(*name[1:])
