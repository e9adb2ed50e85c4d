"""The schema, its cross-checks, and the command line: every rule and every message."""

import subprocess
import sys
from pathlib import Path

import pytest

from megalite.config import Config
from megalite.config_check import check, check_schedule, resolve_batch
from megalite.config_keys import SPECIAL_FLAGS, Key, find_key, schema_keys, show
from megalite.config_loader import load_config
from megalite.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
LEGAL = {"data.train_files": ["a.txt"], "training.max_steps": 100}
BLEND = {"data.train_files": [], "data.blend": [{"prefix": "a", "weight": 0.7}, {"prefix": "b", "weight": 2}]}


def make(settings: dict) -> Config:
    """A configuration that passes `check`, but for `settings`."""
    tree: dict = {}
    for name, value in (LEGAL | settings).items():
        section, _, leaf = name.rpartition(".")
        tree.setdefault(section, {})[leaf] = value
    return Config.model_validate(tree)


def problems_of(argv: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    return str(caught.value).split("\n")


# Cross-checks


def test_legal_configurations_pass():
    check(make({}))
    check(make({"parallel.tensor": 4, "parallel.sequence": True, "parallel.context": 3, "data.block_size": 768}))
    check(make({"parallel.tensor": 4, "model.num_kv_heads": 2, "parallel.pipeline": 3, "parallel.virtual": 2}))
    check(make({"training.lr_schedule": "wsd", "training.decay_steps": 60, "training.warmup_steps": 40}))
    check(make({"model.num_heads": 7, "model.head_dim": 64}))
    check(make({"training.max_steps": None, "training.num_train_epochs": 0.5, "training.warmup_steps": 1000}))
    check(make({"training.warmup_steps": 100, "training.min_learning_rate": 3e-4, "model.num_kv_heads": 4}))
    check(make(BLEND))
    assert make({"data.eval_files": {"web": ["a", "b"]}}).data.eval_sets == {"web": ["a", "b"]}
    assert make({"data.eval_files": ["a", "b"]}).data.eval_sets == {"": ["a", "b"]}
    assert make({"data.eval_files": {}}).data.eval_sets == make({}).data.eval_sets == {}


ILLEGAL = [
    (
        {"data.block_size": 2048},
        "data.block_size = 2048 is longer than model.n_positions = 1024, the longest context of the model; "
        "lower the one or raise the other",
    ),
    (
        {"model.num_heads": 7},
        "model.hidden_size = 768 is not divisible by model.num_heads = 7; change one of them or set model.head_dim",
    ),
    (
        {"model.head_dim": 65},
        "model.head_dim = 65 is odd, but RoPE rotates pairs of dimensions; make it even",
    ),
    (
        {"model.num_heads": 256},
        "model.hidden_size / model.num_heads = 3 is odd, but RoPE rotates pairs of dimensions; make it even",
    ),
    (
        {"model.num_kv_heads": 5},
        "model.num_heads = 12 is not divisible by model.num_kv_heads = 5, but each key/value head serves as many "
        "query heads; change one of them",
    ),
    (
        {"model.num_kv_heads": 24},
        "model.num_heads = 12 is not divisible by model.num_kv_heads = 24, but each key/value head serves as many "
        "query heads; change one of them",
    ),
    (
        {"parallel.tensor": 8},
        "model.num_heads = 12 is not divisible by parallel.tensor = 8, which gives each rank an equal share; this "
        "model allows tensor 1, 2 or 4",
    ),
    (
        {"parallel.tensor": 3, "model.intermediate_size": 2304},
        "model.vocab_size padded to model.vocab_multiple = 32000 is not divisible by parallel.tensor = 3, which gives "
        "each rank an equal share; this model allows tensor 1, 2 or 4, or raise model.vocab_multiple to 384",
    ),
    (
        {"parallel.tensor": 4, "model.num_kv_heads": 6},
        "model.num_kv_heads = 6 neither gives each of parallel.tensor = 4 ranks as many heads, nor each head as many "
        "ranks to share its width of 64; this model allows tensor 1 or 2",
    ),
    (
        {"parallel.tensor": 2, "training.optimizer": "muon"},
        "training.optimizer: muon works on whole matrices, of which parallel.tensor = 2 gives each rank a part; set "
        "parallel.tensor to 1, or take adamw",
    ),
    (
        {"parallel.tensor": 2, "training.compile": "blocks"},
        "training.compile: blocks does not go with parallel.tensor = 2, whose collectives would break the graphs; set "
        "it to none",
    ),
    (
        {"parallel.tensor": 4, "parallel.sequence": True, "data.block_size": 258},
        "data.block_size = 258 is not divisible by parallel.tensor = 4, the ranks that share a sequence; set it to "
        "256 or 260",
    ),
    (
        {"parallel.tensor": 2, "parallel.sequence": True, "parallel.context": 2, "data.block_size": 258},
        "data.block_size = 258 is not divisible by parallel.context x parallel.tensor = 4, the ranks that share a "
        "sequence; set it to 256 or 260",
    ),
    (
        {"parallel.context": 5, "data.block_size": 1000},
        "parallel.context = 5 does not divide the 12 query and 12 key/value heads of a rank, which it exchanges for "
        "positions; this model allows context 1, 2, 3, 4, 6 or 12",
    ),
    (
        {"parallel.context": 2, "training.compile": "blocks"},
        "training.compile: blocks does not go with parallel.context = 2, whose exchange would break the graphs; set it "
        "to none",
    ),
    (
        {"model.dropout": 0.1, "training.compile": "blocks"},
        "training.compile: blocks does not go with model.dropout = 0.1, which differs from block to block; set one of "
        "them to none, or 0",
    ),
    ({"parallel.virtual": 2}, "parallel.virtual = 2 needs parallel.pipeline above 1; set one of them"),
    (
        {"parallel.pipeline": 2, "parallel.schedule": "interleaved"},
        "parallel.schedule = interleaved and parallel.virtual = 1: interleaved is the schedule of virtual above 1, and "
        "of no other; set schedule to auto",
    ),
    (
        {"parallel.pipeline": 2, "parallel.virtual": 2, "parallel.schedule": "1f1b"},
        "parallel.schedule = 1f1b and parallel.virtual = 2: interleaved is the schedule of virtual above 1, and of no "
        "other; set schedule to auto",
    ),
    (
        {"training.max_steps": None},
        "training.max_steps, training.num_train_epochs: neither is set; give --max-steps N",
    ),
    (
        {"training.num_train_epochs": 2},
        "training.max_steps = 100 and training.num_train_epochs = 2 both set the run's length; give one, and null "
        "for the other",
    ),
    (
        {"training.decay_steps": 5},
        "training.decay_steps = 5 has no meaning with training.lr_schedule = cosine; set lr_schedule to wsd or "
        "decay_steps to null",
    ),
    (
        {"training.lr_schedule": "wsd", "training.decay_steps": 61, "training.warmup_steps": 40},
        "training.warmup_steps + training.decay_steps = 40 + 61 is more than training.max_steps = 100; lower one of "
        "the first two or raise max_steps",
    ),
    (
        {"training.min_learning_rate": 1e-2},
        "training.min_learning_rate = 0.01 is above training.learning_rate = 0.0003, the peak; lower the one or "
        "raise the other",
    ),
    ({"data.train_files": []}, "data.train_files: nothing to train on; give --train-files PATH"),
    (
        {"data.blend": [{"prefix": "a", "weight": 1}]},
        "data.train_files and data.blend both say what to train on; give one, and [] for the other (--train-files= "
        "empties it)",
    ),
    (
        BLEND | {"data.blend": [{"prefix": prefix, "weight": 1} for prefix in "aba"]},
        "data.blend: a is given twice; give it once, with the sum of the weights",
    ),
    (
        BLEND | {"training.max_steps": None, "training.num_train_epochs": 1.5},
        "training.num_train_epochs = 1.5 has no meaning with data.blend, whose sources pass at different rates; give "
        "training.max_steps",
    ),
    ({"data.eval_files": {"web": []}}, "data.eval_files.web: no files; name some, or remove the set"),
]


@pytest.mark.parametrize(("settings", "message"), ILLEGAL)
def test_illegal_combination_is_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError) as caught:
        check(make(settings))
    assert str(caught.value) == message


