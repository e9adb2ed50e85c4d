"""The training loop: one visible step function, evaluation, saving."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.comms.p2p import Link
from megalite.config import Config
from megalite.data.batch import Batch
from megalite.data.dataset import WindowDataset
from megalite.data.loader import TrainLoader, eval_batches
from megalite.errors import ConfigError, UserError
from megalite.model.flops import flops_per_token, peak_tflops
from megalite.pipeline.executor import Executor
from megalite.pipeline.schedules import build
from megalite.topology import Topology
from megalite.training import checkpoint
from megalite.training.checkpoint_reader import Checkpoint
from megalite.training.checkpoint_writer import Copies, Saved, Writer
from megalite.training.engine import Engine
from megalite.training.lr_schedule import learning_rate_at
from megalite.training.meters import Meters, memory_bytes

# The dynamic loss scale halves with each overflow: 2^16 to below 1 takes 17 steps, and more cannot help.
MAX_SKIPPED_FP16 = 20


class Trainer:
    """Takes an engine from the step that `resume` finds to `max_steps`. watch(what) hears what the rank begins with."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        engine: Engine,
        loader: TrainLoader,
        eval_sets: dict[str, WindowDataset],
        max_steps: int,
        watch: Callable[[str], None] = lambda what: None,
    ):
        self.config, self.topology, self.engine = config, topology, engine
        self.loader, self.eval_sets, self.max_steps, self.watch = loader, eval_sets, max_steps, watch
        parallel, grid = config.parallel, topology.grid
        layout = topology.pipeline_rank, grid.pipeline, parallel.virtual
        self.actions = build(parallel.schedule_name, *layout, loader.accumulation)
        link = None
        if grid.pipeline > 1:
            wraps = parallel.virtual > 1
            link = Link(topology.pipeline_ranks, topology.pipeline_rank, topology.new_group, topology.device, wraps)
        self.executor = Executor(
            self._forward,
            message=engine.message,
            stage=topology.pipeline_rank,
            stages=grid.pipeline,
            virtual=parallel.virtual,
            link=link,
            watch=lambda what: self.watch(f"{self.phase}, {what}"),
        )
        self.phase = "start"
        self.step = 0
        self.tokens = 0
        self.skipped_in_a_row = 0
        self.branched_from: str | None = None
        self.output_dir = Path(config.checkpoint.output_dir)
        self.writer = Writer(self.output_dir, topology, config)
        self.flops_per_token = flops_per_token(config.model, config.data.block_size)
        on_gpu = topology.device.type == "cuda"
        half = config.training.precision != "fp32"  # the known peaks are those of half precision
        self.peak = peak_tflops(torch.cuda.get_device_name(topology.device)) if on_gpu and half else None
        self.meters: Meters

    def resume(self, found: Checkpoint, branched_from: str | None) -> str | None:
        """Go on from a checkpoint: weights, optimizer, position in the data, counters.

        branched_from: what `choose_resume` says. Returns what the loader wants the user to know.
        """
        self.branched_from = branched_from
        # First, as it may refuse, and loading reads every tensor.
        notice = self.topology.together(self.loader.load_state_dict, found.state["data"])
        checkpoint.load(found, self.engine, self.topology)
        self.step, self.tokens = found.state["step"], found.state["tokens"]
        self.skipped_in_a_row = found.state.get("skipped_in_a_row", 0)
        return notice

    def init_from(self, found: Checkpoint) -> None:
        """Start a new run with the weights of a checkpoint."""
        checkpoint.load_weights(found, self.engine, self.topology)

    def fit(self, meters: Meters) -> dict[str, Any]:
        """Train to max_steps; returns "loss" (None if no step was left to do) and what `evaluate` says at the end."""
        self.meters = meters
        if self.step >= self.max_steps:
            meters.print(f"Training was finished at step {self.step}; raise --max-steps to go on.")
            return {"loss": None, **self.evaluate()}
        try:
            record = self._train()
        except UserError as error:
            if error.on_every_rank:
                self._tell(self.writer.wait())  # what was being saved is from before, and good
            raise
        return {key: record[key] for key in ("loss", "eval_loss", "eval_losses") if key in record}

    def _train(self) -> dict[str, Any]:
        """The steps that are left; returns the last one's record."""
        meters, training, save_every = self.meters, self.config.training, self.config.checkpoint.save_every
        record: dict = {}
        while self.step < self.max_steps:
            record = self.train_step()
            record |= self._tell(self.writer.poll())
            last = self.step == self.max_steps
            if last or (training.eval_every and self.step % training.eval_every == 0):
                record |= self.evaluate()
                for name, loss in record.get("eval_losses", {"": record["eval_loss"]}).items():
                    if loss is not None:
                        where = f"step {self.step}{name and f'  {name}'}"
                        meters.print(f"{where}  validation loss {loss:.4f}  perplexity {perplexity(loss):.2f}")
            copies = None
            if last or (save_every and self.step % save_every == 0):
                started = time.perf_counter()
                copies = self.copy_state(record)
                record["save_pause_seconds"] = time.perf_counter() - started
            # A step that a checkpoint holds is in the metrics: a resumed run would not write it again.
            meters.record(record)
            if copies is not None:
                self.writer.start(copies)
        self._tell(self.writer.wait())
        return record

    def train_step(self) -> dict:
        """One optimizer step over the global batch; returns its metrics."""
        started = time.perf_counter()
        self.phase = f"step {self.step + 1}"
        self.watch(f"{self.phase}, reading the data")
        batches = self.loader.next_step()
        waited = time.perf_counter() - started
        batches = [self._to_device(batch) for batch in batches]
        # Divided by the valid tokens of the global batch, the loss is the same in every layout. DeepSpeed averages
        # gradients over the ranks of its group, which the factor undoes.
        valid = torch.stack([batch.loss_mask.sum() for batch in batches]).sum(dtype=torch.float64)
        dist.all_reduce(valid, group=self.topology.zero_group)
        valid = valid.item()
        scale = self.topology.grid.zero / max(valid, 1.0)

        self.engine.begin_step()
        loss_sum = self.executor.run(
            self.actions, batches, lambda loss, is_last: self.engine.backward(loss * scale, is_last)
        )
        self.watch(f"{self.phase}, summing the loss and updating the weights")
        loss = self._sum_over_all(loss_sum).item() / max(valid, 1.0)
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        learning_rate = learning_rate_at(self.step + 1, self.config.training, self.max_steps)
        grad_norm, applied = self.engine.step(learning_rate)
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if self.skipped_in_a_row > (MAX_SKIPPED_FP16 if self.config.training.precision == "fp16" else 0):
            raise self._diverged("the gradient is not finite")

        self.step += 1
        tokens = self.loader.global_batch * self.config.data.block_size
        self.tokens += tokens
        seconds = time.perf_counter() - started
        tflops = self.flops_per_token * tokens / seconds / 1e12 / self.topology.world_size
        return {
            "step": self.step,
            "loss": loss,
            "grad_norm": grad_norm if applied else None,
            "learning_rate": learning_rate,
            "tokens": self.tokens,
            "tokens_per_second": tokens / seconds,
            "tflops": tflops,
            "mfu": tflops / self.peak if self.peak else None,
            "memory_bytes": memory_bytes(self.topology.device),
            "step_seconds": seconds,
            "data_seconds": waited,
            "skipped": not applied,
            **self.loader.progress(),
        }

    def evaluate(self) -> dict[str, Any]:
        """{"eval_loss": mean loss of a token of all validation sets, in nats}; None in its place where there is no set.

        Where sets have names, "eval_losses" has the same of each.
        """
        self.phase = f"evaluation after step {self.step}"
        sums = {name: self._evaluate_set(dataset) for name, dataset in self.eval_sets.items()}
        if not sums:
            return {"eval_loss": None}
        total, valid = torch.stack(list(sums.values())).sum(0)
        losses = {name: (total / valid).item() for name, (total, valid) in sums.items() if name}
        return {"eval_loss": (total / valid).item()} | ({"eval_losses": losses} if losses else {})

    def _evaluate_set(self, dataset: WindowDataset) -> Tensor:
        """[summed loss, number of tokens] over all ranks, float64."""
        training = self.config.training
        batches = eval_batches(
            dataset,
            training.per_device_train_batch_size,
            self.topology.data_rank,
            self.topology.grid.data,
            training.eval_sequences,
        )
        with self.engine.evaluation():
            total, valid = self.executor.evaluate(map(self._to_device, batches))
        return self._sum_over_all(torch.tensor([total, valid], dtype=torch.float64, device=self.topology.device))

    def copy_state(self, record: dict) -> Copies:
        """All that a checkpoint of this step holds, copied to the host, once the one before it is written; collective.

        record: of the step, to which the one before adds its metrics.
        """
        record |= self._tell(self.writer.wait())
        self.watch(f"step {self.step}, copying the state for a checkpoint")
        state = {
            "step": self.step,
            "adam_step": self.engine.adam_step,
            "tokens": self.tokens,
            "data": self.loader.state_dict(),
            "loss_scale": self.engine.loss_scale_state(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "branched_from": self.branched_from,
        }
        return checkpoint.host_copies(self.step, self.engine, self.topology, state)

    def _tell(self, saved: Saved | None) -> dict[str, float]:
        """Say that a checkpoint is there; returns its metrics."""
        if saved is None:
            return {}
        self.meters.print(f"step {saved.step}  saved {saved.folder} in {saved.seconds:.1f} s, beside training")
        return {"save_write_seconds": saved.seconds}

    def _diverged(self, what: str) -> ConfigError:
        """Every rank sees the same sums, so every rank raises this, before a checkpoint could hold such weights."""
        return ConfigError(
            f"{what} at step {self.step + 1}: lower training.learning_rate or lengthen training.warmup_steps,"
            " and start again from the last checkpoint, or afresh with --no-resume"
        ).everywhere()

    def _forward(self, chunk: int, micro_batch: int, batch: Batch, hidden: Tensor | None) -> Tensor:
        samples = None
        if self.config.model.dropout:
            # Of the step that the loader gave last: micro-batch m on data rank r has the rows that `TrainLoader` says.
            grid, size = self.topology.grid, batch.tokens.shape[0]
            first = self.loader.consumed_samples - self.loader.global_batch
            first += (micro_batch * grid.data + self.topology.data_rank) * size
            samples = torch.arange(first, first + size, device=self.topology.device)
        return self.engine.forward(chunk, batch, hidden, samples)

    def _to_device(self, batch: Batch) -> Batch:
        """This rank's part of a micro-batch of its data-parallel rank, on the device."""
        part = batch.part(self.topology.context_rank, self.topology.grid.context)
        return part.to(self.topology.device, non_blocking=True)

    def _sum_over_all(self, value: Tensor) -> Tensor:
        """The sum over data and stages of a tensor on the device; tensor-parallel ranks have the same."""
        dist.all_reduce(value, group=self.topology.sum_group)
        return value


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # exp overflows a double at 709
