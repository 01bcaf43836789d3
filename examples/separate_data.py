"""A data set and a loss for each head: other rows, other sizes, other labels, one model that is trained as one.

    python examples/separate_data.py

Needs scikit-learn for its digits: pip install 'kmerge[test]'.
"""

import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import kmerge

fixtures = Path(__file__).parent.parent / "fixtures"
images, digits = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
low, middle, high = digits < 5, (digits >= 5) & (digits < 8), digits >= 8
ink = images.mean(axis=1)

model = kmerge.merge_models({"low": fixtures / "mlp_a.keras", "middle": fixtures / "mlp_b.keras"}, method="align")
model = kmerge.add_head(model, 1, "dark")  # how much ink there is, from 0 to 1

with tempfile.TemporaryDirectory() as folder:
    # Data may stand in files, in memory, or come as batches from a function that is called for each pass.
    np.savez(Path(folder) / "low.npz", x=images[low][:700], y=digits[low][:700])

    def batches():
        for start in range(0, 1400, 50):
            yield images[start : start + 50], ink[start : start + 50]

    tuned = kmerge.fine_tune(
        model,
        {
            "low": Path(folder) / "low.npz",
            "middle": (images[middle][:400], np.eye(3)[digits[middle][:400] - 5]),
            "dark": batches,
        },
        loss={"middle": "categorical_crossentropy", "dark": "mean_squared_error"},
        loss_weights={"low": 1, "middle": 1, "dark": 100},  # squares of small numbers are smaller still
        mix={"low": 2, "middle": 1, "dark": 1},
        epochs=30,
        learning_rate=0.003,
    ).model

scores = tuned.predict(images, verbose=0)
for label, mine, first, seen in (("low", low, 0, 700), ("middle", middle, 5, 400)):
    accuracy = (scores[label][mine].argmax(axis=1) == digits[mine] - first)[seen:].mean()
    print(f"{label}: {accuracy:.1%} of its unseen digits")
    assert accuracy > 0.9
error, spread = np.abs(scores["dark"][1400:, 0] - ink[1400:]).mean(), np.abs(ink[1400:] - ink[:1400].mean()).mean()
print(f"dark: off by {error:.4f} on average, and by {spread:.4f} if it always told the mean")
assert error < 0.8 * spread
