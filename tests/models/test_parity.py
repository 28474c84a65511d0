"""Logits equal those of `transformers` (torch, float32): committed ones, and live ones."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import make_goldens
import numpy as np
import pytest
from flax import nnx

from pgpo_jax import hf

TOLERANCE = 1e-4  # of logits of magnitude 5, through matrices ten times the usual size
NAMES = sorted(make_goldens.CONFIGS)
REPEATED = ("mistral", "ministral", "smollm3", "gemma3_nested")  # with less than the others


def our_logits(folder: Path) -> np.ndarray:
    tokens, mask = make_goldens.tokens()
    graphdef, params = hf.load(folder, dtype=jnp.float32)
    forward = jax.jit(lambda params, tokens, mask: nnx.merge(graphdef, params)(tokens, mask))
    return np.asarray(forward(params, jnp.asarray(tokens), jnp.asarray(mask)))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """At tokens; what stands at padding means nothing on either side."""
    _, mask = make_goldens.tokens()
    return float(np.abs(a - b)[mask].max())


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_committed_ones_of_transformers(name):
    folder = make_goldens.GOLDENS / name
    assert json.loads((folder / "config.json").read_text()) == make_goldens.CONFIGS[name]
    expected = np.load(folder / "expected.npz")["logits"]
    assert difference(our_logits(folder), expected) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in REPEATED else n for n in NAMES],
)
def test_logits_equal_those_of_transformers_before_and_after_export(name, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = make_goldens.random_model(make_goldens.CONFIGS[name], tmp_path / "theirs")
    model.save_pretrained(tmp_path / "theirs")  # with the configuration as this version writes it
    expected = make_goldens.logits(model, *make_goldens.tokens())
    assert difference(our_logits(tmp_path / "theirs"), expected) < TOLERANCE

    hf.save(tmp_path / "ours", *hf.load(tmp_path / "theirs"))
    exported, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert difference(make_goldens.logits(exported, *make_goldens.tokens()), expected) < TOLERANCE
