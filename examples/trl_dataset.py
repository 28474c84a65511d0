"""A data set and a reward function in TRL's form, used as they are.

cd examples && python trl_dataset.py      # writes questions.jsonl, judges some responses
"""

import json
from pathlib import Path

from pgpo_jax.tasks import TaskConfig, load

ROWS = [
    {"prompt": [{"role": "user", "content": f"What is {a} times {b}?"}], "result": a * b}
    for a in range(2, 10)
    for b in range(2, 10)
]
"""TRL's prompt-only form, with a column of its own for the reward function."""
COMMAND = """To train on it:
  pgpo-jax train smollm2_sciknoweval --task.name dataset --task.path questions.jsonl \\
    --task.reward trl_dataset:right --output_dir runs/products"""


def right(prompts, completions, result, **columns):
    """As for TRL's GRPOTrainer: `prompts`, `completions`, and every other column by its name."""
    del prompts, columns
    texts = [completion[0]["content"] for completion in completions]
    return [float(text.split()[-1:] == [str(r)]) for text, r in zip(texts, result, strict=True)]


def main(folder: str = ".") -> None:
    """Writes the questions, loads them as a run does and judges two responses."""
    path = Path(folder) / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    task = load(TaskConfig(name="dataset", path=str(path), reward="trl_dataset:right"))
    print(f"{len(task.train)} questions, {len(task.test)} held out")
    question = task.test[0]
    print("question:", question.messages[-1]["content"])
    for response in (f"It is {question.columns['result']}", "I do not know"):
        (outcome,) = task.verify([question], [response])
        print(f"{response!r}: reward {outcome.reward:g}")
    print(COMMAND)


if __name__ == "__main__":
    main()
