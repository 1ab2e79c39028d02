"""How near a student is to its teacher: divergence and agreement token by token, perplexities, and greedy texts side by side.

B rows, T time, M positions, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lm_core.data import build_data
from lm_core.data.loader import eval_batches
from lm_core.data.sources import read
from lm_core.errors import InputError
from lm_core.method import IGNORE
from lm_core.models import load_model, load_tokenizer
from rwkv_distill.align import unmasked
from rwkv_distill.command_config import EvalConfig
from rwkv_distill.config import MODELS
from rwkv_distill.distill import DistilledLogits, next_tokens, teacher_hidden
from rwkv_distill.generate import generate
from rwkv_distill.student import StudentModel, load_student

TOP = (1, 5, 50)
POSITIONS = 8  # buckets


@torch.no_grad()
def evaluate(config: EvalConfig) -> dict[str, Any]:
    """The report of `rwkv-distill eval`: one entry per source, and one of generation."""
    student = load_student(config.model)
    student.train(False)
    teacher: Any = load_model(config.teacher, presets=MODELS, seed=config.seed)
    tokenizer: Any = load_tokenizer(config.model)
    data = build_data(config, tokenizer)
    pair = DistilledLogits(student, teacher)
    held_out = data.valid or data.train
    sources = {name: compare(pair, rows, config) for name, rows in held_out.items()}
    first = next(iter(held_out.values()))
    report = {"sources": sources, "generation": agreement(student, teacher, first, config), "state_bytes": state_bytes(student)}
    if config.qa is not None:
        report["qa"] = exact_matches(student, teacher, tokenizer, config.qa)
    return report


def compare(pair: DistilledLogits, rows: Any, config: EvalConfig) -> dict[str, Any]:
    """Numbers over the unmasked positions of one source."""
    divergences: list[Tensor] = []
    places: list[Tensor] = []
    hits = dict.fromkeys(TOP, 0.0)
    losses = torch.zeros(2, dtype=torch.float64)
    labelled = 0
    for batch in eval_batches(rows, micro_batch=config.micro_batch_size, tokens=int(config.eval_tokens)):
        inputs = batch["input_ids"], batch.get("attention_mask"), batch.get("document_ids")
        real, labels = unmasked(batch), next_tokens(batch)
        ours = pair.student.lm_head(pair.student.model(*inputs)[0][real]).float()
        theirs = pair.teacher.get_output_embeddings()(teacher_hidden(pair.teacher, *inputs)[real]).float()
        columns = min(ours.shape[1], theirs.shape[1])
        ours, theirs = ours[:, :columns].log_softmax(-1), theirs[:, :columns].log_softmax(-1)
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1))
        where = batch.get("position_ids")
        where = torch.arange(real.shape[1]).expand_as(real) if where is None else where
        places.append(where[real])
        for k in TOP:
            a, b = (value.topk(min(k, columns)).indices for value in (ours, theirs))
            hits[k] += float((a[:, :, None] == b[:, None, :]).any(-1).float().mean(-1).sum())
        target = labels[real]
        for n, value in enumerate((ours, theirs)):
            losses[n] += F.nll_loss(value, target, ignore_index=IGNORE, reduction="sum").double()
        labelled += int((target != IGNORE).sum())
    if not divergences:
        raise InputError("data: holds no text to evaluate on; give more of it")
    kl_M, place_M = torch.cat(divergences), torch.cat(places)
    means = (losses / max(labelled, 1)).tolist()
    return {
        "positions": len(kl_M),
        "kl": {"mean": float(kl_M.mean()), "median": float(kl_M.median()), "p95": float(kl_M.quantile(0.95))},
        "kl_by_position": by_position(kl_M, place_M, config.max_length),
        "top_agreement": {str(k): hit / len(kl_M) for k, hit in hits.items()},
        "loss": {"student": means[0], "teacher": means[1]},
        "perplexity": {"student": math.exp(min(means[0], 700)), "teacher": math.exp(min(means[1], 700))},
    }


def by_position(kl_M: Tensor, place_M: Tensor, length: int) -> dict[str, float]:
    """Mean divergence by place in the text, in equal buckets; those that hold nothing are left out."""
    width = max(1, -(-length // POSITIONS))
    found = {}
    for start in range(0, length, width):
        inside = (place_M >= start) & (place_M < start + width)
        if inside.any():
            found[f"{start}-{min(start + width, length) - 1}"] = float(kl_M[inside].mean())
    return found


def agreement(student: StudentModel, teacher: Any, rows: Any, config: EvalConfig) -> dict[str, Any]:
    """How many greedy tokens student and teacher share before they part, over the beginnings of held-out rows."""
    shared = []
    for n in range(min(config.prompts, len(rows))):
        prompt = torch.as_tensor(rows[n]["input_ids"])[None, : config.prompt_tokens]
        ours = generate(student, prompt, max_new_tokens=config.max_new_tokens)[0]
        theirs = teacher.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=config.max_new_tokens, min_new_tokens=config.max_new_tokens,
            do_sample=False, pad_token_id=0,
        )[0, prompt.shape[1] :]  # fmt: skip
        same = (ours == theirs).long()
        shared.append(int(same.cumprod(0).sum()))
    return {"prompts": len(shared), "tokens": config.max_new_tokens, "agreement_length": sum(shared) / len(shared) if shared else 0.0}


def exact_matches(student: StudentModel, teacher: Any, tokenizer: Any, path: Path) -> dict[str, Any]:
    """Shares of the answers in a file that each side decodes greedily behind their prompts, compared without outer spaces."""
    right = {"student": 0, "teacher": 0}
    rows = list(read(path))
    for row in rows:
        if not all(isinstance(row.fields.get(name), str) and row.fields[name].strip() for name in ("prompt", "answer")):
            raise InputError(f"qa: {row.where} has no prompt and answer (found: {', '.join(map(str, row.fields))}); give both as text")
        prompt = torch.tensor([tokenizer(row.fields["prompt"]).input_ids])
        # an answer may be tokenised otherwise behind its prompt
        length = 2 + len(tokenizer(row.fields["answer"], add_special_tokens=False).input_ids)
        ours = generate(student, prompt, max_new_tokens=length, eos_token_id=tokenizer.eos_token_id)[0]
        theirs = teacher.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, do_sample=False, pad_token_id=0,
            eos_token_id=tokenizer.eos_token_id,
        )[0, prompt.shape[1] :]  # fmt: skip
        for side, written in (("student", ours), ("teacher", theirs)):
            text, answer = tokenizer.decode(written, skip_special_tokens=True).strip(), row.fields["answer"].strip()
            right[side] += text == answer or (text.startswith(answer) and not text[len(answer) :][0].isalnum())
    if not rows:
        raise InputError(f"qa: {path} holds no row; give rows of prompt and answer")
    return {"questions": len(rows), **{side: count / len(rows) for side, count in right.items()}}


def state_bytes(student: StudentModel) -> int:
    """Bytes of one sequence's state, which do not depend on its length (softmax layers of a hybrid not counted)."""
    return int(student(torch.zeros(1, 1, dtype=torch.long), return_state=True).state.bytes())
