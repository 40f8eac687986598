"""The configuration, `chipmunk-config.yml`: its schema, and loading it with errors that name the file and the line.

config = chipmunk.config.load("chipmunk-config.yml")
config.mlp.top_keys, config.attn.full_step_every
"""

from chipmunk.config.load import FILE_NAME, ConfigError, Problem, find, load, parse
from chipmunk.config.schema import (
    Attention,
    Config,
    Mlp,
    Note,
    Offloading,
    Patchify,
    StepCaching,
    json_schema,
    notes,
)

__all__ = [
    "FILE_NAME",
    "Attention",
    "Config",
    "ConfigError",
    "Mlp",
    "Note",
    "Offloading",
    "Patchify",
    "Problem",
    "StepCaching",
    "find",
    "json_schema",
    "load",
    "notes",
    "parse",
]
