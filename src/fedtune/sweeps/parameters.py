"""The parameters of a sweep file: what may be said of one, its values in a grid, a value drawn from its distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedtune.errors import UsageError, one_of
from fedtune.randomness import stream
from fedtune.runs.parser import check_plain

MOST = 10_000  # runs of a sweep
OWN = ("config", "run_dir", "runs_dir", "logger")  # the sweep decides on these
_SPECS = "value, values, min and max, distribution or parameters"
_BOUNDS, _NORMAL, _BETA = {"min": None, "max": None}, {"mu": 0.0, "sigma": 1.0}, {"a": 1.0, "b": 1.0}
# distribution -> its keys and their defaults, None where there is none; as in W&B's own schema of a sweep file
KINDS: dict[str, Mapping[str, Any]] = {
    "constant": {"value": None},
    "categorical": {"values": None},
    "categorical_w_probabilities": {"values": None, "probabilities": None},
    "int_uniform": _BOUNDS,
    "uniform": _BOUNDS,
    "q_uniform": _BOUNDS | {"q": 1},
    "log_uniform": _BOUNDS,  # the bounds are exponents of e
    "log_uniform_values": _BOUNDS,
    "q_log_uniform": _BOUNDS | {"q": 1},
    "q_log_uniform_values": _BOUNDS | {"q": 1},
    "inv_log_uniform": _BOUNDS,
    "inv_log_uniform_values": _BOUNDS,
    "normal": _NORMAL,
    "q_normal": _NORMAL | {"q": 1},
    "log_normal": _NORMAL,
    "q_log_normal": _NORMAL | {"q": 1},
    "beta": _BETA,
    "q_beta": _BETA | {"q": 1},
}
_IN_GRIDS = ("constant", "categorical", "int_uniform", "q_uniform")
_ABOVE_0 = ("q", "a", "b")


def parameters_of(parameters: Any, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Dotted name -> what the file says of the parameter.

    Raises:
        UsageError: what no parameter can be made of, a name that is there twice, or that is the sweep's to decide.

    >>> parameters_of({"data": {"parameters": {"task": {"value": "imdb"}}}, "loop.seed": {"values": [0, 1]}})
    {'data.task': {'value': 'imdb'}, 'loop.seed': {'values': [0, 1]}}
    """
    found: dict[str, dict[str, Any]] = {}
    if not isinstance(parameters, Mapping) or (prefix and not parameters):
        raise UsageError("parameters of " + prefix.rstrip(".") if prefix else "parameters", parameters, f"names with {_SPECS}")
    for key, spec in parameters.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str) or not all(key.split(".")):
            raise UsageError(f"parameter {name}", key, "a name")
        if name in OWN:
            raise UsageError("parameter", key, f"any of a run but {', '.join(OWN)}")
        if not isinstance(spec, Mapping) or not {"value", "values", "distribution", "parameters", "min", "max"} & spec.keys():
            raise UsageError(f"parameter {name}", spec, _SPECS)
        if "parameters" in spec and len(spec) > 1:
            raise UsageError(f"parameter {name}", next(one for one in spec if one != "parameters"), "nothing beside parameters")
        more = parameters_of(spec["parameters"], f"{name}.") if "parameters" in spec else {name: dict(spec)}
        for twice in found.keys() & more.keys():
            raise UsageError(f"parameter {twice}", more[twice], "once in a file, nested or dotted")
        found |= more
    return found


def check(parameters: Mapping[str, Mapping[str, Any]], method: str) -> None:
    """Check what a file says of its parameters.

    Raises:
        UsageError: a key that its distribution does not have, or lacks, a value that it does not take, a distribution that the
            method does not have, two parameters that set the same value.
    """
    for name, spec in parameters.items():
        kind = kind_of(name, spec)
        if method == "grid" and kind not in _IN_GRIDS:
            allowed = "value, values (a list), int_uniform or q_uniform, for the method grid"
            raise UsageError(f"parameter {name}", dict(spec), allowed)
        _check_keys(name, spec, kind)
        _check_values(name, spec, kind)
        check_plain(f"parameter {name}", {key: spec[key] for key in ("value", "values") if key in spec})
    for name in parameters:
        if "seed" in parameters and name in ("data.seed", "model.seed", "loop.seed"):
            raise UsageError(f"parameter {name}", dict(parameters[name]), "nothing beside seed, which sets all three")
        _check_above(name, parameters)


def kind_of(name: str, spec: Mapping[str, Any]) -> str:
    """The distribution of a parameter, said or meant. Raises `UsageError` for one that is none."""
    if "distribution" in spec:
        if not isinstance(spec["distribution"], str) or spec["distribution"] not in KINDS:
            raise one_of(f"parameter {name}, distribution", spec["distribution"], KINDS)
        return str(spec["distribution"])
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    return "int_uniform" if all(_is_whole(spec.get(bound)) for bound in ("min", "max")) else "uniform"


def choices(name: str, spec: Mapping[str, Any]) -> Sequence[Any]:
    """The values of a parameter in a grid; those of q_uniform begin at min and are below max, as in W&B's own grids."""
    kind = kind_of(name, spec)
    if kind == "constant":
        return [spec["value"]]
    if kind == "categorical":
        return list(spec["values"])
    if kind == "int_uniform":
        return range(spec["min"], spec["max"] + 1)
    step = spec.get("q", 1)
    count = math.ceil((spec["max"] - spec["min"]) / step)
    if count > MOST:
        raise UsageError(f"parameter {name}", dict(spec), f"at most {MOST} values in a grid")
    return [spec["min"] + number * step for number in range(count)]


