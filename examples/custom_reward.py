"""A reward of your own, called as TRL calls it, on the quickstart's task.

cd examples && python custom_reward.py                # five steps on a CPU
cd examples && python custom_reward.py --steps 100    # any field of the configuration
"""

import sys

from pgpo_jax import train


def digits(prompts, completions, answer, **columns):
    """The part of the digits that are right: a number in [0, 1] a completion.

    Args:
      prompts: Texts or conversations, as the data have them.
      completions: The same of the responses.
      answer: The data's column of this name, one entry a completion.
      **columns: Its other columns.

    Returns:
      A number each. A pair (number, feedback) would be shown to the teacher where a response has no
      successful sibling.
    """
    del prompts, columns
    return [score(text(c), right) for c, right in zip(completions, answer, strict=True)]


def text(completion) -> str:
    """A completion is a text, or a conversation of one message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def score(response: str, right: str) -> float:
    """1 where the response is right; less for every digit that is not in its place."""
    same = sum(a == b for a, b in zip(response, right, strict=False))
    return same / max(len(response), len(right))


def main(overrides=()) -> int:
    """Trains; a response is a demonstration where every digit is right."""
    options = {
        "--task.reward": "custom_reward:digits",
        "--reprompt.threshold": "1",
        "--output_dir": "runs/custom_reward",
        "--steps": "5",
    }
    options |= dict(zip(overrides[::2], overrides[1::2], strict=True))
    return train.main(["quickstart", *(word for option in options.items() for word in option)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
