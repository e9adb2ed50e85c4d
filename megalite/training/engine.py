"""DeepSpeed's engine under our own schedule. The only file that imports deepspeed.

DeepSpeed's engine wants to own the forward pass and counts micro-batches itself; we call the model directly and tell it
which backward is the step's last. That leans on names that are not public, so the version is pinned and
`tests/dist/test_pretrain.py` compares every ZeRO stage on two ranks with one process.
"""

import contextlib
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from megalite.comms.collectives import Group
from megalite.config import Config
from megalite.data.batch import Batch
from megalite.layers.attention import Attend
from megalite.model.gpt import Stage
from megalite.topology import Topology
from megalite.training import muon
from megalite.training.checkpoint_reader import MOMENTS, Slice
from megalite.training.optimizer import make_optimizer
from megalite.training.requirements import zero_stage

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecation notices of its dependencies, at import
    import deepspeed
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3
    from deepspeed.sequence.layer import DistributedAttention
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_get_local_grad,
        safe_set_local_fp32_param,
        safe_set_local_grad,
        safe_set_local_optimizer_state,
        set_z3_leaf_module,
    )

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TIED = "embedding.weight"  # the parameter that the head shares when embeddings are tied
COMPILER = "inductor"  # the backend of torch.compile


class _Root(nn.Module):
    """What DeepSpeed sees as the model. Its forward does nothing: the schedule calls the stage itself.

    Calling it once a step lets ZeRO-3's fetch trace span the whole schedule instead of one forward, and so gather ahead
    across micro-batches and virtual stages.
    """

    def __init__(self, chunks: list[nn.Module]):
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    def forward(self) -> None:
        return None


