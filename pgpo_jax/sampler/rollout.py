"""Rollouts: conversations in, responses out; the seam between text and the devices."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from pgpo_jax import data, sharding
from pgpo_jax.data import DataConfig, Rollouts
from pgpo_jax.models import GraphDef, Params, join
from pgpo_jax.sampler.sampling import Samples, SamplingConfig, sample

Conversation = Sequence[Mapping[str, str]]


class Policy(NamedTuple):
    """All that turns conversations into responses, but the trained weights."""

    graphdef: GraphDef
    """The model."""
    tokenizer: Any
    """Turns conversations into tokens and sampled tokens into text."""
    mesh: Mesh
    """Where the parameters live."""
    sampling: SamplingConfig
    """Number, length and temperature of the responses; with the model's end tokens."""
    prompts: DataConfig
    """Limit of the prompts and options of the chat template."""
    limit: str = "data.max_prompt_length"
    """The setting that an over-long prompt exceeds, for the error."""
    frozen: Params | None = None
    """The weights beside adapters, which training leaves as they are; None where all are trained.
    """

    def with_limit(self, field: str, length: int) -> "Policy":
        """The policy for prompts of at most `length` tokens, as the setting `field` says."""
        prompts = dataclasses.replace(self.prompts, max_prompt_length=length)
        return self._replace(prompts=prompts, limit=field)


def rollout(
    policy: Policy,
    params: Any,
    conversations: Sequence[Conversation],
    key: jax.Array,
    *,
    names: Sequence[str] = (),
    rows: int = 0,
) -> Rollouts:
    """`policy.sampling.num_samples` responses to each of this host's conversations.

    All hosts call it together, each with its own conversations. Lengths are rounded up to the sizes
    of `data.bucket`, agreed among the hosts, so that few shapes are ever compiled.

    Args:
      policy: The model without its trained weights, the tokenizer and how to sample.
      params: The trained weights.
      conversations: Messages of each prompt.
      key: Random key of this rollout, the same on all hosts.
      names: What to call each prompt in an error.
      rows: Compute as if there were at least so many conversations, for a shape known already.

    Returns:
      The records of this host's conversations, in order.

    Raises:
      InputError: A prompt that is over-long, empty or refused by the chat template.
    """
    prompts = data.encode(
        policy.tokenizer,
        conversations,
        max_length=policy.prompts.max_prompt_length,
        template_options=policy.prompts.template_options,
        names=names,
        field=policy.limit,
    )
    longest = max(map(len, prompts), default=1)
    count, longest = sharding.agree_max([max(len(prompts), rows), longest])
    width = data.bucket(longest, max(policy.prompts.max_prompt_length, longest))
    samples: Any = _sample(policy, params, prompts, key, (count, width))
    (longest,) = sharding.agree_max([int(samples.mask.sum(-1).max(initial=1))])
    time = data.bucket(longest, policy.sampling.max_response_length)
    responses, mask, log_probs = (
        part[:, :, :time] for part in (samples.tokens, samples.mask, samples.log_probs)
    )
    texts = _texts(policy.tokenizer, responses, mask, policy.sampling.end_tokens)
    return Rollouts(*data.left_pad(prompts, width), responses, mask, log_probs, texts)


def _sample(
    policy: Policy,
    params: Any,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    shape: tuple[int, int],
) -> Samples:
    """This host's samples; every host brings `shape[0]` prompts, filled up where it has fewer."""
    mesh, sampling = policy.mesh, policy.sampling
    parts = max(mesh.shape["data"] * mesh.shape["fsdp"] // jax.process_count(), 1)
    rows = -(-shape[0] // parts) * parts
    filled = [*prompts, *([[0]] * (rows - len(prompts)))]
    tokens, mask = data.left_pad(filled, shape[1])
    placed = sharding.to_global({"prompts": tokens, "prompt_mask": mask}, mesh)
    # What only fills up ends after one token.
    hosts = jax.process_count()
    counts = sharding.gather_rows(np.array([[len(prompts)]], np.float32), hosts)[:, 0]
    real = np.concatenate([np.arange(rows) < count for count in counts])
    limits = np.where(real, sampling.max_response_length, 1)[:, None]
    limits = np.repeat(limits, sampling.num_samples, axis=1)
    params = join(params, policy.frozen)
    samples = sample(policy.graphdef, params, **placed, key=key, config=sampling, limits=limits)
    return jax.tree.map(lambda own: own[: len(prompts)], sharding.to_host(samples))


def _texts(
    tokenizer: Any, responses: np.ndarray, mask: np.ndarray, ends: Sequence[int] = ()
) -> list[list[str]]:
    """What was drawn, as text, without the tokens that only bound it.

    Those are the end tokens and the tokenizer's bos, eos and pad. Every other special token that
    the model drew, such as a tool call's, is seen by the verifier and in a demonstration.
    """
    bounds = {*ends, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    rows = [
        [token for token in row[keep].tolist() if token not in bounds]
        for group, kept in zip(responses, mask, strict=True)
        for row, keep in zip(group, kept, strict=True)
    ]
    # Exactly what was drawn, whatever the tokenizer's settings say of spaces before punctuation.
    texts = tokenizer.batch_decode(
        rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    samples = responses.shape[1]
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]
