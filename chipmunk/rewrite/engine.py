"""From the bytes of a repository to a plan: find the models, run the rules, prove the result."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from chipmunk.registry import Registry
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.plan import BlockFacts, FileChange, ModelFacts, Plan, SelectionError, Site, SiteStatus
from chipmunk.rewrite.repository import Module, Repository
from chipmunk.rewrite.roles import Block, Lookalike, Model, find_roles, may_hold_model
from chipmunk.rewrite.source import OverlapError, Source, SourceError

ALIASES = {"mlp": ("double-mlp", "single-mlp")}
# A block's sparse state comes from the model's forward: these patches do nothing without that one.
_NEED_FORWARD = {"attention", "double-mlp", "single-mlp"}
_FORWARD = "model-forward"

Progress = Callable[[str, int, int], None]
"""Called with the name of the step, how much of it is done, and how much there is."""


def select(registry: Registry, only: Collection[str] | None) -> list[str]:
    """Names of the patches to run, in the registry's order. Raises SelectionError for an unknown name."""
    if only is None:
        return list(registry.patches)
    chosen: set[str] = set()
    for name in only:
        parts = ALIASES.get(name, (name,))
        unknown = [part for part in parts if part not in registry.patches]
        if unknown:
            known = ", ".join([*registry.patches, *ALIASES])
            raise SelectionError(f"There is no patch called {unknown[0]}. Known: {known}.")
        chosen.update(parts)
    if chosen & _NEED_FORWARD and _FORWARD in registry.patches:
        chosen.add(_FORWARD)
    return [name for name in registry.patches if name in chosen]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Trees are large and live to the end: looking for garbage among them is a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_garbage_collection()
