"""`lowrank-opt bench`: what the optimizers cost and how exact they are, each figure beside its target.

Both sides of a ratio run in one process in turns, and times are those of the processor over all threads, so that
other work on the machine disturbs them little.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm_core.engine.state import optimizer_tensors, write_json, write_tensors
from lm_core.errors import ConfigError
from lm_core.figures import Figure, in_turns, optional, ratio, report
from lowrank_opt import AdamW, AdamW8bit, GaLoreAdamW, GaLoreAdamW8bit, LDAdamW, QGaLoreAdamW8bit
from lowrank_opt.commands import BenchConfig
from lowrank_opt.projector import basis, gaussian, project
from lowrank_opt.quant import code_book

Shapes = tuple[tuple[int, int], ...]

REFRESHED = {(1024, 2736): 256, (2048, 5461): 512}
# The matrices of one layer of SmolLM2-135M: q, k, v, o, gate, up, down.
LAYER: Shapes = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepper(make: Callable[[Any], torch.optim.Optimizer], shape: tuple[int, int]) -> Callable[[], Any]:
    """A step of an optimizer over one matrix, whose gradient stays."""
    weight = nn.Parameter(numbers(*shape))
    weight.grad = numbers(*shape, seed=1)
    optimizer = make(weight)
    optimizer.step()
    return optimizer.step


def spectral(shape: tuple[int, int], power: float, seed: int = 0) -> Tensor:
    """A matrix with singular values k^-power."""
    rows, columns = shape
    small = min(rows, columns)
    left, right = (torch.linalg.qr(numbers(size, small, seed=seed + n)).Q for n, size in enumerate((rows, columns)))
    matrix: Tensor = (left * torch.arange(1, small + 1) ** -power) @ right.t()
    return matrix


def adam_8bit(config: BenchConfig) -> Iterator[Figure]:
    shape = (2048, 2048)
    ours = stepper(lambda weight: AdamW8bit([weight]), shape)
    if (library := optional("bitsandbytes")) is not None:
        theirs = stepper(lambda weight: library.optim.AdamW8bit([weight], weight_decay=0.0), shape)
        yield Figure("C1", "AdamW8bit step 2048x2048 over that of bitsandbytes", ratio(ours, theirs, config.repeats), 0.15)
    fused = stepper(lambda weight: torch.optim.AdamW([weight], fused=True), shape)
    yield Figure("C2", "AdamW8bit step 2048x2048 over that of torch's fused AdamW", ratio(ours, fused, config.repeats), 3.0)


def galore_step(config: BenchConfig) -> Iterator[Figure]:
    shape, rank = (2048, 2048), 512
    ours = stepper(lambda weight: GaLoreAdamW([weight], rank=rank, update_proj_gap=10**9), shape)
    weight, gradient, projector = numbers(*shape), numbers(*shape, seed=1), numbers(rank, shape[1], seed=2)

    def products() -> None:
        low = projector @ gradient.t()
        weight.addmm_(low.t(), projector, alpha=-1e-9)

    yield Figure("C3", "GaLoreAdamW step 2048x2048 r 512 over its two products", ratio(ours, products, config.repeats), 1.25)


def refreshes(config: BenchConfig) -> Iterator[Figure]:
    for shape, rank in REFRESHED.items():
        gradient = spectral(shape, 0.5)
        for method in ("gram", "rsvd"):

            def ours(method: str = method, gradient: Tensor = gradient, rank: int = rank) -> Any:
                return basis(gradient, "left", rank, method, draw=gaussian(0, 0, 0))

            def exact(gradient: Tensor = gradient) -> Any:
                return torch.linalg.svd(gradient, full_matrices=False)

            what = f"refresh by {method}, {shape[0]}x{shape[1]} r {rank}, over a full SVD"
            yield Figure("C4", what, ratio(ours, exact, repeats=3, warm=1), 0.13)


def energies(config: BenchConfig) -> Iterator[Figure]:
    shape, rank = (1024, 2736), 256
    for power, least in ((0.5, 0.985), (1.0, 0.999)):
        gradient = spectral(shape, power)
        best = float((torch.arange(1, rank + 1, dtype=torch.float64) ** (-2 * power)).sum())
        for method, bound in (("rsvd", least), ("gram", 0.9999)):
            rows = basis(gradient, "left", rank, method, draw=gaussian(0, 0, 0))[0].double()
            caught = float(project(gradient.double(), (rows,), "left").square().sum())
            yield Figure("C5", f"energy caught by {method} over the most, spectrum k^-{power:g}", caught / best, bound, least=True)


def steadiness(config: BenchConfig) -> Iterator[Figure]:
    gap = 48
    weights = [nn.Parameter(numbers(512, 1376, seed=n)) for n in range(24)]
    for n, weight in enumerate(weights):
        weight.grad = numbers(512, 1376, seed=100 + n)
    optimizer = GaLoreAdamW(weights, rank=128, update_proj_gap=gap)
    optimizer.step()
    times = []
    for _ in range(2, 3 * gap + 1):
        began = time.process_time()
        optimizer.step()
        times.append(time.process_time() - began)
    what = "longest step over the median one, 24 matrices 512x1376 r 128, gap 48, staggered"
    yield Figure("C6", what, max(times) / median(times), 3.0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made while it is on."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def allocations(config: BenchConfig) -> Iterator[Figure]:
    shape = (1024, 2736)
    for dtype in (torch.float32, torch.bfloat16):
        for kind in (GaLoreAdamW, GaLoreAdamW8bit, QGaLoreAdamW8bit, LDAdamW, AdamW8bit):
            weight = nn.Parameter(numbers(*shape).to(dtype))
            weight.grad = numbers(*shape, seed=1).to(dtype)
            optimizer = kind([weight]) if kind is AdamW8bit else kind([weight], rank=256)
            optimizer.step()
            state = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
            with Largest([weight, weight.grad, *state]) as seen:
                optimizer.step()
            what = f"largest new tensor in a step of {kind.__name__}, {str(dtype)[6:]}, over the matrix"
            yield Figure("C7", what, seen.elements / weight.numel(), 1.0 - 1e-9)


def file_sizes(config: BenchConfig) -> Iterator[Figure]:
    named = {f"layers.{n}.weight": nn.Parameter(numbers(512, 1376, seed=n)) for n in range(8)}
    for weight in named.values():
        weight.grad = numbers(512, 1376)
    for kind in (GaLoreAdamW8bit, QGaLoreAdamW8bit, LDAdamW):
        optimizer = kind([{"params": list(named.values()), "param_names": list(named), "rank": 128}])
        optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            tensors, info = optimizer_tensors(optimizer, named)
            write_tensors(Path(folder) / "optimizer.safetensors", tensors)
            write_json(Path(folder) / "optimizer.json", info)
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
        yield Figure("C8", f"saved optimizer over its state in memory, {kind.__name__}", size / optimizer.state_bytes(), 1.02)


def drift(config: BenchConfig) -> Iterator[Figure]:
    """How far 8-bit moments lead from float32 ones."""
    shape = (1024, 512)
    start = numbers(*shape, seed=3) * 0.02
    directions = torch.linalg.qr(numbers(shape[1], shape[1])).Q.t()
    for power in (0.5, 1.0, 1.5):
        values = torch.arange(1, shape[1] + 1) ** -power
        gradients = [(numbers(*shape, seed=10 + n) * values) @ directions for n in range(50)]
        exact, coarse = (trained(lambda w, k=kind: k([w], lr=1e-2, rank=128), start, gradients) for kind in (GaLoreAdamW, GaLoreAdamW8bit))  # type: ignore[misc]
        value = float((coarse - exact).norm() / (exact - start).norm())
        yield Figure("C9", f"8-bit from float32 GaLore after 50 steps, spectrum k^-{power:g}", value, 0.03)
    scales = torch.exp(2 * numbers(64, 1024))
    start = numbers(64, 1024, seed=1)
    gradients = [scales * numbers(64, 1024, seed=10 + n) for n in range(100)]
    exact, coarse = (trained(lambda w, k=kind: k([w], lr=1e-3), start, gradients) for kind in (AdamW, AdamW8bit))  # type: ignore[misc]
    value = float((coarse - exact).abs().mean() / (exact - start).abs().mean())
    yield Figure("C10", "8-bit from float32 AdamW after 100 steps over many scales", value, 0.30)


def trained(make: Callable[[Any], torch.optim.Optimizer], start: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    weight = nn.Parameter(start.clone())
    optimizer = make(weight)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    return weight.detach()


def galore_pair(
    library: Any, shapes: Shapes, dtype: torch.dtype, rank: int, gap: int, **settings: Any
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Ours (with `settings`) and galore-torch's optimizer over equal matrices that have a gradient."""

    def weights() -> list[nn.Parameter]:
        found = [nn.Parameter(numbers(*shape, seed=n).to(dtype)) for n, shape in enumerate(shapes)]
        for n, weight in enumerate(found):
            weight.grad = numbers(*weight.shape, seed=100 + n).to(dtype)
        return found

    group = {"params": weights(), "rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW(weights(), rank=rank, update_proj_gap=gap, **settings), library.GaLoreAdamW([group], no_deprecation_warning=True)


def beside_galore_torch(config: BenchConfig) -> Iterator[Figure]:
    """Whole gaps of ours and theirs, refreshes included: the same matrices, rank and gap."""
    library = optional("galore_torch")
    if library is None:
        return
    gap, rank = 50, 128
    shapes = ((576, 576), (576, 1536), (1536, 576))
    pair = galore_pair(library, shapes, torch.float32, rank, gap)
    fast, _ = galore_pair(library, shapes, torch.float32, rank, gap, proj_dtype="bf16", proj_method="subspace")

    def steps(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(gap):
            optimizer.step()

    weights = [weight.detach().clone() for weight in pair[0].param_groups[0]["params"]]
    gradients = [weight.grad for weight in pair[0].param_groups[0]["params"]]
    bases = [numbers(rank, min(weight.shape), seed=9) for weight in weights]

    def products() -> None:
        for _ in range(gap):
            for weight, gradient, rows in zip(weights, gradients, bases, strict=True):
                tall = weight.shape[0] >= weight.shape[1]
                low = rows @ (gradient.t() if tall else gradient)
                weight.addmm_(*((low.t(), rows) if tall else (rows.t(), low)), alpha=-1e-9)

    ours, theirs, fastest, least = in_turns([*(partial(steps, optimizer) for optimizer in (*pair, fast)), products], repeats=3, warm=1)
    what = f"galore-torch over GaLoreAdamW with its defaults, {gap} steps with one refresh each, 3 matrices of smollm2-135m, r {rank}"
    yield Figure("galore-torch", what, theirs / ours, 3.0, least=True, floor=theirs / least)
    yield Figure("galore-torch", "the same with --proj-dtype bf16 --proj-method subspace on our side", theirs / fastest, 3.0, least=True)


def exactness(config: BenchConfig) -> Iterator[Figure]:
    """What is equal to a library or a formula, and the 8-bit GaLore that runs here."""
    if (library := optional("galore_torch")) is not None:
        yield Figure("parity", "largest difference from galore-torch's AdamW, 22 steps with 5 refreshes", largest_difference(library), 1e-6)
    if (functional := optional("bitsandbytes.functional")) is not None:
        pairs = [(code_book(signed), functional.create_dynamic_map(signed=signed)) for signed in (True, False)]
        apart = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
        yield Figure("codes", "largest difference of the code books from those of bitsandbytes", apart, 1e-7)
    for kind in (AdamW, AdamW8bit, GaLoreAdamW, GaLoreAdamW8bit, QGaLoreAdamW8bit, LDAdamW):
        weight = nn.Parameter(numbers(96, 160).bfloat16())
        weight.grad = torch.ones_like(weight)
        optimizer = kind([{"params": [weight], **({} if kind in (AdamW, AdamW8bit) else {"rank": 32})}])
        optimizer.step()
        apart = abs(optimizer.state_bytes() - optimizer.predicted_state_bytes())
        yield Figure("bytes", f"bytes of state that the closed form misses, {kind.__name__}", apart, 0)
    if library is not None:
        yield Figure("galore8bit", "8-bit GaLore updates on this device: ours", float(updates(GaLoreAdamW8bit)), 1, least=True)
        yield Figure("galore8bit", "the same of galore-torch", float(updates(library.GaLoreAdamW8bit)))


def largest_difference(library: Any) -> float:
    """Between our compat mode and galore-torch, over tall and wide matrices whose gradients have clear directions."""
    found = []
    for shape in ((96, 40), (40, 96)):
        ours, theirs = nn.Parameter(numbers(*shape)), nn.Parameter(numbers(*shape))
        settings = {"rank": 8, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
        mine = GaLoreAdamW([{"params": [ours], **settings}], lr=1e-2, weight_decay=0.1, compat="galore_torch")
        reference = library.GaLoreAdamW([{"params": [theirs], **settings}], lr=1e-2, weight_decay=0.1, no_deprecation_warning=True)
        for step in range(22):
            ours.grad = theirs.grad = spectral(shape, 1.0, seed=10 * step)
            mine.step()
            reference.step()
        found.append(float((ours - theirs).detach().abs().max()))
    return max(found)


def updates(kind: Callable[[Any], torch.optim.Optimizer]) -> bool:
    """Whether an optimizer changes a weight here; galore-torch's 8-bit one needs a library and a device of its own."""
    weight = nn.Parameter(numbers(96, 160))
    before, weight.grad = weight.detach().clone(), numbers(96, 160, seed=1)
    group = {"params": [weight], "rank": 32, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
    try:
        kind([group]).step()
    except Exception:
        # whatever a foreign library raises, it does not work here
        return False
    return weight.shape == before.shape and not torch.equal(weight, before)


# Hidden and inner size of a preset, and ranks: that of its recipe, and a quarter of the hidden size.
GRID = {
    "llama_60m": (512, 1376, (128,)),
    "llama_130m": (768, 2048, (192, 256)),
    "llama_350m": (1024, 2736, (256,)),
    "llama_1b": (2048, 5461, (512,)),
    "llama_7b": (4096, 11008, (1024,)),
}
GAPS = (50, 100, 200, 500, 1000)


Configurations = dict[str, dict[str, str]]
FAST: Configurations = {"bf16 products and subspace": {"proj_dtype": "bf16", "proj_method": "subspace"}}


def grid_beside_galore_torch(name: str, config: BenchConfig) -> Iterator[Figure]:
    """Whole gaps of theirs over ours for a layer of a preset (four square matrices, two tall ones and a wide one), from the times of a step
    and of one with a refresh: a gap has T - 1 of the former and one of the latter."""
    library = optional("galore_torch")
    if library is None:
        return
    for rank in GRID[name][2]:
        times = layer_times(library, name, rank, config.repeats, {"GaLoreAdamW": {}, **FAST})
        for gap in GAPS:
            for label, value in ratios(times, gap).items():
                yield Figure(
                    f"grid-{name}", f"galore-torch over {label}, a layer of {name}, float32, r {rank}, {gap} steps with one refresh", value
                )


def recipe_beside_galore_torch(config: BenchConfig) -> Iterator[Figure]:
    """The same at the rank and gap of llama_1b's recipe, for our fast configuration."""
    library = optional("galore_torch")
    if library is None:
        return
    rank, gap = 512, 200
    fastest, least = ratios(layer_times(library, "llama_1b", rank, repeats=3, configurations=FAST), gap).values()
    settings = "--proj-dtype bf16 --proj-method subspace"
    what = f"galore-torch over GaLoreAdamW with {settings}, {gap} steps with one refresh, a layer of llama_1b, r {rank}"
    yield Figure("galore-torch", what, fastest, 3.0, least=True)
    yield Figure("galore-torch", "the same over the two float32 products of each step alone", least)


def ratios(times: dict[str, tuple[float, float]], gap: int) -> dict[str, float]:
    """A gap of galore-torch over those of the others."""
    theirs, *others = ((gap - 1) * step + refresh for step, refresh in times.values())
    return {label: theirs / seconds for label, seconds in zip(list(times)[1:], others, strict=True)}


def layer_times(library: Any, name: str, rank: int, repeats: int, configurations: Configurations) -> dict[str, tuple[float, float]]:
    """What `step_and_refresh` finds, summed over the matrices of a layer of a preset."""
    hidden, inner, _ = GRID[name]
    total: dict[str, tuple[float, float]] = {}
    for count, shape in ((4, (hidden, hidden)), (2, (inner, hidden)), (1, (hidden, inner))):
        for label, (step, refresh) in step_and_refresh(library, shape, rank, repeats, configurations).items():
            before = total.get(label, (0.0, 0.0))
            total[label] = before[0] + count * step, before[1] + count * refresh
    return total


def step_and_refresh(
    library: Any, shape: tuple[int, int], rank: int, repeats: int, configurations: Configurations
) -> dict[str, tuple[float, float]]:
    """Seconds of a step without and with a refresh: galore-torch's, ours in each configuration, and those of the two float32 products of a
    step alone (twice)."""
    _, theirs = galore_pair(library, (shape,), torch.float32, rank, gap=10**9)
    ours = [galore_pair(library, (shape,), torch.float32, rank, gap=10**9, **settings)[0] for settings in configurations.values()]
    weight, rows = numbers(*shape), numbers(rank, min(shape), seed=9)
    tall = shape[0] >= shape[1]
    gradient = numbers(*shape, seed=100)

    def products() -> None:
        low = rows @ (gradient.t() if tall else gradient)
        weight.addmm_(*((low.t(), rows) if tall else (rows.t(), low)), alpha=-1e-9)

    def refreshed(optimizer: Any) -> None:
        optimizer.refresh(now=False)
        optimizer.step()

    # a first step decomposes, and beside that its new moments cost nothing
    decomposed = in_turns([theirs.step], repeats=1, warm=0)
    for optimizer in ours:
        optimizer.step()
    steps = in_turns([theirs.step, *(optimizer.step for optimizer in ours), products], repeats, warm=1)
    refreshes = in_turns([partial(refreshed, optimizer) for optimizer in ours], repeats=1 if min(shape) > 1024 else 3, warm=0)
    labels = ("galore-torch", *configurations, "the two products alone")
    return dict(zip(labels, zip(steps, [*decomposed, *refreshes, steps[-1]], strict=True), strict=True))


def bfloat16_beside_galore_torch(config: BenchConfig) -> Iterator[Figure]:
    """Steps of bfloat16 weights without a refresh."""
    library = optional("galore_torch")
    if library is None:
        return
    shapes, rank = 2 * LAYER, 128
    ours, theirs = galore_pair(library, shapes, torch.bfloat16, rank, gap=10**9)
    what = f"GaLoreAdamW over galore-torch, bfloat16, a step without refresh, {len(shapes)} matrices of smollm2-135m, r {rank}"
    yield Figure("galore-bf16", what, ratio(ours.step, theirs.step, config.repeats), 1.0)


def both_beside_galore_torch(config: BenchConfig) -> Iterator[Figure]:
    yield from beside_galore_torch(config)
    yield from recipe_beside_galore_torch(config)


MEASUREMENTS: dict[str, Callable[[BenchConfig], Iterator[Figure]]] = {
    "C1": adam_8bit,
    "C2": adam_8bit,
    "C3": galore_step,
    "C4": refreshes,
    "C5": energies,
    "C6": steadiness,
    "C7": allocations,
    "C8": file_sizes,
    "C9": drift,
    "C10": drift,
    "parity": exactness,
    "codes": exactness,
    "bytes": exactness,
    "galore8bit": exactness,
    "galore-torch": both_beside_galore_torch,
    "galore-bf16": bfloat16_beside_galore_torch,
}
# Takes minutes and has no target: only where it is asked for.
GRIDS = {f"grid-{name}": partial(grid_beside_galore_torch, name) for name in GRID}


def run(config: BenchConfig) -> dict[str, Any]:
    """Print each figure of the suite with its target as it is measured. Raises ConfigError for the suite of a device that is absent."""
    if config.suite == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("suite: cuda needs a GPU, and torch sees none; use --suite cpu, or install a CUDA build of torch")
        from lowrank_opt import bench_cuda

        return report(bench_cuda.MEASUREMENTS, config, only=config.only, threads=config.threads)
    return report(MEASUREMENTS | (GRIDS if config.only else {}), config, only=config.only, threads=config.threads)
