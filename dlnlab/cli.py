"""`python -m dlnlab`: what can be asked for. Imports nothing heavy before it must."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from importlib import import_module

USAGE = """usage: dlnlab COMMAND [ARGUMENTS]

A laboratory for the training dynamics of linear networks.

commands:
  fit        train the ensemble of a config: dlnlab fit --config configs/quickstart.yaml
  validate   losses of a checkpoint on its training rows
  test       losses of a checkpoint on its test rows
  predict    predictions of a checkpoint on its test rows
  export     what a run has recorded as netcdf, zarr, parquet or csv: dlnlab export RUN --format netcdf

Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 end a fit in order, with a checkpoint, and it says how to go on; a second
Ctrl-C ends it at once. Under SLURM, `#SBATCH --signal=USR1@120` ends it two minutes before the time limit.
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
        The exit code: 0; 2 for a mistake found before anything was made; 1 for a failure after that; 128 and the signal's
        number (130 for Ctrl-C, 143 for SIGTERM) where a signal ended a fit, in order and with a checkpoint.
    """
    with _lasting_streams() as streams:
        code = _main(sys.argv[1:] if argv is None else argv)
    for stream in streams:
        if stream.failure is not None:
            print(f"dlnlab: standard output: {stream.failure.strerror}", file=sys.stderr)
            code = code or 1
    return code


def _main(argv: list[str]) -> int:
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


class _Lasting(io.FileIO):
    """A stream that a program can go on writing to: what nobody takes is dropped."""

    failure: OSError | None = None
    """What was wrong where somebody still waits for the text: the disk, and not a reader that has left."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                self.failure = error
            return len(data)


@contextlib.contextmanager
def _lasting_streams() -> Iterator[list[_Lasting]]:
    """Let no reader that leaves (`| head`, a closed terminal) end the program or change its exit code."""
    before, lasting = (sys.stdout, sys.stderr), []
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        if stream is None:  # closed by the caller: its number must not become that of a file of ours
            setattr(sys, name, open(os.devnull, "w"))
        elif stream is getattr(sys, f"__{name}__"):
            stream.flush()
            lasting.append(_Lasting(stream.fileno(), "wb", closefd=False))
            text = io.TextIOWrapper(io.BufferedWriter(lasting[-1]), stream.encoding, stream.errors,
                                    line_buffering=stream.line_buffering, write_through=stream.write_through)  # fmt: skip
            setattr(sys, name, text)
    try:
        yield lasting
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
