"""What the rewriting engine hands on: the sites it looked at, the new bytes of files, and the facts that it learnt."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class SiteStatus(str, Enum):
    """What happens, or happened, to one place in the user's code."""

    PATCHED = "patched"
    ALREADY = "already patched"
    LEFT_DENSE = "left dense"
    REFUSED = "refused"


@dataclass(frozen=True)
class Site:
    """One place in the user's code that a patch looked at."""

    file: str
    """Path relative to the repository's root, with forward slashes."""
    line: int
    """1-based, in the file as it is before the change."""
    patch: str
    """Name of the patch, or of the step that refused the file (`read`, `parse`)."""
    status: SiteStatus
    matched: str
    """What was matched: one line of the user's code or a short description of it."""
    reason: str
    """Why this status: one sentence."""


@dataclass(frozen=True)
class FileChange:
    """One file before and after."""

    path: str
    before: bytes
    after: bytes


@dataclass(frozen=True)
class LoopFacts:
    """A sampling loop that calls the model."""

    file: str
    function: str
    """Qualified name inside the file, `denoise` or `Sampler.run`."""
    line: int
    model_parameter: str | None
    """Name of the function's parameter that is the model; None if the model comes from elsewhere (`self.model`)."""
    slots: tuple[str, ...]
    """One name for each place in the loop that calls the model, in text order."""


@dataclass(frozen=True)
class BlockFacts:
    """A transformer block class and the names of the parts that Chipmunk replaces."""

    file: str
    name: str
    attention: bool
    """Whether its joint attention is handed to Chipmunk."""
    mlp: str | None = None
    """Double block: attribute of the image MLP (`img_mlp`)."""
    linear_in: str | None = None
    """Single block: attribute of the fused input linear (`linear1`). In both kinds of block, that of an MLP whose
    linears the block itself calls; `w1, w3` where the gate and the value have one each."""
    linear_out: str | None = None
    """Single block: attribute of the fused output linear (`linear2`); that of the MLPs above."""
    gated: bool = False
    """Whether the activation is a SwiGLU: the first linear has two rows for each neuron."""
    mlp_first_in: bool = False
    """Single block: whether the MLP's rows come before the attention's in the first linear."""
    mlp_first_out: bool = False
    """Single block: whether the MLP's columns come before the attention's in the second linear."""
    mlp_alone: bool = False
    """Whether the second linear takes nothing but the activated part."""
    run: str = ""
    """The method that the model calls, where it does not call the block itself."""


@dataclass(frozen=True)
class ModelFacts:
    """A FLUX model found in the repository: everything that verify and bench need to build and drive it."""

    file: str
    name: str
    """Class name."""
    double: str
    """Attribute that holds the double blocks (`double_blocks`)."""
    single: str
    """Attribute that holds the single blocks (`single_blocks`)."""
    image: str
    """Parameter of forward with the image tokens (`img`)."""
    ids: str | None
    """Parameter of forward with their positions (`img_ids`)."""
    double_block: BlockFacts
    single_block: BlockFacts
    loops: tuple[LoopFacts, ...] = ()
    installed: bool = False
    """Whether it is not in the repository but in an installed package; `file` is then its path among the packages."""
    step_caching: bool = False
    """Whether the blocks can be left out on a step."""
    forward: str = "forward"
    """The function that does the model's work, and is marked: a method of the model, or one of `forward_file`."""
    forward_file: str | None = None
    """Where that function is, if it is no method; the model is then its argument `receiver`."""
    receiver: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that patching a repository would do, computed in memory."""

    target: str | None
    """Name of the recognised target, None if no target recognised the repository."""
    changes: tuple[FileChange, ...]
    sites: tuple[Site, ...]
    models: tuple[ModelFacts, ...] = ()
    patches: dict[str, str] = field(default_factory=dict)
    """Patches used, by name, with their versions."""


class SelectionError(Exception):
    """`only` or `target` names something that the registry does not hold."""