def test_context_with_more_tensor_ranks_than_heads():
    with pytest.raises(ConfigError, match=r"num_heads = 12 is not divisible by parallel.tensor = 24") as caught:
        check(make({"parallel.tensor": 24, "parallel.context": 2}))
    assert "parallel.context" not in str(caught.value)


def test_all_illegal_combinations_are_reported():
    with pytest.raises(ConfigError) as caught:
        check(make({"parallel.tensor": 5, "data.train_files": [], "training.max_steps": None}))
    lines = str(caught.value).split("\n")
    share = "which gives each rank an equal share; this model allows tensor 1, 2 or 4"
    assert f"model.num_heads = 12 is not divisible by parallel.tensor = 5, {share}" in lines
    assert len(lines) == 4  # 32000 % 5 == 0: the vocabulary is no problem; the MLP is


def test_schedule_is_checked_again_when_epochs_give_the_steps():
    settings = {"training.lr_schedule": "wsd", "training.warmup_steps": 6, "training.decay_steps": 4}
    training = make({"training.max_steps": None, "training.num_train_epochs": 1, **settings}).training
    check_schedule(training, 10)
    with pytest.raises(ConfigError, match=r"= 6 \+ 4 is more than training.max_steps = 9; "):
        check_schedule(training, 9)


@pytest.mark.parametrize(
    ("accumulation", "global_batch", "expected"),
    [(None, None, (1, 12)), (5, None, (5, 60)), (None, 36, (3, 36)), (3, 36, (3, 36))],
)
def test_resolve_batch(accumulation, global_batch, expected):
    settings = {"gradient_accumulation_steps": accumulation, "global_batch_size": global_batch}
    config = make({f"training.{name}": value for name, value in settings.items()})
    config.training.per_device_train_batch_size = 4
    assert resolve_batch(config, dp_size=3) == expected


