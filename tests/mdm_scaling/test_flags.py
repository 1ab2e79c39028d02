"""Every option that the specification gives `pretrain` is taken in both spellings."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from lm_core.cli import _SPLIT
from mdm_scaling.cli import cli

# a flag, and a value where it has one; those of the specification's section 4, in its order
SPECIFIED = [
    "objective=ar",
    "preset=7M",
    "num-layers=2",
    "hidden-size=64",
    "num-attention-heads=2",
    "kv-channels=32",
    "num-key-value-heads=2",
    "init-from=smollm2-135m",
    "ffn-hidden-size=64",
    "seq-length=64",
    "max-position-embeddings=64",
    "use-rotary-position-embeddings",
    "rotary-theta=1e4",
    "disable-bias-linear",
    "normalization=rmsnorm",
    "norm-eps=1e-5",
    "swiglu",
    "untie-embeddings",
    "init-std=0.02",
    "attention-dropout=0.1",
    "hidden-dropout=0.1",
    "make-vocab-size-divisible-by=128",
    "restrict-logits",
    "recompute=none",
    "bf16",
    "fp16",
    "fp32",
    "micro-batch-size=8",
    "global-batch-size=256",
    "rampup-batch-size=32,32,1000",
    "seed=1234",
    "train-samples=1",
    "train-tokens=1",
    "flops=1",
    "unique-tokens=9",
    "epochs=1",
    "optimizer=adam",
    "adam-beta1=0.9",
    "adam-beta2=0.95",
    "adam-eps=1e-8",
    "lr=2e-4",
    "min-lr=2e-5",
    "lr-decay-style=cosine",
    "lr-decay-samples=9",
    "lr-warmup-samples=1",
    "lr-warmup-fraction=0.1",
    "clip-grad=1",
    "weight-decay=0.1",
    "save=x",
    "load=x",
    "resume=auto",
    "overwrite",
    "train-data-path-file=x",
    "valid-data-path-file=x",
    "test-data-path-file=x",
    "data-path=x",
    "split=969,30,1",
    "data-impl=mmap",
    "data-cache-path=x",
    "tokenizer=byte",
    "vocab-file=x",
    "merge-file=x",
    "epoch-shuffle=pooled",
    "packing=stream",
    "eod-mask-loss",
    "reset-attention-mask",
    "reset-position-ids",
    "num-workers=2",
    "mask-eps=1e-3",
    "t-sampling=stratified",
    "mask-mode=bernoulli",
    "loss-weight=elbo",
    "max-loss-weight=1",
    "variable-length-ratio=0",
    "low-noise-start",
    "low-noise-iter=1000",
    "low-noise-ratio=0.5",
    "ar-ratio=0",
    "randmask-ratio=0",
    "randmask-mode=attention",
    "use-order-list",
    "num-order-list=0",
    "use-predefined-order",
    "order-target-position=none",
    "log-interval=10",
    "save-interval=1000",
    "eval-interval=1000",
    "eval-iters=100",
    "num-mc=1",
    "eval-seed=4321",
    "eval-data=fixed",
    "keep-last=2",
    "keep-best",
    "tensorboard-dir=x",
    "tensorboard-queue-size=5",
    "log-timers-to-tensorboard",
    "log-batch-size-to-tensorboard",
    "log-validation-ppl-to-tensorboard",
    "wandb-project=x",
    "wandb-exp-name=x",
    "wandb-save-dir=x",
    "wandb-group=x",
    "wandb-mode=online",
    "kill-switch-file=x",
    "exit-interval=1",
    "exit-duration-in-mins=1",
    "exit-signal-handler",
    "skip-train",
    "dry-run",
    "engine=auto",
    "deepspeed",
    "deepspeed_config=x",
    "zero-stage=0",
    "offload-optimizer=none",
    "offload-param=none",
    "cpu-optimizer",
    "tensor-model-parallel-size=1",
    "pipeline-model-parallel-size=1",
    "no-pipeline-parallel",
    "master-addr=x",
    "master-port=1",
    "recipe=tiny",
    "override-resume=x",
]


def spellings() -> Iterator[tuple[str, str | None]]:
    for entry in SPECIFIED:
        name, equals, value = entry.partition("=")
        for form in dict.fromkeys((name.replace("_", "-"), name.replace("-", "_"))):
            yield f"--{form}", value if equals else None


def mistakes(*words: str) -> list[str]:
    """What parsing alone has to say; what does not go together is refused later."""
    context = cli.commands["pretrain"].make_context("pretrain", list(words))  # type: ignore[attr-defined]
    found: list[str] = context.meta[_SPLIT].mistakes
    return found


@pytest.mark.parametrize(("flag", "value"), list(spellings()))
def test_an_option_of_the_specification_is_taken_in_either_spelling(flag: str, value: str | None) -> None:
    assert mistakes(*([flag] if value is None else [flag, value])) == []


def test_the_specification_names_no_option_twice() -> None:
    names = [re.sub("=.*", "", entry) for entry in SPECIFIED]
    assert len(names) == len(set(names))


def test_an_option_that_nobody_knows_is_refused() -> None:
    assert any("--no-such-option" in mistake for mistake in mistakes("--no-such-option", "3"))
