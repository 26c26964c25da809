"""Executes plans as on a GPU with a single hardware work queue. Pure Python, no torch.

CUDA distributes the streams of a process over hardware queues, CUDA_DEVICE_MAX_CONNECTIONS of them (CUDA
programming guide, "CUDA Environment Variables"); `launch/train.sh` sets 1. NVIDIA has described the rules of
one queue for GPUs that have no more (CUDA C programming guide, "Implicit Synchronization", compute capability
up to 3.0; the webinar "Streams and Concurrency"): a kernel starts only when all kernels launched before it,
in any stream, have started, and one that must wait for another holds up everything launched after it until
that one is complete. A kernel that has started holds up nothing, even if it spins until its peer answers, as
NCCL's do.

Applied to a stage, whose host launches its list from top to bottom and never waits:

- A computation waits for the one before it and, through `Work.wait`, for its receive.
- A send or a receive waits for the computations launched before it (`isend` and `irecv` make NCCL's stream
  wait for the current one), and for the previous message of its channel: every channel has a communicator
  and a stream of its own (`communicator.py`), and a stream is in order.
- A message arrives once its send and its receive have started: NCCL's send may block until then
  (NVIDIA/nccl#783). It may also buffer a small message and end earlier, which only removes a wait.
- A load waits for earlier computations and loads only, and they complete without anything launched later. So
  loads cannot cause a deadlock. Nor do they delay kernels: copies have queues and engines of their own, and
  are timed as in `simulate`. The gather that follows the copy of a `host_sharded` teacher is a kernel and
  waits in the queue until the copy is complete; this delay is not simulated.
- The optimizer step and `Synchronize` wait for everything before them on all stages, and everything after
  them waits for them.

Every condition is that something else has started or completed, so nothing that happens earlier, or in
another order, can make a condition false. A host that launches late, or waits for its computations (a mixture
of experts reads token counts), adds no condition, because whatever it launches next waits for them anyway;
more queues remove conditions. So a plan that completes here completes with any number of queues and any
durations. A sequence of such plans does too: no plan waits for the next. All ranks of a stage launch the same
list, so the collectives among them add no wait between stages.

Assumed: NCCL's kernels that have started fit on the GPU next to each other and a computation; no two channels
share a stream (PyTorch has 32 per device and priority, and then hands out the first again); no host waits for
its whole device, posted receives included (`cudaMalloc` may, when memory runs out), except at the optimizer
step, which no message crosses. None of this has been measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mopd.pipeline.instructions import Channel, Instruction, Plan, Receive, Send
from megatron_mopd.pipeline.simulate import Machine, Simulation, as_sequence


def simulate_one_queue(plans: Plan | Sequence[Plan], *, record: bool = False) -> Simulation:
    """Like `simulate`, but sends and receives hold up what is launched after them until they can start.

    Raises PlanError if the stages deadlock. A plan that does not deadlock here does not in `simulate` either.
    """
    return _OneQueueMachine(as_sequence(plans), record).run()


class _OneQueueMachine(Machine):
    """A stage's clock is when its latest computation has ended and its latest message has started."""

    def __init__(self, plans: list[Plan], record: bool):
        super().__init__(plans, record)
        self.waiting_to_send: set[Channel] = set()

    def execute(self, stage: int, number: int, entry: Instruction) -> bool:
        kind = type(entry)
        if kind is not Receive and kind is not Send:
            return super().execute(stage, number, entry)
        road = self.road(entry.channel)
        mine, peers = (road.posted, road.sent) if kind is Receive else (road.sent, road.posted)
        started = len(mine)
        if started > len(peers):
            if kind is Receive:
                road.waiting = True
            else:
                self.waiting_to_send.add(entry.channel)
            return False
        if started:
            end = max(road.sent[started - 1][0], road.posted[started - 1]) + self.message_cost[number]
            self.clock[stage] = max(self.clock[stage], end)
        super().execute(stage, number, entry)
        if kind is Receive and entry.channel in self.waiting_to_send:
            self.waiting_to_send.remove(entry.channel)
            self.wake(entry.channel.source)
        return True

    def describe_block(self, stage: int) -> str:
        position, entry = self.blocked_at(stage)
        if not isinstance(entry, Receive | Send):
            return super().describe_block(stage)
        channel, road = entry.channel, self.road(entry.channel)
        if isinstance(entry, Receive):
            awaited = f"stage {channel.source} to send message {len(road.posted) - 1} of this channel"
        else:
            awaited = f"stage {channel.destination} to receive message {len(road.sent) - 1} of this channel"
        return (
            f"stage {stage}, instruction {position} ({entry}) waits for {awaited}, and with one hardware "
            "queue everything after it waits too"
        )
