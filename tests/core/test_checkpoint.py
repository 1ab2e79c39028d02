"""A checkpoint is whole or not there; a resume continues bit for bit or refuses by name."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lm_core import checkpoint, dist
from lm_core.engine import Engine, make_engine
from lm_core.errors import ResumeRefused
from lm_core.method import Rule
from lm_core.progress import Progress
from lm_core.testing import spawn
from tests.core.engine_cases import CPU, Counted, Plain, equal, options, run, tiny, weights


def save(folder: Path, engine: Engine, step: int, keep: int = 0, keep_optimizer: int = 0) -> Path:
    return checkpoint.save(
        folder,
        engine=engine,
        method=engine.method,
        data=Counted(step),
        progress=Progress(steps=step, samples=8 * step),
        keep=keep,
        keep_optimizer=keep_optimizer,
    )


def resume(path: Path, engine: Engine, **more: Any) -> tuple[Progress, Counted]:
    data = Counted()
    progress = checkpoint.resume(path, engine=engine, method=engine.method, data=data, config=engine.method.config, **more)
    return progress, data


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, precision: str) -> None:
    whole, first, second = tiny(precision=precision), tiny(precision=precision), tiny(precision=precision)
    expected = run(whole, 4)
    assert run(first, 2) == expected[:2]
    first.method.seen = 7
    path = save(tmp_path, first, 2)
    assert path == tmp_path / "checkpoints" / "checkpoint-2"
    for parameter in second.model.parameters():
        parameter.data.zero_()
    progress, data = resume(path, second)
    assert (progress, data.position, second.method.seen) == (Progress(steps=2, samples=16), 2, 7)
    assert run(second, 2, first=2) == expected[2:]
    assert equal(weights(whole), weights(second))
    if precision == "fp16":
        assert second.scaler == whole.scaler


def test_a_checkpoint_holds_no_pickle_and_lists_its_files(tmp_path: Path) -> None:
    path = save(tmp_path, tiny(), 1)
    files = {file.name for file in path.iterdir()}
    assert files == {"model.safetensors", "optimizer.safetensors", "optimizer.json", "state.json"}
    assert set(json.loads((path / "state.json").read_text())["files"]) == files - {"state.json"}


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    engine = tiny()
    run(engine, 1)
    for step in (1, 2, 10):
        save(tmp_path, engine, step, keep=2)
    assert steps(tmp_path) == ["checkpoint-10", "checkpoint-2"]
    save(tmp_path, engine, 11, keep=0, keep_optimizer=2)
    assert (tmp_path / "checkpoints" / "checkpoint-10" / "optimizer.safetensors").exists()
    assert not (tmp_path / "checkpoints" / "checkpoint-2" / "optimizer.safetensors").exists()
    save(tmp_path, engine, 11, keep=0, keep_optimizer=1)
    assert not (tmp_path / "checkpoints" / "checkpoint-10" / "optimizer.safetensors").exists()
    with pytest.raises(ResumeRefused, match="holds no optimizer state"):
        resume(tmp_path / "checkpoints" / "checkpoint-10", engine)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "checkpoint-11"


def test_a_run_that_goes_back_replaces_what_came_after(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = tiny()
    for step in (2, 4, 6):
        save(tmp_path, engine, step)
    save(tmp_path, engine, 4)
    assert steps(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert "checkpoint-6 removed" in caplog.text


def test_latest_passes_over_incomplete_and_damaged_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = tiny()
    run(engine, 1)
    assert checkpoint.latest(tmp_path) is None
    paths = [save(tmp_path, engine, step) for step in (1, 2, 3, 4, 5)]
    assert checkpoint.latest(tmp_path) == paths[4]
    (paths[4] / "state.json").unlink()
    flip(paths[3] / "model.safetensors")
    truncate(paths[2] / "optimizer.safetensors")
    (paths[1] / "optimizer.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == paths[0]
    for text in (
        "checkpoint-5: an interrupted save",
        "checkpoint-4/model.safetensors is damaged",
        "checkpoint-3/optimizer.safetensors has",
        "checkpoint-2/optimizer.json is missing",
    ):
        assert text in caplog.text
    flip(paths[0] / "model.safetensors")
    checkpoint._verify.cache_clear()
    with pytest.raises(ResumeRefused, match=r"no checkpoint in .* can be used .* start again with --overwrite"):
        checkpoint.latest(tmp_path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path, tiny(), 1)
    flip(path / "optimizer.safetensors")
    with pytest.raises(ResumeRefused, match=r"optimizer\.safetensors is damaged"):
        resume(path, tiny())
    (path / "state.json").write_text("{")
    with pytest.raises(ResumeRefused, match=r"state\.json is damaged"):
        resume(path, tiny())
    (path / "state.json").unlink()
    with pytest.raises(ResumeRefused, match="not a complete checkpoint"):
        resume(path, tiny())
    with pytest.raises(ResumeRefused, match="name one of checkpoint-1 under"):
        resume(tmp_path, tiny())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "other"}, "model: the checkpoint was written with 'tiny', this run asks for 'other'"),
        ({"data": ["a.txt"]}, "data: "),
        ({"seed": 1}, "seed: "),
        ({"max_length": 99}, "max_length: "),
        ({"betas": (0.8, 0.9)}, "betas: "),
        ({"precision": "bf16"}, "precision: "),
        ({"accumulate": 3}, "global batch: the checkpoint was written with 8 samples per step, this run has 6"),
    ],
)
def test_another_run_is_refused_by_name(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = save(tmp_path, tiny(), 1)
    engine = tiny(**changed)
    before = weights(engine)
    with pytest.raises(ResumeRefused) as refusal:
        resume(path, engine)
    assert str(refusal.value).startswith(message)
    assert refusal.value.code == 4
    assert equal(before, weights(engine))


def test_what_decides_neither_samples_nor_model_may_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path, tiny(), 1)
    free = {
        "budget": "9 steps",
        "log_every": 3,
        "save_every": "7",
        "eval_every": "never",
        "output_dir": Path("x"),
        "micro_batch_size": 1,
        "accumulate": 8,
        "lr": 0.5,
    }
    assert resume(path, tiny(**free))[0].steps == 1
    assert "lr: 0.5 from here on" in caplog.text
    assert resume(path, tiny(seed=3), allow={"seed"})[0].steps == 1


def test_another_optimizer_or_engine_is_refused(tmp_path: Path) -> None:
    class Momentum(Plain):
        def optimizer(self, groups: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    path = save(tmp_path, tiny(), 1)
    with pytest.raises(
        ResumeRefused, match=r"optimizer: the checkpoint was written by torch\.optim\.adamw\.AdamW, this run uses torch\.optim\.sgd\.SGD"
    ):
        resume(path, tiny(Momentum))
    other = tiny()
    other.kind = "sharded"
    with pytest.raises(ResumeRefused, match="engine: the checkpoint was written by the replicated engine, this run uses sharded"):
        resume(path, other)


class Wrapped(nn.Module):
    """A Hugging Face model inside a module that trains something of its own beside it."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.inner = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=16, tie_word_embeddings=tied))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.scale * self.inner(input_ids=x).logits.flatten(0, 1), y.flatten(), reduction="sum")


