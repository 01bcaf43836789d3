"""What every test shares. Nothing here imports a framework: most tests need none, and importing one takes seconds."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
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


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a module of the user's, beside the files that they work on."""
    name = f"own_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('own')\n"
        "class Scale(keras.layers.Layer):\n"
        "    def build(self, shape):\n"
        "        self.factor = self.add_weight(shape=(shape[-1],), name='factor')\n"
        "    def call(self, x):\n"
        "        return x * self.factor\n"
        "@keras.saving.register_keras_serializable('own')\n"
        "class Twice(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return x * 2.0\n"
        "@keras.saving.register_keras_serializable('own')\n"
        "class Two(keras.layers.Layer):\n"
        "    def __init__(self, **settings):\n"
        "        super().__init__(**settings)\n"
        "        self.zfirst = keras.layers.Dense(3, use_bias=False)\n"
        "        self.asecond = keras.layers.Dense(3, use_bias=False)\n"
        "    def build(self, shape):\n"
        "        self.zfirst.build(shape)\n"
        "        self.asecond.build(shape)\n"
        "    def compute_output_shape(self, shape):\n"
        "        return shape\n"
        "    def call(self, x):\n"
        "        return self.asecond(keras.ops.tanh(self.zfirst(x)))\n"
        "@keras.saving.register_keras_serializable('own')\n"
        "def twice(x):\n"
        "    return x * 2.0\n"
        "def not_registered(x):\n"
        "    return x\n"
    )
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)
