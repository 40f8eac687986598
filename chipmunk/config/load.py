"""From the text of a `chipmunk-config.yml` to a `Config`; every error at once, each with its line and a way out."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from chipmunk.config.schema import Allowed, Config

FILE_NAME = "chipmunk-config.yml"

_MAX_BYTES = 64 * 1024
_MAX_VALUES = 2_000  # counted with aliases followed, so that an alias bomb ends here
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + name for name in ("str", "int", "float", "bool", "null", "seq", "map", "set")}
_Key = tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a configuration file."""

    source: str
    line: int | None
    key: str | None
    """Dotted, `mlp.top_keys`; None if the trouble is with the file as a whole."""
    message: str

    def __str__(self) -> str:
        where = self.source if self.line is None else f"{self.source}:{self.line}"
        return f"{where}: {self.message}" if self.key is None else f"{where}: {self.key} {self.message}"


class ConfigError(ValueError):
    """The configuration cannot be used; `problems` lists everything that is wrong with it."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, problems)))

    def __reduce__(self) -> tuple[Any, ...]:
        return ConfigError, (list(self.problems),)


def find(root: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the configuration that applies where no path was given, or None.

    `CHIPMUNK_CONFIG` first (not looked at further: `load` says if it is missing), then `chipmunk-config.yml` in the
    working directory, then in `root`, the root of the patched repository.
    """
    if named := os.environ.get("CHIPMUNK_CONFIG"):
        return Path(named)
    folders = [Path.cwd()] if root is None else [Path.cwd(), Path(root)]
    return next((folder / FILE_NAME for folder in folders if (folder / FILE_NAME).is_file()), None)


def load(path: str | os.PathLike[str]) -> Config:
    """Read and check the file at `path`. Raises `ConfigError`."""
    source = os.fspath(path)
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        remedy = "; write one with: chipmunk config init" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError([Problem(source, None, None, f"cannot be read: {error.strerror}{remedy}")]) from error
    if len(data) > _MAX_BYTES:
        raise ConfigError([_too_large(source)])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem(source, line, None, "the file is not UTF-8 text: save it as UTF-8")]) from error
    return parse(text, source)


def parse(text: str, source: str = FILE_NAME) -> Config:
    """Check the text of a configuration; `source` is what errors call it. Raises `ConfigError`."""
    if len(text) > _MAX_BYTES:
        raise ConfigError([_too_large(source)])
    data, lines, problems = _read(text, source)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += _explain(error, data, lines, source)
    if problems:
        raise ConfigError(sorted(problems, key=lambda problem: problem.line or 0))
    return config


# --- YAML, with lines ------------------------------------------------------------------------------------------------


