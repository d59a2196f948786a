"""`python -m dlnlab`: what can be asked for. Imports nothing heavy before it must."""

import os
import sys
from importlib import import_module

USAGE = """usage: dlnlab COMMAND [ARGUMENTS]

A laboratory for the training dynamics of linear networks.

commands:
  fit        train the ensemble of a config: dlnlab fit --config configs/quickstart.yaml
  validate   losses of a checkpoint on its training rows
  test       losses of a checkpoint on its test rows
  predict    predictions of a checkpoint on its test rows
  export     what a run has recorded as netcdf, zarr, parquet or csv: dlnlab export RUN --format netcdf

Ctrl-C and SIGTERM end a fit in order, with a checkpoint, and it says how to go on; a second Ctrl-C ends it at once.
`dlnlab COMMAND --help` lists a command's arguments; `dlnlab fit --config FILE --print_config` prints what they come to, a
config that can be run as it stands.
"""

# Command -> the function that carries it out, imported only when it is called for.
COMMANDS = {command: "dlnlab.study:main" for command in ("fit", "validate", "test", "predict")}
COMMANDS["export"] = "dlnlab.export:main"


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The command and its arguments; None takes the program's own.

    Returns:
        The exit code: 0; 2 for a mistake found before anything was made; 1 for a failure after that; 130 and 143 where
        Ctrl-C and SIGTERM ended a fit, which they do in order, with a checkpoint.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if argv[0] == "--version":
        print(import_module("dlnlab").__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"dlnlab: no command {argv[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that a person's own classes are found by their class_path
    module, function = COMMANDS[argv[0]].split(":")
    try:
        return getattr(import_module(module), function)(argv)
    except KeyboardInterrupt:
        return 130
