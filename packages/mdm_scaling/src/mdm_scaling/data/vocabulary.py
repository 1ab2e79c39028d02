"""GPT-2's two files of a byte-pair encoding, as Megatron's scripts name them, made into a tokenizer folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_core import cache
from lm_core.errors import InputError

END = "<|endoftext|>"


def gpt2(vocabulary: Path, merges: Path) -> Path:
    """The folder of the tokenizer of both files, made once and kept in the cache. Raises InputError where they do not fit together."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        key = cache.key_of("gpt2", vocabulary.read_bytes().hex(), merges.read_bytes().hex())
        made = ByteLevelBPETokenizer.from_file(str(vocabulary), str(merges))
    except Exception as error:  # tokenizers raises plain exceptions
        raise InputError(
            f"vocab_file: {vocabulary} and {merges} make no tokenizer ({error}); give GPT-2's vocab.json and merges.txt"
        ) from None
    if made.token_to_id(END) is None:
        raise InputError(f"vocab_file: {vocabulary} has no {END}, which ends documents; add it, or use --tokenizer FOLDER")

    def write(folder: Path) -> None:
        wrapped: Any = PreTrainedTokenizerFast
        wrapped(tokenizer_object=made._tokenizer, eos_token=END, bos_token=END, unk_token=END).save_pretrained(str(folder))

    return cache.build("tokenizers", key, write)
