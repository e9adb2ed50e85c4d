"""The whole program under its launchers: every ZeRO stage against one process, kill -9 and resume, what users see."""

import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import termios

import pytest

from megalite.data.blend import Blend
from megalite.data.dataset import WindowDataset
from megalite.data.loader import TrainLoader
from megalite.training.checkpoint_reader import Checkpoint, find_checkpoint
from tests.dist.conftest import REPOSITORY, environment
from tests.unit.test_dataset import make_source

pytestmark = pytest.mark.dist

DS_CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload")
# fp32 sums in another order: 30 steps at lr 0.005 were seen to differ by 8e-7, and by 3e-4 at 0.01, where single steps
# magnify rounding; the bound is 1e-5.
RELATIVE = 1e-5


def assert_same_curve(ours: list[dict], reference: list[dict], relative: float) -> None:
    """The same steps, and at each of them the same loss, norm, rate and validation loss within `relative`."""
    assert [line["step"] for line in ours] == [line["step"] for line in reference]
    for line, expected in zip(ours, reference, strict=True):
        assert ("eval_loss" in line) == ("eval_loss" in expected)
        for key in {"loss", "grad_norm", "learning_rate", "eval_loss"} & set(expected):
            assert line[key] == pytest.approx(expected[key], rel=relative, abs=0), (key, line["step"])


def assert_same_state(job, ours: str, reference: str, relative: float) -> None:
    """The same weights and moments, parameter by parameter; exp_avg is a running sum of each parameter's gradients."""
    ours, reference = (Checkpoint(find_checkpoint(job.root / name / "checkpoints")) for name in (ours, reference))
    assert set(ours.index) == set(reference.index)
    for name in reference.index:
        expected = reference.tensors(name)
        for key, tensor in ours.tensors(name).items():
            error = (tensor - expected[key]).norm() / expected[key].norm()
            assert error < relative, (name, key, error)


@pytest.fixture(scope="module")
def one_rank(job) -> list[dict]:
    return job.train("one-rank", "--zero", "0")


def test_one_rank_learns(one_rank):
    assert one_rank[0]["loss"] == pytest.approx(math.log(512), rel=0.02)  # untrained: all tokens alike
    assert one_rank[-1]["eval_loss"] < one_rank[0]["loss"] - 0.3
    assert one_rank[-1]["tokens"] == 10 * 8 * 32


@pytest.fixture(scope="module")
def gathered(job) -> str:
    """ZeRO-3 that partitions every parameter: at the usual threshold, the tiny model's stay whole."""
    settings = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    zero = {"param_persistence_threshold": 0, "prefetch_bucket_size": 3000, "max_live_parameters": 10000}
    settings["zero_optimization"] |= {f"stage3_{key}": value for key, value in zero.items()}
    path = job.root / "gathered.json"
    path.write_text(json.dumps(settings))
    return str(path)


@pytest.mark.parametrize("ds_config", DS_CONFIGS)
def test_two_ranks_equal_one(job, one_rank, ds_config):
    arguments = ("--deepspeed", f"ds_configs/{ds_config}.json")
    metrics = job.train(f"two-{ds_config}", *arguments, launcher="deepspeed", ranks=2)
    assert_same_curve(metrics, one_rank, RELATIVE)
    assert_same_state(job, f"two-{ds_config}", "one-rank", 10 * RELATIVE)


def test_two_ranks_that_gather_every_parameter_equal_one(job, one_rank, gathered):
    arguments = ("--deepspeed", gathered, "--activation-checkpointing", "selective", "--eval-every", "4")
    metrics = job.train("two-gathered", *arguments, launcher="deepspeed", ranks=2)
    for line in metrics[:-1]:
        line.pop("eval_loss", None)
    assert_same_curve(metrics, one_rank, RELATIVE)


