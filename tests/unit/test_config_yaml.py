"""YAML files in, with the place of every error, and `--print-config` out."""

import time
from pathlib import Path

import pytest
import yaml

from megalite.config import Config
from megalite.config_keys import schema_keys
from megalite.config_loader import format_config, load_config
from megalite.config_yaml import format_value, parse_scalar
from tests.unit.test_config import BLEND_WANTS, problems_of


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write x.yaml into an empty working directory; the arguments that load it."""
    monkeypatch.chdir(tmp_path)

    def write_yaml(text: str | bytes) -> list[str]:
        Path("x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--config", "x.yaml"]

    return write_yaml


def test_precedence_and_sources(write):
    argv = write("model:\ntraining:\n  learning_rate: 1e-4\n  seed: 7\ndeepspeed: a.json\n")
    loaded = load_config([*argv, "--seed", "8"])
    assert (loaded.path, loaded.print_config) == ("x.yaml", False)
    assert loaded.config.training.learning_rate == 1e-4
    assert loaded.config.training.seed == 8
    assert loaded.config.model == Config().model  # `model:` with nothing under it
    expected = {
        "training.learning_rate": "x.yaml:3",
        "training.seed": "command line (--seed)",
        "deepspeed": "x.yaml:5",
    }
    assert {name: source for name, source in loaded.sources.items() if source != "default"} == expected
    assert set(loaded.sources) == set(schema_keys())


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null\n", "\ufeff", "model: {}\n", "model: ~\ndata:\n"])
def test_empty_files_are_the_defaults(write, text):
    assert load_config(write(text)).config == Config()


def test_anchors_and_number_spellings(write):
    text = "data: {train_files: &f [a, b], eval_files: *f, block_size: &n 512}\nmodel: {n_positions: *n}\n"
    text += "training: {learning_rate: 5E-4, adam_eps: 1e-8, min_learning_rate: .1e-3, z_loss: 1.e-5}\n"
    config = load_config(write(text)).config
    assert config.data.eval_files == config.data.train_files == ["a", "b"]
    assert config.model.n_positions == 512
    values = (config.training.learning_rate, config.training.adam_eps, config.training.min_learning_rate)
    assert (*values, config.training.z_loss) == (5e-4, 1e-8, 1e-4, 1e-5)
    assert load_config(write("logging: {run_dir: 2024-13-45}")).config.logging.run_dir == "2024-13-45"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


BOMB = "a: &a0 [x, x]\n" + "".join(f"k{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
WIDE = f"data: {{eval_files: {{a: &a [{'x, ' * 999}], {', '.join(f'b{i}: *a' for i in range(999))}}}}}"  # 10^6 files
EVAL_WANTS = "wants list of str or {[A-Za-z0-9_.-]+: list of str, ...}"
YAML_ERRORS = [
    (
        "training:\n  lerning_rate: 1",
        "x.yaml:2: training.lerning_rate: unknown key; did you mean training.learning_rate?",
    ),
    ("\nlearning_rate: 1", "x.yaml:2: learning_rate: unknown key; did you mean training.learning_rate?"),
    ("data:\n  num_heads: 1", "x.yaml:2: data.num_heads: unknown key; did you mean model.num_heads?"),
    ("modle: {}", "x.yaml:1: modle: unknown key; did you mean model?"),
    ("xyzzy: 1", "x.yaml:1: xyzzy: unknown key; see --help"),
    ("training.seed: 1", "x.yaml:1: training.seed: write seed under training:"),
    ('"a\\nb": 1', "x.yaml:1: a?b: unknown key; see --help"),
    ("training:\n  max_steps: ten", 'x.yaml:2: training.max_steps: got "ten" (str), wants int >= 1 or null'),
    ("training: {max_steps: !!int ten}", 'x.yaml:1: training.max_steps: got "ten" (str), wants int >= 1 or null'),
    ("training: {seed: -1}", "x.yaml:1: training.seed: got -1 (int), wants int >= 0"),
    (f"training: {{z_loss: {'9' * 400}}}", "x.yaml:1: training.z_loss: got a huge number (int), wants float >= 0"),
    (f"training: {{seed: -{'9' * 9000}}}", 'x.yaml:1: training.seed: got "-9999'),
    ("data: {train_files: a.txt}", 'x.yaml:1: data.train_files: got "a.txt" (str), wants list of str'),
    ("data: {train_files: [a, 5]}", "x.yaml:1: data.train_files: got 5 (int), wants list of str"),
    ("model: {vocab_size: }", "x.yaml:1: model.vocab_size: got null, wants int >= 1"),
    ("model: {vocab_size: {a: 1}}", "x.yaml:1: model.vocab_size: got a mapping, wants int >= 1"),
    ("model: {vocab_size: [1]}", "x.yaml:1: model.vocab_size: got [1] (list), wants int >= 1"),
    ("data: {train_files: [[a]]}", "x.yaml:1: data.train_files: got a list, wants list of str"),
    ("data: {train_files: &a [*a]}", "x.yaml:1: data.train_files: got a list, wants list of str"),
    ("data:\n blend: [a]", f'x.yaml:2: data.blend: got "a" (str), {BLEND_WANTS}'),
    ("data: {blend: {a: 1}}", f"x.yaml:1: data.blend: got a mapping, {BLEND_WANTS}"),
    ("data: {blend: [[a, 1]]}", f"x.yaml:1: data.blend: got a list, {BLEND_WANTS}"),
    (
        "data:\n blend:\n  - {prefix: a, weight: 1}\n  - prefix: b\n    weight: -1",
        f"x.yaml:5: data.blend: got -1 (int), {BLEND_WANTS}",
    ),
    ("data:\n blend:\n  - {prefix: a}", f'x.yaml:3: data.blend: got {{prefix: "a"}} (dict), {BLEND_WANTS}'),
    ("data: {blend: [{prefix: [a], weight: 1}]}", f"x.yaml:1: data.blend: got a list, {BLEND_WANTS}"),
    (
        "data:\n blend:\n  - prefix: a\n    wieght: 1",
        f"x.yaml:4: data.blend.wieght: unknown key; {BLEND_WANTS}",
    ),
    ("data: {blend: [{prefix: a, prefix: b}]}", "x.yaml:1: data.blend.prefix: already given on line 1; keep one"),
    ("data: {blend: [!mine {prefix: a}]}", "x.yaml:1: data.blend: tag !mine is not allowed; remove it"),
    ("data:\n eval_files:\n  web: a", f'x.yaml:3: data.eval_files: got "a" (str), {EVAL_WANTS}'),
    ("data:\n eval_files:\n  web:\n   - a\n   - 5", f"x.yaml:5: data.eval_files: got 5 (int), {EVAL_WANTS}"),
    ("data:\n eval_files: {a/b: [c]}", f'x.yaml:2: data.eval_files: got "a/b" (str), {EVAL_WANTS}'),
    ("data: {eval_files: [a, 5]}", f"x.yaml:1: data.eval_files: got 5 (int), {EVAL_WANTS}"),
    ("data: {eval_files: {a: {b: c}}}", f"x.yaml:1: data.eval_files: got a mapping, {EVAL_WANTS}"),
    ("data: {eval_files: {a: [b], a: [c]}}", "x.yaml:1: data.eval_files.a: already given on line 1; keep one"),
    (WIDE, "x.yaml:1: data.eval_files: more than 262144 parts; write fewer"),
    ("checkpoint: {resume: no}", "x.yaml:1: checkpoint.resume: got false (bool), wants str"),
    ("model: 5", "x.yaml:1: model: got 5, wants a mapping of its keys"),
    ("model: [1]", "x.yaml:1: model: got a list, wants a mapping of its keys"),
    ("- a", "x.yaml:1: got a list, wants a mapping of sections (model:, data:, ...)"),
    ("hello", 'x.yaml:1: got "hello", wants a mapping of sections (model:, data:, ...)'),
    (
        "data:\n  seed: 1\n  block_size: 8\n  block_size: 9",
        "x.yaml:4: data.block_size: already given on line 3; keep one",
    ),
    ("data: {}\ndata: {}", "x.yaml:2: data: already given on line 1; keep one of the two"),
    ("data: {<<: {block_size: 4}}", "x.yaml:1: data.<<: merge keys are not supported; write the keys out"),
    ("? [a]\n: 1", "x.yaml:1: top level: a key must be a name, got a list"),
    ("model: !!python/dict {}", "x.yaml:1: model: tag !!python/dict is not allowed; remove it"),
    (
        "\ndeepspeed: !!python/object/apply:os.system [id]",
        "x.yaml:2: deepspeed: tag !!python/object/apply:os.system is not allowed; write a plain value",
    ),
    ("deepspeed: !mine x", "x.yaml:1: deepspeed: tag !mine is not allowed; write a plain value"),
    ("model:\n\tvocab_size: 1", "x.yaml:2: not YAML: while scanning for the next token found character '\\t'"),
    ("model: {a: 1\nb: [", "x.yaml:2: not YAML: while parsing"),
    ("a: *b", "x.yaml:1: not YAML: found undefined alias"),
    ("a: 1\n---\nb: 1", "x.yaml:2: not YAML: expected a single document"),
    ("a: 1\nb: \x07", "x.yaml:2: not YAML: character U+0007 is not allowed"),
    ('a: "\\UFFFFFFFF"', "x.yaml: not YAML: "),
    (f"a: {nested(1200)}", "x.yaml: not YAML: RecursionError: "),
    (b"a: \xff", "x.yaml: not UTF-8 (byte 3); save it as UTF-8"),
    ("#" * 300_000, "x.yaml: over 256 KiB, too long for a configuration"),
    (BOMB, "x.yaml:1: a: unknown key; "),
    (BOMB + "model: *a59", "x.yaml:61: model: got a list, wants a mapping of its keys"),
]


@pytest.mark.parametrize(("text", "message"), YAML_ERRORS, ids=range(len(YAML_ERRORS)))
def test_yaml_errors_name_the_line(write, text, message):
    started = time.monotonic()
    lines = problems_of(write(text))
    assert any(line.startswith(message) for line in lines), lines
    assert time.monotonic() - started < 5


def test_files_that_cannot_be_read(write, tmp_path):
    advice = "give --config the path of a YAML file"
    assert problems_of(["--config", "none.yaml"]) == [f"none.yaml: No such file or directory; {advice}"]
    assert problems_of(["--config=."]) == [f".: Is a directory; {advice}"]


def test_every_problem_is_reported(write):
    argv = write("model:\n  hidden_sise: 1\n  num_layers: 0\ntraining:\n  seed: x\n")
    lines = problems_of([*argv, "--max-steps", "0", "--foo"])
    assert [line.partition(": ")[0] for line in lines] == ["x.yaml:2", "--foo", "x.yaml:3", "x.yaml:5", "--max-steps"]


AWKWARD = [
    "null",
    "true",
    "1e-4",
    "123",
    "",
    "a: b",
    "# c",
    "it's",
    '"q"',
    "a\nb",
    "é😀",
    "*a",
    "-",
    "~",
    "\x85\x07",
    "=",
]


def test_print_config_loads_to_the_same(write):
    files = ["--train-files", *AWKWARD, "--json-key", "a b", "--run-dir", "/x/y_1.0"]
    argv = write("training: {learning_rate: 1e-5, num_train_epochs: 2}\ncheckpoint: {resume: 'null'}\n")
    loaded = load_config([*argv, *files, "--qk-norm", "--zero", "2", "--print-config"])
    assert loaded.print_config
    text = format_config(loaded)
    again = load_config(write(text))
    assert again.config == loaded.config
    assert again.config.data.train_files == AWKWARD
    rows = text.splitlines()
    (row,) = (row for row in rows if row.startswith("  learning_rate: "))
    assert row.split() == ["learning_rate:", "1.0e-05", "#", "x.yaml:1"]  # the point: YAML 1.1 readers want it
    (row,) = (row for row in rows if row.startswith("deepspeed: "))
    assert row.split("  ")[-1] == "# command line (--zero)"
    assert sum("  # default" in row for row in rows) == len(schema_keys()) - 8


def test_blend_and_validation_sets_load_to_the_same(write):
    names = ["null", "1.5", "-", "web_2"]
    text = "data:\n  blend:\n" + "".join(
        f"  - {{prefix: {format_value(path)}, weight: 0.1}}\n" for path in AWKWARD if path
    )
    text += "  eval_files:\n" + "".join(f"    {format_value(name)}: {format_value(AWKWARD)}\n" for name in names)
    loaded = load_config(write(text))
    assert [(entry.prefix, entry.weight) for entry in loaded.config.data.blend] == [(p, 0.1) for p in AWKWARD if p]
    assert loaded.config.data.eval_files == dict.fromkeys(names, AWKWARD)
    text = format_config(loaded)
    again = load_config(write(text))
    assert again.config == loaded.config
    assert yaml.safe_load(text)["data"]["eval_files"] == loaded.config.data.eval_files  # as any reader sees it


def test_format_value_round_trips():
    for value in [*AWKWARD, 0, -3, 1e-8, 1e300, 0.1, True, False, None]:
        text = format_value(value)
        assert "\n" not in text
        if not text.startswith('"'):
            assert parse_scalar(text) == value