BATCH = "training.per_device_train_batch_size *"


@pytest.mark.parametrize(
    ("accumulation", "global_batch", "message"),
    [
        (
            2,
            36,
            f"training.global_batch_size = 36, but {BATCH} training.gradient_accumulation_steps * data-parallel size = "
            "8 * 2 * 3 = 48; give only one of global_batch_size and gradient_accumulation_steps",
        ),
        (
            None,
            50,
            f"training.global_batch_size = 50 is not a multiple of {BATCH} data-parallel size = 8 * 3 = 24; "
            "set it to 48 or 72, or change per_device_train_batch_size",
        ),
        (
            None,
            23,
            f"training.global_batch_size = 23 is not a multiple of {BATCH} data-parallel size = 8 * 3 = 24; "
            "set it to 24, or change per_device_train_batch_size",
        ),
    ],
)
def test_batch_sizes_that_do_not_fit(accumulation, global_batch, message):
    config = make({"training.gradient_accumulation_steps": accumulation, "training.global_batch_size": global_batch})
    with pytest.raises(ConfigError) as caught:
        resolve_batch(config, dp_size=3)
    assert str(caught.value) == message


# Command line


@pytest.mark.parametrize(
    "argv",
    [
        ["--training.learning_rate", "2e-4"],
        ["--training.learning-rate=2e-4"],
        ["--learning-rate", "2e-4"],
        ["--learning_rate=2e-4"],
        ["--learning_rate", "1", "--learning-rate=2e-4"],  # the last wins
    ],
)
def test_spellings_of_a_flag(argv):
    loaded = load_config(argv)
    assert loaded.config.training.learning_rate == 2e-4
    flag = argv[-1].partition("=")[0] if "=" in argv[-1] else argv[-2]
    assert loaded.sources["training.learning_rate"] == f"command line ({flag})"
    assert loaded.sources["training.seed"] == "default"


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--qk-norm"], "model.qk_norm", True),
        (["--qk-norm", "true"], "model.qk_norm", True),
        (["--tie-embeddings", "false"], "model.tie_embeddings", False),
        (["--tie-embeddings=false"], "model.tie_embeddings", False),
        (["--train-files", "a.txt", "b/*.txt", "--seed", "1"], "data.train_files", ["a.txt", "b/*.txt"]),
        (["--train-files=123"], "data.train_files", ["123"]),
        (["--eval-files="], "data.eval_files", []),
        (["--resume", "123"], "checkpoint.resume", "123"),
        (["--no-resume"], "checkpoint.resume", "none"),
        (["--run-dir", "none"], "logging.run_dir", None),
        (["--eval-every", "null"], "training.eval_every", None),
        (["--activation-checkpointing", "none"], "training.activation_checkpointing", "none"),
        (["--zero", "3"], "deepspeed", "ds_configs/zero3.json"),
        (["--zero=0"], "deepspeed", "ds_configs/zero0.json"),
        (["--deepspeed", "mine.json"], "deepspeed", "mine.json"),
        (["--zero", "3", "--deepspeed", "mine.json"], "deepspeed", "mine.json"),
        (["--z-loss", "1"], "training.z_loss", 1.0),
        (["--blend="], "data.blend", []),
        (["--eval-files", "a", "./x=1.txt"], "data.eval_files", ["a", "./x=1.txt"]),
        (["--eval-files", "web=a", "1.b=c=d/*", "web=b"], "data.eval_files", {"web": ["a", "b"], "1.b": ["c=d/*"]}),
        (["--eval-files=web=a"], "data.eval_files", {"web": ["a"]}),
    ],
)
def test_values_on_the_command_line(argv, name, value):
    loaded = load_config(argv)
    node = loaded.config
    for part in name.split("."):
        node = getattr(node, part)
    assert node == value
    assert type(node) is type(value)
    assert loaded.sources[name].startswith("command line (--")