def _read(text: str, source: str) -> tuple[dict[str, Any], dict[_Key, int], list[Problem]]:
    """Return the data, the line of each key, and problems after which the data is still worth checking."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None or root.tag == _TAG + "null":
            return {}, {}, []
        if not isinstance(root, yaml.MappingNode) or root.tag != _TAG + "map":
            what = f"expected sections such as 'mlp:' and 'attn:', found {_noun(root)}"
            raise ConfigError([Problem(source, _line(root), None, what)])
        nodes = list(_walk(root, (), [], [0], source))
        problems = [item for item in nodes if isinstance(item, Problem)]
        lines = {item[0]: item[1] for item in nodes if not isinstance(item, Problem)}
        # Tags and keys that cannot be looked at further are errors by themselves; duplicate keys are not.
        if any(problem.key is None for problem in problems):
            raise ConfigError(problems)
        data = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(
            [Problem(source, mark.line + 1 if mark else None, None, f"not valid YAML: {what}")]
        ) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise ConfigError([Problem(source, line, None, f"not valid YAML: {error.reason}")]) from error
    except RecursionError as error:
        raise ConfigError([Problem(source, None, None, "the file is nested too deeply")]) from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([Problem(source, None, None, f"not valid YAML: {error}")]) from error
    return data, lines, problems


def _walk(
    node: yaml.Node, key: _Key, above: list[yaml.Node], seen: list[int], source: str
) -> Iterator[tuple[_Key, int] | Problem]:
    """Yield the line of each key below `node`, and a problem for each thing that plain configuration never holds."""
    seen[0] += 1
    if node in above or seen[0] > _MAX_VALUES:
        what = f"the file refers to itself or holds more than {_MAX_VALUES:,} values"
        raise ConfigError([Problem(source, _line(node), None, what)])
    if node.tag not in _PLAIN_TAGS:
        name = "!!" + node.tag[len(_TAG) :] if node.tag.startswith(_TAG) else node.tag
        yield Problem(source, _line(node), None, f"a value of the kind {name} is not allowed here")
        return
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _walk(item, key, [*above, node], seen, source)
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for name, value in node.value:
            yield from _walk_key(name, key, node, first, seen, source)
            child = (*key, str(name.value)) if isinstance(name, yaml.ScalarNode) else key
            yield child, _line(name)
            yield from _walk(value, child, [*above, node], seen, source)


def _walk_key(
    name: yaml.Node, key: _Key, node: yaml.MappingNode, first: dict[str, int], seen: list[int], source: str
) -> Iterator[Problem]:
    """Yield what is wrong with one key of a mapping; `first` collects the line of each key."""
    seen[0] += 1
    if name.tag == _TAG + "merge":
        yield Problem(source, _line(name), None, "merging with << is not supported: write the keys out")
    elif not isinstance(name, yaml.ScalarNode) or name.tag not in _PLAIN_TAGS:
        yield Problem(source, _line(name), None, f"a key must be a word, not {_noun(name)}")
    elif len(key) < 2 and name.tag != _TAG + "str":
        yield Problem(source, _line(name), None, f"{name.value!r} is no key: a key must be a word")
    elif name.value in first:
        dotted = ".".join((*key, name.value))
        yield Problem(source, _line(name), dotted, f"is given twice; the first one is on line {first[name.value]}")
    else:
        first[name.value] = _line(name)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _noun(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"


def _too_large(source: str) -> Problem:
    return Problem(source, None, None, f"the file is larger than {_MAX_BYTES // 1024} KiB, so it is no configuration")


# --- Words for what the schema found ---------------------------------------------------------------------------------


def _explain(error: ValidationError, data: dict[str, Any], lines: dict[_Key, int], source: str) -> Iterator[Problem]:
    told: set[_Key] = set()
    for item in error.errors(include_url=False, include_input=False):
        key: _Key = tuple(str(part) for part in item["loc"][:2])
        if not _keys(key[:1]):  # a value at the top, where pydantic adds the member of a union that it tried
            key = key[:1]
        if key in told:
            continue
        told.add(key)
        line = lines.get(key, lines.get(key[:1]))
        yield Problem(source, line, ".".join(key), _sentence(item["type"], item["msg"], key, data))


def _sentence(kind: str, message: str, key: _Key, data: dict[str, Any]) -> str:
    if kind == "extra_forbidden":
        return _unknown(key)
    value: Any = data
    for part in key:
        value = value[part] if part in value else _keys(key[:-1])[part].default
    shown = _shown(value)
    if kind in ("not_yet", "divides"):
        return f"is {shown}; {message}"
    if fields := _keys(key):
        return f"is {shown}; it must be a section with keys such as {next(iter(fields))}"
    hint = ""
    if isinstance(value, str) and _is_number(value):
        hint = f" (YAML reads {value} as text: write {float(value):g})"
    elif kind == "less_than_equal" and isinstance(value, int | float) and 1 < value <= 100:
        hint = f" ({value:g} % is written {value / 100:g})"
    return f"is {shown}; it must be {_allowed(key)}{hint}"


def _unknown(key: _Key) -> str:
    *parents, name = key
    siblings = list(_keys(tuple(parents)))
    elsewhere = [dotted for section in _keys(()) for dotted in (f"{section}.{name}",) if name in _keys((section,))]
    if not parents and elsewhere:
        return f"belongs into a section: {' or '.join(elsewhere)}"
    if not parents and "." in name and name.split(".", 1)[1] in _keys((name.split(".", 1)[0],)):
        section, rest = name.split(".", 1)
        return f"belongs into a section: write {rest!r} indented below '{section}:'"
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if near:
        return f"is not a known key; the nearest is {'.'.join((*parents, near[0]))}"
    if elsewhere:
        return f"is not a known key; there is {' and '.join(elsewhere)}"
    return f"is not a known key; known are {', '.join(siblings)}"


def _keys(section: _Key) -> dict[str, FieldInfo]:
    """Return the keys of the whole file, or of a section; none for what is no section."""
    model: Any = Config
    for part in section:
        field = model.model_fields.get(part)
        model = None if field is None else field.annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return {}
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _allowed(key: _Key) -> str:
    return next(item.text for item in _keys(key[:-1])[key[-1]].metadata if isinstance(item, Allowed))


def _shown(value: Any) -> str:
    if isinstance(value, set):
        value = sorted(value, key=str)
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False
