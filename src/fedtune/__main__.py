"""`python -m fedtune` is the command `fedtune`."""

from fedtune.cli import main

main()