def test_a_blend_on_the_command_line():
    """The last = separates."""
    blend = load_config(["--blend", "a=0.7", "dir/x=1/b=2e3"]).config.data.blend
    assert [(entry.prefix, entry.weight) for entry in blend] == [("a", 0.7), ("dir/x=1/b", 2000.0)]


@pytest.mark.parametrize("argv", [["--local_rank=3"], ["--local-rank", "3"]])
def test_launcher_arguments_are_ignored(argv):
    assert load_config(argv) == load_config([])


BLEND_WANTS = "wants list of {prefix: str, weight: float > 0}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning-rate", "1"], "--lerning-rate: unknown key; did you mean --training.learning_rate?"),
        (["--model.block_size", "1"], "--model.block_size: unknown key; did you mean --data.block_size?"),
        (["--zeroo", "1"], "--zeroo: unknown key; did you mean --zero?"),
        (["--xyzzy=1"], "--xyzzy: unknown key; see --help"),
        (["--max-steps"], "--max-steps: needs a value: int >= 1 or null"),
        (["--train-files", "--qk-norm"], "--train-files: needs a value: list of str"),
        (["--config"], "--config: needs a value: PATH: a YAML file of the keys below; optional, as every key has a "),
        (["--config="], "--config: needs a value: PATH: "),
        (["--zero", "4"], '--zero: got "4", wants 0 | 1 | 2 | 3'),
        (["--no-resume=1"], "--no-resume: takes no value"),
        (["--print-config=yes"], "--print-config: takes no value"),
        (["a.yaml"], "a.yaml: unexpected argument; did you mean --config a.yaml?"),
        (["--seed", "1", "2"], "2: unexpected argument; flags start with --"),
        (["--max-steps", "ten"], '--max-steps: training.max_steps: got "ten" (str), wants int >= 1 or null'),
        (["--max_steps=0"], "--max_steps: training.max_steps: got 0 (int), wants int >= 1 or null"),
        (["--max-steps", "1e3"], "--max-steps: training.max_steps: got 1000.0 (float), wants int >= 1 or null"),
        (["--max-steps", "true"], "--max-steps: training.max_steps: got true (bool), wants int >= 1 or null"),
        (["--vocab-size", "null"], "--vocab-size: model.vocab_size: got null, wants int >= 1"),
        (["--adam-beta1", "1"], "--adam-beta1: training.adam_beta1: got 1 (int), wants float >= 0, < 1"),
        (["--learning-rate", ".nan"], "--learning-rate: training.learning_rate: got nan (float), wants float > 0"),
        (["--learning-rate", "1e999"], "--learning-rate: training.learning_rate: got inf (float), wants float > 0"),
        (["--qk-norm", "maybe"], '--qk-norm: model.qk_norm: got "maybe" (str), wants true | false'),
        (["--blend", "a=1", "b"], '--blend: got "b", wants PATH=WEIGHT'),
        (["--blend", "a=1", "b="], f"--blend: data.blend: got null, {BLEND_WANTS}"),
        (["--blend", "=1"], f'--blend: data.blend: got "" (str), {BLEND_WANTS}'),
        (["--blend", "a=0"], f"--blend: data.blend: got 0 (int), {BLEND_WANTS}"),
        (["--blend", "a=-1"], f"--blend: data.blend: got -1 (int), {BLEND_WANTS}"),
        (["--blend", "a=.nan"], f"--blend: data.blend: got nan (float), {BLEND_WANTS}"),
        (["--blend", "a=.inf"], f"--blend: data.blend: got inf (float), {BLEND_WANTS}"),
        (
            ["--eval-files", "web=a", "b"],
            '--eval-files: "b" has no name, but others have; give each as NAME=PATH, or none',
        ),
        (["--precision", "fp8"], '--precision: training.precision: got "fp8" (str), wants fp32 | bf16 | fp16'),
    ],
)
def test_command_line_errors(argv, message):
    (line,) = problems_of(argv)
    assert line.startswith(message)
    if not message.endswith(" "):
        assert line == message


