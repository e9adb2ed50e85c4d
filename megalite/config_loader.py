"""From a command line and a YAML file to a typed `Config`: defaults < YAML < command line. Imports no torch.

Each value remembers where it came from, so that an error can name the file's line or the flag.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from megalite.config import Config
from megalite.config_keys import SPECIAL_FLAGS, Key, find_key, format_help, nearest_key, schema_keys, show
from megalite.config_yaml import Setting, format_value, parse_scalar, read_yaml
from megalite.errors import ConfigError


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and where each of its values came from."""

    config: Config
    sources: dict[str, str]  # dotted key -> "default", "configs/small.yaml:12" or "command line (--learning-rate)"
    path: str | None = None  # as given with --config
    print_config: bool = False


@dataclass
class CommandLine:
    """What the arguments say; problems are one line each."""

    settings: dict[str, Setting] = field(default_factory=dict)
    path: str | None = None
    print_config: bool = False
    problems: list[str] = field(default_factory=list)


def load_config(argv: list[str]) -> LoadedConfig:
    """Read the arguments after the program's name, and the YAML file that they name; `--help` prints and exits 0.

    ConfigError holds every problem with keys and values, one line each. Combinations of values are not checked here:
    call `megalite.config.check`.
    """
    keys = schema_keys()
    if "--help" in argv or "-h" in argv:
        print(format_help(keys))
        raise SystemExit(0)
    line = parse_command_line(argv, keys)
    settings, problems = read_yaml(line.path, keys) if line.path is not None else ({}, [])
    settings |= line.settings
    config, invalid = _validate(settings, keys)
    problems += line.problems + invalid
    if problems:
        raise ConfigError("\n".join(problems))
    sources = {name: settings[name].source if name in settings else "default" for name in keys}
    return LoadedConfig(config, sources, line.path, line.print_config)


def parse_command_line(argv: list[str], keys: dict[str, Key]) -> CommandLine:
    """Sort the arguments into settings and special flags; problems are collected, not raised."""
    line = CommandLine()
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            hint = f"did you mean --config {token}?" if token.endswith((".yaml", ".yml")) else "flags start with --"
            line.problems.append(f"{token}: unexpected argument; {hint}")
            continue
        flag, equals, given = token.partition("=")
        following = next((i for i, other in enumerate(rest) if other.startswith("--")), len(rest))
        try:
            if equals and flag.replace("-", "_") in ("__print_config", "__no_resume"):
                raise ConfigError("takes no value")
            used = _apply_flag(line, flag, [given] if equals else rest[:following], keys)
        except ConfigError as error:
            line.problems.append(f"{flag}: {error}")
            used = following
        if not equals:
            del rest[:used]
    return line


def format_config(loaded: LoadedConfig) -> str:
    """The merged configuration as YAML that loads to the same, each value with its source in a comment."""
    rows: list[tuple[str, str]] = []
    plain = loaded.config.model_dump()
    section = ""
    for name, source in loaded.sources.items():
        prefix, _, leaf = name.rpartition(".")
        if prefix != section:
            section = prefix
            rows += [(f"{prefix}:", "")] if prefix else []
        value = plain[prefix][leaf] if prefix else plain[leaf]
        comment = "".join(c if c.isprintable() else "?" for c in source)
        rows.append((f"{'  ' if prefix else ''}{leaf}: {format_value(value)}", f"# {comment}"))
    width = min(48, max(len(text) for text, _ in rows))
    return "".join(f"{text:<{width}}  {comment}".rstrip() + "\n" for text, comment in rows)


