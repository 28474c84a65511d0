"""Command lines: the one parser of arguments, options and configuration fields, and its help."""

import dataclasses
import difflib
import os
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, get_type_hints

from pgpo_jax import fields
from pgpo_jax.errors import InputError


class Argument(NamedTuple):
    """An argument that has its place and no name, such as `CONFIG`."""

    name: str
    doc: str
    several: bool = False
    """Whether more than one may be given (of the last argument only)."""


class Option(NamedTuple):
    """`--name VALUE` or `--name=VALUE`, which is no field of the configuration."""

    name: str
    """With its dashes."""
    doc: str
    value: str | None = None
    """What stands for its value in the help; None for a switch, which takes none."""
    short: str | None = None
    """Another name, such as `-o`."""
    choices: tuple[str, ...] = ()


class Command(NamedTuple):
    """What `python -m pgpo_jax.NAME` takes, and what its help says."""

    name: str
    """As in `train` or `convert export`."""
    doc: str | None
    """What it does: a line, and more; a module's docstring is None where Python drops those."""
    arguments: tuple[Argument, ...]
    options: tuple[Option, ...] = ()
    example: str = ""
    """Arguments that do something."""
    sections: type | None = None
    """A dataclass whose fields are options too, as `--section.field VALUE`."""

    @property
    def program(self) -> str:
        return f"python -m pgpo_jax.{self.name}"

    @property
    def about(self) -> str:
        return (self.doc or "").strip()


class Arguments(NamedTuple):
    """What was given on a command line, as text."""

    words: list[str]
    """The arguments without a name, as many as the command takes."""
    options: dict[str, str]
    """Option with its dashes -> its value; that of a switch is empty."""
    fields: dict[str, str]
    """Dotted field of the configuration -> its value."""


def parse(command: Command, argv: Sequence[str]) -> Arguments:
    """Reads a command line; answers `-h` and `--help`, wherever they stand, and exits with 0.

    Raises:
      InputError: An argument that is missing or too many, an unknown option or field, one without
        its value, or one that is given twice with different values.
    """
    if (topic := _topic(argv)) is not None:
        _answer(_help_on(command, topic))
    named = fields.kinds(command.sections) if command.sections else {}
    options = {name: Option(name, "", "VALUE") for name in (f"--{field}" for field in named)}
    options |= {name: option for option in command.options for name in _names(option)}
    words, given, rest = [], {}, list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            words.append(argument)
            continue
        name, equals, text = argument.partition("=")
        if (option := options.get(name)) is None:
            raise _unknown(command, name)
        if option.value is None and equals:
            raise InputError(f"{name}: got {text!r}; takes no value")
        if option.value is not None and not equals:
            if not rest or re.match(r"--[A-Za-z]", rest[0]):
                raise _no_value(option)
            text = rest.pop(0)
        if given.setdefault(option.name, text) != text:
            raise InputError(f"{name}: got {given[option.name]} and {text}; give it once")
    _check_words(command, words)
    stated = {}
    for option in command.options:
        if option.name in given:
            stated[option.name] = given.pop(option.name)
            _check_value(option, stated[option.name])
    return Arguments(words, stated, {name[2:]: text for name, text in given.items()})


def parse_one_of(
    commands: Sequence[Command], doc: str | None, argv: Sequence[str]
) -> tuple[Command, Arguments]:
    """Reads the command line of a program of several commands, the first word says of which.

    Args:
      commands: Their names are those of the program and the word.
      doc: What the program does, for its help.
      argv: The arguments.

    Raises:
      InputError: No such command, or what `parse` raises.
    """
    by_word = {command.name.split()[1]: command for command in commands}
    program = f"python -m pgpo_jax.{commands[0].name.split()[0]}"
    if argv and argv[0] in by_word:
        return by_word[argv[0]], parse(by_word[argv[0]], argv[1:])
    topic = _topic(argv)
    if topic in by_word:
        _answer(_help_on(by_word[topic], ""))
    if topic is not None:
        usages = "\n".join(_usage(command) for command in commands)
        each = "\n\n".join(f"{c.name.split()[1]}: {c.about}" for c in commands)
        _answer(
            f"{usages}\n\n{(doc or '').strip()}\n\n{each}\n\n{program} COMMAND --help says more."
        )
    forms = [
        " ".join([word, *(argument.name for argument in command.arguments)])
        for word, command in by_word.items()
    ]
    raise InputError(
        f"COMMAND: got {argv[0] if argv else 'none'}; must be as in {' or '.join(forms)}; "
        f"see {program} --help"
    )


def _names(option: Option) -> list[str]:
    return [option.name, *([option.short] if option.short else [])]


def _no_value(option: Option) -> InputError:
    return InputError(f"{option.name}: got no value; give {option.name} {option.value}")


def _check_value(option: Option, text: str) -> None:
    if option.value is not None and not text:
        raise _no_value(option)
    if option.choices and text not in option.choices:
        raise InputError(f"{option.name}: got {text}; must be one of {', '.join(option.choices)}")


def _check_words(command: Command, words: list[str]) -> None:
    count = len(command.arguments)
    for argument in command.arguments[len(words) :]:
        raise InputError(
            f"{argument.name}: got none; give {argument.doc}: {command.program} {command.example}"
        )
    if len(words) > count and not (count and command.arguments[-1].several):
        if command.sections:
            hint = "overrides are like --optimizer.alpha 0.5"
        else:
            hint = f"see {command.program} --help"
        raise InputError(f"{words[count]}: not expected; {hint}")


