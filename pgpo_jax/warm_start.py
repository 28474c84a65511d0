"""Supervised steps on a task's worked examples, with and without a demonstration in the prompt.

A small model cannot use a demonstration until it was shown how; without that its teacher knows no
more than itself, and self-distillation has nothing to give. Off by default.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pgpo_jax import data, hf, keys, sharding
from pgpo_jax.errors import InputError, require
from pgpo_jax.models import merge
from pgpo_jax.optimizer import init_state
from pgpo_jax.reprompt import RepromptConfig, resolve_templates, teacher_messages
from pgpo_jax.sampler import Policy
from pgpo_jax.tasks import Example, Task


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised steps before the first update (config section `warm_start`)."""

    steps: int = 0
    """Supervised steps; 0 turns the warm start off."""
    examples_per_step: int = 64
    """Worked examples in a step."""
    learning_rate: float = 1e-3
    """AdamW's peak rate: linear warm-up over a tenth of the steps, then a cosine to 0."""

    def __post_init__(self):
        require(
            "warm_start",
            self,
            steps=(self.steps >= 0, "at least 0"),
            examples_per_step=(self.examples_per_step >= 1, "at least 1"),
            learning_rate=(self.learning_rate > 0, "positive"),
        )


def warm_start(
    policy: Policy,
    params: Any,
    task: Task,
    config: WarmStartConfig,
    reprompt: RepromptConfig,
    seed: int,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Any:
    """Trains on `config.steps` batches of fresh worked examples; returns the parameters.

    Args:
      policy: The model, its tokenizer, the options of the prompts, the mesh.
      params: The model's trained parameters; donated.
      task: Its `examples` are the worked examples.
      config: Steps, batch, rate.
      reprompt: How a demonstration stands in the prompt, the same as for the teacher.
      seed: The examples of step s derive from it and from s.
      report: Called with the step and its loss (nats per response token) now and then.

    Raises:
      InputError: The task has no worked examples.
    """
    if task.examples is None:
        raise InputError(
            f"warm_start.steps: got {config.steps}; task {task.name} has no worked examples, set 0"
        )
    peak = config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, config.steps // 10, config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))

    def loss_fn(params, frozen, rows):
        model = merge(policy.graphdef, params, frozen)
        prompts, prompt_mask, responses, mask = rows
        tokens, whole = (
            jnp.concatenate(pair, 1) for pair in ((prompts, responses), (prompt_mask, mask))
        )
        # A token is predicted at the column before it, and prompts end in the last of theirs.
        hidden = model.hidden(tokens, whole)[:, prompts.shape[1] - 1 : -1]

        @jax.checkpoint  # one row's logits at a time
        def row_loss(row):
            hidden, labels, mask = row
            losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), labels)
            return jnp.sum(losses * mask)

        return jnp.sum(jax.lax.map(row_loss, (hidden, responses, mask), batch_size=64)) / mask.sum()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, frozen, rows):
        loss, grads = jax.value_and_grad(loss_fn)(params, frozen, rows)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = init_state(optimizer, params)
    for index in range(config.steps):
        rng = keys.generator(seed, keys.Stream.WARM_START, index)
        rows = _encode(policy, task.examples(rng, config.examples_per_step), reprompt)
        rows = sharding.to_global(rows, policy.mesh)
        params, opt_state, loss = step(params, opt_state, policy.frozen, rows)
        if index % 50 == 49 or index + 1 == config.steps:
            report(index + 1, float(loss))
    return params


def _encode(
    policy: Policy, examples: Sequence[Example], reprompt: RepromptConfig
) -> tuple[np.ndarray, ...]:
    """This host's prompts, responses and their masks of one step."""
    templates = resolve_templates(reprompt)
    examples = examples[sharding.host_rows(len(examples))]
    tokenizer = policy.tokenizer
    prompts = data.encode(
        tokenizer,
        [
            teacher_messages(example.question.messages, example.demonstration, "", templates)
            for example in examples
        ],
        max_length=reprompt.max_length,
        template_options=policy.prompts.template_options,
        names=[example.question.key for example in examples],
        field="reprompt.max_length",
    )
    texts = [example.response for example in examples]
    responses = tokenizer(texts, add_special_tokens=False)["input_ids"]
    end = _end_token(policy)
    responses = [[*row, end] for row in responses]
    width, time = sharding.agree_max([max(map(len, prompts)), max(map(len, responses))])
    return (
        *data.left_pad(prompts, data.bucket(width, reprompt.max_length)),
        *data.right_pad(responses, time if time < 16 else data.bucket(time, 2**30)),
    )


def _end_token(policy: Policy) -> int:
    """The token that a worked response ends with: one that ends a response of the sampler."""
    ends = policy.sampling.end_tokens
    usual = (hf.turn_end(policy.tokenizer), policy.tokenizer.eos_token_id)
    return next((token for token in usual if token in ends), ends[0])
