"""The documentation is true: its code runs, its commands and configurations are accepted, its links
lead somewhere."""

import importlib
import re
import shlex
import textwrap
from pathlib import Path

import jax.numpy as jnp
import pytest

from pgpo_jax import config, convert, fields
from pgpo_jax.checkpoint.commands import COMPARE
from pgpo_jax.command import parse, parse_one_of
from pgpo_jax.config import Config
from pgpo_jax.plan import summary
from pgpo_jax.report import page as report_page

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
REFERENCE = sorted((ROOT / "docs/reference").glob("*.md"))
GENERATED = {"benchmarks.md", "changelog.md", "configuration.md", "evidence_tables.md"}
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "launch/xpk.md",
    *GUIDES,
    *(path for path in REFERENCE if path.name not in GENERATED),
]
BLOCK = re.compile(r"(<!-- not run: .+ -->\n+)?^( *)```(\w+)\n(.*?)^ *```$", re.M | re.S)
ONE = {"plan": summary.COMMAND, "report": report_page.COMMAND}
"""Commands that are floors; those that are files have their `COMMAND`."""
SEVERAL = {"convert": (convert.GGUF, convert.EXPORT), "checkpoint": (COMPARE,)}
COMMAND = re.compile(r"(?:python -m pgpo_jax\.|pgpo-jax )(\w+)((?: [^&|;\"\n]*)?)")


def name(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    """The blocks of a language that give no reason why they are not run."""
    for reason, indent, kind, text in BLOCK.findall(path.read_text()):
        if kind == language and not reason:
            yield textwrap.dedent(indent + text)


@pytest.mark.parametrize("path", [p for p in PAGES if list(blocks(p, "python"))], ids=name)
def test_the_python_of_a_page_runs_from_top_to_bottom(path):
    space = {"params": jnp.ones(2), "grads": jnp.ones(2), "information": 0.5}
    for block in blocks(path, "python"):
        exec(compile(block, name(path), "exec"), space)


def commands(path):
    """(name, arguments) of every command of ours in a page's bash blocks."""
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for command, rest in COMMAND.findall(line):
                yield command, shlex.split(rest, comments=True)


@pytest.mark.parametrize("path", [p for p in PAGES if list(commands(p))], ids=name)
def test_a_pages_commands_are_accepted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command, arguments in commands(path):
        if command in SEVERAL:
            parse_one_of(SEVERAL[command], "", arguments)
            continue
        form = ONE.get(command) or importlib.import_module(f"pgpo_jax.{command}").COMMAND
        parsed = parse(form, arguments)
        if form.sections is None:
            continue
        if parsed.words[0].startswith("configs/"):
            config.from_arguments(parsed)
        else:  # a file of the reader's
            config.load(None, arguments[1:])


@pytest.mark.parametrize("path", [p for p in PAGES if list(blocks(p, "yaml"))], ids=name)
def test_a_pages_configurations_are_accepted(path):
    for block in blocks(path, "yaml"):
        fields.decode(Config, fields.load_yaml(block))


def anchors(text):
    """What Sphinx and forges make of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "benchmarks/EVIDENCE.md"], ids=name)
def test_a_pages_links_lead_somewhere(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        file, _, anchor = target.partition("#")
        if re.match(r"https?:", target) or file.rpartition("/")[2] in GENERATED:
            continue
        there = path.parent / file if file else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text()), target


def test_the_page_of_fields_names_every_field_with_its_doc(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pages = importlib.import_module("generated").pages()
    assert set(pages) == GENERATED
    for field in fields.kinds(Config):
        assert re.search(rf"^\*\*`{field}`\*\* .+\n: .+", pages["configuration.md"], re.M), field


def test_every_guide_can_be_reached_from_the_first_page():
    index = (ROOT / "docs/index.md").read_text()
    assert "\n*\n```" in index  # a toctree that takes every page beside it
    assert all(path.read_text().startswith("# ") for path in GUIDES)


def test_readme_is_one_screen_and_then_links():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
