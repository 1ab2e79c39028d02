"""Stage 2: the loss against full logits, what is trained, and where weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from lm_core.config import build
from lm_core.errors import ConfigError, InputError
from lm_core.method import Batch
from lm_core.options import RunConfig
from lm_core.testing import Conformance
from rwkv_distill.config import TrainConfig
from rwkv_distill.distill import Distill, DistilledLogits, require_same_tokens
from rwkv_distill.finetune import Finetune, LabelledText
from rwkv_distill.hf.modeling_rwkv_distill import RwkvDistillForCausalLM
from rwkv_distill.student import StudentModel, untie
from rwkv_distill.student_config import StudentConfig
from rwkv_distill.weights import consolidate, load_into
from tests.rwkv_distill.small import student, teacher, tokens
from tests.rwkv_distill.test_method import TINY


def config(**options: Any) -> TrainConfig:
    return build(TrainConfig, {**TINY, "stage": 2, "dropout": 0.0, "student": {"head_size": 32}, **options})


@pytest.mark.slow
class TestDistill(Conformance):
    def configure(self, **options: Any) -> TrainConfig:
        # dropout draws by place in the micro-batch, so with it a step depends on how a batch is split
        return config(**{"ce_weight": 0.2, **options})

    def method(self, config: RunConfig) -> Distill:
        assert isinstance(config, TrainConfig)
        return Distill(config)


@pytest.mark.slow
class TestFinetune(Conformance):
    def configure(self, **options: Any) -> TrainConfig:
        return config(**{"stage": 3, **options})

    def method(self, config: RunConfig) -> Finetune:
        assert isinstance(config, TrainConfig)
        return Finetune(config)


def test_stage_3_learns_the_cross_entropy_of_the_text() -> None:
    module = LabelledText(student("qwen2"))
    first, second = tokens(1, 7), tokens(1, 5, seed=1)
    packed = batch_of(torch.cat([first, second], 1), document_ids=torch.tensor([[0] * 7 + [1] * 5]))
    packed["labels"][0, 7] = -100
    method = Finetune(config(stage=3))
    (loss,) = method.losses(module, packed)
    expected = sum(F.cross_entropy(module.student(ids).logits[0, :-1], ids[0, 1:], reduction="sum") for ids in (first, second))
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)
    assert method.targets(packed) == 10


def test_a_trained_head_is_not_lost_where_the_student_begins_tied(tmp_path: Path) -> None:
    shape = {"tie_word_embeddings": True}
    source = student(shape=shape)
    untie(source)
    with torch.no_grad():
        source.lm_head.weight.add_(1)
    source.save_pretrained(tmp_path)
    for file in ("model.safetensors", "pytorch_model.bin"):
        target = student(shape=shape, busy=False)
        assert target.lm_head.weight is target.model.embed_tokens.weight
        load_into(target, tmp_path / file)
        assert torch.equal(target.lm_head.weight, source.lm_head.weight)
        assert torch.equal(target.model.embed_tokens.weight, source.model.embed_tokens.weight)


def batch_of(ids: Tensor, **more: Tensor) -> Batch:
    labels = ids.clone()
    labels[:, 0] = -100
    return Batch({"input_ids": ids, "labels": labels, **more}, index=torch.arange(len(ids)), step=0)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_loss_is_that_of_full_logits_over_unmasked_positions(direction: str) -> None:
    pair = DistilledLogits(student("qwen2"), teacher("qwen2"))
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    batch = batch_of(ids, attention_mask=mask)
    batch["labels"][1, 6:] = -100
    # the last row only fills up the batch, as the evaluation's loader marks it
    batch.index[2] = -1
    batch["labels"][2] = -100
    method = Distill(config(kl_weight=0.7, ce_weight=0.3, temperature=2.0, kl_direction=direction, kl_chunk=4))
    (loss,) = method.losses(pair, batch)
    ours, theirs = pair.student(ids, mask).logits[:2], pair.teacher(input_ids=ids, attention_mask=mask).logits[:2].detach()
    real = mask[:2].bool()
    log_q, log_p = ((logits[real] / 2).log_softmax(-1) for logits in (ours, theirs))
    pairs = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    kl = 4 * (pairs[0].exp() * (pairs[0] - pairs[1])).sum()
    ce = F.cross_entropy(ours[:, :-1].flatten(0, 1), batch["labels"][:2, 1:].flatten(), ignore_index=-100, reduction="sum")
    expected = 0.7 * kl + 0.3 * ce
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=1e-4)
    assert loss.metrics["kl"].tolist() == pytest.approx([kl.item(), 15], rel=1e-4)
    assert loss.metrics["ce"].tolist() == pytest.approx([ce.item(), 13], rel=1e-4)
    names = [name for name, p in pair.student.named_parameters() if p.requires_grad]
    found, wanted = (
        torch.autograd.grad(total, [pair.student.get_parameter(n) for n in names], retain_graph=True) for total in (loss.total, expected)
    )
    for name, mine, other in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=name)


def test_a_packed_batch_has_the_loss_of_its_documents() -> None:
    pair = DistilledLogits(student("qwen3"), teacher("qwen3"))
    method = Distill(config(ce_weight=0.5))
    first, second = tokens(1, 7), tokens(1, 5, seed=1)
    packed = batch_of(torch.cat([first, second], 1), document_ids=torch.tensor([[0] * 7 + [1] * 5]))
    packed["labels"][0, 7] = -100
    (whole,) = method.losses(pair, packed)
    parts = [loss.total for ids in (first, second) for loss in method.losses(pair, batch_of(ids))]
    torch.testing.assert_close(whole.total, torch.stack(parts).sum(), rtol=1e-5, atol=1e-5)
    assert method.targets(packed) == 12


def test_teachers_of_another_vocabulary_are_compared_where_both_have_ids() -> None:
    pair = DistilledLogits(student(), teacher(vocab_size=70))
    ids = tokens(1, 6)
    (loss,) = Distill(config()).losses(pair, batch_of(ids))
    log_p = pair.teacher(input_ids=ids).logits[..., :61].log_softmax(-1)
    log_q = pair.student(ids).logits.log_softmax(-1)
    torch.testing.assert_close(loss.total, (log_p.exp() * (log_p - log_q)).sum(), rtol=1e-4, atol=1e-5)


def test_teachers_with_other_tokens_are_refused() -> None:
    from lm_core.data.vocab import byte_tokenizer, train_bpe

    bytes_, pairs = byte_tokenizer(), train_bpe(["some text"], 259)
    require_same_tokens(bytes_, byte_tokenizer(), 259)
    with pytest.raises(ConfigError, match="teacher_model_id: id 0 is 'Ā' for the student and '<pad>' for this teacher"):
        require_same_tokens(bytes_, pairs, 259)


def test_ids_beyond_the_shared_vocabulary_are_refused() -> None:
    suite = TestDistill()
    method, engine, _ = suite.assemble(suite.options(teacher_model_id="tiny"))
    with pytest.raises(InputError, match="data: holds the id 512, but student and teacher share only 512 ids"):
        list(method.losses(engine.model, batch_of(torch.full((1, 4), 512))))


# section 7.3 of the specification
TABLE = {
    (False, False): {"time_mixer", "q_proj", "mlp", "input_layernorm", "post_attention_layernorm"},
    (False, True): {"time_mixer", "q_proj", "input_layernorm", "post_attention_layernorm"},
    (True, False): {"time_mixer", "q_proj", "mlp", "input_layernorm", "post_attention_layernorm", "embed_tokens", "model.norm", "lm_head"},
    (True, True): {"time_mixer", "q_proj", "input_layernorm", "post_attention_layernorm", "embed_tokens", "model.norm", "lm_head"},
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("freeze_mlp", [False, True])
def test_what_is_trained(full: bool, freeze_mlp: bool) -> None:
    suite = TestDistill()
    options = suite.options(full_params=full, freeze_mlp=freeze_mlp, student={"layers": [1], "head_size": 32})
    _, engine, _ = suite.assemble(options)
    kinds = {"time_mixer", "q_proj", "mlp", "input_layernorm", "post_attention_layernorm", "embed_tokens", "model.norm", "lm_head"}
    for name, parameter in engine.model.named_parameters():
        kind = next((kind for kind in kinds if kind in name), "q_proj")
        assert parameter.requires_grad == (kind in TABLE[full, freeze_mlp]), name


def test_training_embeddings_unties_the_head(tmp_path: Path) -> None:
    suite = TestDistill()
    values = {"full_params": True, "model": str(tmp_path / "tied")}
    teacher(vocab_size=512, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    suite.run(tmp_path / "run", budget="2 steps", **values)
    from rwkv_distill.student import load_student

    trained = load_student(tmp_path / "run/final")
    assert not trained.config.tie_word_embeddings
    assert not torch.equal(trained.lm_head.weight, trained.model.embed_tokens.weight)


def test_the_teacher_is_untouched_by_training() -> None:
    suite = TestDistill()
    method, engine, loader = suite.assemble(suite.options(full_params=True))
    before = {name: value.clone() for name, value in engine.model.teacher.state_dict().items()}
    engine.start(1e-2)
    engine.accumulate(method, next(loader), 100)
    engine.step()
    for name, value in engine.model.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not [name for name in engine.model.state_dict() if name.startswith("teacher")]


def test_dropout_is_drawn_in_training_only_and_repeats_under_checkpointing() -> None:
    suite = TestDistill()
    runs = []
    for recompute in (True, False):
        method, engine, loader = suite.assemble(suite.options(dropout=0.3, gradient_checkpointing=recompute))
        batches = next(loader)
        engine.start(1e-3)
        sums = engine.accumulate(method, batches, 100)
        gradients = {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}
        runs.append((float(sums.loss), gradients))
        engine.model.eval()
        quiet = [sum(loss.total.item() for loss in method.losses(engine.model, batches[0])) for _ in range(2)]
        assert quiet[0] == quiet[1] != runs[-1][0]
    assert runs[0][0] == runs[1][0]
    for name, gradient in runs[0][1].items():
        torch.testing.assert_close(gradient, runs[1][1][name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["bin", "safetensors", "folder"])
def test_weights_come_from_files_and_folders(kind: str, tmp_path: Path) -> None:
    source, target = student(), student(busy=False)
    state = {name: value.clone() for name, value in source.state_dict().items() if name != "lm_head.weight"}
    path = tmp_path / f"weights.{kind}"
    if kind == "bin":
        torch.save(state, path)
    elif kind == "safetensors":
        save_file(state, path)
    else:
        source.save_pretrained(path, max_shard_size="100KB")
        assert len(list(path.glob("model-*.safetensors"))) > 1
    load_into(target, path)
    for name, value in state.items():
        assert torch.equal(target.state_dict()[name], value), name


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in student().state_dict().items() if name != "lm_head.weight"}
    name = "model.layers.1.self_attn.time_mixer.k_k"
    save_file({key: value for key, value in state.items() if key != name}, tmp_path / "lacks.safetensors")
    with pytest.raises(InputError, match=f"lacks 1 tensors of mixers, first {name}"):
        load_into(student(), tmp_path / "lacks.safetensors")
    load_into(student(), tmp_path / "lacks.safetensors", fresh_mixers=True)
    save_file({**state, name: torch.zeros(1, 1, 7)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=rf"{name} is \(1, 1, 7\) .* and \(1, 1, 128\)"):
        load_into(student(), tmp_path / "other.safetensors")
    torch.save({"x": Path("code")}, tmp_path / "objects.bin")
    with pytest.raises(InputError, match="cannot be read as tensors"):
        load_into(student(), tmp_path / "objects.bin")
    with pytest.raises(InputError, match="holds no weights"):
        load_into(student(), tmp_path)


def test_options_of_the_other_stage_are_refused() -> None:
    with pytest.raises(ConfigError, match="full_params: belongs to stage 2 and 3, not to --stage 1"):
        build(TrainConfig, {**TINY, "full_params": True})
    with pytest.raises(ConfigError, match="align_loss: belongs to stage 1, not to --stage 2"):
        config(align_loss="mse")
    with pytest.raises(ConfigError, match="kl_weight: 0 beside a ce_weight of 0"):
        config(kl_weight=0)


def test_the_student_is_a_transformers_model() -> None:
    assert isinstance(student(), RwkvDistillForCausalLM)


SHARING = {"sharded": {"engine": "sharded"}, "zero": {"zero_stage": 3}}


def _shares(folder: Path) -> list[float]:
    """Part of the teacher's weights that this process holds, by engine; a run of each is left in `folder`."""
    from lm_core.engine.replicated import local

    found = []
    for name, engine in SHARING.items():
        suite = TestDistill()
        _, made, _ = suite.assemble(suite.options(folder, **engine))
        inner: Any = made.model.module if made.kind == "deepspeed" else made.model
        weights = list(inner.lender.parameters())
        found.append(sum(local(weight).numel() for weight in weights) / sum(weight.numel() for weight in weights))
        suite.run(folder / name, budget="1 steps", micro_batch_size=2, eval_every="never", save_every="never", **engine)
    return found


