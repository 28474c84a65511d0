"""Tokenizers of Hugging Face checkpoints, and the tokens that end a response."""

from pathlib import Path
from typing import Any

from pgpo_jax.errors import InputError
from pgpo_jax.hf import files
from pgpo_jax.hf.files import one_line, read_json

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: str | Path) -> Any:
    """The checkpoint's `transformers` tokenizer."""
    from transformers import AutoTokenizer

    folder = files.folder(path, ["*.json", "*.txt", "*.model", "*.jinja"])
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in read_json(settings):  # transformers would ask to run it
        raise InputError(
            f"model.path: got {path}, whose tokenizer needs code of its own (auto_map), which is "
            "never run; give a model with a tokenizer.json alone"
        )
    # From a folder without a vocabulary, transformers would make an empty tokenizer.
    cause = f"there is none of {', '.join(VOCABULARIES)}"
    if any((folder / name).is_file() for name in VOCABULARIES):
        try:
            return AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # transformers raises many types for one cause
            cause = one_line(error)
    raise InputError(f"model.path: got {path}, whose tokenizer does not load: {cause}")


def end_tokens(*sources: Any) -> tuple[int, ...]:
    """The tokens that end a response, sorted.

    Args:
      *sources: Checkpoints (config.json and generation_config.json are read), `ModelConfig`s and
        tokenizers; None is skipped.
    """
    ends: set[int] = set()
    for source in sources:
        if isinstance(source, str | Path):
            folder = files.folder(source, ["*.json"])
            paths = [folder / "config.json", folder / "generation_config.json"]
            stated = [read_json(path).get("eos_token_id") for path in paths if path.is_file()]
        else:
            stated = [getattr(source, "eos_token_id", None)]
        for value in stated:
            ends.update((value,) if isinstance(value, int) else value or ())
    return tuple(sorted(ends))


def turn_end(tokenizer: Any) -> int | None:
    """The token with which the chat template ends an assistant's turn.

    Base models with a chat template often state another end token than the one that ends a turn
    (Qwen2.5: `<|endoftext|>` and `<|im_end|>`); a response that ends its turn must end.

    Returns:
      Its id; None without a chat template, or where a turn ends with plain text or with nothing.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "the-answer-stands-here"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # templates raise whatever jinja or their author chose
        return None
    if mark not in text:  # a template that writes none of its answers
        return None
    after = text.rpartition(mark)[2].lstrip()
    tokens = tokenizer(after, add_special_tokens=False)["input_ids"]
    return tokens[0] if tokens and tokens[0] in tokenizer.added_tokens_decoder else None
