"""Made-up patterns: images, volumes, signals, letters, tokens, features. Plain NumPy, many rows at once.

Images are a mixture of families, because networks tell apart edges, strokes, surfaces and backgrounds, and no single
family holds all of them. Values of images lie between 0 and 1, signals and features are standardised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from kmerge.methods.registry import Array

Random = np.random.Generator
_BLOCK = 1 << 21
"""Numbers per block of work."""
_DRAWN = 64
"""Larger images are drawn at this size and enlarged."""


def smooth_noise(random: Random, rows: int, sides: Sequence[int], channels: int, low: float, high: float) -> Array:
    """Noise whose amplitude falls with the frequency f as 1/f^a, `a` between `low` and `high`, another for each row.

    Returns:
        Values of mean 0 and variance 1 in each row and channel, shape (rows, *sides, channels).
    """
    from scipy import fft

    # Larger than needed: what is made is periodic, and its two edges should not match.
    made = tuple(fft.next_fast_len(side + side // 4 + 1, real=True) for side in sides)
    axes = tuple(range(1, len(sides) + 1))
    grid = np.meshgrid(*(np.fft.fftfreq(side) for side in made[:-1]), np.fft.rfftfreq(made[-1]), indexing="ij")
    radius = np.sqrt(sum(np.square(axis) for axis in grid)).astype(np.float32)
    radius[(0,) * len(sides)] = 1
    exponents = random.uniform(low, high, rows).astype(np.float32)
    spectrum = fft.rfftn(random.standard_normal((rows, *made, channels), np.float32), axes=axes)
    spectrum *= np.exp(-np.multiply.outer(exponents, np.log(radius)))[..., None]
    noise: Array = fft.irfftn(spectrum, made, axes=axes)
    noise = noise[(slice(None), *(slice(0, side) for side in sides))]
    noise = noise - noise.mean(axes, keepdims=True)
    noise /= np.maximum(noise.std(axes, keepdims=True), 1e-6)
    return noise


# ------------------------------------------------------------------------------------------------------- images


def images(random: Random, rows: int, shape: Sequence[int], kinds: Array | None = None) -> Array:
    """Images of all families.

    Args:
        random: where from.
        rows: how many.
        shape: of each: height, width, channels.
        kinds: family of each row, numbers into `FAMILIES`, shape (rows,); default all equally often.

    Returns:
        Values from 0 to 1, shape (rows, *shape), float32.
    """
    height, width, channels = shape
    if kinds is None:
        kinds = random.permutation(np.arange(rows) % len(FAMILIES))
    result = np.empty((rows, height, width, channels), np.float32)
    step = max(1, _BLOCK // (height * width * channels))
    coarse = -(-max(height, width) // _DRAWN)
    for kind, family in enumerate(FAMILIES):
        members = np.flatnonzero(kinds == kind)
        for start in range(0, len(members), step):
            block = members[start : start + step]
            made = family(random, len(block), -(-height // coarse), -(-width // coarse), channels)
            result[block] = _exposed(random, _enlarged(made, height, width))
    return np.clip(result, 0, 1, out=result)


def _enlarged(values: Array, height: int, width: int) -> Array:
    """Images of another size, by linear interpolation."""
    if values.shape[1:3] == (height, width):
        return values
    along, across = (_interpolation(new, old) for new, old in zip((height, width), values.shape[1:3], strict=True))
    result: Array = np.einsum("rhwc,Hh,Ww->rHWc", values, along, across, optimize=True)
    return result


def _interpolation(new: int, old: int) -> Array:
    """The matrix that brings `old` places to `new`."""
    places = np.linspace(0, old - 1, new)
    matrix: Array = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old))).astype(np.float32)
    return matrix


def _exposed(random: Random, values: Array) -> Array:
    """Images with another brightness and contrast each; a third keep their full contrast."""
    rows = len(values)
    contrast = np.where(random.random(rows) < 0.35, 1, random.uniform(0.3, 1, rows)).astype(np.float32)
    rest = (random.random(rows).astype(np.float32) * (1 - contrast))[:, None, None, None]
    contrast = contrast[:, None, None, None]
    gamma = np.exp(random.normal(0, 0.3, rows)).astype(np.float32)[:, None, None, None]
    result: Array = np.power(np.clip(values, 0, 1), gamma) * contrast + rest
    return result


def _squashed(noise: Array, width: float = 2.2) -> Array:
    """Noise of variance 1 brought to 0..1."""
    return np.clip(0.5 + noise / (2 * width), 0, 1)


def _coloured(random: Random, luminance: Array, channels: int, spread: float = 0.5) -> Array:
    """One channel made into several that move together, in random tints."""
    if channels == 1:
        return luminance
    rows = len(luminance)
    tint = 1 + random.uniform(-spread, spread, (rows, 1, 1, channels)) * random.random((rows, 1, 1, 1))
    return (luminance * tint.astype(np.float32)).astype(np.float32)


def _surfaces(random: Random, rows: int, height: int, width: int, channels: int) -> Array:
    """Smooth noise, coarse to fine."""
    shared = smooth_noise(random, rows, (height, width), 1, 0.7, 2.6)
    if channels == 1:
        return _squashed(shared)
    own = smooth_noise(random, rows, (height, width), channels, 0.7, 2.6)
    share = random.uniform(0.4, 1, (rows, 1, 1, 1)).astype(np.float32)
    return _squashed(share * shared + np.sqrt(1 - share**2) * own)


def _gradients(random: Random, rows: int, height: int, width: int, channels: int) -> Array:
    """Ramps of brightness with a little texture."""
    y, x = _grid(height, width)
    angle = random.uniform(0, 2 * np.pi, (rows, 1, 1)).astype(np.float32)
    ramp = (np.cos(angle) * x + np.sin(angle) * y)[..., None] * random.uniform(0.3, 1, (rows, 1, 1, 1))
    texture = smooth_noise(random, rows, (height, width), 1, 0.5, 2) * random.uniform(0, 0.12, (rows, 1, 1, 1))
    ramp = 0.5 + 0.5 * ramp + texture
    return _coloured(random, ramp.astype(np.float32), channels)


def _blobs(random: Random, rows: int, height: int, width: int, channels: int) -> Array:
    """Smooth noise cut at a level: patches on a plain or textured background."""
    noise = smooth_noise(random, rows, (height, width), 1, 1.3, 3)
    level = random.uniform(-0.8, 1.2, (rows, 1, 1, 1)).astype(np.float32)
    sharpness = np.exp(random.uniform(1, 3, (rows, 1, 1, 1))).astype(np.float32)
    mask = 1 / (1 + np.exp(np.clip(-(noise - level) * sharpness, -30, 30)))
    return _composed(random, mask, channels)


def _figures(random: Random, rows: int, height: int, width: int, channels: int) -> Array:
    """A few rectangles and ellipses over each other."""
    y, x = _grid(height, width)
    canvas = _background(random, rows, height, width, channels)
    for number in range(5):
        shown = (random.random((rows, 1, 1)) < (1, 0.8, 0.6, 0.4, 0.2)[number]).astype(np.float32)
        centre = random.uniform(-0.8, 0.8, (2, rows, 1, 1)).astype(np.float32)
        radius = random.uniform(0.1, 0.7, (2, rows, 1, 1)).astype(np.float32)
        angle = random.uniform(0, np.pi, (rows, 1, 1)).astype(np.float32)
        u = np.abs(np.cos(angle) * (x - centre[0]) + np.sin(angle) * (y - centre[1])) / radius[0]
        v = np.abs(np.cos(angle) * (y - centre[1]) - np.sin(angle) * (x - centre[0])) / radius[1]
        distance = np.where(random.random((rows, 1, 1)) < 0.5, np.maximum(u, v), np.sqrt(u * u + v * v))
        mask = (shown * _inside((1 - distance) * radius.min(0), height, width))[..., None]
        canvas = canvas * (1 - mask) + mask * _fill(random, rows, height, width, channels)
    return canvas


def _strokes(random: Random, rows: int, height: int, width: int, channels: int) -> Array:
    """Curves as a pen draws them."""
    y, x = _grid(height, width)
    nearest = np.full((rows, height, width), np.inf, np.float32)
    middle = random.normal(0, 0.15, (rows, 2))
    for number in range(3):
        shown = random.random(rows) < (1, 0.7, 0.35)[number]
        points = middle[:, None] + random.uniform(-0.75, 0.75, (rows, 4, 2))
        steps = np.linspace(0, 1, 14)
        curve = np.stack([(1 - steps) ** 3, 3 * steps * (1 - steps) ** 2, 3 * steps**2 * (1 - steps), steps**3])
        path = np.einsum("rpd,ps->srd", points, curve).astype(np.float32)
        for first, second in pairwise(path):
            distance = _to_segment(x, y, first, second)
            distance[~shown] = np.inf
            np.minimum(nearest, distance, out=nearest)
    thickness = random.uniform(0.03, 0.16, (rows, 1, 1)).astype(np.float32)
    return _composed(random, _inside(thickness - np.sqrt(nearest), height, width)[..., None], channels)


def _to_segment(x: Array, y: Array, first: Array, second: Array) -> Array:
    """Squared distances of all pixels to one line per row."""
    along = second - first
    length = np.maximum((along**2).sum(-1), 1e-9)
    dx, dy = x - first[:, 0, None, None], y - first[:, 1, None, None]
    place = (dx * along[:, 0, None, None] + dy * along[:, 1, None, None]) / length[:, None, None]
    place = np.clip(place, 0, 1)
    result: Array = (dx - place * along[:, 0, None, None]) ** 2 + (dy - place * along[:, 1, None, None]) ** 2
    return result


def _outlines(random: Random, rows: int, height: int, width: int, channels: int) -> Array:
    """One thing in the middle, many of them symmetrical, with texture of its own."""
    y, x = _grid(height, width)
    mirrored = random.random((rows, 1, 1)) < 0.6
    stretch = random.uniform(0.6, 1.5, (rows, 1, 1)).astype(np.float32)
    x, y = x - random.normal(0, 0.06, (rows, 1, 1)), y - random.normal(0, 0.06, (rows, 1, 1))
    x = np.where(mirrored, np.abs(x), x) * stretch
    angle, radius = np.arctan2(y, x), np.sqrt(x * x + y * y)
    edge = random.uniform(0.35, 0.9, (rows, 1, 1))
    for order in range(1, 8):
        phase, size = random.uniform(0, 2 * np.pi, (rows, 1, 1)), random.normal(0, 0.35 / order, (rows, 1, 1))
        edge = edge * (1 + size * np.cos(order * angle + phase))
    mask = _inside((edge - radius).astype(np.float32), height, width)[..., None]
    return _composed(random, mask, channels)


FAMILIES: tuple[Callable[[Random, int, int, int, int], Array], ...] = (
    _surfaces,
    _gradients,
    _blobs,
    _figures,
    _strokes,
    _outlines,
)


def _grid(height: int, width: int) -> tuple[Array, Array]:
    """Places of the pixels, -1 to 1."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return y.astype(np.float32)[None], x.astype(np.float32)[None]