@pytest.mark.slow
def test_a_teacher_is_shared_out_where_its_student_is_and_checkpoints_in_parts_become_one_file(tmp_path: Path) -> None:
    from lm_core.testing import spawn

    # what both learn is part of the conformance suite
    assert all(share <= 0.6 for process in spawn(_shares, tmp_path) for share in process)
    for name in SHARING:
        consolidate(tmp_path / name, tmp_path / "all.safetensors")
        found, expected = load_file(tmp_path / "all.safetensors"), load_file(tmp_path / name / "final/model.safetensors")
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name


def test_the_loss_on_logits_is_that_of_the_fused_head() -> None:
    from rwkv_distill.losses import kl
    from rwkv_distill.ops import linear_kl

    torch.manual_seed(0)
    h_s, h_t, w_s, w_t = torch.randn(9, 4), torch.randn(9, 5), torch.randn(30, 4), torch.randn(33, 5)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 1])
    for direction in ("forward", "reverse", "adaptive"):
        for tau in (1.0, 2.0):
            expected = linear_kl(h_s, w_s, (h_t, w_t), mask, tau=tau, direction=direction)[1]
            torch.testing.assert_close(kl(h_s @ w_s.T, h_t @ w_t.T, mask, tau, direction), expected, rtol=1e-5, atol=1e-6)


def test_the_students_own_alignment_losses_are_those_of_stage_1() -> None:
    from rwkv_distill.align import AlignedLayers

    model, ids = teacher("qwen2"), tokens(2, 9)
    made = StudentModel.from_teacher(model, StudentConfig(layers=[0, 2]))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    found = made.alignment_losses(ids, mask, kind="mse")
    expected = [loss / 15 for _, loss in AlignedLayers(made, made.teacher_attentions)(ids, mask, kind="mse")]
    torch.testing.assert_close(found, torch.stack(expected))
    found.sum().backward()
    assert made.mixers()[0].value.weight.grad is not None
    # the layer that keeps softmax attention stays as it was
    assert made.model.layers[1].self_attn.q_proj.weight.requires_grad
