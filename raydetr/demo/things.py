"""Things that are not balloons: ``detr_tiny`` is pre-trained on them, and they surround the generated balloons.

Each function draws one thing with random proportions and colors. Its argument ``rng`` is the random generator, and it returns the parts of
the thing from back to front, in the coordinates that scenes.py describes: about one unit from the center to the edge, with y pointing down.
The name of the function is the name of the thing; ``KINDS`` maps these names, with spaces, to the functions.
"""

import numpy as np

from raydetr.demo.scenes import Part, color_of, darker, ellipse, mixed, polygon, rectangle, smooth, stroke

WHITE, BLACK = (245.0, 245.0, 240.0), (25.0, 25.0, 30.0)


def house(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a house with a gabled roof, a door and two windows."""
    wall, roof = color_of(rng, (0.0, 0.5), (0.6, 1.0)), color_of(rng, (0.3, 0.8), (0.3, 0.7), (0.95, 1.1))
    wide, eaves = rng.uniform(0.6, 1.0), rng.uniform(-0.3, 0.1)
    peak = rng.uniform(-0.3, 0.3) * wide
    parts = [
        Part(rectangle(-wide, eaves, wide, 1), wall, "linear"),
        Part(polygon((-wide - 0.12, eaves), (peak, -1), (wide + 0.12, eaves)), roof, "linear"),
        Part(rectangle(-0.14, 0.45, 0.14, 1), darker(roof, 0.7)),
    ]
    for x in (-0.6 * wide, 0.6 * wide):
        parts.append(Part(rectangle(x - 0.15, eaves + 0.2, x + 0.15, eaves + 0.5), color_of(rng, (0.1, 0.5), (0.3, 0.9), (0.5, 0.6))))
    return parts


def tree(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a deciduous tree, a trunk and a round crown."""
    leaves, bark = color_of(rng, (0.4, 0.9), (0.25, 0.7), (0.15, 0.42)), color_of(rng, (0.3, 0.6), (0.2, 0.45), (0.05, 0.1))
    bumps = int(rng.integers(5, 10))
    crown = ellipse(0, -0.35, rng.uniform(0.5, 0.75), 0.65, corners=bumps) * rng.uniform(0.85, 1.15, (bumps, 1))
    return [Part(rectangle(-0.09, 0.1, 0.09, 1), bark, "linear"), Part(smooth(crown * 1.15), leaves, "round")]


def pine(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a pine of several tiers."""
    leaves = color_of(rng, (0.3, 0.8), (0.2, 0.55), (0.28, 0.45))
    wide, tiers = rng.uniform(0.4, 0.65), int(rng.integers(2, 5))
    parts = [Part(rectangle(-0.08, 0.6, 0.08, 1), color_of(rng, (0.3, 0.6), (0.2, 0.4), (0.05, 0.1)))]
    for tier in range(tiers):
        low, top = 0.75 - 1.2 * tier / tiers, 0.75 - 1.2 * tier / tiers - 1.5 / tiers - 0.2
        half = wide * (1 - 0.7 * tier / tiers)
        parts.append(Part(polygon((-half, low), (0, max(top, -1)), (half, low)), darker(leaves, 1 + 0.1 * tier), "linear"))
    return parts


def kite(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a diamond-shaped kite with a tail that is not part of its mask."""
    first, second = color_of(rng, (0.6, 1.0), (0.6, 1.0)), color_of(rng, (0.5, 1.0), (0.6, 1.0))
    wide, cross = rng.uniform(0.5, 0.8), rng.uniform(-0.45, -0.1)
    tail = np.linspace(0.9, 2.0, 14)
    tail = np.stack([0.12 * np.sin(6 * tail + rng.uniform(0, 6)), tail], axis=1)
    return [
        Part(stroke(tail, 0.05), second, solid=False),
        Part(polygon((0, -1), (wide, cross), (0, 1), (-wide, cross)), first, "linear"),
        Part(polygon((0, -1), (wide, cross), (0, cross)), second, "linear"),
        Part(polygon((0, 1), (-wide, cross), (0, cross)), second, "linear"),
    ]


def cloud(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a cloud of overlapping bumps."""
    gray = rng.uniform(215, 255)
    bumps = int(rng.integers(4, 7))
    xs = np.linspace(-0.7, 0.7, bumps)
    radii = rng.uniform(0.25, 0.4, bumps) * (1.3 - 0.6 * np.abs(xs))
    tint = (gray, gray, min(255.0, gray + 6))
    return [Part(ellipse(x, 0.1 - r * 0.5, r, r), tint, "linear") for x, r in zip(xs, radii, strict=True)] + [
        Part(ellipse(0, 0.12, 1.0, 0.2), darker(tint, 0.95), "linear")
    ]


def sun(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a sun with pointed rays."""
    glow = color_of(rng, (0.4, 0.9), (0.95, 1.0), (0.08, 0.16))
    rays = int(rng.integers(8, 15))
    spikes = ellipse(0, 0, 1, 1, corners=2 * rays) * np.where(np.arange(2 * rays) % 2, 0.68, 1.0)[:, None]
    return [Part(spikes, glow), Part(ellipse(0, 0, 0.6, 0.6), mixed(glow, WHITE, 0.35))]


def moon(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a crescent moon."""
    t = np.linspace(0.2, 0.8, 24) * 2 * np.pi
    depth = rng.uniform(0.2, 0.6)
    outer = np.stack([np.cos(t), np.sin(t)], axis=1)
    inner = np.stack([outer[:, 0] * depth + np.cos(t[0]) * (1 - depth), outer[:, 1]], axis=1)[::-1]
    return [Part(np.concatenate([outer, inner]) + (0.3, 0), color_of(rng, (0.1, 0.6), (0.8, 1.0), (0.1, 0.18)), "linear")]


def star(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a star with four to seven points."""
    arms, depth = int(rng.integers(4, 8)), rng.uniform(0.35, 0.6)
    spikes = ellipse(0, 0, 1, 1, corners=2 * arms) * np.where(np.arange(2 * arms) % 2, depth, 1.0)[:, None]
    return [Part(spikes, color_of(rng, (0.3, 1.0), (0.5, 1.0)), "linear")]


def ring(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a flat ring with a hole."""
    hole = rng.uniform(0.35, 0.7)
    outline = np.concatenate([ellipse(0, 0, 1, 1, 0, 0.9999, 40), ellipse(0, 0, hole, hole, 0, 0.9999, 40)[::-1]])
    return [Part(outline, color_of(rng, (0.3, 1.0), (0.4, 1.0)), "linear")]


def crate(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a wooden crate with a diagonal board."""
    wood = color_of(rng, (0.3, 0.7), (0.45, 0.85), (0.05, 0.12))
    tall, bar = rng.uniform(0.6, 1.0), 0.16
    return [
        Part(rectangle(-1, -tall, 1, tall), darker(wood, 0.75), "linear"),
        Part(polygon((-1, tall), (-0.75, tall), (1, -tall), (0.75, -tall)), wood),
        *(Part(rectangle(-1, y, 1, y + bar), wood, "linear") for y in (-tall, tall - bar)),
        *(Part(rectangle(x, -tall, x + bar, tall), wood, "linear") for x in (-1, 1 - bar)),
    ]


def cup(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a cup with a handle."""
    china = color_of(rng, (0.0, 0.8), (0.5, 1.0))
    low = rng.uniform(0.45, 0.8)
    handle = stroke(ellipse(0.75, -0.05, 0.32, 0.42, -0.25, 0.25, 16), 0.16)
    return [
        Part(handle, darker(china, 0.85)),
        Part(polygon((-0.85, -0.75), (0.85, -0.75), (low, 0.85), (-low, 0.85)), china, "linear"),
        Part(ellipse(0, -0.75, 0.85, 0.17), darker(china, 0.6)),
    ]


def leaf(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a leaf with its midrib."""
    green = color_of(rng, (0.4, 0.9), (0.35, 0.9), rng.choice([[0.2, 0.4], [0.0, 0.15]]))
    t = np.linspace(-1, 1, 20)
    half = rng.uniform(0.3, 0.6) * (1 - t**2) * (1 - 0.3 * t)
    outline = np.concatenate([np.stack([half, t], axis=1), np.stack([-half, t], axis=1)[::-1]])
    return [Part(outline, green, "linear"), Part(rectangle(-0.03, -0.85, 0.03, 1.2), darker(green, 0.65))]


def fish(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a fish seen from the side."""
    scale, tall = color_of(rng, (0.3, 1.0), (0.5, 1.0)), rng.uniform(0.35, 0.65)
    fin = darker(scale, rng.uniform(0.6, 0.9))
    return [
        Part(polygon((0.5, 0), (1.1, -tall * 0.8), (0.95, 0), (1.1, tall * 0.8)), fin, "linear"),
        Part(polygon((-0.2, -tall * 0.8), (0.35, -tall * 1.4), (0.3, -tall * 0.5)), fin, "linear"),
        Part(ellipse(-0.15, 0, 0.85, tall), scale, "round"),
        Part(ellipse(-0.65, -0.1 * tall, 0.12, 0.12, corners=12), WHITE),
        Part(ellipse(-0.67, -0.1 * tall, 0.06, 0.06, corners=8), BLACK),
    ]


def car(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a car seen from the side."""
    paint = color_of(rng, (0.0, 1.0), (0.3, 1.0))
    front, back = rng.uniform(-0.75, -0.45), rng.uniform(0.5, 0.9)
    parts = [
        Part(
            polygon((-1.2, 0.4), (-1.15, 0), (front, -0.1), (front + 0.25, -0.55), (back - 0.2, -0.55), (back, -0.1), (1.2, 0), (1.2, 0.4)),
            paint,
            "linear",
        ),
        Part(polygon((front + 0.12, -0.1), (front + 0.3, -0.45), (0.05, -0.45), (0.05, -0.1)), (150, 190, 210)),
        Part(polygon((0.15, -0.1), (0.15, -0.45), (back - 0.25, -0.45), (back - 0.12, -0.1)), (150, 190, 210)),
    ]
    for x in (-0.7, 0.7):
        parts += [Part(ellipse(x, 0.4, 0.24, 0.24, corners=20), BLACK), Part(ellipse(x, 0.4, 0.11, 0.11, corners=12), (170, 170, 170))]
    return parts


def boat(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a sailing boat."""
    hull, sail = color_of(rng, (0.2, 0.9), (0.3, 0.9)), color_of(rng, (0.0, 0.6), (0.8, 1.0))
    lean = rng.uniform(-0.15, 0.15)
    return [
        Part(stroke(polygon((0, 0.5), (lean / 2, -0.2), (lean, -1)), 0.07), (110, 80, 60)),
        Part(polygon((0.08, 0.4), (lean + 0.05, -0.95), (rng.uniform(0.5, 0.8), 0.4)), sail, "linear"),
        Part(polygon((-0.08, 0.4), (lean - 0.05, -0.8), (-0.55, 0.4)), darker(sail, 0.9), "linear"),
        Part(polygon((-1, 0.5), (1, 0.5), (0.7, 0.95), (-0.65, 0.95)), hull, "linear"),
    ]


def bird(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a flying bird with spread wings."""
    feather = color_of(rng, (0.0, 0.7), (0.15, 0.9))
    lift = rng.uniform(-0.9, -0.3)
    return [
        Part(smooth(polygon((0.15, -0.1), (0.5, lift), (1, lift - 0.1), (0.7, 0.05), (0.2, 0.25)), 24), darker(feather, 0.8), "linear"),
        Part(smooth(polygon((-0.15, -0.1), (-0.5, lift), (-1, lift - 0.1), (-0.7, 0.05), (-0.2, 0.25)), 24), feather, "linear"),
        Part(ellipse(0, 0.1, 0.22, 0.42, corners=20), feather, "round"),
        Part(polygon((-0.08, -0.3), (0.08, -0.3), (0, -0.52)), (235, 160, 50)),
    ]


def butterfly(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a butterfly with spotted wings."""
    wing, spot = color_of(rng, (0.5, 1.0), (0.5, 1.0)), color_of(rng, (0.3, 1.0), (0.2, 1.0))
    up, down = rng.uniform(0.55, 0.75), rng.uniform(0.4, 0.6)
    parts = []
    for side in (-1, 1):
        parts += [
            Part(smooth(polygon((0, 0), (0.4 * side, -0.3 - up), (1.1 * side, -0.9), (0.95 * side, -0.1)), 24), wing, "linear"),
            Part(smooth(polygon((0, 0), (0.9 * side, 0.05), (0.75 * side, 0.3 + down), (0.2 * side, 0.7)), 24), wing, "linear"),
            Part(ellipse(0.6 * side, -0.45, 0.15, 0.15, corners=14), spot),
        ]
    return [*parts, Part(ellipse(0, 0, 0.08, 0.6, corners=16), BLACK)]


def flower(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a flower, in half of the cases with a stem."""
    petals, color = int(rng.integers(5, 9)), color_of(rng, (0.3, 1.0), (0.7, 1.0), (0.75, 1.15))
    parts = [Part(stroke(polygon((0, 0), (0.08, 0.7), (0, 1.3)), 0.09), (70, 130, 60))] if rng.random() < 0.5 else []
    parts += [Part(ellipse(x, y, 0.4, 0.4, corners=18), color, "linear") for x, y in ellipse(0, 0, 0.6, 0.6, corners=petals)]
    return [*parts, Part(ellipse(0, 0, 0.32, 0.32, corners=20), color_of(rng, (0.6, 1.0), (0.6, 1.0), (0.08, 0.16)), "round")]


def mushroom(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a mushroom with a spotted cap."""
    cap, stem = color_of(rng, (0.4, 0.9), (0.4, 0.9), (0.95, 1.1)), color_of(rng, (0.0, 0.2), (0.8, 1.0), (0.08, 0.15))
    parts = [Part(smooth(polygon((-0.25, -0.2), (0.25, -0.2), (0.38, 1.05), (-0.38, 1.05)), 24), stem, "linear")]
    parts.append(
        Part(np.concatenate([ellipse(0, 0, 1, rng.uniform(0.7, 1.0), 0.5, 0.9999, 24), ellipse(0, 0, 1, 0.15, 0, 0.5, 12)]), cap, "linear")
    )
    parts += [Part(ellipse(x, y, 0.12, 0.1, corners=12), WHITE) for x, y in ((-0.5, -0.3), (0.05, -0.5), (0.45, -0.2))]
    return parts


def umbrella(rng: np.random.Generator) -> list[Part]:
    """Return the parts of an open umbrella with panels in two colors."""
    first, second = color_of(rng, (0.5, 1.0), (0.5, 1.0)), color_of(rng, (0.0, 1.0), (0.6, 1.0))
    panels = int(rng.integers(4, 7))
    parts = [Part(rectangle(-0.03, -0.9, 0.03, 0.9), BLACK), Part(stroke(ellipse(0.13, 0.88, 0.13, 0.15, 0.0, 0.5, 10), 0.06), BLACK)]
    for panel in range(panels):
        a, b = 0.5 + 0.5 * panel / panels, 0.5 + 0.5 * (panel + 1) / panels
        arc = ellipse(0, 0, 1, 0.85, a, b - 1e-4, 8)
        parts.append(Part(np.concatenate([arc, arc[-1:] * (1, 0), arc[:1] * (1, 0)]), second if panel % 2 else first, "linear"))
    return parts


def bottle(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a bottle with a label and a cap."""
    glass, neck = color_of(rng, (0.2, 0.9), (0.25, 0.8)), rng.uniform(0.12, 0.2)
    half, shoulder = rng.uniform(0.28, 0.45), rng.uniform(-0.45, -0.1)
    side = polygon((neck, -0.9), (neck, shoulder - 0.2), (half, shoulder + 0.1), (half, 1))
    return [
        Part(np.concatenate([side, (side * (-1, 1))[::-1]]), glass, "shiny"),
        Part(rectangle(-half, 0.15, half, 0.65), color_of(rng, (0.0, 0.6), (0.7, 1.0)), "linear"),
        Part(rectangle(-neck * 1.2, -1, neck * 1.2, -0.85), color_of(rng)),
    ]


def apple(rng: np.random.Generator) -> list[Part]:
    """Return the parts of an apple with a stem and a leaf."""
    skin = color_of(rng, (0.6, 1.0), (0.5, 0.95), (0.95, 1.3))
    outline = smooth(
        polygon(
            (0, -0.7),
            (0.6, -0.95),
            (1.05, -0.3),
            (0.7, 0.8),
            (0.25, 1.0),
            (0, 0.85),
            (-0.25, 1.0),
            (-0.7, 0.8),
            (-1.05, -0.3),
            (-0.6, -0.95),
        )
    )
    return [
        Part(outline, skin, "shiny"),
        Part(stroke(polygon((0, -0.6), (0.05, -0.85), (0.15, -1.1)), 0.1), (90, 60, 40)),
        Part(smooth(polygon((0.1, -0.85), (0.4, -1.25), (0.75, -1.15), (0.5, -0.9)), 16), (80, 150, 60)),
    ]


def pear(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a pear with a stem."""
    skin = color_of(rng, (0.4, 0.9), (0.6, 0.95), (0.12, 0.25))
    half = rng.uniform(0.55, 0.75)
    side = polygon((0.15, -0.85), (0.32, -0.5), (0.36, -0.15), (half, 0.3), (half, 0.75), (0.25, 1.05))
    outline = smooth(np.concatenate([side, (side * (-1, 1))[::-1]]))
    return [Part(stroke(polygon((0, -0.75), (0.04, -0.95), (0.12, -1.15)), 0.09), (90, 60, 40)), Part(outline, skin, "shiny")]


def lemon(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a lemon."""
    t = np.linspace(-1, 1, 24)
    half = rng.uniform(0.5, 0.65) * np.sqrt(np.clip(1 - np.abs(t) ** 2.2, 0, 1)) * 0.9 + 0.08
    outline = np.concatenate([np.stack([t, half], axis=1), np.stack([t, -half], axis=1)[::-1]])
    return [Part(outline, color_of(rng, (0.6, 0.95), (0.8, 1.0), (0.12, 0.3)), "round")]


def ball(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a ball patterned as a beach ball, a soccer ball or a basketball."""
    first, second = color_of(rng, (0.0, 1.0), (0.5, 1.0)), color_of(rng, (0.4, 1.0), (0.3, 1.0))
    parts = [Part(ellipse(0, 0, 1, 1), first, "round")]
    pattern = rng.integers(3)
    if pattern == 0:  # a beach ball's panels
        for outer, inner in ((0.95, 0.6), (0.2, -0.2), (-0.6, -0.95)):
            arc = np.linspace(-0.99, 0.99, 14)
            across = np.sqrt(1 - arc**2)
            parts.append(
                Part(np.concatenate([np.stack([outer * across, arc], 1), np.stack([inner * across, arc], 1)[::-1]]), second, "round")
            )
    elif pattern == 1:  # a football's patches
        parts += [Part(ellipse(x, y, 0.25, 0.25, corners=5), second) for x, y in ((0, 0), *ellipse(0, 0, 0.72, 0.72, corners=5))]
    else:  # a basketball's seams
        seam = darker(first, 0.4)
        parts += [Part(rectangle(-0.98, -0.04, 0.98, 0.04), seam), Part(rectangle(-0.04, -0.98, 0.04, 0.98), seam)]
        parts += [
            Part(stroke(ellipse(1.1 * side, 0, 0.7, 0.9, 0.31 if side > 0 else -0.19, 0.69 if side > 0 else 0.19, 14), 0.07), seam)
            for side in (-1, 1)
        ]
    return parts


def egg(rng: np.random.Generator) -> list[Part]:
    """Return the parts of an egg, mostly with speckles."""
    t = ellipse(0, 0, 1, 1)
    outline = t * np.stack([0.72 * (1 + 0.2 * t[:, 1]), np.ones(len(t))], axis=1)
    shell = color_of(rng, (0.0, 0.35), (0.75, 1.0), (0.04, 0.12))
    places = [rng.uniform(-0.45, 0.45, 2) for _ in range(rng.integers(0, 9))]
    speckles = [Part(ellipse(x, y, 0.06, 0.06, corners=7), darker(shell, 0.6)) for x, y in places]
    return [Part(outline, shell, "round"), *speckles]


def lamp(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a table lamp."""
    shade, metal = color_of(rng, (0.1, 0.8), (0.7, 1.0)), darker((150, 150, 150), rng.uniform(0.3, 1.2))
    top = rng.uniform(0.25, 0.5)
    return [
        Part(rectangle(-0.05, -0.2, 0.05, 0.9), metal, "linear"),
        Part(ellipse(0, 0.92, 0.4, 0.1, corners=20), metal, "linear"),
        Part(polygon((-top, -1), (top, -1), (0.75, -0.1), (-0.75, -0.1)), shade, "linear"),
    ]


def street_lamp(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a street lamp with a round globe."""
    metal, globe = darker((120, 120, 125), rng.uniform(0.3, 1.0)), color_of(rng, (0.0, 0.3), (0.9, 1.0), (0.1, 0.16))
    return [
        Part(rectangle(-0.05, -0.6, 0.05, 1.6), metal, "linear"),
        Part(rectangle(-0.14, -0.62, 0.14, -0.5), metal),
        Part(ellipse(0, -0.8, 0.24, 0.26), globe, "round"),
        Part(polygon((-0.16, -1.0), (0, -1.15), (0.16, -1.0)), metal),
    ]


def heart(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a heart."""
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    outline = np.stack([16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))], axis=1) / 16
    return [Part(outline, color_of(rng, (0.4, 1.0), (0.4, 1.0)), rng.choice(["linear", "round"]))]


def gear(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a gear with a dark hole in its center."""
    teeth, metal = int(rng.integers(7, 13)), color_of(rng, (0.0, 0.5), (0.35, 0.9))
    steps = ellipse(0, 0, 1, 1, corners=4 * teeth) * np.where(np.arange(4 * teeth) % 4 < 2, 1.0, 0.78)[:, None]
    return [Part(steps, metal, "linear"), Part(ellipse(0, 0, 0.3, 0.3), darker(metal, 0.4))]


def cross(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a cross with arms of equal width."""
    arm, wide = rng.uniform(0.2, 0.4), rng.uniform(0.7, 1.0)
    outline = polygon(
        (-arm, -1),
        (arm, -1),
        (arm, -arm),
        (wide, -arm),
        (wide, arm),
        (arm, arm),
        (arm, 1),
        (-arm, 1),
        (-arm, arm),
        (-wide, arm),
        (-wide, -arm),
        (-arm, -arm),
    )
    return [Part(outline, color_of(rng, (0.2, 1.0), (0.4, 1.0)), "linear")]


def arrow(rng: np.random.Generator) -> list[Part]:
    """Return the parts of an arrow that points up."""
    shaft, head = rng.uniform(0.15, 0.3), rng.uniform(-0.3, 0.2)
    outline = polygon((0, -1), (0.7, head), (shaft, head), (shaft, 1), (-shaft, 1), (-shaft, head), (-0.7, head))
    return [Part(outline, color_of(rng, (0.2, 1.0), (0.3, 1.0)), "linear")]


def pyramid(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a pyramid, of which two sides are visible."""
    stone, edge = color_of(rng, (0.1, 0.9), (0.5, 1.0)), rng.uniform(-0.4, 0.4)
    return [
        Part(polygon((0, -0.9), (edge, 0.8), (-1, 0.55)), stone, "linear"),
        Part(polygon((0, -0.9), (edge, 0.8), (1, 0.55)), darker(stone, 0.65), "linear"),
    ]


def cube(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a cube, of which three sides are visible."""
    side, lift = color_of(rng, (0.1, 0.9), (0.5, 1.0)), rng.uniform(0.35, 0.5)
    return [
        Part(polygon((-0.9, -lift), (0, 0), (0, 1), (-0.9, 1 - lift)), darker(side, 0.8), "linear"),
        Part(polygon((0.9, -lift), (0, 0), (0, 1), (0.9, 1 - lift)), darker(side, 0.55), "linear"),
        Part(polygon((0, -2 * lift), (0.9, -lift), (0, 0), (-0.9, -lift)), side, "linear"),
    ]


def shard(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a shard, an irregular polygon."""
    corners = int(rng.integers(3, 8))
    turn = np.sort(rng.uniform(0, 2 * np.pi / corners, corners) + np.arange(corners) * 2 * np.pi / corners)
    outline = np.stack([np.cos(turn), np.sin(turn)], axis=1) * rng.uniform(0.6, 1.0, (corners, 1))
    return [Part(outline, color_of(rng, (0.0, 1.0), (0.2, 1.0)), "linear")]


def pebble(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a pebble, an irregular rounded shape."""
    corners = int(rng.integers(5, 9))
    outline = smooth(ellipse(0, 0, 1, 1, corners=corners) * rng.uniform(0.7, 1.15, (corners, 1)))
    return [Part(outline, color_of(rng, (0.0, 0.9), (0.25, 1.0)), rng.choice(["linear", "round", "shiny"]))]


def bulb(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a light bulb."""
    glass = color_of(rng, (0.0, 0.5), (0.8, 1.0), (0.1, 0.17))
    side = polygon((0.3, 0.55), (0.35, 0.3), (0.68, -0.2), (0.62, -0.75), (0.25, -1.05))
    outline = smooth(np.concatenate([side, (side * (-1, 1))[::-1]]))
    return [
        Part(outline, glass, "shiny"),
        *(
            Part(rectangle(-0.26, y, 0.26, y + 0.13), darker((170, 170, 175), shade), "linear")
            for y, shade in ((0.45, 0.9), (0.59, 0.65), (0.73, 0.9))
        ),
    ]


def button(rng: np.random.Generator) -> list[Part]:
    """Return the parts of a round button with two or four holes."""
    color = color_of(rng, (0.2, 1.0), (0.4, 1.0))
    holes = ellipse(0, 0, 0.3, 0.3, corners=int(rng.choice([2, 4])))
    return [
        Part(ellipse(0, 0, 1, 1), darker(color, 0.75), "linear"),
        Part(ellipse(0, 0, 0.75, 0.75), color, "linear"),
        *(Part(ellipse(x, y, 0.12, 0.12, corners=12), darker(color, 0.3)) for x, y in holes),
    ]


KINDS = {
    kind.__name__.replace("_", " "): kind
    for kind in (
        *(
            apple,
            arrow,
            ball,
            bird,
            boat,
            bottle,
            bulb,
            butterfly,
            button,
            car,
            cloud,
            crate,
            cross,
            cube,
            cup,
            egg,
            fish,
            flower,
            gear,
            heart,
        ),
        *(house, kite, lamp, leaf, lemon, moon, mushroom, pear, pebble, pine, pyramid, ring, shard, star, street_lamp, sun, tree, umbrella),
    )
}
