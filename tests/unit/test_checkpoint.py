"""Checkpoints without an engine: parts of tensors, files, what stays, who owns the folder, which one is resumed."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.config import CheckpointConfig, Config
from megalite.errors import ConfigError, UserError
from megalite.layers.sharded_init import shard
from megalite.topology import LaunchEnvironment, Topology
from megalite.training.checkpoint import plan_shards
from megalite.training.checkpoint_folder import LOCK, OutputLock, find_resume, find_weights, prepare_output
from megalite.training.checkpoint_reader import Checkpoint, DamagedCheckpoint, Slice, list_checkpoints
from megalite.training.checkpoint_writer import Copies, Writer, prune
from tests.unit.checkpoint_files import MODEL, edit_json, write_checkpoint, write_json, write_manifest

FIRST_FILE = "model-00001-of-00002.safetensors"
ROOT = Path(__file__).resolve().parents[2]
STATE = {"adam_step": 1, "tokens": 0, "data": {"fingerprint": "", "seed": 0, "consumed_samples": 0}, "loss_scale": None}


@pytest.fixture(scope="module")
def topology():
    one = Topology(LaunchEnvironment(0, 0, 1, launched=False), timeout=timedelta(seconds=60))
    yield one
    one.close()


@pytest.mark.parametrize(
    ("shape", "dim", "segments"),
    [
        ((24, 10), 0, (12, 4, 8)),
        ((24, 10), 0, (24,)),
        ((7, 12), 1, (12,)),
        ((7, 12), 1, (4, 8)),
        ((7, 5), None, ()),
        ((8,), 0, (8,)),
        ((8,), None, ()),
    ],
)
def test_parts_are_those_of_the_whole(tmp_path, shape, dim, segments):
    full = torch.arange(float(torch.Size(shape).numel())).view(shape)
    folder = tmp_path / "step-1"
    folder.mkdir()
    save_file({"w": full}, folder / "model.safetensors")
    write_json(folder / "index.json", {"w": [list(shape), "model.safetensors", None]})
    write_json(folder / "config.json", {"model": MODEL.model_dump()})
    write_manifest(folder, weights_only=True)
    checkpoint = Checkpoint(folder)
    for size in (1, 2, 4):
        for rank in range(size):
            local = shard(full, dim, segments, size, rank).flatten()
            split = (dim, segments, size, rank) if dim is not None else ()
            count = local.numel()
            for first, last in [(0, None), (0, 0), (1, count), (count // 3, count // 2), (count, count), (0, 1)]:
                part = checkpoint.tensors("w", (), Slice(*split, first=first, last=last))["weight"]
                assert torch.equal(part, local[first:last]), (size, rank, first, last)


def test_shards_have_a_limit_and_are_enough_for_the_writers(monkeypatch):
    monkeypatch.setattr("megalite.training.checkpoint.LEAST_SHARD_BYTES", 1)
    shapes = {name: (10,) for name in "abcdef"}  # 120 bytes each with moments
    assert plan_shards(shapes) == [list("abcdef")]
    assert plan_shards(shapes, limit=250) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert plan_shards(shapes, writers=2) == [list("abc"), list("def")]
    assert plan_shards(shapes, limit=1) == [[name] for name in "abcdef"]
    assert plan_shards({}) == []


def copies(step: int, **tensors) -> Copies:
    names = "model.safetensors", "optimizer.safetensors"
    index = {
        name: [list(tensor.shape), "model.safetensors", "optimizer.safetensors"] for name, tensor in tensors.items()
    }
    moments = {f"{name}.{key}": tensor + 1 for name, tensor in tensors.items() for key in ("exp_avg", "exp_avg_sq")}
    files = dict(zip(names, (dict(tensors), moments), strict=True))
    return Copies(step, files, index, {"step": step, **STATE})


def test_what_is_written_is_safetensors_and_read_back(tmp_path, topology):
    writer = Writer(tmp_path, topology, Config(model=MODEL))
    tensors = {"a.weight": torch.randn(5, 3), "\u00e4": torch.randn(1), "t": torch.randn(4, 6).t()}
    writer.start(copies(3, **tensors))
    saved = writer.wait()
    assert (saved.step, saved.folder) == (3, tmp_path / "step-3")
    assert saved.seconds > 0
    assert writer.wait() is writer.poll() is None
    found = load_file(saved.folder / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    checkpoint = Checkpoint(saved.folder)
    checkpoint.verify()
    assert torch.equal(checkpoint.tensors("t")["exp_avg"], tensors["t"] + 1)
    assert checkpoint.stored_moments("t") == ("exp_avg", "exp_avg_sq")
    assert (tmp_path / "latest").read_text() == "step-3\n"
    assert checkpoint.manifest["libraries"]["torch"] == torch.__version__
    assert checkpoint.manifest["layout"]["ranks"] == 1


def poll_until_saved(writer: Writer) -> None:
    while writer.poll() is None:
        pass


def test_a_save_that_fails_says_so_and_leaves_the_last_one(tmp_path, topology):
    writer = Writer(tmp_path, topology, Config(model=MODEL))
    writer.start(copies(1, a=torch.zeros(3)))
    writer.wait()
    bad = copies(2, a=torch.zeros(3))
    bad.files["no/such/folder"] = {"a": torch.zeros(3)}
    writer.start(bad)
    with pytest.raises(UserError, match=r"cannot write .*step-2.tmp/no/such/folder: No such file"):
        poll_until_saved(writer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1"]
    writer.start(copies(2, a=torch.zeros(3)))
    assert writer.wait().step == 2


@pytest.mark.parametrize(
    ("last", "every", "step", "left"),
    [
        (2, None, 60, [50, 60, 70]),
        (1, 20, 60, [20, 40, 60, 70]),
        (9, None, 70, [10, 20, 30, 40, 50, 60, 70]),
        (1, 30, 70, [30, 60, 70]),
    ],
)
def test_what_stays(tmp_path, last, every, step, left):
    for number in range(10, 80, 10):
        (tmp_path / f"step-{number}").mkdir()
    prune(tmp_path, step, last, every)
    assert [number for number, _ in list_checkpoints(tmp_path)] == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_a_save_killed_between_two_renames_is_mended(tmp_path):
    for name in ("step-1", "step-2.old", "step-3", "step-3.old", "step-4.tmp"):
        (tmp_path / name).mkdir()
    assert prepare_output(tmp_path, 3) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2", "step-3"]


OWNER = """
import sys
from pathlib import Path
from megalite.training.checkpoint_folder import OutputLock
with OutputLock(Path(sys.argv[1]), True):
    print("owned", flush=True)
    sys.stdin.read()
