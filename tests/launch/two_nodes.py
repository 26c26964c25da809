"""A real two-node launch that loses a node: python -m tests.launch.two_nodes [--work DIR]

Two torchrun agents, started by `launch/train.sh` with an elastic rendezvous, train one tiny run on two nodes
(see `nodes.py`). After the first checkpoint the second node's agent and rank are killed. The first node
detects this, stops its own rank and waits; the second comes back, and both resume from the newest checkpoint.
Prints events with times; exits with status 1 if the run does not complete or differs from an undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_mopd.model.checkpoint import latest_iteration
from megatron_mopd.observe.metrics import METRICS_FILE, read_metrics
from tests import _runs
from tests.launch.nodes import Agent, Node, two_nodes

ITERATIONS, SAVE_EVERY = 24, 3
SECRET = secrets.token_hex(32)
PATIENCE = float(os.environ.get("LAUNCH_PATIENCE", "900"))
"""Timeout of each wait in seconds."""


class Story:
    """Prints events with the seconds since the start."""

    def __init__(self):
        self._start = time.monotonic()

    def tell(self, text: str) -> None:
        print(f"{time.monotonic() - self._start:7.1f} s  {text}", flush=True)

    def wait_for(self, what: str, condition: Callable[[], object], agents: list[Agent]):
        """Poll until `condition()` is true; fails on timeout or when all agents have exited."""
        deadline = time.monotonic() + PATIENCE
        while not (value := condition()):
            ended = all(agent.process.poll() is not None for agent in agents)
            if time.monotonic() > deadline or ended and not condition():
                for agent in agents:
                    print(f"--- {agent.node.name}\n{agent.log.read_text()[-4000:]}")
                sys.exit(f"waited in vain: {what}")
            time.sleep(0.1)
        self.tell(what)
        return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, help="directory for inputs, logs and runs; default: a temporary one"
    )
    options = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("asked to stop")
    )  # so that agents and nodes are removed
    with tempfile.TemporaryDirectory() as temporary, two_nodes() as nodes:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        sys.exit(0 if lose_a_node(work, nodes) else 1)


def configuration(work: Path, name: str) -> list[str]:
    """Arguments of a run on both nodes' ranks: a distillation from `self` on two replicas."""
    values = _runs.values(
        work,
        run_dir=str(work / name),
        objective={"kind": "full_vocab_kl"},
        teachers=[{"name": "self"}],
        routing={"default": "self"},
        schedule={"train_iters": ITERATIONS, "global_batch_size": 8, "micro_batch_size": 2},
        checkpoint={"save_interval": SAVE_EVERY},
        parallel={"distributed_timeout_minutes": PATIENCE / 60},
    )
    return _runs.write_config(work / f"{name}.yaml", values)


def settings(first: Node, port: int = 29400) -> dict[str, str]:
    """The settings for `launch/train.sh`, the same on both nodes."""
    return {
        "NNODES": "2",
        "NPROC_PER_NODE": "1",
        "RDZV_ENDPOINT": f"{first.address}:{port}",
        "RUN_ID": "two-nodes",
        "MOPD_JOB_SECRET": SECRET,
        "MAX_RESTARTS": "2",
        "JOIN_TIMEOUT": str(int(PATIENCE)),
        "RDZV_CONF": "keep_alive_interval=2,keep_alive_max_attempt=3",
    }


def lose_a_node(work: Path, nodes: tuple[Node, Node]) -> bool:
    """Run the scenario; returns whether the run ended like an undisturbed one."""
    story = Story()
    _runs.write_inputs(work)
    arguments, run = configuration(work, "disturbed"), work / "disturbed"
    first, second = nodes
    where = "namespaces of their own" if first.enter else "loopback"
    story.tell(f"two nodes on {where}: {first.address}, {second.address} ({first.interface})")
    logs = [work / f"{node.name}.log" for node in nodes]
    agents = [Agent(node, log, settings(first), arguments) for node, log in zip(nodes, logs)]
    try:
        checkpoints = run / "checkpoints"
        story.wait_for(
            "both nodes train; the first checkpoint is there", lambda: latest_iteration(checkpoints), agents
        )
        agents[1].kill()
        saved, said = latest_iteration(checkpoints), [len(log.read_text()) for log in logs]
        assert saved < ITERATIONS, "the run ended before its node was lost"
        story.tell(f"{second.name} killed: agent and rank; newest checkpoint: iteration {saved}")
        story.wait_for(
            f"{first.name}: its rank has ended too, the agent waits for another node",
            lambda: len(agents[0].processes()) == 1,
            agents[:1],
        )
        agents[1] = Agent(second, logs[1], settings(first), arguments)
        story.tell(f"{second.name} is back")
        story.wait_for(
            "both have ended", lambda: all(agent.process.poll() is not None for agent in agents), agents
        )
    finally:
        for agent in agents:
            agent.kill()
    statuses = [agent.process.returncode for agent in agents]
    again = "".join(log.read_text()[length:] for log, length in zip(logs, said))
    resumed = min(int(number) for number in re.findall(rf"step +(\d+)/{ITERATIONS}", again))
    story.tell(f"the first step after the rejoin: {resumed}")
    steps = [line["iteration"] for line in read_metrics(run)]
    story.tell(f"exit statuses {statuses}; iterations in {METRICS_FILE}: {steps[0]} to {steps[-1]}")
    story.tell(f"newest checkpoint: iteration {latest_iteration(checkpoints)}")
    undisturbed = configuration(work, "undisturbed")
    outcome = _runs.run_main(undisturbed, 2, timeout=PATIENCE)
    assert outcome.statuses == [0, 0], outcome.printed
    is_same = _runs.comparable(run) == _runs.comparable(work / "undisturbed")
    story.tell(f"metrics of all {ITERATIONS} steps equal those of an undisturbed run: {is_same}")
    return statuses == [0, 0] and resumed == saved + 1 and is_same and steps == list(range(1, ITERATIONS + 1))


if __name__ == "__main__":
    main()
