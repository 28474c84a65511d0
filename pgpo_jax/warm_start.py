"""Supervised steps on a task's worked examples, with and without a demonstration in the prompt.

A small model cannot use a demonstration until it was shown how; without that its teacher knows no
more than itself, and self-distillation has nothing to give. Off by default.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    save_every: int = 200
    """Supervised steps between two saves of the warm start itself, which a stop signal saves too
    and a resumed run goes on from; 0 leaves it at the signal."""

    def __post_init__(self):
        require(
            "warm_start",
            self,
            steps=(self.steps >= 0, "at least 0"),
            examples_per_step=(self.examples_per_step >= 1, "at least 1"),
            learning_rate=(self.learning_rate > 0, "positive"),
            save_every=(self.save_every >= 0, "at least 0"),
        )


class WarmState(NamedTuple):
    """What a supervised step changes."""

    student: Any
    """The parameters."""
    opt_state: Any


class Supervised(NamedTuple):
    """A warm start after some of its steps."""

    steps: int
    """Steps done."""
    state: WarmState
    """Donated to the next step."""
    loss: Any = None
    """Of the last step, nats per response token; a scalar on the devices, None before the first."""
    left_out: int = 0
    """Worked examples so far whose prompts were too long."""
    longest: int = 0
    """Tokens of the longest of them."""


def begin(config: WarmStartConfig, params: Any) -> Supervised:
    """The warm start of these parameters before its first step."""
    return Supervised(0, WarmState(params, init_state(_optimizer(config), params)))


def _optimizer(config: WarmStartConfig) -> optax.GradientTransformation:
    peak = config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, config.steps // 10, config.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))


def warm_start(
    policy: Policy,
    now: Supervised,
    task: Task,
    config: WarmStartConfig,
    reprompt: RepromptConfig,
    seed: int,
) -> Iterator[Supervised]:
    """Trains on batches of fresh worked examples; yields after every step.

    A worked example whose prompt is over `reprompt.max_length` is left out and counted, unless
    `data.over_long` makes it an error; a step of which all are left out changes nothing.

    Args:
      policy: The model, its tokenizer, the options of the prompts, the mesh.
      now: Where it stands; its state is donated.
      task: Its `examples` are the worked examples.
      config: Steps, batch, rate.
      reprompt: How a demonstration stands in the prompt, the same as for the teacher.
      seed: The examples of step s derive from it and from s.

    Raises:
      InputError: The task has no worked examples, or none that is short enough.
    """
    if task.examples is None:
        raise InputError(
            f"warm_start.steps: got {config.steps}; task {task.name} has no worked examples, set 0"
        )
    where = jax.tree.map(lambda leaf: leaf.sharding, now.state)
    step = _make_step(policy, _optimizer(config), where)
    for index in range(now.steps, config.steps):
        rng = keys.generator(seed, keys.Stream.WARM_START, index)
        examples = task.examples(rng, config.examples_per_step)
        rows, over, longest = _encode(policy, examples, reprompt)
        counted = now.left_out + over, max(now.longest, longest)
        if over < len(examples):
            rows = sharding.to_global(rows, policy.mesh)
            params, opt_state, loss = step(*now.state, policy.frozen, rows)
            now = Supervised(index + 1, WarmState(params, opt_state), loss, *counted)
        elif now.left_out == index * len(examples):  # nor did any before
            raise InputError(
                f"reprompt.max_length: got {reprompt.max_length}; the prompts of all "
                f"{counted[0]:,} worked examples so far are longer, up to {counted[1]:,} tokens; "
                "raise the limit, or set warm_start.steps to 0"
            )
        else:
            now = Supervised(index + 1, now.state, now.loss, *counted)
        yield now


def _make_step(
    policy: Policy, optimizer: optax.GradientTransformation, where: WarmState
) -> Callable[..., tuple[Any, Any, Any]]:
    """One supervised step; parameters and optimizer state are donated, and stay `where` they are:
    else a step after a save, which is restored there, could sum in another order."""

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

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*where, None))
    def step(params, opt_state, frozen, rows):
        loss, grads = jax.value_and_grad(loss_fn)(params, frozen, rows)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def _encode(
    policy: Policy, examples: Sequence[Example], reprompt: RepromptConfig
) -> tuple[tuple[np.ndarray, ...], int, int]:
    """This host's prompts, responses and their masks of one step; how many examples of all hosts
    are left out, and the tokens of the longest of these."""
    templates, limit = resolve_templates(reprompt), reprompt.max_length
    examples = examples[sharding.host_rows(len(examples))]
    tokenizer, own = policy.tokenizer, policy.prompts.template_options
    conversations = [
        teacher_messages(e.question.messages, e.demonstration, e.feedback, templates, e.attempt)
        for e in examples
    ]

    def encode(options: Mapping[str, Any]) -> list[list[int]]:
        return data.encode(
            tokenizer,
            conversations,
            max_length=sys.maxsize if policy.prompts.over_long == "drop" else limit,
            template_options=options,
            names=[example.question.key for example in examples],
            field="reprompt.max_length",
        )

    prompts = encode(own)
    if reprompt.template_options:
        pairs = zip(examples, prompts, encode(own | reprompt.template_options), strict=True)
        prompts = [
            plain if e.demonstration is None and not e.feedback else shown
            for e, plain, shown in pairs
        ]
    texts = [example.response for example in examples]
    responses = tokenizer(texts, add_special_tokens=False)["input_ids"]
    end = _end_token(policy)
    responses = [[*row, end] for row in responses]
    long = [len(prompt) for prompt in prompts if len(prompt) > limit]
    # All hosts have as many rows as ever: one that is left out has nothing to predict.
    responses = [row if len(prompts[i]) <= limit else [] for i, row in enumerate(responses)]
    prompts = [row if len(row) <= limit else [0] for row in prompts]
    hosts = jax.process_count()
    over = int(sharding.gather_rows(np.array([[len(long)]], np.float32), hosts).sum())
    sizes = [max(map(len, prompts)), max(map(len, responses)), max(long, default=0)]
    width, time, longest = sharding.agree_max(sizes)
    rows = (
        *data.left_pad(prompts, data.bucket(width, limit)),
        *data.right_pad(responses, time if time < 16 else data.bucket(time, 2**30)),
    )
    return rows, over, longest


def _end_token(policy: Policy) -> int:
    """The token that a worked response ends with: one that ends a response of the sampler."""
    ends = policy.sampling.end_tokens
    usual = (hf.turn_end(policy.tokenizer), policy.tokenizer.eos_token_id)
    return next((token for token in usual if token in ends), ends[0])
