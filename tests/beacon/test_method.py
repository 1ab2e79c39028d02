from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from beacon.io import tokenizer_name
from beacon.method import Beacon
from beacon.options import TrainConfig
from beacon.plan import build_plan
from lm_core import record
from lm_core.config import build
from lm_core.errors import ConfigError, InputError
from lm_core.method import Batch, Method
from lm_core.options import RunConfig
from lm_core.run import run
from lm_core.testing import Conformance


class BeaconConformance(Conformance):
    more: dict[str, Any] = {}

    def configure(self, **options: Any) -> RunConfig:
        values: dict[str, Any] = {
            "model": "llama_tiny",
            "tokenizer": "bytes",
            "data": ["synthetic:markov"],
            "packing": "stream",
            "max_length": 41,
            "beacon_window": 8,
            "beacon_ratio": [2, 4],
            "beacon_sink_size": 1,
            "lr": 5e-3,
            **self.more,
            **options,
        }
        return build(TrainConfig, values)

    def method(self, config: RunConfig) -> Method:
        assert isinstance(config, TrainConfig)
        return Beacon(config)


@pytest.mark.slow
class TestBeacon(BeaconConformance):
    """Only beacons are trained, in one pass over all windows."""


@pytest.mark.slow
class TestWholeModel(BeaconConformance):
    """The window-by-window engine, the backbone trained too, rows of unequal length."""

    refuses = dict.fromkeys(
        ("sharded", "ZeRO 3", "ZeRO 3, all offloaded"),
        "loop runs modules once per window, which sharded weights cannot follow; use parallel",
    )
    more = {
        "beacon_engine": "loop",
        "only_train_beacon": False,
        "packing": "document",
        "max_length": 60,
        "beacon_stride": 4,
        "eval_tokens": 256,
    }


def method(**options: Any) -> Beacon:
    made = BeaconConformance().method(BeaconConformance().options(**options))
    assert isinstance(made, Beacon)
    made.build()
    return made


def batch(lengths: list[int], step: int = 0) -> Batch:
    width = max(lengths)
    rows = torch.arange(len(lengths) * width).view(len(lengths), width) % 250
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    labels = rows.masked_fill(mask == 0, -100)
    return Batch({"input_ids": rows, "labels": labels, "attention_mask": mask}, index=torch.arange(len(lengths)), step=step)


@pytest.mark.parametrize("options", [{}, {"beacon_stride": 4}, {"beacon_ratio": [0, 2]}, {"beacon_pos": "interleave"}])
def test_targets_are_known_before_the_forward(options: dict[str, Any]) -> None:
    made = method(**options)
    for step in range(4):
        rows = batch([41, 30, 9, 8], step)
        expected = 0
        for length in (41, 30, 9, 8):
            ratios = [made.rule(step)(length)(i) for i in range(made.settings.compactions(length, training=True))]
            expected += int(build_plan(length, made.settings, ratios, training=True).label_mask.sum())
        assert made.targets(rows) == expected
        (loss,) = made.losses(made.module, rows)
        by_ratio = [value for name, value in loss.metrics.items() if name.startswith("loss_ratio/")]
        if made.settings.pos == "append":
            assert sum(int(value[1]) for value in by_ratio) == expected
            assert sum(float(value[0]) for value in by_ratio) == pytest.approx(float(loss.total.detach()), rel=1e-5)
    made.module.eval()
    assert made.targets(batch([41, 30, 9, 8])) == 40 + 29 + 8 + 7


@pytest.mark.parametrize(
    ("chosen", "expected"), [({"beacon_ratio": [2, 32]}, 32), ({"beacon_ratio": [2, 32], "eval_beacon_ratio": [4]}, 4), ({}, 2)]
)
def test_evaluations_have_a_ratio_of_their_own(chosen: dict[str, Any], expected: int) -> None:
    made = method(beacon_window=64, **chosen)
    made.module.eval()
    assert made.rule(0)(200)(0) == expected


