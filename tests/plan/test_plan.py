"""The plan of a run: for the local devices, for chips too small, and for a TPU slice not there."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest
import yaml

from pgpo_jax import config, models, plan
from pgpo_jax.errors import InputError
from pgpo_jax.plan import chips, hlo_cost, measure, programs

KEYS = {
    *("topology", "chips", "mesh", "fits", "hbm_bytes", "per_chip", "flops_per_chip"),
    *("bytes_per_chip", "collective_bytes_per_chip", "estimated_step_seconds", "estimated_mfu"),
    "pgpo_flops_ratio",
}
SETTINGS = {
    "model": {
        "remat": "full",
        "dtype": "float32",
        "architecture": {
            "model_type": "qwen3",
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "eos_token_id": 1,
        },
    },
    "data": {"questions_per_step": 4, "max_prompt_length": 8, "micro_batches": 2},
    "reprompt": {"max_length": 16},
    "sampling": {"num_samples": 4, "max_response_length": 24},
    "mesh": {"fsdp": 2, "tensor": 2},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("plan") / "tiny.yaml"
    file.write_text(yaml.safe_dump(SETTINGS))
    return str(file)


@pytest.fixture(scope="module")
def local(path):
    return plan.plan(config.load(path))


def small_chip(monkeypatch, hbm_bytes):
    chip = chips.Chip(hbm_bytes, peak_flops=1e12, bandwidth=1e11, ici_bandwidth=1e10)
    monkeypatch.setitem(chips.CHIPS, jax.devices()[0].device_kind, chip)


def test_the_local_devices_can_be_planned_for(local):
    assert local.keys() >= KEYS
    assert (local["topology"], local["chips"], local["fits"]) == ("local", 8, True)
    assert local["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    memory = local["per_chip"]
    assert memory["total"] > memory["parameters"] + memory["optimizer"] + memory["teacher"]
    assert memory["optimizer"] > 2 * memory["parameters"] == 2 * memory["teacher"] > 0
    assert memory["total"] > memory["temporaries"] > 0
    assert local["collective_bytes_per_chip"] == sum(local["collective_bytes_by_kind"].values()) > 0
    assert local["stays_whole"] == []
    assert local["estimated_step_seconds"] is None  # nobody knows the peak of a CPU
    json.dumps(local)


def test_adapters_are_planned_for_beside_one_base_and_nothing_is_taken_of_its_gradient(path):
    adapters = ("--model.lora.rank", "4", "--model.lora.base_dtype", "float32")
    whole, setup = setup_on(path, 8), setup_on(path, 8, *adapters)
    memory, expected = programs.state_bytes(setup), programs.state_bytes(whole)
    assert memory["frozen"] == expected["parameters"]
    assert memory["teacher"] == memory["parameters"] < expected["parameters"] / 5
    held = programs.state_bytes_per_parameter(setup)
    assert 4 < held < 8 and 20 <= programs.state_bytes_per_parameter(whole) < 21
    assert 0.6 < programs.model_flops(setup) / programs.model_flops(whole) < 0.9
    # Neither the update nor the sampler holds another array of the size of the frozen ones.
    step, full = (plan.compile_program(programs.lower_train_step(s)) for s in (setup, whole))
    assert step.total < full.total - 2.5 * expected["parameters"]
    assert [*programs.lower_sampler(setup)] == ["weights", "prefill", "enter", "decode"]


def test_the_verdict_counts_the_largest_of_the_samplers_programs(local):
    decode, memory = local["decode"], local["per_chip"]
    resident = memory["parameters"] + memory["optimizer"] + memory["teacher"]
    assert [*decode["programs"]] == ["weights", "prefill", "enter", "decode"]  # 24 need no growth
    assert decode["total"] == max(decode["programs"].values())
    assert min(decode["programs"].values()) > resident
    for name in ("enter", "decode"):  # both hold weights, cache and prefix
        assert decode["programs"][name] > resident + decode["weights"] + decode["cache"]
    assert "fits" in plan.describe(local) and "not counted" in plan.describe(local)


def test_a_chip_too_small_for_the_largest_program_alone_does_not_fit_and_names_it(
    path, local, monkeypatch
):
    totals = local["decode"]["programs"] | {"train": local["per_chip"]["total"]}
    name = max(totals, key=totals.get)
    largest, second = sorted(totals.values())[:-3:-1]
    small_chip(monkeypatch, int((largest + second) / 2 / chips.USABLE))
    found = measure.measure(setup_on(path, 8))
    assert not found["fits"]
    assert ("train step" if name == "train" else f"`{name}`") in found["reason"]


def test_arrays_that_a_mesh_axis_does_not_divide_are_named_with_their_bytes(path):
    setup = setup_on(path, 8, "--mesh.fsdp", "1", "--mesh.tensor", "4", "--mesh.data", "2")
    found = programs.whole_arrays(setup)  # two heads of keys and values over four devices
    assert [array["name"] for array in found] == ["layers.k_proj", "layers.v_proj"]
    assert {array["bytes"] for array in found} == {4 * 2 * 64 * 2 * 16}
    assert (found[0]["axis"], found[0]["size"], found[0]["parts"]) == ("kv_heads", 2, 4)


def test_alpha_costs_next_to_nothing_over_alpha_0(local):
    # The share falls with the tokens of a batch; here there are only 32 to a row.
    assert 1 < local["pgpo_flops_ratio"] < 1.01
    assert 1 <= local["pgpo_bytes_ratio"] < 1.01


def test_parameters_are_split_as_the_mesh_says(local):
    whole = 4 * local["model_parameters"]
    assert whole / 4 <= local["per_chip"]["parameters"] < 1.02 * whole / 4  # norms stay whole


def setup_on(path, count, *overrides):
    devices = jax.devices()[:count]
    return programs.make_setup(config.load(path, overrides), devices)


def matrix_flops(setup):
    module = plan.compile_program(programs.lower_train_step(setup)).module
    return hlo_cost.total(hlo_cost.operations(module)).matrix_flops


@pytest.mark.slow
def test_a_devices_operations_fall_as_one_over_their_number(path):
    options = ("--mesh.tensor", "1", "--mesh.data", "1", "--mesh.fsdp")
    one, four = (matrix_flops(setup_on(path, count, *options, str(count))) for count in (1, 4))
    assert four == pytest.approx(one / 4, rel=0.1)


@pytest.mark.slow
def test_the_models_operations_are_those_that_the_step_computes(path):
    setup = setup_on(
        path, 1, "--model.remat", "none", "--mesh.data", "1", "--mesh.fsdp", "1",
        "--mesh.tensor", "1", "--data.micro_batches", "1",
    )  # fmt: skip
    # Plain attention also computes the scores that the mask hides.
    assert 1 <= matrix_flops(setup) / programs.model_flops(setup) < 1.15


def test_the_batch_is_the_worst_that_the_limits_allow(path):
    setup = setup_on(path, 8)
    assert (setup.rows, setup.prompt, setup.teacher_prompt, setup.response) == (16, 8, 16, 24)
    batch = programs.abstract_batch(setup)
    parts, each = batch.lengths.shape
    assert parts * each == 16
    assert batch.views["teacher"].tokens.shape == (parts, each, 16 + 24)
    tokens = batch.sampler_log_probs
    assert tokens.shape == (parts, each * 24)
    assert tokens.sharding.shard_shape(tokens.shape) == (parts // 4, each * 24)


def test_an_update_of_several_has_its_part_of_the_rows(path):
    options = ("--data.updates_per_rollout", "2", "--data.passes", "3")
    setup = setup_on(path, 8, *options, "--objective.old_log_probs", "recomputed")
    assert (setup.rows, setup.update_rows) == (16, 8)
    batch = programs.abstract_batch(setup)
    assert batch.lengths.size == 8
    assert batch.old_log_probs.shape == batch.responses.shape
    whole = setup_on(path, 8)
    assert programs.model_flops(whole) == 2 * programs.model_flops(setup)
    with pytest.raises(InputError, match=r"data\.micro_batches: got 2; the 4 rows of an update"):
        setup_on(path, 8, "--data.updates_per_rollout", "4")


def test_the_bytes_of_a_parameter_are_shown_for_every_optimizer(local):
    sizes = local["bytes_per_parameter"]
    assert sizes["state"] == {"student": 4, "teacher": 4}
    assert sizes["adamw, float32"] == {"mu": 4, "nu": 4}
    assert sizes["adamw, bfloat16"] == {"mu": 2, "nu": 4}
    assert sizes["lion, bfloat16"] == {"mu": 2}
    assert sizes["sgd, float32"] == {"trace": 4}
    vectors = 2 * (2 * 64 + 2 * 16) + 64  # norms, and the embedding and head below
    rest = (2 * 512 * 64 + vectors) / local["model_parameters"]
    assert sizes["muon, float32"]["mu"] == pytest.approx(4)
    assert sizes["muon, float32"]["nu"] == pytest.approx(4 * rest)
    assert "adamw, bfloat16" in plan.describe(local) and "mu 2 + nu 4: 6" in plan.describe(local)


@pytest.mark.slow
def test_another_mesh_is_suggested_where_the_given_one_does_not_fit(path, monkeypatch):
    chip_bytes = 1_600_000  # state and gradients are 2.0 MB
    small_chip(monkeypatch, chip_bytes)
    options = ("--mesh.data", "8", "--mesh.fsdp", "1", "--mesh.tensor", "1")
    found = plan.plan(config.load(path, [*options, "--data.micro_batches", "1"]))
    assert not found["fits"]
    assert found["per_chip"]["total"] > chip_bytes
    assert found["flops_per_chip"] is None
    chosen = found["suggestion"]
    sizes = chosen["overrides"]
    assert sizes["mesh.data"] * sizes["mesh.fsdp"] * sizes["mesh.tensor"] == 8
    assert sizes["mesh.fsdp"] * sizes["data.micro_batches"] == 16  # one row at a time
    assert max(chosen["per_chip"]["total"], chosen["decode"]["total"]) <= chip_bytes
    assert f"--mesh.fsdp {sizes['mesh.fsdp']}" in plan.describe(found)


def test_a_mesh_for_other_devices_does_not_fit_and_says_why(path, monkeypatch):
    small_chip(monkeypatch, 100_000)
    found = plan.plan(config.load(path, ["--mesh.fsdp", "16"]))
    assert not found["fits"]
    assert found["reason"].startswith("mesh: got")
    assert found["suggestion"] is None
    assert found.keys() >= KEYS
    assert "take more" in plan.describe(found)


def test_times_are_the_slowest_of_products_memory_and_collectives():
    chip = chips.Chip(None, peak_flops=100.0, bandwidth=10.0, ici_bandwidth=1.0)
    kernel = hlo_cost.Operation("dot", 2, 100, 100, 5, None, 0)
    copy = hlo_cost.Operation("copy", 1, 0, 0, 20, None, 0)
    sent = hlo_cost.Operation("gather", 1, 0, 0, 0, "all-gather", 3)
    parts = chips.roofline([kernel, copy, sent], chip)
    assert parts == {"products": 2.0, "memory": 3.0, "collectives": 3.0, "total": 4.0}
    unknown = chips.roofline([kernel], chips.Chip(None, None, None, None))
    assert set(unknown.values()) == {None}


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (53.11G) exceeds "
         "available HBM (15.75G).", int(53.11 * 2**30)),
        ("Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm.", 512 * 2**20),
        ("out of memory", None),
    ],
)  # fmt: skip
def test_what_a_program_would_need_is_read_from_the_compilers_refusal(message, needed):
    assert measure._needed(message) == needed


def test_known_hub_models_need_no_network():
    section = config.load(None, ["--model.path", "Qwen/Qwen3-8B"]).model
    architecture = programs.architecture_of(section)
    shapes = jax.tree.leaves(models.param_shapes(architecture))
    assert sum(x.size for x in shapes) == 8_190_735_360  # as the model's card says: 8.2e9
    with pytest.raises(InputError, match=r"model\.path.*model\.architecture"):
        programs.architecture_of(dataclasses.replace(section, path="no/such-model"))


# ---- the command


def command(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "pgpo_jax.plan", *arguments],
        capture_output=True,
        text=True,
        timeout=550,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )
    return done.returncode, done.stdout, done.stderr


def test_the_last_line_is_json(path, local, capsys):
    plan.main([path, "--optimizer.alpha", "0"])
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found.keys() >= KEYS
    assert found["pgpo_flops_ratio"] == 1
    assert found["flops_per_chip"] == pytest.approx(local["flops_per_chip"], rel=0.01)
    assert any(line.startswith("memory per chip") for line in table)


def test_without_a_config_or_a_topologys_name_one_line_says_so(path):
    with pytest.raises(InputError, match="CONFIG: got none"):
        plan.main(["--topology", "v5p:2x2x1"])
    with pytest.raises(InputError, match="--topology: got no value"):
        plan.main([path, "--topology"])


HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu, the TPU compiler, is not there")


def test_an_unknown_topology_is_one_line_and_exit_code_2(path):
    code, out, error = command(path, "--topology", "v9:2x2")
    assert (code, out) == (2, "")
    assert error.startswith("error: --topology: got v9:2x2")
    assert ("not installed" in error) == (not HAS_LIBTPU)
    assert len(error.splitlines()) == 1


@needs_libtpu
@pytest.mark.slow
def test_a_run_can_be_planned_for_a_tpu_slice_without_tpus(tmp_path):
    settings = {**SETTINGS, "model": {**SETTINGS["model"], "dtype": "bfloat16"}}
    settings["model"]["architecture"] = {**settings["model"]["architecture"], "head_dim": 128}
    # Long enough for splash attention, and not a multiple of its blocks.
    settings["sampling"] = {**settings["sampling"], "max_response_length": 1100}
    settings["mesh"] = {"data": 1, "fsdp": 2, "tensor": 2}
    file = tmp_path / "tpu.yaml"
    file.write_text(yaml.safe_dump(settings))
    code, out, error = command(str(file), "--topology", "v5p:2x2x1", "--optimizer.alpha", "0")
    assert code == 0, error
    found = json.loads(out.splitlines()[-1])
    assert found.keys() >= KEYS
    assert (found["device"], found["chips"], found["fits"]) == ("TPU v5", 4, True)
    assert found["hbm_bytes"] == 95 * 2**30
    # Splash attention counts; it works on whole blocks (here 2.6 times the scores that the mask
    # leaves in the rows, which it also makes longer) and once more in the backward pass.
    assert 1 < found["flops_per_chip"] * 4 / found["model_flops"] < 5
    assert 0 < found["estimated_mfu"] < 1
    assert found["estimated_step_seconds"] > 0
    assert found["decode"]["seconds_per_token"] > 0
