"""Plans for NVIDIA GPUs that are not there."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from test_plan import KEYS, SETTINGS

from pgpo_jax.errors import InputError
from pgpo_jax.plan import chips, gpus, hlo_cost, summary


@pytest.mark.parametrize("name", gpus.CARDS)
def test_the_compiler_is_told_what_the_data_sheet_says(name):
    card = gpus.CARDS[name]
    text = gpus.target_config(card)
    said = dict(re.findall(r"^  (\w+): (.+)$", text, re.MULTILINE))
    assert said["name"] == f'"{card.name}"'
    assert int(said["core_count"]) == card.cores
    assert int(said["device_memory_size"]) == card.memory
    assert int(said["l2_cache_size"]) == card.l2_cache
    assert int(said["shared_memory_per_block_optin"]) == card.shared_memory - 1024
    assert text.count("{") == text.count("}")
    assert f"major: {card.capability[0]}" in text and 'platform_name: "CUDA"' in text
    # Float32 operations of a second, within a tenth of the data sheet's.
    peak = {"a100": 19.5e12, "h100": 67e12, "h200": 67e12, "b200": 75e12}[name]
    assert 2e9 * card.cores * card.fpus * card.clock_ghz == pytest.approx(peak, rel=0.1)
    # The table of times knows the same card.
    chip = chips.CHIPS[card.name]
    assert chip.bandwidth == card.bandwidth
    assert chip.hbm_bytes == pytest.approx(card.memory, rel=0.08)  # 80 GB are 80 GiB for some


def test_nodes_and_gpus_are_read_from_a_topologys_name():
    assert gpus.parse("h100:2x8") == (gpus.CARDS["h100"], 2, 8)
    assert gpus.parse("b200:1x1") == (gpus.CARDS["b200"], 1, 1)
    assert not gpus.is_gpu("v5p:4x4x4") and gpus.is_gpu("a100:1x8")


@pytest.mark.parametrize(
    "name", ["h100", "h100:8", "h100:0x8", "h100:1x9", "h100:1x8x2", "a100:x8"]
)
def test_other_names_are_refused(name):
    with pytest.raises(InputError, match=rf"--topology: got {name}; must be \w+:NODESxGPUS"):
        gpus.devices(name)


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gpus, "COMPILER", ("jax", "no-such-compiler"))
    with pytest.raises(
        InputError,
        match=r"h100:1x8, but these are not installed: no-such-compiler; pip install .*plan-gpu",
    ):
        chips.topology_devices("h100:1x8")


def test_a_ring_over_nodes_is_as_fast_as_their_network_cards():
    chip = chips.Chip(None, 1.0, 1.0, ici_bandwidth=100.0, network=5.0, node=8)
    within, across = (
        hlo_cost.Operation("x", 1, 0, 0, 0, "all-gather", 400, group=size) for size in (8, 16)
    )
    assert chips.collective_seconds(within, chip) == 4
    assert chips.collective_seconds(across, chip) == 10  # eight cards of a node


@pytest.mark.parametrize(("total", "needs"), [(70, False), (80, True)])
def test_a_plan_says_where_jax_must_be_told_to_take_more_of_a_gpu(total, needs):
    memory = {"per_chip": {"total": 60}, "decode": {"total": total}, "hbm_bytes": 100}
    rows = dict(summary._verdict({"fits": True, "device": "NVIDIA H200", **memory}))
    assert ("XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in rows.get("needs", "")) == needs
    assert chips.usable_bytes(chips.CHIPS["NVIDIA H200"]) == 0.95 * 141e9
    assert chips.usable_bytes(chips.CHIPS["TPU v6 lite"]) == 31.2 * 2**30


@pytest.mark.skipif(bool(gpus.missing()), reason="extra plan-gpu, XLA for GPUs, is not there")
@pytest.mark.slow
def test_a_run_can_be_planned_for_gpus_without_gpus(tmp_path):
    model = {**SETTINGS["model"], "dtype": "bfloat16"}
    model["architecture"] = {**model["architecture"], "head_dim": 64}
    file = tmp_path / "gpu.yaml"
    file.write_text(yaml.safe_dump({**SETTINGS, "model": model, "mesh": {"fsdp": 4}}))
    arguments = [str(file), "--topology", "h100:1x4", "--optimizer.alpha", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "pgpo_jax.plan", *arguments],
        capture_output=True,
        text=True,
        timeout=550,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() >= KEYS
    assert (found["device"], found["chips"]) == ("NVIDIA H100 80GB HBM3", 4)
    assert found["fits"] and found["attention_flops_per_chip"] > 0
    assert found["collective_bytes_per_chip"] > 0
    assert 0 < found["estimated_step_seconds"] <= found["likely_step_seconds"]
