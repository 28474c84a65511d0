"""Questions in, responses out: encode, sample on the mesh, decode to text."""

from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from pgpo_jax import data, sharding
from pgpo_jax.data import DataConfig, Rollouts
from pgpo_jax.sampler.sampling import SamplingConfig, sample


def rollout(
    graphdef: nnx.GraphDef,
    params,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    sampling: SamplingConfig,
    config: DataConfig,
    mesh: Mesh,
) -> Rollouts:
    """`sampling.num_samples` responses for each of this host's prompts.

    All hosts call it together, each with its own prompts. Lengths are rounded up to the sizes of
    `data.bucket`, agreed among the hosts, so that few shapes are ever compiled.

    Args:
      graphdef: The model.
      params: Its parameters.
      tokenizer: Turns sampled tokens into text.
      prompts: Token ids of each prompt (`data.encode`).
      key: Random key of this rollout, the same on all hosts.
      sampling: Number, length and temperature of the responses.
      config: Limit of the prompts.
      mesh: Where the parameters live.

    Returns:
      The records of this host's questions, in order.
    """
    longest = max((len(prompt) for prompt in prompts), default=1)
    count, longest = sharding.agree_max([len(prompts), longest])
    # Every host brings the same number of rows, and they divide over the mesh.
    parts = max(mesh.shape["data"] * mesh.shape["fsdp"] // jax.process_count(), 1)
    rows = -(-count // parts) * parts
    padded = [*prompts, *([[0]] * (rows - len(prompts)))]
    width = data.bucket(longest, max(config.max_prompt_length, longest))
    tokens, mask = data.left_pad(padded, width)
    placed = sharding.to_global({"prompts": tokens, "prompt_mask": mask}, mesh)
    samples = sample(graphdef, params, **placed, key=key, config=sampling)
    samples = sharding.to_host(samples)
    samples = jax.tree.map(lambda rows: rows[: len(prompts)], samples)
    (longest,) = sharding.agree_max([int(samples.mask.sum(-1).max(initial=1))])
    time = data.bucket(longest, sampling.max_response_length)
    responses, response_mask, log_probs = (
        part[:, :, :time] for part in (samples.tokens, samples.mask, samples.log_probs)
    )
    return Rollouts(
        tokens[: len(prompts)],
        mask[: len(prompts)],
        responses,
        response_mask,
        log_probs,
        _texts(tokenizer, responses, response_mask),
    )


def _texts(tokenizer, responses: np.ndarray, mask: np.ndarray) -> list[list[str]]:
    rows = [
        row[keep].tolist()
        for group, kept in zip(responses, mask, strict=True)
        for row, keep in zip(group, kept, strict=True)
    ]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    samples = responses.shape[1]
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]
