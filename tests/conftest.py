"""What all tests share: devices, quiet short fits, and how hypothesis searches."""

import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from lightning.pytorch import Trainer

torch.set_num_threads(1)
# A suite that a shell has started in the background ignores Ctrl-C, and so would every fit that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

settings.register_profile(
    "dlnlab",
    deadline=None,  # the first example pays for imports
    max_examples=20,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("dlnlab")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session):
    if len(session.items) > 1000 and not session.config.option.collectonly:  # the suite, and not a few tests
        script = Path(__file__).with_name("compile_kernels.py")
        environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
        session.compiling = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.DEVNULL)


def pytest_sessionfinish(session):
    if hasattr(session, "compiling"):
        session.compiling.kill()
        session.compiling.wait()


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(scope="session")
def fit():
    """Fit a model quietly, leaving nothing on disk; returns the trainer."""

    def run(model, data, max_steps, callbacks=(), device="cpu", ckpt_path=None, **options):
        defaults = {"logger": False, "enable_checkpointing": False}
        trainer = Trainer(
            max_steps=max_steps,
            callbacks=list(callbacks),
            accelerator="gpu" if torch.device(device).type == "cuda" else "cpu",
            devices=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            **(defaults | options),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lightning's advice on workers and loggers
            trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run
