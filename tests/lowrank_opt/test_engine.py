from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as torch_dist
from torch import nn

from lm_core.config import build
from lm_core.engine import make_engine
from lm_core.errors import RunFailed
from lm_core.method import Batch, Method
from lm_core.testing import spawn
from lowrank_opt import GaLoreAdamW, exchange, galore
from lowrank_opt.config import TrainConfig
from lowrank_opt.engine import LowRankReduction, digest
from lowrank_opt.exchange import Exchange, buckets
from lowrank_opt.method import LowRank

STEPS, GAP, RANK = 8, 4, 8
# rows x columns, tall and wide; the last has too few columns to be projected
SHAPES = ((48, 32), (32, 80), (40, 40), (64, 4))


class Linear(LowRank):
    """Sums over samples of <W, G>: the gradient of sample n at step t is a given matrix with a clear leading space."""

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Module()
        module.weights = nn.ParameterList([nn.Parameter(0.1 * torch.randn(shape)) for shape in SHAPES])
        self.module = module
        self.low_rank = frozenset(f"weights.{n}" for n in range(len(SHAPES)))
        return module

    def losses(self, model: nn.Module, batch: Batch) -> Any:
        raise NotImplementedError


def gradient(shape: tuple[int, int], step: int, sample: int) -> torch.Tensor:
    """Eight directions that the samples of a step share and mix each in its own way, far above the rest."""
    generator = torch.Generator().manual_seed(1000 * step + shape[0])
    own = torch.Generator().manual_seed(1000 * step + sample + 1)
    small = min(RANK, *shape)
    left, right = (torch.linalg.qr(torch.randn(size, small, generator=generator))[0] for size in shape)
    mixed = torch.diag(1 - 0.08 * torch.arange(small)) + 0.02 * torch.randn(small, small, generator=own)
    return left @ mixed @ right.t() + 1e-4 * torch.randn(shape, generator=own)


class Trained(NamedTuple):
    """Weights after STEPS updates in which a rank had its share of the samples; by update the norm and the bytes reduced; and the state
    tensors of each parameter at the end, with the bytes that the optimizer says it has and predicted."""

    weights: dict[str, torch.Tensor]
    norms: list[float]
    sent: list[int]
    held: dict[str, set[str]]
    bytes: tuple[int, int]


