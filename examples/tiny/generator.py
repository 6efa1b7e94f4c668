"""Generated coronary angiograms, single frames and cines: a vessel tree filled with contrast, a catheter, and an X-ray-like background.

A frame is drawn from one random generator, so a seed names it. Objects are polygons first: a branch is cut into segments and each
segment is one polygon, in the manner of hand-drawn annotations. Everything about looks (tone, noise, blur, anatomy, digital
subtraction) is varied far beyond any one machine, because what learns from these frames must also work on real ones.
A cine is one such frame over time: contrast flows in, the heart beats, and the noise of each frame is its own.
Nothing here knows about models or files.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage  # type: ignore[import-untyped]

__all__ = ["CONCEPTS", "FRAME_RATE", "Frame", "Polygon", "generate", "generate_cine"]

CONCEPTS = ("vessel", "catheter")
"""The names of the objects of a frame, in the order of `Frame.polygons`."""

FRAME_RATE = 15
"""Frames of a cine per second."""

Array = NDArray[np.float32]
Polygon = list[float]
"""A closed outline as x0, y0, x1, y1, ... in pixels; pixel centres lie at half integers."""

_UNIT = 300.0
"""Widths and lengths below are in pixels of a frame whose shorter side is this long."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """A generated frame: `image` uint8 [height, width], and the outlines of each concept (none if it is absent)."""

    image: NDArray[np.uint8]
    polygons: dict[str, list[Polygon]]
    root: tuple[float, float]
    subtracted: bool


@dataclasses.dataclass(frozen=True)
class _Branch:
    """A centre line [points, 2] (x, y), its radius [points] and its relative filling with contrast [points], all in pixels.

    `began` is the number of points from the root of the tree to the first one, along the branches."""

    points: Array
    radius: Array
    filling: Array
    labelled: bool
    began: int = 0


@dataclasses.dataclass(frozen=True)
class _Circle:
    """The collimator's opening: centre (x, y) and radius in pixels."""

    centre: tuple[float, float]
    radius: float


def generate(rng: np.random.Generator, height: int, width: int) -> Frame:
    """Draw one frame of the given size in pixels."""
    scale = min(height, width) / _UNIT
    size = np.array([width, height], dtype=np.float32) / scale
    root, heading = _root(rng, size)
    branches = [b for b in _tree(rng, root, heading, size) if len(b.points) > 4]
    catheter = _catheter(rng, root, heading, size) if rng.random() < 0.7 else None
    subtracted = bool(rng.random() < 0.35)

    collimator = _collimator(rng, height, width) if rng.random() < 0.45 else None

    background = _background(rng, height, width, scale, subtracted)
    depth = _projection(rng, [_scaled(b, scale) for b in branches], height, width)
    contrast = rng.uniform(0.12, 0.8) * (0.7 if subtracted else 1.0)
    image = background * np.exp(-contrast * depth)
    if catheter is not None:
        image *= _catheter_shadow(rng, _scaled(catheter, scale), height, width, contrast)
    image = _detector(rng, rng, image, scale, subtracted, collimator)

    objects = {"vessel": [b for b in branches if b.labelled], "catheter": [] if catheter is None else [catheter]}
    polygons = {name: [p for b in objects[name] for p in _outlines(_scaled(b, scale), height, width, collimator)] for name in CONCEPTS}
    x, y = root / size
    return Frame(image, polygons, (float(x), float(y)), subtracted)


