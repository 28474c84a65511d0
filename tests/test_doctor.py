"""The command doctor: one screen about a machine, and exit code 2 where a run would end."""

import pytest

from pgpo_jax import doctor


def lines(capsys):
    return {line[4:19].strip(): line for line in capsys.readouterr().out.splitlines()}


def test_a_machine_that_will_do_is_told_in_one_screen(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctor.main(["quickstart"]) == 0
    told = lines(capsys)
    assert {"python", "packages", "extras", "devices", "disk", "mesh", "model"} <= told.keys()
    assert "8 x cpu" in told["devices"]
    assert "data 8 x fsdp 1 x tensor 1" in told["mesh"]
    assert all(line.startswith("ok ") for line in told.values())
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_without_a_configuration_only_the_machine_is_looked_at(capsys):
    assert doctor.main([]) == 0
    assert not lines(capsys).keys() & {"mesh", "model", "checkpoints"}


@pytest.mark.parametrize(
    ("options", "name", "text"),
    [
        (["--data.questions_per_step", "3", "--sampling.num_samples", "1"], "mesh", "= 3 rows"),
        (["--mesh.fsdp", "16"], "mesh", "mesh"),
        (["--output_dir", "file/run"], "disk", "cannot be written"),
        (["--checkpoint.path", "file"], "checkpoints", "cannot be written"),
    ],
)
def test_what_would_end_a_run_is_named(options, name, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert doctor.main(["quickstart", *options]) == 2
    line = lines(capsys)[name]
    assert line.startswith("BAD ")
    assert text in line


def test_few_open_files_are_named(monkeypatch, capsys):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, 256))
    assert doctor.main([]) == 2
    assert "256; ulimit -n 4096 gives more" in lines(capsys)["open files"]
