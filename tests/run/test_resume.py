"""Runs that resume with a different configuration, from the command line down to the optimizer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401  (before forking)

from megatron_mopd import train
from megatron_mopd.observe.metrics import read_metrics
from megatron_mopd.run import checkpointing as checkpoint
from tests import _runs
from tests._distributed import RankPool
from tests._models import GQA, MOE
from tests.run.test_checkpoint import Tokenizer, make, steps

OTHER_OPTIMIZER = dict(
    lr=3e-3,
    min_lr=1e-4,
    lr_warmup_iters=2,
    lr_warmup_init=1e-5,
    lr_decay_style="cosine",
    weight_decay=0.2,
    adam_beta1=0.7,
    adam_beta2=0.8,
    adam_eps=1e-6,
    clip_grad=0.25,
)
SAVED = 2


def groups_of(optimizer) -> list[dict]:
    """Every setting of every parameter group, without the parameters and the step, which is state."""
    return [{k: v for k, v in g.items() if k not in ("params", "step")} for g in optimizer.param_groups]


def save_one(rank, transformer, run_dir, sections):
    learner = make(transformer, {}, run_dir, **sections)
    steps(learner, 0, SAVED)
    checkpoint.save(learner, SAVED, Tokenizer())


def resume_with_other_settings(rank, transformer, run_dir, sections, changed):
    """(parameter groups and clipping after resuming, the same for a run that had these settings from the
    start and is at the same step, learning rates of both one step later, steps of Adam's moments)."""
    sections = sections | {"optimizer": sections.get("optimizer", {}) | changed}
    fresh = make(transformer, {}, "elsewhere", **sections)
    for _ in range(SAVED):
        fresh.scheduler.step(1)
    wanted = groups_of(fresh.optimizer), fresh.optimizer.config.clip_grad
    learner = make(transformer, {}, run_dir, **sections)
    assert checkpoint.resume(learner) == SAVED
    found = groups_of(learner.optimizer), learner.optimizer.config.clip_grad
    taken = {float(s["step"]) for s in _states(learner.optimizer)}
    ((_, _, lr),) = steps(learner, SAVED, 1)
    fresh.scheduler.step(1)
    return found, wanted, (lr, fresh.optimizer.param_groups[0]["lr"]), taken


def _states(optimizer):
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield from part.optimizer.state.values()


FLOAT64 = {"params_dtype": "float64", "optimizer": {"use_distributed_optimizer": False}}
BFLOAT16 = {"params_dtype": "bfloat16", "optimizer": {"use_distributed_optimizer": False}}


@pytest.mark.parametrize(
    "transformer, sections", [(MOE, {}), (GQA, FLOAT64), (GQA, BFLOAT16)], ids=["sharded", "float64", "bf16"]
)
def test_changed_settings_of_the_optimizer_take_effect(tmp_path, transformer, sections):
    with RankPool(1, timeout=120) as pool:
        pool.run(save_one, transformer, str(tmp_path), sections)
        for changed in (
            OTHER_OPTIMIZER,
            {"lr": 3e-3},
            {"lr_warmup_iters": 0, "lr_decay_style": "constant"},
            {},
        ):
            ((found, wanted, lr, taken),) = pool.run(
                resume_with_other_settings, transformer, str(tmp_path), sections, changed
            )
            assert found == wanted
            assert lr[0] == lr[1], "the schedule does not continue"
            assert taken == {SAVED}, "the moments do not continue"


def test_the_settings_differ_from_those_before(tmp_path):
    """The comparison above would be meaningless if the fresh groups equalled the saved ones."""
    with RankPool(1, timeout=120) as pool:
        pool.run(save_one, GQA, str(tmp_path), {})
        ((changed, *_),) = pool.run(resume_with_other_settings, GQA, str(tmp_path), {}, OTHER_OPTIMIZER)
        ((same, *_),) = pool.run(resume_with_other_settings, GQA, str(tmp_path), {}, {})
    for key in ("lr", "max_lr", "min_lr", "betas", "eps"):
        assert changed[0][0][key] != same[0][0][key]
    assert changed[1] != same[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    _runs.write_inputs(directory)
    return directory


def run(directory, drawn=None, run_dir="run", **sections):
    """Start the run once; the prompt indices of each rollout batch are appended to the file `drawn`."""
    sections = {
        "schedule": {"train_iters": 2, "global_batch_size": 4},
        "checkpoint": {"save_interval": 1},
    } | sections
    configuration = _runs.values(directory, run_dir=str(directory / run_dir), **sections)
    arguments = _runs.write_config(directory / "config.yaml", configuration)
    with pytest.MonkeyPatch.context() as patch:
        original = train.collect_trajectories

        def recorded(engine, prompts, *args, **kwargs):
            with open(drawn, "a") as file:
                file.write(json.dumps([prompt.index for prompt in prompts]) + "\n")
            return original(engine, prompts, *args, **kwargs)

        if drawn is not None:
            patch.setattr(train, "collect_trajectories", recorded)
        return _runs.run_main(arguments)


def snapshot(directory) -> dict[str, tuple[int, str]]:
    """Modification time and content hash of every file."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files
    }


def test_a_run_goes_on_with_what_may_change_and_refuses_the_rest(directory):
    drawn = directory / "drawn.txt"
    first = run(directory, drawn)
    assert first.statuses == [0], first.printed

    # Finished: one line and no file touched, even with different values of settings that may change.
    before = snapshot(directory / "run")
    for sections in (
        {},
        {"optimizer": {"lr": 0.5}},
        {"schedule": {"train_iters": 1, "global_batch_size": 4}},
    ):
        again = run(directory, drawn, **sections)
        assert again.statuses == [0], again.printed
        (line,) = again.printed.splitlines()
        assert line.startswith("run_dir: finished: ") and "iter_0000002 has 2 iterations" in line
        assert snapshot(directory / "run") == before

    # Refused: the message has the key, the old value and the new one, and no file is touched.
    for sections, parts in (
        ({"seed": 99}, ["seed: must not change", "1234", "99"]),
        (
            {"params_dtype": "float64", "optimizer": {"use_distributed_optimizer": False}},
            ["params_dtype: ", "'float32'"],
        ),
        ({"student": {"rotary_base": 5000.0}}, ["student.rotary_base: ", "10000.0", "5000.0"]),
    ):
        refused = run(directory, drawn, **sections)
        assert refused.statuses == [2], refused.printed
        (line,) = refused.printed.splitlines()
        assert all(part in line for part in parts), line
        assert snapshot(directory / "run") == before

    # A different learning rate, a batch twice as large, prompts at another path: the run resumes with them.
    (directory / "moved").mkdir()
    shutil.copy(directory / "prompts.jsonl", directory / "moved" / "prompts.jsonl")
    data = {"prompts": [{"path": str(directory / "moved" / "prompts.jsonl")}]}
    longer = {"train_iters": 4, "global_batch_size": 8}
    more = run(directory, drawn, optimizer={"lr": 5e-3}, schedule=longer, data=data)
    assert more.statuses == [0], more.printed
    (said,) = [line for line in more.stdout[0].splitlines() if "changed since" in line]
    for part in ("optimizer.lr 0.001 -> 0.005", "schedule.global_batch_size 4 -> 8", "data.prompts[0].path"):
        assert part in said
    assert [line["lr"] for line in read_metrics(directory / "run")] == pytest.approx([1e-3, 1e-3, 5e-3, 5e-3])

    # A smaller batch: each of the 24 prompts was drawn once so far; the next four begin the second epoch.
    longer = {"train_iters": 6, "global_batch_size": 2}
    back = run(directory, drawn, optimizer={"lr": 5e-3}, schedule=longer)
    assert back.statuses == [0], back.printed
    batches = [json.loads(line) for line in drawn.read_text().splitlines()]
    assert [len(batch) for batch in batches] == [4, 4, 8, 8, 2, 2]
    indices = [index for batch in batches for index in batch]
    assert sorted(indices[:24]) == list(range(24)) and len(set(indices[24:])) == 4


def test_other_prompts_at_the_same_place_are_refused(directory):
    assert run(directory, run_dir="edited").statuses == [0]
    text = (directory / "prompts.jsonl").read_text()
    longer = {"schedule": {"train_iters": 4, "global_batch_size": 4}}
    try:
        (directory / "prompts.jsonl").write_text(text.replace("0 + 0 =", "0 + 00 ="))
        refused = run(directory, run_dir="edited", **longer)
    finally:
        (directory / "prompts.jsonl").write_text(text)
    assert refused.statuses == [2], refused.printed
    assert "data.prompts[0]: prompts differ from those that" in refused.printed
    assert os.path.exists(directory / "edited" / "checkpoints" / "iter_0000002")