def generate_cine(rng: np.random.Generator, frames: int, height: int, width: int, code: str) -> list[Frame]:
    """Draw a cine of `frames` frames of the given size in pixels, with `code` and the number of the frame burnt in.

    It begins with a catheter and no contrast. The contrast then flows from the root to the ends of the branches, and washes out a little
    at the end. Only what it has reached is outlined as vessel.
    """
    scale = min(height, width) / _UNIT
    size = np.array([width, height], dtype=np.float32) / scale
    root, heading = _root(rng, size)
    branches = [b for b in _tree(rng, root, heading, size) if len(b.points) > 4]
    catheter = _catheter(rng, root, heading, size)
    subtracted = bool(rng.random() < 0.2)
    collimator = _collimator(rng, height, width) if rng.random() < 0.45 else None
    background = _background(rng, height, width, scale, subtracted)
    contrast = rng.uniform(0.3, 0.8) * (0.7 if subtracted else 1.0)
    motion, flow = _Motion.draw(rng, size, frames), _Flow.draw(rng, max(b.began + len(b.points) for b in branches), frames)
    tone = float(rng.uniform(190, 250))
    looks = int(rng.integers(2**32))  # what differs from cine to cine, but not from frame to frame, is drawn again for each frame

    drawn = []
    for time in range(frames):
        moved = [dataclasses.replace(b, points=motion.of_heart(b.points, time)) for b in branches]
        tube = dataclasses.replace(catheter, points=motion.of_catheter(catheter.points, time))
        image = motion.of_background(background, scale, time)
        filled = [_scaled(flow.fill(b, time), scale) for b in moved]
        image = image * np.exp(-contrast * _projection(np.random.default_rng([looks, 0]), filled, height, width))
        image *= _catheter_shadow(np.random.default_rng([looks, 1]), _scaled(tube, scale), height, width, contrast)
        gray = _detector(np.random.default_rng([looks, 2]), rng, image, scale, subtracted, collimator)
        objects = {"vessel": [b for b in (flow.reached(b, time) for b in moved) if b.labelled and len(b.points) > 4], "catheter": [tube]}
        polygons = {name: [p for b in objects[name] for p in _outlines(_scaled(b, scale), height, width, collimator)] for name in CONCEPTS}
        x, y = moved[0].points[0] / size
        drawn.append(Frame(_captioned(gray, [code, f"{time + 1}/{frames}"], tone), polygons, (float(x), float(y)), subtracted))
    return drawn


# Anatomy: centre lines and radii, in units.


def _root(rng: np.random.Generator, size: Array) -> tuple[Array, float]:
    """Where the tree begins (mostly in the upper part, sometimes out of view) and the direction it sets out in, in radians."""
    place = np.array([rng.uniform(-0.02, 0.85), rng.uniform(-0.02, 0.4)], dtype=np.float32) * size
    towards = size * np.array([rng.uniform(0.3, 0.7), rng.uniform(0.35, 0.8)]) - place
    return place, float(np.arctan2(towards[1], towards[0]) + rng.normal(0, 0.5))


def _path(rng: np.random.Generator, start: Array, heading: float, length: float, bend: float, wiggle: float) -> Array:
    """A smooth random walk of `length`: a steady `bend` (radians in all), slow drift, and `wiggle` that grows to the far end."""
    count = max(int(length), 6)
    along = np.linspace(0, 1, count)
    drift = ndimage.gaussian_filter1d(rng.normal(0, 1, count), 14, mode="reflect") * 0.1
    angle = heading + bend * along + np.cumsum(drift)
    phase = np.cumsum(ndimage.gaussian_filter1d(rng.uniform(0.5, 1.5, count), 6)) * 2 * np.pi / rng.uniform(13, 34)
    angle = angle + wiggle * along ** rng.uniform(0.3, 2) * np.sin(phase + rng.uniform(0, 6.3))
    steps = np.stack([np.cos(angle), np.sin(angle)], axis=1) * (length / count)
    return np.asarray(start + np.cumsum(steps, axis=0), dtype=np.float32)


def _radius(rng: np.random.Generator, count: int, first: float, last: float) -> Array:
    """A taper from `first` to `last` with slight unevenness and, sometimes, stenoses."""
    along = np.linspace(0, 1, count)
    radius = first + (last - first) * along ** rng.uniform(0.6, 1.6)
    radius *= 1 + 0.08 * ndimage.gaussian_filter1d(rng.normal(0, 1, count), 8, mode="reflect") * 4
    for _ in range(rng.poisson(0.35)):
        narrowing = rng.uniform(0.3, 0.7) * np.exp(-(((along - rng.uniform(0.1, 0.9)) * count / rng.uniform(3, 9)) ** 2))
        radius *= 1 - narrowing
    return np.maximum(radius, 0.35).astype(np.float32)


