"""Models of this package in lm-evaluation-harness, as `--model mdm_scaling --model_args pretrained=FOLDER,num_mc=32`.

The likelihood of an autoregressive model is exact, that of a masked one a bound by draws: `hf` would read the logits of a masked
model as predictions of the next token.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from lm_core.models import load_tokenizer
from mdm_scaling.model import Scorer, checkpoint_folder, load_network, objective_of, vocabulary_of
from mdm_scaling.sampling import autoregressive, fill
from mdm_scaling.tasks import causal_versions, greedy, masked_versions, scores


@register_model("mdm_scaling")
class MdmScaling(LM):  # type: ignore[misc]
    """`pretrained`: a run or model folder. `num_mc`: draws per target. `steps`: of a masked model's sampler; default: one per token."""

    def __init__(
        self,
        pretrained: str,
        num_mc: int = 32,
        seed: int = 4321,
        chunk: int = 32,
        steps: int | None = None,
        max_gen_toks: int = 64,
        **_: Any,
    ) -> None:
        super().__init__()
        self.model: Any = load_network(pretrained)
        self.tokenizer = load_tokenizer(checkpoint_folder(pretrained))
        self.masked = objective_of(self.model) == "mdm"
        self.scorer = Scorer(self.model).eval()
        self.mask_id, self.end = vocabulary_of(self.model), self.tokenizer.eos_token_id or 0
        self.positions = int(self.model.config.max_position_embeddings)
        self.num_mc, self.seed, self.chunk, self.steps, self.max_gen_toks = int(num_mc), int(seed), int(chunk), steps, int(max_gen_toks)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def nll(self, context: list[int], target: list[int], address: int) -> float:
        """Of the target behind as much of the context as fits."""
        context = (context or [self.end])[-max(1, self.positions - len(target)) :]
        if not self.masked:
            return scores(self.scorer, [causal_versions(context, target)], self.chunk)[0]
        made = masked_versions(context, target, how="mc", mask_id=self.mask_id, num_mc=self.num_mc, seed=self.seed, address=address)
        return scores(self.scorer, [made], self.chunk)[0]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        found = []
        for address, request in enumerate(requests):
            context, target = (self.encode(text) for text in request.args)
            context = context or [self.end]
            found.append((-self.nll(context, target, address), greedy(self.model, context, target, self.masked, self.mask_id)))
        return found

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        found = []
        for address, request in enumerate(requests):
            ids = self.encode(request.args[0])
            size = self.positions - 1
            pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
            # the context of a piece is the token before it
            before = [[self.end], *([piece[-1]] for piece in pieces)]
            found.append(-sum(self.nll(first, piece, address * 4096 + n) for n, (first, piece) in enumerate(zip(before, pieces))))
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        found = []
        for number, request in enumerate(requests):
            text, settings = request.args
            count = min(int(settings.get("max_gen_toks", self.max_gen_toks)), self.positions - 1)
            context = (self.encode(text) or [self.end])[-(self.positions - count) :]
            index = torch.tensor([number])
            if self.masked:
                start = torch.tensor([[*context, *[self.mask_id] * count]])
                predict = lambda ids: self.model(input_ids=ids).logits  # noqa: E731
                tokens = fill(predict, start, self.mask_id, int(self.steps or count), index=index)[0][0][len(context) :]
            else:
                tokens = autoregressive(self.model, torch.tensor([context]), count, index=index, end=self.end)[0][0]
            written = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
            for stop in settings.get("until", []):
                written = written.partition(stop)[0] if stop else written
            found.append(written)
        return found
