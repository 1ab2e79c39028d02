"""Options of the commands that prepare a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lm_core.config import Count, config, opt
from lm_core.errors import ConfigError


@config
class TokenizeConfig:
    """Text to tokenised documents."""

    input: Path = opt(help="File or folder of raw text.", flags=("-i",))
    output: Path = opt(help="Folder to write; its files are named like those of --input.", flags=("-o",))
    tokenizer: str = opt(help="Tokenizer: bytes, a folder, smollm2-135m or a hub id.", flags=("-t",))
    format: Literal["jsonl", "txt"] = opt(help="One JSON object per line, or one document per line.", flags=("-f",))
    content_column: str = opt("content", "Key that holds the text.", flags=("-c",))
    src_tokenizer: str | None = opt(None, "The column holds ids of this tokenizer, which are decoded first.", flags=("-s",))
    use_fast: bool = opt(False, "Refuse a tokenizer that is not one of those in Rust, which are taken wherever there is one.")
    num_proc: int | None = opt(None, "Files that are worked on at a time; default: one per processor.", ge=1, flags=("-p",))
    append_eos: bool = opt(True, "End every document with the end token.")
    on_bad_line: Literal["error", "skip"] = opt("error", "What to do with a line that holds no text.")
    overwrite: bool = opt(False, "Write into a folder that exists.")


@config
class PackConfig:
    """Tokenised documents to memory-mapped shards, source by source."""

    input: Path = opt(help="Folder with one folder of tokenised .jsonl files per source.", flags=("-i",))
    output: Path = opt(help="Folder to write, with one folder of shards per source.", flags=("-o",))
    tokenizer: str = opt(help="Tokenizer that made the ids: bytes, a folder, smollm2-135m or a hub id.", flags=("-t",))
    text_column: str = opt("content", "Key of text, in rows that are not tokenised.")
    dtype: Literal["auto", "uint16", "uint32"] = opt("auto", "Type of the ids; auto is the smaller one that holds the vocabulary.")
    shard_tokens: Count = opt(10**9, "Tokens in one shard.", ge=1)
    overwrite: bool = opt(False, "Write into a folder that exists.")


@config
class FilterConfig:
    """Keep the records of a corpus whose numeric column lies within bounds."""

    input: Path = opt(help="File or folder of .jsonl files.", flags=("-i",))
    output: Path = opt(help="Folder to write; its files are named like those of --input.", flags=("-o",))
    column: str = opt(help="Key of the number, for example a fluency score.")
    min: float | None = opt(None, "Least value that is kept.")
    max: float | None = opt(None, "Largest value that is kept.")
    report: Path | None = opt(None, "JSON file for the counts by source.")
    overwrite: bool = opt(False, "Write into a folder that exists.")

    def check(self) -> None:
        if self.min is None and self.max is None:
            raise ConfigError("min: neither --min nor --max is given, so nothing would be left out; give one of them")
