"""Source folders and data arguments to the mixture that a run trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_core.cache import kept_in
from lm_core.data import Data, build_data
from lm_core.data.mix import Mix
from lm_core.data.shards import Source, is_shards
from lm_core.data.sources import Corpus, parse, resolve
from lm_core.data.tokenize import open_corpus
from lm_core.errors import InputError
from moe_cpt.plan import comma_separated
from moe_cpt.weights import normalised_shares, read_shares

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moe_cpt.config import TrainConfig

TEXT = (".jsonl", ".jsonl.gz", ".json", ".txt", ".csv", ".parquet")


def expanded(arguments: Sequence[str]) -> list[str]:
    """Data arguments one by one: comma lists are taken apart, and a folder of sources gives its parts."""
    parts = comma_separated(arguments)
    return [source for part in parts for source in (sources_in(Path(part)) if is_root(part) else [part])]


def is_root(argument: str) -> bool:
    """Whether an argument is a folder of sources: of folders, or of one file per source."""
    path = Path(argument).expanduser()
    if not path.is_dir() or is_shards(path) or (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return False
    return any(child.is_dir() for child in path.iterdir()) or len(_files(path)) > 1


def sources_in(root: Path) -> list[str]:
    """The sources of a folder: its folders, or its files. Raises InputError for an empty one."""
    folders = sorted(child for child in root.expanduser().iterdir() if child.is_dir())
    for folder in folders:
        if not is_shards(folder) and not _files(folder):
            raise InputError(f"dataset_dir: source {folder} is empty; add .jsonl files or shards, or remove the folder")
    return [str(path) for path in folders or _files(root.expanduser())]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(TEXT))


def first_file(corpus: Corpus) -> Corpus:
    """A folder of text cut down to its first file; anything else as it is."""
    path = Path(corpus.argument.source).expanduser()
    files = _files(path) if corpus.folder is None and path.is_dir() else []
    return resolve(replace(corpus.argument, source=str(files[0]))) if files else corpus


def described(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, float]]:
    """Documents, tokens, samples and share of every source, and its held-out tokens."""
    data = weighted_sources(config, tokenizer)
    found = {}
    for name, rows in data.train.items():
        source: Any = rows
        facts = {"documents": len(source.source), "tokens": source.source.tokens, "samples": len(rows), "share": data.weights[name]}
        held: Any = data.valid.get(name)
        found[name] = facts | {"held_out_tokens": 0 if held is None else held.source.tokens}
    return found


def weighted_sources(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The data of a run: sources drawn independently by sample number, with the shares of --prob-map.

    Without --prob-map a folder of sources takes those of LLaMA; other sources the weights they carry, else equal ones.
    """
    arguments = expanded(config.data)
    changed: Any = replace(config, data=arguments, eval_data=expanded(config.eval_data))

    def opened(corpus: Corpus) -> Source:
        return open_corpus(first_file(corpus) if config.debug_mode else corpus, tokenizer, text_column=config.text_column)

    with kept_in(config.data_cache_dir):
        data = build_data(changed, tokenizer, opened)
    prob_map = config.prob_map or ("llama" if any(is_root(argument) for argument in config.data) else None)
    if prob_map is not None:
        shares = normalised_shares(read_shares(prob_map), data.train)
    elif any(parse(argument).weight is not None for argument in arguments):
        shares = dict(data.weights)
    else:
        shares = dict.fromkeys(data.train, 1 / len(data.train))
    return replace(data, weights=shares, draw="keyed", on_exhausted=config.on_exhausted)


class WeightedSources(Mix):
    """The sources of a folder as a run draws them: `names[at(n)[0]]` is the source of sample n.

    `prob_map` is a name or file of shares, as for --prob-map, or the shares by source; `seed` that of the run.
    """

    def __init__(self, dir: str | Path, prob_map: str | Mapping[str, float] = "llama", *, seed: int = 1227) -> None:
        self.names = [parse(source).name for source in expanded([str(dir)])]
        shares = normalised_shares(read_shares(prob_map) if isinstance(prob_map, str) else prob_map, self.names)
        super().__init__([shares[name] for name in self.names], seed=seed, draw="keyed")
