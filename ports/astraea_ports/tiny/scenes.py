"""Captioned clips of coloured shapes that move over a background: what the small Wan learns from.

One object (or two, the first named in the upper half), with a shadow and two tones so that a spin
shows, over a plain or textured ground. Everything is a pure function of a PRNG key: what is seen,
where, and the caption's words. Clip `i` of a seed is the same on every device and in every batch.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from astraea_jax import checks

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
MOTIONS = ("left", "right", "up", "down", "spinning", "growing", "shrinking", "bouncing")
GROUNDS = ("blue", "green", "pink", "brown", "grey", "teal")
TEXTURES = ("plain", "striped", "checkered", "dotted")
SIZES = ("small", "middling", "big")
SPEEDS = ("slow", "middling", "fast")

COLOUR_RGB = (
    *((0.90, 0.16, 0.16), (0.98, 0.55, 0.10), (0.98, 0.88, 0.18), (0.18, 0.70, 0.28)),
    *((0.16, 0.36, 0.92), (0.56, 0.22, 0.74), (0.97, 0.97, 0.97), (0.07, 0.07, 0.09)),
)
GROUND_RGB = (
    *((0.40, 0.58, 0.84), (0.52, 0.76, 0.48), (0.95, 0.70, 0.78)),
    *((0.60, 0.45, 0.32), (0.62, 0.62, 0.64), (0.25, 0.58, 0.58)),
)
SIZE_ODDS, SPEED_ODDS = (0.15, 0.7, 0.15), (0.1, 0.8, 0.1)

FRAMES, SIDE = 33, 128
"""Of the clips that the small model is trained on."""

TWO = 0.3
"""Share of clips with two objects in the distribution that the shipped captions come from."""

BLACK = COLOURS.index("black")
SPINNING = MOTIONS.index("spinning")


class Scene(NamedTuple):
    """What a clip shows: indices into the tuples above; batched by a leading axis.

    Attributes:
      count: objects, 1 or 2; with one the second entry of each field below is not shown.
      shape: of SHAPES.
      colour: of COLOURS.
      motion: of MOTIONS.
      size: of SIZES.
      speed: of SPEEDS.
      ground: colour of the background, of GROUNDS.
      texture: of TEXTURES.
    """

    count: Int[Array, "*B"]
    shape: Int[Array, "*B 2"]
    colour: Int[Array, "*B 2"]
    motion: Int[Array, "*B 2"]
    size: Int[Array, "*B 2"]
    speed: Int[Array, "*B 2"]
    ground: Int[Array, "*B"]
    texture: Int[Array, "*B"]


class Clip(NamedTuple):
    """A clip, where its objects are, and what it shows.

    Attributes:
      video: in [0, 1].
      cover: 0..1, how much of a pixel is covered by objects.
      scene: what is seen.
    """

    video: Float[Array, "*B F side side 3"]
    cover: Float[Array, "*B F side side"]
    scene: Scene


def clip_keys(seed: int, first: int, count: int) -> Key[Array, "B"]:
    """Keys of `count` clips of a seed, from number `first` on.

    Raises:
      Refusal: a number out of range.
    """
    checks.whole("seed", seed, 0, 2**31 - 1)
    checks.whole("count", count, 1, 2**20, unit="clips")
    checks.whole("first", first, 0, 2**31 - 1 - count)
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return fold(jax.random.key(seed), first + jnp.arange(count, dtype=jnp.int32))


@functools.partial(jax.jit, static_argnames=("frames", "side"))
def make_clips(
    keys: Key[Array, "B"],
    *,
    two: float | Float[Array, ""] = TWO,
    colours: Float[Array, "8 3"] | None = None,
    frames: int = FRAMES,
    side: int = SIDE,
) -> Clip:
    """Renders a clip for each key.

    Args:
      keys: of `clip_keys`.
      two: share of the clips with two objects, 0..1.
      colours: in the order of COLOURS; None is COLOUR_RGB.
      frames: of each clip; time runs 0..1 over them.
      side: pixels of height and width.
    """
    colours = jnp.array(COLOUR_RGB, jnp.float32) if colours is None else colours
    shown = make_scenes(keys, two=two)
    video, cover = render_clips(keys, shown, colours, frames=frames, side=side)
    return Clip(video, cover, shown)


@functools.partial(jax.jit, static_argnames=("frames", "side"))
def render_clips(
    keys: Key[Array, "B"],
    shown: Scene,
    colours: Float[Array, "8 3"],
    *,
    frames: int = FRAMES,
    side: int = SIDE,
) -> tuple[Float[Array, "B F side side 3"], Float[Array, "B F side side"]]:
    """Videos and covers of scenes; see `make_clips`."""

    def one(key: PRNGKeyArray, scene: Scene):
        return render(jax.random.fold_in(key, 1), scene, colours, frames=frames, side=side)

    return jax.vmap(one)(keys, shown)


@jax.jit
def make_scenes(
    keys: Key[Array, "B"],
    *,
    two: float | Float[Array, ""] = TWO,
    spin: float | Float[Array, ""] = 0.0,
) -> Scene:
    """What clips show, without rendering them; with no `spin` those of `make_clips`.

    Args:
      keys: of `clip_keys`.
      two: share of the clips with two objects, 0..1.
      spin: share of the objects that spin whatever they would do otherwise, 0..1.
    """
    return jax.vmap(lambda key: sample_scene(jax.random.fold_in(key, 0), two, spin))(keys)


def sample_scene(
    key: PRNGKeyArray,
    two: float | Float[Array, ""] = TWO,
    spin: float | Float[Array, ""] = 0.0,
) -> Scene:
    """Draws what one clip shows: two objects differ in shape and colour, none hides in its ground.

    An object is never of its ground's colour name (a blue one on blue, a green one on green).
    """
    made_to_spin = jax.random.uniform(jax.random.fold_in(key, 2), (2,), jnp.float32) < spin
    keys = iter(jax.random.split(key, 9))

    def pick(allowed: Array, shape: tuple[int, ...] = ()) -> Array:
        return jax.random.categorical(next(keys), jnp.log(allowed), shape=shape)

    ground = pick(jnp.ones(len(GROUNDS), jnp.float32))
    clashes = jnp.array([[colour == name for colour in COLOURS] for name in GROUNDS])
    free = ~clashes[ground]
    colour = pick(free.astype(jnp.float32))
    shape = pick(jnp.ones(len(SHAPES), jnp.float32))
    other = free & (jnp.arange(len(COLOURS), dtype=jnp.int32) != colour)
    second_colour = pick(other.astype(jnp.float32))
    second_shape = pick((jnp.arange(len(SHAPES), dtype=jnp.int32) != shape).astype(jnp.float32))
    return Scene(
        count=jnp.where(jax.random.uniform(next(keys), dtype=jnp.float32) < two, 2, 1),
        shape=jnp.stack([shape, second_shape]),
        colour=jnp.stack([colour, second_colour]),
        motion=jnp.where(made_to_spin, SPINNING, pick(jnp.ones(len(MOTIONS), jnp.float32), (2,))),
        size=pick(jnp.array(SIZE_ODDS, jnp.float32), (2,)),
        speed=pick(jnp.array(SPEED_ODDS, jnp.float32), (2,)),
        ground=ground,
        texture=jax.random.randint(jax.random.fold_in(key, 1), (), 0, len(TEXTURES), jnp.int32),
    )


def render(
    key: PRNGKeyArray,
    scene: Scene,
    colours: Float[Array, "8 3"],
    *,
    frames: int = FRAMES,
    side: int = SIDE,
) -> tuple[Float[Array, "F side side 3"], Float[Array, "F side side"]]:
    """Draws one scene: its video in [0, 1], and how much of each pixel objects cover.

    Args:
      key: of places, phases, exact sizes and speeds.
      scene: of one clip.
      colours: of objects, in the order of COLOURS.
      frames: of the clip.
      side: pixels of height and width.
    """
    keys = jax.random.split(key, 3)
    time = jnp.linspace(0.0, 1.0, frames, dtype=jnp.float32)
    centres = (jnp.arange(side, dtype=jnp.float32) + 0.5) / side * 2 - 1
    y, x = centres[:, None], centres[None, :]
    image = jnp.broadcast_to(_ground(keys[0], scene, x, y), (frames, side, side, 3))
    cover = jnp.zeros((frames, side, side), jnp.float32)
    for index in range(2):
        shown = (index < scene.count).astype(jnp.float32)
        path = _path(keys[1 + index], scene, index, time)
        local = _local_coordinates(path, x, y, 0.05, 0.08)
        distance = _distance(scene.shape[index], *local) * path.radius[:, None, None]
        image = image * (1 - 0.38 * shown * jax.nn.sigmoid(-30.0 * distance))[..., None]
        across, down = _local_coordinates(path, x, y, 0.0, 0.0)
        distance = _distance(scene.shape[index], across, down) * path.radius[:, None, None]
        alpha = shown * jax.nn.sigmoid(-1.1 * side * distance)
        tone = jax.nn.sigmoid(6.0 * across)[..., None]
        rgb = colours[scene.colour[index]]
        # Black has no darker tone: its other half is lighter.
        rgb = rgb * (1 - 0.38 * tone) + 0.22 * tone * (scene.colour[index] == BLACK)
        image = image * (1 - alpha[..., None]) + rgb * alpha[..., None]
        cover = cover + alpha
    return jnp.clip(image, 0.0, 1.0), jnp.minimum(cover, 1.0)


def _ground(key, scene: Scene, x: Array, y: Array) -> Float[Array, "side side 3"]:
    """The background: a colour, its texture, a little lighter above than below."""
    draws = jax.random.uniform(key, (7,), jnp.float32)
    phase, other_phase, rate = draws[0], draws[1], 2.2 + 0.8 * draws[2]
    angle = jnp.floor(4 * draws[3]) * (math.pi / 4)
    along = x * jnp.cos(angle) + y * jnp.sin(angle)
    waves = (jnp.sin(math.pi * rate * (a + p)) for a, p in ((along, phase), (x, phase)))
    stripes, columns = waves
    rows = jnp.sin(math.pi * rate * (y + other_phase))
    turns = 1.8 * math.pi * rate
    dots = 0.5 * (jnp.cos(turns * (x + phase)) + jnp.cos(turns * (y + other_phase))) - 0.35
    patterns = (9.0 * stripes, 18.0 * columns * rows, 12.0 * dots)
    textures = [jnp.zeros(jnp.broadcast_shapes(x.shape, y.shape), jnp.float32)]
    textures += [jax.nn.sigmoid(pattern) for pattern in patterns]
    pattern = jnp.stack(textures)[scene.texture]
    shade = (1 - 0.30 * pattern) * (1 - 0.06 * y)
    rgb = jnp.array(GROUND_RGB, jnp.float32)[scene.ground]
    return rgb * shade[..., None] + 0.03 * (draws[4:7] - 0.5)


class _Path(NamedTuple):
    """Where an object is at each frame: centre, angle (radians), half size."""

    x: Float[Array, " F"]
    y: Float[Array, " F"]
    angle: Float[Array, " F"]
    radius: Float[Array, " F"]


def _path(key, scene: Scene, index: int, time: Float[Array, " F"]) -> _Path:
    """How object `index` moves; -1..1 is the picture's width and height, y pointing down."""
    motion, two = scene.motion[index], scene.count > 1
    size, speed = scene.size[index] - 1.0, scene.speed[index] - 1.0
    draws = jax.random.uniform(key, (9,), jnp.float32)
    base = jnp.where(two, 0.27, 0.36) * (1 + 0.35 * size) * (1 + 0.08 * (draws[0] - 0.5))
    lane = jnp.where(two, -0.48 if index == 0 else 0.48, 0.0)
    home_x = (draws[1] - 0.5) * jnp.where(two, 0.9, 0.7)
    home_y = lane + jnp.where(two, 0.1, 0.7) * (draws[2] - 0.5)
    half_way = (0.62 + 0.30 * speed) * (1 + 0.15 * (draws[3] - 0.5))
    half_climb = jnp.where(two, 0.5 * half_way, half_way)
    aside = 0.2 * (draws[4] - 0.5)
    line = 2 * time - 1
    hops = jnp.abs(jnp.sin(math.pi * ((2 + speed) * time + 0.5 * draws[5])))
    hop = lane + jnp.where(two, 0.38, 0.8) * (0.5 - hops)
    turn = jnp.where(draws[6] < 0.5, -1.0, 1.0) * 2 * math.pi * (1 + 0.5 * speed)
    # In the order of MOTIONS.
    still_x, still_y = home_x + 0 * time, home_y + 0 * time
    xs = (aside - line * half_way, aside + line * half_way, *[still_x] * 6)
    climb = 0.5 * aside + lane
    ys = (still_y, still_y, climb - line * half_climb, climb + line * half_climb)
    ys += (still_y, still_y, still_y, hop)
    tilt = 0.4 * (draws[8] - 0.5) + 0 * time
    angles = (*[tilt] * 4, 6.28 * draws[7] + turn * time, *[tilt] * 3)
    still = 1 + 0 * time
    scales = (*[still] * 5, 0.45 + 0.95 * time, 1.4 - 0.95 * time, still)
    return _Path(
        *(jnp.stack(choices)[motion] for choices in (xs, ys, angles)),
        radius=base * jnp.stack(scales)[motion],
    )