def trained(rank: int, world: int, samples: int = 4, folder: Path | None = None, begun: Path | None = None, **values: Any) -> Trained:
    """One rank of a run.

    A rank's samples are back-propagated one by one, or in `accumulate` parts. With a `folder` the run is saved there half way, and goes on in a new engine that loads it; `begun` is such a folder to start from.
    """
    values = {"optimizer": "galore", "galore": {"rank": RANK, "update_proj_gap": GAP, "proj_method": "gram"}, **values}
    options = {"mode": "pretraining", "model": "llama_test", "lr": 0.01, "precision": "fp32", "weight_decay": 0.1, **values}
    method: Method = Linear(build(TrainConfig, options))
    model = method.build()
    engine = make_engine(method.config, method, model, torch.device("cpu"))
    sent: list[int] = []
    original = torch_dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
        sent[-1] += tensor.numel() * tensor.element_size()
        return original(tensor, *args, **more)

    torch_dist.all_reduce = counted
    norms = []
    if begun is not None:
        engine.load(begun)
    for step in range(STEPS // 2 if begun else 0, STEPS):
        sent.append(0)
        if folder is not None and step == STEPS // 2:
            if rank == 0:
                folder.mkdir()
            engine.save(folder)
            engine = make_engine(method.config, method, method.build(), torch.device("cpu"))
            engine.load(folder)
        engine.start(0.01)
        mine = list(range(rank, samples, world))
        size = len(mine) // values.get("accumulate", len(mine))
        for start in range(0, len(mine), size):
            weights = list(engine.trained.values())  # type: ignore[attr-defined]
            terms = [(w * gradient(tuple(w.shape), step, sample)).sum() for w in weights for sample in mine[start : start + size]]
            engine.backward(sum(terms) / samples)  # type: ignore[arg-type]
        norm = engine.step()
        assert norm is not None
        norms.append(norm)
    torch_dist.all_reduce = original
    optimizer: Any = engine.optimizer
    parameters: dict[str, nn.Parameter] = engine.trained  # type: ignore[attr-defined]
    held = {
        name: {key for key, value in optimizer.state.get(p, {}).items() if isinstance(value, torch.Tensor)}
        for name, p in parameters.items()
    }
    weights = {name: p.detach() for name, p in parameters.items()}
    return Trained(weights, norms, sent, held, (optimizer.state_bytes(), optimizer.predicted_state_bytes()))


def in_a_process(**values: Any) -> Trained:
    return trained(torch_dist.get_rank(), torch_dist.get_world_size(), **values)


# what an owner has to do at a refresh, and blocks of moments in 8 bits
TRANSFERRED: dict[str, Any] = {
    "optimizer": "galore8bit",
    "galore": {"rank": RANK, "update_proj_gap": GAP, "proj_method": "gram", "moment_transfer": "project", "min_8bit_size": 500},
}
OWNED = ("galore8bit", "fira", "muon", "ldadam")
# codes jump by what float32 leaves open
CLOSE_8BIT = 2e-4
LOWRANK: dict[str, dict[str, Any]] = {
    "transferred": TRANSFERRED,
    "clipped": {"grad_clip": 0.5},
    "dense": {"optimizer": "baseline", "galore": {}},
    # with several buckets in each backward
    "layers": {"per_layer": True, "accumulate": 1},
    "layers, micro-batches": {"per_layer": True, "accumulate": 2, "grad_clip": 0.5},
    "layers, owned": {"per_layer": True, "accumulate": 2, "grad_clip": 0.5, "shard_optimizer": True},
    "lowrank": {},
}


def several(folder: Path) -> list[Any]:
    """All that is asked of two processes, in one launch."""
    computed = []
    original = galore.basis
    galore.basis = lambda *args, **more: computed.append(1) or original(*args, **more)
    replicated = in_a_process(engine="replicated", verify_replicas_every=1)
    galore.basis = original
    found = {"replicated": replicated.weights}
    for optimizer in OWNED:
        options: dict[str, Any] = {"optimizer": optimizer, "galore": {"rank": RANK} if optimizer != "muon" else {}}
        found[optimizer] = in_a_process(engine="replicated", **options).weights
        found[optimizer + " owned"] = in_a_process(
            shard_optimizer=True, verify_replicas_every=3, folder=folder / optimizer, **options
        ).weights
    for method in ("gram", "svd"):
        found[f"redundancy {method}"] = zero_redundancy(method, library=True)
    low: list[int] = []
    exchange.BUCKET_BYTES = 3000
    for name, more in LOWRANK.items():
        run = in_a_process(engine="lowrank", verify_replicas_every=2, **more)
        found[name], low = run.weights, run.sent
        found[name + " norms"] = torch.tensor(run.norms)
    for what in ("weight", "proj"):
        with pytest.raises(RunFailed, match=rf"the {what} of weights.1 differs between rank . and rank"):
            drifting(what)
    owned = in_a_process(engine="lowrank", shard_optimizer=True, verify_replicas_every=3, folder=folder / "lowrank", **TRANSFERRED)
    later = in_a_process(engine="lowrank", shard_optimizer=True, begun=folder / "alone", **TRANSFERRED)
    found |= {"lowrank owned": owned.weights, "lowrank later": later.weights}
    not_finite_on_one_rank()
    return [found, replicated.sent, low, len(computed), owned]


def zero_redundancy(method: str, library: bool) -> dict[str, torch.Tensor]:
    """Steps of GaLoreAdamW by itself, or dealt out by torch's ZeroRedundancyOptimizer, which numbers the parameters of a rank anew."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    settings: dict[str, Any] = {"lr": 0.01, "rank": RANK, "update_proj_gap": GAP, "proj_method": method, "stagger": False}
    if library:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(weights, optimizer_class=GaLoreAdamW, **settings)
    else:
        optimizer = GaLoreAdamW(weights, **settings)
    for step in range(STEPS):
        for weight in weights:
            weight.grad = gradient(tuple(weight.shape), step, 0)
        optimizer.step()
    return {str(n): weight.detach() for n, weight in enumerate(weights)}


def not_finite_on_one_rank() -> None:
    """A gradient that one rank cannot use stops both, by name."""
    values = {"optimizer": "galore", "galore": {"rank": RANK}, "precision": "fp32", "engine": "lowrank", "per_layer": True}
    method = Linear(build(TrainConfig, {"mode": "pretraining", "model": "llama_test", **values}))
    engine: Any = make_engine(method.config, method, method.build(), torch.device("cpu"))

    def stepped(step: int, factor: float) -> None:
        terms = [(w * gradient(tuple(w.shape), step, 0)).sum() * (factor if n == 1 else 1.0) for n, w in enumerate(engine.trained.values())]
        engine.backward(sum(terms))
        engine.step()

    stepped(0, 1.0)
    with pytest.raises(RunFailed, match=r"weights\.1"):
        stepped(1, float("nan") if torch_dist.get_rank() else 1.0)


def drifting(what: str) -> None:
    options = {
        "mode": "pretraining", "model": "llama_test", "optimizer": "galore", "precision": "fp32", "galore": {"rank": RANK},
        "verify_replicas_every": 2,
    }  # fmt: skip
    method = Linear(build(TrainConfig, options))
    engine: Any = make_engine(method.config, method, method.build(), torch.device("cpu"))
    weight = engine.trained["weights.1"]
    for step in range(2):
        for p in engine.trained.values():
            p.grad = gradient(tuple(p.shape), 0, 0)
        if step:
            changed = {"weight": weight.detach(), "proj": engine.optimizer.state[weight]["proj"]}[what]
            changed[0, 0] += 1e-3 * torch_dist.get_rank()
            if what == "weight":
                engine.trained["weights.3"].data[0, 0] += torch_dist.get_rank()
        # another basis makes another weight
        engine.start(0.0)
        engine.step()


def test_two_processes_equal_one_and_send_little(tmp_path: Path) -> None:
    begun = trained(0, 1, engine="lowrank", folder=tmp_path / "alone", **TRANSFERRED)
    (first, dense, low, computed, owned), (second, _, _, others, owned_too) = spawn(several, tmp_path)
    # three matrices: all at the first step, then each in its turn of the gap: the second at step 2, the third at 3, the first at 5 and so on
    assert (computed, others) == (5, 3)
    assert first.keys() == second.keys()
    for name in first:
        parts = first[name] if isinstance(first[name], dict) else {"": first[name]}
        for part, tensor in parts.items():
            other = second[name][part] if part else second[name]
            assert torch.equal(tensor, other), (name, part)
    for optimizer in OWNED:
        for part, tensor in first[optimizer].items():
            assert torch.equal(tensor, first[optimizer + " owned"][part]), (optimizer, part)
        saved = json.loads((tmp_path / optimizer / "optimizer.json").read_text())
        assert {state["step"] for state in saved["state"].values()} == {STEPS // 2}
        assert len(saved["state"]) == len(SHAPES)
    for method in ("gram", "svd"):
        for part, tensor in zero_redundancy(method, library=False).items():
            assert torch.equal(tensor, first[f"redundancy {method}"][part]), part
    # one process goes on from what two have saved
    later = trained(0, 1, optimizer="ldadam", galore={"rank": RANK}, begun=tmp_path / "ldadam").weights
    for part, tensor in first["ldadam"].items():
        torch.testing.assert_close(tensor, later[part], rtol=0, atol=1e-5)
    alone = trained(0, 1, engine="lowrank")
    assert all(torch.equal(tensor, first["layers, owned"][part]) for part, tensor in first["layers, micro-batches"].items())
    for name in ("dense", "layers", "layers, micro-batches"):
        one = trained(0, 1, engine="lowrank", **LOWRANK[name])
        for part, tensor in first[name].items():
            torch.testing.assert_close(tensor, one.weights[part], rtol=0, atol=1e-6, msg=f"{name} {part}")
        # one process with one backward has whole gradients
        norms = alone.norms if name == "layers" else one.norms
        torch.testing.assert_close(first[name + " norms"], torch.tensor(norms), rtol=1e-4, atol=0)
    for name in ("replicated", "lowrank"):
        for part, tensor in first[name].items():
            torch.testing.assert_close(tensor, alone.weights[part], rtol=0, atol=1e-6)
    torch.testing.assert_close(first["lowrank norms"], torch.tensor(alone.norms), rtol=1e-4, atol=0)
    clipped = trained(0, 1, engine="lowrank", grad_clip=0.5).weights
    for part, tensor in first["clipped"].items():
        torch.testing.assert_close(tensor, clipped[part], rtol=0, atol=1e-6)
    # the owner of a parameter computes what everybody did
    for part, tensor in first["transferred"].items():
        assert torch.equal(tensor, first["lowrank owned"][part]), part
    # and alone has its moments; bases, which project, are everywhere
    for part in owned.held:
        moments, theirs = ({key for key in run.held[part] if key.startswith("exp_avg")} for run in (owned, owned_too))
        assert bool(moments) != bool(theirs), part
        assert owned.held[part] - moments == owned_too.held[part] - theirs == ({"proj"} if part != "weights.3" else set())
    for run in (owned, owned_too):
        assert run.bytes[0] == run.bytes[1]
    bases = 4 * RANK * (32 + 32 + 40)
    assert owned.bytes[0] + owned_too.bytes[0] == begun.bytes[0] + bases
    # from two processes to one, and back
    again = trained(0, 1, engine="lowrank", begun=tmp_path / "lowrank", **TRANSFERRED).weights
    for part, tensor in begun.weights.items():
        torch.testing.assert_close(first["lowrank later"][part], tensor, rtol=0, atol=CLOSE_8BIT)
        torch.testing.assert_close(again[part], tensor, rtol=0, atol=CLOSE_8BIT)
    # each matrix sends its gradient once per gap, and L otherwise; dense parameters always their gradient
    matrices = [(m, n) for m, n in SHAPES if min(m, n) > RANK]
    whole = 4 * sum(m * n for m, n in matrices)
    thin = 4 * 64 * 4
    share = sum(m * n * (RANK / min(m, n) + 1 / GAP) for m, n in matrices) / sum(m * n for m, n in matrices)
    counts = 4 * len(SHAPES)
    assert sum(low[1 : GAP + 1]) <= GAP * (1.05 * share * whole + thin + counts)
    assert sum(dense[1 : GAP + 1]) >= GAP * (whole + thin)


def test_one_process_is_the_ordinary_step() -> None:
    """Without a second process nothing is reduced, and L arrives as in the optimizer's own step."""
    for optimizer in ("galore", "galore8bit"):
        values: dict[str, Any] = {"optimizer": optimizer, "samples": 1}
        ours, plain = trained(0, 1, engine="lowrank", **values), trained(0, 1, engine="replicated", **values)
        for name, weight in plain.weights.items():
            torch.testing.assert_close(ours.weights[name], weight, rtol=1e-6, atol=1e-6)


def test_gradients_of_matrices_are_freed_inside_backward() -> None:
    method = Linear(
        build(
            TrainConfig,
            {
                "mode": "pretraining",
                "model": "llama_test",
                "optimizer": "galore",
                "precision": "fp32",
                "galore": {"rank": 8},
                "engine": "lowrank",
            },
        )
    )
    engine = make_engine(method.config, method, method.build(), torch.device("cpu"))
    assert isinstance(engine, LowRankReduction)
    kept = []
    for step in range(3):
        engine.backward(sum((w * gradient(tuple(w.shape), step, 0)).sum() for w in engine.trained.values()))
        kept.append({name for name, p in engine.trained.items() if p.grad is not None})
        engine.step()
    everything = {f"weights.{n}" for n in range(len(SHAPES))}
    # at the first step every basis is found; afterwards staggered ones only
    assert kept[0] == everything
    assert kept[2] == {"weights.3"}


def test_a_gradient_that_is_not_finite_is_named() -> None:
    method = Linear(
        build(
            TrainConfig,
            {
                "mode": "pretraining",
                "model": "llama_test",
                "optimizer": "galore",
                "precision": "fp32",
                "galore": {"rank": 8},
                "engine": "lowrank",
            },
        )
    )
    engine: Any = make_engine(method.config, method, method.build(), torch.device("cpu"))
    engine.backward(sum((w * w).sum() for w in engine.trained.values()))
    engine.step()
    engine.backward(sum((w * (float("nan") if n == 1 else 1.0)).sum() for n, w in enumerate(engine.trained.values())))
    with pytest.raises(RunFailed, match=r"weights\.1"):
        engine.step()


def test_buckets_hold_about_as_much_as_they_say() -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(5)]
    found = list(buckets(weights, lambda p: 5_000_000))
    assert [len(bucket) for bucket in found] == [2, 2, 1]


