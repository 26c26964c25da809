"""Every command of README.md and docs/ is executed by a test, or marked here with the reason why it is not;
the links and files that the documentation names exist.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import pkgutil
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import transformers

from megatron_mopd.observe.metrics import read_metrics
from megatron_mopd.run.best_checkpoint import best_iteration
from tests import _runs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CLUSTER, LONG, MODEL = "needs a cluster", "takes long", "needs a dense model to start from"
FLOW = "test_documentation.py::test_from_hugging_face_directories_to_a_merged_one"
# Not executed in full: other tests cover its function, and this one that the command starts.
STARTED = "test_packaging.py::test_every_tool_is_a_program_or_belongs_to_the_repository"
DOCUMENTED = "tools/test_document_configuration.py::test_a_changed_page_is_noticed"
_PROGRAMS = tuple("python torchrun make pytest pip sbatch srun bash sh kubectl mopd-".split())
_FILES = r"\b(?:tools|benchmarks|tests|launch|megatron_mopd)/[a-z_\d/]+\.(?:py|sh|sbatch|yaml)\b"

# Prefix of a command -> a test that executes it, or why none does. The longest matching prefix counts.
COMMANDS = {
    "python tools/make_small_experts.py": FLOW,
    "python -m megatron_mopd.train --config runs/own/mopd.yaml": FLOW,
    "python tools/report.py": FLOW,
    "python tools/convert_megatron_to_hf.py": FLOW,
    "python tools/document_configuration.py": DOCUMENTED,
    "python tools/draw_architecture.py": "tools/test_architecture.py::test_arrows_imply_every_import",
    "python tools/convert_hf_to_megatron.py": STARTED,
    "python tools/generate.py": FLOW,
    "python tools/plan_pipeline.py": FLOW,
    "python tools/doctor.py": "tools/test_doctor.py",
    "python tools/estimate.py": "estimate/test_memory.py",
    "python tools/upcycle_to_moe.py": MODEL,
    "python -m megatron_mopd.train --config launch/recipes/": LONG,
    "python -m tests.": LONG,
    "python benchmarks/": LONG,
    "python -m benchmarks.": LONG,
    "python -m benchmarks.cluster_scale": "data/test_blocks.py::test_the_benchmark",
    "python benchmarks/rollout_bytes.py": "data/test_exchange.py::test_the_benchmark",
    "python -m benchmarks.startup": "backend/test_process_groups.py::test_the_benchmark",
    "torchrun --nproc-per-node 2 benchmarks/": LONG,
    "python -m tests.launch.two_nodes": LONG,
    "python -m pytest": LONG,
    "make ": LONG,
    "torchrun ": CLUSTER,
    "sbatch ": CLUSTER,
    "kubectl ": CLUSTER,
}


# Commands of other pages, applied to the files that the flow leaves instead of a user's own files.
OTHERS = [
    ["tools/generate.py", "--checkpoint", "runs/own/merged", "--prompt", "3+4="],
    "tools/plan_pipeline.py --stages 4 --microbatches 12 --teachers 3 --steps-per-rollout 2".split(),
]


def commands(page):
    """Shell commands of a page, from fenced and indented blocks, with continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    others = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += [line[4:] for line in others.splitlines() if line.startswith("    ")]
    for line in lines:
        line = " ".join(line.split("   #")[0].removeprefix("$ ").split())
        if line.startswith(_PROGRAMS):
            yield line


def entry_of(command):
    return max((start for start in COMMANDS if f"{command} ".startswith(start)), key=len, default=None)


def test_every_command_is_executed_or_marked():
    found = {(page.name, command) for page in PAGES for command in commands(page)}
    assert len(found) > 15
    unknown = [f"{page}: {command}" for page, command in sorted(found) if entry_of(command) is None]
    assert not unknown, "add a test or a reason to COMMANDS for each"


