"""Point-to-point messages between neighboring pipeline stages; channels never block each other.

Every channel of a plan (lane, source stage, destination stage) needs its own communicator. Channels of one
lane whose sources are an even number of stages apart share no rank, so a process group over the whole
pipeline serves all of them: one group per lane and parity, and one per lane for the wrap-around between the
last and the first stage that virtual stages need. Each rank then uses each group in one direction and with
one peer only, so a receive that is posted early can delay only later receives of the same channel.

NCCL: point-to-point operations of one group run in order on that group's own stream, concurrently with the
computation. A send starts when the work enqueued before it has finished; a receive's buffer is safe to use
after `PendingMessage.wait` has made the compute stream wait for it. Neither blocks the host, except for the
first message between two ranks of a group: both hosts then wait for each other to connect (NVIDIA/nccl#783).
In a plan they would meet in the order of their lists, and could wait in a circle. So every channel carries
one message at construction. If all streams share one hardware queue, an operation that waits for the one
before it also delays computations: `one_queue.py` has the rules.

gloo: messages with different tags can overtake each other, so one group with a tag per message is enough (and
every gloo group has polling threads). The host waits in `PendingMessage.wait`, with a timeout.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.backend.process_groups import new_group
from megatron_mopd.pipeline.instructions import Channel, Lane

_TAGS_PER_KIND = 1 << 20
"""More messages than are ever in flight on one channel."""


class StageTimeout(RuntimeError):
    """An expected message did not arrive: the peer has hung, exited, or runs a different plan."""


def is_way_back(channel: Channel) -> bool:
    """True between the last and the first stage, where one model chunk passes its output to the next (virtual
    stages)."""
    step = -1 if channel.lane is Lane.STUDENT_BACKWARD else 1
    return channel.destination != channel.source + step


def channel_kind(channel: Channel) -> int:
    """The index of the process group that serves a channel: one of nine, by lane and by source parity (or
    wrap-around).
    """
    return 3 * list(Lane).index(channel.lane) + (2 if is_way_back(channel) else channel.source % 2)


def all_channels(stages: int, virtual_stages: int) -> list[Channel]:
    """Every channel that a plan for this many stages can use."""
    channels = []
    for stage in range(stages - 1):
        channels.append(Channel(Lane.TEACHER_FORWARD, stage, stage + 1))
        channels.append(Channel(Lane.STUDENT_FORWARD, stage, stage + 1))
        channels.append(Channel(Lane.STUDENT_BACKWARD, stage + 1, stage))
    if stages > 1 and virtual_stages > 1:
        channels.append(Channel(Lane.STUDENT_FORWARD, stages - 1, 0))
        channels.append(Channel(Lane.STUDENT_BACKWARD, 0, stages - 1))
    return channels


class PendingMessage:
    """A posted receive: its buffer, and the work to wait for."""

    def __init__(self, channel: Channel, peer: int, buffer: Tensor, work: dist.Work, timeout: timedelta):
        self.channel, self.peer = channel, peer
        self._buffer, self._work, self._timeout = buffer, work, timeout

    def wait(self) -> Tensor:
        """Wait for the message and return it. Raises `StageTimeout`, which names the peer, if it does not
        arrive in time."""
        try:
            if self._buffer.is_cuda:
                self._work.wait()
            else:
                self._work.wait(self._timeout)
        except RuntimeError as error:
            cause = str(error).splitlines()[0]
            raise StageTimeout(
                f"no message from stage {self.channel.source} (rank {self.peer}) on {self.channel} within "
                f"{self._timeout.total_seconds():g} s ({cause}); that rank is not responding: check its log"
            ) from error
        return self._buffer


class PipelineCommunicator:
    """Sends and receives messages for one rank. Construction is collective over the pipeline: at most nine
    groups of its ranks, in each an all-reduce of 4 bytes, and a message of 4 bytes on every channel.

    pipeline: this rank's pipeline group; its ranks in stage order.
    """

    def __init__(
        self,
        pipeline: dist.ProcessGroup,
        device: torch.device,
        *,
        virtual_stages: int = 1,
        timeout: timedelta = timedelta(minutes=10),
    ):
        self.device, self.timeout = device, timeout
        self.ranks = dist.get_process_group_ranks(pipeline)
        self.stage = pipeline.rank()
        self._groups: dict[int, dist.ProcessGroup] = {}
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._sent_before: deque[tuple[dist.Work, Tensor]] = deque()
        self._numbers: dict[Channel, int] = {}
        kinds = sorted({channel_kind(channel) for channel in all_channels(len(self.ranks), virtual_stages)})
        if device.type == "cpu":
            kinds = kinds[:1]
        backend = "nccl" if device.type == "cuda" else "gloo"
        for kind in kinds:
            description = f"PIPELINE_CHANNELS_{kind}"
            self._groups[kind] = new_group(self.ranks, timeout, backend, group_desc=description)
        for group in self._groups.values():
            # The first use of an NCCL communicator needs all its ranks at once; later uses need only the two
            # peers.
            dist.all_reduce(torch.zeros(1, device=device), group=group)
        self._connect(virtual_stages)

    def _connect(self, virtual_stages: int) -> None:
        """Send one number on every channel. Channels of one kind share no rank; all ranks take the kinds in
        the same order, so the hosts never wait in a circle."""
        token = torch.zeros(1, device=self.device)
        for channel in sorted(all_channels(len(self.ranks), virtual_stages), key=channel_kind):
            if self.stage == channel.source:
                self.send(channel, token)
            elif self.stage == channel.destination:
                self.receive(channel, token.shape, token.dtype).wait()
        self.flush()

    def receive(self, channel: Channel, shape: Iterable[int], dtype: torch.dtype) -> PendingMessage:
        """Post the receive of the next message of `channel`; returns immediately."""
        buffer = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        peer = self.ranks[channel.source]
        try:
            work = dist.irecv(buffer, src=peer, group=self._group(channel), tag=self._tag(channel))
        except RuntimeError as error:
            raise _lost(channel, channel.source, peer, error) from error
        return PendingMessage(channel, peer, buffer, work, self.timeout)

    def send(self, channel: Channel, message: Tensor) -> None:
        """Start sending; returns immediately. The message must not be modified afterwards."""
        message = message.detach().contiguous()
        peer = self.ranks[channel.destination]
        try:
            work = dist.isend(message, dst=peer, group=self._group(channel), tag=self._tag(channel))
        except RuntimeError as error:
            raise _lost(channel, channel.destination, peer, error) from error
        self._sent.append((work, message))
        if message.is_cuda:
            self._sent = deque(item for item in self._sent if not item[0].is_completed())

    def begin_plan(self) -> None:
        """Messages sent or received from here on belong to the next plan."""
        self.finish_last_plan()
        self._sent_before, self._sent = self._sent, deque()

    def finish_last_plan(self) -> None:
        """Release the messages sent before `begin_plan`. Call it when all stages have reached this plan's
        optimizer step: they have received all messages of earlier plans.
        """
        while self._sent_before:
            work, _ = self._sent_before.popleft()
            work.wait()

    def flush(self) -> None:
        """Release all sent messages. Call it when the peers are known to have received them."""
        self.begin_plan()
        self.finish_last_plan()

    def _group(self, channel: Channel) -> dist.ProcessGroup:
        if self.device.type == "cpu":
            (group,) = self._groups.values()
            return group
        return self._groups[channel_kind(channel)]

    def _tag(self, channel: Channel) -> int:
        """The message's tag: both ends count the messages of a channel the same way. NCCL has no tags and
        keeps the order."""
        number = self._numbers.get(channel, 0)
        self._numbers[channel] = (number + 1) % _TAGS_PER_KIND
        return channel_kind(channel) * _TAGS_PER_KIND + number


def _lost(channel: Channel, stage: int, peer: int, error: Exception) -> StageTimeout:
    cause = str(error).splitlines()[0]
    return StageTimeout(
        f"stage {stage} (rank {peer}) on {channel} cannot be reached ({cause}): check its log"
    )
