"""YAML in, with the line of each value and an exact place for each error; YAML scalars out. Imports no torch.

The reader builds nothing that is deeper than a key's schema, nor a value of very many parts: nested aliases cannot blow
up.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from megalite.config_keys import Key, nearest_key, show
from megalite.errors import ConfigError

MAX_BYTES = 256 * 1024  # hundreds of times a real configuration; keeps /dev/zero and the like from filling memory
MAX_PARTS = MAX_BYTES  # of one value: only aliases can make more
TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = {TAG + name for name in ("null", "bool", "int", "float", "str", "seq")}


class Setting(NamedTuple):
    """A value that somebody gave."""

    value: Any
    source: str  # "configs/small.yaml:12" or "command line (--learning-rate)"
    place: str  # how an error names it: file:line, or the flag
    places: Mapping[tuple, str] = MappingProxyType({})  # the same for its parts: (1, "weight") -> file:line


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, reading floats as YAML 1.2 does, and no dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own name and shape
        first: [(tag, pattern) for tag, pattern in resolvers if tag != TAG + "timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


# YAML 1.1 wants a point and the exponent's sign, so that PyYAML reads 1e-4 and 1.0e5 as strings.
_Loader.add_implicit_resolver(
    TAG + "float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+\Z"),
    list("-+.0123456789"),
)


def read_yaml(path: str, keys: dict[str, Key]) -> tuple[dict[str, Setting], list[str]]:
    """The settings of a file by dotted name, and what is wrong with its keys, one line each.

    Values are not yet checked against the schema. ConfigError if the file cannot be read as one YAML mapping.
    """
    root = _compose(path)
    if _is_null(root):
        return {}, []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{_place(path, root)}: got {_kind(root)}, wants a mapping of sections (model:, data:, ...)")
    settings: dict[str, Setting] = {}
    problems: list[str] = []
    sections = {name.partition(".")[0] for name in keys if "." in name}
    for name, key_node, value_node in _entries(root, "", path, problems):
        if name in keys and "." not in name:
            _add(settings, keys[name], key_node, value_node, path, problems)
        elif name not in sections:
            problems.append(f"{_place(path, key_node)}: {name}: {_unknown(name, keys, sections)}")
        elif isinstance(value_node, yaml.MappingNode):
            for leaf, leaf_node, leaf_value in _entries(value_node, f"{name}.", path, problems):
                if leaf in keys:
                    _add(settings, keys[leaf], leaf_node, leaf_value, path, problems)
                else:
                    problems.append(f"{_place(path, leaf_node)}: {leaf}: {_unknown(leaf, keys)}")
        elif not _is_null(value_node):  # `model:` with nothing under it means defaults
            problems.append(f"{_place(path, key_node)}: {name}: got {_kind(value_node)}, wants a mapping of its keys")
    return settings, problems


def parse_scalar(text: str) -> Any:
    """The value of one YAML scalar given elsewhere than in a file."""
    return _scalar(yaml.ScalarNode(_Loader("").resolve(yaml.ScalarNode, text, (True, False)), text))


def format_value(value: Any) -> str:
    """A value on one line, so that this module and any YAML 1.1 reader read it back as it was."""
    match value:
        case list():
            return f"[{', '.join(format_value(item) for item in value)}]"
        case dict():
            return f"{{{', '.join(f'{format_value(name)}: {format_value(item)}' for name, item in value.items())}}}"
        case str():
            plain = re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_./*-]*", value) and isinstance(parse_scalar(value), str)
            # Quoted by PyYAML, not json: JSON's surrogate pairs are two characters to YAML.
            return (
                value if plain else yaml.dump(value, default_style='"', width=float("inf"), allow_unicode=True).strip()
            )
        case float():
            text = repr(value)
            return text.replace("e", ".0e") if "e" in text and "." not in text else text
        case _:
            return show(value)


def _compose(path: str) -> yaml.Node | None:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{path}: over {MAX_BYTES // 1024} KiB, too long for a configuration")
        text = data.decode("utf-8-sig")
        return _Loader(text).get_single_node()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give --config the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: not YAML: character U+{error.character:04X} is not allowed") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise ConfigError(f"{path}:{mark.line + 1}: not YAML: {reason}") from error
    except (RecursionError, ValueError, OverflowError) as error:  # deep nesting; an escape such as \UFFFFFFFF
        raise ConfigError(f"{path}: not YAML: {type(error).__name__}: {error}") from error


def _entries(
    mapping: yaml.MappingNode, prefix: str, path: str, problems: list[str]
) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Yield (dotted name, key node, value node); a key given twice and a tag on the mapping are problems."""
    where = prefix.rstrip(".") or "top level"
    if mapping.tag != TAG + "map":
        problems.append(f"{_place(path, mapping)}: {where}: tag {_tag(mapping)} is not allowed; remove it")
        return
    first_line: dict[str, int] = {}
    for key_node, value_node in mapping.value:
        place, line = _place(path, key_node), key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{place}: {where}: a key must be a name, got {_kind(key_node)}")
            continue
        name = prefix + "".join(c if c.isprintable() else "?" for c in key_node.value)
        if key_node.tag == TAG + "merge":
            problems.append(f"{place}: {name}: merge keys are not supported; write the keys out")
        elif name in first_line:
            problems.append(f"{place}: {name}: already given on line {first_line[name]}; keep one of the two")
        else:
            first_line[name] = line
            yield name, key_node, value_node


