from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lm_core.engine import make_engine
from lm_core.engine.base import Engine
from lm_core.errors import RunFailed
from lm_core.export import export
from lm_core.generate import continue_text
from lm_core.method import Batch, Loss, Method
from lm_core.models import CausalLoss, load_model, lora, using_peft
from lm_core.options import RunConfig
from lm_core.testing import spawn

TINY = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40,
}  # fmt: skip
IDS = torch.arange(20)[None]


class NextToken(Method):
    adapters = False
    tied = False
    dropout = 0.3

    def build(self) -> nn.Module:
        torch.manual_seed(0)  # adapters
        model = load_model("tiny", presets={"tiny": {**TINY, "tie_word_embeddings": self.tied, "attention_dropout": self.dropout}})
        return CausalLoss(lora(model, r=2, init_lora_weights=False) if self.adapters else model)

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        yield Loss(total=model(batch["input_ids"], batch["labels"]))


def trained(**kind: bool) -> tuple[Engine, Method]:
    method = NextToken(RunConfig(model="tiny", data=["synthetic:markov"]))
    method.__dict__.update(kind)
    return make_engine(method.config, method, method.build(), torch.device("cpu")), method


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz .,!?Ġ")}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("tied", [False, True])
def test_the_folder_loads_in_transformers_with_equal_logits(tmp_path: Path, tied: bool) -> None:
    engine, method = trained(tied=tied)
    folder = export(engine, method, tmp_path / "final", tokenizer=tokenizer(), card="# Tiny\n")
    assert folder == tmp_path / "final"
    assert engine.model.training
    read = AutoModelForCausalLM.from_pretrained(folder)
    ours = method.hf_model(engine.model).eval()
    assert torch.equal(read(IDS).logits, ours(IDS).logits)
    assert (read.lm_head.weight is read.model.embed_tokens.weight) == tied
    assert AutoTokenizer.from_pretrained(folder)("a word").input_ids == tokenizer()("a word").input_ids
    assert (folder / "README.md").read_text() == "# Tiny\n"
    assert {"config.json", "generation_config.json", "model.safetensors"} <= {file.name for file in folder.iterdir()}


def test_adapters_are_exported_as_peft_writes_them(tmp_path: Path) -> None:
    engine, method = trained(adapters=True)
    # a name that is no folder: nobody may look for it on the hub
    engine.model.model.active_peft_config.base_model_name_or_path = "smollm2-135m"
    folder = export(engine, method, tmp_path / "final", tokenizer=tokenizer())
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "smollm2-135m"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    base = load_model("tiny", presets={"tiny": TINY})
    with using_peft() as peft:
        read = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    assert_close(read(IDS).logits, method.hf_model(engine.model).eval()(IDS).logits)


def test_a_new_export_replaces_the_old_folder(tmp_path: Path) -> None:
    engine, method = trained()
    export(engine, method, tmp_path / "final")
    (tmp_path / "final" / "stale").touch()
    export(engine, method, tmp_path / "final")
    assert not (tmp_path / "final" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_an_export_that_reads_back_differently_fails_and_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, method = trained()
    export(engine, method, tmp_path / "final")
    before = {file.name: file.read_bytes() for file in (tmp_path / "final").iterdir()}
    whole = engine.full_weights

    def wrong() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in whole():
            yield name, tensor * 1.01 if "lm_head" in name else tensor

    monkeypatch.setattr(engine, "full_weights", wrong)
    with pytest.raises(RunFailed, match=r"export: logits of the model read back differ by \d.*e-0[23]"):
        export(engine, method, tmp_path / "final")
    assert {file.name: file.read_bytes() for file in (tmp_path / "final").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_missing_tensor_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, method = trained()
    kept = [(name, tensor) for name, tensor in engine.full_weights() if "layers.1.mlp" not in name]
    monkeypatch.setattr(engine, "full_weights", lambda: iter(kept))
    with pytest.raises(RunFailed, match="export: "):
        export(engine, method, tmp_path / "final")


def test_continuations_are_repeatable_and_stay_within_the_positions() -> None:
    model, words = load_model("tiny", presets={"tiny": TINY}), tokenizer()
    state = torch.random.get_rng_state()
    calls: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 2}]
    texts = [continue_text(model, words, "hello", **options) for options in calls]
    assert texts == [continue_text(model, words, "hello", **options) for options in calls]
    assert len(set(texts)) == 3
    assert all(text.startswith("hello") for text in texts)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert continue_text(model, words, "hello " * 30, max_new_tokens=8).startswith("hello " * 30)


def exported(engine: str, stage: int | None, folder: Path, kind: dict[str, bool]) -> None:
    from lm_core.train import train_step

    config = RunConfig(model="tiny", data=["synthetic:markov"], engine=engine, zero_stage=stage, grad_clip=0.0)  # type: ignore[arg-type]
    method = NextToken(config)
    method.__dict__.update(kind, dropout=0.0)
    made = make_engine(config, method, method.build(), torch.device("cpu"))
    row = slice(made.data_rank, None, made.data_world)
    ids = torch.arange(40).view(2, 20)[row]
    train_step(made, method, [Batch({"input_ids": ids, "labels": ids}, index=torch.arange(2)[row], step=0)], lr=1e-2)
    export(made, method, folder)


def exported_by_all(folder: Path, kind: dict[str, bool]) -> None:
    for engine, stage in (("sharded", None), ("deepspeed", 2), ("deepspeed", 3)):
        exported(engine, stage, folder / f"{engine}-{stage}", kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{"tied": True}, {"adapters": True}], ids=["tied", "adapters"])
def test_sharded_engines_export_what_one_process_would(tmp_path: Path, kind: dict[str, bool]) -> None:
    exported("replicated", None, tmp_path / "one", kind)
    spawn(exported_by_all, tmp_path / "two", kind)
    file = "adapter_model.safetensors" if "adapters" in kind else "model.safetensors"
    one = load_file(tmp_path / "one" / file)
    found = sorted((tmp_path / "two").iterdir())
    assert [folder.name for folder in found] == ["deepspeed-2", "deepspeed-3", "sharded-None"]
    for folder in found:
        assert_close(load_file(folder / file), one, atol=2e-5, rtol=1e-4)