def _apply_flag(line: CommandLine, flag: str, values: list[str], keys: dict[str, Key]) -> int:
    """Put one flag into `line`; returns how many of `values` are its own."""
    name = flag[2:].replace("-", "_")
    if name == "print_config":
        line.print_config = True
        return 0
    if name == "no_resume":
        _set(line, "checkpoint.resume", "none", flag)
        return 0
    key = None if name in SPECIAL_FLAGS else find_key(name, keys)
    if key is None and name not in SPECIAL_FLAGS:
        nearest = nearest_key(name, keys, SPECIAL_FLAGS)
        raise ConfigError(f"unknown key; did you mean --{nearest}?" if nearest else "unknown key; see --help")
    if key is not None and "boolean" in key.kinds and not values:
        _set(line, key.name, True, flag)
        return 0
    if not values or (name == "config" and not values[0]):
        raise ConfigError(f"needs a value: {key.wants if key else SPECIAL_FLAGS[name]}")
    if key is not None and "array" in key.kinds:
        # `--eval-files=` empties a list that the YAML file fills.
        _set(line, key.name, [] if values == [""] else _parse_list(values, key), flag)
        return len(values)
    if key is not None:
        _set(line, key.name, _parse_value(values[0], key), flag)
    elif name == "config":
        line.path = values[0]
    elif name == "zero":
        if values[0] not in ("0", "1", "2", "3"):
            raise ConfigError(f"got {show(values[0])}, wants 0 | 1 | 2 | 3")
        _set(line, "deepspeed", f"ds_configs/zero{values[0]}.json", flag)
    return 1


def _set(line: CommandLine, name: str, value: Any, flag: str) -> None:
    line.settings[name] = Setting(value, f"command line ({flag})", flag)


def _parse_value(text: str, key: Key) -> Any:
    """Text for a string stays as it is (`--resume 123`); for other types it is a YAML scalar."""
    if "null" in key.kinds and text.lower() in ("null", "none"):
        return None
    return text if "string" in key.kinds else parse_scalar(text)


def _place_of(setting: Setting, location: tuple) -> str:
    """The place of the part that pydantic names: (section, key, 1, "weight"), or with a choice after the key."""
    for start, end in ((2, 4), (2, 3), (3, 5), (3, 4)):
        if location[start:end] in setting.places:
            return setting.places[location[start:end]] or setting.place
    return setting.place


def _parse_list(values: list[str], key: Key) -> Any:
    """The value of a key that takes a list: PATH=WEIGHT for a blend, NAME=PATH for validation sets with names."""
    if key.name == "data.blend":
        if wrong := [text for text in values if "=" not in text]:
            raise ConfigError(f"got {show(wrong[0])}, wants PATH=WEIGHT")
        pairs = [text.rpartition("=") for text in values]
        return [{"prefix": prefix, "weight": parse_scalar(weight)} for prefix, _, weight in pairs]
    if key.name == "data.eval_files":
        named = [re.fullmatch(r"([A-Za-z0-9_.-]+)=(.+)", text) for text in values]
        if all(named):
            sets: dict[str, list[str]] = {}
            for name, path in (match.groups() for match in named if match):
                sets.setdefault(name, []).append(path)
            return sets
        if any(named):
            plain = next(text for text, match in zip(values, named, strict=True) if not match)
            raise ConfigError(f"{show(plain)} has no name, but others have; give each as NAME=PATH, or none")
    texts = any(each.get("items", {}).get("type") == "string" for each in key.choices)
    return values if texts else [parse_scalar(text) for text in values]


def _validate(settings: dict[str, Setting], keys: dict[str, Key]) -> tuple[Config, list[str]]:
    """The typed configuration, or one line for each value that its field refuses."""
    tree: dict[str, Any] = {}
    for name, setting in settings.items():
        section, _, leaf = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = setting.value
    try:
        return Config.model_validate(tree), []
    except ValidationError as error:
        problems: dict[str, str] = {}  # a value that fails several choices of a union is one problem
        # The deepest last: where the choices are a list and a mapping, it is of the one that the value is.
        for detail in sorted(error.errors(include_url=False), key=lambda each: len(each["loc"])):
            names = [".".join(map(str, detail["loc"][:depth])) for depth in (1, 2)]
            name = next(name for name in names if name in keys)
            value, key, place = settings[name].value, keys[name], settings[name].place
            if isinstance(value, list | dict) and key.kinds & {"array", "object"}:
                value = detail["input"]
                place = _place_of(settings[name], detail["loc"])
            got = f"{show(value)}{'' if value is None else f' ({type(value).__name__})'}"
            problems[name] = f"{place}: {name}: got {got}, wants {key.wants}"
        return Config(), list(problems.values())
