"""How much of the assistant's last turn a model writes by itself: what `--eval-method generation` measures while training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from beacon.eval.scores import rouge_l
from beacon.modeling.causal_lm import RatioRule
from beacon.modeling.walk import spans_of
from lm_core.errors import InputError
from lm_core.method import IGNORE

# B rows, T columns


def score_last_turns(model: Any, tokenizer: Any, ids_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor | None, rule: RatioRule) -> Tensor:
    """Sum over rows of ROUGE-L between the last labelled stretch of a row and what the model writes there, greedily; and the labelled rows.

    Raises InputError for a row that is labelled from its first token on, since nothing asks for its words.
    """
    total, count, pad = 0.0, 0, next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    spans = spans_of(mask_BT, *ids_BT.shape)
    for row, labels, (begin, end) in zip(ids_BT, labels_BT, spans):
        learned = np.flatnonzero(labels[begin:end].cpu().numpy() != IGNORE)
        if not len(learned):
            # fills a batch
            continue
        count += 1
        first = learned[-1] - int((np.diff(learned)[::-1] == 1).cumprod().sum())
        if first == 0:
            raise InputError(
                "eval_method: generation needs conversations, and a held-out row has no question before its answer; use perplexity"
            )
        prompt, target = row[None, begin : begin + first], row[begin + first : begin + learned[-1] + 1]
        chosen = rule(end - begin)
        ratios = [chosen(i) for i in range(1 + model.beacon.compactions(end - begin))]
        out = model.generate(prompt, ratios=ratios, max_new_tokens=len(target), do_sample=False, pad_token_id=pad)
        texts = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (out[0, prompt.shape[1] :], target))
        total += rouge_l(*texts)
    return torch.tensor([total, count], dtype=torch.float64, device=ids_BT.device)
