"""A SuperLink and SuperNodes of Flower on this machine, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BIN = Path(sys.executable).parent
NAME = "local-deployment"  # of the SuperLink
PATIENCE = 240  # seconds for a whole run; it takes a tenth of that on a machine that does nothing else


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Federation:
    """A SuperLink and SuperNodes on this machine, each with processes of its own that end with it.

    Args:
        folder: for their files.
        secure: with TLS, and with keys of the nodes.
    """

    def __init__(self, folder: Path, secure: bool = False) -> None:
        self.folder, self.secure, self.port = folder, secure, free_port()
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self._running: list[subprocess.Popen[bytes]] = []
        where = f'address = "127.0.0.1:{self.port}"\n'
        how = f'root-certificates = "{folder / "ca.crt"}"\n' if secure else "insecure = true\n"
        (self.home / "config.toml").write_text(f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\n{where}{how}')

    @property
    def environment(self) -> dict[str, str]:
        own = {"FLWR_HOME": str(self.home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}
        own |= {"OMP_NUM_THREADS": "1"}
        others = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # it compiles once
        return {**others, **own, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            found = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running.append(found)
        return found

    def link(self) -> None:
        keys = ["--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.crt"]
        how = [*keys, "--enable-supernode-auth"] if self.secure else ["--insecure"]
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.start("link", "flower-superlink", *how, *where, "--disable-runtime-dependency-installation")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.1)
        raise AssertionError(self.log("link"))

    def register(self, client: int) -> None:
        command = [str(BIN / "flwr"), "supernode", "register", f"node{client}.pub", NAME]
        subprocess.run(command, env=self.environment, cwd=self.folder, check=True, capture_output=True, timeout=PATIENCE)

    def node(self, client: int, *more: str) -> subprocess.Popen[bytes]:
        keys = ["--root-certificates", "ca.crt", "--auth-supernode-private-key", f"node{client}"]
        own = keys if self.secure else ["--insecure"]
        where = ["--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())]
        config = " ".join([f"partition-id={client}", f'memory="{self.folder}/memory{client}"', *more])
        return self.start(f"node{client}", "flower-supernode", *own, *where, "--node-config", config)

    def run(self, app: Path, config: str = "") -> str:
        """What a run of an app says, to its end."""
        command = [str(BIN / "flwr"), "run", str(app), NAME, "--stream", "--run-config", config]
        found = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        return found.stdout + found.stderr

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def end(self, *processes: subprocess.Popen[bytes]) -> None:
        """End processes and those that they have started."""
        chosen = list(processes or self._running)
        for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            for one in chosen:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(one.pid, number)
            end = time.monotonic() + seconds
            while time.monotonic() < end and any(map(_alive, chosen)):
                time.sleep(0.1)
        for one in chosen:
            one.wait()
            self._running.remove(one)


def _alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def federation(folder: Path, secure: bool = False) -> Iterator[Federation]:
    found = Federation(folder, secure)
    try:
        yield found
    finally:
        found.end()
