"""What `rwkv-distill cache-teacher` does: a teacher once over the data, its likeliest tokens to disk (see `teacher_cache`)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_core.data import Rows
from lm_core.data.loader import eval_batches
from lm_core.data.vocab import fingerprint
from lm_core.engine.state import write_json, write_tensors
from lm_core.errors import ConfigError
from lm_core.method import Batch
from lm_core.models import load_model
from rwkv_distill.align import require_positions
from rwkv_distill.config import MODELS, CacheConfig
from rwkv_distill.distill import require_shared_tokens, teacher_hidden
from rwkv_distill.export import refuse_occupied
from rwkv_distill.method import StudentMethod
from rwkv_distill.teacher_cache import FORMAT, keys

SHARD_TOKENS = 1 << 18


@torch.no_grad()
def write(config: CacheConfig) -> dict[str, Any]:
    """Run the teacher over the rows of a training run, one pass and the held-out ones, up to --max-trained-tokens each."""
    if config.output_dir is None:
        raise ConfigError("output_dir: is required; give the folder to write with --output-dir")
    folder = config.output_dir
    refuse_occupied(folder)
    name = config.teacher_model_id or config.model
    teacher: Any = load_model(name, presets=MODELS, seed=config.seed)
    require_positions(teacher.config, config.max_length)
    method = StudentMethod(config)
    tokenizer = method.tokenizer()
    require_shared_tokens(config, tokenizer, teacher.config.vocab_size)
    device = torch.device("cuda" if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()) else "cpu")
    teacher = teacher.to(device, torch.bfloat16 if config.precision == "bf16" else torch.float32).eval()
    data = method.data(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    shard = _Shards(folder)
    for rows in (*data.train.values(), *data.valid.values()):
        again = getattr(rows, "epoch", None)
        first_pass: Rows = rows if again is None else again(0)
        for batch in eval_batches(first_pass, micro_batch=config.micro_batch_size, tokens=int(config.max_trained_tokens)):
            shard.add(batch, teacher, device, config.top_k)
    shard.close()
    about = {"format": FORMAT, "teacher": name, "tokenizer_sha256": fingerprint(tokenizer), "columns": teacher.config.vocab_size}
    write_json(folder / "index.json", {**about, "top_k": config.top_k, "rows": shard.places})
    return {
        "output_dir": str(folder),
        "rows": len(shard.places),
        "tokens": shard.tokens,
        "bytes": sum(f.stat().st_size for f in folder.iterdir()),
    }


class _Shards:
    """Positions gathered until they fill a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, list[int]] = {}
        self.tokens = 0
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._file, self._filled = 0, 0

    def add(self, batch: Batch, teacher: Any, device: torch.device, top_k: int) -> None:
        here = batch.to(device)
        inputs = here["input_ids"], here.get("attention_mask"), here.get("document_ids")
        hidden = teacher_hidden(teacher, *inputs)
        for n, (key, real) in enumerate(keys(batch)):
            if key in self.places or int(batch.index[n]) < 0:
                continue
            ids, logp, rest = likeliest(teacher.get_output_embeddings()(hidden[n, real.to(device)]).float(), top_k)
            self._waiting.append((ids.int().cpu(), logp.half().cpu(), rest.float().cpu()))
            self.places[key] = [self._file, self._filled, self._filled + len(ids)]
            self._filled += len(ids)
            self.tokens += len(ids)
            if self._filled >= SHARD_TOKENS:
                self.close()

    def close(self) -> None:
        if not self._waiting:
            return
        names = ("ids", "logp", "rest")
        write_tensors(
            self.folder / f"{self._file:05}.safetensors", {name: torch.cat(part) for name, part in zip(names, zip(*self._waiting))}
        )
        self._waiting, self._file, self._filled = [], self._file + 1, 0


def likeliest(logits_MV: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and log-probabilities of the `top_k` likeliest tokens, and the logarithm of the remaining mass (-inf if nothing remains)."""
    log_p = logits_MV.log_softmax(-1)
    found = log_p.topk(min(top_k, log_p.shape[-1]), -1)
    left = log_p.scatter(1, found.indices, -math.inf)
    return found.indices, found.values, left.logsumexp(-1)
