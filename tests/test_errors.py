"""Exit codes and the one clear line of `pgpo_jax.errors`."""

import sys

import pytest

from pgpo_jax import errors


def exit_code(main, argv=()):
    with pytest.raises(SystemExit) as caught:
        errors.command(main, argv)
    return caught.value.code


def test_a_command_that_returns_nothing_exits_zero():
    assert exit_code(lambda argv: None) == 0


def test_a_command_chooses_its_exit_code():
    assert exit_code(lambda argv: 75) == 75


def test_an_input_error_is_one_line_and_code_two(capsys):
    def main(argv):
        raise errors.InputError("model.path: got 'x'\n  (no such folder); give a folder")

    assert exit_code(main) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: model.path: got 'x' (no such folder); give a folder\n"


def test_what_the_world_causes_is_one_line_and_code_one(capsys):
    def main(argv):
        raise errors.RunError("checkpoints: step 3 could not be saved (No space left on device)")

    assert exit_code(main) == 1
    err = capsys.readouterr().err
    assert err == "error: checkpoints: step 3 could not be saved (No space left on device)\n"


def test_other_errors_pass_through():
    def main(argv):
        raise ValueError("a defect of ours")

    with pytest.raises(ValueError, match="a defect of ours"):
        errors.command(main, [])


def test_the_arguments_are_the_process_arguments_without_the_program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "run.yaml", "--steps", "3"])
    seen = []

    def main(argv):
        seen.extend(argv)

    with pytest.raises(SystemExit):
        errors.command(main)
    assert seen == ["run.yaml", "--steps", "3"]


def test_an_input_error_is_a_value_error():
    assert issubclass(errors.InputError, ValueError)


def test_a_broken_rule_names_field_value_and_rule():
    class Section:
        rate = -1.0
        count = 3

    errors.require("section", Section(), count=(True, "at least 0"))
    with pytest.raises(errors.InputError, match=r"^section\.rate: got -1\.0; must be at least 0$"):
        errors.require("section", Section(), count=(True, "odd"), rate=(False, "at least 0"))
