"""From source bytes to a plan: roles, rules, sites and new bytes. Pure: nothing here reads or writes a file."""

from chipmunk.rewrite.engine import SelectionError, plan_repository, select
from chipmunk.rewrite.plan import BlockFacts, FileChange, LoopFacts, ModelFacts, Plan, Site, SiteStatus

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
