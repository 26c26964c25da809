"""Sampled responses on the report page, with each token coloured by the KL between student and teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_FULL_COLOR = 2.0
"""KL in nats at which the colour is full; the square root makes small divergences visible."""


def samples_part(samples: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest samples expanded, the first ones folded; invalid entries are skipped."""
    by_iteration: dict[int, list[dict[str, Any]]] = {}
    for line in samples:
        entry = _entry(line)
        if entry is not None:
            by_iteration.setdefault(line["iteration"], []).append(entry)
    if not by_iteration:
        return None
    last, first = max(by_iteration), min(by_iteration)
    groups = [{"title": f"Iteration {last}", "entries": by_iteration[last], "folded": False}]
    if first != last:
        title = f"Iteration {first}, for comparison"
        groups.append({"title": title, "entries": by_iteration[first], "folded": True})
    return {
        "title": "Samples",
        "note": "The student's responses, and where its teacher disagrees: the redder a token, the larger "
        f"the KL there (full colour at {_FULL_COLOR:g} nats). Hover over a token for its value.",
        "samples": groups,
    }


def _entry(line: dict[str, Any]) -> dict[str, Any] | None:
    tokens, divergences = line.get("tokens"), line.get("kl")
    if not isinstance(tokens, list) or not isinstance(divergences, list) or len(tokens) != len(divergences):
        return None
    logprobs = line.get("logprobs") or [None] * len(tokens)
    shown = []
    for text, divergence, logprob in zip(tokens, divergences, logprobs):
        known = isinstance(divergence, (int, float)) and math.isfinite(divergence)
        size = min(1.0, math.sqrt(abs(divergence) / _FULL_COLOR)) if known else 0.0
        hint = f"KL {divergence:.4f} nats" if known else "KL not finite"
        if logprob is not None:
            hint += f"; sampled with probability {math.exp(min(0.0, logprob)):.3g}"
        shown.append({"text": str(text).replace("\n", "⏎\n"), "strength": f"{0.85 * size:.2f}", "hint": hint})
    teachers = line.get("teachers")
    facts = []
    if isinstance(teachers, dict) and teachers:
        facts.append("teacher " + ", ".join(n if w == 1 else f"{n} {w:g}" for n, w in teachers.items()))
    finite = [value for value in divergences if isinstance(value, (int, float))]
    if finite:
        facts.append(f"mean KL {sum(finite) / len(finite):.3g}")
    if line.get("reward") is not None:
        facts.append(f"reward {line['reward']:g}")
    if line.get("answer") is not None:
        facts.append(f"expected {line['answer']}")
    ending = ""
    if line.get("left_out"):
        ending = f"and {line['left_out']} more tokens"
    elif not line.get("finished", True):
        ending = "cut off"
    return {
        "domain": str(line.get("domain", "")),
        "prompt": str(line.get("prompt", "")),
        "facts": ", ".join(facts),
        "tokens": shown,
        "ending": ending,
    }
