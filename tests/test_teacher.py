"""The teacher's refresh rules, by sequences computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgpo_jax import teacher
from pgpo_jax.errors import InputError
from pgpo_jax.teacher import TeacherConfig

STUDENTS = [2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TeacherConfig("ema", ema_rate=0.5), [1.0, 2.5, 5.25, 10.625]),
        (TeacherConfig("frozen"), [0.0, 0.0, 0.0, 0.0]),
        (TeacherConfig("trust_region"), [0.0, 0.0, 0.0, 0.0]),
        (TeacherConfig("restarts"), [0.0, 0.0, 0.0, 0.0]),  # the loop does it
        (TeacherConfig("gated"), [0.0, 0.0, 0.0, 0.0]),
        (TeacherConfig("live"), [2.0, 4.0, 8.0, 16.0]),
        (TeacherConfig("periodic", period=2), [0.0, 4.0, 4.0, 16.0]),
    ],
    ids=lambda value: value.refresh if isinstance(value, TeacherConfig) else "",
)
def test_a_refresh_rule_gives_its_sequence(config, expected):
    now, seen = {"w": jnp.zeros(2)}, []
    update = jax.jit(lambda student, now, count: teacher.refresh(student, now, count, config))
    for count, student in enumerate(STUDENTS, start=1):
        now = update({"w": jnp.full(2, student)}, now, jnp.int32(count))
        seen.append(float(now["w"][0]))
    np.testing.assert_allclose(seen, expected)


def test_a_live_teacher_never_shares_the_students_memory():
    student = {"w": jnp.ones(4)}
    config = TeacherConfig("live")
    step = jax.jit(lambda s: (s, teacher.refresh(s, s, jnp.int32(1), config)), donate_argnums=0)
    student, now = step(student)
    assert student["w"].unsafe_buffer_pointer() != now["w"].unsafe_buffer_pointer()


def test_mixed_logits_are_the_mixture_of_both_models():
    rng = np.random.default_rng(0)
    hidden, other = (jnp.asarray(rng.normal(size=(5, 4)), jnp.float32) for _ in range(2))
    head, other_head = (jnp.asarray(rng.normal(size=(7, 4)), jnp.float32) for _ in range(2))
    both, both_head = teacher.mix_logits(hidden, head, other, other_head, 0.25)
    expected = 0.75 * hidden @ head.T + 0.25 * other @ other_head.T
    np.testing.assert_allclose(both @ both_head.T, expected, rtol=1e-5, atol=1e-6)


def test_another_teacher_must_be_frozen():
    with pytest.raises(InputError, match=r"teacher.refresh: got 'ema'; must be frozen"):
        TeacherConfig(path="models/large")
