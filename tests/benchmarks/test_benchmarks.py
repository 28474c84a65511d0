"""The benchmarks run at their smallest size and print what they promise."""

import importlib
import json
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
KEYS = {
    "train_step": {
        *("seconds_per_step", "cpu_seconds_per_step", "tokens_per_second", "mfu"),
        *("speedup_over_torch", "compile_seconds", "peak_bytes", "device", "jax"),
    },
    "step_overhead": {"flops_ratio", "bytes_ratio", "time_ratio", "device", "jax"},
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a benchmark in this process and returns its last line, parsed."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        importlib.import_module(name).main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def test_the_update_is_measured_without_torch_and_the_line_says_so(run):
    result = run("train_step", "--preset", "tiny", "--repeats", "1", "--no-torch", "--no-parts")
    assert set(result) >= KEYS["train_step"]
    assert result["speedup_over_torch"] is None
    assert result["torch_absent"]
    assert result["mfu"] > 0
    assert result["tokens_per_second"] == pytest.approx(128 / result["seconds_per_step"])


@pytest.mark.slow
def test_torch_computes_the_same_losses():
    pytest.importorskip("torch")
    command = [sys.executable, str(FOLDER / "train_step.py"), "--preset", "tiny"]
    command += ["--repeats", "2"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500).stdout
    result = json.loads(out.splitlines()[-1])
    assert result["speedup_over_torch"] > 0
    assert all(part["seconds"] > 0 for part in result["parts"].values())
    assert result["loss_difference"] < 1e-4
    assert result["losses"]["torch"][0] > 1e-3, "the two distributions should differ"


@pytest.mark.slow
def test_an_update_of_adapters_is_measured_and_needs_fewer_operations(run):
    tiny = ("train_step", "--preset", "tiny", "--repeats", "1", "--no-torch", "--no-parts")
    whole, adapters = run(*tiny), run(*tiny, "--lora-rank", "4")
    assert adapters["benchmark"].endswith("_lora_4")
    assert adapters["parameters"] > whole["parameters"]
    assert 0.6 < adapters["model_flops"] / whole["model_flops"] < 1
    assert adapters["peak_bytes"] < whole["peak_bytes"]


@pytest.mark.slow
def test_what_the_multiplier_costs_is_measured(run):
    result = run("step_overhead", "--preset", "tiny", "--repeats", "1")
    assert set(result) >= KEYS["step_overhead"]
    assert result["flops_ratio"] < 1.005


@pytest.mark.slow
def test_the_sandbox_is_timed_for_either_kind_of_test(run):
    result = run("sandbox", "--responses", "3", "--tests", "2", "--sandbox", "none")
    assert result["seconds"].keys() == {"stdin", "asserts"}


@pytest.mark.slow
def test_packed_and_padded_updates_are_compared_where_it_helps_and_where_not(run):
    result = run("packing", "--preset", "tiny", "--repeats", "1", "--batches", "2")
    for lengths, packed in (("skewed", True), ("equal", False)):
        assert result[lengths]["packed_by_auto"] == packed
        assert result[lengths]["cpu_time_ratio"] > 0
    assert result["skewed"]["padding_fraction_packed"] < result["skewed"]["padding_fraction_padded"]
    assert result["equal"]["padding_fraction_packed"] == 0
    assert result["columns_ratio"] < 0.5


def test_tables_say_which_targets_were_missed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    tables = importlib.import_module("tables")
    result = {"benchmark": "train_step_cpu_135m_cpu", "preset": "cpu_135m", "platform": "cpu"}
    result |= {"speedup_over_torch": 1.25, "peers": {"torch": "2.13.0"}, "threads": 2}
    (tmp_path / "train_step_cpu_135m_cpu.json").write_text(json.dumps(result))
    readme = tmp_path / "README.md"
    marked = "<!-- table: {} -->\n<!-- end -->\n"
    readme.write_text(f"a\n{marked.format('train_step')}{marked.format('plan')}b")
    arguments = ["--results", str(tmp_path), "--readme", str(readme)]
    with pytest.raises(SystemExit, match=r"run python benchmarks/tables.py"):
        tables.main([*arguments, "--check"])
    tables.main(arguments)
    text = readme.read_text()
    assert "| 1.25 (≥ 1.5: **missed**) |" in text
    assert "torch 2.13.0" in text
    assert "No results yet." in text
    result["load_average"] = 9.0
    (tmp_path / "train_step_cpu_135m_cpu.json").write_text(json.dumps(result))
    tables.main(arguments)
    assert "| 1.25 |" in readme.read_text(), "a busy machine gives no verdict"
    text = readme.read_text()
    tables.main([*arguments, "--check"])
    assert readme.read_text() == text


def test_the_tables_of_the_readme_are_current(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    importlib.import_module("tables").main(["--check"])


def test_the_list_of_gpu_runs_is_a_valid_script():
    subprocess.run(["bash", "-n", str(FOLDER / "gpu.sh")], check=True)
