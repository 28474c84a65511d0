"""Dataclass fields and YAML: strictly typed, every mistake one line; types and docs in words.

A value has the type that its field states, or it is an error: text is not taken for a number, nor a
number for text, and null only stands where a field may be null. One form is read as YAML 1.2 has
it: `1e-5`, which YAML 1.1 and with it PyYAML take for text, is a number.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import math
import operator
import re
import textwrap
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from pgpo_jax.errors import InputError

Section = TypeVar("Section")

_FLOAT = "tag:yaml.org,2002:float"
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


class _Loader(yaml.SafeLoader):
    """Plain values only, and no key twice (PyYAML keeps the last of them)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would otherwise not read as text."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT, re.compile(rf"^{_EXPONENT.pattern}$"), [*"-+0123456789"])


def load_yaml(text: str) -> Any:
    """Plain values.

    Raises:
      ValueError: Broken YAML, a key twice, or a tag that asks for more than plain values; one line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


def dump_yaml(value: Any) -> str:
    """YAML that `load_yaml` reads as the same values."""
    return yaml.dump(value, Dumper=_Dumper)


def one_line(value: Any) -> str:
    """A field's value in one line, as YAML has it."""
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def encode(value: Any) -> Any:
    """What YAML holds of a dataclass or of a field's value: `decode` makes the same of it again."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {name: encode(item) for name, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, list | tuple) else value


def docs(section: type) -> dict[str, str]:
    """Field -> the docstring under it, which Python itself does not keep, as one line."""
    found = {}
    for kind in reversed(section.__mro__):
        if not dataclasses.is_dataclass(kind):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        for pair in itertools.pairwise(getattr(definition, "body", ())):
            match pair:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


def kinds(section: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type, of all fields of nested dataclasses."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(section).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found |= kinds(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = kind
    return found


def unknown(name: str, names: Sequence[str], prefix: str = "") -> InputError:
    """The error for a field `prefix + name` that there is not, with the one that may be meant."""
    last = name.split(".")[-1]
    elsewhere = [known for known in names if known.split(".")[-1] == last]
    meant = [*difflib.get_close_matches(name, names, n=1, cutoff=0.7), *elsewhere]
    hint = f"did you mean {prefix}{meant[0]}?" if meant else "see --help all"
    return InputError(f"{prefix}{name}: no such field; {hint}")


def decode(section: type[Section], value: Any, name: str = "") -> Section:
    """A dataclass from a mapping; what the mapping leaves out keeps its default.

    Args:
      section: The dataclass; its fields may be dataclasses.
      value: What YAML holds there; null is an empty mapping.
      name: Where it stands, for errors; empty at the top.

    Raises:
      InputError: An unknown field, a value of another type, or one against the section's rules.
    """
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise InputError(f"{name or 'CONFIG'}: got {show(value)}; must be fields and values")
    prefix = f"{name}." if name else ""
    hints = get_type_hints(section)
    for field in value:
        if field not in hints:
            raise unknown(str(field), [*hints, *kinds(section)], prefix)
    decoded = {field: _value(hints[field], item, prefix + field) for field, item in value.items()}
    return section(**decoded)


_PLAIN: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}


def describe(kind: Any) -> str:
    """What a value of a field of this type must be, in words."""
    kind, null = _without_null(kind)
    return " or ".join(_rule(choice) + _each(choice) for choice in _choices(kind)) + null


def _each(kind: Any) -> str:
    return ", each " + describe(get_args(kind)[0]) if get_origin(kind) is tuple else ""


def _choices(kind: Any) -> tuple[Any, ...]:
    """The types of a union, such as that of text and a list of texts; else the one type."""
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def _rule(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(map(_rule, get_args(kind)))
    origin = get_origin(kind)
    if origin is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if dataclasses.is_dataclass(kind):
        return "fields and values"
    return {tuple: "a list", dict: "fields and values"}.get(origin) or _PLAIN[kind]


def _without_null(kind: Any) -> tuple[Any, str]:
    """The type without None, and " or null" where it has it."""
    choices = get_args(kind)
    if NoneType not in choices:
        return kind, ""
    kinds = [choice for choice in choices if choice is not NoneType]
    return functools.reduce(operator.or_, kinds), " or null"


def _value(kind: Any, value: Any, name: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return decode(kind, value, name)
    kind, null = _without_null(kind)
    if null and value is None:
        return None
    stated, listed = kind, isinstance(value, list | tuple)
    kind = next((k for k in _choices(stated) if (get_origin(k) is tuple) == listed), kind)
    origin, choices = get_origin(kind), get_args(kind)
    if kind is float:
        if _is_number(value):
            return float(value)
        fits = False
    elif origin is Literal:
        fits = isinstance(value, str) and value in choices
    elif origin is tuple:
        fits = isinstance(value, list | tuple)
    elif origin is dict:
        fits = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    else:
        fits = type(value) is kind
    if not fits:
        rule = f"{_rule(stated)}{null}{_quotes(kind, value)}"
        raise InputError(f"{name}: got {show(value)}; must be {rule}")
    if origin is tuple:
        return tuple(_item(choices[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    return value


def _item(kind: Any, value: Any, name: str) -> Any:
    """A value in a list; a section's rules name its fields, not where in the list it stands."""
    with inside(name):
        return _value(kind, value, name)


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """Says of a mistake in a section of a list which one it is."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(name):
            raise
        raise InputError(f"{name}: {error}") from error


def _is_number(value: Any) -> bool:
    """Of any size that a float holds, infinity included, but not nan."""
    if type(value) is int:
        return abs(value) < 10**300
    return isinstance(value, float) and not math.isnan(value)


def _quotes(kind: Any, value: Any) -> str:
    """The usual reason why a number is text, or text a number."""
    if kind in (int, float) and isinstance(value, str) and re.fullmatch(r"[-+.0-9eE]+", value):
        return ", without quotes"
    return ", in quotes" if kind is str and isinstance(value, bool | int | float) else ""


def show(value: Any) -> str:
    """A value for an error message, in one short line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