def test_a_digest_sees_one_bit() -> None:
    weight = torch.zeros(7, 3, dtype=torch.bfloat16)
    other = weight.clone()
    other.view(torch.int16)[6, 2] = 1
    assert digest(weight) == digest(weight.t().contiguous().t())
    assert digest(weight) != digest(other)


def test_a_run_with_lowrank_resumes_as_replicated(tmp_path: Path) -> None:
    from lm_core.run import run

    values: dict[str, Any] = {
        "mode": "pretraining", "optimizer": "galore", "model": "llama_test", "tokenizer": "bytes", "data": ["synthetic:markov"],
        "packing": "stream", "max_length": 64, "micro_batch_size": 2, "precision": "fp32", "schedule": "constant",
        "galore": {"rank": 8, "update_proj_gap": 3}, "output_dir": str(tmp_path / "run"), "save_every": "2", "eval_every": "never",
        "tensorboard": False,
    }  # fmt: skip
    for steps, engine in ((2, "lowrank"), (4, "replicated")):
        config = build(TrainConfig, {**values, "engine": engine, "max_steps": steps, "resume": "auto"})
        run(config, LowRank(config))
    info = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / "optimizer.json").read_text())
    assert {state["step"] for state in info["state"].values()} == {4}


def test_tensors_that_arrive_in_different_orders_are_not_added_up() -> None:
    for message in spawn(in_different_orders):
        assert "different orders" in message


def in_different_orders() -> str:
    weights = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))]
    sums = Exchange({weight: place for place, weight in enumerate(weights)}, torch.device("cpu"), None, 2)
    for weight in weights if torch_dist.get_rank() else reversed(weights):
        sums.add(weight, torch.ones(4))
    with pytest.raises(AssertionError) as error:
        sums.flush()
    return str(error.value)
