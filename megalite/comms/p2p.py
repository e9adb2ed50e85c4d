"""How activations and their gradients move between the stages of a pipeline. Shapes: [s, b, h], as between layers."""

from collections import deque
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Direction = Literal["forward", "backward"]


class Link:
    """One rank's messages to and from the other stages of its pipeline; sending and receiving never block computation.

    ranks: the pipeline's ranks, by stage. stage: this one. new_group(ranks) makes a process group; all ranks of the
    pipeline make as many. wraps: whether the last stage sends to the first too (virtual stages).

    Each direction has a process group of its own, and so has the way from the last stage around to the first. So
    between two ranks one group carries messages one way only. NCCL, which knows no tags and does what a group is asked
    in order, then waits for nothing but the matching call: no pair of stages can wait for each other crosswise, and
    receives may be asked for early. They must be asked for in the order of the sends, as schedules have them
    (`simulator.py` proves it).
    """

    def __init__(
        self,
        ranks: list[int],
        stage: int,
        new_group: Callable[[list[int]], dist.ProcessGroup],
        device: torch.device,
        wraps: bool,
    ):
        self.ranks, self.stage, self.device = ranks, stage, device
        ways = [(direction, around) for direction in ("forward", "backward") for around in ((False, True)[: 1 + wraps])]
        self._groups = {way: new_group(ranks) for way in ways}
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()
        self._agreed = False

    def agree(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Once, before the first message: neighbours say what they take a message for. Collective over the pipeline.

        Bytes of another shape would pass for numbers, so RuntimeError where they differ. Pair by pair, as NCCL connects
        two ranks at their first message and blocks both until then, which a receive asked for early must not.
        """
        if self._agreed:
            return
        self._agreed = True
        mine = torch.tensor([_DTYPES.index(dtype), len(shape), *shape], device=self.device)
        told = torch.empty_like(mine)
        for (direction, around), group in self._groups.items():
            for before in range(len(self.ranks)):
                after = (before + 1) % len(self.ranks)
                sender, receiver = (before, after) if direction == "forward" else (after, before)
                if around != (after == 0):
                    continue
                if self.stage == sender:
                    dist.isend(mine, self.ranks[receiver], group).wait()
                elif self.stage == receiver:
                    dist.irecv(told, self.ranks[sender], group).wait()
                    if not torch.equal(told, mine):
                        raise RuntimeError(
                            f"stage {sender} sends messages of [dtype's number, dimensions, sizes] {told.tolist()}, but"
                            f" stage {receiver} takes {mine.tolist()}"
                        )

    def send(self, tensor: Tensor, stage: int, direction: Direction, tag: int) -> None:
        """Begin to send to `stage`. tag: what the receiver asks for."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        tensor = tensor.contiguous()
        group = self._group(direction, self.stage, stage)
        # The tensor is kept until it has gone. (gloo says so of none before `finish`.)
        self._sending.append((dist.isend(tensor, self.ranks[stage], group, tag), tensor))

    def receive(
        self, shape: tuple[int, ...], dtype: torch.dtype, stage: int, direction: Direction, tag: int
    ) -> Callable[[], Tensor]:
        """Begin to receive from `stage`; returns a function that waits for the tensor and gives it."""
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        work = dist.irecv(tensor, self.ranks[stage], self._group(direction, stage, self.stage), tag)

        def wait() -> Tensor:
            work.wait()
            return tensor

        return wait

    def finish(self) -> None:
        """Wait until everything has been sent."""
        while self._sending:
            self._sending[0][0].wait()
            self._sending.popleft()

    def _group(self, direction: Direction, sender: int, receiver: int) -> dist.ProcessGroup:
        before, after = (sender, receiver) if direction == "forward" else (receiver, sender)
        return self._groups[direction, after != before + 1]


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
