"""Every engine gives the same losses and gradient norms as one process: any number of backwards, then one step."""

import errno
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lm_core import dist
from lm_core.engine import Engine, make_engine
from lm_core.engine.frozen import freeze
from lm_core.engine.replicated import local
from lm_core.errors import ConfigError, RunFailed
from lm_core.method import Rule
from lm_core.testing import spawn
from tests.core.engine_cases import CPU, Plain, Tiny, batch, equal, options, run, tiny, weights


def test_one_process_equals_a_bare_loop() -> None:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.ndim > 1]
    optimizer.add_param_group({"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0})
    expected = []
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - 0.1 * step)
        total = torch.stack([model(*batch(10 * step + k)) for k in range(4)]).sum()
        (total / 48).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((round(float(total.detach()) / 48, 5), round(float(norm), 5)))
    assert run(tiny()) == expected


def test_no_clipping_still_reports_the_norm() -> None:
    assert run(tiny(grad_clip=0.0), steps=1) == run(tiny(), steps=1)


def test_the_same_run_gives_the_same_bits() -> None:
    first, second = tiny(), tiny()
    assert run(first) == run(second)
    assert equal(weights(first), weights(second))


def test_lr_scale_multiplies_the_rate() -> None:
    engine = tiny(type("Scaled", (Plain,), {"rules": [Rule("head", lr_scale=0.5)]}))
    engine.start(0.1)
    assert {group["lr_scale"]: group["lr"] for group in engine.optimizer.param_groups} == {1.0: 0.1, 0.5: 0.05}


def poison(engine: Engine) -> None:
    """A finite loss whose gradient is not finite in `layers.1` and everything before it."""
    handle = engine.model.layers[1].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * float("nan"),))
    engine.start(1e-2)
    engine.backward(engine.model(*batch(0)) / 48)
    handle.remove()


def test_a_nonfinite_gradient_stops_the_run_by_name() -> None:
    engine = tiny()
    before = weights(engine)
    poison(engine)
    with pytest.raises(RunFailed, match="first parameter with a non-finite gradient: embed"):
        engine.step()
    assert equal(before, weights(engine))


def test_a_dropped_step_leaves_no_trace() -> None:
    clean, dropped, asked = tiny(), tiny(nonfinite="drop"), tiny()
    poison(dropped)
    assert dropped.step() is None
    asked.start(1.0)
    asked.backward(asked.model(*batch(3)))
    asked.drop()
    assert run(clean) == run(dropped) == run(asked)


def test_fp16_halves_the_scale_on_overflow_and_changes_nothing_else() -> None:
    engine = tiny(precision="fp16")
    plain = tiny()
    before = weights(engine)
    engine.start(1e-2)
    with engine.autocast():
        loss = engine.model(*batch(0))
    engine.backward(loss * 1e6)
    assert engine.step() is None
    assert equal(before, weights(engine))
    assert not engine.optimizer.state
    assert (engine.scaler.scale, engine.scaler.good) == (2.0**15, 0)
    for (loss, norm), (expected_loss, expected_norm) in zip(run(engine), run(plain), strict=True):
        assert loss == pytest.approx(expected_loss, rel=2e-3)
        assert norm == pytest.approx(expected_norm, rel=2e-2)
    assert engine.scaler.good == 3


def test_fp16_doubles_the_scale_after_two_thousand_good_steps() -> None:
    engine = tiny(precision="fp16")
    for _ in range(2000):
        engine.scaler.after(overflow=False)
    assert (engine.scaler.scale, engine.scaler.good) == (2.0**17, 0)


class Layerwise(torch.optim.Optimizer):
    """Updates each weight from its own gradient hook and frees the gradient at once."""

    per_layer = True

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.1})
        self.squares = self.grad_norm = 0.0
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(lambda p, group=group: self.update(p, group))

    def update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        self.squares += float(parameter.grad.square().sum())
        parameter.data.add_(parameter.grad, alpha=-group["lr"])
        parameter.grad = None

    def step(self, closure: Any = None) -> None:
        self.grad_norm, self.squares = self.squares**0.5, 0.0