def _add(
    settings: dict[str, Setting],
    key: Key,
    key_node: yaml.Node,
    value_node: yaml.Node,
    path: str,
    problems: list[str],
) -> None:
    value = _Value(key, path, _place(path, key_node))
    try:
        plain = value.build(value_node, key.choices)
        settings[key.name] = Setting(plain, value.places[()], value.places[()], value.places)
    except ConfigError as error:
        problems.append(str(error))


class _Value:
    """One key's value in the making, and the place of each of its parts."""

    def __init__(self, key: Key, path: str, place: str) -> None:
        self.key, self.path = key, path
        self.places: dict[tuple, str] = {(): place}

    def build(self, node: yaml.Node, choices: list[dict[str, Any]], inner: tuple = ()) -> Any:
        """The plain value of the part at `inner`; ConfigError where it is deeper than the JSON schemas `choices`.

        A scalar or a list of them where something else should be is left to the schema.
        """
        place = self.places.setdefault(inner, _place(self.path, node))
        if len(self.places) > MAX_PARTS:
            raise ConfigError(f"{self.places[()]}: {self.key.name}: more than {MAX_PARTS} parts; write fewer")
        if not isinstance(node, yaml.MappingNode) and node.tag not in PLAIN_TAGS:
            raise ConfigError(f"{place}: {self.key.name}: tag {_tag(node)} is not allowed; write a plain value")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        kind = "array" if isinstance(node, yaml.SequenceNode) else "object"
        schema = next((choice for choice in choices if choice["type"] == kind), None)
        if kind == "array" and (schema or not inner):
            items = [schema["items"]] if schema else []
            return [self.build(item, items, (*inner, i)) for i, item in enumerate(node.value)]
        if schema is None:
            raise ConfigError(f"{place}: {self.key.name}: got {_kind(node)}, wants {self.key.wants}")
        return self._mapping(node, schema, inner)

    def _mapping(self, node: yaml.MappingNode, schema: dict[str, Any], inner: tuple) -> dict[str, Any]:
        """Keys are those of the schema, or any, where it has only a pattern for them."""
        problems: list[str] = []
        built = {}
        for name, key_node, value_node in _entries(node, f"{self.key.name}.", self.path, problems):
            leaf = name.removeprefix(f"{self.key.name}.")
            known = schema.get("properties", {})
            if known and leaf not in known:
                problems.append(f"{_place(self.path, key_node)}: {name}: unknown key; wants {self.key.wants}")
            if problems:
                break
            wanted = [known[leaf]] if known else list(schema["patternProperties"].values())
            built[leaf] = self.build(value_node, wanted, (*inner, leaf))
        if problems:
            raise ConfigError(problems[0])
        return built


def _scalar(node: yaml.ScalarNode) -> Any:
    """The value of a scalar; text that is not what its tag says (`!!int ten`) stays text, which the schema refuses."""
    if node.tag == TAG + "str" or node.tag not in PLAIN_TAGS:
        return node.value
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, LookupError, ArithmeticError):
        return node.value


def _unknown(name: str, keys: dict[str, Key], sections: Iterable[str] = ()) -> str:
    if name in keys:  # `training.seed:` at the top level
        section, _, leaf = name.rpartition(".")
        return f"write {leaf} under {section}:"
    nearest = nearest_key(name, keys, sections)
    return f"unknown key; did you mean {nearest}?" if nearest else "unknown key; see --help"


def _place(path: str, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _tag(node: yaml.Node) -> str:
    return node.tag.replace(TAG, "!!")


def _is_null(node: yaml.Node | None) -> bool:
    return node is None or (isinstance(node, yaml.ScalarNode) and node.tag == TAG + "null")


def _kind(node: yaml.Node) -> str:
    match node:
        case yaml.MappingNode():
            return "a mapping"
        case yaml.SequenceNode():
            return "a list"
        case _:
            return show(_scalar(node))
