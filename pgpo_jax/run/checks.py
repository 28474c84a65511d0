"""What the parts of a run must have in common, checked before anything is computed.

A model, a tokenizer and lengths may each be right and still not fit together; without these checks
a run would find out in the step that first meets the mistake, or not at all. The questions are
checked in `questions.py`.
"""

from typing import Any

from pgpo_jax.data import DataConfig
from pgpo_jax.errors import InputError
from pgpo_jax.models import ModelConfig
from pgpo_jax.reprompt import RepromptConfig
from pgpo_jax.sampler import SamplingConfig
from pgpo_jax.tasks import Task


def check_siblings(sampling: SamplingConfig, reprompt: RepromptConfig) -> tuple[str, ...]:
    """A response is shown a sibling's success, so it must have siblings, or something else to show.

    Returns:
      What should be known where only feedback is left, which a verifier may never give.

    Raises:
      InputError: There is nothing that a teacher could be shown.
    """
    needs_none = reprompt.demonstration == "plain" or reprompt.source != "sibling"
    if sampling.num_samples > 1 or needs_none:
        return ()
    if reprompt.use_feedback == "never":
        raise InputError(
            "sampling.num_samples: got 1; a response has no sibling to be shown then, nor feedback "
            "(reprompt.use_feedback never), so nothing would be learned: give at least 2"
        )
    return (
        "sampling.num_samples = 1: no response has a sibling, so the teacher is shown the "
        "verifier's feedback alone; where that gives none, nothing is learned",
    )


def check_solutions(task: Task, reprompt: RepromptConfig) -> tuple[str, ...]:
    """A `reprompt.source` that shows solutions needs a task that gives them.

    Returns:
      How many questions have none, where some do.

    Raises:
      InputError: The task gives no solutions.
    """
    if reprompt.source == "sibling":
        return ()
    if task.solution is None:
        raise InputError(
            f"reprompt.source: got {reprompt.source}; the task {task.name} gives no solutions: "
            "choose sibling, or name the column that holds them (task.columns solution)"
        )
    questions = task.train if isinstance(task.train, list) else []
    lacking = [question.key for question in questions if task.solution(question) is None]
    if not lacking:
        return ()
    shown = "a sibling's success only" if reprompt.source == "both" else "no demonstration"
    return (
        f"reprompt.source = {reprompt.source}: {len(lacking):,} of {len(questions):,} training "
        f"questions have no solution ({lacking[0]!r}, for one), so their teacher is shown {shown}",
    )


def check_vocabulary(model: ModelConfig, tokenizer: Any, sampling: SamplingConfig) -> None:
    """Every token must have its row: JAX would take the last row for one that is not there."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= model.vocab_size:
        raise InputError(
            f"model.path: got a tokenizer with token {largest} for a model of {model.vocab_size} "
            "tokens (vocab_size); they must belong together"
        )
    if (sampling.vocab_size or 0) > model.vocab_size:
        raise InputError(
            f"sampling.vocab_size: got {sampling.vocab_size}; must be at most the model's "
            f"{model.vocab_size}"
        )
    if max(sampling.unknown_tokens, default=0) >= model.vocab_size:
        raise InputError(
            f"sampling.unknown_tokens: got {max(sampling.unknown_tokens)}; must be tokens of the "
            f"model, 0 to {model.vocab_size - 1}"
        )
    if not sampling.end_tokens:
        raise InputError(
            "sampling.end_tokens: got none, nor does the checkpoint or the tokenizer state any; "
            "give the tokens that end a response"
        )
    if max(sampling.end_tokens) >= model.vocab_size or min(sampling.end_tokens) < 0:
        raise InputError(
            f"sampling.end_tokens: got {list(sampling.end_tokens)}; must be tokens of the model, "
            f"0 to {model.vocab_size - 1}"
        )
    ends, known = {*sampling.end_tokens}, {*tokenizer.get_vocab().values()}
    if unknown := sorted((ends - known) | (ends & {*sampling.unknown_tokens})):
        raise InputError(
            f"sampling.end_tokens: got {unknown}, which the tokenizer does not have, so no "
            "response draws them; must be tokens of the tokenizer"
        )


def check_lengths(
    model: ModelConfig, sampling: SamplingConfig, data_config: DataConfig, reprompt: RepromptConfig
) -> None:
    """Prompt and response at their limits must fit the model, a question the teacher's prompt."""
    room = model.max_position_embeddings - sampling.max_response_length
    for field, length in (
        ("data.max_prompt_length", data_config.max_prompt_length),
        ("reprompt.max_length", reprompt.max_length),
    ):
        if length > room:
            raise InputError(
                f"{field}: got {length}; with sampling.max_response_length = "
                f"{sampling.max_response_length} it must be at most {max(room, 0)} for a model of "
                f"{model.max_position_embeddings} positions (max_position_embeddings)"
            )
    if reprompt.max_length < data_config.max_prompt_length:
        raise InputError(
            f"reprompt.max_length: got {reprompt.max_length}; must be at least "
            f"data.max_prompt_length = {data_config.max_prompt_length}, for the teacher's prompt "
            "holds the question and more"
        )
