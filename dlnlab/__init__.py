"""dlnlab: a laboratory for the training dynamics of linear networks.

The axes of every tensor, named once: **E** members of the ensemble, **N** samples, **B** mini-batch, **D** features,
**K** outputs, **L** layers, **H** width, **R** rank. Inside the package **P** counts the distinct problems that members
share, **G** the members of one batch size, and **T** recorded steps.
"""

from importlib import import_module

__version__ = "0.1.0"

# Names are resolved when first asked for, so that `dlnlab --help` and `load_results` do not wait for torch.
_HOMES = {
    "Ensemble": "dlnlab.ensemble",
    "load_results": "dlnlab.results",
    "run": "dlnlab.interactive",
    "run_all": "dlnlab.interactive",
    "simulate": "dlnlab.interactive",
}
_ROOMS = ("callbacks", "curvature", "data", "figures", "models", "optim", "streams", "theory")

__all__ = [*_HOMES, *_ROOMS]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return import_module(f"dlnlab.{name}")
    raise AttributeError(f"module 'dlnlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
