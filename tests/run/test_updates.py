"""Several updates of a step: which rows each has, what they amount to, and what is told of them."""

import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
import yaml
from test_step import REWARDED, ROWS, SAMPLES, make_examples
from test_train import TINY, code, rows, without_time

from pgpo_jax import data, fused, information, losses, methods, sharding, train
from pgpo_jax.config import Config
from pgpo_jax.data import DataConfig
from pgpo_jax.logs import Watch, read_multipliers
from pgpo_jax.losses import DistillationConfig
from pgpo_jax.methods import ObjectiveConfig
from pgpo_jax.models import decoder
from pgpo_jax.optimizer import OptimizerConfig, information_state, learning_rate, make_optimizer
from pgpo_jax.reprompt import RepromptConfig
from pgpo_jax.run import Run, make_updates
from pgpo_jax.run.updates import _by_kind, summarise_updates
from pgpo_jax.sampler import Policy, SamplingConfig
from pgpo_jax.state import init_train_state, train_state_shardings
from pgpo_jax.step import make_train_step

QUESTIONS = ROWS // SAMPLES
GRPO = ObjectiveConfig(distillation=0.5, policy=0.5)


# ---- the mini-batches ----------------------------------------------------------------------------


def dealt(questions, updates, passes, seed=0, step=0):
    config = DataConfig(questions_per_step=questions, updates_per_rollout=updates, passes=passes)
    return [part.tolist() for part in data.mini_batches(seed, step, config)]


def test_every_pass_deals_all_questions_in_an_order_of_its_own():
    parts = dealt(32, 4, 3)
    assert len(parts) == 12
    passes = [parts[i : i + 4] for i in (0, 4, 8)]
    for each in passes:
        assert sorted(place for part in each for place in part) == list(range(32))
        assert {len(part) for part in each} == {8}
    assert passes[0] != passes[1] != passes[2]
    assert dealt(32, 4, 3) == parts
    assert dealt(32, 4, 3, step=1) != parts
    assert dealt(32, 4, 3, seed=1) != parts
    assert dealt(6, 1, 2) == [list(range(6))] * 2


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_every_host_has_equally_many_questions_of_every_update(hosts):
    for part in dealt(32, 4, 2):
        each, own = 32 // hosts, len(part) // hosts
        for host in range(hosts):
            mine = part[host * own : (host + 1) * own]
            assert all(host * each <= place < (host + 1) * each for place in mine)


@pytest.mark.parametrize(("packing", "most"), [("never", 4), ("always", 16)])
def test_mini_batches_have_few_shapes(packing, most):
    """Each is a compilation. Padded rows are as wide as the step's; packed ones come in steps."""
    shapes, mesh = set(), sharding.make_mesh(sharding.MeshConfig(1, 1, 1))
    settings = DataConfig(questions_per_step=2, updates_per_rollout=2, packing=packing)
    for seed in range(20):
        for (part,) in data.mini_batches(0, seed, settings):
            taken = make_examples(seed).take(part * SAMPLES + np.arange(SAMPLES))
            batch = data.pack(taken, settings, mesh)
            shapes.add(tuple(leaf.shape for leaf in jax.tree.leaves(batch)))
    assert len(shapes) <= most


# ---- the updates ---------------------------------------------------------------------------------


@functools.cache
def model():
    """Model, parameters and mesh of the update's own tests."""
    graphdef, _, params, _, mesh = test_step.build()
    return graphdef, params, mesh


# Responses of one length: all mini-batches have one shape, and one program.
EXAMPLES = REWARDED[0]._replace(response_mask=np.ones_like(REWARDED[0].response_mask))
OPTIMIZER = OptimizerConfig(learning_rate=0.02, warmup_steps=3, eps=1e-3)
SAMPLING = SamplingConfig(num_samples=SAMPLES, vocab_size=22, end_tokens=(0,))
DISTILLATION = DistillationConfig(top_k=None, chunk_size=8)


def prepared(objective=GRPO, **settings):
    """The updates of a run with these settings of `data`, and a first state."""
    graphdef, params, where = model()
    config = Config(
        data=DataConfig(**{"questions_per_step": QUESTIONS, "packing": "never", **settings}),
        sampling=SAMPLING,
        distillation=DISTILLATION,
        objective=objective,
        optimizer=OPTIMIZER,
    )
    policy = Policy(graphdef, None, where, config.sampling, config.data)
    state = init_train_state(jax.tree.map(jnp.copy, params), make_optimizer(OPTIMIZER))
    return make_updates(Run(config, None, policy, RepromptConfig(), None), state), state


@functools.cache
def plain_step(objective=GRPO):
    """The update alone."""
    graphdef, params, _ = model()
    optimizer = make_optimizer(OPTIMIZER)
    options = fused.Options(DISTILLATION, (), SAMPLING.vocabulary())
    where, made = train_state_shardings(params, optimizer), methods.make_objective(objective)
    return make_train_step(graphdef, optimizer, options, where, objective=made)


def place(examples, settings):
    _, _, mesh = model()
    return sharding.to_global(data.pack(examples, settings, mesh), mesh)