def _inside(distance: Array, height: int, width: int) -> Array:
    """Distances to an edge (positive inside) as a mask whose edge is a pixel wide."""
    result: Array = np.clip(0.5 + distance * max(height, width) / 2, 0, 1)
    return result


def _fill(random: Random, rows: int, height: int, width: int, channels: int) -> Array:
    """Plain, or with texture."""
    level = random.uniform(0.2, 1, (rows, 1, 1, channels)).astype(np.float32)
    if channels > 1:
        grey = level.mean(-1, keepdims=True)
        level = grey + (level - grey) * random.random((rows, 1, 1, 1)).astype(np.float32)
    depth = np.maximum(random.uniform(-0.1, 0.3, (rows, 1, 1, 1)), 0).astype(np.float32)
    result: Array = level + depth * smooth_noise(random, rows, (height, width), 1, 0.3, 2.2)
    return result


def _background(random: Random, rows: int, height: int, width: int, channels: int) -> Array:
    """Black, white, or a surface."""
    choice = random.random((rows, 1, 1, 1))
    surface = _surfaces(random, rows, height, width, channels) * random.uniform(0.3, 1, (rows, 1, 1, 1))
    return np.where(choice < 0.5, 0, np.where(choice < 0.62, 1, surface)).astype(np.float32)