def _local_coordinates(path: _Path, x: Array, y: Array, right: float, below: float):
    """Pixels in an object's own axes, in half sizes, the object moved by (right, below)."""
    across = x - path.x[:, None, None] - right
    down = y - path.y[:, None, None] - below
    cos, sin = jnp.cos(path.angle)[:, None, None], jnp.sin(path.angle)[:, None, None]
    radius = path.radius[:, None, None]
    return (across * cos + down * sin) / radius, (down * cos - across * sin) / radius


def _distance(shape: Int[Array, ""], x: Array, y: Array) -> Array:
    """Signed distance (about) to the outline of a shape of unit half size; negative inside."""
    radius = jnp.sqrt(x * x + y * y + 1e-9)
    square = jnp.maximum(jnp.abs(x), jnp.abs(y)) - 0.82
    slope = math.sqrt(3.0) / 2
    edges = jnp.maximum(slope * x - 0.5 * y, -slope * x - 0.5 * y)
    triangle = jnp.maximum(edges, y) - 0.54
    bars = [
        jnp.maximum(jnp.abs(a) - 0.95, jnp.abs(b) - 0.32) for a, b in ((x, y), (y, x))
    ]  # fmt: skip
    choices = (radius - 0.95, square, triangle, _star(x, y, radius))
    choices += (jnp.abs(radius - 0.70) - 0.27, jnp.minimum(*bars))
    return jax.lax.select_n(jnp.broadcast_to(shape, x.shape), *choices)


def _star(x: Array, y: Array, radius: Array) -> Array:
    """A star of five tips, one of them up: each point is folded into one tip's half."""
    sector = 2 * math.pi / 5
    angle = jnp.remainder(jnp.arctan2(x, -y) + sector / 2, sector) - sector / 2
    along, beside = radius * jnp.cos(angle), jnp.abs(radius * jnp.sin(angle))
    tip = 1.05
    edge = (0.45 * math.cos(sector / 2) - tip, 0.45 * math.sin(sector / 2))
    return ((along - tip) * edge[1] - beside * edge[0]) / math.hypot(*edge)