def test_fused_loss_with_every_parameter_gathered(job, one_rank, gathered):
    """The head's weight, which is the embedding's too, is freed after its forward."""
    fused = job.train("two-fused", "--deepspeed", gathered, "--fused-loss", launcher="deepspeed", ranks=2)
    assert_same_curve(fused, one_rank, RELATIVE)


def test_torchrun_with_three_ranks(job):
    """Three ranks: parameters that do not divide are padded, in ZeRO-3's partitions and when they are saved."""
    batch = ("--global-batch-size", "12", "--max-steps", "6")
    three = job.train("three", *batch, "--zero", "3", launcher="torchrun", ranks=3)
    assert_same_curve(three, job.train("three-as-one", *batch), RELATIVE)


def test_bf16_and_recompute_stay_near_fp32(job, one_rank):
    for mode in ("selective", "full"):
        arguments = ("--activation-checkpointing", mode, "--precision", "bf16")
        metrics = job.train(f"bf16-{mode}", *arguments, launcher="deepspeed", ranks=2)
        # bf16 keeps 8 bits: 0.4 % a value, and it averages out in a mean over 256 tokens.
        assert [line["loss"] for line in metrics] == pytest.approx([line["loss"] for line in one_rank], rel=5e-3)


@pytest.mark.parametrize(
    ("launcher", "ranks", "arguments"),
    [
        ("python", 1, ["--zero", "1"]),
        ("deepspeed", 2, ["--zero", "2", "--precision", "bf16"]),
        ("deepspeed", 2, ["--deepspeed", "ds_configs/zero3_offload.json"]),
        ("torchrun", 2, ["--activation-checkpointing", "full", "--deepspeed", "gathered"]),
    ],
)
def test_killed_and_resumed_equals_never_killed(job, gathered, launcher, ranks, arguments):
    name = f"{launcher}-{ranks}-{len(arguments)}"
    arguments = [gathered if each == "gathered" else each for each in arguments]
    arguments = ["--save-every", "4", *arguments]
    whole = job.train(f"whole-{name}", *arguments, launcher=launcher, ranks=ranks)
    job.kill_at(f"killed-{name}", 6, *arguments, saved=4, launcher=launcher, ranks=ranks)
    resumed = job.train(f"killed-{name}", *arguments, launcher=launcher, ranks=ranks)
    assert "resumed   from" in (job.root / f"killed-{name}" / "train.log").read_text()
    keys = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")
    assert [[line.get(key) for key in keys] for line in resumed] == [[line.get(key) for key in keys] for line in whole]


def test_resume_in_another_layout(job, one_rank):
    """Saved by two ranks of ZeRO-3, continued by one of ZeRO-1, and that again by two of ZeRO-2 offload."""
    name = "relayout"
    job.kill_at(name, 5, "--zero", "3", "--save-every", "3", saved=3, launcher="deepspeed", ranks=2)
    job.kill_at(name, 8, "--zero", "1", "--save-every", "3", saved=6)
    offload = ("--deepspeed", "ds_configs/zero2_offload.json")
    assert_same_curve(job.train(name, *offload, launcher="deepspeed", ranks=2), one_rank, RELATIVE)


