"""What every test shares. Nothing here imports a framework: most tests need none, and importing one takes seconds."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
ABSENT = "real models and data are absent: no folder 'shared' beside the repository"

# Read when TensorFlow or an OpenMP library is first imported, also by the processes that tests start.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # off on older processors, which then run no convolution with channels first
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers are the parallelism
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SHARED.is_dir():
        return
    absent = pytest.mark.skip(reason=ABSENT)
    for item in items:
        if item.get_closest_marker("real"):
            item.add_marker(absent)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and data. Only for tests marked `real`."""
    if not SHARED.is_dir():
        pytest.skip(ABSENT)
    return SHARED


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """The small models of the repository; `fixtures/README.md` says what they are."""
    return ROOT / "fixtures"


@pytest.fixture(scope="session")
def load_task(fixtures_dir: Path) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """`load_task(source)`: held-back inputs and class numbers of a fixture; with `held_back=False` those it learned."""
    spec = importlib.util.spec_from_file_location("kmerge_fixtures_make", fixtures_dir / "make.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_task
