"""What every test shares: seeds, devices, hypothesis' settings, which kernels must have loaded."""

import os
import random
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch

# The same examples on every run. A property that needs more says so with @settings.
hypothesis.settings.register_profile(
    "fastkfo",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.register_profile(
    "quick", parent=hypothesis.settings.get_profile("fastkfo"), max_examples=5
)
hypothesis.settings.load_profile("fastkfo")


def pytest_addoption(parser):
    group = parser.getgroup("fastkfo")
    group.addoption(
        "--require-native",
        action="store_true",
        help="fail at the start unless the prebuilt native library is what loaded",
    )
    group.addoption(
        "--require-reference",
        action="store_true",
        help="fail at the start if any native library loaded",
    )


def pytest_sessionstart(session):
    # A fallback must not hide a broken build, nor a working one stand in for the reference.
    native = session.config.getoption("--require-native")
    reference = session.config.getoption("--require-reference")
    if not (native or reference):
        return

    import fastkfo
    from fastkfo.kernels import native as loader

    with mock.patch.dict(os.environ, FASTKFO_COMPILE="0"):
        status = loader.status()
    wanted = "prebuilt" if native else None
    if status.source != wanted:
        pytest.exit(
            f"native library: wanted {wanted}, got {status.source}\n"
            f"{status.error}\n{fastkfo.backends()}",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )


def pytest_collection_modifyitems(items):
    # What takes minutes by itself comes first: one of several processes would end long after all.
    items.sort(key=lambda item: not item.path.name.startswith(("test_triton", "test_cuda")))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The CPU, and where there is one the GPU."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (learn2learn's code draws from the global state)
    torch.manual_seed(0)
