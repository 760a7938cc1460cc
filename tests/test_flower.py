"""Federations over Flower: what crosses, and that a SuperLink with two SuperNodes comes to the bits of one process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedtune[flower]'")

from conftest import make_task

import fedtune
from fedtune.runs.building import fit
from fedtune.runs.flags import resolve
from fedtune.yaml_files import dump

BIN = Path(sys.executable).parent
PATIENCE = 240  # seconds for a whole run; it takes a tenth of that on a machine that does nothing else


def config_of(csv: Path, model: str, **loop: Any) -> dict[str, Any]:
    """Three rounds of a tiny model on texts of two clients."""
    return {
        "seed": 0,
        "data": {
            "task": "csv",
            "task_options": {"path": str(csv), "author": "author"},
            "num_clients": 2,
            "split": "by_author",
            "batch_size": 8,
            "max_length": 24,
        },
        "model": {"name": model, "learning_rate": 5e-3},
        "loop": {"max_rounds": 3, "accelerator": "cpu", "precision": "32-true", "baselines": [], **loop},
        "content": {"label_names": ["label 0", "label 1", "label 2"]},
    }


def write_csv(file: Path, task: fedtune.TextTask) -> Path:
    assert task.authors is not None
    rows = zip(task.texts, task.labels, task.authors, strict=True)
    lines = [f"{text},{task.label_names[label]},{task.author_names[author]}" for text, label, author in rows]
    file.write_text("\n".join(["text,label,author", *lines]) + "\n")
    return file


def write_app(folder: Path, config: dict[str, Any]) -> Path:
    shutil.copytree(Path(__file__).parent.parent / "experiments" / "flower", folder)
    (folder / "config.yaml").write_text(dump(config))
    return folder


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
        (self.home / "config.toml").write_text(f'[superlink]\ndefault = "loop"\n\n[superlink.loop]\n{where}{how}')

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
        command = [str(BIN / "flwr"), "supernode", "register", f"node{client}.pub", "loop"]
        subprocess.run(command, env=self.environment, cwd=self.folder, check=True, capture_output=True, timeout=PATIENCE)

    def node(self, client: int, *more: str) -> subprocess.Popen[bytes]:
        keys = ["--root-certificates", "ca.crt", "--auth-supernode-private-key", f"node{client}"]
        own = keys if self.secure else ["--insecure"]
        where = ["--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())]
        config = " ".join([f"partition-id={client}", f'memory="{self.folder}/memory{client}"', *more])
        return self.start(f"node{client}", "flower-supernode", *own, *where, "--node-config", config)

    def run(self, app: Path, config: str = "") -> str:
        """What a run of an app says, to its end."""
        command = [str(BIN / "flwr"), "run", str(app), "loop", "--stream", "--run-config", config]
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


def weights_sha(run: Path) -> str:
    newest = max((run / "checkpoints").iterdir())
    return hashlib.sha256((newest / "weights.safetensors").read_bytes()).hexdigest()


def rounds_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def test_two_sites_come_to_the_bits_of_one_process(tmp_path: Path, tiny_bert: str, task: fedtune.TextTask) -> None:
    texts = write_csv(tmp_path / "texts.csv", task)
    config = config_of(texts, tiny_bert, algorithm="scaffold", check_val_every_n_rounds=3)
    config["model"]["optimizer"] = "sgd"
    with federation(tmp_path / "flower") as sites:
        sites.link()
        sites.node(0)
        sites.node(1)
        said = sites.run(write_app(tmp_path / "app", config), f'run-dir="{tmp_path}/run"')
    assert (tmp_path / "run" / "summary.json").exists(), said
    fit(resolve(config), run_dir=str(tmp_path / "serial"))
    assert weights_sha(tmp_path / "run") == weights_sha(tmp_path / "serial")
    one, other = rounds_of(tmp_path / "run")[-1], rounds_of(tmp_path / "serial")[-1]
    assert one["accuracy"] == pytest.approx(other["accuracy"])
    assert one["loss_nats"] == pytest.approx(other["loss_nats"], rel=1e-5)
    assert one["bytes_up"] == other["bytes_up"]


def certificates(folder: Path) -> None:
    """An authority of its own, a certificate of the server, and a key for each node: docs/sites.md has the same commands."""
    (folder / "server.ext").write_text("subjectAltName = IP:127.0.0.1, DNS:localhost\n")
    for command in (
        "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=authority -keyout ca.key -out ca.crt",
        "openssl req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key -out server.csr",
        "openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -extfile server.ext -out server.pem",
        "ssh-keygen -q -t ecdsa -b 384 -N '' -f node0",
        "ssh-keygen -q -t ecdsa -b 384 -N '' -f node1",
        "ssh-keygen -q -t ecdsa -b 384 -N '' -f node2",
    ):
        subprocess.run(shlex.split(command), cwd=folder, check=True, capture_output=True)


@pytest.mark.skipif(not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="openssl and ssh-keygen make the keys")
def test_sites_with_keys_and_data_of_their_own(tmp_path: Path, tiny_bert: str) -> None:
    config = config_of(Path("nowhere.csv"), tiny_bert, max_rounds=1, check_val_every_n_rounds=2)
    config["data"]["split"] = "iid"
    with federation(tmp_path / "flower", secure=True) as sites:
        certificates(sites.folder)
        sites.link()
        for client in range(2):
            file = write_csv(
                tmp_path / f"site{client}.csv", make_task(texts_per_author=20 + 8 * client, authors=3, seed=client)
            )
            sites.register(client)
            sites.node(client, f'data.task_options.path="{file}" name="site {client}"')
        strange = sites.node(2)  # its key is not registered
        said = sites.run(write_app(tmp_path / "app", config), f'run-dir="{tmp_path}/run"')
        assert strange.poll() not in (None, 0), sites.log("node2")
    assert (tmp_path / "run" / "summary.json").exists(), said
    assert "client 1 is at site site 1, " in said
    (record,) = rounds_of(tmp_path / "run")
    assert [report["client"] for report in record["clients"]] == [0, 1]
    assert record["clients"][0]["num_examples"] < record["clients"][1]["num_examples"]
    assert 0 < json.loads((tmp_path / "run" / "summary.json").read_text())["accuracy"] <= 1