def test_packed_documents_count_the_targets_that_their_own_beacons_help() -> None:
    made = method(packing="best-fit", beacon_doc_mask=True)
    documents = torch.tensor([[0] * 15 + [1] * 26, [0] * 30 + [-1] * 11])
    rows = batch([41, 30])
    packed = Batch({**rows, "document_ids": documents}, index=rows.index, step=0)
    expected = 0
    for row, length in enumerate((41, 30)):
        ratios = [made.rule(0)(length)(i) for i in range(made.settings.compactions(length, training=True))]
        expected += int(build_plan(length, made.settings, ratios, doc_ids=documents[row, :length], training=True).label_mask.sum())
    assert made.targets(packed) == expected < made.targets(rows)
    (loss,) = made.losses(made.module, packed)
    assert sum(int(value[1]) for name, value in loss.metrics.items() if name.startswith("loss_ratio/")) == expected


@pytest.mark.slow
def test_packed_documents_train(tmp_path: Path) -> None:
    result = BeaconConformance().run(
        tmp_path,
        packing="best-fit",
        beacon_doc_mask=True,
        data=["builtin:python-docs"],
        max_length=200,
        beacon_window=32,
        budget="3 steps",
        eval_every="1",
    )
    assert result["progress"]["steps"] == 3
    assert result["eval"]["eval/python-docs/loss"] > 0


def test_a_batch_without_targets_has_loss_0_and_no_gradient() -> None:
    made = method()
    (loss,) = made.losses(made.module, batch([8, 5]))
    loss.total.backward()
    assert float(loss.total.detach()) == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in made.module.parameters())


@pytest.mark.parametrize("documents", [False, True])
def test_distillation_adds_the_divergence_from_the_model_without_beacons(documents: bool) -> None:
    options: dict[str, Any] = {"distill_weight": 0.5, "distill_temperature": 2.0, "max_position_embeddings": 40}
    made = method(**options, **({"packing": "best-fit", "beacon_doc_mask": True} if documents else {}))
    torch.manual_seed(0)
    for parameter in made.model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    # the first row is longer than the model's positions
    lengths, doc = (41, 30, 24), torch.tensor([[0] * 41, [0] * 13 + [1] * 17 + [-1] * 11, [0] * 24 + [-1] * 17])
    rows = batch(list(lengths))
    if documents:
        rows = Batch({**rows, "document_ids": doc}, index=rows.index, step=0)
    (loss,) = made.losses(made.module, rows)
    made.module.distill = None
    (plain,) = made.losses(made.module, rows)
    expected, count = torch.zeros(()), 0
    for b, n in list(enumerate(lengths))[1:]:
        row, own = rows["input_ids"][b : b + 1, :n], doc[b : b + 1, :n] if documents else None
        ratios = [made.rule(0)(n)(i) for i in range(made.settings.compactions(n, training=True))]
        parts = [row] if own is None else [row[own == k][None] for k in own.unique()]
        with torch.no_grad(), made.model.beacon_disabled():
            z = torch.cat([made.model(part).logits[0] for part in parts]) / 2
        y = made.model(row, ratios=ratios, doc_ids=own).logits[0] / 2
        counted = build_plan(n, made.settings, ratios, doc_ids=None if own is None else own[0], training=True).label_mask
        expected = expected + 4 * (z.softmax(-1) * (z.log_softmax(-1) - y.log_softmax(-1))).sum(-1)[counted].sum()
        count += int(counted.sum())
    assert loss.metrics["distill_kl"].tolist() == [pytest.approx(float(expected.detach()), rel=1e-4), count]
    torch.testing.assert_close(loss.total, plain.total + 0.5 * expected, rtol=1e-5, atol=1e-4)
    trained = made.model.trainable_parameters()
    ours = torch.autograd.grad(loss.total, trained, retain_graph=True)
    theirs = torch.autograd.grad(plain.total + 0.5 * expected, trained)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    rows, found = batch([41, 30]), []
    for options in ({}, {"gradient_checkpointing": True, "use_reentrant": reentrant}):
        made = method(**options)
        (loss,) = made.losses(made.module, rows)
        loss.total.backward()
        found.append({name: parameter.grad for name, parameter in made.module.named_parameters() if parameter.requires_grad})
    plain, recomputed = found
    assert all(gradient is not None and torch.equal(gradient, recomputed[name]) for name, gradient in plain.items())


