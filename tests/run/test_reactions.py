"""What a run changes by itself when an alarm fires, and that a resumed run does the same."""

import pytest
import yaml
from test_faults import rows
from test_train import TINY, code

from pgpo_jax import checkpoint, config, train
from pgpo_jax.run import reactions

# Every answer is wrong and counts as a success, so `flat` fires at the fifth update.
RUN = {
    **TINY,
    "steps": 7,
    "evaluation": {"every": 0},
    "checkpoint": {"every": 2},
    "alarms": {"react_on": ["flat"]},
}


def start(folder, reaction, steps=7, name=None, **changes) -> list[dict]:
    run = folder / (name or reaction)
    alarms = {**RUN["alarms"], "reaction": reaction}
    sections = {**RUN, "output_dir": str(run), "alarms": alarms, "steps": steps, **changes}
    path = folder / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(sections))
    assert code(train.main, str(path)) == 0
    return rows(run / "metrics.jsonl")


@pytest.mark.parametrize(
    "reaction",
    [
        name if name == "rehearse" else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(reactions.REACTIONS.keys() - {"none"})
    ],
)
def test_a_run_reacts_once_from_the_next_update_on(reaction, tmp_path):
    found = start(tmp_path, reaction)
    assert [row.get("reaction") for row in found] == [None] * 4 + [reaction] + [None] * 2
    before, after = found[4], found[5]
    if reaction == "lower_rate":
        assert after["lr"] == pytest.approx(0.1 * before["lr"], rel=1e-6)
    if reaction == "rehearse":
        assert "loss/rehearsal" not in before
        assert after["loss/rehearsal"] > 0
    if reaction == "freeze_teacher":  # the average no longer follows
        average = start(tmp_path, "none")
        assert found[4]["teacher_student_distance"] == average[4]["teacher_student_distance"]
        assert found[6]["teacher_student_distance"] > average[6]["teacher_student_distance"]
    if reaction == "refresh_teacher":
        assert after["teacher_student_distance"] < before["teacher_student_distance"]


def test_a_run_that_reacted_goes_on_so_after_an_interruption(tmp_path):
    start(tmp_path, "rehearse")
    start(tmp_path, "rehearse", steps=6, name="parts")
    start(tmp_path, "rehearse", name="parts")
    assert checkpoint.compare(str(tmp_path / "rehearse"), str(tmp_path / "parts")) is None


def test_nothing_is_wanted_of_other_alarms_or_without_a_reaction():
    plain = config.Config()
    asks = config.load(None, ["--alarms.reaction", "lower_rate"])
    assert not reactions.wanted(plain, ("information",))
    assert reactions.wanted(asks, ("flat", "information"))
    assert not reactions.wanted(asks, ("flat",))


def test_the_teachers_use_of_a_demonstration_is_measured_at_every_evaluation(tmp_path):
    evaluation = {**TINY["evaluation"], "teacher_questions": 2}
    found = start(tmp_path, "none", steps=2, evaluation=evaluation, checkpoint={"every": 0})
    measured = [row["eval/teacher_with_demonstration"] for row in found if "eval/avg@16" in row]
    assert len(measured) == 2
    assert all(0 <= value <= 1 for value in measured)