class Engine:
    """This rank's part of the model, its optimizer and ZeRO; `chunks` are the modules that the schedule calls.

    build_chunks(attend) makes them (one, or one for each virtual stage) with fp32 parameters that carry `global_name`;
    attend: what exchanges heads for positions under context parallelism, or None. ds_config: the user's DeepSpeed
    settings; what MegaLite decides is added here. What must go together, `requirements.py` knows.
    """

    def __init__(
        self,
        config: Config,
        ds_config: dict,
        topology: Topology,
        build_chunks: Callable[[Attend | None], list[Stage]],
        accumulation: int,
    ):
        training = config.training
        offload = ds_config.get("zero_optimization", {}).get("offload_optimizer", {})
        self.zero_stage, self.offload = zero_stage(ds_config), offload.get("device", "none") != "none"
        self.device, self.topology = topology.device, topology
        self.dtype = DTYPES[training.precision]
        self.max_grad_norm = training.max_grad_norm
        _prepare(topology, config.logging.deepspeed_level)

        settings = {
            **ds_config,
            "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": training.max_grad_norm if self.zero_stage else 0.0,  # stage 0: see step()
            "steps_per_print": 2**62,
            "zero_allow_untested_optimizer": True,
            # A torch optimizer object and no JIT-compiled DeepSpeedCPUAdam, which needs a compiler on every machine.
            "zero_force_ds_cpu_optimizer": False,
        }
        if self.zero_stage and training.precision == "bf16":
            settings["bf16"] = {"enabled": True}
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        elif training.precision == "fp16":
            settings["fp16"] = {"enabled": True}  # loss_scale 0, the default, is dynamic

        attend = ulysses(topology.context_group) if topology.grid.context > 1 else None
        if self.zero_stage == 3:
            # Each layer's parameters are partitioned as soon as it is built: no rank ever holds the whole model.
            with deepspeed.zero.Init(
                data_parallel_group=topology.zero_group, config_dict_or_path=settings, mpu=topology
            ):
                self.chunks = build_chunks(attend)
        else:
            self.chunks = [chunk.to(self.device) for chunk in build_chunks(attend)]
        for chunk in self.chunks if training.compile == "blocks" else ():
            chunk.compile_blocks(COMPILER)
            if self.zero_stage == 3:
                # A block's parameters are gathered when it begins, all at once: hooks inside would break its graph.
                for block in chunk.blocks:
                    set_z3_leaf_module(block, True)
        root = _Root(self.chunks)
        self.parameters = {p.global_name: p for p in root.parameters()}
        self.tied, self.tied_group = self._find_tied(config.model.tie_embeddings)
        for name, parameter in self.parameters.items():
            # Whether this rank counts the parameter in the global norm. A tensor-parallel slice is counted by each
            # rank, a replica only by the first, a tied weight where the embedding is. (Megatron's usual marks count
            # replicas wrongly here.)
            first = parameter.tp_dim is not None or topology.tensor_rank == 0
            parameter.model_parallel = first and self.owns(name)

        optimizer = make_optimizer(self.parameters, training, self.tied)
        matrices = muon.split(self.parameters)[0] if training.optimizer == "muon" else {}
        self.moments = {name: muon.MOMENTS if name in matrices else MOMENTS for name in self.parameters}
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=root, optimizer=optimizer, config=settings, mpu=topology
        )
        # ZeRO's optimizers wrap ours; at stage 0 DeepSpeed keeps ours as it is.
        self.is_zero = hasattr(self.optimizer, "clear_backward_seen_flag")
        self.adam = self.optimizer.optimizer if self.is_zero else self.optimizer
        if hasattr(self.optimizer, "_model_parallel_all_reduce"):  # not ZeRO-0, nor ZeRO-1 in bf16
            self._sum_norm_once()
        if hasattr(self.optimizer, "get_grads_for_norm"):  # ZeRO-1 in bf16
            self._allow_no_norm()
        # Of several chunks only that of the rank's last backward would have its gradients taken to the host.
        self.hands_over_late = self.offload and self.zero_stage > 1 and len(self.chunks) > 1
        self.awaited: dict[int, list[tuple[nn.Module, int]]] = {}  # see backward

    def _sum_norm_once(self) -> None:
        """Have ZeRO add the squared norms of a model's ranks once a step.

        DeepSpeed adds those of each parameter group (at ZeRO-3 of each part of one), of which stages have different
        numbers, and so would wait for each other for ever.
        """
        optimizer = self.optimizer
        name = "_get_norm_groups" if self.zero_stage == 3 else "scaled_global_norm"
        whole, add = getattr(optimizer, name), optimizer._model_parallel_all_reduce

        def norm():
            optimizer._model_parallel_all_reduce = lambda tensor, op: None
            try:
                norms = whole()
            finally:
                optimizer._model_parallel_all_reduce = add
            norms = torch.stack(norms if self.zero_stage == 3 else [norms]).to(self.device, torch.float64)
            squares = torch.where(norms < 0, math.inf, norms.square()).sum()  # -1 stands for one that is not finite
            add(squares, torch.distributed.ReduceOp.SUM)
            total = torch.where(squares.isfinite(), squares.sqrt(), -1.0)
            return [total] if self.zero_stage == 3 else total

        setattr(optimizer, name, norm)

    def _allow_no_norm(self) -> None:
        """Let a rank count no parameter: of a stage without blocks the second tensor-parallel rank has only replicas,
        and the tied weight, which is counted elsewhere. DeepSpeed would stack an empty list."""
        whole, nothing = self.optimizer.get_grads_for_norm, torch.zeros(1, device=self.device)

        def gradients(for_clipping: bool = False):
            if for_clipping:
                return whole(for_clipping=True)
            counted, of_experts = whole()
            return counted or [nothing], of_experts

        self.optimizer.get_grads_for_norm = gradients

    # One training step: begin_step, then backward per micro-batch, then step.

    def begin_step(self) -> None:
        self.engine.train()
        self.engine.module()
        if self.zero_stage == 3:
            # Without this a parameter whose first backward is not the step's first adds to last step's gradient.
            self.optimizer.grad_partitions_flat_buffer.zero_()
            self.optimizer.micro_step_id = 1
        if self.hands_over_late and self.zero_stage == 2:
            for kept in self.optimizer.accumulated_grads_in_cpu.values():  # as above
                kept.zero_()

    def forward(self, chunk: int, batch: Batch, hidden: Tensor | None = None, samples: Tensor | None = None) -> Tensor:
        """Through chunk number `chunk`: hidden [s, b, h], or the micro-batch's summed loss; arguments as `Stage`'s.

        bf16 at ZeRO-0 is an fp32 engine under autocast: DeepSpeed's stage-0 bf16 has no fp32 accumulation.
        """
        autocast = self.zero_stage == 0 and self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=autocast):
            result = self.chunks[chunk](
                batch.tokens,
                batch.positions,
                batch.labels,
                batch.loss_mask,
                hidden=hidden,
                documents=batch.documents,
                samples=samples,
            )
        if self.zero_stage == 3 and torch.is_grad_enabled():
            modules = self.chunks[chunk].modules()
            self.awaited[chunk] = [
                (each, each.ds_grads_remaining) for each in modules if hasattr(each, "ds_grads_remaining")
            ]
        return result

    def message(self, batch: Batch) -> tuple[tuple[int, int, int], torch.dtype]:
        """Shape and dtype of hidden between stages; under autocast the residual stream stays fp32."""
        b, s = batch.tokens.shape
        stage = self.chunks[0]
        s //= stage.tp.size if stage.tp.sequence else 1
        return (s, b, stage.model.hidden_size), self.dtype if self.zero_stage else torch.float32

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Differentiate a scalar; gradients are averaged over the ranks of the ZeRO group after the last one."""
        # ZeRO-3 frees a module's parameters when as many gradients have come as its last forward had inputs. With
        # several micro-batches in flight that held for the first backward alone, and the others freed nothing.
        for modules in self.awaited.values():
            for module, gradients in modules:
                module.ds_grads_remaining = gradients
        if self.is_zero:
            self.optimizer.clear_backward_seen_flag()
        self.engine.set_gradient_accumulation_boundary(is_last)
        if self.is_zero:
            self.engine._backward_prologue()
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> tuple[float, bool]:
        """Clip, update and clear the gradients; returns (their global norm before clipping, whether it was applied).

        A step with a gradient that is not finite is not applied: (nan, False). fp16 then lowers its loss scale; in
        other precisions the run is lost.
        """
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        if self.hands_over_late:
            self.optimizer.finalize_gradient_accumulation_boundary()
        if self.tied is not None:
            self._sum_tied_gradients()
        norm = None
        if self.zero_stage == 0:
            # DeepSpeed clips here but does not tell the norm; one computation gives both.
            # In fp64, like ZeRO's own: torch's fp32 norm on CPU was seen 5e-5 off.
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None and p.model_parallel]
            squares = torch.zeros((), dtype=torch.float64, device=self.device)
            for gradient in gradients:
                squares += torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2
            torch.distributed.all_reduce(squares, group=self.topology.model_group)
            norm = squares.sqrt()
            if not torch.isfinite(norm):
                self.engine.zero_grad()
                return math.nan, False
            if self.max_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_grad_norm, norm.float())
        self.engine.step()
        if getattr(self.optimizer, "overflow", False):
            return math.nan, False
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        return float(norm), True

    def _find_tied(self, tie_embeddings: bool) -> tuple[nn.Parameter | None, torch.distributed.ProcessGroup | None]:
        """The weight that first and last stage both have, on these, and the group of the two; else (None, None)."""
        if not tie_embeddings or self.topology.grid.pipeline == 1:
            return None, None
        group = self.topology.ends_of_pipeline()
        return (None, None) if group is None else (self.parameters[TIED], group)

    def owns(self, name: str) -> bool:
        """Whether it is this stage that counts and saves the parameter: of a tied weight there are two."""
        return name != TIED or self.topology.pipeline_rank == 0

    def _sum_tied_gradients(self) -> None:
        """Add the gradients of both copies, wherever ZeRO keeps them after its reduction, in fp32 or as they are.

        The copy has a parameter group of its own, the last: so both ranks have the same part of it.
        """
        optimizer = self.optimizer
        if self.zero_stage == 3:
            gradient = safe_get_local_grad(self.tied).clone()
            torch.distributed.all_reduce(gradient, group=self.tied_group)
            safe_set_local_grad(self.tied, gradient.view(self.tied.ds_tensor.shape))
            return
        if self.zero_stage == 0:
            gradients = [self.tied.grad]
        elif hasattr(optimizer, "fp32_groups_gradients"):  # what DeepSpeed runs at ZeRO-1 in bf16
            gradients = [optimizer.fp32_groups_gradients[-1][0]]
        elif self.offload:
            gradients = [optimizer.single_partition_of_fp32_groups[-1].grad]
        else:
            gradients = optimizer.averaged_gradients[len(optimizer.bit16_groups) - 1]
        for gradient in gradients:
            torch.distributed.all_reduce(gradient, group=self.tied_group)
        if self.zero_stage and self.offload:
            # Its norm was taken as it arrived.
            number = optimizer.get_param_id(self.tied)
            if number in optimizer.norm_for_param_grads:
                _, _, start, length = optimizer.grad_position[number]
                part = gradients[0].view(-1).narrow(0, start, length)
                optimizer.norm_for_param_grads[number] = part.double().norm(2)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """`forward` in evaluation mode."""
        self.engine.eval()
        self.engine.module()
        try:
            yield
        finally:
            self.engine.train()

    # State by global name, for checkpoints that belong to no layout.

    @property
    def adam_step(self) -> int:
        """How many steps were applied: skipped ones (fp16) do not count in Adam's bias correction."""
        return next((int(state["step"]) for state in self.adam.state.values() if "step" in state), 0)

    def begin_gather(self) -> None:
        """Before a series of `gather`: make sure that every parameter has moments to give."""
        if not any(MOMENTS[0] in state for state in self.adam.state.values()):
            self.begin_load(0)  # no step was applied yet, and Adam makes its moments with the first
        self._link_moments()

    def gather(self, name: str, key: str) -> Tensor:
        """A parameter's fp32 "weight", or one of its `moments`: this tensor-parallel rank's slice, whole over ZeRO.

        Collective over ZeRO's group, between `begin_gather` and the next step. Where one rank has all of it this is the
        tensor itself.
        """
        parameter = self.parameters[name]
        if self.zero_stage == 0:
            return parameter.detach() if key == "weight" else self.adam.state[parameter][key]
        if self.zero_stage < 3 and self.topology.grid.zero == 1:  # all of it is here, and DeepSpeed would copy it twice
            return _master(parameter, key).detach().view(parameter.shape)
        full = safe_get_full_fp32_param(parameter) if key == "weight" else safe_get_full_optimizer_state(parameter, key)
        return full.detach().view(parameter.ds_shape if self.zero_stage == 3 else parameter.shape)

    def begin_load(self, step: int) -> None:
        """Before a series of `load_state`: make the moments, zero, as after `step` applied steps."""
        if self.zero_stage:
            masters = [(flat, MOMENTS) for flat in self._flat_masters()]
        else:
            masters = [(parameter, self.moments[name]) for name, parameter in self.parameters.items()]
        for master, moments in masters:
            self.adam.state[master] = {key: torch.zeros_like(master) for key in moments}
            if moments == MOMENTS:
                self.adam.state[master]["step"] = torch.tensor(float(step), device=master.device)
        self._link_moments()

    def part(self, name: str) -> Slice:
        """What this rank keeps of a parameter, and so what `load_state` wants: its tensor-parallel slice, of that
        under ZeRO the elements whose fp32 master is here."""
        parameter, grid, zero_rank = self.parameters[name], self.topology.grid, self.topology.zero_rank
        first, last = 0, None
        if self.zero_stage == 3:
            size = parameter.ds_tensor.ds_numel  # the same on each rank: the last one's is padded
            first, last = (min(rank * size, parameter.ds_numel) for rank in (zero_rank, zero_rank + 1))
        elif self.zero_stage:
            fragment = parameter._hp_mapping  # None where other ranks have all of it
            first, last = 0, 0
            if fragment is not None:
                first = fragment.lp_fragment_address.start
                last = first + fragment.lp_fragment_address.numel
        split = parameter.tp_dim is not None and grid.tensor > 1
        place = (parameter.tp_dim, parameter.tp_segments, grid.tensor, self.topology.tensor_rank) if split else ()
        return Slice(*place, first=first, last=last)

    def load_state(self, name: str, tensors: dict[str, Tensor]) -> None:
        """The inverse of `gather`: {"weight", and each of its `moments`}, of each the `part` of this rank, flat."""
        parameter = self.parameters[name]
        for key, tensor in tensors.items():
            if self.zero_stage == 0:
                kept = parameter.data if key == "weight" else self.adam.state[parameter][key]
                kept.copy_(tensor.view(kept.shape))
            elif self.zero_stage == 3:
                # safe_set_full_* fails on partitions with padding; a zero-padded slice is what each rank holds.
                local = torch.zeros(parameter.ds_tensor.ds_numel)
                local[: tensor.numel()] = tensor
                if key == "weight":
                    safe_set_local_fp32_param(parameter, local)
                else:
                    safe_set_local_optimizer_state(parameter, local, key)
            elif parameter._hp_mapping is not None:
                _master(parameter, key).data.copy_(tensor)

    def end_load(self) -> None:
        """After a series of `load_state`: refresh the weights that forward uses from the fp32 masters."""
        if self.zero_stage == 3:
            for group in range(len(self.optimizer.fp16_groups)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            # What is gathered, as small parameters always are once used, is gathered anew.
            self.optimizer.empty_partition_cache()
        elif self.zero_stage:
            self.optimizer.update_lp_params()

    def _link_moments(self) -> None:
        """Let ZeRO-1 and 2 find the moments of every parameter group.

        They link them when the first group has stepped, which misses the later groups.
        """
        if self.zero_stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_masters(self) -> list[Tensor]:
        """ZeRO's own fp32 tensors, which are what Adam has its state for."""
        names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
        return next(getattr(self.optimizer, name) for name in names if hasattr(self.optimizer, name))

    def loss_scale_state(self) -> dict | None:
        """fp16's dynamic loss scale, which a resumed run needs; None in other precisions."""
        if self.dtype != torch.float16:
            return None
        scaler = self.optimizer.loss_scaler
        return {key: getattr(scaler, key) for key in _LOSS_SCALER_FIELDS}

    def load_loss_scale_state(self, state: dict | None) -> None:
        if self.dtype == torch.float16 and state:
            for key in _LOSS_SCALER_FIELDS:
                setattr(self.optimizer.loss_scaler, key, state[key])


_LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def ulysses(group: Group) -> Attend:
    """DeepSpeed's attention over sequences of which each rank of `group` has a part (arXiv:2309.14509)."""
    inner = DistributedAttention(lambda q, k, v, core: core(q, k, v), group, scatter_idx=2, gather_idx=0)

    def attend(core, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return inner(q, k, v, 1, None, core)  # 1: the batch's dimension; None: positions are rotated before

    return attend


def _master(parameter: nn.Parameter, key: str) -> Tensor:
    """At ZeRO-1 and 2, the part of the fp32 "weight" or of a moment that this rank keeps, flat."""
    return parameter._hp_mapping.get_hp_fragment(None if key == "weight" else key)


def _prepare(topology: Topology, log_level: str) -> None:
    """Process-wide adjustments to DeepSpeed, before its engine is made."""
    # On CPU its shared-memory collective is JIT-compiled for 40 s, and only inference uses it.
    # (By sys.modules, since `deepspeed.comm.torch` as an attribute is the real torch.)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.utils.logging.logger.setLevel(getattr(logging, log_level.upper()))
    bf16_optimizer.see_memory_usage = lambda message, force=False: None  # it prints, whatever the level
    warnings.filterwarnings("ignore", module="deepspeed")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*all_gather_into_tensor.*")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*reduce_scatter_tensor.*")

    def assert_same_in_stage(values: list[int]) -> None:
        gathered: list = [None] * topology.grid.zero
        torch.distributed.all_gather_object(gathered, list(values), group=topology.zero_group)
        if any(other != gathered[0] for other in gathered):
            raise RuntimeError(f"ranks of one data-parallel group disagree: {gathered}")

    # DeepSpeed compares with world rank 0, which hangs when stages hold different layers.
    for module in (partitioned_param_coordinator, stage3, partition_parameters):
        module.assert_ints_same_as_other_ranks = assert_same_in_stage
    deepspeed.init_distributed(verbose=False)
