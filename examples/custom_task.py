"""A task of your own: words to be written backwards, with feedback that teaches.

python examples/custom_task.py      # what the verifier says of some responses
"""

from pgpo_jax.tasks import Outcome, Question, Task

WORDS = ("lamp", "stone", "river", "cloud", "table", "green", "light", "north")


def ask(word: str) -> Question:
    """The question: what is asked, the answer that the verifier compares with, a stable name."""
    message = {"role": "user", "content": f"Write {word} backwards, and nothing else."}
    return Question(messages=(message,), answer=word[::-1], key=word)


def judge(question: Question, response: str) -> Outcome:
    """A reward in [0, 1], and feedback that says what is wrong, never the answer."""
    given, right = response.strip(), question.answer
    if given == right:
        return Outcome(1.0)
    same = sum(a == b for a, b in zip(given, right, strict=False))
    return Outcome(
        same / max(len(given), len(right)), f"{same} of {len(right)} letters are in their place."
    )


def task(words=WORDS, held_out: int = 2) -> Task:
    """Questions to train on, questions that are held out, and what judges responses."""
    questions = [ask(word) for word in words]
    return Task(
        name="backwards",
        train=questions[held_out:],
        test=questions[:held_out],
        verify=lambda questions, responses: list(map(judge, questions, responses)),
        demonstration=lambda question: question.answer,
    )


def main() -> None:
    """Judges two responses to the first held-out question."""
    backwards = task()
    question = backwards.test[0]
    print(f"{len(backwards.train)} questions, {len(backwards.test)} held out")
    print("question:", question.messages[-1]["content"])
    for response in ("pmal", "plam"):
        (outcome,) = backwards.verify([question], [response])
        print(f"{response}: reward {outcome.reward:.2f} {outcome.feedback}")


if __name__ == "__main__":
    main()