def plan_repository(
    files: Mapping[str, bytes],
    registry: Registry,
    *,
    only: Collection[str] | None = None,
    target: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """What patching the repository would do.

    `files`: every Python file, by its path from the root with forward slashes. `only`: names of patches (`mlp` means
    both MLPs). `target`: the target's name, instead of asking each whether it recognises the repository.
    Nothing is read or written. Raises SelectionError for unknown names.
    """
    if target is not None and target not in registry.targets:
        raise SelectionError(f"There is no target called {target}. Known: {', '.join(registry.targets)}.")
    chosen = select(registry, only)
    parsed: dict[str, Module | SourceError] = {}
    hopeless: set[str] = set()
    while True:
        try:
            repository, context = _run(files, registry, chosen, parsed, progress, hopeless=hopeless)
            facts = tuple(_facts(model, index, context) for index, model in enumerate(context.models))
        except SourceError as unread:  # Python reads the file, LibCST does not
            parsed = {**parsed, unread.path: unread}
            continue
        edited, unfit, problem = _results(repository, context)
        found = {_key(model) for model in context.models if _NEED_FORWARD & set(chosen) and _is_hopeless(model)}
        if not unfit and not found:
            break
        # A model none of whose blocks can be sparse is left alone: a step clock and an option would do nothing.
        hopeless |= found
        # Such a file is treated as one that cannot be parsed, and the rest goes on without it.
        parsed = {**repository.parsed, **unfit}
    sites = [*context.sites.values(), *_refused(repository, context)]
    facts += tuple(context.installed)
    after = {path: source.content for path, source in edited.items()}
    problem = problem or _hidden(repository, after) or _check(files, edited, context, registry, chosen, hopeless)
    if problem is not None:
        patch, reason = problem
        sites = [
            _refuse(site, f"{reason}; nothing was changed") if site.status is SiteStatus.PATCHED else site
            for site in sites
        ]
        if not any(site.status is SiteStatus.REFUSED for site in sites):
            sites.append(Site(next(iter(after), ""), 1, patch, SiteStatus.REFUSED, "", reason))
        after = {}
    changes = tuple(FileChange(path, files[path], after[path]) for path in sorted(after) if after[path] != files[path])
    if target is None:
        target = next((t.name for t in registry.targets.values() if facts and t.recognise(facts, files)), None)
    ordered = tuple(sorted(sites, key=lambda s: (s.file, s.line, s.patch)))
    return Plan(target, changes, ordered, facts, {name: registry.patches[name].version for name in chosen})


def _run(
    files: Mapping[str, bytes],
    registry: Registry,
    chosen: list[str],
    parsed: Mapping[str, Module | SourceError],
    progress: Progress | None,
    *,
    before: Repository | None = None,
    hopeless: Collection[str] = (),
) -> tuple[Repository, Context]:
    repository = Repository(files, parsed, before)
    roles = find_roles(repository)
    for model in [model for model in roles.models if _key(model) in hopeless]:
        roles.models.remove(model)
        reason = "neither the attention nor the MLP of its blocks has a form that can be made sparse"
        roles.lookalikes.append(Lookalike(model.owner, model.forward, reason))
    total = len(chosen) + 1
    if progress is not None:
        progress("finding models", 0, total)
    context = Context(repository, roles, again=before is not None)
    for index, name in enumerate(chosen):
        if progress is not None:
            progress(name, index + 1, total)
        context.patch = name
        registry.patches[name].rule(context)
    return repository, context


def _results(
    repository: Repository, context: Context
) -> tuple[dict[str, Source], dict[str, SourceError], tuple[str, str] | None]:
    """The changed files; those that must not be edited, though they could be parsed; why nothing may be written."""
    unfit: dict[str, SourceError] = {}
    for path in context.edits:
        if not _module(repository, path).source.survives():
            unfit[path] = SourceError(path, "parse", "it does not survive parsing and printing unchanged")
    if unfit:
        return {}, unfit, None
    edited: dict[str, Source] = {}
    problem: tuple[str, str] | None = None
    try:
        edited = context.results()
    except OverlapError as overlap:
        problem = "chipmunk", str(overlap)
    except SourceError as unread:
        problem = "chipmunk", f"the changed {unread.path} would not compile ({unread.reason})"
    for path in context.edits:
        error = _compile_error(path, edited[path].content) if edited else ""
        if error is None:
            continue  # nor does the file itself fail to, then
        if (own := _compile_error(path, _module(repository, path).source.content)) is not None:
            unfit[path] = SourceError(path, "parse", f"this Python does not compile it as it is ({own})")
        elif problem is None:
            problem = "chipmunk", f"the changed {path} would not compile ({error})"
    return edited, unfit, problem


def _hidden(repository: Repository, after: Mapping[str, bytes]) -> tuple[str, str] | None:
    """Why no file may import Chipmunk: the name means a package of the repository's own, that of another Chipmunk."""
    for path in after:
        own = repository.find_module("chipmunk", path)
        if own is not None and _FORWARD.replace("-", "_").encode() not in repository.files[own]:
            return "chipmunk", f"import chipmunk means {own} there, another package than this tool's"
    return None


def _check(
    files: Mapping[str, bytes],
    edited: Mapping[str, Source],
    context: Context,
    registry: Registry,
    chosen: list[str],
    hopeless: Collection[str],
) -> tuple[str, str] | None:
    """Why the result must not be written: a second run would change it again."""
    if not edited:
        return None
    # Everything is worked out anew but for the trees of files, and of statements, whose text is the same.
    first = context.repository
    try:
        changed = {path: Module(source, _module(first, path)) for path, source in edited.items()}
        parsed = {**first.parsed, **changed}
        after = {path: source.content for path, source in edited.items()}
        _, second = _run({**files, **after}, registry, chosen, parsed, None, before=first, hopeless=hopeless)
    except SourceError as error:
        return "chipmunk", f"the result cannot be read again ({error.reason})"
    for site in second.sites.values():
        if site.status is SiteStatus.PATCHED:
            return site.patch, f"a second run would change {site.file}:{site.line} again"
    return None


def _module(repository: Repository, path: str) -> Module:
    module = repository.module(path)
    assert module is not None
    return module


def _key(model: Model) -> str:
    return f"{model.owner.source.path}:{model.name}"


def _is_hopeless(model: Model) -> bool:
    double, single = model.double_block, model.single_block
    return not any(block.attention or block.mlp or block.linear_in for block in (double, single))


def _compile_error(path: str, content: bytes) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file's own, about escapes in its strings, say
            compile(content, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        return str(error)
    return None


def _refuse(site: Site, reason: str) -> Site:
    return Site(site.file, site.line, site.patch, SiteStatus.REFUSED, site.matched, reason)


def _refused(repository: Repository, context: Context) -> list[Site]:
    """Files that could not be parsed: only those that the model or its loops may need have been tried."""
    sites: list[Site] = []
    for path, error in repository.unreadable.items():
        reason = f"the file is left as it is: {error.reason}"
        if may_hold_model(repository.files[path]):
            reason += "; it may hold the model, which cannot be patched then"
        sites.append(Site(path, error.line, error.step, SiteStatus.REFUSED, path, reason))
    return sites


def _facts(model: Model, index: int, context: Context) -> ModelFacts:
    is_method = model.forward.owner is not None
    return ModelFacts(
        file=model.owner.source.path,
        name=model.name,
        double=model.double,
        single=model.single,
        image=model.image,
        ids=model.order.ids,
        double_block=_block_facts(model.double_block),
        single_block=_block_facts(model.single_block),
        loops=tuple(context.loops.get(index, ())),
        step_caching=index in context.cached_steps,
        forward=model.forward.outline.name,
        forward_file=None if is_method else model.forward.source.path,
        receiver=None if is_method else model.forward.receiver,
    )


def _block_facts(block: Block) -> BlockFacts:
    return BlockFacts(
        block.owner.source.path, block.owner.name, block.attention, block.mlp, block.linear_in, block.linear_out,
        block.gated, block.mlp_first_in, block.mlp_first_out, block.mlp_alone, block.run,
    )  # fmt: skip