class Wrapping(Plain):
    def hf_model(self, model: Any) -> Any:
        return model.inner


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_a_hugging_face_folder(tmp_path: Path, tied: bool) -> None:
    def fresh() -> Engine:
        return make_engine(options(), Wrapping(options()), Wrapped(tied), CPU)

    engine = fresh()
    run(engine, 2)
    path = save(tmp_path, engine, 2)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(input_ids=ids).logits, engine.model.inner(input_ids=ids).logits)
    other = fresh()
    resume(path, other)
    assert equal(weights(engine), weights(other))
    assert other.model.scale.item() != 1
    assert run(engine, 1, first=2) == run(other, 1, first=2)


KINDS: dict[str, dict[str, Any]] = {
    "replicated": {"engine": "replicated"},
    "sharded": {"engine": "sharded"},
    "zero1": {"engine": "deepspeed", "zero_stage": 1},
    "zero2": {"engine": "deepspeed", "zero_stage": 2, "offload": "optimizer"},
    "zero3": {"engine": "deepspeed", "zero_stage": 3},
}


def here(kind: str, **changed: Any) -> Any:
    """The same global batch whatever the number of processes, groups that differ in everything, something frozen."""
    rules = [Rule("head", lr_scale=0.5), Rule("embed", weight_decay=0.3), Rule(r"layers\.0", trained=False)]
    return tiny(type("Ruled", (Plain,), {"rules": rules}), **KINDS[kind], accumulate=4 // dist.world(), **changed)


def _write(folder: str, kinds: list[str]) -> dict[str, Any]:
    """Reports of steps 2 and 3 of each kind of engine; a checkpoint after step 1, from which the same world resumes bit for bit."""
    reports = {}
    for kind in kinds:
        whole, first, second = here(kind), here(kind), here(kind, start=1)
        run(whole, 2)
        reports[kind] = run(whole, 2, first=2)
        run(first, 2)
        path = save(Path(folder, kind), first, 2)
        assert checkpoint.latest(Path(folder, kind)) == path
        assert resume(path, second)[0].steps == 2
        assert run(second, 2, first=2) == reports[kind], kind
        assert equal(weights(second), weights(whole)), kind
    return reports


def _resume(folder: str, kinds: list[str]) -> dict[str, Any]:
    reports = {}
    for kind in kinds:
        engine = here(kind, start=1)
        resume(Path(folder, kind, "checkpoints", "checkpoint-2"), engine)
        reports[kind] = run(engine, 2, first=2)
    return reports


def _strip_and_refuse(folder: str) -> None:
    """Checkpoints without optimizer state, damaged or of another run are refused on every rank."""
    for kind in KINDS:
        engine = here(kind)
        save(Path(folder, kind), engine, 3, keep_optimizer=1)
        if engine.optimizer_files:
            with pytest.raises(ResumeRefused, match="holds no optimizer state"):
                resume(Path(folder, kind, "checkpoints", "checkpoint-2"), engine)
        else:
            resume(Path(folder, kind, "checkpoints", "checkpoint-2"), engine)
        path = Path(folder, kind, "checkpoints", "checkpoint-3")
        with pytest.raises(ResumeRefused, match="seed"):
            resume(path, here(kind, seed=1))
        with pytest.raises(ResumeRefused, match=r"weight is in group . on one side only"):
            resume(path, tiny(Plain, **KINDS[kind], accumulate=2))
        if dist.rank() == 0:
            [largest] = sorted((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)[-1:]
            flip(largest)
        dist.barrier()
        checkpoint._verify.cache_clear()
        with pytest.raises(ResumeRefused, match="is damaged"):
            resume(path, here(kind))
        if kind.startswith("zero"):
            about = json.loads((path / "deepspeed.json").read_text())
            dist.barrier()
            others = {"zero_stage: .* at stage 7": {"stage": 7}, "num_processes: .* not momentum of": {"world": 3, "state": ["momentum"]}}
            for message, other in others.items():
                dist.on_main((path / "deepspeed.json").write_text, json.dumps({**about, **other}))
                with pytest.raises(ResumeRefused, match=message):
                    engine.load(path)
                dist.barrier()


@pytest.mark.slow
def test_every_engine_resumes_bit_for_bit_and_on_another_number_of_processes(tmp_path: Path) -> None:
    two, one = str(tmp_path / "two"), str(tmp_path / "one")
    # deepspeed checkpoints are converted by a process of its own, seconds each: one way is tried with each of its two formats
    written = spawn(_write, two, list(KINDS))[0]
    fewer = spawn(_resume, two, ["replicated", "sharded", "zero2"], world=1)[0]
    spawn(_write, one, ["replicated", "sharded", "zero3"], world=1)
    more = spawn(_resume, one, ["replicated", "sharded", "zero3"])[0]
    for kind, found in [*fewer.items(), *more.items()]:
        for now, then in zip(found, written[kind], strict=True):
            assert now == pytest.approx(then, abs=1e-5), kind
    spawn(_strip_and_refuse, two)
