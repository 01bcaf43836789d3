"""A merge of models that were trained apart, healed without labels: the sources are the teachers.

    python examples/heal.py

Needs scikit-learn for its digits: pip install 'kmerge[test]'.
"""

from pathlib import Path

from sklearn.datasets import load_digits

import kmerge

fixtures = Path(__file__).parent.parent / "fixtures"
sources = {"low": fixtures / "cnn_a.keras", "middle": fixtures / "cnn_b.keras", "high": fixtures / "cnn_c.keras"}

images = (load_digits().images[..., None] / 16).astype("float32")
unlabelled, unseen = images[:1400], images[1400:]

merged = kmerge.merge_models(sources, method="fuse", data=unlabelled)
healed = kmerge.fine_tune(merged, unlabelled, teachers=sources, learning_rate=0.005).model


def agreement(model, label):
    """Share of unseen images on which a head decides as its source does."""
    import keras

    source = keras.saving.load_model(sources[label], compile=False)
    wanted = source.predict(unseen, verbose=0).argmax(axis=1)
    return (model.predict(unseen, verbose=0)[label].argmax(axis=1) == wanted).mean()


before = {label: agreement(merged, label) for label in sources}
after = {label: agreement(healed, label) for label in sources}
for label in sources:
    print(f"{label}: agrees with its source on {before[label]:.1%} before and {after[label]:.1%} after healing")
start, end = (sum(found.values()) / len(sources) for found in (before, after))
print(f"on average {start:.1%} before and {end:.1%} after")
assert end > max(start + 0.01, 0.92)