def by_hand(state, examples, settings, objective=GRPO):
    """A step's updates one after the other: the state, and what each measured."""
    measured, parts = [], list(data.mini_batches(0, int(state.step), settings))
    for index, part in enumerate(parts):
        taken = examples.take((part[:, None] * SAMPLES + np.arange(SAMPLES)).reshape(-1))
        batch = place(taken, settings)
        last = () if len(parts) == 1 else (np.int32(index + 1 == len(parts)),)
        state, found = plain_step(objective)(state, batch, None, *last)
        measured.append(test_step.numbers(found))
    return state, measured


def test_one_update_is_bit_for_bit_the_update_alone():
    update, state = prepared()
    _, other = prepared()
    settings = DataConfig(questions_per_step=QUESTIONS, packing="never")
    for done in range(2):
        other, found = plain_step()(other, place(EXAMPLES, settings))
        expected = test_step.numbers(found)
        state, row, divergence = update(state, EXAMPLES)
        chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(other))
        assert {name: row[name] for name in expected} == expected
        told = {"updates": 1, "skipped/total": 0, "lr": float(learning_rate(OPTIMIZER)(done))}
        assert {name: row[name] for name in row.keys() - expected.keys()} == told
        assert [len(values) for values in divergence] == EXAMPLES.response_mask.sum(1).tolist()


def test_information_is_told_by_the_kind_of_context():
    update, state = prepared()
    kinds = np.arange(ROWS) % 4
    _, row, _ = update(state, EXAMPLES._replace(kinds=kinds, has_context=kinds > 0))
    assert [row[f"context/{name}"] for name in data.KINDS] == [0.25] * 4
    by_kind = [row[f"information/{name}"] for name in data.KINDS[1:]]
    assert len({*by_kind}) == 3
    np.testing.assert_allclose(np.mean(by_kind), row["information"], rtol=1e-5)
    assert "information/none" not in row


def test_a_response_without_a_token_has_no_information_of_any_kind():
    mask = np.arange(ROWS)[:, None] > np.zeros(EXAMPLES.response_mask.shape[1])
    examples = EXAMPLES._replace(
        response_mask=mask, kinds=np.full(ROWS, 2), has_context=np.full(ROWS, True)
    )
    config = Config(data=DataConfig(questions_per_step=QUESTIONS), sampling=SAMPLING)
    policy = Policy(None, None, None, SAMPLING, config.data)
    run = Run(config, None, policy, RepromptConfig(), None)
    found = _by_kind(run, examples, np.where(np.arange(ROWS) > 0, 0.5, 7).astype(np.float32))
    assert found == {
        "context/none": 0,
        "context/demonstration": 0,
        "context/feedback": 1,
        "context/both": 0,
        "information/feedback": 0.5,
    }


def test_a_step_of_several_updates_is_those_updates_and_counts_as_one():
    settings = {"updates_per_rollout": 2, "passes": 2}
    update, state = prepared(**settings)
    _, other = prepared(**settings)
    config = DataConfig(questions_per_step=QUESTIONS, packing="never", **settings)
    for done in (1, 2):
        other, each = by_hand(other, EXAMPLES, config)
        state, row, divergence = update(state, EXAMPLES)
        chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(other))
        assert (int(state.step), int(information_state(state.opt_state).count)) == (done, 4 * done)
        assert (row["updates"], row["skipped"], row["skipped/total"]) == (4, 0, 0)
        assert row["multipliers"] == [found["multiplier"] for found in each]
        for name in ("loss", "information", "multiplier", "grad_norm", "clip_fraction"):
            assert row[name] == pytest.approx(np.mean([found[name] for found in each]))
        assert row["teacher_student_distance"] == each[-1]["teacher_student_distance"]
        assert [len(values) for values in divergence] == EXAMPLES.response_mask.sum(1).tolist()
    assert row["lr"] == pytest.approx(0.02)  # the warm-up counts updates: 4 of 3 are done
    # After the first update the student has left the policy that sampled.
    assert each[0]["importance_weight"] != each[3]["importance_weight"]


