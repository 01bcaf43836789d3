"""A fourth head for a model that was merged already: its trunk and its other heads do not move.

    python examples/new_head.py

Needs scikit-learn for its digits: pip install 'kmerge[test]'.
"""

from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

import kmerge

fixtures = Path(__file__).parent.parent / "fixtures"
model = kmerge.merge_models(
    {"low": fixtures / "mlp_a.keras", "middle": fixtures / "mlp_b.keras", "high": fixtures / "mlp_c.keras"},
    method="pick",
    option={"label": "low"},
)
images, digits = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
train, test = slice(0, 1400), slice(1400, None)

# A new task on the old trunk: is a digit even? Data for the new head alone, and nothing but heads may move.
head = keras.Sequential([keras.layers.Dense(32, activation="relu"), keras.layers.Dense(2, activation="softmax")])
grown = kmerge.add_head(model, head, "even")
even = (digits % 2 == 0).astype("int32")
tuned = kmerge.fine_tune(
    grown, {"even": (images[train], even[train])}, train="heads", epochs=40, learning_rate=0.01
).model

before, after = model.predict(images[test], verbose=0), tuned.predict(images[test], verbose=0)
for label in model.output:
    assert np.array_equal(before[label], after[label])
accuracy = (after["even"].argmax(axis=1) == even[test]).mean()
print(f"even or odd: {accuracy:.1%} of unseen digits, on a trunk that did not move")
assert accuracy > 0.85
