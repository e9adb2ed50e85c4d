"""The folder of a run's checkpoints: who owns it, what is in the way, and which checkpoint a run goes on from."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megalite.config import CheckpointConfig, Config, ModelConfig
from megalite.errors import ConfigError, UserError
from megalite.topology import Topology
from megalite.training.checkpoint_reader import Checkpoint, DamagedCheckpoint, find_checkpoint, list_checkpoints
from megalite.training.meters import first_free

LOCK = "owner.lock"


class OutputLock:
    """Owns `output_dir` until the end of the context: a second run there is refused, with the name of the first.

    The file owner.lock says {host, pid, started, job, restarts}, and its owner holds a POSIX lock on it, which ends
    with the process. One of a dead process of this host is taken over. Elsewhere, where a file system does not lock
    between hosts, nobody can tell, so the user is asked; but SLURM ends a start of a job before the next one. active:
    False on all ranks but the first, where it does nothing. slurm: as `topology.slurm_start` says.

    notice: what the user should know, or None.
    """

    def __init__(self, output_dir: Path, active: bool, slurm: tuple[str, int] | None = None):
        self._path, self._file = output_dir / LOCK, None
        self.notice: str | None = None
        if not active:
            return
        self._made = not output_dir.exists()
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            alive = self._lock()
            while not alive and not self._is_there():
                self._file.close()  # its owner ended, and removed it, after we had opened it
                alive = self._lock()
        except OSError as error:
            raise UserError(f"cannot write checkpoint.output_dir {output_dir}: {error.strerror}") from error
        owner, (job, restarts) = self._owner(), slurm or (None, 0)
        elsewhere = not self._is_here(owner)
        requeued = job is not None and owner.get("job") == job and owner.get("restarts") in range(restarts)
        if alive or (elsewhere and not requeued):
            self._file.close()
            raise ConfigError(
                f"checkpoint.output_dir: {output_dir} belongs to another run (pid {owner.get('pid')} on"
                f" {owner.get('host')}, since {owner.get('started')}); choose another --output-dir, or wait for its"
                f" end{'' if alive else f', or delete {self._path} if it is dead'}"
            )
        if elsewhere:
            self.notice = f"took over {self._path}, which an earlier start of this job left on {owner['host']}"
        own = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        own |= {"job": job, "restarts": restarts}
        self._file.truncate(0)
        self._file.write(json.dumps(own) + "\n")
        self._file.flush()

    def _lock(self) -> bool:
        """Open the file and lock it; returns whether somebody else has."""
        # Nothing else in this process may open this file: closing it would end the lock.
        self._file = open(self._path, "a+")  # noqa: SIM115  until the run ends
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Where there are no locks, the name has to do.
            return error.errno in (errno.EACCES, errno.EAGAIN) or self._owner_lives()
        return False

    def _is_there(self) -> bool:
        assert self._file is not None
        return self._path.exists() and os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))

    def _owner(self) -> dict[str, Any]:
        assert self._file is not None
        self._file.seek(0)
        try:
            said = json.loads(self._file.read() or "{}")
        except ValueError:  # cut off: whoever wrote it is dead, or the lock would be held
            return {}
        return said if isinstance(said, dict) else {}

    @staticmethod
    def _is_here(owner: dict[str, Any]) -> bool:
        return owner.get("host", socket.gethostname()) == socket.gethostname()

    def _owner_lives(self) -> bool:
        owner = self._owner()
        if not self._is_here(owner):
            return False  # as far as anybody can tell
        try:
            os.kill(int(owner["pid"]), 0)
        except (KeyError, TypeError, ValueError, ProcessLookupError):
            return False
        except PermissionError:
            return True
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            if self._made:
                with contextlib.suppress(OSError):
                    self._path.parent.rmdir()  # empty still: nothing came of the run


def prepare_output(output_dir: Path, first_step: int) -> Path | None:
    """Make `output_dir` ready for a run that goes on from `first_step` (0: afresh), before it trains for hours.

    Checkpoints beyond that step, of a continuation that the user goes back on, move into a new folder replaced-N,
    which is returned; what a killed save left is removed. Raises UserError where the folder cannot be written.
    """
    aside = None
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for old in output_dir.glob("step-*.old"):
            if not old.with_suffix("").exists():  # killed between two renames: it is complete, and the only one
                os.replace(old, old.with_suffix(""))
        for unfinished in (*output_dir.glob("step-*.tmp"), *output_dir.glob("step-*.old")):
            shutil.rmtree(unfinished, ignore_errors=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
        beyond = [folder for step, folder in list_checkpoints(output_dir) if step > first_step or first_step == 0]
        if beyond:
            aside = first_free(output_dir, "replaced-{}")
            aside.mkdir()
            (output_dir / "latest").unlink(missing_ok=True)
            for folder in beyond:
                os.replace(folder, aside / folder.name)
    except OSError as error:
        raise UserError(f"cannot write checkpoint.output_dir {output_dir}: {error.strerror}") from error
    return aside


def choose_resume(config: CheckpointConfig) -> tuple[Path | None, str | None]:
    """(the checkpoint to go on from, the one that this run branched from): None for none.

    --resume PATH branches off PATH on the first start; started again with the same words, the branch goes on from its
    own newest. An output folder that holds some other run is refused.
    """
    output_dir = Path(config.output_dir)
    newest = find_checkpoint(output_dir)
    if config.resume == "none":
        return None, None
    if config.resume == "auto":
        return newest, None
    if config.init_from is not None:
        raise ConfigError("checkpoint.init_from is for a new run, checkpoint.resume for an old one: give one of them")
    start = find_checkpoint(Path(config.resume))
    if start is None:
        raise ConfigError(f"--resume {config.resume}: there is no checkpoint (a step-N folder with manifest.json)")
    branch = str(start.resolve())
    if newest is not None and _branched_from(newest) == branch:
        return newest, branch
    if newest is not None and start.resolve().parent != output_dir.resolve():
        raise ConfigError(
            f"checkpoint.output_dir: {output_dir} holds another run ({newest.name}); to continue"
            f" {config.resume} choose an --output-dir of its own"
        )
    return start, branch


def _branched_from(folder: Path) -> str | None:
    try:
        return Checkpoint(folder).state.get("branched_from")
    except UserError:  # a damaged newest is what --resume with an older one is for
        return None


def find_resume(config: Config, topology: Topology) -> tuple[Checkpoint | None, str | None, list[str]]:
    """The checkpoint to go on from, opened and verified (None: afresh), what the run branched off, and what the user
    should know: which damaged ones were passed over. Collective."""
    # Rank 0 looks: on a network file system another node may see an older listing.
    path, branched_from = topology.on_first(choose_resume, config.checkpoint)
    passed: list[str] = []
    while path is not None:
        try:
            found = topology.together(_open, path, topology)
            break
        except DamagedCheckpoint as error:  # on all ranks alike
            path = topology.on_first(_one_before, path)
            if not config.checkpoint.resume_fallback or path is None:
                raise
            passed.append(f"{str(error).partition(';')[0]}; going on from {path.name} instead (--resume-fallback)")
    else:
        return None, None, []
    topology.together(check_same_model, found, config.model)
    topology.together(check_same_optimizer, found, config.training.optimizer)
    return found, branched_from or found.state.get("branched_from"), passed


def find_weights(config: Config, topology: Topology) -> Checkpoint | None:
    """The checkpoint that a new run takes its weights from, opened and verified; None for none. Collective."""
    if config.checkpoint.init_from is None:
        return None
    path = topology.on_first(find_checkpoint, Path(config.checkpoint.init_from))
    if path is None:
        raise ConfigError(
            f"checkpoint.init_from: {config.checkpoint.init_from} holds no checkpoint (a folder with manifest.json)"
        ).everywhere()
    found = topology.together(_open, path, topology, weights=True)
    # It may train on with other dropout.
    if wrong := _differing(found, config.model.model_copy(update={"dropout": found.model.dropout})):
        raise ConfigError(
            f"checkpoint.init_from: {path} is of another model ({wrong}); set the model section to its"
        ).everywhere()
    return found


def _open(path: Path, topology: Topology, weights: bool = False) -> Checkpoint:
    """The ranks share the work of verifying."""
    found = Checkpoint(path)
    if found.weights_only and not weights:
        raise ConfigError(f"--resume {path}: it holds weights alone; start a new run from them with --init-from")
    found.verify(topology.rank, topology.world_size)
    return found


def _one_before(folder: Path) -> Path | None:
    checkpoints = [path for _, path in list_checkpoints(folder.parent)]
    place = checkpoints.index(folder) if folder in checkpoints else 0
    return checkpoints[place - 1] if place else None


def check_same_model(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Refuse to continue another model's run: ConfigError naming what differs."""
    if differing := _differing(checkpoint, model):
        raise ConfigError(
            f"checkpoint.output_dir: {checkpoint.folder} is of another run ({differing});"
            " choose another --output-dir, or start afresh with --no-resume"
        )


def check_same_optimizer(checkpoint: Checkpoint, optimizer: str) -> None:
    """Refuse, with a ConfigError, to go on with an optimizer that keeps other moments."""
    if checkpoint.optimizer != optimizer:
        raise ConfigError(
            f"training.optimizer: {checkpoint.folder} was trained with {checkpoint.optimizer}, not {optimizer}; set it"
            " to that, or start afresh with --no-resume"
        )


def _differing(checkpoint: Checkpoint, model: ModelConfig) -> str:
    """What the weights and their meaning depend on and is another here, in effect, not in spelling; empty: nothing."""
    theirs, ours = _identity(checkpoint.model), _identity(model)
    return "; ".join(f"model.{key} {theirs[key]} there, {ours[key]} here" for key in ours if theirs[key] != ours[key])


def _identity(model: ModelConfig) -> dict[str, Any]:
    effective = {"num_kv_heads": model.kv_heads, "head_dim": model.head_size, "intermediate_size": model.ffn_size}
    return model.model_dump(exclude={"init_std", "n_positions", "attention", "kernels", "fused_loss"}) | effective
