"""Who sits where: the launcher's environment, the grid of ranks (pure), and the process groups cut from it."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megalite.errors import ConfigError, UserError


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the launcher (deepspeed, torchrun, or plain python: one rank) says about this process."""

    rank: int
    local_rank: int
    world_size: int
    launched: bool  # by a launcher that gives a rendezvous address

    @staticmethod
    def read() -> "LaunchEnvironment":
        """From RANK, LOCAL_RANK and WORLD_SIZE; all three, or none of them."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        values = [os.environ.get(name) for name in names]
        if all(value is None for value in values):
            return LaunchEnvironment(0, 0, 1, launched=False)
        shown = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        try:
            rank, local_rank, world_size = (int(value) for value in values)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise ConfigError(
                f"launcher environment: {shown}: give all three as numbers, or unset them for one process"
            ) from None
        if not 0 <= rank < world_size or local_rank < 0:
            raise ConfigError(f"launcher environment: {shown}: ranks count from 0 to WORLD_SIZE - 1")
        return LaunchEnvironment(rank, local_rank, world_size, launched=True)


def pick_device(local_rank: int) -> torch.device:
    """This rank's device: a GPU where torch sees one, unless DS_ACCELERATOR=cpu (DeepSpeed's own variable) says no."""
    _share_cores()
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()};"
                " start as many processes as there are GPUs (deepspeed --num_gpus N)"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's detection then neither guesses nor logs
    return torch.device("cpu")


def _share_cores() -> None:
    """Divide the cores among this machine's ranks, unless OMP_NUM_THREADS does.

    Else each would take them all, and ranks that crowd each other out are several times slower.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))  # torchrun's; deepspeed's
        if ranks.isdecimal() and int(ranks) > 0:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(ranks)))


@dataclass(frozen=True)
class Grid:
    """Ranks laid out [pipeline, data, tensor], tensor fastest: its traffic is the heaviest, so it stays on one node."""

    pipeline: int
    data: int
    tensor: int

    @staticmethod
    def of(world_size: int, tensor: int, pipeline: int) -> "Grid":
        """Raises ConfigError where the ranks do not divide."""
        if world_size % (tensor * pipeline):
            raise ConfigError(
                f"parallel.tensor ({tensor}) x parallel.pipeline ({pipeline}) does not divide {world_size} ranks;"
                f" start a multiple of {tensor * pipeline}"
            )
        return Grid(pipeline, world_size // (tensor * pipeline), tensor)

    @property
    def ranks(self) -> np.ndarray:
        return np.arange(self.pipeline * self.data * self.tensor).reshape(self.pipeline, self.data, self.tensor)

    def tensor_groups(self) -> list[list[int]]:
        return self.ranks.reshape(-1, self.tensor).tolist()

    def data_groups(self) -> list[list[int]]:
        return self.ranks.transpose(0, 2, 1).reshape(-1, self.data).tolist()

    def model_groups(self) -> list[list[int]]:
        """The ranks that together hold one copy of the model; in a group, rank = pipeline * tensor_size + tensor."""
        return self.ranks.transpose(1, 0, 2).reshape(-1, self.pipeline * self.tensor).tolist()

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pipeline, data, tensor) of `rank`."""
        pipeline, data, tensor = np.unravel_index(rank, (self.pipeline, self.data, self.tensor))
        return int(pipeline), int(data), int(tensor)


class Topology:
    """The running grid: this rank's place and groups. Also the `mpu` object that DeepSpeed asks for its groups.

    DeepSpeed's "model parallel" group spans tensor and pipeline together, and there are deliberately no getters for
    tensor parallelism alone: with them DeepSpeed counts replicated parameters its own way, and the norm is wrong.
    """

    def __init__(self, environment: LaunchEnvironment, *, tensor: int, pipeline: int, timeout: timedelta):
        self.rank, self.world_size = environment.rank, environment.world_size
        self.local_rank = environment.local_rank
        self.grid = Grid.of(self.world_size, tensor, pipeline)
        self.pipeline_rank, self.data_rank, self.tensor_rank = self.grid.coordinates(self.rank)
        self.device = pick_device(self.local_rank)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if environment.launched:
            dist.init_process_group(backend, timeout=timeout)
        else:
            os.environ["LOCAL_RANK"] = "0"  # DeepSpeed's engine insists on it
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        # Objects and decisions travel over gloo: they need no device and do not queue behind its kernels.
        self.control_group = dist.new_group(backend="gloo", timeout=timeout)
        self.tensor_group = self._mine(self.grid.tensor_groups(), timeout)
        self.data_group = self._mine(self.grid.data_groups(), timeout)
        self.model_group = self._mine(self.grid.model_groups(), timeout)

    def _mine(self, groups: list[list[int]], timeout: timedelta) -> dist.ProcessGroup:
        """Every rank makes every group, in the same order; keeps the one that it is in."""
        made = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in groups]
        return next(group for ranks, group in made if self.rank in ranks)

    def together(self, action, *args, **kwargs) -> Any:
        """Run `action` on every rank; if it raises `UserError` on any, every rank raises that of the lowest.

        Without this, the rank that failed would leave and the others would wait for it.
        """
        result, failure = None, None
        try:
            result = action(*args, **kwargs)
        except UserError as error:
            failure = (type(error), str(error))
        failures = [failure for failure in self.gather_objects(failure) if failure]
        if failures:
            error_type, message = failures[0]
            raise error_type(message).everywhere()
        return result

    def on_first(self, action, *args, **kwargs) -> Any:
        """Run `action` on rank 0 alone; every rank gets its result, or raises its `UserError`."""
        result = self.together(lambda: action(*args, **kwargs) if self.rank == 0 else None)
        return self.gather_objects(result)[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order. Objects of our own ranks only: they travel pickled."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def close(self) -> None:
        """Once all ranks are here: rank 0 may serve the store that the others' groups rest on."""
        dist.barrier(group=self.control_group)
        dist.destroy_process_group()

    # The mpu that DeepSpeed calls.
    def get_data_parallel_group(self):
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.grid.data

    def get_model_parallel_group(self):
        return self.model_group

    def get_model_parallel_rank(self) -> int:
        return self.pipeline_rank * self.grid.tensor + self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.grid.pipeline * self.grid.tensor
