"""The rules of the house, read from the source: who imports whom, and what nobody may do."""

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("megalite", "kernels", "tools") for path in (REPOSITORY / folder).rglob("*.py"))
EVERY_SOURCE = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))

# From the bottom up: a unit imports only from those below it, and from itself.
LAYERS = [
    {"errors"},
    {"config", "topology", "kernels"},
    {"data", "comms"},
    {"layers", "pipeline"},
    {"model"},
    {"training"},
    {"generation", "interop"},
    {"pretrain", "tools"},
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}


def unit_of(path: Path) -> str:
    """The unit that a source file belongs to: kernels/rope.py -> kernels, megalite/config_ds.py -> config."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    name = parts[1] if parts[0] == "megalite" else parts[0]
    return "config" if name.startswith("config_") else name


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.Module) -> Iterator[str]:
    """The dotted name of each thing imported, wherever in the file: `from a.b import c` gives a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.Module) -> set[str]:
    """The units of ours that a file imports from."""
    names = (name.split(".") for name in imports(tree))
    own = (parts for parts in names if parts[0] in ("megalite", "kernels", "tools"))
    units = (parts[1] if parts[0] == "megalite" and len(parts) > 1 else parts[0] for parts in own)
    return {"config" if unit.startswith("config_") else unit for unit in units}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of such an expression, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def environment_reads(tree: ast.Module) -> list[int]:
    """Lines that use os.environ or os.getenv other than to set one variable (os.environ[...] = ...)."""
    stored = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    }
    names = ("os.environ", "os.environb", "os.getenv")
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and dotted(node) in names]
    imported = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module == "os"
        and any(f"os.{alias.name}" in names for alias in node.names)
    ]
    return [node.lineno for node in (*used, *imported) if id(node) not in stored]


def forbidden(tree: ast.Module) -> list[str]:
    """What could run code that came with data."""
    found = [name for name in imports(tree) if name.split(".")[0] in UNPICKLERS or name in FORBIDDEN_CALLS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if dotted(node.func) in FORBIDDEN_CALLS:
                found.append(dotted(node.func))
            found += [keyword.arg for keyword in node.keywords if keyword.arg == "allow_pickle"]
    return found


@EVERY_SOURCE
def test_imports_run_downward(path):
    unit = unit_of(path)
    if unit == "__init__":
        assert not own_imports(parse(path))
        return
    assert unit in LEVEL, f"{unit} has no place in LAYERS; DESIGN.md says where things stand"
    others = own_imports(parse(path)) - {unit}
    assert others <= LEVEL.keys(), f"imports from something of ours without a place in LAYERS: {others - LEVEL.keys()}"
    upward = sorted(other for other in others if LEVEL[other] >= LEVEL[unit])
    assert not upward, f"{unit} imports from {upward}, which are not below it"


@EVERY_SOURCE
def test_each_dependency_has_one_home(path):
    unit, packages = unit_of(path), {name.split(".")[0] for name in imports(parse(path))}
    if unit == "kernels":
        assert not own_imports(parse(path)) - {"kernels"}, "kernels import nothing of ours"
    else:
        assert "triton" not in packages, "triton belongs in kernels/"
    if unit == "layers":
        assert "config" not in own_imports(parse(path)), "layers take plain ints and groups, never the config"
    if path != REPOSITORY / "megalite/training/engine.py":
        assert "deepspeed" not in packages, "deepspeed belongs in training/engine.py"


@EVERY_SOURCE
def test_nothing_runs_code_out_of_data(path):
    assert not forbidden(parse(path))


@EVERY_SOURCE
def test_environment_variables_are_read_in_two_places(path):
    if path not in (REPOSITORY / "megalite/topology.py", REPOSITORY / "megalite/pretrain.py"):
        assert not environment_reads(parse(path))


def test_no_module_takes_another_modules_name():
    """pretrain.py runs as a script: its own folder is on the path until its first lines change that."""
    ours = {path.stem for path in (REPOSITORY / "megalite").iterdir() if path.suffix == ".py" or path.is_dir()}
    ours -= {"__init__", "__pycache__"}
    installed = set(importlib.metadata.packages_distributions()) - {"megalite"}
    assert len(ours) > 10
    assert len(installed) > 10
    assert not ours & sys.stdlib_module_names
    assert not ours & installed


# The rules above hold today; these show that they would notice.


@pytest.mark.parametrize(
    ("source", "units"),
    [
        ("from megalite import kernels", {"kernels"}),
        ("import megalite.model.gpt", {"model"}),
        ("def f():\n    from megalite.config_loader import load_config", {"config"}),
        ("from kernels.rope import rope", {"kernels"}),
        ("import torch, numpy.random", set()),
    ],
)
def test_imports_are_seen(source, units):
    assert own_imports(ast.parse(source)) == units


def test_relative_imports_are_seen():
    with pytest.raises(AssertionError, match="line 1: a relative import"):
        own_imports(ast.parse("from ..training import engine"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\nx = torch.load(p, weights_only=False)",
        "yaml.load(f, Loader=yaml.SafeLoader)",
        "eval(text)",
        "exec(text)",
        "from torch import load",
        "np.load(p, allow_pickle=True)",
    ],
)
def test_code_out_of_data_is_seen(source):
    assert forbidden(ast.parse(source))


def test_what_only_looks_like_it_is_allowed():
    assert not forbidden(ast.parse("engine.eval()\njson.load(f)\nyaml.safe_load(f)\nnp.load(p)"))


@pytest.mark.parametrize(
    "source",
    [
        "os.environ['A']",
        "os.environ.get('A')",
        "os.getenv('A')",
        "dict(os.environ)",
        "from os import environ",
        "x['a'] = os.environ['A']",
    ],
)
def test_reads_of_the_environment_are_seen(source):
    assert environment_reads(ast.parse(source))


def test_setting_a_variable_is_not_reading():
    assert not environment_reads(ast.parse("os.environ['A'] = 'b'"))