"""


def test_two_runs_do_not_share_a_folder(tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, "-c", OWNER, str(folder)]
    first = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "owned\n"
        with pytest.raises(ConfigError, match=rf"belongs to another run \(pid {first.pid} on .*--output-dir"):
            OutputLock(folder, True)
        assert json.loads((folder / LOCK).read_text())["pid"] == first.pid
        OutputLock(folder, False)  # not the first rank's business
    finally:
        first.kill()
        first.wait()
        first.stdin.close()
        first.stdout.close()
    assert (folder / LOCK).exists()
    with OutputLock(folder, True):  # the dead one's is taken over
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert list(folder.iterdir()) == []


def test_a_lock_of_another_host_is_left_to_the_user(tmp_path):
    write_json(tmp_path / LOCK, {"host": "elsewhere", "pid": 1, "started": "then"})
    with pytest.raises(ConfigError, match=r"pid 1 on elsewhere, since then.*delete .*owner.lock if it is dead"):
        OutputLock(tmp_path, True)
    (tmp_path / LOCK).write_text('{"host": "els')  # cut off
    with OutputLock(tmp_path, True):
        pass


@pytest.mark.parametrize(
    ("owner", "slurm", "taken"),
    [
        ({"job": "7", "restarts": 0}, ("7", 1), True),
        ({"job": "7", "restarts": 1}, ("7", 3), True),
        ({"job": "7", "restarts": 1}, ("7", 1), False),  # another step of this start
        ({"job": "8", "restarts": 0}, ("7", 1), False),
        ({"job": "7"}, ("7", 1), False),
        ({"job": None, "restarts": 0}, None, False),
        ({"job": "7", "restarts": "x"}, ("7", 1), False),
    ],
)
def test_a_requeued_job_takes_over_its_own_lock(tmp_path, owner, slurm, taken):
    write_json(tmp_path / LOCK, {"host": "elsewhere", "pid": 1, "started": "then", **owner})
    if not taken:
        with pytest.raises(ConfigError, match="pid 1 on elsewhere"):
            OutputLock(tmp_path, True, slurm)
        return
    with OutputLock(tmp_path, True, slurm) as lock:
        assert lock.notice == f"took over {tmp_path / LOCK}, which an earlier start of this job left on elsewhere"
        now = json.loads((tmp_path / LOCK).read_text())
        assert (now["pid"], now["job"], now["restarts"]) == (os.getpid(), *slurm)
    with OutputLock(tmp_path, True, slurm) as lock:
        assert lock.notice is None


def test_without_locks_between_hosts_a_process_there_is_not_looked_for_here(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    pid = os.getppid()
    write_json(tmp_path / LOCK, {"host": "elsewhere", "pid": pid, "started": "then", "job": "7", "restarts": 0})
    with pytest.raises(ConfigError, match="if it is dead"):
        OutputLock(tmp_path, True)
    with OutputLock(tmp_path, True, ("7", 1)):
        pass
    write_json(tmp_path / LOCK, {"host": socket.gethostname(), "pid": pid, "started": "then"})
    with pytest.raises(ConfigError, match=r"wait for its end$"):
        OutputLock(tmp_path, True)


def test_a_folder_that_only_the_lock_made_goes_with_it(tmp_path):
    with OutputLock(tmp_path / "new", True):
        pass
    assert not (tmp_path / "new").exists()


@pytest.fixture
def run(tmp_path, tokenizer_dir):
    """A folder with checkpoints of steps 1 and 2."""
    for step in (1, 2):
        write_checkpoint(tmp_path / f"run/step-{step}", MODEL, tokenizer_dir)
        edit_json(tmp_path / f"run/step-{step}/state.json", lambda state, step=step: state.update(step=step))
        write_manifest(tmp_path / f"run/step-{step}")
    return tmp_path / "run"


def config_for(folder, **checkpoint):
    return Config(model=MODEL.model_copy(), checkpoint=CheckpointConfig(output_dir=str(folder), **checkpoint))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: flip(folder / "optimizer-00002-of-00002.safetensors"),
        lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(b""),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "state.json").unlink(),
    ],
    ids=["a bit", "cut off", "no manifest", "no state"],
)
def test_fallback_is_taken_where_it_is_allowed(run, topology, spoil):
    spoil(run / "step-2")
    with pytest.raises(DamagedCheckpoint, match=r"step-2/.*--resume-fallback"):
        find_resume(config_for(run), topology)
    found, _, passed = find_resume(config_for(run, resume_fallback=True), topology)
    assert found.step == 1
    assert len(passed) == 1
    assert "damaged checkpoint" in passed[0]
    assert "step-2/" in passed[0]
    assert "going on from step-1" in passed[0]
    spoil(run / "step-1")
    with pytest.raises(DamagedCheckpoint, match="step-1/"):
        find_resume(config_for(run, resume_fallback=True), topology)


def test_a_newer_format_is_no_damage(run, topology):
    edit_json(run / "step-2/manifest.json", lambda manifest: manifest.update(version=2))
    with pytest.raises(UserError, match="checkpoint format 2, this version reads 1"):
        find_resume(config_for(run, resume_fallback=True), topology)


def weights_only(source, folder):
    """What an imported model is: weights, and neither optimizer nor state."""
    shutil.copytree(source, folder)
    for path in (*folder.glob("optimizer-*"), folder / "state.json"):
        path.unlink()
    index = json.loads((folder / "index.json").read_text())
    write_json(folder / "index.json", {name: [*entry[:2], None] for name, entry in index.items()})
    write_json(folder / "config.json", {"model": MODEL.model_dump()})
    write_manifest(folder, weights_only=True, step=0)


def test_init_from_takes_weights_and_resume_does_not(run, tmp_path, topology):
    weights_only(run / "step-1", tmp_path / "imported")
    out = tmp_path / "out"
    assert find_weights(config_for(out), topology) is None
    for source in (tmp_path / "imported", run / "step-1", run):
        found = find_weights(config_for(out, init_from=str(source)), topology)
        assert {name for name, _ in found.weights()} == set(found.index)
    with pytest.raises(ConfigError, match="weights alone; start a new run from them with --init-from"):
        find_resume(config_for(out, resume=str(tmp_path / "imported")), topology)
    with pytest.raises(ConfigError, match="init_from is for a new run"):
        find_resume(config_for(out, resume=str(run), init_from=str(run)), topology)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        find_weights(config_for(out, init_from=str(tmp_path / "nothing")), topology)
    other = config_for(out, init_from=str(run))
    other.model.rope_theta, other.model.dropout = 5.0, 0.1
    with pytest.raises(ConfigError, match=r"of another model \(model.rope_theta 10000.0 there, 5.0 here\)"):
        find_weights(other, topology)
    flip(tmp_path / "imported/model-00001-of-00002.safetensors")
    with pytest.raises(DamagedCheckpoint, match="another content"):
        find_weights(config_for(out, init_from=str(tmp_path / "imported")), topology)


def pickled(path):
    torch.save({"a": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: pickled(f / FIRST_FILE), f"{FIRST_FILE} cannot give"),
        (
            lambda f: (shutil.move(f / "tokenizer", f.parent / "t"), (f / "tokenizer").symlink_to(f.parent / "t")),
            "tokenizer.json has no bytes",
        ),
        (
            lambda f: save_file(
                {"embedding.weight": torch.zeros(384, 32).half()}, f / "model-00001-of-00002.safetensors"
            ),
            "is wrong: embedding.weight is .* F16",
        ),
    ],
    ids=["a pickle", "a linked folder", "half precision"],
)
def test_files_that_are_not_what_they_should_be(run, spoil, words):
    folder = run / "step-1"
    spoil(folder)
    if not (folder / "tokenizer").is_symlink():
        write_manifest(folder)
    with pytest.raises(DamagedCheckpoint, match=words):
        list(Checkpoint(folder).weights())


def test_a_manifest_that_leaves_a_file_out_is_refused(run):
    edit_json(run / "step-1/manifest.json", lambda manifest: manifest["files"].pop("state.json"))
    with pytest.raises(DamagedCheckpoint, match=r"does not give the size and SHA-256 of state.json"):
        Checkpoint(run / "step-1")