def test_training_leaves_the_base_bits_as_they_were(tmp_path: Path) -> None:
    suite = BeaconConformance()
    before = {name: tensor.clone() for name, tensor in method().model.state_dict().items()}
    suite.run(tmp_path, budget="3 steps", eval_every="never")
    after = load_file(tmp_path / "final" / "model.safetensors")
    frozen = re.compile(r"layers\.1\.self_attn\.beacon_[qo]_proj")
    for name, tensor in after.items():
        same = "beacon_" not in name or frozen.search(name) is not None
        assert torch.equal(tensor, before[name]) == same, name


def test_samples_left_out_and_bytes_of_keys_and_values_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "x" * size}) + "\n" for size in (4, 5, 30, 40, 50)))
    caplog.set_level("INFO")
    BeaconConformance().run(
        tmp_path / "run", data=[str(texts)], packing="document", max_length=70, min_length=8, budget="2 steps", eval_every="never"
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {record["data/dropped"] for record in records if "data/dropped" in record} == {2}
    # 8 windows of 70 tokens, 2 layers of 2 heads of 16 numbers: a sink, 8 x 4 or 8 x 2 beacons, and 6 raw tokens
    parts = [f"{2 * 2 * 2 * 16 * 4 * held / 2**20:.3g}" for held in (1 + 8 * 4 + 6, 1 + 8 * 2 + 6, 70)]
    assert f"keys and values of 70 tokens, MiB: ratio 2 {parts[0]}, ratio 4 {parts[1]}, full attention {parts[2]};" in caplog.text


def test_both_forms_load_through_the_auto_classes(tmp_path: Path) -> None:
    suite = BeaconConformance()
    suite.run(tmp_path / "full", budget="2 steps", eval_every="never", attn_impl="sdpa")
    assert AutoConfig.from_pretrained(tmp_path / "full" / "final").model_type == "beacon_llama"
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "final").eval()
    suite.run(tmp_path / "adapter", budget="2 steps", eval_every="never", model=str(tmp_path / "full"), tokenizer="bytes", beacon_ratio=[4])
    continued = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "final")
    assert continued.beacon.ratio == [4]
    assert continued.beacon.window == 8
    assert continued.attn_backend == full.attn_backend == "sdpa"
    rows = batch([30])["input_ids"]
    assert not torch.equal(continued(rows).logits, full(rows).logits)


def test_a_checkpoint_has_the_tokenizer_of_the_model_that_its_runs_began_with(tmp_path: Path) -> None:
    names = {"first": {"model": "smollm2-135m", "tokenizer": None}, "second": {"model": str(tmp_path / "first"), "tokenizer": None}}
    for name, config in names.items():
        folder = tmp_path / name / "checkpoints" / "checkpoint-3"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "state.json").write_text(json.dumps({"config": config}))
    assert tokenizer_name(str(tmp_path / "second")) == "smollm2-135m"


