"""Checkpoints in and out: bitwise, on any mesh, and every fault named."""

import json
import shutil

import jax
import jax.numpy as jnp
import make_goldens
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from pgpo_jax import hf, sharding
from pgpo_jax.errors import InputError
from pgpo_jax.hf import files
from pgpo_jax.models import ModelConfig, Options, decoder

ARCHITECTURE = {**make_goldens.TINY, "model_type": "qwen3", "head_dim": 8}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype == jnp.float32
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def golden(tmp_path):
    """A copy of a golden checkpoint, to be damaged: `golden(name) -> folder`."""

    def copy(name):
        return shutil.copytree(make_goldens.GOLDENS / name, tmp_path / name)

    return copy


def edit(folder, change):
    """Applies `change` to the tensors of the checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", sorted(make_goldens.CONFIGS))
def test_import_export_import_is_bitwise(name, tmp_path):
    graphdef, params = hf.load(make_goldens.GOLDENS / name)
    hf.save(tmp_path, graphdef, params)
    again, params_again = hf.load(tmp_path)
    assert_equal(params, params_again)
    assert again == graphdef
    # Exported once more in the type of the source, the tensors are those of the source.
    hf.save(tmp_path, graphdef, params, dtype="bfloat16")
    ours = load_file(tmp_path / "model.safetensors")
    theirs = load_file(make_goldens.GOLDENS / name / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tensor, ours[key])


def test_a_checkpoint_in_several_files_is_read_and_an_old_one_replaced(tmp_path):
    graphdef, params = hf.load(make_goldens.GOLDENS / "olmo3")
    hf.save(tmp_path, graphdef, params, shard_bytes=40_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 45_000
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == 4 * count
    assert_equal(hf.load(tmp_path)[1], params)

    hf.save(tmp_path, graphdef, params)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert_equal(hf.load(tmp_path)[1], params)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_every_mesh_reads_and_writes_the_same(shape, tmp_path):
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape))
    for name in ("olmo2", "qwen2"):
        folder = make_goldens.GOLDENS / name
        _, params = hf.load(folder)
        graphdef, split = hf.load(folder, mesh=mesh)
        assert_equal(params, split)
        expected = sharding.shardings(
            decoder.param_axes(hf.load_config(folder)),
            decoder.param_shapes(hf.load_config(folder)),
            mesh,
        )
        assert jax.tree.map(lambda x: x.sharding, split) == expected
        hf.save(tmp_path, graphdef, split)
        assert_equal(params, hf.load(tmp_path)[1])


def test_only_the_parts_that_a_device_needs_are_read(monkeypatch):
    read = []
    original = files.Tensor.read

    def counted(self, index):
        part = original(self, index)
        read.append(part.size)
        return part

    monkeypatch.setattr(files.Tensor, "read", counted)
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    _, params = hf.load(make_goldens.GOLDENS / "llama3", mesh=mesh)
    assert sum(read) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert max(read) < params["embed_tokens"].size


def test_parameters_are_float32_and_the_computation_is_what_was_asked():
    graphdef, params = hf.load(make_goldens.GOLDENS / "qwen3", options=Options(remat="full"))
    assert nnx.merge(graphdef, params).options == Options(jnp.bfloat16, remat="full")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


# ---- faults ----


def test_all_faulty_tensors_are_named_together(golden):
    def damage(tensors):
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(4, np.float32)
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((4, 4), np.float32)
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((48, 32), np.float32)
        tensors["lm_head.weight"] = np.zeros((64, 32), np.int32)

    folder = golden("qwen3")
    edit(folder, damage)
    with pytest.raises(InputError) as caught:
        hf.load(folder)
    for part in (
        "2 unmapped (model.layers.0.self_attn.q_proj.bias, model.layers.9.mlp.up_proj.weight)",
        "2 missing (model.layers.1.mlp.up_proj.weight, model.norm.weight)",
        "1 of the wrong shape (model.layers.0.mlp.down_proj.weight [48, 32] for [32, 48])",
        "1 of an unsupported type (lm_head.weight I32)",
    ):
        assert part in str(caught.value)


def test_a_repeated_head_is_accepted_where_it_is_tied_and_equal(golden):
    folder = golden("smollm2")
    _, params = hf.load(folder)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}))
    assert_equal(hf.load(folder)[1], params)
    edit(folder, lambda t: t.update({"lm_head.weight": 1 + t["model.embed_tokens.weight"]}))
    with pytest.raises(InputError, match=r"tie_word_embeddings: got true, but .* differs"):
        hf.load(folder)


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "/nowhere", "no where"])
def test_a_path_that_is_nothing_is_named(name):
    with pytest.raises(InputError, match="must be a folder or the name of a hub model"):
        hf.load(name)


def test_a_hub_model_that_does_not_come_is_named():
    with pytest.raises(InputError, match=r"got pgpo/absent, .*check the name, the network"):
        hf.load("pgpo/absent")


def test_files_that_cannot_be_read_are_named(golden, tmp_path):
    with pytest.raises(InputError, match=r"config\.json, which cannot be read"):
        hf.load(tmp_path)
    folder = golden("qwen3")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json, which cannot be read"):
        hf.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match="with a list; must be an object"):
        hf.load(folder)
    (folder / "config.json").write_text(json.dumps(ARCHITECTURE))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors, which cannot be read"):
        hf.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"without \*\.safetensors; convert it"):
        hf.load(folder)
    with pytest.raises(InputError, match="whose tokenizer does not load"):
        hf.load_tokenizer(folder)


@pytest.mark.usefixtures("unchecked")
def test_a_type_that_is_not_written_is_refused(tmp_path):
    with pytest.raises(InputError, match="dtype: got 'int8'; must be one of float32"):
        hf.save(tmp_path, *hf.load(make_goldens.GOLDENS / "qwen3"), dtype="int8")


# ---- tokenizers, end tokens, the config section ----


def make_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
        chat_template="{{ messages[-1]['content'] }}",
    )


def test_the_tokenizer_travels_with_the_model(tmp_path):
    hf.save(tmp_path, *hf.load(make_goldens.GOLDENS / "qwen3"), make_tokenizer())
    again = hf.load_tokenizer(tmp_path)
    assert again.get_vocab() == make_tokenizer().get_vocab()
    assert again.eos_token_id == 2
    assert again.chat_template == make_tokenizer().chat_template


def test_end_tokens_are_gathered_from_wherever_they_are_stated(golden):
    folder = golden("llama3")
    assert hf.end_tokens(folder) == (2, 3)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 3]}))
    assert hf.end_tokens(str(folder)) == (2, 3, 7)
    assert hf.load_config(folder).eos_token_id == (7, 3)
    assert hf.end_tokens(hf.load_config(folder), make_tokenizer(), None) == (2, 3, 7)
    assert hf.end_tokens(make_goldens.GOLDENS / "qwen3") == (2,)
    assert hf.end_tokens(None) == ()


def test_end_tokens_survive_an_export(golden, tmp_path):
    folder = golden("llama3")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 3]}))
    hf.save(tmp_path / "out", *hf.load(folder))
    assert hf.end_tokens(tmp_path / "out") == (3, 7)


def test_a_section_states_a_checkpoint_or_an_architecture(golden):
    mesh, key = sharding.make_mesh(), jax.random.key(0)
    graphdef, params, _, tokenizer, _ = hf.from_section(
        hf.ModelSection(architecture=ARCHITECTURE, dtype="float32", remat="dots"), mesh, key
    )
    decoder = nnx.merge(graphdef, params)
    assert decoder.config == ModelConfig.from_hf(ARCHITECTURE)
    assert decoder.options == Options(jnp.float32, remat="dots", mesh=mesh)
    assert tokenizer is None

    folder = golden("qwen3")
    make_tokenizer().save_pretrained(folder)
    graphdef, params, _, tokenizer, _ = hf.from_section(
        hf.ModelSection(path=str(folder)), mesh, key
    )
    assert_equal(params, hf.load(folder)[1])
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "model.path: got null; state a checkpoint, or model.architecture"),
        ({"path": "x", "architecture": {}}, "model.path: got 'x'; must be null where"),
        ({"dtype": "float8"}, "model.dtype: got 'float8'; must be"),
        ({"remat": "most"}, "remat: got 'most'"),
        ({"architecture": {"model_type": "qwen3", "layers": 2}}, r"got \['layers'\]"),
        ({"architecture": {"model_type": "qwen3"}}, "num_hidden_layers: got None"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_section_that_states_no_model_is_refused(section, message):
    with pytest.raises(InputError, match=message):
        hf.from_section(hf.ModelSection(**section), None, jax.random.key(0))
