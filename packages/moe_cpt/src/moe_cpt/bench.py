"""`moe-cpt bench`: the layer beside a loop over experts and stock Mixtral, reading, splits; each figure beside its target."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm_core.figures import Figure, in_turns, optional, report
from moe_cpt.hf.configuration_llama_moe import LlamaMoEConfig
from moe_cpt.model import LlamaMoEForCausalLM, MoEBlock
from moe_cpt.options.checks import BenchConfig
from moe_cpt.router_init import expert_norms, solved
from moe_cpt.routing import Router, gate
from moe_cpt.split.activation import layer_split
from moe_cpt.split.clustering import by_label
from moe_cpt.split.kmeans import balanced_kmeans
from moe_cpt.split.random import permutation

# T tokens, D hidden size, N experts, K of them for a token, E neurons of each
TOKENS, HIDDEN, EXPERTS, SELECTS, SIZE = 2048, 1024, 16, 4, 176
# forward and twice that backward
FLOPS = 3 * 2 * TOKENS * SELECTS * 3 * HIDDEN * SIZE
# weights are read twice and their gradients written; x goes in three times, y and dx out; forward's inner values go out and in again
ELEMENTS = 3 * 3 * EXPERTS * HIDDEN * SIZE + 5 * TOKENS * HIDDEN + 2 * 4 * TOKENS * SELECTS * SIZE
# what `train` updates, on that many rows of tokens
MIXTURE: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8,
}  # fmt: skip
ROWS = (4, 256)
SHAPE = {"T": TOKENS, "d": HIDDEN, "N": EXPERTS, "K": SELECTS, "e": SIZE}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class LoopBlock(nn.Module):
    """The same layer with a parameter for every matrix of every expert, and a loop over the experts."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.weight_gate, self.weight_up = (
            nn.ParameterList([torch.empty(config.expert_size, config.hidden_size) for _ in range(config.num_experts)]) for _ in range(2)
        )
        self.weight_down = nn.ParameterList([torch.empty(config.hidden_size, config.expert_size) for _ in range(config.num_experts)])

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD, k = x_BTD.flatten(0, 1), self.config.num_selects
        said = gate(self.router(x_TD, False)[0], k)
        flat, order = said.experts_RK.flatten().sort()
        token = order.div(k, rounding_mode="floor")
        sizes = flat.bincount(minlength=self.config.num_experts).tolist()
        outputs = []
        for expert, rows in enumerate(x_TD.index_select(0, token).split(sizes)):
            h = F.silu(F.linear(rows, self.weight_gate[expert])) * F.linear(rows, self.weight_up[expert])
            outputs.append(F.linear(h, self.weight_down[expert]))
        score = said.score_RK.flatten().index_select(0, order)[:, None] * self.config.scale_of(0)
        y_TD = torch.zeros_like(x_TD).index_add(0, token, torch.cat(outputs) * score.to(x_TD.dtype))
        return y_TD.view_as(x_BTD)


def blocks(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ours, the loop and Mixtral's, with the same weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = LlamaMoEConfig(
        hidden_size=HIDDEN, intermediate_size=EXPERTS * SIZE, num_hidden_layers=1, num_attention_heads=16, num_experts=EXPERTS,
        num_selects=SELECTS, gate_network="linear", gate_add_noise=False, score_scale_factor=1.0, experts_backend="fused",
    )  # fmt: skip
    stock = MixtralConfig(hidden_size=HIDDEN, intermediate_size=SIZE, num_local_experts=EXPERTS, num_experts_per_tok=SELECTS)
    stock._experts_implementation = "grouped_mm"
    ours, loop, mixtral = MoEBlock(config, 0), LoopBlock(config), cast(Any, MixtralSparseMoeBlock)(stock)
    router, gate_up = numbers(EXPERTS, HIDDEN, seed=1) / 32, numbers(EXPERTS, 2 * SIZE, HIDDEN, seed=2) / 32
    down = numbers(EXPERTS, HIDDEN, SIZE, seed=3) / 13
    with torch.no_grad():
        for one in (ours.router.proj.weight, loop.router.proj.weight, mixtral.gate.weight):
            one.copy_(router)
        for block in (ours, mixtral):
            cast(Any, block).experts.gate_up_proj.copy_(gate_up)
            cast(Any, block).experts.down_proj.copy_(down)
        for expert in range(EXPERTS):
            loop.weight_gate[expert].copy_(gate_up[expert, :SIZE])
            loop.weight_up[expert].copy_(gate_up[expert, SIZE:])
            loop.weight_down[expert].copy_(down[expert])
    made = {"fused": ours, "loop": loop, "mixtral": mixtral}
    return {name: cast(Any, block.to(dtype)) for name, block in made.items()}


