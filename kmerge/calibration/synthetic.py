"""Made-up calibration inputs, by the kind of each input of the network, where no data are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kmerge.calibration import patterns
from kmerge.calibration.evidence import Reading, Statistics, first_kernels, first_statistics, readings
from kmerge.calibration.inputs import FEWEST, Inputs, usual_rows
from kmerge.data import Entry, entries, generator
from kmerge.errors import DataError, PlanError
from kmerge.graph import Ref, flatten
from kmerge.layout import source_graph
from kmerge.methods.registry import Array
from kmerge.shapes import Shape
from kmerge.shapes.values import names
from kmerge.source import Source

FREE_STEPS, FREE_SIDE = 32, 64
"""Sizes of free axes: of sequences, and of images."""
_LARGEST = 1 << 26
"""Numbers per input at most: of large images fewer are made."""
_TRIED = 160
"""Rows on which ranges of values are tried."""
_TRIED_SIDE = 40
"""Side of images on which they are tried, before convolutions."""
_BLOCK = 1 << 20
"""Numbers whose statistics are taken at once."""
_POOL = 2
"""How many times the rows to choose from, where there is something to choose by."""
_TOLERANCE = 0.02
"""Mean square by which chosen rows may miss stored statistics; larger values change the mixture less."""
_RESTS = (0, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
"""Shares of the least moving variance that may be left from the start of a training."""
_CHANNELS = 96
"""Channels of all sources together that are looked at."""
_LARGEST_GAP = 30.0
"""In standard deviations; beyond, made-up rows are as wrong as can be."""
_ALPHABETS = (4, 20, 21)
"""Letters of nucleic acids and of proteins."""

_TOKENS = names("CategoryEncoding Embedding HashedCrossing Hashing IntegerLookup ReversibleEmbedding")
_TEXTS = names("HashedCrossing Hashing StringLookup TextVectorization")
_FLAT = names(
    """Conv2D Conv2DTranspose DepthwiseConv2D SeparableConv2D MaxPooling2D AveragePooling2D GlobalAveragePooling2D
    GlobalMaxPooling2D"""
)
_LINEAR = names("Conv1D Conv1DTranspose DepthwiseConv1D SeparableConv1D")
_RECURRENT = names("GRU LSTM RNN SimpleRNN")

Random = np.random.Generator


def synthesise(sources: Sequence[Source], rows: int | None = None, seed: int = 0) -> Inputs:
    """Make up calibration inputs, by what the first layers of the sources tell about them.

    Args:
        sources: that are merged, with graphs; the inputs of the first decide on shapes and dtypes.
        rows: how many, of large inputs fewer; by default as many as `usual_rows` says.
        seed: of the draw.

    Returns:
        The inputs; each row is for all sources.

    Raises:
        DataError: if nothing can be made up for an input.
        PlanError: if `rows` is too small.
    """
    rows = usual_rows(sources) if rows is None else rows
    if rows < FEWEST:
        raise PlanError(f"samples is {rows}: expected at least {FEWEST} rows.")
    guesses = []
    for number, entry in enumerate(entries(sources[0])):
        tensors = [flatten(source_graph(source).inputs) for source in sources]
        refs = [Ref(found[number].call, found[number].output) for found in tensors]
        seen = [readings(source, ref) for source, ref in zip(sources, refs, strict=True)]
        guesses.append(_guess(entry, sources, seen, generator(seed, f"synthetic/{number}/range")))
    largest = max(math.prod(guess.shape) for guess in guesses)
    rows = max(min(rows, _LARGEST // max(largest, 1)), 64 if rows > 64 else rows)
    arrays = []
    for number, guess in enumerate(guesses):
        values = guess.make(generator(seed, f"synthetic/{number}"), rows)
        arrays.append(_cast(values, guess.entry))
    several = len(guesses) > 1
    whats = [f"'{guess.entry.name}': {guess.what}" if several else guess.what for guess in guesses]
    description = f"{rows:,} made-up " + ("inputs, " if several else "") + ", ".join(whats)
    return Inputs(tuple(arrays), np.full(rows, -1), True, description)


def _cast(values: Array, entry: Entry) -> Array:
    dtype = entry.numpy_dtype
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        values = np.clip(np.round(values), info.min, info.max)
    return values.astype(dtype)


@dataclass(frozen=True, eq=False)
class _Guess:
    """What is made up for one input.

    Attributes:
        entry: the input.
        shape: of one row.
        what: for people: "images (28, 28, 1), values 0 to 1".
        make: rows of it, given random numbers and how many.
    """

    entry: Entry
    shape: tuple[int, ...]
    what: str
    make: Callable[[Random, int], Array]


# ------------------------------------------------------------------------------------------------ what kind it is


def _guess(entry: Entry, sources: Sequence[Source], seen: Sequence[list[Reading]], random: Random) -> _Guess:
    """The kind of an input, by what reads it first."""
    found = seen[0]
    classes = [reading.class_name for reading in found]
    if entry.shape is None:
        raise _refusal(entry, "its shape is not known")
    if entry.dtype.startswith("complex"):
        raise _refusal(entry, "it takes complex numbers")
    if entry.is_text:
        return _texts(entry, sources, found)
    if entry.dtype == "bool":
        filled = _filled(entry, FREE_STEPS)
        return _Guess(entry, filled, f"masks {filled}", lambda random, rows: _masks(random, rows, filled))
    if _TOKENS & set(classes):
        return _tokens(entry, sources, found)
    if "Discretization" in classes:
        return _binned(entry, found[classes.index("Discretization")])
    wide = [reading for reading in found if reading.class_name in _FLAT and not reading.timed]
    shape: Shape = entry.shape[1:]
    if len(shape) >= 4:
        return _volumes(entry, sources, seen, random)
    if len(shape) == 3:
        return _images(entry, sources, seen, random, found[0] if found else None)
    if wide and wide[0].shape is not None and len(wide[0].shape) == 4 and _same_size(wide[0].shape[1:], shape):
        return _images(entry, sources, seen, random, wide[0])
    if len(shape) == 2:
        flat = classes[:1] == ["Dense"] and found[0].shape is not None and len(found[0].shape) == 2
        if flat and all(size is not None and size >= 8 for size in shape) and shape[1] not in _ALPHABETS:
            return _images(entry, sources, seen, random, None)
        return _signals(entry, sources, seen, random)
    long = next((reading.shape for reading in found if reading.shape is not None and len(reading.shape) == 3), None)
    if len(shape) == 1 and long is not None and _same_size(long[1:], shape) and long[2] not in (None, shape[0]):
        return _signals(entry, sources, seen, random)
    if classes and classes[0] in ("MelSpectrogram", "STFTSpectrogram"):
        return _signals(entry, sources, seen, random)
    return _features(entry, sources, seen, random)


def _refusal(entry: Entry, why: str) -> DataError:
    return DataError(f"No inputs can be made up for input '{entry.name}': {why}. Give inputs with --data.")


def _same_size(first: Sequence[int | None], second: Sequence[int | None]) -> bool:
    sizes = [math.prod(size for size in shape if size is not None) for shape in (first, second)]
    return sizes[0] == sizes[1] and None not in first and None not in second


def _filled(entry: Entry, free: int, channel: int | None = None) -> tuple[int, ...]:
    """The shape of a row with free sizes chosen; not that of the channels, which only a network knows."""
    shape = (entry.shape or ())[1:]
    if channel is not None and shape and shape[channel] is None:
        raise _refusal(entry, f"the size of its {'last ' if channel == -1 else ''}axis is not known")
    return tuple(free if size is None else size for size in shape)


# -------------------------------------------------------------------------------------------------- value ranges


@dataclass(frozen=True, eq=False)
class _Range:
    """Values between two bounds, or of a mean and a variance.

    Attributes:
        text: for people.
        low, high: bounds.
        moments: mean and variance, along the axes of a row; in place of the bounds.
    """

    text: str
    low: float = 0
    high: float = 1
    moments: tuple[Array, Array] | None = None

    def of(self, values: Array) -> Array:
        """Patterns brought to the range, shape (rows, ...). Where there are bounds they lie between 0 and 1."""
        if self.moments is None:
            return (values * np.float32(self.high - self.low) + np.float32(self.low)).astype(np.float32, copy=False)
        mean, variance = (np.asarray(item, np.float32) for item in self.moments)
        sizes = (1,) * (values.ndim - 1 - mean.ndim) + mean.shape
        axes = (0, *(axis for axis, size in enumerate(sizes, 1) if size == 1))
        values = (values - values.mean(axes, keepdims=True)) / np.maximum(values.std(axes, keepdims=True), 1e-6)
        values = values * np.sqrt(variance) + mean
        for low, high in ((0, 1), (0, 255), (-1, 1)):
            # Images of a mean and a spread that only such bounds explain.
            bounded = low <= float(mean.min()) and float(mean.max()) <= high
            if len(sizes) == 3 and bounded and 0.12 < float(np.sqrt(variance).mean()) / (high - low) < 0.5:
                return np.clip(values, low, high)
        return values


_UNIT = _Range("values 0 to 1")
_BYTES = _Range("values 0 to 255", 0, 255)
_SIGNED = _Range("values -1 to 1", -1, 1)
_STANDARD = _Range("standardised", moments=(np.zeros(()), np.ones(())))


def _given_range(seen: Sequence[list[Reading]]) -> list[_Range] | None:
    """What layers at the input itself tell, source by source: a normalisation, or a rescaling."""
    result = []
    for found in seen:
        moments = next((reading.moments for reading in found if reading.moments is not None), None)
        scaled = next((reading for reading in found if (reading.scale, reading.offset) != (1, 0)), None)
        if moments is not None:
            result.append(_Range("mean and variance of the networks' first layers", moments=moments))
        elif scaled is not None:
            result.append(_unscaled(scaled.scale, scaled.offset))
    return result if len(result) == len(seen) and result else None


def _unscaled(scale: float, offset: float) -> _Range:
    """The range that a rescaling brings to 0..1, or to both sides of 0."""
    edges = (0.0, -2 * offset / scale) if offset < -0.25 else (-offset / scale, (1 - offset) / scale)
    low, high = (
        next((exact for exact in (-1.0, 0.0, 1.0, 255.0) if abs(edge - exact) <= 0.02 * abs(exact)), edge)
        for edge in sorted(edges)
    )
    return _Range(f"values {low:.4g} to {high:.4g}", low, high)


def _chosen(candidates: Sequence[tuple[_Range, Array]], statistics: Sequence[Statistics]) -> int | None:
    """The candidate that comes closest to what the first BatchNormalizations have seen; None where there are none."""
    if not statistics:
        return None
    scores = [_matched(made.of(values), statistics)[0] for made, values in candidates]
    # Nearly all images come as 0..1, and a few rows do not tell -1..1 from it for sure.
    return int(np.argmin([score + (made is not _UNIT) for score, (made, _) in zip(scores, candidates, strict=True)]))


def _derived(values: Array, statistics: Sequence[Statistics]) -> list[_Range]:
    """Mean and deviation of inputs that first layers tell: where a BatchNormalization stands right behind them."""
    if not statistics or any(set(one.activations) != {"linear"} for one in statistics):
        return []
    centre, spread = float(values.mean()), float(values.std())
    like = (values - centre) / max(spread, 1e-6)
    constant = np.stack([np.zeros_like(values[0]), np.ones_like(values[0])])
    found = []
    for share in (0, 0.95):
        scales, gaps, sums = [], [], []
        for one in statistics:
            least = float(one.variance.min())
            rest = share * least if least < 1 else 0
            means, squares = one.of(like)
            (bias, shifted), _ = one.of(constant)
            scales.append(
                np.sqrt((one.variance - rest) / (1 - rest) / np.maximum(squares.mean(0) - means.mean(0) ** 2, 1e-9))
            )
            gaps.append((one.mean / (1 - rest) - bias, means.mean(0) - bias))
            sums.append(shifted - bias)
        scale = float(np.median(np.concatenate(scales)))
        target = np.concatenate([wanted - scale * mean for wanted, mean in gaps])
        weight = np.concatenate(sums)
        offset = float(weight @ target / max(float(weight @ weight), 1e-9))
        moments = (np.full((), offset), np.full((), scale**2))
        found.append(_Range(f"mean {offset:.3g}, deviation {scale:.3g}", moments=moments))
    return found


def _statistics(sources: Sequence[Source], seen: Sequence[list[Reading]]) -> list[Statistics]:
    found = [first_statistics(source, reading) for source, own in zip(sources, seen, strict=True) for reading in own]
    return [item for item in found if item is not None]


def _matched(
    inputs: Array, statistics: Sequence[Statistics], rests: Sequence[float] = _RESTS
) -> tuple[float, float, Array]:
    """Weights of the rows under which the statistics behind the first layers come out as stored.

    Moving averages start at mean 0 and variance 1, and after a short training a rest of that is left in them: at most
    the least variance. That rest which fits best is taken out.

    Args:
        inputs: rows, of shape (rows, ...).
        statistics: of all sources.
        rests: shares of the least variance to try as that rest.

    Returns:
        How far the weights are from equal ones and the statistics from the stored ones (0 is best), the rest that fits
        best, and the weights, shape (rows,), sum 1.
    """
    step = max(1, _BLOCK // math.prod(inputs.shape[1:]))
    apart = -(-sum(one.mean.size for one in statistics) // _CHANNELS)
    gaps: dict[float, list[Array]] = {share: [] for share in rests}
    for one in statistics:
        blocks = [one.of(inputs[start : start + step]) for start in range(0, len(inputs), step)]
        means, squares = (np.concatenate(part)[:, ::apart] for part in zip(*blocks, strict=True))
        least = float(one.variance.min())
        for share, own in gaps.items():
            rest = share * least if least < 1 else 0
            mean, variance = one.mean[::apart] / (1 - rest), (one.variance[::apart] - rest) / (1 - rest)
            variance = variance + 1e-3 * float(np.median(variance)) + 1e-9
            own += [(means - mean) / np.sqrt(variance), (squares - mean**2 - variance) / (variance + mean**2)]
    found = []
    for share, own in gaps.items():
        score, weights = _tilted(np.clip(np.concatenate(own, axis=1), -_LARGEST_GAP, _LARGEST_GAP))
        found.append((score, share, weights))
    return min(found, key=lambda item: item[0])


def _tilted(gaps: Array) -> tuple[float, Array]:
    """Weights as equal as can be under which the weighted mean of all gaps is small.

    Minimises KL(weights, equal ones) + mean square of the weighted gaps / (2 · tolerance), by Newton's method on its
    dual, which is convex.
    """
    gaps = gaps / math.sqrt(gaps.shape[1])
    slopes = np.zeros(gaps.shape[1])
    value, weights = _dual(gaps, slopes)
    for _ in range(30):
        mean = weights @ gaps
        slope = _TOLERANCE * slopes - mean
        curvature = (gaps * weights[:, None]).T @ gaps - np.outer(mean, mean)
        curvature[np.diag_indices_from(curvature)] += _TOLERANCE
        step = np.linalg.solve(curvature, slope)
        gain = float(slope @ step)
        if gain < 1e-4:
            break
        size = 1.0
        while (tried := _dual(gaps, slopes - size * step))[0] > value - size * gain / 4 and size > 1e-6:
            size /= 2
        slopes = slopes - size * step
        value, weights = tried
    return -value, weights


def _dual(gaps: Array, slopes: Array) -> tuple[float, Array]:
    scores = -gaps @ slopes
    highest = float(scores.max())
    weights = np.exp(scores - highest)
    total = float(weights.sum())
    value = highest + math.log(total / len(gaps)) + _TOLERANCE / 2 * float(slopes @ slopes)
    return value, weights / total


def _selected(
    random: Random, rows: int, statistics: Sequence[Statistics], make: Callable[[Random, int], Array]
) -> Array:
    """Of more rows than are needed those that fit what the first BatchNormalizations have seen."""
    if not statistics:
        return make(random, rows)
    pool = make(random, _POOL * rows)
    _, rest, _ = _matched(pool[:_TRIED], statistics)
    _, _, weights = _matched(pool, statistics, (rest,))
    # The largest of log(weight) + Gumbel noise are a draw without repetition by these weights.
    keys = np.log(np.maximum(weights, 1e-300)) + random.gumbel(size=len(pool))
    return pool[np.sort(np.argpartition(-keys, rows - 1)[:rows])]


def _spread(ranges: Sequence[_Range], values: Array) -> Array:
    """Rows in turn in the ranges of the sources."""
    if all(made.moments is None and (made.low, made.high) == (ranges[0].low, ranges[0].high) for made in ranges):
        return ranges[0].of(values)
    result = np.empty(values.shape, np.float32)
    for number, made in enumerate(ranges):
        result[number :: len(ranges)] = made.of(values[number :: len(ranges)])
    return result


# ------------------------------------------------------------------------------------------------------ the kinds


def _images(
    entry: Entry,
    sources: Sequence[Source],
    seen: Sequence[list[Reading]],
    random: Random,
    reading: Reading | None,
    layout: tuple[int, ...] | None = None,
) -> _Guess:
    """Images; of shape `layout` where the input itself is no image, but is read as one."""
    shape = _filled(entry, FREE_SIDE)
    if layout is None:
        layout = shape
    if len(layout) < 3:
        layout = (*shape, 1) if reading is None or reading.shape is None else tuple(s or 1 for s in reading.shape[1:])
    first = reading is not None and reading.config.get("data_format") == "channels_first"
    if first:
        layout = (*layout[1:], layout[0])
    if entry.shape is not None and len(shape) == 3 and entry.shape[1 if first else -1] is None:
        raise _refusal(entry, "the number of its channels is not known")

    def arranged(values: Array) -> Array:
        values = np.moveaxis(values, -1, 1) if first else values
        return values.reshape(len(values), *shape)

    if _is_alphabet(layout, reading):
        return _letters(entry, sources, seen, shape)
    ranges, statistics = _given_range(seen), _statistics(sources, seen)
    if ranges is None and entry.numpy_dtype.kind in "iu":
        ranges = [_BYTES]
    if ranges is None:
        small = layout
        if len(shape) == 3 and not any(reading.class_name == "Dense" for found in seen for reading in found):
            small = (*(min(side, _TRIED_SIDE) for side in layout[:2]), layout[2])
        tried = max(16, min(_TRIED, (1 << 19) // math.prod(small)))
        pattern = patterns.images(random, tried, small)
        pattern = np.moveaxis(pattern, -1, 1) if first else pattern
        pattern = pattern.reshape(tried, *shape) if small == layout else pattern
        candidates = [_UNIT, _SIGNED, _BYTES, _STANDARD, *_derived(pattern, statistics)]
        ranges = [candidates[_chosen([(made, pattern) for made in candidates], statistics) or 0]]

    def make(random: Random, rows: int) -> Array:
        def patterned(random: Random, rows: int) -> Array:
            return _spread(ranges, arranged(patterns.images(random, rows, layout)))

        return _selected(random, rows, statistics, patterned)

    return _Guess(entry, shape, f"images {layout}, {ranges[0].text}", make)


def _is_alphabet(layout: tuple[int, ...], reading: Reading | None) -> bool:
    """Whether an image is a row of letters, read by windows over all letters."""
    if reading is None or len(layout) != 3 or layout[2] != 1 or layout[1] not in _ALPHABETS:
        return False
    size = reading.config.get("kernel_size")
    return isinstance(size, (list, tuple)) and len(size) == 2 and size[1] == layout[1]


def _volumes(entry: Entry, sources: Sequence[Source], seen: Sequence[list[Reading]], random: Random) -> _Guess:
    shape = _filled(entry, 16, -1)
    ranges, statistics = _given_range(seen), _statistics(sources, seen)
    if ranges is None:
        tried = patterns.volumes(random, max(8, min(_TRIED, (1 << 21) // math.prod(shape))), shape[:-1], shape[-1])
        candidates = [_UNIT, _SIGNED, _BYTES, _STANDARD, *_derived(tried, statistics)]
        ranges = [candidates[_chosen([(made, tried) for made in candidates], statistics) or 0]]

    def make(random: Random, rows: int) -> Array:
        return _spread(ranges, patterns.volumes(random, rows, shape[:-1], shape[-1]))

    return _Guess(entry, shape, f"volumes {shape}, {ranges[0].text}", make)


def _signals(entry: Entry, sources: Sequence[Source], seen: Sequence[list[Reading]], random: Random) -> _Guess:
    shape = _filled(entry, FREE_STEPS, -1)
    layout = shape if len(shape) == 2 else (shape[0], 1)
    classes = {reading.class_name for reading in seen[0]}
    ranges, statistics = _given_range(seen), _statistics(sources, seen)
    if ranges is None:
        waves = patterns.signals(random, _TRIED, layout[0], layout[1]).reshape(_TRIED, *shape)
        spread = float(np.abs(waves).max())
        options = [(_STANDARD, waves), (_UNIT, 0.5 + waves / (2 * spread))]
        letters = len(shape) == 2 and 2 <= shape[1] <= 30
        if letters:
            options.append((_UNIT, _one_hot(patterns.letters(random, _TRIED, shape[0], shape[1]), shape[1])))
        best = _chosen(options, statistics)
        # Four channels of an LSTM are as often prices as nucleic acids.
        readers = _LINEAR | {"Dense"} | (_RECURRENT if shape[-1] != _ALPHABETS[0] else set())
        usual = shape[-1] in _ALPHABETS and bool(readers & classes)
        if best == 2 or (best is None and letters and usual):
            return _letters(entry, sources, seen, shape)
        ranges = [_UNIT if best == 1 else _STANDARD]

    def make(random: Random, rows: int) -> Array:
        values = patterns.signals(random, rows, layout[0], layout[1]).reshape(rows, *shape)
        if any(made.moments is None for made in ranges):
            values = np.clip(0.5 + values / 6, 0, 1)
        return _spread(ranges, values)

    return _Guess(entry, shape, f"signals {shape}, {ranges[0].text}", make)


def _one_hot(numbers: Array, size: int) -> Array:
    return np.eye(size, dtype=np.float32)[numbers]


def _letters(entry: Entry, sources: Sequence[Source], seen: Sequence[list[Reading]], shape: tuple[int, ...]) -> _Guess:
    length, size = shape[:2]
    motifs = []
    for source, found in zip(sources, seen, strict=True):
        for reading in found:
            layer = source_graph(source).calls[reading.call].layer
            kernel = next((w.tensor for w in source.states[layer].weights if w.name == "kernel"), None)
            if reading.class_name in ("Conv1D", "Conv2D") and kernel is not None and size in kernel.shape[1:-1]:
                motifs.append(kernel.read().astype(np.float64).reshape(-1, size, kernel.shape[-1]))

    def make(random: Random, rows: int) -> Array:
        return _one_hot(patterns.letters(random, rows, length, size, motifs), size).reshape(rows, *shape)

    return _Guess(entry, shape, f"sequences of {length} out of {size} letters, one-hot", make)


def _features(entry: Entry, sources: Sequence[Source], seen: Sequence[list[Reading]], random: Random) -> _Guess:
    shape = _filled(entry, 1, -1)
    size = math.prod(shape)
    kernels = [kernel for source, found in zip(sources, seen, strict=True) for kernel in first_kernels(source, found)]
    loadings = np.concatenate([kernel for kernel in kernels if len(kernel) == size] or [np.zeros((size, 0))], axis=1)
    loadings = loadings - loadings.mean(1, keepdims=True) if loadings.shape[1] else loadings
    loadings /= np.maximum(np.linalg.norm(loadings, axis=1, keepdims=True), 1e-9)
    layout = _picture(loadings)
    if layout is not None:
        return _images(entry, sources, seen, random, None, layout)
    ranges, statistics = _given_range(seen), _statistics(sources, seen)
    if ranges is None:
        tried = patterns.features(random, 512, size, loadings).reshape(512, *shape)
        options = [(_STANDARD, tried), (_UNIT, np.clip(0.5 + tried / 6, 0, 1))]
        options += [(made, tried) for made in _derived(tried, statistics)]
        ranges = [options[_chosen(options, statistics) or 0][0]]

    def make(random: Random, rows: int) -> Array:
        values = patterns.features(random, rows, size, loadings).reshape(rows, *shape)
        if any(made.moments is None for made in ranges):
            values = np.clip(0.5 + values / 6, 0, 1)
        return _spread(ranges, values)

    what = "1 feature" if size == 1 else f"{size:,} features"
    return _Guess(entry, shape, f"rows of {what}, {ranges[0].text}", make)


def _picture(loadings: Array) -> tuple[int, int, int] | None:
    """The height, width and channels of features that are the pixels of an image; None where they are none.

    Neighbours on an image are learned alike. Features are taken for an image where the weights of neighbours in both
    directions are similar and those of features at other distances are not.

    Args:
        loadings: weights of each feature in the first layers, centred and of norm 1, shape (features, units).
    """
    size, units = loadings.shape
    if units < 8 or size < 36:
        return None

    def likeness(lag: int) -> float:
        return float((loadings[:-lag] * loadings[lag:]).sum(1).mean())

    best, found = 0.0, None
    for channels in (1, 3):
        pixels = size // channels
        for width in range(5, pixels // 5 + 1):
            if size % channels or pixels % width or (channels == 3 and width * width != pixels):
                continue
            across, along = likeness(channels), likeness(width * channels)
            beside = max(abs(likeness((width + shift) * channels)) for shift in (-width // 2, width // 3 + 1))
            noise = 1 / math.sqrt(units * (size - width * channels))
            if min(across, along) > max(0.05, 4 * noise, 2 * beside) and along > best:
                best, found = along, (pixels // width, width, channels)
    return found


def _masks(random: Random, rows: int, shape: tuple[int, ...]) -> Array:
    """True up to an end."""
    if not shape:
        return random.random(rows) < 0.5
    ends = np.where(random.random(rows) < 0.5, shape[0], random.integers(1, shape[0] + 1, rows))
    mask = np.arange(shape[0]) < ends[:, None]
    return np.broadcast_to(mask.reshape(rows, shape[0], *(1,) * (len(shape) - 1)), (rows, *shape))


def _binned(entry: Entry, reading: Reading) -> _Guess:
    """Numbers on both sides of all boundaries."""
    shape = _filled(entry, 1)
    edges = reading.config.get("bin_boundaries")
    edges = [float(edge) for edge in edges] if isinstance(edges, (list, tuple)) and edges else [-1.0, 1.0]
    low, high = min(edges), max(edges)
    margin = max((high - low) / max(len(edges), 2), 1e-3)

    def make(random: Random, rows: int) -> Array:
        return random.uniform(low - margin, high + margin, (rows, *shape))

    return _Guess(entry, shape, f"numbers {shape} from {low - margin:.4g} to {high + margin:.4g}", make)


# ---------------------------------------------------------------------------------------------- tokens and texts


def _tokens(entry: Entry, sources: Sequence[Source], found: Sequence[Reading]) -> _Guess:
    shape = _filled(entry, FREE_STEPS)
    lookup = next((reading for reading in found if reading.class_name == "IntegerLookup"), None)
    if lookup is not None:
        return _numbers(entry, shape, _vocabulary(sources[0], lookup))
    keys = {"CategoryEncoding": "num_tokens", "Embedding": "input_dim", "ReversibleEmbedding": "input_dim"}
    readers = [reading for reading in found if reading.class_name in _TOKENS]
    sizes = [reading.config.get(keys.get(reading.class_name, "")) for reading in readers]
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    size = min(known) if known else 1000
    padded = any(reading.config.get("mask_zero") for reading in readers)
    length = math.prod(shape)

    def make(random: Random, rows: int) -> Array:
        return patterns.tokens(random, rows, length, size, padded).reshape(rows, *shape)

    what = f"sequences of {length} tokens" if length > 1 else "tokens"
    return _Guess(entry, shape, f"{what} out of {size:,}", make)


def _numbers(entry: Entry, shape: tuple[int, ...], words: Sequence[str]) -> _Guess:
    choices = np.array([int(word) for word in words if word.lstrip("-").isdigit()] or range(100))
    what = f"choices {shape} out of {len(choices):,} numbers"
    return _Guess(entry, shape, what, lambda random, rows: random.choice(choices, (rows, *shape)))


def _texts(entry: Entry, sources: Sequence[Source], found: Sequence[Reading]) -> _Guess:
    shape = _filled(entry, FREE_STEPS)
    reader = next((reading for reading in found if reading.class_name in _TEXTS), None)
    if reader is None:
        raise _refusal(entry, "it takes strings, and no layer tells which")
    words = [word for word in _vocabulary(sources[0], reader) if word and word != "[UNK]"]
    words = words or [f"word{number}" for number in range(100)]
    sentences = reader.class_name == "TextVectorization" and reader.config.get("split") is not None
    length = reader.config.get("output_sequence_length")
    length = length if isinstance(length, int) else 20
    joint = "" if reader.config.get("split") == "character" else " "

    def make(random: Random, rows: int) -> Array:
        result = np.empty(rows * math.prod(shape), object)
        for number in range(len(result)):
            count = int(random.integers(1, length + length // 4 + 1)) if sentences else 1
            result[number] = joint.join(words[place] for place in random.integers(len(words), size=count))
        return result.reshape(rows, *shape)

    return _Guess(entry, shape, f"{'texts' if sentences else f'strings {shape}'} out of {len(words):,} words", make)


def _vocabulary(source: Source, reading: Reading) -> list[str]:
    """The words of a look-up layer, from its configuration or its file."""
    given = reading.config.get("vocabulary")
    if isinstance(given, (list, tuple)):
        return [str(word) for word in given]
    layer = source_graph(source).calls[reading.call].layer
    for name, asset in source.states[layer].assets.items():
        if name.endswith("vocabulary.txt"):
            return asset.read().decode("utf-8", "replace").splitlines()
    return []
