"""Names that come from a file's content: which may become a file's name, and which path lies below a root. No torch.

A configuration's test names, a schedule's name, an image that a benchmark mentions, a checkpoint's list of shards:
others wrote them. Whatever is written or read on their behalf is named by `file_name` and found by `below`.
"""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from hydra_vlm.errors import ConfigError, HydraError

LONGEST = 160
"""Bytes of a name; with what we add to it (a seed, a suffix, a draft's mark) it keeps within the 255 of systems."""

_PATH_BYTES, _NAME_BYTES = 4095, 255  # Linux's limits
_DRIVE, _SEPARATOR = re.compile(r"[A-Za-z]:"), re.compile(r"[/\\]")
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\u2028\u2029]')
_DEVICES = {"con", "prn", "aux", "nul"} | {f"{p}{n}" for p in ("com", "lpt") for n in "0123456789¹²³"}


def name_fault(name: str) -> str:
    """Why a name cannot be that of a file on every system, in words that follow the name; "" if it can."""
    if not name.strip():
        return "is empty"
    if found := _FORBIDDEN.search(name):
        return f"holds {found[0]!r}, which a file's name may not"
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if size > LONGEST:
        return f"has {size} bytes, and a name may have {LONGEST}"
    if name.startswith("."):
        return "begins with a full stop, as hidden files and drafts do"
    if name != name.strip() or name.endswith("."):
        return "begins or ends with a space or full stop, which some systems drop"
    if name.split(".")[0].rstrip().lower() in _DEVICES:
        return "is the name of a device on Windows"
    return ""


def file_name(name: str, what: str, kind: type[HydraError] = ConfigError) -> str:
    """The name, once it may be that of a file; `what` says in an error whose it is, such as "schedule".

    Raises:
        ConfigError: it may not (`kind`, where another error fits better).
    """
    if fault := name_fault(name):
        raise kind(f"{what} {shown(name)} gives a file its name, but {fault}: choose another name")
    return name


def require_distinct(names: Iterable[str], what: str, taken: Iterable[str] = ()) -> None:
    """Raises ConfigError when two names are one file where case does not count, or one is among those `taken`."""
    seen = {_folded(name): name for name in taken}
    reserved = set(seen)
    for name in names:
        if (key := _folded(name)) in reserved:
            raise ConfigError(f"{what} {name!r} has the name of {seen[key]}, which is scored otherwise: rename it")
        if key in seen:
            raise ConfigError(f"{what}s {seen[key]!r} and {name!r} would be one file on some systems: rename one")
        seen[key] = name


def path_fault(path: str, folder: str = "its folder") -> str:
    """Why a relative path, as a file gives it, does not stay below a folder or cannot be one; "" if it does.

    In words that follow the path. The disk is not asked.
    """
    if not path.strip():
        return "is empty"
    if "\0" in path:
        return "holds a NUL character"
    if path[0] in "/\\~" or _DRIVE.match(path):
        return f"must be relative to {folder}"
    parts = _SEPARATOR.split(path)
    if ".." in parts:
        return f"must not leave {folder} by `..`"
    try:
        size, longest = len(os.fsencode(path)), max(len(os.fsencode(part)) for part in parts)
    except UnicodeEncodeError:
        return "is not valid Unicode"
    return "is longer than files may have" if size > _PATH_BYTES or longest > _NAME_BYTES else ""


def link_fault(path: str | Path, root: str, folder: str = "its folder") -> str:
    """Where a link in a path leads out of the resolved `root`, in words that follow the path; "" if none does."""
    real = os.path.realpath(path)
    return "" if os.path.commonpath((real, root)) == root else f"lies outside {folder}: a link leads to {real}"


def resolved(folder: Path) -> str:
    """The folder itself, links followed."""
    return os.path.realpath(folder)


def below(root: Path, path: object, what: str, kind: type[HydraError]) -> Path:
    """`root / path` for a path that a file's content gives; `what` says in an error what the path is to be.

    Raises:
        HydraError: of this `kind`, when it is no text, or leaves the root by itself or by a link.
    """
    if not isinstance(path, str):
        raise kind(f"{what} must be a path, found {type(path).__name__}")
    folder, found = f"the folder {root}", root / path
    if fault := path_fault(path, folder) or link_fault(found, resolved(root), folder):
        raise kind(f"{what} {shown(path)} {fault}")
    return found


def found_below(root: Path, pattern: str, what: str, kind: type[HydraError]) -> list[Path]:
    """What a pattern finds in a folder, sorted; raises as `below` does for what is a link out of it."""
    return sorted(below(root, str(path.relative_to(root)), what, kind) for path in root.glob(pattern))


def shown(text: str) -> str:
    """A name or path as errors show it: quoted, and cut where it is long."""
    return repr(text if len(text) <= 200 else f"{text[:200]}…")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()
