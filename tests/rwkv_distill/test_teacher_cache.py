"""A teacher on disk: the same losses as the live one, and refusals where it does not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_core.config import build
from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError, InputError
from lm_core.method import Batch
from lm_core.models import load_model
from rwkv_distill.cache_teacher import likeliest, write
from rwkv_distill.config import MODELS, CacheConfig, TrainConfig
from rwkv_distill.distill import Distill, DistilledLogits
from rwkv_distill.student import StudentModel
from rwkv_distill.student_config import StudentConfig
from rwkv_distill.teacher_cache import TeacherCache, keys
from tests.rwkv_distill.test_method import TINY

VALUES: dict[str, Any] = {**TINY, "data": ["synthetic:markov[12]"], "micro_batch_size": 3, "num_workers": 0, "device": "cpu", "stage": 2}


def cached(folder: Path, **options: Any) -> dict[str, Any]:
    return write(build(CacheConfig, {**VALUES, "output_dir": folder, **options}))


@pytest.mark.parametrize("packing", ["best-fit", "document"])
def test_a_cache_of_all_columns_gives_the_losses_of_the_teacher(packing: str, tmp_path: Path) -> None:
    made = cached(tmp_path / "cache", top_k=512, packing=packing)
    assert made["tokens"] > 100
    student = {"head_size": 32}
    losses, gradients = [], []
    for folder in (None, tmp_path / "cache"):
        config = build(
            TrainConfig, {**VALUES, "packing": packing, "dropout": 0.0, "teacher_cache": folder, "student": student, "ce_weight": 0.3}
        )
        method = Distill(config)
        data = method.data(byte_tokenizer())
        torch.manual_seed(0)
        model = method.build()
        rows = next(iter(data.train.values()))
        batch = Batch(rows.collate([rows[n] for n in (2, 0, 1)]), index=torch.arange(3), step=0)
        (loss,) = method.losses(model, batch)
        loss.total.backward()
        losses.append(float(loss.total.detach()) / method.targets(batch))
        gradients.append(model.student.mixers()[0].receptance.weight.grad)
    # log-probabilities are stored in 16 bits
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-2, atol=2e-3 * float(gradients[0].abs().max()))


def test_likeliest_tokens_and_the_rest_hold_all_of_the_mass() -> None:
    logits = torch.randn(5, 40)
    ids, logp, rest = likeliest(logits, 7)
    expected = logits.softmax(-1)
    assert torch.equal(ids, expected.topk(7).indices)
    torch.testing.assert_close(logp.exp().sum(-1) + rest.exp(), torch.ones(5))
    assert likeliest(logits, 50)[2].tolist() == [-math.inf] * 5


def test_a_row_has_one_hash_on_either_side_of_its_padding() -> None:
    def hashed(ids: list[int], mask: list[int]) -> str:
        return keys(Batch({"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}, index=torch.zeros(1), step=0))[0][0]

    assert hashed([5, 6, 0], [1, 1, 0]) == hashed([0, 5, 6], [0, 1, 1]) != hashed([5, 6, 0], [1, 1, 1])


def test_caches_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    cached(tmp_path / "cache", max_trained_tokens=48, top_k=4)
    cache = TeacherCache(tmp_path / "cache", byte_tokenizer())
    other = Batch({"input_ids": torch.tensor([[1, 2, 3]])}, index=torch.zeros(1), step=0)
    with pytest.raises(InputError, match="lacks a row of this run"):
        cache.of(other)
    index = json.loads((tmp_path / "cache/index.json").read_text())
    (tmp_path / "cache/index.json").write_text(json.dumps({**index, "tokenizer_sha256": "x"}))
    with pytest.raises(InputError, match="another tokenizer"):
        TeacherCache(tmp_path / "cache", byte_tokenizer())
    with pytest.raises(InputError, match=r"holds no index.json"):
        TeacherCache(tmp_path, byte_tokenizer())
    for options, message in (
        ({"temperature": 2.0}, "a cache holds probabilities at 1"),
        ({"teacher_model_id": "tiny"}, "stands for the teacher that wrote it"),
        ({"stage": 3}, "teacher_cache: belongs to stage 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(TrainConfig, {**VALUES, "teacher_cache": tmp_path, **options})


def test_a_cached_teacher_of_fewer_columns_is_compared_where_both_have_ids() -> None:
    from tests.rwkv_distill.small import student, teacher, tokens

    pair, ids = DistilledLogits(student(), teacher(vocab_size=50)), tokens(1, 6).clamp(max=49)
    batch = Batch({"input_ids": ids, "labels": ids}, index=torch.arange(1), step=0)
    method = Distill(build(TrainConfig, VALUES))
    (live,) = method.losses(pair, batch)

    class Whole:
        def of(self, batch: Batch) -> Any:
            return likeliest(pair.teacher(input_ids=ids).logits[0], 50)

    method.cache, method.columns = Whole(), 50  # type: ignore[assignment]
    (found,) = method.losses(DistilledLogits(student(), None), batch)
    torch.testing.assert_close(found.total, live.total, rtol=1e-4, atol=1e-5)


def test_additions_to_the_mlps_are_summed_up_wherever_weights_are_read(tmp_path: Path) -> None:
    from rwkv_distill.adapters import add_adapters, merged
    from rwkv_distill.weights import read

    student = StudentModel.from_teacher(load_model("tiny", presets=MODELS), StudentConfig(head_size=32))
    add_adapters(student, 4)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.arange(8)[None]
    plain = merged(student)
    torch.testing.assert_close(plain(ids).logits, student(ids).logits, rtol=1e-4, atol=1e-5)
    torch.save({name: tensor.detach() for name, tensor in student.state_dict().items()}, tmp_path / "x.bin")
    state = plain.state_dict()
    for name, tensor in read(tmp_path / "x.bin"):
        assert torch.equal(tensor, state[name]), name
    assert merged(plain) is plain