def _tree(rng: np.random.Generator, root: Array, heading: float, size: Array) -> list[_Branch]:
    """One to three main branches from the root, with side branches of side branches; the finest are drawn but not labelled."""
    branches: list[_Branch] = []
    trunk = rng.uniform(2.2, 7.0)
    reach = float(min(size))
    mains = int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))
    faint = rng.uniform(0.3, 0.9)
    tortuous = rng.uniform(0.0, 1.0)
    spread = np.linspace(-0.5, 0.5, mains) * rng.uniform(0.7, 2.0) if mains > 1 else np.zeros(1)

    def grow(start: Array, angle: float, radius: float, length: float, level: int, began: int) -> None:
        labelled = radius >= 1.15
        bend = rng.normal(0, 0.8)
        if level == 0 and mains == 1:
            bend = rng.choice([-1, 1]) * rng.uniform(0.5, 3.6)
        points = _path(rng, start, angle, length, bend, tortuous * rng.uniform(0, 1.3))
        radii = _radius(rng, len(points), radius, max(radius * rng.uniform(0.3, 0.85), 1.25 if labelled else 0.35))
        filling = np.linspace(1, rng.uniform(0.55, 1.05), len(points), dtype=np.float32) * (1.0 if labelled else faint)
        if branches:  # a branch begins inside another: no dark spot where they meet
            filling *= np.clip(np.arange(len(points)) / (2.5 * radius + 1), 0, 1)
        branches.append(_Branch(points, radii, filling.astype(np.float32), labelled, began))
        if level >= 3:
            return
        for _ in range(rng.poisson(max(length / reach, 0.2) * (3.2, 2.6, 1.6)[level])):
            at = int(rng.uniform(0.12, 0.97) * (len(points) - 2))
            parent = np.arctan2(*(points[at + 1] - points[at])[::-1])
            child = min(radii[at] * rng.uniform(0.25, 0.8), radius * 0.85)
            grow(
                points[at],
                float(parent + rng.choice([-1, 1]) * rng.uniform(0.4, 1.4)),
                float(child),
                float(length * rng.uniform(0.2, 0.7)),
                level + 1,
                began + at,
            )

    for turn in spread:
        angle = heading + float(turn) + float(rng.normal(0, 0.15))
        grow(root, angle, trunk * float(rng.uniform(0.6, 1)), reach * float(rng.uniform(0.7, 1.5)), 0, 0)
    return branches


def _catheter(rng: np.random.Generator, root: Array, heading: float, size: Array) -> _Branch:
    """A smooth tube of constant width whose tip lies in the root, traced backwards until it has left the frame."""
    length = float(np.hypot(*size)) * 1.1
    back = heading + np.pi + rng.normal(0, 0.5)
    hook = rng.choice([-1, 1]) * rng.uniform(0.2, 2.6)
    count = int(length)
    along = np.arange(count) / count
    angle = back + hook * (1 - np.exp(-along * rng.uniform(4, 12))) + rng.normal(0, 0.4) * along
    points = root + np.cumsum(np.stack([np.cos(angle), np.sin(angle)], axis=1), axis=0)
    inside = ((points > -12) & (points < size + 12)).all(axis=1)
    points = points[: max(int(np.argmin(inside)) if not inside.all() else count, 6)]
    ones = np.ones(len(points), dtype=np.float32)
    return _Branch(points.astype(np.float32), ones * np.float32(rng.uniform(1.5, 3.6)), ones, True)


def _scaled(branch: _Branch, scale: float) -> _Branch:
    """The branch in pixels, with a point every half pixel at most."""
    dense = np.linspace(0, len(branch.points) - 1, int(len(branch.points) * max(scale, 1.0) * 1.6) + 2)
    at = np.arange(len(branch.points))
    points = np.stack([np.interp(dense, at, branch.points[:, i]) for i in range(2)], axis=1) * scale
    radius, filling = np.interp(dense, at, branch.radius) * scale, np.interp(dense, at, branch.filling)
    return _Branch(points.astype(np.float32), radius.astype(np.float32), filling.astype(np.float32), branch.labelled)