def test_an_adapter_finds_its_base_and_refuses_another(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from beacon.sizes import PRESETS

    for seed, name in ((0, "base"), (1, "other")):
        torch.manual_seed(seed)
        LlamaForCausalLM(
            LlamaConfig(**{key: value for key, value in PRESETS["llama_tiny"].items() if key != "model_type"})
        ).save_pretrained(tmp_path / name)
    suite = BeaconConformance()
    suite.run(tmp_path / "run", budget="2 steps", eval_every="never", model=str(tmp_path / "base"), save_format="adapter")
    final = tmp_path / "run" / "final"
    assert not (final / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(final)
    assert json.loads((final / "beacon_adapter.json").read_text())["base"] == str(tmp_path / "base")
    given = AutoModelForCausalLM.from_pretrained(final, base_model=LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    rows = batch([30])["input_ids"]
    assert torch.equal(loaded(rows).logits, given(rows).logits)
    with pytest.raises(InputError, match="was trained on other weights"):
        AutoModelForCausalLM.from_pretrained(final, base_model=LlamaForCausalLM.from_pretrained(tmp_path / "other"))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"beacon_window": 4, "beacon_stride": 8}, ConfigError, "stride: 8 is larger than the window"),
        ({"beacon_window": 64}, InputError, "data: markov keeps none of its .* without a target behind a window of 64"),
        ({"packing": "best-fit"}, ConfigError, "packing: best-fit joins documents"),
        ({"packing": "stream", "beacon_doc_mask": True}, ConfigError, "beacon_doc_mask: a stream does not say"),
        ({"beacon_engine": "loop", "engine": "sharded"}, ConfigError, "beacon_engine: loop runs modules once per window"),
        ({"min_length": 99}, ConfigError, "min_length: 99 is larger than max_length"),
        ({"save_format": "adapter", "only_train_beacon": False}, ConfigError, "save_format: adapter would lose"),
        ({"distill_weight": 0.5, "only_train_beacon": False}, ConfigError, "distill_weight: 0.5 measures beacons by a frozen backbone"),
        ({"distill_weight": 0.5, "engine": "sharded"}, ConfigError, "distill_weight: 0.5 needs whole weights"),
        ({"dtype": "bf16", "only_train_beacon": False}, ConfigError, "dtype: bf16 is for frozen weights"),
        ({"dtype": "bf16", "engine": "sharded"}, ConfigError, "dtype: bf16 weights beside float32 masters"),
        ({"load_in_4_bit": True}, ConfigError, "load_in_4_bit: the preset llama_tiny has random weights"),
        ({"load_in_4_bit": True, "lora_tune": True}, ConfigError, "load_in_4_bit: four bits cannot be trained or merged into"),
        (
            {"load_in_4_bit": True, "engine": "sharded", "model": "x"},
            ConfigError,
            "load_in_4_bit: one process holds the weights, not 1 of the sharded",
        ),
        ({"load_in_4_bit": True, "num_processes": 2}, ConfigError, "load_in_4_bit: one process holds the weights, without DeepSpeed"),
        ({"distill_temperature": 2.0}, ConfigError, "distill_temperature: 2 has no effect without"),
        ({"model": "llama_tiny", "budget": "2 steps", "max_steps": 3}, ConfigError, "max_steps: 3 and --budget"),
    ],
)
def test_mistakes_are_named_before_any_training(options: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        BeaconConformance().run(tmp_path, **options)


def real(folder: Path, **options: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": "smollm2-135m", "data": ["builtin:python-docs[1]"], "beacon_window": 256, "beacon_stride": 256, "beacon_ratio": [2, 4, 8],
        "max_length": 1024, "min_length": 1024, "eval_every": "never", "tensorboard": False, "log_every": 1, "lr": 1e-3,
        "schedule": "constant", "precision": "bf16", "output_dir": folder, "save_format": "adapter", **options,
    }  # fmt: skip
    config = build(TrainConfig, values)
    return run(config, Beacon(config))


def training_losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


@pytest.mark.real
@pytest.mark.slow
def test_a_real_model_learns_resumes_and_is_read_back(tmp_path: Path) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    real(straight, max_steps=5, save_every="3", keep_checkpoints=0)
    losses = training_losses(straight)
    # one row, read five times, by ratios that are drawn
    assert max(losses[3:]) < losses[0]
    real(halves, max_steps=5, save_every="never", resume=str(straight / "checkpoints" / "checkpoint-3"))
    assert training_losses(halves) == losses[3:]
    one, other = (load_file(folder / "final" / "beacon_adapter.safetensors") for folder in (straight, halves))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    model = AutoModelForCausalLM.from_pretrained(straight / "final")
    cache = model.compress(torch.arange(600)[None])
    assert cache.lengths()[0]["seen"] == 600
    assert cache.compression_ratio()[0] > 1
    written = model.generate(torch.arange(5)[None], past_key_values=cache, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert written.shape == (1, 8)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    from beacon.sizes import PRESETS

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{key: value for key, value in PRESETS["llama_tiny"].items() if key != "model_type"})).save_pretrained(
        folder
    )
    return str(folder)


