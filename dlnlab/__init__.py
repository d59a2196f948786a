"""dlnlab: a laboratory for the training dynamics of linear networks.

The axes of every tensor, named once: **E** members of the ensemble, **N** samples, **B** mini-batch, **D** features,
**K** outputs, **L** layers, **H** width, **R** rank. Inside the package **P** counts the distinct problems that members
share, **G** the members of one batch size, and **T** recorded steps.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see
    from dlnlab import callbacks, curvature, data, figures, models, optim, streams, theory
    from dlnlab.ensemble import Ensemble
    from dlnlab.interactive import run, run_all, simulate
    from dlnlab.results import load_results

__version__ = "0.1.0"

__all__ = [
    "Ensemble",
    "callbacks",
    "curvature",
    "data",
    "figures",
    "load_results",
    "models",
    "optim",
    "run",
    "run_all",
    "simulate",
    "streams",
    "theory",
]

# Names are resolved when first asked for, so that `dlnlab --help` and `load_results` do not wait for torch.
_HOMES = {
    "Ensemble": "dlnlab.ensemble",
    "load_results": "dlnlab.results",
    "run": "dlnlab.interactive",
    "run_all": "dlnlab.interactive",
    "simulate": "dlnlab.interactive",
}


def _resolve(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"dlnlab.{name}")
    raise AttributeError(f"module 'dlnlab' has no attribute {name!r}")


if not TYPE_CHECKING:  # a checker that saw it would take every mistyped name for an attribute
    __getattr__ = _resolve


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
