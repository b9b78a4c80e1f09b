"""What a model offers to adapters, and the choice among it.

`find_sites` names every place of a model, `select` chooses with the `where` grammar, `describe_sites` prints. A model
that the tables in `site_table.py` do not know still offers `linear`, `conv` and `norm` sites.

`where` is a list of terms, or one string with commas between them:

    q, v, fc1, norm ...                     roles; alternatives. `qkv` is a fused weight as one part, `q` its q rows
    visual.*, blocks.3.attn.proj            path globs (`*` also crosses dots); alternatives. A path without wildcards
                                            needs no role beside it
    depth<6, depth>=3, depth=5, depth=0-3   block index; all must hold
    !*.mlp.*, !k                            exclusions by glob or role; all must hold

Without a role term the method's default roles apply. The classifier is chosen only by the role `head` or by its exact
path.
"""

from __future__ import annotations

import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from zoo.adapters.base import Part, Site
from zoo.adapters.site_scan import Scan
from zoo.adapters.site_table import FUSED, ROLES, merge_rows
from zoo.errors import SiteError, nearest

_DEPTH = re.compile(r"depth\s*(<=|>=|==|=|<|>)\s*(\d+)(?:\s*-\s*(\d+))?")
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq, "==": operator.eq,
}  # fmt: skip


def find_sites(model: nn.Module) -> list[Site]:
    """Every place of `model` where an adapter can sit, in registration order (parents before their children).

    Each weight of a linear layer, convolution or attention projection belongs to exactly one site; a weight tied
    between modules appears at each of them. The parts of a fused weight follow the tables, which hold for timm,
    torchvision and open_clip; for other classes a `qkv` is taken as three equal contiguous runs, which is what almost
    all code does. Adapters that are attached already are no sites.

    Raises `SiteError` for lazy layers that have not seen an input yet.
    """
    return list(Scan(model).sites())


def select(
    sites: Sequence[Site], where: str | Sequence[str] | None, default_roles: Sequence[str], *, model_name: str
) -> list[Site]:
    """The sites that `where` names, each reduced to the parts that were asked for (grammar: see the module's text).

    Asking for `q` and `v` on a fused weight gives one site with these two parts; asking for `qkv` gives the fused
    weight as one part, or the q, k and v sites where they are separate modules.

    Raises `SiteError` for a term that is neither a role nor fits any path, and for an empty choice.
    """
    query = _parse(where, sites, default_roles, model_name)
    chosen = [query.narrow(site) for site in sites if query.admits(site)]
    found = [site for site in chosen if site is not None]
    if found:
        return found
    roles = f"roles {', '.join(sorted(query.roles))}" if query.roles else "any role"
    hint = "" if query.explicit or not query.roles else " (no role was named, so the method's default roles were taken)"
    asked = "the method's usual places" if where is None else repr(where)
    raise SiteError(f"{asked}: chooses nothing on {model_name}: {roles}{hint}. {_offer(sites, model_name)}")


@dataclass(frozen=True)
class _Query:
    roles: frozenset[str]
    explicit: bool  # roles were named, not taken from the method
    globs: tuple[str, ...]
    depths: tuple[Callable[[int], bool], ...]
    without_globs: tuple[str, ...]
    without_roles: frozenset[str]

    def admits(self, site: Site) -> bool:
        if any(_fits(glob, site.path) for glob in self.without_globs) or site.role in self.without_roles:
            return False
        if self.globs and not any(_fits(glob, site.path) for glob in self.globs):
            return False
        return all(site.depth is not None and holds(site.depth) for holds in self.depths)

    def narrow(self, site: Site) -> Site | None:
        """The site with the parts that were asked for, None if there are none."""
        named = not self.explicit and site.path in self.globs
        if site.role == "head":
            return site if named or (self.explicit and "head" in self.roles) else None
        if not self.roles:
            return site
        return self._by_role(site) or (self._whole(site) if named else None)

    def _by_role(self, site: Site) -> Site | None:
        if len(site.parts) < 2:
            asked = site.role in self.roles or any(site.role in role for role in FUSED & self.roles)
            return site if asked and site.role else None
        left = [part for part in site.parts if part.role not in self.without_roles]
        whole = max(FUSED & self.roles, key=len, default="")
        parts = [part for part in left if part.role in self.roles and part.role not in whole]
        joined = _joined([part for part in left if part.role in whole])
        return replace(site, parts=(*joined, *parts)) if joined or parts else None

    def _whole(self, site: Site) -> Site:
        return replace(site, parts=_joined(site.parts)) if len(site.parts) > 1 else site


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """One part over the rows of all `parts`, named after them; empty for none."""
    if not parts:
        return ()
    return (Part("".join(part.role for part in parts), merge_rows(row for part in parts for row in part.rows)),)


