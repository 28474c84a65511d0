"""Pages that every build makes anew: all configuration fields, and what stands elsewhere already.

python docs/generated.py     # writes them under reference/
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from pgpo_jax import fields
from pgpo_jax.config import Config

REFERENCE = Path(__file__).parent / "reference"
ROOT = REFERENCE.parent.parent
COPIED = {
    "benchmarks/EVIDENCE.md": "evidence_tables.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
}
"""File of the repository -> page."""
OPENING = """# Every configuration field

Any field can be set in the YAML file or on the command line as `--section.field VALUE`; a value is
read as YAML. `python -m pgpo_jax.train --help SECTION` prints a section of this page, `--help
SECTION.FIELD` a field. A value of a wrong type, an unknown field or one that breaks a rule is
refused in one line (exit code 2) before anything is loaded.
"""


def pages() -> dict[str, str]:
    """Name under reference/ -> MyST Markdown."""
    return {"configuration.md": configuration()} | {
        page: _linked(ROOT / source) for source, page in COPIED.items()
    }


def configuration() -> str:
    """The page of all fields, made from the dataclasses that declare them."""
    return "\n".join([OPENING, *_section(Config, "", 2)])


def _section(section: type, prefix: str, level: int) -> Iterator[str]:
    """The fields of a dataclass, then the sections inside it, each under a heading."""
    docs, defaults, inner = fields.docs(section), section(), {}
    for name, kind in get_type_hints(section).items():
        if hasattr(kind, "__dataclass_fields__"):
            inner[name] = kind
        else:
            yield from _field(prefix + name, kind, getattr(defaults, name), docs.get(name, ""))
    for name, kind in inner.items():
        yield f"{'#' * level} {prefix}{name}\n\n{docs.get(name, '')}\n"
        yield from _section(kind, f"{prefix}{name}.", level + 1)


def _field(name: str, kind: Any, default: Any, doc: str) -> Iterator[str]:
    value = fields.one_line(fields.encode(default))
    yield f"**`{name}`** · {fields.describe(kind)} · default `{value}`\n: {doc}\n"


def _linked(source: Path) -> str:
    """A file's text with its links made to hold from reference/; those to no page are text."""

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path = (source.parent / target).relative_to(ROOT).as_posix()
        if image:
            return f"![{text}](../../{path})"
        return f"[{text}]({COPIED[path]})" if path in COPIED else f"`{path}`"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)#:]+)\)", link, source.read_text(encoding="utf-8"))


def write() -> None:
    """Writes the pages that are not there as they are."""
    for name, text in pages().items():
        page = REFERENCE / name
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