def _outlines(branch: _Branch, height: int, width: int, collimator: _Circle | None) -> list[Polygon]:
    """The branch as polygons, one for each short piece in view; neighbours share an edge, so their union has no gaps."""
    tangent = np.gradient(ndimage.gaussian_filter1d(branch.points, 1.5, axis=0, mode="nearest"), axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-6
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1) * branch.radius[:, None]
    step = max(int(branch.radius.mean() / 2), 2)
    keep = np.unique(np.append(np.arange(0, len(branch.points), step), len(branch.points) - 1))
    left, right = (branch.points + normal)[keep], (branch.points - normal)[keep]
    limit = np.array([width, height])
    outlines = []
    for first in range(0, len(keep) - 1, 8):
        part = slice(first, first + 9)
        ring = np.clip(np.concatenate([left[part], right[part][::-1]]), 0, limit)
        seen = collimator is None or np.hypot(*(ring.mean(axis=0) - collimator.centre)) < collimator.radius
        if seen and np.ptp(ring, axis=0).min() >= 1:  # wholly outside the frame otherwise
            outlines.append([round(float(v), 1) for v in ring.ravel()])
    return outlines


# Time, in frames: how things move, and where the contrast is.


@dataclasses.dataclass(frozen=True)
class _Motion:
    """The heart beats, the patient breathes, and the table moves. Lengths are in units.

    A beat draws the heart together around `centre` and shifts it by `shift`, and bends it by two waves (a row of `waves` has the
    amplitude x and y, the wave's vector x and y in radians per unit, and its phase).
    """

    period: float
    phase: float
    centre: Array
    squeeze: float
    shift: Array
    waves: Array
    breath: float
    pan: Array
    frames: int

    @classmethod
    def draw(cls, rng: np.random.Generator, size: Array, frames: int) -> _Motion:
        angle = rng.uniform(0, 2 * np.pi, 2)
        number = 2 * np.pi / rng.uniform(120, 300, 2)
        amplitude, direction = rng.uniform(1, 4, 2), rng.uniform(0, 2 * np.pi, 2)
        waves = np.stack(
            [amplitude * np.cos(direction), amplitude * np.sin(direction), number * np.cos(angle), number * np.sin(angle), angle[::-1]],
            axis=1,
        )
        return cls(
            period=float(rng.uniform(12, 18)),
            phase=float(rng.uniform(0, 1)),
            centre=(rng.uniform(0.35, 0.65, 2) * size).astype(np.float32),
            squeeze=float(rng.uniform(0.02, 0.08)),
            shift=rng.normal(0, 3, 2).astype(np.float32),
            waves=waves.astype(np.float32),
            breath=float(rng.uniform(0, 4)),
            pan=(rng.normal(0, 8, 2) * (rng.random() < 0.4)).astype(np.float32),
            frames=frames,
        )

    def _beat(self, points: Array, time: int) -> Array:
        """The displacement [..., 2] of `points` [..., 2] by the heartbeat; a wave lags behind."""
        turns = time / self.period + self.phase
        squeeze, bend = ((0.5 - 0.5 * np.cos(2 * np.pi * (turns - lag))) ** 1.5 for lag in (0, 0.15))
        moved = squeeze * (self.squeeze * (self.centre - points) + self.shift)
        for wave in self.waves:
            moved = moved + bend * wave[:2] * np.sin(points @ wave[2:4] + wave[4])[..., None]
        return np.asarray(moved, dtype=np.float32)

    def _breath(self, time: int) -> Array:
        return np.array([0, self.breath * np.sin(2 * np.pi * (time / 55 + self.phase))], dtype=np.float32)

    def _table(self, time: int) -> Array:
        return np.asarray(self.pan * (0.5 - 0.5 * np.cos(np.pi * time / max(self.frames - 1, 1))), dtype=np.float32)

    def of_heart(self, points: Array, time: int) -> Array:
        """Where `points` [points, 2] of the vessels are at a time."""
        return points + self._beat(points, time) + self._breath(time) + self._table(time)

    def of_catheter(self, points: Array, time: int) -> Array:
        """The tip moves with the vessels, the rest less and less."""
        weight = np.exp(-np.arange(len(points), dtype=np.float32) / 60)[:, None]
        return points + weight * (self._beat(points, time) + self._breath(time)) + self._table(time)

    def of_background(self, background: Array, scale: float, time: int) -> Array:
        """It moves with the table, and a little with the heart in front of it."""
        height, width = background.shape
        y, x = np.mgrid[:height, :width].astype(np.float32)
        points = np.stack([x, y], axis=-1) / scale
        moved = (points - self._table(time) - 0.3 * (self._beat(points, time) + self._breath(time))) * scale
        return np.asarray(ndimage.map_coordinates(background, [moved[..., 1], moved[..., 0]], order=1, mode="nearest"), dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class _Flow:
    """The front of the contrast leaves the root at `start` and moves by `speed` units a frame; from `end` on it thins out by `washout`."""

    start: float
    speed: float
    end: float
    washout: float

    @classmethod
    def draw(cls, rng: np.random.Generator, reach: int, frames: int) -> _Flow:
        start, filling = rng.uniform(0.1, 0.22) * frames, rng.uniform(0.25, 0.4) * frames
        return cls(
            float(start), float(reach / filling), float(start + filling + rng.uniform(0.1, 0.3) * frames), float(rng.uniform(0.1, 0.5))
        )

    def _front(self, branch: _Branch, time: int) -> Array:
        """From 1 where the contrast has come through to 0 where it has not been [points]."""
        along = branch.began + np.arange(len(branch.points))
        return np.clip((self.speed * (time - self.start) - along) / 12 + 0.5, 0, 1).astype(np.float32)

    def fill(self, branch: _Branch, time: int) -> _Branch:
        """The branch as full of contrast as it is at a time."""
        along = branch.began + np.arange(len(branch.points))
        thinned = np.clip((self.speed * (time - self.end) - along) / (8 * self.speed), 0, 1) * self.washout
        return dataclasses.replace(branch, filling=branch.filling * self._front(branch, time) * (1 - thinned).astype(np.float32))

    def reached(self, branch: _Branch, time: int) -> _Branch:
        """The part of the branch that the contrast has reached."""
        count = int((self._front(branch, time) > 0.5).sum())
        return dataclasses.replace(branch, points=branch.points[:count], radius=branch.radius[:count], filling=branch.filling[:count])


# Optics: what the detector sees.


def _stamp(branch: _Branch, height: int, width: int) -> Array:
    """The thickness of a filled tube along the beam, in pixels [height, width]: 2 sqrt(r^2 - d^2), times its filling."""
    reach = int(np.ceil(branch.radius.max())) + 1
    depth = np.zeros((height + 2 * reach, width + 2 * reach), dtype=np.float32)
    inside = ((branch.points > -reach + 1) & (branch.points < np.array([width, height]) + reach - 2)).all(axis=1)
    points, radius, filling = branch.points[inside] + reach, branch.radius[inside], branch.filling[inside]
    offsets = np.arange(-reach, reach + 1)
    centre = np.floor(points).astype(int)
    columns, rows = centre[:, 0, None] + offsets, centre[:, 1, None] + offsets
    dx, dy = columns + 0.5 - points[:, :1], rows + 0.5 - points[:, 1:]
    square = radius[:, None, None] ** 2 - dy[:, :, None] ** 2 - dx[:, None, :] ** 2
    value = 2 * np.sqrt(np.maximum(square, 0)) * filling[:, None, None]
    seen = ((rows >= 0) & (rows < depth.shape[0]))[:, :, None] & ((columns >= 0) & (columns < depth.shape[1]))[:, None, :]
    hit = (value > 0) & seen
    index = rows[:, :, None] * depth.shape[1] + columns[:, None, :]
    np.maximum.at(depth.reshape(-1), index[hit], value[hit])
    return depth[reach:-reach, reach:-reach]


def _projection(rng: np.random.Generator, branches: list[_Branch], height: int, width: int) -> Array:
    """All branches summed, as where vessels cross, scaled so that the widest measures about 1; fine ones keep more than their share."""
    power = rng.uniform(0.4, 0.9)
    widest = max(float(b.radius.max()) for b in branches) * 2
    total = np.zeros((height, width), dtype=np.float32)
    for branch in branches:
        total += (_stamp(branch, height, width) / widest) ** power
    return total


def _catheter_shadow(rng: np.random.Generator, catheter: _Branch, height: int, width: int, contrast: float) -> Array:
    """The catheter's transmission [height, width]: filled, or hollow with darker walls."""
    outer = _stamp(catheter, height, width) / (2 * catheter.radius[0])
    if rng.random() < 0.5:
        inner = dataclasses.replace(catheter, radius=catheter.radius * np.float32(0.6))
        outer = outer - rng.uniform(0.3, 0.6) * _stamp(inner, height, width) / (2 * catheter.radius[0])
    return np.asarray(np.exp(-outer * rng.uniform(0.5, 1.2) * contrast), dtype=np.float32)


def _field(rng: np.random.Generator, height: int, width: int, sigma: float) -> Array:
    """Gaussian random field of unit deviation and a correlation length of `sigma` pixels, made on a coarse grid."""
    step = max(int(sigma / 3), 1)
    shape = (height // step + 8, width // step + 8)
    coarse = ndimage.gaussian_filter(rng.normal(0, 1, shape).astype(np.float32), (sigma / step, sigma / step * rng.uniform(0.7, 1.4)))
    fine = ndimage.zoom(coarse, step, order=1)[:height, :width] if step > 1 else coarse[:height, :width]
    return np.asarray((fine - fine.mean()) / (fine.std() + 1e-6), dtype=np.float32)


def _edge(rng: np.random.Generator, height: int, width: int, scale: float) -> Array:
    """A soft step from 0 to 1 across a curved line through the frame: the rim of the heart, the diaphragm, a lung."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, curve = rng.uniform(0, 2 * np.pi), rng.normal(0, 1.2) / min(height, width)
    u = (x - rng.uniform(0.1, 0.9) * width) * np.cos(angle) + (y - rng.uniform(0.1, 0.9) * height) * np.sin(angle)
    v = (y - height / 2) * np.cos(angle) - (x - width / 2) * np.sin(angle)
    distance = u + curve * v**2 + 3 * scale * _field(rng, height, width, 25 * scale)
    return np.asarray(1 / (1 + np.exp(-np.clip(distance / (scale * rng.choice([0.8, 3, 12, 30])), -30, 30))), dtype=np.float32)


def _lines(rng: np.random.Generator, height: int, width: int, scale: float, count: int, radius: tuple[float, float]) -> Array:
    """`count` smooth lines across the frame that are no vessels: wires, rib edges, subtraction ghosts."""
    total = np.zeros((height, width), dtype=np.float32)
    size = np.array([width, height], dtype=np.float32) / scale
    for _ in range(count):
        start = rng.uniform(0, 1, 2).astype(np.float32) * size
        points = _path(rng, start, rng.uniform(0, 6.3), float(max(size)) * rng.uniform(0.3, 1.3), rng.normal(0, 0.8), 0.0)
        ones = np.ones(len(points), dtype=np.float32)
        line = _scaled(_Branch(points, ones * np.float32(rng.uniform(*radius)), ones, False), scale)
        total = np.maximum(total, _stamp(line, height, width) / (2 * line.radius[0]) * np.float32(rng.uniform(0.3, 1)))
    return total


def _background(rng: np.random.Generator, height: int, width: int, scale: float, subtracted: bool) -> Array:
    """What the beam meets besides contrast, as positive brightness around 1 [height, width]."""
    log = np.zeros((height, width), dtype=np.float32)
    strength = rng.uniform(0.0, 0.2) if subtracted else rng.uniform(0.3, 1.3)
    for sigma in (70.0, 28.0, 9.0):
        log += strength * rng.uniform(0.02, 0.16) * (sigma / 70) ** 0.8 * _field(rng, height, width, sigma * scale)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    log += strength * rng.normal(0, 0.3) * ((x / width - 0.5) * np.cos(angle) + (y / height - 0.5) * np.sin(angle))
    for _ in range(rng.poisson(0.3 if subtracted else 2.0)):
        log += strength * rng.normal(0, 0.35) * _edge(rng, height, width, scale)
    log += 0.04 * rng.random() ** 2 * _field(rng, height, width, rng.uniform(1.2, 5) * scale)
    if rng.random() < 0.4:  # ribs and vertebrae: broad bands
        log -= rng.normal(0, 0.1) * strength * _lines(rng, height, width, scale, int(rng.integers(1, 5)), (8, 26))
    if rng.random() < 0.4:  # fine lines, dark as wires or bright as the edges that subtraction leaves
        sign = rng.choice([-1, 1]) if subtracted else -1
        log += sign * rng.uniform(0.03, 0.2) * _lines(rng, height, width, scale, int(rng.integers(1, 4)), (0.6, 2.2))
    return np.exp(log)


def _collimator(rng: np.random.Generator, height: int, width: int) -> _Circle:
    """A round opening, off centre, that leaves one or two corners dark."""
    x, y = rng.uniform(0.3, 0.7, 2) * (width, height)
    return _Circle((float(x), float(y)), float(min(height, width) * rng.uniform(0.6, 0.9)))


def _detector(
    rng: np.random.Generator,
    noise: np.random.Generator,
    transmitted: Array,
    scale: float,
    subtracted: bool,
    collimator: _Circle | None,
) -> NDArray[np.uint8]:
    """Blur, tone curve, quantum noise and the collimator's edge: brightness to 8-bit gray values. `rng` draws how it looks."""
    height, width = transmitted.shape
    image = ndimage.gaussian_filter(transmitted, rng.uniform(0.3, 1.1) * max(scale, 0.7))
    image = image / np.median(image)
    level = rng.uniform(85, 205)
    image = level * np.sign(image) * np.abs(image) ** rng.uniform(0.6, 1.4)
    grain = noise.normal(0, 1, image.shape).astype(np.float32)
    grain = ndimage.gaussian_filter(grain, rng.uniform(0.0, 0.9) * max(scale, 0.7))
    grain /= grain.std()
    amount = rng.uniform(0.5, 5.0)
    image = image + amount * grain * np.sqrt(np.clip(image, 20, 255) / 128)
    if rng.random() < 0.2:  # edge enhancement, as many systems apply
        image = image + rng.uniform(0.3, 1.5) * (image - ndimage.gaussian_filter(image, 1.5 * scale))
    high = rng.uniform(225, 255)
    image = np.minimum(image, high - 6 * (1 - np.exp(-np.maximum(image - high, 0) / 20)))
    if collimator is not None:
        y, x = np.mgrid[:height, :width].astype(np.float32)
        outside = np.hypot(x - collimator.centre[0], y - collimator.centre[1]) - collimator.radius
        dark = rng.uniform(5, 30) + noise.normal(0, 1, image.shape)
        blend = np.clip(outside / (scale * rng.uniform(0.7, 2)) + 0.5, 0, 1)
        image = image * (1 - blend) + dark * blend
    return np.asarray(np.clip(np.rint(image), 0, 255), dtype=np.uint8)


def _captioned(gray: NDArray[np.uint8], lines: list[str], tone: float) -> NDArray[np.uint8]:
    """The frame with text in its upper left corner, as burnt in by the device."""
    image = Image.fromarray(gray)
    size = max(min(image.size) // 32, 8)
    font = ImageFont.load_default(size)
    for row, line in enumerate(lines):
        ImageDraw.Draw(image).text((size // 2, size // 2 + row * size * 1.2), line, fill=int(tone), font=font)
    return np.asarray(image)