def samples_read(dataset: WindowDataset, blend: Blend, ranks: int, state: dict | None, count: int) -> list[list[int]]:
    """The tokens of `count` samples in their order, as so many ranks read them in steps of 8."""
    shape = {"micro_batch": 2, "accumulation": 4 // ranks, "dp_size": ranks, "seed": 1234, "blend": blend}
    loaders = [TrainLoader(dataset, dp_rank=rank, **shape) for rank in range(ranks)]
    samples = []
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    for _ in range(count // 8):
        for micro_step in zip(*(loader.next_step() for loader in loaders), strict=True):
            samples += [row for batch in micro_step for row in batch.tokens.tolist()]
    for loader in loaders:
        loader.close()
    return samples


def test_a_blend_killed_on_two_ranks_and_resumed_on_one(job):
    """The losses tell that the same samples were read; the loaders at the saved position tell it of their tokens."""
    few = make_source(job.root, "few", [7, 8, 9] * 33)  # 3 sequences, and 2 tokens
    prefixes = [str(job.root / name) for name in ("data-train", "data-validation")]
    # Steps enough that the kill comes before the end.
    arguments = ["--max-steps", "30", "--save-every", "5", "--keep-last", "99"]
    arguments += ["--train-files=", "--blend", f"{prefixes[0]}=0.7", f"{prefixes[1]}=3e-1"]
    arguments += ["--eval-files", f"few={few.prefix}", f"code={prefixes[0]}", f"code={prefixes[1]}"]
    whole = job.train("blend-whole", *arguments, launcher="deepspeed", ranks=2)
    job.kill_at("blend-killed", 6, *arguments, saved=5, launcher="deepspeed", ranks=2)
    resumed = job.train("blend-killed", *arguments)
    step = resumed_step(job, "blend-killed")
    assert 5 <= step < 30
    assert_same_curve(resumed, whole, RELATIVE)
    assert [line["epochs"] for line in resumed] == [line["epochs"] for line in whole]
    assert all(0 <= line["data_seconds"] < line["step_seconds"] for line in resumed)
    losses = whole[-1]["eval_losses"]
    assert losses == pytest.approx(resumed[-1]["eval_losses"], rel=RELATIVE)
    assert whole[-1]["eval_loss"] == pytest.approx((3 * losses["few"] + 10 * losses["code"]) / 13)

    dataset = WindowDataset(prefixes, 32)
    blend = Blend(prefixes, [0.7, 0.3], dataset.ends)
    state = Checkpoint(job.root / "blend-killed" / "checkpoints" / f"step-{step}").state["data"]
    expected = samples_read(dataset, blend, 2, None, 240)
    assert expected[: 8 * step] + samples_read(dataset, blend, 1, state, 240 - 8 * step) == expected

    log = (job.root / "blend-whole" / "train.log").read_text()
    assert f"\nblend     70.00% {prefixes[0]}: {dataset.ends[0]:,} sequences, " in log
    dropped = 2 + sum(2 * ((source.num_tokens - 1) % 32) for source in dataset.sources)
    assert f"\ndropped   {dropped} tokens at the end of 5 sources, less than a sequence in each\n" in log
    assert re.search(r"\nstep 30  few  validation loss [\d.]+  perplexity", log)
    summary = log.partition("done at step 30: ")[2].splitlines()
    assert summary[0] == f"validation loss {whole[-1]['eval_loss']:.4f} over all sets"
    assert [line.partition(":")[0] for line in summary[1:]] == ["  few", "  code"]
    assert "at best 1.0986 (unigram entropy)" in summary[1]  # of three tokens alike


def test_streamed_text_killed_on_two_ranks_and_resumed_on_one(job):
    """Also with documents apart, which every attention path and recomputation has to keep."""
    text = job.root / "stream.txt"
    text.write_text("\n\n".join(json.loads(line)["text"] for line in job.text.read_text().splitlines()))
    arguments = ["--data.format", "text", "--train-files", str(text), "--split-on", "blank"]
    arguments += ["--max-steps", "20", "--save-every", "5", "--mask-documents", "--reset-positions"]
    whole = job.train("stream-whole", *arguments, launcher="deepspeed", ranks=2)
    job.kill_at("stream-killed", 6, *arguments, saved=5, launcher="deepspeed", ranks=2)
    recompute = ("--activation-checkpointing", "full", "--num-workers", "1")
    resumed = job.train("stream-killed", *arguments, *recompute)
    assert 5 <= resumed_step(job, "stream-killed") < 20
    assert_same_curve(resumed, whole, RELATIVE)
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.4


def resumed_step(job, name: str) -> int:
    """The step that a run went on from, the last time."""
    log = (job.root / name / "train.log").read_text()
    return int(re.findall(r"^resumed .*, step (\d+)$", log, re.MULTILINE)[-1])


def test_finished_run_is_not_trained_again(job, one_rank):
    checkpoint = job.root / "one-rank" / "checkpoints" / "step-10"
    before = (checkpoint / "manifest.json").stat().st_mtime_ns
    finished = job.run("one-rank", "--zero", "0")
    assert finished.code == 0
    assert "Training was finished at step 10" in finished.output
    assert f"validation loss {one_rank[-1]['eval_loss']:.4f}" in finished.output
    assert (checkpoint / "manifest.json").stat().st_mtime_ns == before
    assert job.metrics("one-rank") == one_rank


def test_no_resume_sets_old_checkpoints_aside_and_resume_goes_back(job):
    short = ("--max-steps", "4", "--save-every", "2", "--lr-schedule", "constant")
    first = job.train("afresh", *short)
    again = job.train("afresh", *short, "--no-resume")
    folder = job.root / "afresh" / "checkpoints"
    assert [line["loss"] for line in first] == [line["loss"] for line in again]
    assert (folder / "replaced-1" / "step-4" / "manifest.json").exists()
    assert (folder / "latest").read_text() == "step-4\n"
    assert (job.root / "afresh" / "metrics-1.jsonl").exists()
    back = job.train("afresh", *short, "--resume", str(folder / "step-2"))
    assert [line["loss"] for line in back] == [line["loss"] for line in first]
    assert (folder / "replaced-2" / "step-4" / "manifest.json").exists()


def test_branch_started_again_goes_on_from_its_own_newest(job):
    steady = ("--lr-schedule", "constant", "--save-every", "2")
    trunk = job.train("trunk", *steady, "--max-steps", "4")
    branch = (*steady, "--resume", str(job.root / "trunk" / "checkpoints" / "step-2"))
    job.train("branch", *branch, "--max-steps", "4")
    metrics = job.train("branch", *branch, "--max-steps", "6")
    log = (job.root / "branch" / "train.log").read_text()
    assert f"{job.root}/trunk/checkpoints/step-2, step 2" in log
    assert f"{job.root}/branch/checkpoints/step-4, step 4" in log
    assert [line["step"] for line in metrics] == [3, 4, 5, 6]
    assert [line["loss"] for line in metrics[:2]] == [line["loss"] for line in trunk[2:]]


def test_text_epochs_and_keep_last(job):
    """Straight from text files, for a part of an epoch, keeping two checkpoints."""
    text = ("--train-files", str(job.text), "--eval-files", str(job.root / "*.jsonl"))
    text += ("--cache-dir", str(job.root / "cache"), "--max-steps", "null", "--num-train-epochs", "0.05")
    metrics = job.train("text", *text, "--save-every", "1", "--keep-last", "2")
    steps = len(metrics)
    kept = sorted(path.name for path in (job.root / "text" / "checkpoints").glob("step-*"))
    assert kept == sorted(f"step-{step}" for step in (steps - 1, steps))
    assert job.train("text-again", *text)[0]["loss"] == metrics[0]["loss"]
    assert len(list((job.root / "cache").glob("*.bin"))) == 1  # both runs and both settings share one build


def test_run_folder_says_what_ran(job, one_rank):
    folder = job.root / "one-rank"
    assert "learning_rate: 0.005" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 1
    keys = {"step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "tflops", "mfu"}
    assert keys | {"memory_bytes", "step_seconds", "data_seconds", "epoch"} <= set(one_rank[0])
    log = (folder / "train.log").read_text()
    assert "MegaLite" in log
    assert "done at step 10" in log


def test_progress_bar_on_a_terminal(job):
    """Under a pseudo-terminal the log lines give way to a bar."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = job.command("terminal", "--max-steps", "3")
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment())
    os.close(terminal)
    shown = b""
    while True:
        try:
            chunk = os.read(controller, 4096)
        except OSError:  # Linux says EIO where the other side has closed
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait() == 0
    assert b"3/3" in shown
    assert b"tokens/s" in shown