def outputs(block: Any, x_BTD: Tensor) -> Tensor:
    found = block(x_BTD)
    return cast(Tensor, found[0] if isinstance(found, tuple) else found)


def layer(config: BenchConfig) -> Iterator[Figure]:
    """Forward and backward of one mixture. Its floor is its arithmetic at the speed of one large product, or its bytes at that of a copy."""
    for dtype, of_loop, of_mixtral, of_products in ((torch.float32, 0.75, 0.90, 1.6), (torch.bfloat16, 0.55, 0.55, None)):
        x = numbers(1, TOKENS, HIDDEN).to(dtype).requires_grad_()
        dy, found = numbers(1, TOKENS, HIDDEN, seed=5).to(dtype), blocks(dtype)

        def both(block: Any, x: Tensor = x, dy: Tensor = dy) -> None:
            torch.autograd.grad(outputs(block, x), [x, *block.parameters()], dy)

        if dtype == torch.float32:
            # in bfloat16 Mixtral's router, which is not computed in float32, sends some tokens elsewhere
            require_equal(found, x)
        square, wide = numbers(2048, 2048).to(dtype), torch.ones(2, 2**25, dtype=dtype)
        jobs: list[Callable[[], Any]] = [*(partial(both, block) for block in found.values()), products(cast(LoopBlock, found["loop"]), x)]
        jobs += [partial(torch.mm, square, square), partial(wide[0].copy_, wide[1])]
        fused, loop, mixtral, bare, large, copy = in_turns(jobs, config.repeats, warm=2, chosen=min)
        speed, bandwidth = 2 * 2048**3 / large, wide.nbytes / copy
        floor = max(FLOPS / speed, ELEMENTS * dtype.itemsize / bandwidth)
        kind = str(dtype).removeprefix("torch.")
        ratios = (("loop", loop, of_loop), ("mixtral", mixtral, of_mixtral), ("products", bare, of_products), ("floor", floor, None))
        for baseline, seconds, target in ratios:
            details = {
                "shape": SHAPE, "dtype": kind, "device": "cpu", "backend": "fused", "time_ms": 1e3 * fused, "baseline": baseline,
                "baseline_ms": 1e3 * seconds,
            }  # fmt: skip
            what = f"fused layer over {BASELINES[baseline]}, {kind}: {1e3 * fused:.0f} of {1e3 * seconds:.0f} ms"
            if baseline == "floor":
                what += f", {FLOPS / 1e9:.1f} GFLOP at {speed / 1e9:.0f} GFLOP/s or {ELEMENTS * dtype.itemsize / 1e6:.0f} MB at {bandwidth / 1e9:.0f} GB/s"
            yield Figure("layer", what, fused / seconds, target, floor=None if baseline == "floor" else floor / seconds, details=details)
    found = blocks(torch.float32)
    ours, theirs = (saved(block) / TOKENS for block in (found["fused"], found["loop"]))
    what = f"elements that the layer saves for backward over the loop's, {ours:.0f} of {theirs:.0f} per token"
    yield Figure("layer", what, ours / theirs, 0.20)


@torch.no_grad()
def require_equal(found: dict[str, Callable[[Tensor], Tensor]], x: Tensor) -> None:
    first, *others = (outputs(block, x) for block in found.values())
    assert all(float((other - first).abs().max()) <= 1e-4 * float(first.abs().max()) for other in others)


BASELINES = {
    "loop": "a loop over a ParameterList per expert",
    "mixtral": "stock Mixtral with grouped_mm",
    "products": "its nine products per expert alone",
    "floor": "its floor",
}


def products(block: LoopBlock, x_BTD: Tensor) -> Callable[[], None]:
    """The nine matrix products of every expert that forward and backward need, on rows that lie ready."""
    counts = gate(block.router(x_BTD.flatten(0, 1), False)[0], SELECTS).count_N.int().tolist()
    rows = [(numbers(count, HIDDEN).to(x_BTD), numbers(count, SIZE).to(x_BTD)) for count in counts]

    @torch.no_grad()
    def run() -> None:
        for (x, h), gate_, up, down in zip(rows, block.weight_gate, block.weight_up, block.weight_down):
            for result in (x @ gate_.t(), x @ up.t(), h @ down.t(), x @ down, x.t() @ h, h @ gate_, h @ up, h.t() @ x, h.t() @ x):
                del result

    return run