def test_the_tests_that_are_named_are_there():
    for command, covered in COMMANDS.items():
        if covered in (CLUSTER, LONG, MODEL):
            continue
        file, _, name = covered.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in functions if name else any(f.startswith("test_") for f in functions), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_that_a_page_names_are_there(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(_FILES, text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"-m ((?:tests|megatron_mopd)(?:\.[a-z_\d]+)*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for path in re.findall(r"`([a-z_\d/]+\.py)`", text):  # also relative to a folder
        assert (ROOT / path).exists() or any(ROOT.glob(f"[a-z]*/**/{path}")), path
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
        titles = re.findall(
            r"^#+ (.*)$", (page.parent / target if target else page).read_text(), re.MULTILINE
        )
        assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


def test_what_the_api_reference_describes_exists():
    described = []
    for page in (ROOT / "docs/reference").glob("*.md"):
        described += re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(described) > 20
    for name in described:
        pkgutil.resolve_name(name)


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    for page in (ROOT / "docs").glob("**/*.md"):
        assert f"- {page.relative_to(ROOT / 'docs')}\n" in navigation, page


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
        waiting += [(page.parent / link).resolve() for link in links]
    assert {page.name for page in PAGES} <= {page.name for page in reached}


def _blocks(language):
    text = (ROOT / "docs/your_own_experts.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def _forked(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=_quietly, args=(function, arguments))
    process.start()
    process.join(250)
    status = process.exitcode
    if status is None:
        process.kill()
    return status


def _quietly(function, arguments):
    torch.set_num_threads(1)
    status = 1
    try:
        function(*arguments)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        os._exit(status)


def _script(arguments):
    sys.argv = arguments
    runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def test_from_hugging_face_directories_to_a_merged_one(tmp_path, monkeypatch):
    """The commands of docs/your_own_experts.md in order, with fewer steps."""
    monkeypatch.chdir(tmp_path)
    (yaml,), (python,) = _blocks("yaml"), _blocks("python")
    fewer = {
        "tools/make_small_experts.py": ["--steps", "20"],
        "megatron_mopd.train": ["schedule.train_iters=4", "schedule.eval_interval=2"],
    }
    fewer["megatron_mopd.train"] += ["schedule.global_batch_size=16", "optimizer.lr_warmup_iters=0"]
    executed = []
    for command in commands(ROOT / "docs/your_own_experts.md"):
        if COMMANDS[entry_of(command)] != FLOW:
            continue
        program, *arguments = shlex.split(command)
        assert program == "python"
        if arguments[0] == "-m":
            (tmp_path / "runs/own/mopd.yaml").write_text(yaml)
            trains = "schedule.train_iters=0" not in arguments
            outcome = _runs.run_main([*arguments[2:], *(fewer[arguments[1]] if trains else [])])
            assert outcome.statuses == [0], outcome.printed
        else:
            assert _forked(_script, [*arguments, *fewer.get(arguments[0], [])]) == 0, command
        executed.append(arguments[1] if arguments[0] == "-m" else Path(arguments[0]).stem)
    train = "megatron_mopd.train"
    expected = [
        "make_small_experts",
        train,
        "report",
        train,
        train,
        train,
        "report",
        "convert_megatron_to_hf",
    ]
    assert executed == expected

    run = tmp_path / "runs/own/mopd"
    lines = read_metrics(run)
    assert len(lines) == 4
    assert {"kl/add", "kl/reverse", "accuracy/add", "pass_at_4/reverse"} <= lines[-1].keys()
    assert best_iteration(run / "checkpoints") in (2, 4)
    page = (run / "report.html").read_text()
    assert len(page) > 20_000 and "Who is good at what" in page and "add expert" in page
    assert _forked(exec, compile(python, "the last block", "exec"), {}) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs/own/merged")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs/own/base")
    changed = [not torch.equal(a, b) for a, b in zip(merged.parameters(), base.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2

    for arguments in OTHERS:
        assert _forked(_script, arguments) == 0, arguments
