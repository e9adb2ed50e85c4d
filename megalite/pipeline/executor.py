"""Runs a schedule's actions on one stage: the only training path, whatever the number of stages.

A stage has one or more chunks of the model (virtual stages). Chunk c of the whole model is chunk c // stages of stage
c % stages. Shapes: s positions of this rank, b sequences, h hidden.
"""

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor

from megalite.comms.p2p import Link
from megalite.data.batch import Batch
from megalite.pipeline.schedules import Action, receives_from, sends_to

Forward = Callable[[int, int, Batch, Tensor | None], Tensor]


class Executor:
    """Runs actions on one stage of `stages`.

    forward(chunk, micro_batch, batch, hidden) gives this stage's chunk number `chunk` the hidden [s, b, h] that arrived
    (None: the model's first) and returns what goes on, from the model's last chunk the summed loss of the batch.
    message(batch): shape and dtype of hidden between stages. link: None for one stage. watch(what) is told each action
    as it begins.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        message: Callable[[Batch], tuple[tuple[int, ...], torch.dtype]],
        stage: int = 0,
        stages: int = 1,
        virtual: int = 1,
        link: Link | None = None,
        watch: Callable[[str], None] = lambda what: None,
    ):
        self.forward, self.message, self.link, self.watch = forward, message, link, watch
        self.stage, self.stages, self.virtual = stage, stages, virtual

    def run(self, actions: list[Action], batches: list[Batch], backward: Callable[[Tensor, bool], None]) -> Tensor:
        """Run `actions` over the micro-batches; returns the sum of their loss, fp64, 0 unless this is the last stage.

        backward(scalar, is_last) differentiates the summed loss of a micro-batch, scaled as it pleases, or on other
        stages a scalar whose gradient is what the next stage sent, whatever it is scaled by. is_last marks this rank's
        last backward of the step, after which gradients may be reduced.
        """
        last_backward = max((i for i, action in enumerate(actions) if action.kind == "backward"), default=None)
        training = last_backward is not None
        if self.link is not None:
            self.link.agree(*self.message(batches[0]))
        arriving = _Arrivals(self, actions, batches)
        kept: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}  # (chunk, micro-batch): hidden, result
        total = torch.zeros((), dtype=torch.float64, device=batches[0].tokens.device)
        for i, action in enumerate(actions):
            kind, m, chunk = action
            self.watch(f"{kind} of micro-batch {m}" + (f", chunk {chunk}" if self.virtual > 1 else ""))
            received = arriving.take()
            last = self.stage == self.stages - 1 and chunk == self.virtual - 1
            if kind == "forward":
                hidden = None if received is None else received.requires_grad_(training)
                result = self.forward(chunk, m, batches[m], hidden)
                if last:
                    total += result.detach()
                else:
                    self._send(result.detach(), action)
                if training:
                    kept[chunk, m] = hidden, result
                continue
            hidden, result = kept.pop((chunk, m))
            backward(result if last else _Receive.apply(result, received), i == last_backward)
            del result
            if hidden is not None:
                self._send(hidden.grad, action)
        if self.link is not None:
            self.link.finish()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, float]:
        """Summed loss over the valid tokens of `batches`, and the number of those; zeros unless this is the last stage.

        All stages of a pipeline have the same batches.
        """
        total, valid = 0.0, 0.0
        remaining = iter(batches)
        while some := list(islice(remaining, self.stages)):  # enough to keep every stage busy
            actions = [Action("forward", m, chunk) for chunk in range(self.virtual) for m in range(len(some))]
            total += self.run(actions, some, _never).item()
            if self.stage == self.stages - 1:
                valid += sum(batch.loss_mask.sum().item() for batch in some)
        return total, valid

    def _send(self, tensor: Tensor, action: Action) -> None:
        stage, chunk = sends_to(action, self.stage, self.stages, self.virtual)
        self.link.send(tensor, stage, action.kind, self._tag(action.micro_batch, chunk))

    def _receive(self, action: Action, batch: Batch) -> Callable[[], Tensor] | None:
        source = receives_from(action, self.stage, self.stages, self.virtual)
        if source is None:
            return None
        tag = self._tag(action.micro_batch, action.chunk)
        return self.link.receive(*self.message(batch), source[0], action.kind, tag)

    def _tag(self, micro_batch: int, chunk: int) -> int:
        """Of a message to that chunk of another stage."""
        return micro_batch * self.virtual + chunk


class _Arrivals:
    """The messages that actions wait for, each asked for two actions ahead, so that it travels while those compute.

    Two, as that is what the schedules need where a send waits for its receive (`simulator.py`, `ahead`).
    """

    def __init__(self, executor: Executor, actions: list[Action], batches: list[Batch]):
        self.executor, self.actions, self.batches = executor, actions, batches
        self.asked: deque[Callable[[], Tensor] | None] = deque()  # for this action and those behind it
        self.next = 0

    def take(self) -> Tensor | None:
        """What the next action needs; None where it needs nothing."""
        while len(self.asked) < 3 and self.next < len(self.actions):
            action = self.actions[self.next]
            self.asked.append(self.executor._receive(action, self.batches[action.micro_batch]))
            self.next += 1
        wait = self.asked.popleft()
        return None if wait is None else wait()


class _Receive(torch.autograd.Function):
    """A scalar whose backward gives `result` the gradient that arrived, whatever the engine scales the scalar by."""

    @staticmethod
    def forward(ctx, result: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return torch.zeros((), dtype=torch.float32, device=result.device)

    @staticmethod
    def backward(ctx, _):
        return ctx.gradient, None


def _never(loss: Tensor, is_last: bool) -> None:
    raise AssertionError("no action asks for a backward")