def test_recomputed_log_probs_are_the_students_before_the_first_update():
    objective = ObjectiveConfig(policy=1.0, distillation=0.0, old_log_probs="recomputed")
    update, state = prepared(objective, passes=2)
    graphdef, params, _ = model()
    examples = jax.tree.map(jnp.asarray, REWARDED[0])
    mask, sampled = examples.response_mask, examples.sampler_log_probs

    @jax.jit
    def expected(params):
        prompts, prompt_mask = examples.prompts["student"]
        tokens, whole = (
            jnp.concatenate(pair, 1)
            for pair in ((prompts, examples.responses), (prompt_mask, mask))
        )
        logits = decoder.nnx.merge(graphdef, params)(tokens, whole)[:, prompts.shape[1] - 1 : -1]
        ours = information.at_tokens(jax.nn.log_softmax(logits[..., :22]), examples.responses)
        correction = losses.importance_weight(ours, sampled)
        means = {"sampler_mismatch": jnp.abs(ours - sampled), "importance_weight": correction}
        # The first pass has a ratio of 1 and a rate of 0, so the second a ratio of 1 too.
        means["loss/policy"] = -correction * examples.group.advantages[:, None]
        return {name: losses.aggregate(x, mask, jnp.ones(ROWS, bool)) for name, x in means.items()}

    _, row, _ = update(state, REWARDED[0])
    for name, value in expected(params).items():
        np.testing.assert_allclose(row[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert row["clip_fraction"] == 0


def test_responses_without_a_context_can_be_left_out_and_nothing_else_changes():
    examples = REWARDED[0]._replace(has_context=np.arange(ROWS) % 4 == 1)
    alone = {"objective": ObjectiveConfig(), "packing": "always"}
    results = []
    for without_context in ("keep", "drop"):
        update, state = prepared(**alone, without_context=without_context)
        results.append(update(state, examples))
    (kept, row, told), (dropped, other, some) = map(jax.device_get, results)
    chex.assert_trees_all_close(dropped, kept, rtol=1e-5, atol=1e-7)
    of_every = {"padding_fraction", "importance_weight", "sampler_mismatch"}
    assert all(other[name] == pytest.approx(row[name]) for name in row.keys() - of_every)
    assert not row["skipped"]
    for each, whole, trained in zip(some, told, examples.has_context, strict=True):
        np.testing.assert_allclose(each, whole if trained else [], rtol=1e-4, atol=1e-6)
    settings = DataConfig(QUESTIONS, packing="always")
    widest, packed = (
        data.pack(each, settings, model()[2]).views["teacher"].tokens.size
        for each in (examples, examples.with_context_only())
    )
    assert packed < widest


# ---- what is told --------------------------------------------------------------------------------


def update_of(**changes):
    found = {"loss": 1.0, "information": 0.5, "multiplier": 1.5, "grad_norm": 1.0}
    return found | {"finite": 1.0, "skipped": 0.0, "teacher_student_distance": 3.0} | changes


def test_a_row_is_the_mean_of_the_updates_that_were_done():
    skipped = update_of(loss=0.0, multiplier=9.0, skipped=1.0, teacher_student_distance=4.0)
    row = summarise_updates([update_of(loss=3.0), update_of(multiplier=0.5), skipped])
    assert (row["loss"], row["multiplier"], row["multipliers"]) == (2.0, 1.0, [1.5, 0.5])
    assert (row["updates"], row["teacher_student_distance"]) == (2, 4.0)
    assert row["skipped"] == pytest.approx(1 / 3)
    none = summarise_updates([skipped, skipped])
    assert (none["updates"], none["skipped"], none["loss"]) == (0, 1.0, 0.0)
    assert "multiplier" not in none and "multipliers" not in none


def test_one_broken_update_of_several_is_told():
    broken = update_of(loss=math.nan, finite=0.0, skipped=1.0)
    row = summarise_updates([update_of(), broken])
    assert row["loss"] == 1.0
    assert [alarm.name for alarm in Watch().check(row)] == ["not_finite"]
    assert Watch().check(summarise_updates([update_of(), update_of(skipped=1.0)])) == []


def test_a_replay_has_the_multiplier_of_every_update(tmp_path):
    steps = [[1.5, 0.5], [1.25], [2.0, 1.0]]
    written = [{"skipped": 0.0 if len(m) > 1 else 0.5, "multipliers": m} for m in steps]
    written += [{"skipped": 1.0}, {"skipped": 0.0, "multiplier": 0.75}]
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": k, "multiplier": 9.0, **row} for k, row in enumerate(written)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_multipliers(str(path)) == [1.5, 0.5, 1.25, 2.0, 1.0, 0.75]


# ---- a run ---------------------------------------------------------------------------------------

SEVERAL = {"questions_per_step": 4, "max_prompt_length": 19, "updates_per_rollout": 2, "passes": 2}


def start(folder, name, steps):
    objective = {"distillation": 0.5, "policy": 0.5, "old_log_probs": "recomputed"}
    sections = {**TINY, "data": SEVERAL, "objective": objective, "steps": steps}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**sections, "output_dir": str(folder / name)}))
    assert code(train.main, str(path)) == 0
    return rows(folder / name / "metrics.jsonl")


@pytest.mark.slow
def test_a_resumed_run_of_several_updates_a_step_is_the_run_without_an_interruption(
    tmp_path, capsys
):
    whole = start(tmp_path, "whole", 4)
    assert "4 steps of 4 updates" in capsys.readouterr().out
    start(tmp_path, "halves", 1)
    halves = start(tmp_path, "halves", 4)
    whole, halves = (
        [row for row in map(without_time, found) if "loss" in row] for found in (whole, halves)
    )
    assert halves == whole
    assert [row["step"] for row in whole] == [1, 2, 3, 4]
    assert {row["updates"] for row in whole} <= {2, 4}  # groups of equal rewards may teach nothing
    samples = rows(tmp_path / "whole" / "samples.jsonl")
    assert samples == rows(tmp_path / "halves" / "samples.jsonl")
    assert all(len(row["tokens"]) == len(row["divergence"]) for row in samples)
