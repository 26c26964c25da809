"""Draw the packages and their imports, for docs/architecture.md.

    python tools/draw_architecture.py            # writes docs/images/architecture.png
    python tools/draw_architecture.py --check    # only checks that every import goes down

The arrows are read from the source; `LAYERS` is the order of the layers, and an import that goes up is an
error.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_mopd"

LAYERS = (
    ("train",),
    ("commands",),
    ("run",),
    ("estimate",),
    ("training",),
    ("losses", "pipeline"),
    ("teachers", "rollout"),
    ("model", "objectives"),
    ("data", "observe"),
    ("backend", "config", "confinement"),
    ("choices",),
)
"""From top to bottom. A package may import from the layers below it, and from its own."""
PURPOSE = {
    "commands": "command lines, one module each",
    "train": "the algorithm on one page",
    "run": "the life of a run: set-up, checkpoints, alarms, evaluation",
    "estimate": "memory and FLOPs of a layout",
    "training": "one optimizer step",
    "losses": "loss of a micro-batch from hidden states",
    "pipeline": "plans and their execution",
    "teachers": "teacher weights: storage and loading",
    "rollout": "the student samples",
    "objectives": "divergences and policy gradients",
    "model": "models, families, checkpoints, conversion",
    "data": "prompts, verifiers, micro-batches",
    "observe": "metrics, progress, report",
    "backend": "process groups, CPU backend, failures",
    "config": "every key, typed",
    "confinement": "sandboxed processes",
    "choices": "allowed values of keys",
}


def imports() -> Counter[tuple[str, str]]:
    """(importing package, imported package) -> number of import statements."""
    found: Counter[tuple[str, str]] = Counter()
    for path in PACKAGE.rglob("*.py"):
        importer = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in _imported(ast.parse(path.read_text(encoding="utf-8"))):
            parts = module.split(".")
            if parts[0] == PACKAGE.name and len(parts) > 1 and parts[1] != importer:
                found[importer, parts[1]] += 1
    return found


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def imports_that_go_up() -> list[str]:
    """`model imports training` for each import from a higher layer; also packages without a layer."""
    depth = {name: number for number, names in enumerate(LAYERS) for name in names}
    unknown = {name for pair in imports() for name in pair} - depth.keys()
    problems = [f"{name} has no layer" for name in sorted(unknown)]
    return problems + [
        f"{importer} imports {imported}"
        for importer, imported in sorted(imports())
        if not {importer, imported} & unknown and depth[imported] < depth[importer]
    ]


def direct_imports() -> list[tuple[str, str]]:
    """The pairs across layers, transitively reduced: without `a -> c` if `a -> b -> c`."""
    depth = {name: number for number, names in enumerate(LAYERS) for name in names}
    pairs = {pair for pair in imports() if depth[pair[0]] < depth[pair[1]]}

    def reaches(start: str, end: str) -> bool:
        return start == end or any(reaches(b, end) for a, b in pairs if a == start)

    return [
        (a, c) for a, c in sorted(pairs) if not any(x == a and b != c and reaches(b, c) for x, b in pairs)
    ]


def draw(path: Path) -> None:
    """Draw the layers from top to bottom, with the arrows of `direct_imports`."""
    figure = Figure(figsize=(11, 0.92 * len(LAYERS)), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    places = {
        name: (2.0 * (column - (len(names) - 1) / 2), float(-number))
        for number, names in enumerate(LAYERS)
        for column, name in enumerate(names)
    }
    for importer, imported in direct_imports():
        start, end = places[importer], places[imported]
        levels = start[1] - end[1]
        bend = 0.0 if levels == 1 else 0.4 if end[0] > 0 else -0.4
        arrow = FancyArrowPatch(
            (start[0] + (0.9 if bend > 0 else -0.9 if bend < 0 else 0), start[1] - (0.3 if not bend else 0)),
            (end[0] + (0.9 if bend > 0 else -0.9 if bend < 0 else 0), end[1] + (0.3 if not bend else 0)),
            arrowstyle="-|>",
            mutation_scale=9,
            connectionstyle=f"arc3,rad={-bend}",
            linewidth=1.2,
            color="#8d99ae",
        )
        axes.add_patch(arrow)
    for name, (x, y) in places.items():
        colors = dict(facecolor="#f4f6f8", edgecolor="#1769aa")
        box = FancyBboxPatch((x - 0.9, y - 0.27), 1.8, 0.54, boxstyle="round,pad=0.02", **colors)
        axes.add_patch(box)
        label = "train.py" if name == "train" else "choices.py" if name == "choices" else f"{name}/"
        axes.text(x, y + 0.09, label, ha="center", va="center", fontsize=10, weight="bold")
        axes.text(x, y - 0.13, PURPOSE[name], ha="center", va="center", fontsize=6.2)
    axes.set_xlim(-3.4, 3.4)
    axes.set_ylim(-len(LAYERS) + 0.55, 0.45)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="draw nothing; status 1 if any import goes up")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "architecture.png")
    options = parser.parse_args()
    if problems := imports_that_go_up():
        print("\n".join(problems), file=sys.stderr)
        sys.exit(1)
    if not options.check:
        draw(options.output)
        print(options.output)


if __name__ == "__main__":
    main()
