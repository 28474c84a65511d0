"""Which files of a checkpoint are taken: those that transformers takes, or a refusal by name."""

import json
import shutil

import make_goldens
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pgpo_jax import hf
from pgpo_jax.errors import InputError
from pgpo_jax.hf import files

NAME = "model.embed_tokens.weight"
INDEX = files.INDEX


class Folder:
    """A checkpoint whose files are put there one by one; `mark` is the first embedding's value."""

    def __init__(self, path):
        self.path = path
        source = make_goldens.GOLDENS / "qwen3"
        self.tensors = load_file(source / "model.safetensors")
        path.mkdir()
        shutil.copy(source / "config.json", path)

    def marked(self, mark):
        embedding = self.tensors[NAME].copy()
        embedding[0, 0] = mark
        return {**self.tensors, NAME: embedding}

    def whole(self, mark, name="model.safetensors"):
        save_file(self.marked(mark), self.path / name, metadata={"format": "pt"})

    def shards(self, mark, index=INDEX, also=None, drop=()):
        """Two shards and their index, with changes to what stands in them and what it names."""
        tensors, names = self.marked(mark), {}
        begin = (NAME, "model.layers.0.self_attn.q_proj.weight")
        first = {name: tensors[name] for name in begin}
        rest = {name: tensor for name, tensor in tensors.items() if name not in begin}
        for number, part in enumerate((first, {**rest, **(also or {})}), 1):
            name = f"model-{number:05d}-of-00002.safetensors"
            names |= dict.fromkeys(part, name)
            if number not in drop:
                save_file(part, self.path / name, metadata={"format": "pt"})
        self.index(names, index)

    def index(self, names, index=INDEX):
        listing = {"metadata": {"total_size": 0}, "weight_map": names}
        (self.path / index).write_text(json.dumps(listing))

    def configure(self, **changes):
        config = json.loads((self.path / "config.json").read_text())
        (self.path / "config.json").write_text(json.dumps(config | changes))

    def ours(self):
        _, params = hf.load(self.path)
        return float(params["embed_tokens"][0, 0])

    def theirs(self):
        pytest.importorskip("torch")
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.path, dtype="float32")
        return float(model.get_input_embeddings().weight[0, 0])


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "model")


def old_index_beside_whole(folder):
    folder.shards(1)
    folder.whole(2)


def new_index_beside_whole(folder):
    folder.whole(2)
    folder.shards(1)


def index_without_shards_beside_whole(folder):
    folder.shards(1, drop=(1, 2))
    folder.whole(2)


def pickle_beside_whole(folder):
    folder.whole(2)
    (folder.path / "pytorch_model.bin").write_bytes(b"not read")


def pickle_beside_shards(folder):
    folder.shards(2)
    (folder.path / "pytorch_model.bin").write_bytes(b"not read")


def consolidated_beside_shards(folder):
    folder.shards(2)
    folder.whole(1, "consolidated.safetensors")


def variant_beside_whole(folder):
    folder.whole(2)
    folder.whole(1, "model.fp16.safetensors")
    folder.shards(1, "model.safetensors.index.fp16.json")


def more_shards_than_the_index_names(folder):
    folder.shards(2)
    folder.whole(1, "model-00001-of-00003.safetensors")


def adapter_weights_beside_whole(folder):
    folder.whole(2)
    save_file({"lora": np.zeros(1)}, folder.path / "adapter_model.safetensors")


def index_that_names_another_shard_for_a_tensor(folder):
    folder.shards(2)
    listing = json.loads((folder.path / INDEX).read_text())["weight_map"]
    folder.index({**listing, "model.norm.weight": "model-00001-of-00002.safetensors"})


def weights_that_the_configuration_names(folder):
    folder.whole(1)
    folder.whole(2, "other.safetensors")
    folder.configure(transformers_weights="other.safetensors")


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
@pytest.mark.parametrize(
    "mixture",
    [
        old_index_beside_whole,
        new_index_beside_whole,
        index_without_shards_beside_whole,
        pickle_beside_whole,
        pickle_beside_shards,
        consolidated_beside_shards,
        variant_beside_whole,
        more_shards_than_the_index_names,
        adapter_weights_beside_whole,
        index_that_names_another_shard_for_a_tensor,
        weights_that_the_configuration_names,
    ],
)
def test_the_weights_are_those_that_transformers_loads(folder, mixture):
    mixture(folder)
    assert folder.ours() == 2
    assert folder.theirs() == 2


def only_pickle(folder):
    (folder.path / "pytorch_model.bin").write_bytes(b"not read")


def missing_shard(folder):
    folder.shards(1, drop=(2,))
    (folder.path / "pytorch_model.bin").write_bytes(b"not read")


def index_that_names_what_no_shard_has(folder):
    folder.tensors = {name: x for name, x in folder.tensors.items() if name != "model.norm.weight"}
    folder.shards(1)
    listing = json.loads((folder.path / INDEX).read_text())["weight_map"]
    folder.index({**listing, "model.norm.weight": "model-00002-of-00002.safetensors"})


def tensor_in_two_shards(folder):
    folder.shards(1, also={NAME: folder.marked(2)[NAME]})


def adapter(folder):
    folder.whole(1)
    (folder.path / "adapter_config.json").write_text("{}")


def variant_alone_and_whole_of_another_save(folder):
    folder.whole(1, "model.fp16.safetensors")
    folder.whole(2, "consolidated.safetensors")


def path_out_of_the_folder(folder):
    folder.whole(1)
    folder.configure(transformers_weights="../other.safetensors")


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        (
            only_pickle,
            r"without \*.safetensors but with pytorch_model.bin \(pickle, which is never",
        ),
        (missing_shard, r"without model-00002-of-00002.safetensors, which model.safe.* names"),
        (index_that_names_what_no_shard_has, r"1 missing \(model.norm.weight\)"),
        (tensor_in_two_shards, r"embed_tokens.weight in both model-00001-of-00002.safetensors and"),
        (adapter, "which has an adapter_config.json; give the model that it adapts"),
        (variant_alone_and_whole_of_another_save, "in both consolidated.safetensors and"),
        (path_out_of_the_folder, r"must be the name of a .safetensors file in that folder"),
    ],
)
def test_a_mixture_that_means_no_model_is_refused_by_name(folder, mixture, said):
    mixture(folder)
    with pytest.raises(InputError, match=said):
        folder.ours()


def test_what_is_taken_and_what_is_not_is_said(folder):
    folder.shards(1)
    assert files.describe_files(folder.path) == (
        "weights from 2 files, model-00001-of-00002.safetensors to model-00002-of-00002.safetensors"
        f" in {folder.path}"
    )
    old_index_beside_whole(folder)
    assert files.describe_files(folder.path) == (
        f"weights from model.safetensors in {folder.path}; beside them, not read: "
        "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, "
        "model.safetensors.index.json"
    )
