"""Which parameters of a model get a low-rank update, as parameter groups."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lm_core.errors import ConfigError
from lowrank_opt.base import Group

# Names of modules that hold a task's head; its weights are small, new and full rank.
HEADS = {"lm_head", "embed_out", "score", "classifier", "classification_head", "qa_outputs", "cls"}


def build_param_groups(
    model: nn.Module,
    rank: int | float | None,
    target_modules: str | Sequence[str] = "auto",
    exclude_modules: Sequence[str] = (),
    weight_decay: float | None = None,
    no_decay: bool = True,
    embedding_state_bits: int = 32,
    **galore_keys: Any,
) -> list[Group]:
    """Parameter groups of everything in `model` that requires a gradient: low-rank, dense, embeddings, not decayed.

    target_modules: "auto" = the weights of every Linear, Conv1D (of transformers) and Conv2d except embeddings and
    heads; or regular expressions searched in parameter names. exclude_modules: regular expressions that take
    parameters out again. weight_decay: None leaves it to the optimizer. no_decay: biases, norms and other vectors
    are not decayed. embedding_state_bits: of embeddings, also under an 8-bit optimizer. rank None: no low-rank group. Further keys (update_proj_gap, scale, ...) go to the low-rank group.

    >>> groups = build_param_groups(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 6)), rank=2, scale=0.5)
    >>> [(group["param_names"], group.get("rank")) for group in groups]
    [(['1.weight'], 2), (['0.weight'], None), (['1.bias'], None)]

    Raises ConfigError for a pattern that matches no matrix.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    targets = set(auto_targets(model) if target_modules in ("auto", ["auto"]) else matching(names, "target_modules", target_modules))
    targets -= set(matching(names, "exclude_modules", exclude_modules))
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    low_rank = [p for p in names if p in targets and rank is not None]
    rest = [p for p in names if p not in set(low_rank)]
    embedded = [p for p in rest if p in embeddings]
    vectors = [p for p in rest if p not in embeddings and p.ndim < 2 and no_decay]
    dense = [p for p in rest if p not in embeddings and p not in set(vectors)]
    groups: list[Group] = []
    for params, settings in (
        (low_rank, {"rank": rank, **galore_keys}),
        (dense, {"rank": None}),
        (embedded, {"rank": None, "state_bits": embedding_state_bits}),
        (vectors, {"rank": None, "weight_decay": 0.0}),
    ):
        if weight_decay is not None:
            settings = {"weight_decay": weight_decay, **settings}
        if params:
            groups.append({"params": params, "param_names": [names[p] for p in params], **settings})
    return groups


def auto_targets(model: nn.Module) -> Iterator[Tensor]:
    """Weights of linear maps and convolutions in the body of the model."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    outside = {m.weight for m in model.modules() if isinstance(m, nn.Embedding) or m is output}
    for name, module in model.named_modules():
        # transformers' Conv1D is a linear map stored transposed; importing transformers to say so would cost seconds
        linear = isinstance(module, nn.Linear | nn.Conv2d) or type(module).__name__ == "Conv1D"
        if linear and not HEADS.intersection(name.split(".")) and module.weight not in outside:
            yield module.weight


def matching(names: Mapping[Any, str], option: str, patterns: str | Sequence[str]) -> Iterator[Tensor]:
    """Matrices whose name one of `patterns` is found in; every pattern must find one."""
    matrices = {name: parameter for parameter, name in names.items() if parameter.ndim >= 2}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            found = [name for name in matrices if re.search(pattern, name)]
        except re.error as error:
            raise ConfigError(f"{option}: {pattern!r} is not a regular expression ({error}); write for example mlp or q_proj") from error
        if not found:
            near = difflib.get_close_matches(pattern, matrices, n=5, cutoff=0.0)
            raise ConfigError(f"{option}: {pattern!r} matches no matrix; the nearest names are {', '.join(near)}")
        yield from (matrices[name] for name in found)