def saved(block: Any) -> int:
    """Elements kept for backward beside the parameters; tensors that share memory count once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs(block, numbers(1, TOKENS, HIDDEN).requires_grad_())
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())


def data(config: BenchConfig) -> Iterator[Figure]:
    """Reading packed shards beside reading the tokenised JSONL they were packed from, and starting far into them."""
    from lm_core.data import Data
    from lm_core.data.loader import Loader
    from lm_core.data.pack import Stream
    from lm_core.data.shards import Document, ShardWriter, Source, key_of
    from lm_core.data.sources import read

    block, lengths = 2048, np.random.default_rng(0).integers(50, 2000, 2000)
    documents = [np.random.default_rng(n).integers(0, 32000, length) for n, length in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        file, shards = Path(folder) / "tokenised.jsonl", Path(folder) / "shards"
        file.write_text("".join(json.dumps({"input_ids": ids.tolist()}) + "\n" for ids in documents))
        with ShardWriter(shards, vocab_size=32000) as writer:
            for number, ids in enumerate(documents):
                writer.add(Document(ids, None, key_of(str(number))))
            writer.close(tokenizer_sha256="", source="bench")
        rows = Stream(Source.open(shards), block)
        made = Data(train={"bench": rows}, valid={}, weights={"bench": 1.0}, draw="keyed")

        def packed() -> None:
            for number in range(len(rows)):
                rows[number]

        def text() -> None:
            for row in read(file):
                np.asarray(row.fields["input_ids"], dtype=np.int64)

        fast, slow = in_turns([packed, text], config.repeats, warm=1, chosen=min)
        total = int(lengths.sum())
        what = f"tokens/s of packed shards over those of tokenised JSONL, {total / fast / 1e6:.0f}M of {total / slow / 1e6:.1f}M"
        yield Figure("data", what, (len(rows) * block / fast) / (total / slow), 10, least=True)
        worst = 0.0
        for step in (0, 10**3, 10**6, 10**9):
            loader = Loader(made, micro_batch=8, seed=1)
            state = loader.state_dict()
            # a state holds how many samples came from each source
            state |= {"step": step, "mix": {**state["mix"], "sample": 8 * step, "taken": [8 * step]}}
            loader.load_state_dict(state)
            began = time.perf_counter()
            next(loader)
            worst = max(worst, time.perf_counter() - began)
        yield Figure("data", "seconds to the first batch after resuming at step 0, 10^3, 10^6 or 10^9", worst, 1.0)


def split(config: BenchConfig) -> Iterator[Figure]:
    """Balanced k-means beside a library for it."""
    library = optional("k_means_constrained")
    if library is None:
        print("split: skipped, since k-means-constrained is not installed; pip install it, or the extra bench", file=sys.stderr)
        return
    rows = np.random.default_rng(0).standard_normal((8192, 576))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    costs: dict[str, float] = {}

    def ours() -> None:
        costs["ours"] = balanced_kmeans(rows, 16, seed=0)[1]

    def theirs() -> None:
        found = library.KMeansConstrained(n_clusters=16, size_min=512, size_max=512, n_init=1, random_state=0).fit(rows)
        costs["theirs"] = float(found.inertia_)

    fast, slow = in_turns([ours, theirs], 1, warm=0)
    yield Figure("split", f"balanced k-means over KMeansConstrained, 8192 x 576: {fast:.1f} of {slow:.1f} s", fast / slow, 0.5)
    yield Figure("split", "its inertia over that of KMeansConstrained", costs["ours"] / costs["theirs"], 1.01)


def construction(config: BenchConfig) -> Iterator[Figure]:
    """How much of a layer its mixture keeps before any training."""
    found = construction_errors()
    for (split, router), error in found.items():
        what = f"relative error of the {split} split with a {router} router"
        yield Figure("construction", what, error, details={"split": split, "router": router})
    good, chance = found["activation", "ridge"], found["random", "random"]
    what = f"relative error of activation split and ridge router over random ones, {good:.3f} of {chance:.3f}"
    yield Figure("construction", what, good / chance, 0.65, details={"split": "activation over random", "router": "ridge over random"})


def construction_errors() -> dict[tuple[str, str], float]:
    """By split and router: the relative error of the mixture of a made-up layer, both made on the first half of its inputs."""
    clustered = clustered_ffn()
    gate_, up, down, x = clustered
    h, fit = F.silu(x @ gate_.T) * (x @ up.T), slice(0, 2048)
    labels, _ = balanced_kmeans(F.normalize(up.double(), dim=1).numpy(), 16, seed=0)
    splits = {
        "random": permutation(512, 0, 0).view(16, 32),
        "clustering": by_label(torch.from_numpy(labels), 16),
        "activation": layer_split(h[fit], num_experts=16, num_shared=0, k_act=10, seed=0).routed,
    }
    errors: dict[tuple[str, str], float] = {}
    for name, parts in splits.items():
        z = expert_norms(h[fit], down, parts).clamp(min=1e-12).log()
        routers = {
            "random": 0.02 * numbers(64, 16, seed=9),
            "centroid": F.normalize(gate_, dim=1)[parts].mean(1).T,
            "ridge": solved((x[fit].T @ x[fit]).double(), (x[fit].T @ (z - z.mean(1, keepdim=True))).double()).float(),
        }
        errors |= {(name, router): relative_error(clustered, parts, x @ weight) for router, weight in routers.items()}
    return errors


def clustered_ffn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A SwiGLU layer (64 -> 512 -> 64) fitted to eight Gaussian clusters with a linear map each, and inputs."""
    centres, maps = 3 * numbers(8, 64, seed=1), numbers(8, 64, 64, seed=2) / 8
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 8, (4096,), generator=generator)
    x = centres[kind] + torch.randn(4096, 64, generator=generator)
    y = torch.einsum("td,tde->te", x, maps[kind])
    drawn = (numbers(512, 64, seed=3) / 8, numbers(512, 64, seed=4) / 8, numbers(64, 512, seed=5) / 23)
    weights = [part.requires_grad_() for part in drawn]
    optimizer = torch.optim.Adam(weights, lr=3e-3)
    for step in range(400):
        rows = slice(step % 8 * 512, step % 8 * 512 + 512)
        loss = (F.linear(F.silu(x[rows] @ weights[0].T) * (x[rows] @ weights[1].T), weights[2]) - y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gate_, up, down = (weight.detach() for weight in weights)
    return gate_, up, down, x


def relative_error(clustered: Sequence[Tensor], parts_NE: Tensor, logits_TN: Tensor, selects: int = 4) -> float:
    """Of the mixture with the best single factor, on the second half of the inputs."""
    gate_, up, down, x = clustered
    h = F.silu(x @ gate_.T) * (x @ up.T)
    each = torch.stack([h[:, part] @ down[:, part].T for part in parts_NE], dim=1)
    top = logits_TN.topk(selects)
    u = (each.gather(1, top.indices[:, :, None].expand(-1, -1, 64)) * top.values.softmax(1)[:, :, None]).sum(1)
    f = each.sum(1)
    scale = (u * f).sum() / (u * u).sum()
    return float((scale * u - f)[2048:].norm() / f[2048:].norm())


def train(config: BenchConfig) -> Iterator[Figure]:
    """Updates of a small mixture by every backend, and of the dense model with as many neurons."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = torch.randint(0, MIXTURE["vocab_size"], ROWS, generator=torch.Generator().manual_seed(0))
    mixtures = {
        backend: cast(Any, LlamaMoEForCausalLM)(LlamaMoEConfig(**MIXTURE, num_experts=16, num_selects=4, experts_backend=backend))
        for backend in ("fused", "grouped_mm", "loop")
    }
    models: dict[str, Any] = {**mixtures, "dense": cast(Any, LlamaForCausalLM)(LlamaConfig(**MIXTURE))}

    def update(model: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    jobs = [partial(update, model.train(), torch.optim.AdamW(model.parameters())) for model in models.values()]
    fused, *others = in_turns(jobs, config.repeats, warm=1, chosen=min)
    for name, seconds in zip([*models][1:], others):
        what = f"update of a small mixture (4 of 16) by fused over {name}, float32: {1e3 * fused:.0f} of {1e3 * seconds:.0f} ms"
        details = {"shape": MIXTURE, "dtype": "float32", "backend": "fused", "baseline": name, "tokens_per_second": ids.numel() / fused}
        yield Figure("train", what, fused / seconds, details=details)


MEASUREMENTS: dict[str, Callable[[BenchConfig], Iterator[Figure]]] = {
    "layer": layer,
    "data": data,
    "split": split,
    "construction": construction,
    "train": train,
}


def run(config: BenchConfig) -> dict[str, Any]:
    """Print each figure with its target as it is measured."""
    return report(MEASUREMENTS, config, only=config.only, threads=config.threads)
