"""Texts into clusters of similar words or similar hidden states: what `moe-cpt cluster-text` does."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lm_core import counter
from lm_core.data import FIXED_HOLD_OUT
from lm_core.data.shards import key_of
from lm_core.data.sources import Row, parse, resolve
from lm_core.data.tokenize import text_of
from lm_core.errors import ConfigError, InputError, reading
from moe_cpt.options.splits import ClusterTextConfig
from moe_cpt.targets import require_free

# documents, D features (words, or a model's hidden size), C clusters
Encoder = Literal["tfidf", "sentence"]
_WORD = re.compile(r"\w+")
WORDS = 50_000
ITERATIONS = 100


def documents(data: Sequence[str], column: str) -> list[Row]:
    """Every row of data arguments, in order; of built-in sources those that are not always held out."""
    found = []
    for argument in data:
        corpus = resolve(parse(argument))
        rows = [(row, text_of(row, column)) for row in corpus.rows()]
        limit = (1 - FIXED_HOLD_OUT) * 2.0**64 if corpus.fixed else math.inf
        found += [row for row, text in rows if key_of(text) < limit]
    return found


def cluster(config: ClusterTextConfig) -> list[int]:
    """Find centres, or read them, and write the texts by cluster; the number of texts in each (none without `do_eval`)."""
    for field, path, written in (("model_dir", config.model_dir, config.do_train), ("output_dir", config.output_dir, config.do_eval)):
        if written:
            require_free(field, path, config.overwrite)
    rows = documents(config.data_dir, config.text_column)
    texts = [text_of(row, config.text_column) for row in rows]
    if config.do_train and len(rows) < config.num_clusters:
        raise ConfigError(f"num_clusters: {config.num_clusters} clusters for {len(rows)} texts; use at most {len(rows)}")
    words = None
    if config.do_train and config.encoder == "tfidf":
        words = WordEncoder.fitted(texts)
    elif not config.do_train:
        centres, words = load(config.model_dir, config.encoder)
    encoded = words(texts) if words is not None else SentenceEncoder(str(config.encoder_path))(texts)
    if config.do_train:
        centres = kmeans(encoded, config.num_clusters, config.seed)
        save(config.model_dir, config.encoder, centres, words)
    if not config.do_eval:
        return []
    return write_clusters(config.output_dir, rows, assigned(encoded, centres).tolist(), len(centres))


class WordEncoder:
    """Documents as unit vectors of tf * idf over the words of at most WORDS most widespread ones, idf = ln((1 + n) / (1 + df)) + 1."""

    def __init__(self, words: Sequence[str], idf_D: Tensor) -> None:
        self.words, self.idf_D = list(words), idf_D
        self._place = {word: at for at, word in enumerate(self.words)}

    @classmethod
    def fitted(cls, texts: Iterable[str]) -> WordEncoder:
        frequency: Counter[str] = Counter()
        count = 0
        for text in texts:
            count += 1
            frequency.update(set(_WORD.findall(text.lower())))
        words = sorted(frequency, key=lambda word: (-frequency[word], word))[:WORDS]
        idf = [math.log((1 + count) / (1 + frequency[word])) + 1 for word in words]
        return cls(words, torch.tensor(idf, dtype=torch.float64))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Documents x D, sparse; a document without a known word is all zeros."""
        rows, columns, values = list[int](), list[int](), list[float]()
        for row, text in enumerate(texts):
            found = Counter(self._place[word] for word in _WORD.findall(text.lower()) if word in self._place)
            weights = {at: times * float(self.idf_D[at]) for at, times in sorted(found.items())}
            length = math.sqrt(math.fsum(value * value for value in weights.values()))
            rows += [row] * len(weights)
            columns += list(weights)
            values += [value / length for value in weights.values()]
        places = torch.tensor([rows, columns], dtype=torch.int64)
        size = (len(texts), len(self.words))
        return torch.sparse_coo_tensor(places, torch.tensor(values, dtype=torch.float64), size, check_invariants=True).coalesce()


