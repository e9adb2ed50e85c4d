"""metrics.jsonl: each step once, whole lines, exact floats, strict JSON; and who writes it."""

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalite.errors import UserError
from megalite.training.meters import Meters, clock

VALUES = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 8, "tokens_per_second": 9.0}


def make(run_dir: Path, *, rank: int = 0, resumed_step: int = 0, log_every: int = 10, max_steps: int = 100) -> Meters:
    return Meters(run_dir, rank, max_steps=max_steps, resumed_step=resumed_step, log_every=log_every, tensorboard=False)


def record(run_dir: Path, steps, **options) -> None:
    meters = make(run_dir, **options)
    for step in steps:
        meters.record({"step": step, **VALUES})
    meters.close()


def strict(line: str) -> dict:
    """JSON as everything but Python reads it: without NaN and Infinity."""

    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON: {line}")

    return json.loads(line, parse_constant=refuse)


def steps_in(run_dir: Path) -> list[int]:
    return [strict(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_a_line(tmp_path):
    record(tmp_path / "a" / "b", range(1, 5))
    assert steps_in(tmp_path / "a" / "b") == [1, 2, 3, 4]


def test_resuming_drops_what_came_after(tmp_path):
    record(tmp_path, range(1, 8))
    record(tmp_path, [4, 5], resumed_step=3)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


def test_starting_afresh_drops_everything(tmp_path):
    record(tmp_path, range(1, 8))
    record(tmp_path, [1])
    assert steps_in(tmp_path) == [1]


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', "[1", "4", "null", '{"loss": 1.0}', '{"step": "4"}', "\0\0\0\xff"])
def test_a_last_line_that_is_no_record_is_dropped(tmp_path, tail):
    record(tmp_path, range(1, 4))
    with open(tmp_path / "metrics.jsonl", "a", encoding="latin-1") as file:
        file.write(tail)
    record(tmp_path, [4], resumed_step=3)
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_a_last_line_that_lacks_only_its_end_stays_a_line_of_its_own(tmp_path):
    record(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    record(tmp_path, [4], resumed_step=3)
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_floats_round_trip_exactly(tmp_path):
    meters = make(tmp_path)
    losses = [1 / 3, math.pi * 1e-300, 0.1 + 0.2, 123456789.123456789]
    for step, loss in enumerate(losses, 1):
        meters.record({"step": step, **VALUES, "loss": loss})
    meters.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [strict(line)["loss"] for line in lines] == losses


def test_validation_sets_and_sources_have_scalars_of_their_own(tmp_path):
    meters = Meters(tmp_path, 0, max_steps=1, resumed_step=0, log_every=1, tensorboard=True)
    sets = {"eval_loss": 2.0, "eval_losses": {"web": 1.5, "books": math.nan}, "epochs": {"data/a": 0.25}}
    meters.record({"step": 1, **VALUES, **sets, "grad_norm": None})
    meters.close()
    assert strict((tmp_path / "metrics.jsonl").read_text())["eval_losses"] == {"web": 1.5, "books": None}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = {"eval_loss", "eval_loss/web", "eval_loss/books", "epoch/data/a", *VALUES} - {"grad_norm"}
    assert set(events.Tags()["scalars"]) == tags
    assert events.Scalars("eval_loss/web")[0].value == 1.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_no_number_is_null(tmp_path, value):
    """A gradient may overflow while the loss is finite; a line that only Python can read helps nobody."""
    meters = make(tmp_path, log_every=1)
    meters.record({"step": 1, **VALUES, "grad_norm": value, "loss": value if value is not None else 1.0})
    meters.close()
    assert strict((tmp_path / "metrics.jsonl").read_text())["grad_norm"] is None
    shown = "-" if value is None else str(value)
    assert (tmp_path / "train.log").read_text().rstrip().endswith(f"grad norm {shown}")


def test_each_line_is_on_disk_at_once(tmp_path):
    meters = make(tmp_path)
    meters.record({"step": 1, **VALUES})
    assert steps_in(tmp_path) == [1]
    meters.close()


def test_other_ranks_write_nothing(tmp_path, capsys):
    run_dir = tmp_path / "run"
    meters = make(run_dir, rank=1)
    meters.print("hello")
    meters.record({"step": 1, **VALUES})
    meters.close()
    assert not run_dir.exists()
    assert capsys.readouterr() == ("", "")


def test_a_place_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*run: Not a directory; choose another --run-dir"):
        make(tmp_path / "file" / "run")
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*run: Is a directory"):
        make(tmp_path / "run", resumed_step=1)


def test_a_new_run_keeps_the_metrics_of_the_old(tmp_path):
    for _ in range(3):
        record(tmp_path, [1, 2])
    assert steps_in(tmp_path) == [1, 2]
    assert sorted(path.name for path in tmp_path.glob("metrics*")) == [
        "metrics-1.jsonl",
        "metrics-2.jsonl",
        "metrics.jsonl",
    ]


def test_a_full_disk_costs_the_log_and_not_the_run(tmp_path, capsys):
    meters = make(tmp_path)
    meters._metrics.close()
    meters._metrics = open("/dev/full", "w")  # noqa: SIM115
    for step in (1, 2):
        meters.record({"step": step, **VALUES})
    error = capsys.readouterr().err
    assert error == "warning: cannot write /dev/full: No space left on device; training goes on\n"


def test_a_file_in_tensorboards_place_is_the_users_to_mend(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Meters(tmp_path, 0, max_steps=1, resumed_step=0, log_every=1, tensorboard=True)


def test_lines_come_at_the_first_step_each_log_every_and_the_last(tmp_path, capsys):
    record(tmp_path, range(4, 10), resumed_step=3, log_every=3, max_steps=8 + 1)
    heads = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert heads == ["step 4/9", "step 6/9", "step 9/9"]
    logged = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split("  ")[0] for line in logged] == heads


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (61.4, "1:01"), (59.6, "1:00"), (3723, "1:02:03")])
def test_clock(seconds, shown):
    assert clock(seconds) == shown
