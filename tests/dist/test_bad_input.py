"""What a user's mistake gets: one line that says what, where and what to do; exit code 78 or 1; no traceback."""

import json
import resource
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.dist.conftest import environment, run

pytestmark = pytest.mark.dist


def refused(job, name, code, *parts, arguments, **options):
    """Run, expect `code` and exactly one line of error, which holds all of `parts`."""
    finished = job.run(name, *arguments, **options)
    errors = [line for line in finished.errors.splitlines() if "error: " in line]
    assert finished.code == code, finished.output + finished.errors
    assert len(errors) == 1, finished.errors
    assert "Traceback" not in finished.output + finished.errors
    for part in parts:
        assert part in errors[0]


def copy_data(job, name):
    """A copy of the training data to damage; its prefix."""
    prefix = job.root / name
    for suffix in (".bin", ".idx", ".manifest.json"):
        shutil.copy(f"{job.root}/data-train{suffix}", f"{prefix}{suffix}")
    return prefix


@pytest.mark.parametrize(
    ("parts", "arguments"),
    [
        (["training.lerning_rate", "did you mean", "learning_rate"], ["--training.lerning_rate", "1"]),
        (["training.max_steps", "ten", "--max-steps"], ["--max-steps", "ten"]),
        (["data.block_size = 64", "model.n_positions = 32"], ["--block-size", "64"]),
        (["parallel.tensor (2) does not divide 1 ranks; start 2"], ["--parallel.tensor", "2"]),
        (["model.num_heads = 4", "parallel.tensor = 8", "allows tensor 1, 2 or 4"], ["--parallel.tensor", "8"]),
        (["nowhere.json", "no such file"], ["--deepspeed", "nowhere.json"]),
        (["global_batch_size = 9", "8 or 10"], ["--global-batch-size", "9"]),
        (["data.train_files", "nowhere", "preprocess_data.py"], ["--train-files", "nowhere"]),
        (["nowhere*.bin", "matches no"], ["--train-files", "nowhere*.bin"]),
        (["data.train_files and data.blend"], ["--blend", "a=1"]),
        (["data.blend", "nowhere"], ["--train-files=", "--blend", "nowhere=1"]),
        (["vocab_size = 500", "512"], ["--vocab-size", "500"]),
        (["fp16 needs a GPU"], ["--precision", "fp16"]),
    ],
)
def test_configuration(job, parts, arguments):
    refused(job, "refused", 78, *parts, arguments=arguments)


def test_two_ranks_speak_once(job):
    """A mistake found before the ranks meet, and one found after."""
    for arguments in (["--block-size", "64"], ["--vocab-size", "500"]):
        refused(job, "refused", 78, "", arguments=arguments, launcher="deepspeed", ranks=2)


LATE = """
import os, time
from megalite import errors

errors.SPEAKER_SECONDS = 8
rank = int(os.environ["RANK"])
def main():
    time.sleep({late} * (rank == 0))
    raise errors.ConfigError("the layout is wrong")
errors.run_main(main, rank=rank, local_rank=rank)
"""


@pytest.mark.parametrize(("late", "said"), [(3, "error: the layout is wrong"), (60, "error: rank 1: the layout is wrong")])
def test_the_first_rank_is_waited_for(tmp_path, late, said):
    """torchrun ends the others when one has ended; here rank 0 comes late, or not in time."""
    program = tmp_path / "program.py"
    program.write_text(LATE.format(late=late))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    finished = run(torchrun, timeout=60)
    assert finished.code != 0
    assert [line for line in finished.errors.splitlines() if "error: " in line] == [said]


def test_files(job):
    missing = str(job.root / "nowhere.txt")
    refused(job, "refused", 1, "nowhere.txt", arguments=["--train-files", missing])
    refused(job, "refused", 1, "tokenizer.json", arguments=["--tokenizer-dir", str(job.root / "nowhere")])
    empty = job.root / "empty.txt"
    empty.write_text("")
    arguments = ["--train-files", str(empty), "--cache-dir", str(job.root / "cache")]
    refused(job, "refused", 1, "empty.txt", arguments=arguments)


def test_corrupt_index_and_too_little_data(job):
    prefix = copy_data(job, "damaged")
    index = prefix.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:-5])
    refused(job, "refused", 1, "damaged.idx", arguments=["--train-files", str(prefix)])
    arguments = ["--train-files", str(prefix), "--block-size", "1000000", "--n-positions", "1000000"]
    shutil.copy(f"{job.root}/data-train.idx", index)
    refused(job, "refused", 1, "no window", arguments=arguments)


def test_data_of_another_tokenizer(job):
    prefix = copy_data(job, "foreign")
    path = job.root / "foreign.manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_sha256": "0" * 64}))
    refused(job, "refused", 78, "another tokenizer", arguments=["--train-files", str(prefix)])


@pytest.fixture(scope="module")
def trained(job):
    """A folder with checkpoints of steps 2 and 4."""
    job.train("trained", "--max-steps", "4", "--save-every", "2", "--lr-schedule", "constant")
    return job.root / "trained" / "checkpoints"