class SentenceEncoder:
    """Documents as unit vectors of the mean last hidden state of a local model over their first `length` tokens."""

    def __init__(self, path: str, length: int = 512) -> None:
        from lm_core.models import load_model, load_tokenizer

        self._model: Any = load_model(path).train(False)
        self._tokenizer, self._length = load_tokenizer(path), length

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Documents x D."""
        means = []
        for text in texts:
            ids = torch.tensor([self._tokenizer(text, verbose=False)["input_ids"][: self._length]])
            means.append(self._model.model(ids).last_hidden_state[0].mean(0).double())
        return torch.nn.functional.normalize(torch.stack(means), dim=1)


def kmeans(rows: Tensor, clusters: int, seed: int) -> Tensor:
    """Centres (C x D, unit length) of spherical k-means of unit rows, sparse or dense; started as k-means++, deterministic in `seed`.

    A cluster that loses all rows starts anew at the row that is furthest from its own centre, so no cluster stays empty.
    """
    draws = counter.uniform(counter.derive(seed, "split"), "split", 0, clusters).double()
    chosen = [int(draws[0] * rows.shape[0])]
    distance = torch.full((rows.shape[0],), math.inf, dtype=torch.float64)
    for draw in draws[1:].tolist():
        distance = torch.minimum(distance, (1 - _similarity(rows, _dense(rows, chosen[-1:]))[:, 0]).clamp(min=0))
        distance[chosen] = 0
        total = distance.cumsum(0)
        at = int(torch.searchsorted(total, draw * total[-1], right=True)) if total[-1] > 0 else len(chosen)
        chosen.append(min(at, rows.shape[0] - 1))
    centres_CD = _dense(rows, chosen)
    labels: Tensor | None = None
    for _ in range(ITERATIONS):
        again = assigned(rows, centres_CD)
        if labels is not None and torch.equal(again, labels):
            break
        labels = again
        member = torch.nn.functional.one_hot(labels, clusters).double()
        centres_CD = torch.nn.functional.normalize((rows.T @ member).T, dim=1)
    return centres_CD


def assigned(rows: Tensor, centres_CD: Tensor) -> Tensor:
    """The most similar centre of every row, ties to the lower one; where there are enough rows, no centre goes without."""
    similarity = _similarity(rows, centres_CD)
    best = similarity.max(1)
    labels, near = similarity.argmax(1), best.values.clone()
    for cluster in (torch.bincount(labels, minlength=len(centres_CD)) == 0).nonzero()[:, 0].tolist():
        counts = torch.bincount(labels, minlength=len(centres_CD))
        # only from clusters that have another row left
        far = torch.where(counts[labels] > 1, near, torch.inf)
        row = int(far.argmin())
        labels[row], near[row] = cluster, 1.0
    return labels


def _similarity(rows: Tensor, centres_CD: Tensor) -> Tensor:
    return rows @ centres_CD.T


def _dense(rows: Tensor, chosen: Sequence[int]) -> Tensor:
    found = rows.index_select(0, torch.tensor(list(chosen)))
    return found.to_dense() if found.is_sparse else found


def save(folder: Path, encoder: Encoder, centres_CD: Tensor, words: WordEncoder | None) -> None:
    """What `--do_eval` needs later."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"centres": centres_CD.contiguous()}
    if words is not None:
        tensors["idf"] = words.idf_D
        (folder / "words.json").write_text(json.dumps(words.words))
    save_file(tensors, folder / "clusters.safetensors", metadata={"encoder": encoder})


def load(folder: Path, encoder: Encoder) -> tuple[Tensor, WordEncoder | None]:
    """Centres and, for word clusters, their encoder. Raises InputError when there are none of this kind."""
    path, words = folder / "clusters.safetensors", folder / "words.json"
    if not path.is_file() or (encoder == "tfidf") != words.is_file():
        raise InputError(f"model_dir: {folder} holds no {encoder} clusters; write them with --do_train")
    with reading(f"model_dir: {folder}", "write it with --do_train"):
        tensors = load_file(path)
        return tensors["centres"], WordEncoder(json.loads(words.read_text()), tensors["idf"]) if encoder == "tfidf" else None


def write_clusters(folder: Path, rows: Sequence[Row], labels: Sequence[int], clusters: int) -> list[int]:
    """`<cluster>.jsonl` with the rows of every cluster in order; the number of rows in each."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = []
    for cluster in range(clusters):
        mine = [row for row, label in zip(rows, labels) if label == cluster]
        (folder / f"{cluster}.jsonl").write_text("".join(_lines(mine)))
        counts.append(len(mine))
    return counts


def _lines(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        yield json.dumps(dict(row.fields)) + "\n"
