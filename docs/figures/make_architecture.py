"""Draws ``architecture.svg``: the wings as floors, and three ways through them.

python docs/figures/make_architecture.py
"""

from pathlib import Path

# Top to bottom: a floor may import those below it. What is beside a name says what is done there.
FLOORS = [
    ("cli", "attribute and report by config"),
    ("command_line/", "looks into runs and scores"),
    ("evaluation/", "is a score right?"),
    ("callback", "events of the Trainer"),
    ("attribution", "trainer.attribute"),
    ("issues", "labels that look wrong"),
    ("scorer", "queries in, scores out"),
    ("diagnosis", "whether scores can be trusted"),
    ("ensembling", "means over runs"),
    ("estimators/", "one method in each file"),
    ("runs/", "a recorded run, opened"),
    ("passes/", "one pass over data"),
    ("recording/", "what is kept while others train"),
    ("capture/", "the user's step, from outside"),
    ("layers/", "one kind of layer in each file"),
    ("scores · tables · plots/ · report/", "what comes out"),
    ("curvature/", "mathematics: torch alone"),
    (
        "optimizers · _student · random_streams · _files · _sealed · _provenance · wording · _lightning"
        " · _trainer · _progress · distributed · names",
        "",
    ),
]
GROUND = len(FLOORS) - 1
# Each way: its title, its colour, and its stops as (floor, what is visited there).
WAYS = [
    (
        "a training step",
        "#2e7d32",
        [
            ("callback", "an event"),
            ("recording/", "session"),
            ("capture/", "coverage"),
            ("recording/", "optimizer_hooks"),
            ("optimizers", "its rule"),
            ("recording/", "recorder"),
        ],
    ),
    (
        "a factor",
        "#b35900",
        [
            ("runs/", "run"),
            ("recording/", "snapshots"),
            ("passes/", "preparation, factors"),
            ("capture/", "objective"),
            ("layers/", "a kind"),
            ("curvature/", "ekfac"),
            ("recording/", "store"),
        ],
    ),
    (
        "a query",
        "#1f5fae",
        [
            ("attribution", "attribute"),
            ("scorer", "score"),
            ("runs/", "run"),
            ("estimators/", "source"),
            ("passes/", "queries"),
            ("curvature/", "unroll"),
            ("passes/", "examples"),
            ("scores", "scores"),
        ],
    ),
]
LEFT, TOP, FLOOR, STEP, GAP, LABELS = 8, 40, 46, 40, 24, 224


def main() -> None:
    """Write the picture beside this file."""
    Path(__file__).with_name("architecture.svg").write_text(picture())


def picture() -> str:
    """The SVG's text."""
    starts, x = [], LEFT + LABELS + GAP
    for _, _, stops in WAYS:
        starts.append(x)
        x += STEP * len(stops) + GAP
    width, height = x - GAP + 2 * LEFT, TOP + FLOOR * len(FLOORS) + LEFT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="Helvetica, Arial, sans-serif" font-size="13">',
        "<title>The wings of lightning_source and three ways through them</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *(_floor(index, width) for index in range(len(FLOORS))),
        *(_way(x, *way) for x, way in zip(starts, WAYS, strict=True)),
    ]
    return "\n".join([*parts, "</svg>", ""])


def _floor(index: int, width: int) -> str:
    name, what = FLOORS[index]
    y = TOP + FLOOR * index
    band = f'<rect x="{LEFT}" y="{y}" width="{width - 2 * LEFT}" height="{FLOOR - 4}" rx="4" fill="{_shade(index)}"/>'
    first, _, rest = name.partition(" · _files")  # the ground has more names than fit a line
    lines = [first, "_files" + rest] if rest else [name, what]
    weights = ("bold", "bold") if rest else ("bold", "normal")
    texts = [
        f'<text x="{LEFT + 8}" y="{y + 18 + 16 * line}" font-size="{14 - 2 * line}" font-weight="{weight}"'
        f' fill="#222222">{text}</text>'
        for line, (text, weight) in enumerate(zip(lines, weights, strict=True))
    ]
    return "\n".join([band, *texts])


def _shade(index: int) -> str:
    return "#dfe3e6" if index == GROUND else "#f5f6f8" if index % 2 else "#eceff2"


def _way(x: int, title: str, colour: str, stops: list[tuple[str, str]]) -> str:
    floors = [next(i for i, (name, _) in enumerate(FLOORS) if floor in name) for floor, _ in stops]
    places = [(x + STEP * i + STEP // 2, TOP + FLOOR * floor + 15) for i, floor in enumerate(floors)]
    line = " ".join(f"{a},{b}" for a, b in places)
    parts = [
        f'<text x="{x}" y="{TOP - 14}" font-size="16" font-weight="bold" fill="{colour}">{title}</text>',
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>',
    ]
    for number, ((a, b), floor, (_, label)) in enumerate(zip(places, floors, stops, strict=True), start=1):
        below = f'<text x="{a}" y="{b + 22}" font-size="12" text-anchor="middle"'
        parts += [
            f'<circle cx="{a}" cy="{b}" r="9" fill="{colour}"/>',
            f'<text x="{a}" y="{b + 4}" font-size="12" text-anchor="middle" fill="#ffffff">{number}</text>',
            f'{below} stroke="{_shade(floor)}" stroke-width="4">{label}</text>',  # the line stays off the letters
            f'{below} fill="{colour}">{label}</text>',
        ]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