@pytest.mark.parametrize("smaller", [{"dtype": "bf16"}, {"load_in_4_bit": True}], ids=lambda smaller: next(iter(smaller)))
def test_a_smaller_backbone_trains_float32_beacons_and_resumes_bit_for_bit(
    smaller: dict[str, Any], base_folder: str, tmp_path: Path
) -> None:
    made = method(model=base_folder, **smaller)
    half = "dtype" in smaller
    kinds = {name.rpartition(".")[0].rpartition(".")[2]: parameter.dtype for name, parameter in made.model.named_parameters()}
    assert kinds.pop("down_proj") == (torch.uint8 if "load_in_4_bit" in smaller else torch.bfloat16)
    assert kinds["embed_tokens"] == (torch.bfloat16 if half else torch.float32)
    assert {kind for name, kind in kinds.items() if "beacon_" in name} == {torch.float32}
    suite = BeaconConformance()
    options = {"model": base_folder, "tokenizer": "bytes", "eval_every": "never", "log_every": 1, "schedule": "constant", **smaller}
    suite.run(tmp_path / "straight", **options, budget="4 steps")
    suite.run(tmp_path / "halves", **options, budget="2 steps", save_every="2")
    suite.run(tmp_path / "halves", **options, budget="4 steps", resume="auto")
    assert training_losses(tmp_path / "straight") == training_losses(tmp_path / "halves")
    one, other = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("straight", "halves"))
    before = load_file(Path(base_folder) / "model.safetensors")
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name])
        if "beacon_" not in name:
            # the base as it was: four bits are left behind
            assert torch.equal(tensor, before[name].to(torch.bfloat16 if half else torch.float32))
    assert one["model.beacon_embed_tokens.weight"].any()
    AutoModelForCausalLM.from_pretrained(tmp_path / "straight" / "final")
    suite.run(tmp_path / "more", **{**options, "model": str(tmp_path / "straight")}, budget="2 steps", save_format="full")


def test_four_bits_stay_near_the_weights_they_stand_for(base_folder: str) -> None:
    whole, small = method(model=base_folder), method(model=base_folder, load_in_4_bit=True)
    for name, tensor in whole.model.beacon_state_dict().items():
        # copies of the base's dequantised values; the embedding is no linear map
        error = float((small.model.beacon_state_dict()[name] - tensor).norm() / tensor.norm())
        assert (error == 0) == ("embed" in name)
        assert error < 0.15
    rows = batch([41, 30])
    one, other = (next(iter(made.losses(made.module, rows))).total for made in (whole, small))
    assert float(other.detach()) == pytest.approx(float(one.detach()), rel=0.02)


def test_a_token_and_cache_folders_go_to_the_environment_and_into_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from beacon.cli import cli

    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "LM_CORE_CACHE"):
        monkeypatch.setenv(name, "before")
    arguments = [
        "train",
        "--model",
        "llama_tiny",
        "--train-data",
        "synthetic:markov",
        "--output-dir",
        str(tmp_path / "run"),
        "--print-config",
    ]
    given = ["--access_token", "s3cret", "--model-cache-dir", "models", "--dataset-cache-dir", str(tmp_path / "rows")]
    done = CliRunner().invoke(cli, [*arguments, *given], catch_exceptions=False)
    assert done.exit_code == 0
    assert (os.environ["HF_TOKEN"], os.environ["HF_HUB_CACHE"]) == ("s3cret", "models")
    assert os.environ["HF_DATASETS_CACHE"] == os.environ["LM_CORE_CACHE"] == str(tmp_path / "rows")
    assert "s3cret" not in done.output
    assert "cache_dir" not in done.output
    monkeypatch.setattr("sys.argv", ["beacon", *arguments, *given])
    record.write(tmp_path, BeaconConformance().configure())
    assert "s3cret" not in (tmp_path / "record.json").read_text()


