"""Questions made from their number when they are asked for, and a tokenizer of their few words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pgpo_jax.tasks.task import Question


class Questions(Sequence[Question]):
    """Questions of a range in the seed's order, made when they are asked for."""

    def __init__(
        self, task: str, make: Callable[[int, int], Question], indices: range, seed: int
    ) -> None:
        """`make` gives the question of an index and a seed."""
        self._task, self._make, self._indices, self._seed = task, make, indices, seed

    def __repr__(self) -> str:
        """The parameters, which are all that its digest needs."""
        return f"{self._task} {self._indices.start}:{self._indices.stop} seed {self._seed}"

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        return self._make(self._indices[index], self._seed)


def word_tokenizer(vocabulary: Sequence[str], word: str, chat_template: str) -> Any:
    """A Hugging Face fast tokenizer of whole words.

    Args:
      vocabulary: The words, with `<pad>`, `<end>` and `<unk>`, in the order of their ids.
      word: Regular expression of one word.
      chat_template: Of a conversation.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = chat_template
    return wrapped