def _composed(random: Random, mask: Array, channels: int) -> Array:
    """What a mask shows, on a background."""
    rows, height, width = mask.shape[:3]
    ground = _background(random, rows, height, width, channels)
    ground += mask * (np.clip(_fill(random, rows, height, width, channels), 0, 1) - ground)
    return ground


def volumes(random: Random, rows: int, sides: Sequence[int], channels: int) -> Array:
    """Smooth noise in three dimensions or more, a part of it cut at a level; values from 0 to 1."""
    size = int(np.prod(sides)) * channels
    result = np.empty((rows, *sides, channels), np.float32)
    step = max(1, _BLOCK // size)
    for start in range(0, rows, step):
        block = result[start : start + step]
        noise = smooth_noise(random, len(block), sides, channels, 1, 3.5)
        one = (len(block), *(1,) * (len(sides) + 1))
        sharp = np.where(random.random(one) < 0.5, np.exp(random.uniform(1, 3, one)), 0.45)
        block[:] = 1 / (1 + np.exp(np.clip(-sharp * (noise - random.uniform(-0.5, 1, one)), -30, 30)))
    return result


# ------------------------------------------------------------------------------------------------------ signals


def signals(random: Random, rows: int, steps: int, channels: int) -> Array:
    """Signals: noise of many colours, waves, steps and bumps, in channels that have something in common.

    Returns:
        Values of about mean 0 and variance 1, shape (rows, steps, channels), float32.
    """
    kinds = random.permutation(np.arange(rows) % 5)
    result = np.empty((rows, steps, channels), np.float32)
    time = np.linspace(0, 1, steps, dtype=np.float32)[None, :, None]
    for kind in range(5):
        members = np.flatnonzero(kinds == kind)
        count = len(members)
        if not count:
            continue
        one = (count, 1, channels)
        if kind in (0, 1):
            made = smooth_noise(random, count, (steps,), channels, (0.2, 1)[kind], (1, 2.5)[kind])
        elif kind == 2:
            made = np.zeros((count, steps, channels))
            for _ in range(3):
                pitch = np.exp(random.uniform(np.log(0.5), np.log(max(steps / 4, 2)), one))
                made = made + random.normal(0, 1, one) * np.sin(
                    2 * np.pi * (pitch * time * (1 + random.normal(0, 0.15, one) * time) + random.random(one))
                )
        elif kind == 3:
            made = np.zeros((count, steps, channels))
            for _ in range(4):
                made = made + random.normal(0, 1, one) * (time > random.random(one))
        else:
            made = np.zeros((count, steps, channels))
            for _ in range(3):
                place, width = random.random(one), np.exp(random.uniform(np.log(0.02), np.log(0.3), one))
                made = made + random.normal(0, 1, one) * np.exp(-(((time - place) / width) ** 2))
        if channels > 1:
            mixing = np.eye(channels) + random.normal(0, 0.7 / np.sqrt(channels), (count, channels, channels))
            made = np.einsum("rtc,rcd->rtd", made, mixing)
        made = made + random.exponential(0.08, one) * random.standard_normal(made.shape)
        made = made - made.mean((1, 2), keepdims=True)
        made = made / np.maximum(made.std((1, 2), keepdims=True), 1e-6)
        scale = np.exp(random.normal(-0.05, 0.3, (count, 1, 1)))
        result[members] = made * scale + random.normal(0, 0.3, one)
    return result


# ------------------------------------------------------------------------------------------- letters and tokens


def letters(random: Random, rows: int, length: int, size: int, motifs: Sequence[Array] = ()) -> Array:
    """Sequences over an alphabet, with runs, in another composition each, and with motifs put in.

    Args:
        random: where from.
        rows, length: shape of the result.
        size: of the alphabet.
        motifs: scores of the letters at each place, shapes (places, size, motifs): what first layers look for.

    Returns:
        Numbers of letters, shape (rows, length).
    """
    composition = random.dirichlet(np.full(size, 3.0), rows)
    bounds = np.cumsum(composition, 1)
    drawn = (random.random((rows, length, 1)) > bounds[:, None, :-1]).sum(-1)
    stay = random.random((rows, length)) < random.beta(1, 4, (rows, 1))
    stay[:, 0] = False
    origin = np.maximum.accumulate(np.where(stay, 0, np.arange(length)), axis=1)
    result = np.take_along_axis(drawn, origin, 1)
    usable = [motif for motif in motifs if len(motif) <= length]
    for row in np.flatnonzero(random.random(rows) < 0.6) if usable else ():
        for _ in range(random.integers(1, 4)):
            motif = usable[random.integers(len(usable))]
            scores = motif[..., random.integers(motif.shape[-1])].astype(np.float64)
            scores = random.uniform(1, 4) * scores / max(float(scores.std()), 1e-9)
            chances = np.exp(scores - scores.max(1, keepdims=True))
            chances /= chances.sum(1, keepdims=True)
            word = (random.random((len(chances), 1)) > np.cumsum(chances, 1)[:, :-1]).sum(1)
            start = random.integers(length - len(word) + 1)
            result[row, start : start + len(word)] = word
    return result


def tokens(random: Random, rows: int, length: int, size: int, padded: bool) -> Array:
    """Numbers of words, low ones more often (as Keras's vocabularies are ordered), 0 behind the end where padded."""
    first = 1 if padded and size > 1 else 0
    uniform = random.integers(first, size, (rows, length))
    ranks = np.exp(random.random((rows, length)) * np.log(size - first + 1)) - 1
    common = np.minimum(first + ranks.astype(np.int64), size - 1)
    result = np.where(random.random((rows, 1)) < (0.5 if length > 1 else 0), common, uniform)
    if padded and length > 1:
        ends = np.where(random.random(rows) < 0.5, length, random.integers(1, length + 1, rows))
        result[np.arange(length) >= ends[:, None]] = 0
    return result


# ----------------------------------------------------------------------------------------------------- features


def features(random: Random, rows: int, size: int, loadings: Array | None = None) -> Array:
    """Gaussian features that correlate, another way in each group of rows; mean 0 and variance 1 overall.

    Args:
        random: where from.
        rows, size: shape of the result.
        loadings: in half of the groups features correlate as the rows of this do, shape (size, factors), norm 1.
    """
    result = np.empty((rows, size), np.float32)
    for number, members in enumerate(np.array_split(random.permutation(rows), 4)):
        factors = max(1, min(size // 2, 16))
        loading = random.standard_normal((factors, size)) / np.sqrt(factors)
        if loadings is not None and loadings.shape[1] > 1 and number % 2:
            loading = loadings.T
        share = random.uniform(0.3, 0.9)
        common = random.standard_normal((len(members), len(loading))) @ loading
        own = random.standard_normal((len(members), size))
        centre = 0.5 * random.standard_normal(size)
        result[members] = centre + np.sqrt(0.75) * (np.sqrt(share) * common + np.sqrt(1 - share) * own)
    result -= result.mean(0)
    result /= np.maximum(result.std(0), 1e-6)
    return result
