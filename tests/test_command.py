"""Command lines: what they take, and help that is true."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from pgpo_jax import checkpoint, config, convert, discover, evaluate, fields, plan, report, train
from pgpo_jax.command import Argument, Command, Option, parse
from pgpo_jax.errors import InputError

PROGRAMS = {
    "train": train.main,
    "evaluate": evaluate.main,
    "discover": discover.main,
    "convert": convert.main,
    "plan": plan.main,
    "report": report.main,
    "checkpoint": checkpoint.main,
}
WITH_A_CONFIGURATION = ("train", "evaluate", "discover", "plan")


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    """How fast. What comes after the first sentence stands in its own help only."""
    kinds: tuple[Literal["a", "b"], ...] = ("a",)
    """Which of them."""
    name: str | None = None
    """What it is called."""


@dataclass(frozen=True)
class Outer:
    seed: int = 0
    """Where it begins."""
    inner: Inner = field(default_factory=Inner)
    """The part inside."""


COMMAND = Command(
    "try",
    "Tries something.",
    (Argument("FILE", "a file"),),
    (
        Option("--out", "where to", "FOLDER", short="-o"),
        Option("--loud", "say more"),
        Option("--which", "one of two", "ONE", choices=("x", "y")),
    ),
    example="some.file",
    sections=Outer,
)


def helped(capsys, main, *argv) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def test_arguments_options_and_fields_stand_in_any_order_and_form():
    expected = (["f"], {"--out": "there", "--loud": ""}, {"inner.rate": "-1", "seed": "3"})
    for line in (
        "f -o there --loud --inner.rate -1 --seed=3",
        "--seed 3 --inner.rate=-1 --loud --out=there f",
        "--loud --out there --seed 3 f --seed 3 --loud --inner.rate -1",  # twice the same
    ):
        assert parse(COMMAND, line.split()) == expected


def test_a_value_may_be_empty_hold_equals_signs_and_begin_with_dashes():
    given = parse(COMMAND, ["f", "--inner.name=", "--out", "a=b"])
    assert (given.fields, given.options) == ({"inner.name": ""}, {"--out": "a=b"})
    assert parse(COMMAND, ["f", "--inner.name", "--- x"]).fields == {"inner.name": "--- x"}
    assert parse(COMMAND, ["f", "--inner.name=--seed"]).fields == {"inner.name": "--seed"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "FILE: got none; give a file: python -m pgpo_jax.try some.file"),
        ("f g", "g: not expected; overrides are like --optimizer.alpha 0.5"),
        ("f --out", "--out: got no value; give --out FOLDER"),
        ("f -o --loud", "--out: got no value; give --out FOLDER"),
        ("f --out=", "--out: got no value; give --out FOLDER"),
        ("f --out a -o b", "-o: got a and b; give it once"),
        ("f --seed 1 --seed=2", "--seed: got 1 and 2; give it once"),
        ("f --loud=1", "--loud: got '1'; takes no value"),
        ("f --which z", "--which: got z; must be one of x, y"),
        ("f --see 1", "--see: no such field; did you mean --seed?"),
        ("f --rate 1", "--rate: no such field; did you mean --inner.rate?"),
        ("f --outt x", "--outt: no such field; did you mean --out?"),
        ("f --inner 1", "--inner: got a section; set its fields, such as --inner.rate: see --help"),
        ("f -x 1", "-x: no such option; see python -m pgpo_jax.try --help"),
        ("--help inner.speed", "--help: got inner.speed; "),
    ],
)
def test_a_bad_argument_is_one_line(line, message):
    with pytest.raises(InputError) as error:
        parse(COMMAND, line.split())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_command_has_help_in_both_forms(name, capsys):
    short, long = (helped(capsys, PROGRAMS[name], form) for form in ("-h", "--help"))
    assert short == long
    assert long.startswith(f"usage: python -m pgpo_jax.{name} ")
    assert max(map(len, long.splitlines())) <= 100


@pytest.mark.parametrize("argv", [["gguf", "--help"], ["--help", "gguf"], ["gguf", "x", "-h"]])
def test_each_command_of_a_program_has_its_help(argv, capsys):
    text = helped(capsys, convert.main, *argv)
    assert text.startswith("usage: python -m pgpo_jax.convert gguf SOURCE OUT [--overwrite]\n")


def test_help_is_given_wherever_it_is_asked_for(capsys):
    overview = helped(capsys, train.main, "--help")
    assert helped(capsys, train.main, "no.yaml", "--nonsense", "--help") == overview
    assert helped(capsys, train.main, "-h", "--base", "no.yaml") == overview
    assert helped(capsys, train.main, "--help", __file__) == overview  # an argument


def test_the_overview_is_short_and_names_sections_and_options(capsys):
    text = helped(capsys, train.main, "--help")
    assert len(text.splitlines()) <= 40
    for name in ("CONFIG", "--base FILE", "--section.field VALUE", "--seed VALUE", "optimizer"):
        assert f"\n  {name} " in text
    assert "--topology SLICE" in helped(capsys, plan.main, "--help")
    assert "--topology" not in text


def test_help_on_a_section_a_field_and_an_option(capsys):
    def main(argv):
        parse(COMMAND, argv)

    assert helped(capsys, main, "--help", "inner") == (
        "inner: The part inside.\n"
        "\n"
        "  --inner.rate  a number; default 0.5\n"
        "      How fast.\n"
        '  --inner.kinds  a list, each one of a, b; default ["a"]\n'
        "      Which of them.\n"
        "  --inner.name  text or null; default null\n"
        "      What it is called.\n"
    )
    field = helped(capsys, main, "--help", "inner.rate")
    assert "What comes after the first sentence" in field
    assert helped(capsys, main, "--help=--inner.rate") == field
    assert helped(capsys, main, "--help", "out") == "  --out, -o FOLDER  where to\n"


def test_every_field_has_a_doc_and_stands_in_the_long_help_with_its_default(capsys):
    text = helped(capsys, train.main, "--help", "all")
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert listed == [f"--{name}" for name in fields.kinds(config.Config)]
    blocks = text.split("\n  --")[1:]
    undocumented = [block.split()[0] for block in blocks if "\n      " not in block]
    assert not undocumented
    assert "--optimizer.alpha  a number; default 1.0\n" in text


@pytest.mark.parametrize("name", WITH_A_CONFIGURATION)
def test_nothing_is_listed_that_is_refused(name, capsys):
    """Every option of the help is taken, with the default that it states."""
    known = fields.kinds(config.Config)
    defaults = fields.encode(config.Config())
    for dotted in known:
        value = defaults
        for part in dotted.split("."):
            value = value[part]
        text = fields.one_line(value)
        assert fields.encode(config.load(None, [f"--{dotted}", text])) == defaults
        assert f"--{dotted} " in helped(capsys, PROGRAMS[name], "--help", dotted)


def test_help_needs_no_accelerator_and_comes_at_once():
    code = (
        "import sys, time; start = time.process_time()\n"
        "from pgpo_jax import train\n"
        "try:\n    train.main(['--help', 'all'])\n"
        "except SystemExit:\n    print(time.process_time() - start, file=sys.stderr)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    seconds = []
    for _ in range(2):  # the first may compile bytecode
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stderr))
    assert min(seconds) < 3  # processor time, so that a busy machine fails nothing
