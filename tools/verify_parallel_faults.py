"""Faults for `verify_parallel.py --self-test`: mistakes that trainers were seen to make, each planted into the ranks.

A fault is a function that changes the library in the process that calls it, and the cell in which it must be noticed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from megalite.comms.p2p import Link
from megalite.layers import linear, norm
from megalite.model.gpt import Stage
from megalite.training import engine
from megalite.training.engine import Engine
from megalite.training.parity_cells import Cell


@dataclass(frozen=True)
class Fault:
    name: str
    cell: Cell
    plant: Callable[[], None]


def drop_reduce_of_outputs() -> None:
    """g, of the row-parallel layers."""
    linear._RowParallel.forward = staticmethod(_without_all_reduce(linear._RowParallel.forward))


def drop_reduce_of_gradients() -> None:
    """f, of the column-parallel layers."""
    linear._ColumnParallel.backward = staticmethod(_without_all_reduce(linear._ColumnParallel.backward))


def _without_all_reduce(pass_of_layer: Callable) -> Callable:
    def run(*args):
        reduce, linear.start_all_reduce = linear.start_all_reduce, lambda x, name: x.clone()
        try:
            return pass_of_layer(*args)
        finally:
            linear.start_all_reduce = reduce

    return run


def divide_by_accumulation() -> None:
    """As where the engine's own scaling is left on."""
    whole = Engine.backward
    Engine.backward = lambda self, loss, is_last: whole(self, loss / self.engine.gradient_accumulation_steps(), is_last)


def keep_tied_gradients_apart() -> None:
    Engine._sum_tied_gradients = lambda self: None


def count_replicas_twice() -> None:
    """In the gradient norm: every tensor-parallel rank counts what it has, the norms' weights too."""
    whole = engine.make_optimizer

    def make_optimizer(parameters, *args):
        for parameter in parameters.values():
            parameter.model_parallel = True
        return whole(parameters, *args)

    engine.make_optimizer = make_optimizer


def count_tied_weight_twice() -> None:
    Engine.owns = lambda self, name: True


def take_the_message_before() -> None:
    """Each receive but the first gives what came for the micro-batch before."""
    whole = Link.receive
    before: dict[tuple, Tensor] = {}

    def receive(self, shape, dtype, stage, direction, tag):
        wait = whole(self, shape, dtype, stage, direction, tag)

        def late() -> Tensor:
            came = wait()
            gave = before.get((stage, direction), came)
            before[stage, direction] = came.clone()
            return gave.detach().clone()

        return late

    Link.receive = receive


def keep_norm_gradients_apart() -> None:
    """Of the norms between tensor-parallel layers, each of whose ranks sees a part of the sequence."""
    norm.sum_gradient = lambda weight, group: weight


def keep_old_gradients() -> None:
    """ZeRO-3's buffer is not cleared for a new step."""

    def begin_step(self) -> None:
        self.engine.train()
        self.engine.module()

    Engine.begin_step = begin_step


def drop_differently_on_each_rank() -> None:
    """Dropout of the residual stream, which tensor-parallel ranks hold alike."""
    whole = Stage._dropout

    def own(self, *args):
        dropout = whole(self, *args)
        return replace(dropout, seed=dropout.seed + self.tp.rank)

    Stage._dropout = own


FAULTS = [
    Fault("an all-reduce of outputs dropped", Cell(tensor=2), drop_reduce_of_outputs),
    Fault("an all-reduce of gradients dropped", Cell(tensor=2, data=2, zero="3"), drop_reduce_of_gradients),
    Fault("gradients divided by the micro-batches", Cell(data=2, zero="2"), divide_by_accumulation),
    Fault("a tied embedding not summed", Cell(pipeline=2, zero="1"), keep_tied_gradients_apart),
    Fault("replicated weights counted twice in the norm", Cell(tensor=2, zero="1"), count_replicas_twice),
    Fault("a tied embedding counted twice in the norm", Cell(pipeline=2, zero="3"), count_tied_weight_twice),
    Fault("another micro-batch's activations received", Cell(pipeline=2), take_the_message_before),
    Fault("norms' gradients not summed", Cell(tensor=2, sequence=True, zero="2"), keep_norm_gradients_apart),
    Fault("ZeRO-3's gradients not cleared", Cell(pipeline=2, virtual=2, zero="3"), keep_old_gradients),
    Fault("dropout that differs between ranks", Cell(tensor=2, variant="dropout"), drop_differently_on_each_rank),
]
