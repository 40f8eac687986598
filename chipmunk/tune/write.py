"""The configuration that was found, as a commented `chipmunk-config.yml`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

THE_DEFAULTS = "These are the defaults: a key that you delete keeps the value given here."
"""What the commented defaults say of themselves, which is not so once a value has changed."""


def rendered(base: str, config: Mapping[str, Any], about: Sequence[str]) -> str:
    """`base`, the text of a commented configuration, with the values of `config` in it and `about` as its first lines.

    A key that `base` does not name is added at the top of its section. Comments and order are kept.
    """
    wanted = {
        (section, key): value
        for section, inside in config.items()
        for key, value in (inside.items() if isinstance(inside, Mapping) else [("", inside)])
    }
    lines, section, starts = list[str](), "", dict[str, int]()
    for line in base.splitlines():
        top = re.match(r"([A-Za-z_]\w*):(.*)", line)
        inner = re.match(r"  ([A-Za-z_][\w.]*):", line)
        if top is not None:
            section = top[1]
            if (section, "") in wanted:
                line = f"{section}: {_yaml(wanted.pop((section, '')))}"
            starts[section] = len(lines)
        elif inner is not None and (section, inner[1]) in wanted:
            line = f"  {inner[1]}: {_yaml(wanted.pop((section, inner[1])))}"
        lines.append(line)
    for (section, key), value in reversed(wanted.items()):
        if not key:
            lines.append(f"{section}: {_yaml(value)}")
            continue
        if section not in starts:
            starts[section] = len(lines)
            lines.append(f"{section}:")
        lines.insert(starts[section] + 1, f"  {key}: {_yaml(value)}")
        starts = {name: at + (at > starts[section]) for name, at in starts.items()}
    lines = [line.replace(THE_DEFAULTS, "A key that you delete goes back to its default.") for line in lines]
    header = [f"# {line}".rstrip() for line in about]
    return "\n".join([*header, "#" if header else "", *lines]).lstrip("\n") + "\n"


def _yaml(value: Any) -> str:
    """A scalar or a short list; JSON is YAML."""
    return json.dumps(value)