def test_ambiguous_leaf_lists_the_choices():
    twice = {name: Key(name, None, "", {"type": "string"}) for name in ("data.dir", "logging.dir")}
    with pytest.raises(ConfigError, match=r"^ambiguous; give one of data\.dir, logging\.dir$"):
        find_key("dir", twice)
    assert find_key("logging.dir", twice) is twice["logging.dir"]


def test_special_flags_shadow_no_key():
    assert not {key.leaf for key in schema_keys().values()} & set(SPECIAL_FLAGS)


def test_help_names_every_key_flag_type_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--config", "missing.yaml", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    flags, *sections = text.split("\n\n")[2:]
    for flag in ("config PATH", "zero 0..3", "no-resume", "print-config", "help", "local-rank"):
        assert f"  --{flag.partition(' ')[0]} " in flags
    by_section = {section.partition(":\n")[0]: " ".join(section.split()) for section in sections}
    for key in schema_keys().values():
        section = by_section[key.name.rpartition(".")[0] or "top level"]
        assert f" {key.leaf} {' '.join(key.meaning.split())} [{key.wants}; default {show(key.default)}]" in section
        assert key.meaning


# Shipped files and the process


def test_no_config_has_been_forgotten():
    assert CONFIGS, "configs/ holds no YAML file"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_load(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    loaded = load_config(["--config", str(path), "--train-files", "a.txt"])
    check(loaded.config)


def test_configuration_imports_no_torch():
    code = "import sys, megalite.config_loader, megalite.config_ds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_wrong_configuration_exits_78():
    code = "from megalite.config_loader import load_config; from megalite.errors import run_main; "
    code += "run_main(lambda: load_config(['--foo']))"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (78, "error: --foo: unknown key; see --help\n")
