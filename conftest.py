"""What pytest leaves out where a package is missing: modules that cannot be imported without it have no doctests then."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("flwr") else ["src/fedtune/flower/*.py"]