def test_folder_of_another_run(job, trained):
    arguments = ["--output-dir", str(trained), "--num-layers", "3"]
    refused(job, "refused", 78, "another run", "num_layers", "--no-resume", arguments=arguments)
    arguments = ["--output-dir", str(trained), "--train-files", str(job.root / "data-validation")]
    refused(job, "refused", 1, "data", "changed", "--data.allow_changed_data", arguments=arguments)
    copy = shutil.copytree(trained, job.root / "changed-data")
    arguments[1] = str(copy)
    arguments += ["--data.allow_changed_data", "--max-steps", "5", "--lr-schedule", "constant"]
    assert [line["step"] for line in job.train("changed", *arguments)] == [5]
    log = (job.root / "changed" / "train.log").read_text()
    assert "warning   the training data" in log
    assert "going on with sample 32 of" in log


def test_damaged_checkpoint_is_named(job, trained):
    folder = shutil.copytree(trained, job.root / "damaged-checkpoints")
    model = next((folder / "step-4").glob("model-*"))
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    arguments = ["--output-dir", str(folder)]
    refused(job, "refused", 1, model.name, "--resume", arguments=arguments)
    model.write_bytes(content[:-100])
    refused(job, "refused", 1, model.name, "bytes", arguments=arguments)
    # The way out that the line names.
    steady = ["--lr-schedule", "constant", "--max-steps", "4"]
    metrics = job.train("mended", *arguments, *steady, "--resume", str(folder / "step-2"))
    assert [line["step"] for line in metrics] == [3, 4]
    assert (folder / "replaced-1" / "step-4").is_dir()
    refused(job, "refused", 78, "nowhere", arguments=["--resume", str(job.root / "nowhere")])


def test_a_branch_does_not_write_into_another_run(job, trained):
    other = shutil.copytree(trained, job.root / "other-run")
    arguments = ["--resume", str(trained / "step-2"), "--output-dir", str(other)]
    refused(job, "refused", 78, "other-run", "holds another run", arguments=arguments)
    assert sorted(path.name for path in other.iterdir()) == ["latest", "step-2", "step-4"]


def test_a_lock_of_another_host_and_a_requeued_job(job, monkeypatch):
    folder = job.root / "requeued" / "checkpoints"
    folder.mkdir(parents=True)
    lock = {"host": "elsewhere", "pid": 1, "started": "then", "job": "7", "restarts": 0}
    (folder / "owner.lock").write_text(json.dumps(lock))
    refused(job, "requeued", 78, "pid 1 on elsewhere", "owner.lock if it is dead", arguments=["--max-steps", "1"])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert len(job.train("requeued", "--max-steps", "1", "--warmup-steps", "0")) == 1
    assert "warning   took over" in (job.root / "requeued" / "train.log").read_text()
    assert not (folder / "owner.lock").exists()


@pytest.mark.parametrize("zero", ["0", "1", "3"])
def test_numbers_that_are_lost_end_the_run_and_are_not_saved(job, zero):
    name = f"diverged-{zero}"
    arguments = ["--zero", zero, "--learning-rate", "1e30", "--warmup-steps", "0", "--save-every", "1"]
    refused(job, name, 78, "at step", "training.learning_rate", arguments=arguments, launcher="deepspeed", ranks=2)
    for file in (job.root / name / "checkpoints").glob("step-*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file


def test_output_folder_that_cannot_be_written_is_noticed_first(job):
    file = job.root / "a-file"
    file.write_text("")
    refused(job, "unwritable", 1, "output_dir", arguments=["--output-dir", str(file / "x")])
    assert job.metrics("unwritable") == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_disk_that_fills_up_while_saving(job, ranks):
    """A limit on the size of files stands for the full disk: the same write fails, with another errno.

    Of two pipeline stages the second's file is larger, by the last norm, so that it alone fails, while training goes on.
    """
    name, options = f"full-disk-{ranks}", {"launcher": "deepspeed", "ranks": ranks}
    arguments = ["--parallel.pipeline", str(ranks), "--tie-embeddings", "false", "--lr-schedule", "constant"]
    job.train(name, *arguments, "--max-steps", "2", **options)
    latest = job.root / name / "checkpoints" / "step-2"
    files = sorted(latest.glob("optimizer-*"))
    limit = files[-1].stat().st_size - 1
    assert [file.stat().st_size <= limit for file in files] == [True, False][-ranks:]
    arguments += ["--save-every", "4"]
    done = subprocess.run(
        job.command(name, *arguments, "--max-steps", "10000", **options),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 1
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith(f"error: cannot write {latest.parent}/step-4.tmp/{files[-1].name}: ")
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in latest.parent.iterdir()) == ["latest", "step-2"]  # the last good one, whole
    assert job.metrics(name)[-1]["step"] <= 8  # where the next save waits for this one
    steps = [line["step"] for line in job.train(name, *arguments, "--max-steps", "8", **options)]
    assert steps == list(range(1, 9))
