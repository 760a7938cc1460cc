"""Federations over Flower: what crosses, and that a SuperLink with two SuperNodes comes to the bits of one process."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedtune[flower]'")

from conftest import make_task
from federation import PATIENCE, federation

import fedtune
from fedtune.runs.building import fit
from fedtune.runs.flags import resolve
from fedtune.yaml_files import dump


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


def weights_sha(run: Path) -> str:
    newest = max((run / "checkpoints").iterdir())
    return hashlib.sha256((newest / "weights.safetensors").read_bytes()).hexdigest()


def rounds_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def commands() -> list[str]:
    """The three of the README's section "More than one machine", with two processes instead of four."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    block = readme.partition("## More than one machine")[2].partition("```sh\n")[2].partition("```")[0]
    return [
        line.partition("  #")[0].replace("--workers 4", "--workers 2").replace("node 4", "node 2")
        for line in block.splitlines()
    ]


def test_the_three_commands_of_the_readme_come_to_the_bits_of_one_process(
    tmp_path: Path, tiny_bert: str, task: fedtune.TextTask
) -> None:
    texts = write_csv(tmp_path / "texts.csv", task)
    config = config_of(texts, tiny_bert, algorithm="scaffold", check_val_every_n_rounds=3)
    config["model"]["optimizer"] = "sgd"
    write_app(tmp_path / "experiments" / "flower", config)
    (tmp_path / "run.yaml").write_text(dump(config))
    with federation(tmp_path / "flower") as sites:
        sites.link()
        sites.node(0)
        sites.node(1)
        for command in commands():
            how = {"cwd": tmp_path, "env": sites.environment, "timeout": PATIENCE, "text": True, "check": False}
            found = subprocess.run(command, shell=True, capture_output=True, **how)
            assert found.returncode == 0, found.stdout + found.stderr
    fit(resolve(config), run_dir=str(tmp_path / "serial"))
    runs = [tmp_path / "runs" / name for name in ("workers", "torchrun", "sites")]
    assert {weights_sha(run) for run in runs} == {weights_sha(tmp_path / "serial")}
    one, other = rounds_of(runs[-1])[-1], rounds_of(tmp_path / "serial")[-1]
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
