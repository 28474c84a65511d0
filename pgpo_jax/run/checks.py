"""What the parts of a run must have in common, checked before anything is computed.

A model, a tokenizer, lengths and questions may each be right and still not fit together; without
these checks a run would find out in the step that first meets the mistake, or not at all.
"""

from collections.abc import Sequence
from typing import Any

from pgpo_jax import data
from pgpo_jax.data import DataConfig
from pgpo_jax.errors import InputError
from pgpo_jax.models import ModelConfig
from pgpo_jax.reprompt import RepromptConfig, resolve_templates, teacher_messages
from pgpo_jax.sampler import SamplingConfig
from pgpo_jax.tasks import Question, Task


def check_run(
    task: Task,
    model: ModelConfig,
    tokenizer: Any,
    sampling: SamplingConfig,
    data_config: DataConfig,
    reprompt: RepromptConfig,
) -> None:
    """Checks vocabulary, lengths and questions.

    Args:
      task: Its questions are tokenized, all of them where they are a list, else one.
      model: The architecture.
      tokenizer: The model's or the task's.
      sampling: With the end tokens and vocabulary that the run will use.
      data_config: Prompt limit and chat template options.
      reprompt: The teacher's prompt limit and templates.

    Raises:
      InputError: The first that does not fit.
    """
    check_vocabulary(model, tokenizer, sampling)
    check_lengths(model, sampling, data_config, reprompt)
    for questions in (task.train, task.test):
        check_questions(questions, tokenizer, data_config, reprompt)


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


def check_questions(
    questions: Sequence[Question],
    tokenizer: Any,
    data_config: DataConfig,
    reprompt: RepromptConfig,
) -> None:
    """Every prompt must fit, and the longest must leave the teacher room for a demonstration."""
    found = questions if isinstance(questions, list) else list(questions[:1])
    if not found:
        return
    prompts = data.encode(
        tokenizer,
        [question.messages for question in found],
        max_length=data_config.max_prompt_length,
        template_options=data_config.template_options,
        names=[question.key for question in found],
    )
    _check_repeats(found[0], tokenizer, data_config)
    _, longest = max(zip(map(len, prompts), range(len(found)), strict=True))
    templates = resolve_templates(reprompt)
    data.encode(
        tokenizer,
        [teacher_messages(found[longest].messages, "", "", templates)],
        max_length=reprompt.max_length - 1,
        template_options=data_config.template_options,
        names=[found[longest].key],
        field="reprompt.max_length",
    )


def _check_repeats(question: Question, tokenizer: Any, data_config: DataConfig) -> None:
    """A chat template must write the same prompt again, or a resumed run would ask another one."""
    once, again = (
        data.render(tokenizer, question.messages, data_config.template_options) for _ in range(2)
    )
    if once != again:
        raise InputError(
            f"model.path: the chat template writes question {question.key!r} in two ways; must "
            "give the same prompt each time, so take what is random out of it"
        )
