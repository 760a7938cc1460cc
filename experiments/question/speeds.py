"""What each head of the study brings: `python experiments/question/speeds.py` writes speeds.json, some ten minutes on one core.

Measured on the 1,024 training texts of each seed with `fedtune.models.features`, as `fedtune describe --features` does.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from design import Cell
from study import HERE, POOLER, data_of, module_of, shares_of, train_pooler

from fedtune.models.features import features
from fedtune.randomness import seeded

FILE = HERE / "speeds.json"
HEADS = ("trained", "saturated", "pooler", "tanh", "relu", "distilbert", "none", "orthogonal")


def main() -> None:
    torch.set_num_threads(1)
    if not POOLER.exists():
        train_pooler()
    found: dict[str, dict[str, object]] = {}
    for seed in (0, 1):
        data = data_of(Cell("dose", seed=seed))
        residual = 1 - sum(share**2 for share in shares_of(data, "train"))
        for head in HEADS:
            module = module_of(Cell("dose", head=head, seed=seed), data)
            with seeded(seed, "features"):
                measured = asdict(features(module, list(data.train_dataloader()))) | {"residual": residual}
            found.setdefault(head, {})[str(seed)] = measured
            print(head, seed, measured, flush=True)
    part = FILE.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(FILE)


if __name__ == "__main__":
    main()
