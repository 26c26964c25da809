"""docs/cluster.md: a row of its table equals the estimate."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

from benchmarks import cluster_memory

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()


def test_the_table_says_what_the_estimate_says(tmp_path):
    row = re.search(r"^\| 32 GPUs: TP 2, PP 2, EP 8 \(the recipe\) \|(.*)\|$", PAGE, re.MULTILINE)[1]
    written = [float(cell) for cell in row.split("|")]
    load = cluster_memory.describe("qwen3_30b_a3b", tmp_path)
    context = multiprocessing.get_context("fork")  # so that the simulated ranks leave no state here
    answers = context.SimpleQueue()
    child = context.Process(
        target=lambda: answers.put(cluster_memory.estimated("qwen3_30b_a3b", load, (32, 2, 2, 8, 1)))
    )
    child.start()
    child.join(200)
    assert not answers.empty(), "the estimate failed"
    sizes, total, host = answers.get()
    found = [*sizes, total, host]
    assert len(written) == len(found)
    for name, there, now in zip([*cluster_memory.COMPONENTS, "total", "host"], written, found):
        assert abs(there - now) <= 0.01 * now + 0.06, f"{name}: {there} on the page, {now:.1f} estimated"
