"""Three fine-tuned models to one with a shared trunk and three heads, then trained on as one, a loss for each head.

    python examples/three_heads.py

Needs scikit-learn for its digits: pip install 'kmerge[test]'.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import kmerge

fixtures = Path(__file__).parent.parent / "fixtures"
tasks = {"low": (0, 1, 2, 3, 4), "middle": (5, 6, 7), "high": (8, 9)}

# The sources share an ancestor, so that "auto" takes the mean of their trunks.
model = kmerge.merge_models(
    dict(zip(tasks, sorted(fixtures.glob("finetuned_?.keras")), strict=True)),
    method="auto",
)
model.summary()

# An ordinary Keras model: a loss per head by its label; a weight of 0 for digits that are not of a head's task.
images, digits = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
targets = {label: np.clip(digits - task[0], 0, len(task) - 1) for label, task in tasks.items()}
counts = {label: np.isin(digits, task).astype("float32") for label, task in tasks.items()}
model.compile(
    optimizer="adam",
    loss=dict.fromkeys(tasks, "sparse_categorical_crossentropy"),
    loss_weights={"low": 1.0, "middle": 1.0, "high": 2.0},
)
model.fit(images, targets, sample_weight=counts, epochs=5, verbose=2)

for label, scores in model.predict(images, verbose=0).items():
    mine = counts[label] > 0
    accuracy = (scores.argmax(axis=1) == targets[label])[mine].mean()
    print(f"{label}: {accuracy:.1%} of its own digits")
    assert accuracy > 0.9