def test_evaluations_by_generation_score_the_last_turn(tmp_path: Path) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    turns = [{"role": "user" if k % 2 == 0 else "assistant", "content": " ".join(words[k:])} for k in range(4)]
    chats = tmp_path / "chats.jsonl"
    chats.write_text((json.dumps({"conversations": turns}) + "\n") * 3)
    suite = BeaconConformance()
    options = {"data": [str(chats)], "eval_data": [str(chats)], "packing": "document", "max_length": 200, "chat_template": "llama-2"}
    suite.run(tmp_path / "run", **options, budget="2 steps", eval_every="2", eval_method="generation", log_every=1)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [0 <= record["eval/chats/rouge_l"] <= 1 for record in records if "eval/chats/rouge_l" in record] == [True, True]
    with pytest.raises(ConfigError, match="eval_method: generation reads rows of one document"):
        suite.configure(eval_method="generation", beacon_doc_mask=True, packing="best-fit")


def test_an_answer_that_the_model_writes_itself_scores_one() -> None:
    from beacon.eval.last_turn import score_last_turns
    from beacon.ratios import Rule
    from lm_core.data.vocab import byte_tokenizer
    from tests.beacon.small import beacon_model

    reader = beacon_model(base={"vocab_size": 259, "eos_token_id": 258})
    rows = torch.randint(97, 123, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(rows)
    mask[1, 34:] = 0
    labels = torch.full_like(rows, -100)
    labels[:, 5:9] = rows[:, 5:9]  # an earlier turn
    rule = Rule("list", (2,))
    for b, end in enumerate((40, 34)):
        text = rows[b : b + 1, :29]
        for _ in range(29, end):
            text = torch.cat([text, reader(text, ratios=[2]).logits[:, -1:].argmax(-1)], dim=1)
        rows[b, :end] = text
        labels[b, 29:end] = text[0, 29:]
    found = score_last_turns(reader, byte_tokenizer(), rows, labels, mask, lambda length: rule)
    written = [bool(byte_tokenizer().decode(rows[b, 29:end], skip_special_tokens=True).split()) for b, end in enumerate((40, 34))]
    assert found.tolist() == [sum(written), 2]
    assert any(written)
    rows[:, 29:] = rows[:, 29:].roll(1, 1) + 1
    assert score_last_turns(reader, byte_tokenizer(), rows.clamp(max=250), labels, mask, lambda length: rule)[0] < sum(written)
    with pytest.raises(InputError, match="eval_method: generation needs conversations"):
        score_last_turns(reader, byte_tokenizer(), rows, rows, mask, lambda length: rule)


def test_adapters_of_the_backbone_are_trained_and_merged(tmp_path: Path) -> None:
    suite = BeaconConformance()
    before = {name: tensor.clone() for name, tensor in method().model.state_dict().items()}
    suite.run(tmp_path, budget="3 steps", eval_every="never", lora_tune=True, lora_rank=2, lora_alpha=4, lora_extra_params=["model.norm"])
    after = load_file(tmp_path / "final" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {re.sub(r".*layers\.\d+\.", "", name) for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {
        *(f"self_attn.{letter}_proj.weight" for letter in "qkvo"), *(f"self_attn.beacon_{letter}_proj.weight" for letter in "qkvo"),
        "model.beacon_embed_tokens.weight", "model.norm.weight",
    }  # fmt: skip
    # the last layer's k and v of raw tokens reach the loss, too; updates have the rank of the adapters
    update = after["model.layers.0.self_attn.q_proj.weight"] - before["model.layers.0.self_attn.q_proj.weight"]
    assert torch.linalg.matrix_rank(update, rtol=1e-4) <= 2


def test_a_plain_model_is_trained_without_beacons(tmp_path: Path) -> None:
    suite = BeaconConformance()
    plain = {"enable_beacon": False, "only_train_beacon": False}
    suite.run(tmp_path, budget="3 steps", eval_every="never", **plain)
    assert AutoConfig.from_pretrained(tmp_path / "final").model_type == "llama"
    with pytest.raises(ConfigError, match="lora_targets: no layer of this model is called x_proj"):
        method(lora_tune=True, lora_targets=["x_proj"])
    suite.run(tmp_path / "with", budget="2 steps", eval_every="never")
    with pytest.raises(ConfigError, match=r"enable_beacon: false, but .* has beacons"):
        method(model=str(tmp_path / "with"), **plain)