def draw(name: str, spec: Mapping[str, Any], number: int) -> Any:
    """One value of a parameter; the same file gives the same values."""
    kind = kind_of(name, spec)
    if kind == "constant":
        return spec["value"]
    try:
        return _DISTRIBUTIONS[kind.removeprefix("q_")](stream(0, f"sweep/{name}", number), {**KINDS[kind], **spec}, kind)
    except (ArithmeticError, ValueError) as error:
        raise UsageError(f"parameter {name}", dict(spec), f"bounds for {kind} that give finite numbers ({error})") from error


def stepped(value: float, spec: Mapping[str, Any], kind: str) -> Any:
    """A drawn number, in steps of q where the distribution has them; whole where q is."""
    if not kind.startswith("q_"):
        return float(value)
    steps = round(float(value) / spec["q"])
    return steps * spec["q"] if _is_whole(spec["q"]) else float(steps * spec["q"])


def _check_keys(name: str, spec: Mapping[str, Any], kind: str) -> None:
    known = KINDS[kind]
    for key in spec:
        if key != "distribution" and key not in known:
            raise one_of(f"parameter {name}", key, [*known, "distribution"], also=f", for {kind}")
    for key, default in known.items():
        if key not in spec and default is None:
            raise UsageError(f"parameter {name}", dict(spec), f"{' and '.join(known)}, for {kind}")


def _check_values(name: str, spec: Mapping[str, Any], kind: str) -> None:
    """Check the values of the keys of a distribution."""
    if "values" in KINDS[kind]:
        values, shares = spec["values"], spec.get("probabilities")
        if not isinstance(values, list) or not values:
            raise UsageError(f"parameter {name}, values", values, "a list with a value or more")
        if "probabilities" in KINDS[kind]:
            given = shares if isinstance(shares, list) and all(_is_number(share) and share >= 0 for share in shares) else []
            if len(given) != len(values) or abs(sum(given) - 1) > 1e-6:
                raise UsageError(f"parameter {name}, probabilities", shares, f"{len(values)} numbers that sum to 1")
        return
    for key in (key for key in KINDS[kind] if key in spec and kind != "constant"):
        value, whole = spec[key], kind == "int_uniform"
        if not (_is_whole(value) if whole else _is_number(value)):
            raise UsageError(f"parameter {name}, {key}", value, f"a {'whole ' if whole else ''}number, without quotes")
        if (key in _ABOVE_0 and value <= 0) or (key == "sigma" and value < 0):
            raise UsageError(f"parameter {name}, {key}", value, "a number above 0")
    if "min" in KINDS[kind]:
        low, high = spec["min"], spec["max"]
        if low >= high:
            raise UsageError(f"parameter {name}", dict(spec), "min below max")
        if kind.endswith("log_uniform_values") and low <= 0:
            raise UsageError(f"parameter {name}, min", low, f"a number above 0, for {kind}")
        if kind.endswith("log_uniform") and max(abs(low), abs(high)) > 700:
            raise UsageError(f"parameter {name}", dict(spec), f"exponents of e, for {kind} (log_uniform_values has the values)")


def _check_above(name: str, parameters: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a value within a dictionary that another parameter gives as a whole."""
    parts = name.split(".")
    for number in range(1, len(parts)):
        above = parameters.get(".".join(parts[:number]), {})
        for one in [above.get("value"), *(above.get("values") or [])]:
            if isinstance(one, Mapping) and any(str(key).split(".")[0] == parts[number] for key in one):
                raise UsageError(
                    f"parameter {name}", dict(parameters[name]), f"nothing beside {'.'.join(parts[:number])} {one}"
                )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _between(rng: Any, low: float, high: float) -> float:
    return float(rng.uniform(float(low), float(high)))


def _log_values(rng: Any, spec: Mapping[str, Any], kind: str) -> Any:
    return stepped(math.exp(_between(rng, math.log(spec["min"]), math.log(spec["max"]))), spec, kind)


def _categorical(rng: Any, spec: Mapping[str, Any], kind: str) -> Any:
    return spec["values"][int(rng.choice(len(spec["values"]), p=spec.get("probabilities")))]


_DISTRIBUTIONS: dict[str, Callable[[Any, Mapping[str, Any], str], Any]] = {  # of a name without q_
    "categorical": _categorical,
    "categorical_w_probabilities": _categorical,
    "int_uniform": lambda rng, spec, kind: int(rng.integers(spec["min"], spec["max"] + 1)),
    "uniform": lambda rng, spec, kind: stepped(_between(rng, spec["min"], spec["max"]), spec, kind),
    "log_uniform": lambda rng, spec, kind: stepped(math.exp(_between(rng, spec["min"], spec["max"])), spec, kind),
    "log_uniform_values": _log_values,
    "inv_log_uniform": lambda rng, spec, kind: math.exp(-_between(rng, spec["min"], spec["max"])),
    "inv_log_uniform_values": _log_values,
    "normal": lambda rng, spec, kind: stepped(rng.normal(spec["mu"], spec["sigma"]), spec, kind),
    "log_normal": lambda rng, spec, kind: stepped(math.exp(rng.normal(spec["mu"], spec["sigma"])), spec, kind),
    "beta": lambda rng, spec, kind: stepped(rng.beta(spec["a"], spec["b"]), spec, kind),
}
