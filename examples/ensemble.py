"""A fold ensemble in one file: every source whole, one output, their average. No framework is loaded for the merge.

python examples/ensemble.py
"""

import tempfile
from pathlib import Path

import kmerge

fixtures = Path(__file__).parent.parent / "fixtures"

with tempfile.TemporaryDirectory() as folder:
    # Three copies of one model stand for the folds here; their average must be the model itself.
    out = Path(folder) / "ensemble.keras"
    report = kmerge.combine(
        [fixtures / "cnn_a.keras"] * 3,
        out,
        labels=["fold_1", "fold_2", "fold_3"],
        trunk="none",
        outputs="mean",
    )
    print(f"{report.merged.parameters:,} parameters in {out.name}, merged in {report.seconds:.2f} s")

    import keras
    import numpy as np

    images = np.random.default_rng(0).random((4, 8, 8, 1), dtype="float32")
    one = keras.saving.load_model(fixtures / "cnn_a.keras", compile=False)
    ensemble = keras.saving.load_model(out, compile=False)
    difference = np.abs(np.asarray(one(images)) - np.asarray(ensemble(images))).max()
    print(f"largest difference: {difference:.1e}")
    assert difference < 1e-6