def _parse(
    where: str | Sequence[str] | None, sites: Sequence[Site], default_roles: Sequence[str], model_name: str
) -> _Query:
    listed = where.split(",") if isinstance(where, str) else () if where is None else where
    terms = [term.strip() for term in listed if term.strip()]
    if where is not None and not terms:
        raise SiteError("`where` names nothing; leave it out for the method's default roles")
    roles: set[str] = set()
    globs: list[str] = []
    depths: list[Callable[[int], bool]] = []
    without_globs: list[str] = []
    without_roles: set[str] = set()
    for term in terms:
        excluded, name = term.startswith("!"), term.removeprefix("!").strip()
        if not excluded and name.startswith("depth"):
            depths.append(_depth_test(name))
        elif name in ROLES:
            (without_roles if excluded else roles).add(name)
        elif excluded and _is_path(name):
            without_globs.append(name)  # may fit nothing: recipes exclude heads that a headless model lacks
        elif any(_fits(name, site.path) for site in sites):
            (without_globs if excluded else globs).append(name)
        else:
            raise SiteError(_unknown(term, name, sites, model_name))
    explicit = bool(roles)
    if not explicit and not default_roles and not globs:
        raise SiteError(f"say in `where` which roles or paths to adapt. {_offer(sites, model_name)}")
    for role in FUSED & without_roles:
        without_roles |= set(role)
    chosen = frozenset(roles) if explicit else frozenset(default_roles)
    return _Query(chosen, explicit, tuple(globs), tuple(depths), tuple(without_globs), frozenset(without_roles))


def _depth_test(term: str) -> Callable[[int], bool]:
    match = _DEPTH.fullmatch(term)
    if match is None or (match[3] and match[1] not in ("=", "==")):
        raise SiteError(f"{term!r} is no depth term; write depth<6, depth>=3, depth=5 or depth=0-3")
    first, last = int(match[2]), int(match[3] or match[2])
    if match[3]:
        return lambda depth: first <= depth <= last
    compare = _COMPARE[match[1]]
    return lambda depth: compare(depth, first)


def _fits(glob: str, path: str) -> bool:
    """Glob match; the leading dot lets `*.head` also mean a top-level `head`."""
    return fnmatchcase(path, glob) or fnmatchcase(f".{path}", glob)


def _is_path(name: str) -> bool:
    return any(sign in name for sign in ".*?[")


def _unknown(term: str, name: str, sites: Sequence[Site], model_name: str) -> str:
    paths = [site.path for site in sites]
    if any(path.startswith(f"{name}.") for path in paths):
        return f"{term!r} is no site of {model_name}; for what lies under it write {name + '.*'!r}"
    kind = "path" if _is_path(name) else "role, depth term or path"
    offered = sorted({site.role for site in sites} | {part.role for site in sites for part in site.parts})
    choices = paths if _is_path(name) else [*offered, *paths]
    return f"{term!r} is no {kind} of {model_name}; {nearest(name, choices)} {_offer(sites, model_name)}"


def _offer(sites: Sequence[Site], model_name: str) -> str:
    """What a model has to choose from, in one sentence."""
    counts: Counter[str] = Counter()
    example: dict[str, str] = {}
    for site in sites:
        for role in {site.role, *(part.role for part in site.parts)}:
            counts[role] += 1
            example.setdefault(role, site.path)
    listed = "; ".join(f"{r} x{counts[r]} (e.g. {example[r] or 'the model itself'})" for r in ROLES if counts[r])
    depths = [site.depth for site in sites if site.depth is not None]
    span = f"depth {min(depths)}-{max(depths)}" if depths else "no blocks, so no depths"
    return f"{model_name} offers: {listed or 'no site at all'}; {span}."


def describe_sites(sites: Iterable[Site]) -> str:
    """A table of sites, one line for all that differ only in the numbers of their path."""
    groups: dict[tuple[str, ...], list[Site]] = defaultdict(list)
    for site in sites:
        parts = " ".join(part.role for part in site.parts) or "-"
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", site.path) if site.depth is not None else site.path
        widths = f"{site.in_features} -> {site.out_features}"
        groups[(pattern or "(model)", site.role, widths, parts, site.mode)].append(site)
    rows = [("path", "role", "in -> out", "parts", "mode", "depth", "count")]
    for key, members in groups.items():
        depths = [site.depth for site in members if site.depth is not None]
        span = "-" if not depths else f"{min(depths)}-{max(depths)}" if len(set(depths)) > 1 else str(depths[0])
        rows.append((key[0], key[1], key[2], key[3], key[4], span, str(len(members))))
    widest = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widest, strict=True)).rstrip() for row in rows)
