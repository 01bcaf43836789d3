"""A merged trunk that no longer moves, with heads that learn: the shared layers are saved with trainable = false.

    python examples/frozen_trunk.py

Needs scikit-learn for its digits: pip install 'kmerge[test]'.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import kmerge

fixtures = Path(__file__).parent.parent / "fixtures"

# One source's trunk for all: its own head stays exact, the other two have to learn to read it.
model = kmerge.merge_models(
    {"low": fixtures / "mlp_a.keras", "middle": fixtures / "mlp_b.keras", "high": fixtures / "mlp_c.keras"},
    method="pick",
    option={"label": "low"},
    freeze=True,
)
images, digits = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
tasks = {"low": (0, 5), "middle": (5, 8), "high": (8, 10)}
targets = {label: np.clip(digits - start, 0, stop - start - 1) for label, (start, stop) in tasks.items()}
counts = {label: ((digits >= start) & (digits < stop)).astype("float32") for label, (start, stop) in tasks.items()}

trunk = [layer for layer in model.layers if layer.weights and not layer.trainable]
before = [np.array(weight) for layer in trunk for weight in layer.get_weights()]
model.compile(optimizer="adam", loss=dict.fromkeys(tasks, "sparse_categorical_crossentropy"))
model.fit(images, targets, sample_weight=counts, epochs=40, verbose=0)
after = [np.array(weight) for layer in trunk for weight in layer.get_weights()]
assert before
assert all(np.array_equal(one, two) for one, two in zip(before, after, strict=True))

scores = model.predict(images, verbose=0)
for label in tasks:
    mine = counts[label] > 0
    accuracy = (scores[label].argmax(axis=1) == targets[label])[mine].mean()
    print(f"{label}: {accuracy:.1%} of its own digits, on a trunk that did not move")
    assert accuracy > 0.8
