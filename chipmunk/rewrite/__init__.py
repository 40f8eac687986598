"""From source bytes to a plan: roles, rules, sites and new bytes. Pure: nothing here reads or writes a file.

LibCST takes a fifth of a second to import: only what plans needs it, not `chipmunk status` or `revert`.
"""

from typing import TYPE_CHECKING

from chipmunk.rewrite.plan import BlockFacts, FileChange, LoopFacts, ModelFacts, Plan, SelectionError, Site, SiteStatus

if TYPE_CHECKING:
    from chipmunk.rewrite.engine import plan_repository, select

__all__ = [
    "BlockFacts",
    "FileChange",
    "LoopFacts",
    "ModelFacts",
    "Plan",
    "SelectionError",
    "Site",
    "SiteStatus",
    "plan_repository",
    "select",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from chipmunk.rewrite import engine

    return getattr(engine, name)
