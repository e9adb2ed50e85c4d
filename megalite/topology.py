"""Who sits where: the launcher's environment, the grid of ranks (pure), and the process groups cut from it."""

import ctypes
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megalite.errors import ConfigError, UserError, nearest_multiples


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the launcher (deepspeed, torchrun, srun, or plain python: one rank) says about this process."""

    rank: int
    local_rank: int  # which of the GPUs that this process sees
    world_size: int
    launched: bool  # by a launcher that gives a rendezvous address

    @staticmethod
    def read() -> "LaunchEnvironment":
        """From RANK, LOCAL_RANK and WORLD_SIZE, all three or none of them; srun's own are put in their form first."""
        LaunchEnvironment._translate_slurm()
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
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
        if not address or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(
                f"launcher environment: MASTER_ADDR={address}, MASTER_PORT={port or None}: give rank 0's host and a"
                " free port on it, the same on every rank"
            )
        return LaunchEnvironment(rank, local_rank, world_size, launched=True)

    @staticmethod
    def _translate_slurm() -> None:
        """Set from SLURM's variables those that torch and DeepSpeed read, where srun started this process.

        Not for children of another launcher under srun, which have a RANK. Nor in a batch script, which is no step; nor
        in a step of one task, such as an interactive shell, where SLURM_NTASKS counts tasks that nobody started.
        """
        said = os.environ
        if "RANK" in said or "SLURM_STEP_ID" not in said or said.get("SLURM_STEP_NUM_TASKS") == "1":
            return
        names = ("PROCID", "LOCALID", "STEP_NUM_TASKS", "STEP_NUM_NODES", "STEP_NODELIST", "JOB_ID", "CPUS_ON_NODE")
        missing = [f"SLURM_{name}" for name in names if f"SLURM_{name}" not in said]
        if missing:
            raise ConfigError(
                f"launcher environment: SLURM_STEP_ID is set, but not {', '.join(missing)}: start with srun, or unset"
                " SLURM_STEP_ID for one process"
            )
        rank, local_rank, tasks, nodes, node_list, job, cores = (said[f"SLURM_{name}"] for name in names)
        if said.get("CUDA_VISIBLE_DEVICES") and "," not in said["CUDA_VISIBLE_DEVICES"]:
            local_rank = "0"  # this task sees one GPU alone (srun --gpus-per-task, --gpu-bind)
        said.update(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=tasks)
        # n[01-04,07],m1 -> n01: tasks are counted from the first node of the list.
        said.setdefault("MASTER_ADDR", re.sub(r"\[([^],-]+)[^]]*\]", r"\1", node_list).partition(",")[0])
        # Of its own for each job, and for each start of it: the last one's may still be taken.
        attempt = int(said.get("SLURM_RESTART_COUNT", "0"))
        said.setdefault("MASTER_PORT", str(20000 + (int(job) + attempt) % 20000))
        if len(os.sched_getaffinity(0)) >= int(cores):  # not bound to cores of its own: the tasks share them
            said.setdefault("LOCAL_WORLD_SIZE", str(-(-int(tasks) // int(nodes))))


def slurm_start() -> tuple[str, int] | None:
    """(SLURM job that this process is part of, how often that was taken back to the queue and started again)."""
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return (job, int(restarts)) if job and restarts.isdecimal() else None


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
    _keep_freed_memory()
    return torch.device("cpu")


def _keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one.

    Else it gives large blocks back to the system at once, and each step pays for its pages again: a twentieth of it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # neither on macOS nor in musl
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 2**31 - 1)


def _share_cores() -> None:
    """Divide the cores among this machine's ranks, unless OMP_NUM_THREADS does.

    Else each would take them all, and ranks that crowd each other out are several times slower.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))  # torchrun's; deepspeed's
        if ranks.isdecimal() and int(ranks) > 0:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(ranks)))


AXES = ("pipeline", "data", "context", "tensor")


@dataclass(frozen=True)
class Grid:
    """Ranks laid out [pipeline, data, context, tensor], the last fastest.

    Neighbours in rank are neighbours in the machine, so the axis with the most traffic varies fastest: tensor
    parallelism waits for several collectives in each layer and stays on one node; context exchanges heads in each
    layer; data sums gradients once a step, beside other work; pipeline sends one activation a micro-batch, and may
    cross nodes.
    """

    pipeline: int
    data: int
    context: int
    tensor: int

    @staticmethod
    def of(world_size: int, *, tensor: int = 1, pipeline: int = 1, context: int = 1) -> "Grid":
        """The rest of the ranks is data parallel. Raises ConfigError where they do not divide."""
        copies = tensor * pipeline * context
        if world_size % copies:
            sizes = {"tensor": tensor, "pipeline": pipeline, "context": context}
            named = " x ".join(f"parallel.{name} ({size})" for name, size in sizes.items() if size > 1)
            ranks = nearest_multiples(world_size, copies)
            raise ConfigError(f"{named} does not divide {world_size} ranks; start {ranks}, or change the sizes")
        return Grid(pipeline, world_size // copies, context, tensor)

    @property
    def zero(self) -> int:
        """How many ranks hold the same part of the model: ZeRO divides its states among them."""
        return self.data * self.context

    @property
    def ranks(self) -> np.ndarray:
        shape = (self.pipeline, self.data, self.context, self.tensor)
        return np.arange(np.prod(shape)).reshape(shape)

    def groups(self, *axes: str) -> list[list[int]]:
        """All groups of ranks that differ along `axes` alone; in a group they stand in the grid's order."""
        along = [i for i, axis in enumerate(AXES) if axis in axes]
        across = [i for i, axis in enumerate(AXES) if axis not in axes]
        ranks = self.ranks.transpose(*across, *along)
        return ranks.reshape(-1, int(np.prod([self.ranks.shape[i] for i in along]))).tolist()

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(pipeline, data, context, tensor) of `rank`."""
        pipeline, data, context, tensor = map(int, np.unravel_index(rank, self.ranks.shape))
        return pipeline, data, context, tensor


class Topology:
    """The running grid: this rank's place and groups. Also the `mpu` object that DeepSpeed asks for its groups.

    DeepSpeed's "model parallel" group spans tensor and pipeline together, and there are deliberately no getters for
    tensor parallelism alone: with them DeepSpeed counts replicated parameters its own way, and the norm is wrong.
    """

    def __init__(
        self,
        environment: LaunchEnvironment,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        context: int = 1,
        timeout: timedelta,
        store: dist.Store | None = None,
    ):
        """store: where the ranks meet; default: at the address that the launcher gives."""
        self.rank, self.world_size = environment.rank, environment.world_size
        self.local_rank = environment.local_rank
        self.grid = Grid.of(self.world_size, tensor=tensor, pipeline=pipeline, context=context)
        self.pipeline_rank, self.data_rank, self.context_rank, self.tensor_rank = self.grid.coordinates(self.rank)
        self.zero_rank = self.data_rank * context + self.context_rank
        self.timeout = timeout
        self.device = pick_device(self.local_rank)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if not environment.launched:
            store = dist.HashStore()
        if store is None:
            dist.init_process_group(backend, timeout=timeout)
        else:
            os.environ["LOCAL_RANK"] = str(self.local_rank)  # DeepSpeed's engine insists on it
            place = {"rank": self.rank, "world_size": self.world_size}
            dist.init_process_group(backend, store=store, timeout=timeout, **place)
        # Objects and decisions travel over gloo: they need no device and do not queue behind its kernels.
        self.control_group = dist.new_group(backend="gloo", timeout=timeout)
        self.tensor_group = self.new_group(self._mine("tensor"))
        self.context_group = self.new_group(self._mine("context"))
        # The ranks that hold the same part of the model: ZeRO's.
        self.zero_group = self.new_group(self._mine("data", "context"))
        # The ranks that together hold one copy of the model; in it, rank = pipeline * tensor_size + tensor.
        self.model_group = self.new_group(self._mine("pipeline", "tensor"))
        # Each value that tensor-parallel ranks hold alike is in it once: for sums over all data and stages.
        self.sum_group = self.new_group(self._mine("pipeline", "data", "context"))

    def _mine(self, *axes: str) -> list[int]:
        return next(ranks for ranks in self.grid.groups(*axes) if self.rank in ranks)

    def new_group(self, ranks: list[int]) -> dist.ProcessGroup:
        """A group of `ranks`, of which this is one. They alone wait for each other: a cluster makes its groups at once.

        Every rank has to make the same number of groups before, as torch derives the group's name from that.
        """
        return dist.new_group(ranks, timeout=self.timeout, use_local_synchronization=True)

    def part_of_tensor_group(self, size: int) -> dist.ProcessGroup:
        """The group of `size` neighbours in the tensor group that this rank is one of."""
        ranks, first = self._mine("tensor"), self.tensor_rank // size * size
        return self.new_group(ranks[first : first + size])

    def ends_of_pipeline(self) -> dist.ProcessGroup | None:
        """The group of this pipeline's first and last stage; None on a rank that is neither. All ranks call this."""
        ends = sorted({self.pipeline_ranks[0], self.pipeline_ranks[-1]})
        mine = self.new_group(ends if self.rank in ends else [self.rank])  # all make one: see new_group
        return mine if self.rank in ends else None

    @property
    def pipeline_ranks(self) -> list[int]:
        """The ranks of this pipeline's stages, in their order."""
        return self._mine("pipeline")

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
        return self.zero_group

    def get_data_parallel_rank(self) -> int:
        return self.zero_rank

    def get_data_parallel_world_size(self) -> int:
        return self.grid.zero

    def get_model_parallel_group(self):
        return self.model_group

    def get_model_parallel_rank(self) -> int:
        return self.pipeline_rank * self.grid.tensor + self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.grid.pipeline * self.grid.tensor
