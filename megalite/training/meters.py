"""What a run tells: a progress bar on a terminal or plain lines in a log, metrics.jsonl, TensorBoard."""

import itertools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from tqdm import tqdm

from megalite.data.indexed import atomic_write
from megalite.errors import UserError


class Meters:
    """Only rank 0 writes; on other ranks every method does nothing.

    resumed_step: the step that the run goes on from; what an earlier try logged beyond it is dropped, so metrics.jsonl
    holds each step once. A run from step 0 renames metrics that are there to metrics-1.jsonl.
    """

    def __init__(
        self, run_dir: Path, rank: int, *, max_steps: int, resumed_step: int, log_every: int, tensorboard: bool
    ):
        self.active = rank == 0
        self.log_every, self.max_steps, self.done = log_every, max_steps, resumed_step
        self._bar = self._tensorboard = None
        self._failed: set[str] = set()  # files that were complained about
        if not self.active:
            return
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            path = run_dir / "metrics.jsonl"
            if resumed_step == 0 and path.exists():
                os.replace(path, first_free(run_dir, "metrics-{}.jsonl"))  # another run's, or an earlier try's
            _drop_after(path, resumed_step)
            self._metrics = open(path, "a")  # noqa: SIM115  lives as long as the run
            self._log = open(run_dir / "train.log", "a")  # noqa: SIM115
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)
        except OSError as error:
            raise UserError(f"cannot write {run_dir}: {error.strerror}; choose another --run-dir") from error
        if sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=resumed_step, unit="step", dynamic_ncols=True)
        self._started = time.monotonic()
        self._started_at = resumed_step

    def print(self, text: str) -> None:
        """A line for the reader: above the bar on a terminal, and in train.log."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)
        self._write(self._log, text)

    def record(self, values: dict[str, Any]) -> None:
        """One step's metrics: a line of metrics.jsonl, TensorBoard scalars, and now and then a line or the bar."""
        if not self.active:
            return
        step = self.done = values["step"]
        self._write(self._metrics, json.dumps({key: _strict(value) for key, value in values.items()}))
        if self._tensorboard is not None:
            for key, value in _scalars(values).items():
                self._tensorboard.add_scalar(key, value, step)
        line = (
            f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  {values['tokens_per_second']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(line, refresh=False)
            self._bar.update(1)
        if step % self.log_every == 0 or step == self.max_steps or self.done == self._started_at + 1:
            text = f"step {step}/{self.max_steps}  {line}  grad norm {_short(values['grad_norm'])}"
            if self._bar is None:
                print(f"{text}  {self._time_left()} left", flush=True)
            self._write(self._log, text)

    def _write(self, file: TextIO, line: str) -> None:
        """Append a line. A full disk costs the log and not the run: saving a checkpoint decides about that."""
        try:
            file.write(line + "\n")
            file.flush()
        except OSError as error:
            if file.name not in self._failed:
                self._failed.add(file.name)
                print(f"warning: cannot write {file.name}: {error.strerror}; training goes on", file=sys.stderr)

    def _time_left(self) -> str:
        """Of the whole run, evaluation and saving included."""
        each = (time.monotonic() - self._started) / max(1, self.done - self._started_at)
        return clock(each * (self.max_steps - self.done))

    def close(self) -> None:
        if self.active:
            if self._bar is not None:
                self._bar.close()
            if self._tensorboard is not None:
                self._tensorboard.close()
            self._metrics.close()
            self._log.close()


def first_free(folder: Path, pattern: str) -> Path:
    """folder / pattern with the lowest number from 1 whose name is not taken."""
    return next(path for path in (folder / pattern.format(n) for n in itertools.count(1)) if not path.exists())


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record as TensorBoard names them: eval_losses of "web" is eval_loss/web, so beside eval_loss."""
    flat = {key: value for key, value in values.items() if key != "step"}
    for key, tag in (("eval_losses", "eval_loss"), ("epochs", "epoch")):
        flat |= {f"{tag}/{name}": value for name, value in flat.pop(key, {}).items()}
    return {tag: value for tag, value in flat.items() if isinstance(value, int | float)}


def _strict(value: Any) -> Any:
    """None for nan and inf, which JSON does not have (a gradient may overflow while the loss is finite)."""
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _drop_after(path: Path, step: int) -> None:
    """Remove the lines of later steps, and a last line that a killed run left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    if b"".join(kept) != path.read_bytes():
        atomic_write(path, kept)


def memory_bytes(device: torch.device) -> int:
    """Peak bytes of tensors on a GPU; on CPU this process's resident memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process(os.getpid()).memory_info().rss