def _unknown(command: Command, name: str) -> InputError:
    """The error for an option that there is not."""
    options = [option.name for option in command.options]
    bare = name.removeprefix("--")
    if command.sections and name.startswith("--"):
        known = list(fields.kinds(command.sections))
        if inside := [field for field in known if field.startswith(f"{bare}.")]:
            return InputError(
                f"{name}: got a section; set its fields, such as --{inside[0]}: see --help {bare}"
            )
        return fields.unknown(bare, [*known, *(option[2:] for option in options)], "--")
    meant = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {meant[0]}?" if meant else f"see {command.program} --help"
    return InputError(f"{name}: no such option; {hint}")


# ---- help ----------------------------------------------------------------------------------------


def _topic(argv: Sequence[str]) -> str | None:
    """What help is asked for: None for no help, else its topic, which may be empty."""
    for index, argument in enumerate(argv):
        name, _, topic = argument.partition("=")
        if name in ("-h", "--help"):
            following = argv[index + 1] if index + 1 < len(argv) else ""
            return topic or ("" if following.startswith("-") else following)
    return None


def _answer(text: str) -> NoReturn:
    print(text)
    raise SystemExit(0)


def _help_on(command: Command, topic: str) -> str:
    sections, name = command.sections, topic.removeprefix("--")
    for option in command.options:
        if name == option.name.removeprefix("--"):
            return "\n".join(_table([_option_row(option)]))
    if not topic or sections is None or os.path.exists(topic):  # an argument is no topic
        return _overview(command)
    if name == "all":
        return "\n".join(_section_help(sections, ""))
    section, kind, doc = sections, sections, ""
    for part in name.split("."):
        hints = get_type_hints(kind) if _is_section(kind) else {}
        if part not in hints:
            known = [*fields.kinds(sections), *get_type_hints(sections), "all"]
            meant = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {meant[0]}?" if meant else "must be a section, a field or all"
            raise InputError(f"--help: got {topic}; {hint}")
        section, doc = kind, fields.docs(kind).get(part, "")
        kind = hints[part]
    if _is_section(kind):
        return "\n".join([f"{name}: {doc}", "", *_section_help(kind, f"{name}.")])
    default = getattr(section(), name.split(".")[-1])
    return "\n".join(_field_help(name, kind, default, doc))


def _overview(command: Command) -> str:
    """Usage, what the command does, its arguments and options, the configuration's sections."""
    rows = [(argument.name, argument.doc) for argument in command.arguments]
    rows += [_option_row(option) for option in command.options]
    if command.sections is None:
        rows.append(("-h, --help", "this text"))
        return "\n".join([_usage(command), "", command.about, "", *_table(rows)])
    rows += [
        ("--section.field VALUE", "a field of the configuration, read as YAML"),
        ("-h, --help [TOPIC]", "this text; with a section or a field, that; with all, every field"),
    ]
    sections, docs = command.sections, fields.docs(command.sections)
    configuration = [
        (name if _is_section(kind) else f"--{name} VALUE", docs.get(name, ""))
        for name, kind in get_type_hints(sections).items()
    ]
    return "\n".join(
        [
            _usage(command),
            "",
            command.about,
            "",
            *_table(rows),
            "",
            "Configuration (--help SECTION lists the fields of a section, --help all every field):",
            *_table(configuration),
        ]
    )


def _option_row(option: Option) -> tuple[str, str]:
    names = ", ".join(_names(option))
    return f"{names} {option.value}" if option.value else names, option.doc


def _usage(command: Command) -> str:
    parts = [
        f"{argument.name} [{argument.name} ...]" if argument.several else argument.name
        for argument in command.arguments
    ]
    for option in command.options:
        name = option.short or option.name
        parts.append(f"[{name} {option.value}]" if option.value else f"[{name}]")
    if command.sections:
        parts.append("[--section.field VALUE ...]")
    return f"usage: {' '.join([command.program, *parts])}"


def _section_help(section: Any, prefix: str) -> Iterator[str]:
    """The fields of a section and of those inside it."""
    docs, defaults = fields.docs(section), section()
    for name, kind in get_type_hints(section).items():
        doc = docs.get(name, "")
        if _is_section(kind):
            yield f"\n{prefix}{name}: {doc}\n"
            yield from _section_help(kind, f"{prefix}{name}.")
        else:
            yield from _field_help(prefix + name, kind, getattr(defaults, name), _first(doc))


def _field_help(name: str, kind: Any, default: Any, doc: str) -> Iterator[str]:
    """`--section.field`, what it takes, its default; below it what it does."""
    shown = fields.one_line(fields.encode(default))
    yield _fill(f"--{name}  {fields.describe(kind)}; default {shown}", "  ", "      ")
    yield _fill(doc, "      ", "      ")


def _table(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    width = max(len(name) for name, _ in rows) + 4
    for name, doc in rows:
        yield _fill(doc, f"  {name}".ljust(width), " " * width)


def _fill(text: str, first: str, indent: str) -> str:
    return textwrap.fill(
        text,
        min(shutil.get_terminal_size((100, 24)).columns, 100),
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _first(doc: str) -> str:
    """The first sentence."""
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", doc, maxsplit=1)[0]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)
