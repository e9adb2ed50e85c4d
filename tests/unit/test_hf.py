"""Hugging Face folders: exports beside transformers, there and back to the bit, and what must not be read."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite import generation
from megalite.config import ModelConfig
from megalite.config_loader import load_config
from megalite.data.tokenizer import Tokenizer
from megalite.interop import hf
from megalite.interop.hf_names import from_their_config, parameter_shapes, to_their_config
from megalite.model.gpt import Stage
from megalite.training.checkpoint_reader import Checkpoint
from tests.unit.checkpoint_files import MODEL, edit_json, write_checkpoint, write_json, write_manifest

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "tied, GQA, QK-norm": {},
    "untied, padded": {"tie_embeddings": False, "vocab_multiple": 256, "qk_norm": False},
    "tied, padded, MHA": {"vocab_multiple": 7, "qk_norm": False, "num_kv_heads": None, "norm_eps": 1e-6},
    "untied, QK-norm, wide heads": {"tie_embeddings": False, "head_dim": 12, "num_kv_heads": 1, "rope_theta": 100.0},
    "tied, not padded": {"vocab_multiple": 1, "qk_norm": False, "num_layers": 1},
}


def make_model(**changes) -> ModelConfig:
    return ModelConfig(**(MODEL.model_dump(exclude_unset=True) | changes))


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs a tool in this process: name, arguments -> (exit code, stdout, stderr)."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "path", list(sys.path))  # the script sets sys.path[0]
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
        return exit_.value.code, *capsys.readouterr()

    return run


def export(checkpoint: Path, output: Path, dtype: str = "fp32", **options) -> Path:
    hf.export_model(*generation.open_checkpoint(checkpoint), output, hf.DTYPES[dtype], **options)
    return output


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def theirs(original, tmp_path_factory):
    """An exported model in three shards: not to be changed."""
    return export(original[0], tmp_path_factory.mktemp("hf") / "model", shard_bytes=40_000)


@pytest.fixture
def theirs_copy(theirs, tmp_path):
    return Path(shutil.copytree(theirs, tmp_path / "theirs"))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_round_trip(changes, tokenizer_dir, tmp_path):
    """transformers computes the same; out, in and out again is equal to the bit; so is the model that comes in."""
    model = make_model(**changes)
    with torch.device("meta"):
        stage = Stage(model, seed=0)
    assert parameter_shapes(model) == {p.global_name: tuple(p.global_shape) for p in stage.parameters()}

    stage = write_checkpoint(tmp_path / "step-1", model, tokenizer_dir)
    first = export(tmp_path / "step-1", tmp_path / "first", shard_bytes=30_000)
    imported = hf.import_model(first, tmp_path / "imported", shard_bytes=30_000)
    second = export(tmp_path / "imported", tmp_path / "second", shard_bytes=30_000)

    files = {path.name: path.read_bytes() for path in first.iterdir()}
    assert len(files) > 6
    assert {path.name: path.read_bytes() for path in second.iterdir()} == files
    again = Checkpoint(tmp_path / "imported")
    again.verify()
    assert again.model == imported
    rows = model.vocab_size
    ours = {p.global_name: p.detach() for p in stage.parameters()}
    for name, tensor in again.weights():
        padded = name in ("embedding.weight", "head.weight")
        assert torch.equal(tensor[:rows] if padded else tensor, ours[name][:rows] if padded else ours[name]), name
        assert not padded or not tensor[rows:].any()

    pytest.importorskip("transformers")
    difference, largest = hf.compare_logits(stage, first, torch.float32)
    assert difference < 1e-4
    assert largest > 1  # or the bound would say little


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_tool_exports_and_verifies(tool, original, tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    output = tmp_path / "hf"
    code, out, err = tool(
        "export_hf.py", "--checkpoint", original[0].parent, "--output", output, "--dtype", dtype, "--verify"
    )
    assert code == 0, err
    assert "verified: transformers' logits differ by at most" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    assert {tensor.dtype for tensor in weights_of(output).values()} == {hf.DTYPES[dtype]}
    # As their own loaders find it, with nothing said.
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert (type(model).__name__, model.dtype) == ("Qwen3ForCausalLM", hf.DTYPES[dtype])
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(output), Tokenizer(original[0] / "tokenizer")
    text = "the quick naïve\n\n日本語 fox"
    assert tokenizer(text)["input_ids"] == ours.encode(text)
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.config.bos_token_id == ours.eod_id
    assert model.config.pad_token_id is None
    assert model.generation_config.pad_token_id == ours.eod_id
    assert model.generate(torch.tensor([ours.encode("the")]), max_new_tokens=2, do_sample=False).shape[0] == 1


def test_tool_says_what_is_not_verified(tool, original, tmp_path, monkeypatch):
    arguments = ("--checkpoint", original[0], "--verify", "--output")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        code, out, _ = tool("export_hf.py", *arguments, tmp_path / "a")
    assert (code, out.splitlines()[1:]) == (
        0,
        ["not verified: transformers is not installed (pip install transformers)"],
    )
    pytest.importorskip("transformers")
    monkeypatch.setattr(hf, "to_their_config", lambda *args: to_their_config(*args) | {"rope_theta": 5.0})
    code, _, err = tool("export_hf.py", *arguments, tmp_path / "b")
    assert code == 1
    assert "do not use this export" in err


def test_special_tokens_of_an_imported_tokenizer(original, tmp_path, theirs_copy):
    """A beginning and a padding token of its own stay what they are."""
    edit_json(
        theirs_copy / "tokenizer_config.json", lambda c: c.update(bos_token={"content": "a"}, pad_token="b", chat=1)
    )
    hf.import_model(theirs_copy, tmp_path / "imported")
    config = json.loads((export(tmp_path / "imported", tmp_path / "out") / "config.json").read_text())
    backend = Tokenizer(tmp_path / "out").backend
    assert (config["bos_token_id"], config["pad_token_id"]) == (backend.token_to_id("a"), backend.token_to_id("b"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_in_exactly(theirs_copy, tmp_path, dtype):
    for file in theirs_copy.glob("*.safetensors"):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    hf.import_model(theirs_copy, tmp_path / "imported")
    again = weights_of(export(tmp_path / "imported", tmp_path / "out"))
    for name, tensor in weights_of(theirs_copy).items():
        assert torch.equal(tensor.float(), again[name]), name


def test_tool_imports(tool, theirs, tmp_path):
    """What it writes opens as a checkpoint, and its model.yaml as a configuration, to the last digit."""
    code, out, err = tool("import_hf.py", "--model", theirs, "--output", tmp_path / "x")
    assert (code, err) == (0, "")
    assert f"--init-from {tmp_path / 'x'}" in out
    checkpoint, _ = generation.open_checkpoint(tmp_path / "x")
    assert checkpoint.weights_only
    assert load_config(["--config", str(tmp_path / "x/model.yaml")]).config.model == checkpoint.model
    generation.load_model(checkpoint)


def test_what_transformers_fills_in(theirs_copy, tmp_path):
    """Keys that old configurations leave out mean what they mean to transformers, not our defaults."""
    transformers = pytest.importorskip("transformers")
    for change in ({"num_attention_heads": 64}, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}):
        config = json.loads((theirs_copy / "config.json").read_text()) | change
        for key in ("rms_norm_eps", "rope_theta", "tie_word_embeddings", "num_key_value_heads", "head_dim"):
            config.pop(key)
        write_json(tmp_path / "config.json", config)
        ours = from_their_config(config, tmp_path)
        reference = transformers.AutoConfig.from_pretrained(tmp_path)
        assert ours.norm_eps == reference.rms_norm_eps
        assert ours.rope_theta == reference.rope_parameters["rope_theta"]
        assert ours.tie_embeddings == reference.tie_word_embeddings
        assert (ours.kv_heads, ours.head_size) == (reference.num_key_value_heads, reference.head_dim)


def edit_config(**changes):
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(changes))


def edit_map(change):
    return lambda folder: edit_json(folder / "model.safetensors.index.json", lambda c: change(c["weight_map"]))


def edit_tensor(name, change):
    def spoil(folder):
        for file in folder.glob("*.safetensors"):
            if name in (tensors := load_file(file)):
                save_file(tensors | {name: change(tensors[name])}, file)

    return spoil


def as_pickle(folder):
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def as_link(name):
    def spoil(folder):
        shutil.move(folder / name, folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return spoil


FIRST, EMBEDDING = "model-00001-of-00003.safetensors", "model.embed_tokens.weight"
HOSTILE = {
    "no folder": (shutil.rmtree, "config.json is missing"),
    "config cut": (lambda f: (f / "config.json").write_text('{"a'), "config.json is not JSON"),
    "config nested": (lambda f: (f / "config.json").write_text("[" * 10**6), "config.json is not JSON"),
    "config a list": (lambda f: write_json(f / "config.json", []), "config.json is not a JSON object"),
    "architecture": (edit_config(architectures=["MistralForCausalLM"]), "architectures ['MistralForCausalLM']"),
    "no architecture": (edit_config(architectures=None), "architectures None"),
    "architectures": (edit_config(architectures=[["LlamaForCausalLM"]]), "only LlamaForCausalLM and Qwen3ForCausalLM"),
    "model type": (edit_config(model_type="llama"), "of model_type 'llama'"),
    "rope_scaling": (edit_config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_scaling is {'rope_type'"),
    "old rope_scaling": (edit_config(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling is {'type'"),
    "rope_parameters": (edit_config(rope_parameters={"rope_type": "yarn"}), "rope_parameters is {'rope_type': 'yarn'}"),
    "rope_parameters a list": (edit_config(rope_parameters=[1]), "rope_parameters is [1]"),
    "partial": (edit_config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "attention_bias": (edit_config(attention_bias=True), "attention_bias is True"),
    "mlp_bias": (edit_config(mlp_bias=True), "mlp_bias is True"),
    "activation": (edit_config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "sliding window": (edit_config(use_sliding_window=True, sliding_window=8), "use_sliding_window is True"),
    "some window": (edit_config(sliding_window=8), "sliding_window is 8"),
    "layers with windows": (edit_config(layer_types=["sliding_attention"] * 2), "layer_types is ['sliding_attention'"),
    "quantized": (edit_config(quantization_config={"bits": 4}), "quantization_config is {'bits': 4}"),
    "own code": (edit_config(auto_map={"AutoModel": "x.Y"}), "auto_map is {'AutoModel': 'x.Y'}"),
    "lines": (edit_config(hidden_act="a\nb"), "hidden_act is 'a\\nb'"),
    "no size": (edit_config(hidden_size=None), "gives no hidden_size"),
    "size a text": (edit_config(num_key_value_heads="2"), "num_key_value_heads: Input should be a valid integer"),
    "size below 1": (edit_config(vocab_size=-1), "vocab_size: Input should be greater"),
    "uneven heads": (edit_config(num_key_value_heads=3), "4 heads of width 8 on 3 key/value heads"),
    "more layers": (edit_config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, but there are"),
    "a layer more": (edit_config(num_hidden_layers=3), "model.layers.2.input_layernorm.weight is missing"),
    "a layer less": (edit_config(num_hidden_layers=1), "'model.layers.1.input_layernorm.weight' is unexpected"),
    "untied": (edit_config(tie_word_embeddings=False), "lm_head.weight is missing"),
    "another width": (edit_config(intermediate_size=65), "gate_proj.weight is [64, 32], config.json says [65, 32]"),
    "vast": (edit_config(vocab_size=10**15), "config.json says [1000000000000000, 32]"),
    "other shape": (edit_tensor(EMBEDDING, lambda t: t[:1]), f"{EMBEDDING} is [1, 32]"),
    "other dtype": (edit_tensor(EMBEDDING, lambda t: t.to(torch.int8)), f"{EMBEDDING} is of dtype I8"),
    "outside": (
        edit_map(lambda m: m.update({EMBEDDING: "../x.safetensors"})),
        "names a file outside its folder: '../x",
    ),
    "absolute": (edit_map(lambda m: m.update({EMBEDDING: "/etc/passwd"})), "outside its folder: '/etc/passwd'"),
    "null byte": (edit_map(lambda m: m.update({EMBEDDING: "a\0"})), "outside its folder: 'a\\x00'"),
    "file gone": (edit_map(lambda m: m.update({EMBEDDING: "x.safetensors"})), "x.safetensors is missing"),
    "tensor gone": (edit_map(lambda m: m.pop(EMBEDDING)), f"{EMBEDDING} is missing"),
    "tensor elsewhere": (
        edit_map(lambda m: m.update({EMBEDDING: m["model.norm.weight"]})),
        f"does not contain tensor {EMBEDDING}",
    ),
    "tensor with lines": (edit_map(lambda m: m.update({"a\nb": FIRST})), "'a\\nb' is unexpected"),
    "map a list": (
        lambda f: write_json(f / "model.safetensors.index.json", {"weight_map": [1]}),
        "has no weight_map",
    ),
    "map of numbers": (edit_map(lambda m: m.update({EMBEDDING: 1})), "has no weight_map"),
    "no weights": (
        lambda f: (f / "model.safetensors.index.json").unlink(),
        "holds no model.safetensors and no",
    ),
    "pickle": (as_pickle, "pytorch_model.bin is a pickle"),
    "pickle in disguise": (lambda f: (f / FIRST).write_bytes(b"\x80\x04."), f"{FIRST} is damaged or no safetensors"),
    "truncated": (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:-1]), f"{FIRST} is damaged"),
    "empty": (lambda f: (f / FIRST).write_bytes(b""), f"{FIRST} is damaged"),
    "weights a link": (as_link(FIRST), f"{FIRST} is a link; copy the folder with what its links point to"),
    "config a link": (as_link("config.json"), "config.json is a link"),
    "index a link": (as_link("model.safetensors.index.json"), "index.json is a link"),
    "tokenizer a link": (as_link("tokenizer.json"), "tokenizer.json is a link"),
    "its configuration a link": (as_link("tokenizer_config.json"), "tokenizer_config.json is a link"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "tokenizer cut": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json is not a tokenizer"),
    "tokenizer of another": (
        lambda f: (edit_config(vocab_size=279)(f), edit_tensor(EMBEDDING, lambda t: t[:279].clone())(f)),
        "its tokenizer has 280 ids, its config.json 279",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders(tool, theirs_copy, tmp_path, case):
    spoil, words = HOSTILE[case]
    spoil(theirs_copy)
    output = tmp_path / "out" / "imported"
    code, out, err = tool("import_hf.py", "--model", theirs_copy, "--output", output)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert words in err
    assert not (output.parent.exists() and list(output.parent.iterdir()))


def test_output_that_is_not_ours(tool, original, theirs, tmp_path):
    """Neither tool touches what is there; an empty folder, and what a killed run left, are in nobody's way."""
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for output in (taken, tmp_path / "file", tmp_path / "link"):
        for command in (("export_hf.py", "--checkpoint", original[0]), ("import_hf.py", "--model", theirs)):
            code, _, err = tool(*command, "--output", output)
            assert (code, err) == (1, f"error: {output} exists and is not an empty folder; choose another --output\n")
    assert (taken / "mine").read_text() == (tmp_path / "file").read_text() == "mine"

    output = tmp_path / "empty"
    output.mkdir()
    (tmp_path / "empty.tmp").mkdir()
    (tmp_path / "empty.tmp" / "half").write_text("")
    assert tool("export_hf.py", "--checkpoint", original[0], "--output", output)[0] == 0
    assert not (output / "half").exists()
    assert not (tmp_path / "empty.tmp").exists()
    code, _, err = tool("export_hf.py", "--checkpoint", original[0], "--output", tmp_path / "file" / "x")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "cannot write" in err


def spoil_weight(folder, value):
    file = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    tensors["embedding.weight"][3, 3] = value
    save_file(tensors, file)
    write_manifest(folder)


@pytest.mark.parametrize(("value", "dtype", "code"), [(1e5, "fp16", 1), (1e5, "bf16", 0), (torch.nan, "fp32", 1)])
def test_weights_that_do_not_fit(tool, checkpoint_copy, tmp_path, value, dtype, code):
    spoil_weight(checkpoint_copy, value)
    output = tmp_path / "out" / "x"
    got, _, err = tool("export_hf.py", "--checkpoint", checkpoint_copy, "--output", output, "--dtype", dtype)
    assert got == code
    assert output.exists() != bool(code)
    if code:
        assert "embedding.weight has values that F" in err
        assert len(err.splitlines()) == 1
        assert not list(output.parent.iterdir())


def test_a_flipped_bit_is_not_exported(tool, checkpoint_copy, tmp_path):
    file = checkpoint_copy / "model-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    code, _, err = tool("export_hf.py", "--checkpoint", checkpoint_copy, "--output", tmp_path / "x")
    assert code == 1
    assert "has another content than the manifest says" in err
    assert not (tmp_path / "x").exists()