def layerwise(kind: Any, **changed: Any) -> Engine:
    return tiny(type("Method", (Plain,), {"optimizer": lambda self, groups: kind(groups)}), grad_clip=0.0, weight_decay=0.0, **changed)


def test_layerwise_updates_equal_plain_ones() -> None:
    plain, each = layerwise(torch.optim.SGD), layerwise(Layerwise)
    for step in range(3):
        norms = []
        for engine in (plain, each):
            engine.start(0.1)
            engine.backward(engine.model(*batch(step)) / 12)
            norms.append(engine.step())
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert all(parameter.grad is None for parameter in each.model.parameters())
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, weights(each)[name])


def test_layerwise_updates_stop_at_the_first_nonfinite_gradient() -> None:
    engine = layerwise(Layerwise)
    before = weights(engine)
    with pytest.raises(RunFailed, match=r"gradient: not finite in layers\.0\."):
        poison(engine)
    assert torch.equal(before["layers.0.weight"], weights(engine)["layers.0.weight"])


@pytest.mark.parametrize("changed", [{"precision": "fp16"}, {"nonfinite": "drop"}])
def test_layerwise_updates_refuse_what_they_cannot_take_back(changed: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changed))):
        layerwise(Layerwise, **changed)


class Poison(torch.autograd.Function):
    """A finite value whose gradient is not."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


def poison_one_rank(engine: Engine) -> None:
    engine.start(1e-2)
    loss = engine.model(*batch(0)) / 48
    engine.backward(Poison.apply(loss) if engine.data_rank == engine.data_world - 1 else loss)


def starts_from_the_weights_of_rank_0(**kind: Any) -> None:
    torch.manual_seed(dist.rank())
    config = options(**kind)
    ours = weights(make_engine(config, Plain(config), Tiny(), CPU))
    torch.manual_seed(0)
    assert equal(ours, Tiny().state_dict())


def survives_bad_steps(**kind: Any) -> None:
    """Steps that are refused or dropped leave no trace, on any rank, early or late in a run."""
    clean = run(tiny(**kind))
    stopped = tiny(**kind)
    before = weights(stopped)
    poison_one_rank(stopped)
    with pytest.raises(RunFailed, match=r"first parameter with a non-finite gradient: embed\.weight"):
        stopped.step()
    assert equal(before, weights(stopped))
    engine = tiny(nonfinite="drop", **kind)
    reports = run(engine, 1)
    poison_one_rank(engine)
    assert engine.step() is None
    reports += run(engine, 1, first=1)
    engine.start(1.0)
    for number in (3, 4):
        engine.backward(engine.model(*batch(number)))
    engine.drop()
    assert reports + run(engine, 1, first=2) == clean, kind


def agrees_on_overflow(**kind: Any) -> None:
    engine = tiny(precision="fp16", **kind)
    before = weights(engine)
    engine.start(1e-2)
    with engine.autocast():
        loss = engine.model(*batch(0))
    engine.backward(loss * (float("inf") if engine.data_rank == 1 else 1.0))
    assert engine.step() is None
    assert engine.scaler.scale == 2.0**15
    assert equal(before, weights(engine))


def _replicated() -> list[Any]:
    with pytest.raises(ConfigError, match="layer-wise updates run in one process, not 2"):
        layerwise(Layerwise)
    starts_from_the_weights_of_rank_0()
    survives_bad_steps()
    agrees_on_overflow()
    engine = tiny()
    reports = run(engine)
    # no rank used it: no gradient, no state, no decay
    assert engine.model.unused.weight.grad is None
    assert engine.optimizer.state[engine.model.unused.weight] == {}
    return reports


@pytest.mark.slow
def test_two_replicated_processes_equal_one() -> None:
    first, second = spawn(_replicated)
    assert first == second == run(tiny())


def _sharded() -> int:
    with pytest.raises(ConfigError, match="sharded keeps no whole gradient for layer-wise updates"):
        layerwise(Layerwise, engine="sharded")
    starts_from_the_weights_of_rank_0(engine="sharded")
    survives_bad_steps(engine="sharded")
    agrees_on_overflow(engine="sharded")
    teacher_is_shared_out()
    engine = tiny(engine="sharded")
    run(engine, 1)
    return sum(local(value).numel() for state in engine.optimizer.state.values() for value in state.values())


def teacher_is_shared_out() -> None:
    torch.manual_seed(dist.rank())
    student = tiny(engine="deepspeed", zero_stage=3)
    torch.manual_seed(dist.rank())
    whole = freeze(Tiny(), sharded=False)
    torch.manual_seed(dist.rank())
    shared = freeze(Tiny(), sharded=True)
    for number in range(2):
        assert torch.equal(whole(*batch(number)), shared(*batch(number)))
        student.start(1e-2)
        student.backward(student.model(*batch(number)) / 12)
        student.step()
    assert not any(parameter.requires_grad for parameter in shared.parameters())
    held = sum(local(parameter).numel() for parameter in shared.parameters())
    assert held <= 0.6 * sum(parameter.numel() for parameter in whole.parameters())


@pytest.mark.slow
def test_sharded_processes_keep_their_share_and_survive_bad_steps() -> None:
    whole = tiny()
    run(whole, 1)
    elements = sum(value.numel() for state in whole.optimizer.state.values() for value in state.values())
    assert all(held < 0.6 * elements for held in spawn(_sharded))


def _save_without_room(folder: Path) -> dict[str, int | None]:
    """The system's number of the error with which each engine reports a file that may not grow."""
    engines = [tiny(engine="sharded"), *(tiny(engine="deepspeed", zero_stage=stage) for stage in (1, 2, 3)), tiny()]
    for engine in engines:
        run(engine, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
    found = {}
    for number, engine in enumerate(engines):
        (folder / str(number)).mkdir()
        try:
            engine.save(folder / str(number))
        except OSError as error:
            found[f"{engine.kind} {number}"] = error.errno
        except SafetensorError as error:
            found[f"{engine.kind} {number}"] = errno.EFBIG if f"os error {errno.EFBIG}" in str(error) else None
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return found


@pytest.mark.slow
def test_every_engine_says_that_a_disk_is_full(tmp_path: Path) -> None:
    found = spawn(_save_without_room, tmp_path, world=1)[0]
    assert set(found.values()) == {errno.EFBIG}
    assert len(found) == 5


def _deepspeed(kinds: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="deepspeed keeps no whole gradient for layer-wise updates"):
        layerwise(Layerwise, engine="deepspeed")
    for kind in kinds:
        starts_from_the_weights_of_rank_0(**kind)
        survives_bad_steps(**kind)


@pytest.mark.slow
def test_deepspeed_survives_bad_steps() -> None:
    kinds = [
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 2, "offload": "optimizer"},
        {"zero_stage": 3, "offload": "all"},
    ]
    spawn(_deepspeed, [{"engine": "deepspeed", **kind} for kind in kinds])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"engine": "auto", "zero_stage": 0, "offload": "optimizer"}, "offload: optimizer needs ZeRO stage 1 to 3, not 0"),
        ({"engine": "deepspeed", "zero_stage": 2, "offload": "all"}, "offload: all needs ZeRO stage 3, not 2"),
        ({"engine": "deepspeed", "precision": "fp16"}, "precision: fp16 runs in the replicated and sharded engines only"),
    ],
)
def test_impossible_combinations_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**changed)


@pytest.mark.parametrize(
    ("changed", "kind"),
    [({}, "replicated"), ({"zero_stage": 0}, "replicated"), ({"engine": "deepspeed", "zero_stage": 0}, "replicated")],
)
def test_zero_stage_0_is_the_replicated_engine(changed: dict[str, Any], kind: str) -> None:
    assert tiny(**{"engine": "auto", **changed}).kind == kind
