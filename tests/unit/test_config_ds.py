"""DeepSpeed's settings files: what is dropped, what is refused, and that the shipped ones load."""

import json
from pathlib import Path

import pytest

from megalite.config_ds import DERIVED, REPOSITORY, find_ds_config, read_ds_config
from megalite.config_keys import schema_keys
from megalite.errors import ConfigError

SHIPPED = ["zero0", "zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload"]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_json(content: dict | str | bytes) -> str:
        text = json.dumps(content) if isinstance(content, dict) else content
        Path("x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "x.json"

    return write_json


def problem_of(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_ds_config(path)
    return str(caught.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_load_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # so that the repository's copy is found
    settings = read_ds_config(f"ds_configs/{name}.json")
    zero = settings["zero_optimization"]
    assert set(settings) == {"zero_optimization"}
    assert zero["stage"] == int(name[4])
    assert zero["overlap_comm"] is (zero["stage"] >= 2)
    assert zero.get("offload_optimizer", {}).get("device") == ("cpu" if name.endswith("offload") else None)


def test_no_shipped_file_is_untested():
    assert sorted(file.stem for file in (REPOSITORY / "ds_configs").glob("*.json")) == sorted(SHIPPED)


def test_working_directory_wins_over_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_ds_config("ds_configs/zero1.json") == REPOSITORY / "ds_configs/zero1.json"
    Path("ds_configs").mkdir()
    Path("ds_configs/zero1.json").write_text("{}")
    assert find_ds_config("ds_configs/zero1.json") == Path("ds_configs/zero1.json")
    assert find_ds_config(str(tmp_path / "ds_configs/zero1.json")) == tmp_path / "ds_configs/zero1.json"


def test_missing_file_lists_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = ", ".join(sorted(f"ds_configs/{name}.json" for name in SHIPPED))
    for path in ("none.json", str(tmp_path)):
        assert problem_of(path) == f"deepspeed: {path}: no such file; there are {known}"
    monkeypatch.setattr("megalite.config_ds.REPOSITORY", tmp_path)
    assert problem_of("none.json") == "deepspeed: none.json: no such file; there are none"


def test_auto_is_dropped(write):
    settings = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "auto", "params": {"lr": "auto"}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "comms_logger": {},
    }
    assert read_ds_config(write(settings)) == {"zero_optimization": {"stage": 2}, "comms_logger": {}}


@pytest.mark.parametrize("key", DERIVED)
def test_derived_keys_are_refused(write, key):
    assert problem_of(write({key: {"enabled": True}})) == (
        f'x.json: {key} is decided by MegaLite ({DERIVED[key]}); remove it or write "auto"'
    )
    assert DERIVED[key].partition(",")[0] in schema_keys()


ZERO = "x.json: zero_optimization"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"gradient_predivide_factor": 2.0},
            "x.json: gradient_predivide_factor: the gradient norm would be wrong; remove it",
        ),
        ({"gradient_allreduce_op": "sum"}, "x.json: gradient_allreduce_op: the loss is normalised for mean; remove it"),
        ({"zero_optimization": True}, f'{ZERO}: wants an object such as {{"stage": 1}}'),
        ({"zero_optimization": {"stage": 4}}, f"{ZERO}.stage: got 4, wants 0 | 1 | 2 | 3"),
        ({"zero_optimization": {"stage": True}}, f"{ZERO}.stage: got true, wants 0 | 1 | 2 | 3"),
        ({"zero_optimization": {"stage": "3"}}, f'{ZERO}.stage: got "3", wants 0 | 1 | 2 | 3'),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            f"{ZERO}.zero_hpz_partition_size: got 2, and is not supported; remove it",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            f"{ZERO}.zero_quantized_gradients: got true, and is not supported; remove it",
        ),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            f"{ZERO}.round_robin_gradients: checkpoints would hold wrong weights; remove it",
        ),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            f"{ZERO}.compute_grad_norm: clipping and metrics need the norm; remove it",
        ),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            f"{ZERO}.cpu_offload: is deprecated; remove it (today's name is offload_optimizer)",
        ),
        (
            {"zero_optimization": {"stage": 3, "cpu_offload_param": True}},
            f"{ZERO}.cpu_offload_param: is deprecated; remove it (today's name is offload_param)",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            f"{ZERO}.offload_param: not supported; remove it (offload_optimizer is)",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            f'{ZERO}.offload_optimizer.device: got "nvme", wants none | cpu',
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            f"{ZERO}.offload_optimizer: needs zero_optimization.stage 1, 2 or 3",
        ),
        ('{\n"a": 1,\n}', "x.json:3: not JSON: "),
        ("", "x.json:1: not JSON: "),
        ("[]", 'x.json: got list, wants an object such as {"zero_optimization": ...}'),
        ('{"a": {"b": 1, "b": 1}}', "x.json: b: given twice; keep one of the two"),
        ('{"a": NaN}', "x.json: NaN is not JSON; write a number"),
        ('{"a": ' + "9" * 9000 + "}", "x.json: not JSON that can be read: "),
        ('{"a": ' + "[" * 200_000, "x.json: not JSON that can be read: "),
        (b"\xff", "x.json: not UTF-8 (byte 0); save it as UTF-8"),
    ],
)
def test_refused(write, settings, message):
    problem = problem_of(write(settings))
    assert problem.startswith(message)
    assert "\n" not in problem
    if not message.endswith(" "):
        assert problem == message


def test_unreadable_file(write, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    path = write({})
    monkeypatch.setattr(Path, "read_text", refuse)
    assert problem_of(path) == "deepspeed: x.json: Permission denied"


def test_harmless_settings_pass(write):
    settings = {
        "gradient_predivide_factor": 1.0,
        "steps_per_print": 10,
        "zero_optimization": {
            "stage": 3,
            "round_robin_gradients": False,
            "zero_hpz_partition_size": 1,
            "mics_shard_size": -1,
            "offload_param": {"device": "none"},
            "offload_optimizer": {"device": "cpu"},
        },
    }
    assert read_ds_config(write(settings)) == settings


def test_every_problem_is_reported(write):
    problem = problem_of(
        write({"fp16": {"enabled": True}, "gradient_clipping": 1.0, "zero_optimization": {"stage": 9}})
    )
    assert len(problem.split("\n")) == 3
    assert all(line.startswith("x.json: ") for line in problem.split("\n"))
