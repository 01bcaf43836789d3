"""Three fine-tuned models to one with a shared trunk and three heads, then trained on as one, with labels.

    python examples/three_heads.py

Needs scikit-learn for its digits: pip install 'kmerge[test]'.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import kmerge

fixtures = Path(__file__).parent.parent / "fixtures"
tasks = {"low": (0, 5), "middle": (5, 8), "high": (8, 10)}

# The sources share an ancestor, so that "auto" takes the mean of their trunks.
model = kmerge.merge_models(dict(zip(tasks, sorted(fixtures.glob("finetuned_?.keras")), strict=True)))

# One data set for all heads. A digit that is not of a head's task has no label for it: -1 does not count.
images, digits = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
labels = {
    name: np.where((digits >= first) & (digits < end), digits - first, -1) for name, (first, end) in tasks.items()
}
train, test = slice(0, 1400), slice(1400, None)

tuning = kmerge.fine_tune(
    model,
    (images[train], {name: values[train] for name, values in labels.items()}),
    loss_weights={"low": 1.0, "middle": 1.0, "high": 2.0},
    epochs=5,
)

scores = tuning.model.predict(images[test], verbose=0)
for name, values in labels.items():
    mine = values[test] >= 0
    accuracy = (scores[name].argmax(axis=1) == values[test])[mine].mean()
    print(f"{name}: {accuracy:.1%} of its own digits")
    assert accuracy > 0.9
