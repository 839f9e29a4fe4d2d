"""Glob patterns over a folder tree and over object keys, with the same meaning in both."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable


def has_magic(pattern: str) -> bool:
    """Whether the pattern holds a wildcard (`*`, `?` or `[`)."""
    return glob.has_magic(pattern)


def local_matches(pattern: str) -> list[str]:
    """The files on this machine's disks that match; folders do not count."""
    found = glob.glob(pattern, recursive=True)
    return sorted({os.path.normpath(path) for path in found if os.path.isfile(path)})


def remote_matcher(key_pattern: str) -> tuple[str, Callable[[str], bool]]:
    """The folder that holds every match of a key pattern, and the test of one key."""
    segments = key_pattern.strip("/").split("/")
    first = next((i for i, part in enumerate(segments) if has_magic(part)), len(segments))
    body = "".join(_segment(part, last=i == len(segments) - 1) for i, part in enumerate(segments))
    matcher = re.compile(body + r"\Z", re.DOTALL)
    return "/".join(segments[:first]), lambda key: matcher.match(key) is not None


def _segment(part: str, last: bool) -> str:
    """The regular expression of one path segment, with its slash unless it is the last."""
    if part == "**":
        folders = r"(?:[^/.][^/]*/)*"
        return folders + r"[^/.][^/]*" if last else folders
    hidden = r"(?!\.)" if part[:1] in "*?[" else ""
    return hidden + _wildcards(part) + ("" if last else "/")


def _wildcards(part: str) -> str:
    out, i = [], 0
    while i < len(part):
        char = part[i]
        close = part.find("]", i + 2) if char == "[" else -1
        if char == "*":
            out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif close > 0:
            body = part[i + 1 : close].replace("\\", "\\\\")
            negated = body.startswith("!")
            out.append(f"(?!/)[{'^' if negated else ''}{body[negated:]}]")
            i = close
        else:
            out.append(re.escape(char))
        i += 1
    return "".join(out)
