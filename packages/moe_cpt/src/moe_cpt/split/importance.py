"""How much each neuron of a dense model matters for each cluster of texts: what `moe-cpt score` writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lm_core.data import eval_rows
from lm_core.errors import InputError
from lm_core.head import chunked_cross_entropy
from lm_core.method import IGNORE
from lm_core.models import load_model, load_tokenizer
from moe_cpt.models import source_folder
from moe_cpt.options.splits import ScoreConfig
from moe_cpt.targets import require_free
from moe_cpt.tensors import require_swiglu

# C clusters, L layers, M neurons, B samples, T tokens
Kernel = Literal["plain", "l1_norm", "l2_norm"]
Level = Literal["sample", "total"]
Kind = Literal["feature_grad", "feature_change"]
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {"plain": lambda g: g, "l1_norm": torch.abs, "l2_norm": torch.square}


def score_clusters(config: ScoreConfig) -> dict[str, Any]:
    """Score and write; what was read. Raises InputError for a folder without clusters."""
    require_free("save_path", config.save_path, config.overwrite)
    files = sorted(config.dataset.glob("*.jsonl"), key=lambda path: (len(path.stem), path.stem))
    if not files:
        raise InputError(f"dataset: {config.dataset} holds no .jsonl files; write them with moe-cpt cluster-text")
    folder = str(source_folder(config.model_name_or_path))
    dense = load_model(folder).train(False)
    require_swiglu(dense.config.to_dict(), config.model_name_or_path)
    tokenizer = load_tokenizer(folder)
    clusters = [cluster_rows(path, config, tokenizer) for path in files]
    write_scores(
        config.save_path,
        score(dense, clusters, kernel=config.kernel, level=config.accumulate_level, kind=config.importance_type),
    )
    samples = [sum(len(ids) for ids in rows) for rows in clusters]
    return {"save_path": str(config.save_path), "clusters": len(files), "samples": samples}


def cluster_rows(path: Path, config: ScoreConfig, tokenizer: Any) -> list[Tensor]:
    """Token ids of a cluster's samples, `batch_size` of them at a time; a cluster of less than one sample gives a shorter one."""
    options = SimpleNamespace(eval_data=[str(path)], text_column=config.text_column, max_length=config.max_length, packing="stream")
    (rows,) = eval_rows(options, tokenizer).values()
    most = -(-int(config.max_tokens) // config.max_length) or len(rows)
    samples = [torch.as_tensor(rows[k]["input_ids"]) for k in range(min(most, len(rows)))]
    whole = [sample for sample in samples if len(sample) == config.max_length] or samples[:1]
    return [torch.stack(whole[at : at + config.batch_size]) for at in range(0, len(whole), config.batch_size)]


def score(dense: Any, clusters: Sequence[Sequence[Tensor]], *, kernel: Kernel, level: Level, kind: Kind) -> dict[str, Tensor]:
    """`layers.{i}.{up_proj,gate_proj}`, C x M float32, from rows of token ids (B x T) of every cluster.

    v_c[i] = (1/n_c) sum over samples of k(g_i) for the level `sample`, k of the mean of g_i for `total`; g_i = sum over tokens of
    dCE/dh_i (feature_grad) or h_i dCE/dh_i (feature_change), the mean cross entropy of the sample. h is silu(gate) * up for
    up_proj and the gate before its activation for gate_proj.
    """
    apply = KERNELS[kernel]
    found: dict[str, list[Tensor]] = {}
    for rows in clusters:
        sums: dict[str, Tensor] = {}
        for ids in rows:
            for name, each in sample_gradients(dense, ids, kind).items():
                part = (apply(each) if level == "sample" else each).double().sum(0)
                sums[name] = sums[name] + part if name in sums else part
        count = sum(len(ids) for ids in rows)
        for name, total in sums.items():
            mean = total / count
            found.setdefault(name, []).append(mean if level == "sample" else apply(mean))
    return {name: torch.stack(values).float() for name, values in found.items()}


def sample_gradients(dense: Any, ids_BT: Tensor, kind: Kind) -> dict[str, Tensor]:
    """g of every neuron, projection and sample: `layers.{i}.{projection}` -> B x M."""
    with _kept(dense) as kept:
        inputs = dense.get_input_embeddings()(ids_BT).detach().requires_grad_()
        hidden = dense.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        targets = torch.nn.functional.pad(ids_BT[:, 1:], (0, 1), value=IGNORE)
        # rows are independent, so each row's gradient is that of its own mean
        loss = chunked_cross_entropy(hidden.flatten(0, 1), dense.get_output_embeddings().weight, targets.flatten())
        values = list(kept.values())
        gradients = torch.autograd.grad(loss / (ids_BT.shape[1] - 1), values)
    with torch.no_grad():
        return {
            name: (gradient if kind == "feature_grad" else gradient * value).sum(1)
            for name, value, gradient in zip(kept, values, gradients)
        }


@contextmanager
def _kept(dense: Any) -> Iterator[dict[str, Tensor]]:
    """The hidden values of all feed-forward layers (B x T x M) of the forward passes inside, with their graph; weights need no gradient."""
    kept: dict[str, Tensor] = {}
    trained = [parameter for parameter in dense.parameters() if parameter.requires_grad]
    hooks = []

    def of_output(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: kept.__setitem__(name, output)

    def of_input(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda module, inputs: kept.__setitem__(name, inputs[0])

    for layer, block in enumerate(dense.model.layers):
        hooks.append(block.mlp.gate_proj.register_forward_hook(of_output(f"layers.{layer}.gate_proj")))
        hooks.append(block.mlp.down_proj.register_forward_pre_hook(of_input(f"layers.{layer}.up_proj")))
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def write_scores(path: Path, scores: dict[str, Tensor]) -> None:
    """The file that the gradient and residual splits read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in scores.items()}, path)
