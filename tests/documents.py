"""What the documentation says that can be checked: commands, configs, keys, links, names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel

from influence.config import Config
from influence.config_reference import sections
from influence.records import Manifest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
#: First words of a command that are ours.
_COMMAND = re.compile(r"(?:influence|(?:\S*python3? )?-m (?:ray_jobs|influence)[.\w]*)\b")
_JOBS = re.compile(r"(?:\S*python3? )?-m ray_jobs\.(\w+)")
_SUFFIXES = {"json", "jsonl", "md", "html", "py", "yaml", "parquet", "pt", "safetensors", "sh"}


@dataclass(frozen=True)
class Said:
    """Some text of a page, and where it stands."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def fenced(page: Path) -> Iterator[tuple[str, Said]]:
    """(language, block) of every fenced block, and ("", block) of every indented one."""
    language, block, first, inside = "", list[str](), 0, False
    text = page.read_text().splitlines()
    for number, line in enumerate([*text, ""], 1):
        if line.lstrip().startswith("```"):
            if inside:
                yield language, Said(page.name, first, "\n".join(block))
            elif block:
                yield "", Said(page.name, first, "\n".join(block))
            inside, block, first = not inside, [], number + 1
            language = line.strip().removeprefix("```")
        elif inside:
            block.append(line)
        elif line.startswith("    ") and (block or not text[number - 2].strip()):
            first = first if block else number
            block.append(line[4:])
        elif block:
            yield "", Said(page.name, first, "\n".join(block))
            block = []


def spans(page: Path) -> Iterator[Said]:
    """Inline code, also where it is broken over two lines."""
    text = re.sub(
        r"```.*?```", lambda m: "\n" * m.group().count("\n"), page.read_text(), flags=re.S
    )
    for match in re.finditer(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", text):
        line = text.count("\n", 0, match.start()) + 1
        yield Said(page.name, line, " ".join(match.group(1).split()))


def commands(page: Path) -> Iterator[Said]:
    """Commands of this package in blocks and inline; comments, prompts and pipes cut off."""
    for _language, block in fenced(page):
        joined = block.text.replace("\\\n", " ")
        for offset, line in enumerate(joined.splitlines()):
            line = re.sub(r"^\s*[\w./-]*\$ ", "", line).strip()
            line = re.sub(r"^ray job submit .*?-- ", "", line)
            if _COMMAND.match(line):
                yield Said(block.page, block.line + offset, line)
    for span in spans(page):
        text = re.sub(r"^ray job submit .*?-- ", "", span.text)
        if _COMMAND.match(text) and not re.match(r"influence[./\w-]*[./_]", text):
            yield Said(span.page, span.line, text)


def words_of(command: str) -> list[str]:
    """The command's words without comment and pipe, `python -m ray_jobs.X` as `influence X`."""
    words = shlex.split(command, comments=True)
    words = words[: words.index("|")] if "|" in words else words
    text = " ".join(words)
    if match := _JOBS.match(text):
        return ["influence", match.group(1), *text[match.end() :].split()]
    return words


def complaint_of(words: list[str], app: typer.Typer) -> str | None:
    """What is wrong with a command: a subcommand, option or `--set` key that does not exist."""
    if words[0] != "influence":
        return None  # python -m influence.module: found by the names
    node: Any = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(node, "commands") and rest and not rest[0].startswith("-"):
        name, rest = rest[0], rest[1:]
        if name not in node.commands:
            return f"no command {name!r}; there are {sorted(node.commands)}"
        node = node.commands[name]
    options = {name for each in node.params for name in each.opts} | {"--help"}
    for index, word in enumerate(rest):
        option = word.partition("=")[0]
        if option.startswith("--") and option not in options:
            return f"no option {option}; there are {sorted(options)}"
        if option == "--set" and index + 1 < len(rest):
            key = rest[index + 1].partition("=")[0]
            if not known_key(key):
                return f"--set {key}: no such key of a config"
    return None


def known_key(key: str, root: Any = Config) -> bool:
    """Whether a dotted key names a value or a section of a config; a mapping takes any name."""
    node = root
    for part in key.split("."):
        node = _step(node, part)
        if node is None:
            return False
    return True


def _step(annotation: Any, part: str) -> Any:
    """The type below a key; None if there is none. A mapping takes any name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(part)
        return None if field is None else field.annotation
    if get_origin(annotation) is dict:
        return get_args(annotation)[1]
    for inner in get_args(annotation):
        if (found := _step(inner, part)) is not None:
            return found
    return None


def keys(page: Path) -> Iterator[Said]:
    """Inline code that looks like a config's key (`section.key`, also with a value), and is not
    one of manifest.json, whose `layers`, `warmup` and others are called like the config's."""
    tops = {path.split(".")[0] for path, _section in sections() if path}
    for span in spans(page):
        match = re.fullmatch(r"([a-z_]+(?:\.[A-Za-z_0-9]+)+)(?:: .*|=.*)?", span.text)
        if match is None or match.group(1).rsplit(".", 1)[-1] in _SUFFIXES:
            continue
        if match.group(1).split(".")[0] in tops and not known_key(match.group(1), Manifest):
            yield Said(span.page, span.line, match.group(1))


def configs(page: Path) -> Iterator[tuple[Said, dict[str, Any]]]:
    """YAML that is a config, or a part of one: by its top-level keys."""
    names = set(Config.model_fields)
    inline = ((span.text, span) for span in spans(page))
    blocks = ((block.text, block) for language, block in fenced(page) if language in ("", "yaml"))
    for text, where in [*blocks, *inline]:
        if not re.match(r"\s*(#.*\n)*[a-z_]+: ?(\S|\n)", text):
            continue
        for part in _alternatives(text):
            try:
                data = yaml.safe_load(part)
            except yaml.YAMLError:
                continue
            if isinstance(data, dict) and names & set(data):
                yield where, data


def _alternatives(text: str) -> list[str]:
    """A block that shows a key several times shows alternatives, one for each time."""
    tops = re.findall(r"^([a-z_]+):", text, flags=re.M)
    return text.splitlines() if len(tops) > len(set(tops)) else [text]


def links(page: Path) -> Iterator[Said]:
    """Targets of links and pictures that are files of the repository."""
    text = page.read_text()
    for match in re.finditer(r"(?:\]\(|src=\"|srcset=\"|href=\")([^)\"\s]+)", text):
        if not re.match(r"[a-z]+:", match.group(1)):
            yield Said(page.name, text.count("\n", 0, match.start()) + 1, match.group(1))


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    found = set()
    for title in re.findall(r"^#+ (.*)$", text, flags=re.M):
        plain = re.sub(r"[^\w\- ]", "", title.strip().lower().replace("`", ""))
        found.add(plain.replace(" ", "-"))
    return found
