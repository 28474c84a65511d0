"""A tokenizer of bytes, with special tokens that open, close and divide what it writes."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<bos>", "<eos>", "<|turn|>", "<|start|>")
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def make_tokenizer(template=None, around="$A", vocabulary=None):
    vocabulary = vocabulary or {text: i for i, text in enumerate([*SPECIAL, *ALPHABET])}
    raw = Tokenizer(models.BPE(vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(name, vocabulary[name]) for name in ("<bos>", "<eos>")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<|turn|>", "<|start|>"],
    )
    tokenizer.chat_template = template
    return tokenizer
