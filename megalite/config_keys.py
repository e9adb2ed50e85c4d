"""Every setting of config.py by its dotted name: look-up, the nearest valid name, and `--help`. Imports no torch."""

import difflib
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megalite.config import Config, Section
from megalite.errors import ConfigError

HELP_WIDTH = 100
HELP_INDENT = 31  # past the longest key
SPECIAL_FLAGS = {
    "config": "PATH: a YAML file of the keys below; optional, as every key has a default.",
    "zero": "0..3: short for --deepspeed ds_configs/zeroN.json.",
    "no_resume": "Short for --checkpoint.resume none.",
    "print_config": "Print the merged configuration as YAML, with the source of each value, and exit.",
    "help": "Print this and exit.",
    "local_rank": "N: given by launchers; ignored.",
}


@dataclass(frozen=True)
class Key:
    """One setting; its default, meaning and JSON schema are those of the field in config.py."""

    name: str  # dotted
    default: Any
    meaning: str
    schema: dict[str, Any]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def kinds(self) -> set[str]:
        """JSON schema types that a value may have: string, integer, number, boolean, array, object, null."""
        return {choice["type"] for choice in self.choices}

    @property
    def choices(self) -> list[dict[str, Any]]:
        """The JSON schemas of which a value must fit one."""
        return self.schema.get("anyOf", [self.schema])

    @property
    def wants(self) -> str:
        """The legal values in words, such as `int >= 1 or null`."""
        return " or ".join(map(_describe, self.choices))


def schema_keys() -> dict[str, Key]:
    """Every setting by dotted name, in the order of config.py."""
    keys = {}
    for name, root_field in Config.model_fields.items():
        if isinstance(root_field.annotation, type) and issubclass(root_field.annotation, Section):
            model, fields, prefix = root_field.annotation, root_field.annotation.model_fields, f"{name}."
        else:
            model, fields, prefix = Config, {name: root_field}, ""
        schema = model.model_json_schema()
        for leaf, info in fields.items():
            own = _inline(schema["properties"][leaf], schema.get("$defs", {}))
            keys[prefix + leaf] = Key(prefix + leaf, info.default, info.description or "", own)
    return keys


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """A JSON schema with what it refers to in its place."""
    if isinstance(schema, list):
        return [_inline(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inline(each, definitions) for name, each in schema.items()}


def find_key(name: str, keys: dict[str, Key]) -> Key | None:
    """The setting of that dotted name, or of that bare leaf; ConfigError where several sections have the leaf."""
    if name in keys:
        return keys[name]
    found = [key for key in keys.values() if key.leaf == name]
    if len(found) > 1:
        raise ConfigError(f"ambiguous; give one of {', '.join(key.name for key in found)}")
    return found[0] if found else None


def nearest_key(name: str, keys: dict[str, Key], flags: Iterable[str] = ()) -> str | None:
    """The valid name most like one that is not: the same leaf in another section first, then a similar spelling."""
    section, _, leaf = name.rpartition(".")
    same_leaf = [key.name for key in keys.values() if key.leaf == leaf]
    if same_leaf:
        return difflib.get_close_matches(name, same_leaf, n=1, cutoff=0.0)[0]
    siblings = {key.leaf: key.name for key in keys.values() if key.name.rpartition(".")[0] == section}
    others = {flag: flag for flag in flags} | {key.leaf: key.name for key in keys.values()}
    for choices in (siblings, others):
        if close := difflib.get_close_matches(leaf, choices, n=1):
            return choices[close[0]]
    return None


def format_help(keys: dict[str, Key]) -> str:
    """Every flag and key with type, default and meaning, by section, at most HELP_WIDTH columns wide."""
    lines = [
        "usage: deepspeed megalite/pretrain.py --config configs/NAME.yaml [--KEY VALUE ...]",
        "",
        *textwrap.wrap(
            "A key is given as --training.learning_rate 2e-4 or, as no other section has it, --learning-rate 2e-4. "
            "The command line wins over the YAML file, the file over the defaults.",
            HELP_WIDTH,
        ),
        "",
        "flags:",
    ]
    for flag, meaning in SPECIAL_FLAGS.items():
        lines += _help_entry("--" + flag.replace("_", "-"), meaning)
    section = None
    for key in keys.values():
        name = key.name.rpartition(".")[0]
        if name != section:
            section = name
            lines += ["", f"{section}:" if section else "top level:"]
        lines += _help_entry(key.leaf, key.meaning, f"[{key.wants}; default {show(key.default)}]")
    return "\n".join(lines)


def show(value: Any) -> str:
    """A value as YAML would have it, cut to a readable length."""
    match value:
        case None:
            text = "null"
        case bool():
            text = str(value).lower()
        case str():
            text = '"' + "".join(c if c.isprintable() else "?" for c in value) + '"'
        case list():
            text = f"[{', '.join(show(item) for item in value[:9])}]"
        case dict():
            text = f"{{{', '.join(f'{name}: {show(item)}' for name, item in value.items())}}}"
        case int() if value.bit_length() > 256:
            text = "a huge number"  # str() refuses one of more than 4300 digits
        case _:
            text = str(value)
    return text if len(text) <= 80 else text[:76] + "..." + text[-1]


def _help_entry(name: str, meaning: str, kind: str = "") -> list[str]:
    # No-break spaces, taken out again, keep the type and default on one line.
    text = f"{meaning} {kind.replace(' ', chr(0xA0))}"
    first, *rest = textwrap.wrap(text, HELP_WIDTH - HELP_INDENT, break_on_hyphens=False)
    lines = [f"  {name:<{HELP_INDENT - 2}}{first}", *(" " * HELP_INDENT + line for line in rest)]
    return [line.replace(chr(0xA0), " ") for line in lines]


def _describe(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(schema["enum"])
    if schema["type"] == "array":
        return f"list of {_describe(schema['items'])}"
    if "properties" in schema:
        return f"{{{', '.join(f'{name}: {_describe(each)}' for name, each in schema['properties'].items())}}}"
    if schema["type"] == "object":
        ((pattern, each),) = schema["patternProperties"].items()
        return f"{{{pattern.strip('^$')}: {_describe(each)}, ...}}"
    names = {"integer": "int", "number": "float", "boolean": "true | false", "string": "str", "null": "null"}
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    return f"{names[schema['type']]} {', '.join(bounds)}".strip()
