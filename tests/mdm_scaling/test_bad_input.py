"""What cannot work is refused: command line, exit code, and words of the message. Nothing is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tests.mdm_scaling.small import network

from lm_core.data.vocab import byte_tokenizer
from mdm_scaling.cli import cli
from mdm_scaling.data.indexed import Writer, index_bytes
from mdm_scaling.fit.points import write_table

# every case begins with one of these; what it repeats wins
PRETRAIN = (
    "pretrain --preset tiny --tokenizer bytes --seq-length 32 --micro-batch-size 2 --global-batch-size 2 --train-samples 200 --device cpu "
    "--save new --num-workers 0 --eval-interval never --no-tensorboard --no-keep-best --quiet"
)
AR = f"{PRETRAIN} --objective ar --data synthetic:markov"
MDM = f"{PRETRAIN} --objective mdm --data synthetic:markov"
CORPUS = f"{PRETRAIN} --objective ar --fp32 --split 1,0,0 --data"
PATHS = f"{PRETRAIN} --objective ar --fp32 --split 1,0,0 --train-data-path-file"
GENERATE = "generate --checkpoint model --prompt ab --trace trace.jsonl --out new.jsonl"
FIT = "fit chinchilla --objective ar --bootstrap 0 --out law.json"
# the run that is there has seen two updates of this command
RUN = "--fp32 --save run"

CASES = [
    # an option of the other objective
    (f"{AR} --mask-eps 0.01", 2, "mask_eps: only --objective mdm masks tokens; drop --mask-eps"),
    (f"{AR} --t-sampling iid", 2, "t_sampling: only --objective mdm"),
    (f"{AR} --mask-mode fixed-count", 2, "mask_mode: only --objective mdm"),
    (f"{AR} --loss-weight uniform", 2, "loss_weight: only --objective mdm"),
    (f"{AR} --max-loss-weight 2", 2, "max_loss_weight: only --objective mdm"),
    (f"{AR} --low-noise-start", 2, "low_noise_start: only --objective mdm"),
    (f"{AR} --ar-ratio 0.5", 2, "ar_ratio: 0.5 replaces masks.*use --objective mdm"),
    (f"{MDM} --randmask-ratio 0.5", 2, "randmask_ratio: 0.5 perturbs.*use --objective ar"),
    (f"{MDM} --num-order-list 2", 2, "num_order_list: 2 perturbs.*use --objective ar"),
    (f"{MDM} --use-order-list", 2, "num_order_list: 1 perturbs.*use --objective ar"),
    (f"{MDM} --use-predefined-order", 2, "use_predefined_order: True perturbs.*use --objective ar"),
    (f"{MDM} --order-target-position embedding", 2, "order_target_position: embedding perturbs.*use --objective ar"),
    (f"{AR} --num-order-list 2 --randmask-ratio 0.5 --randmask-mode column", 2, "num_order_list: goes with neither.*drop one"),
    # sizes
    (f"{AR} --preset 425m", 2, "preset: '425m' is unknown; did you mean 425M"),
    ("presets show 118M", 2, "preset: '118M' is unknown; did you mean .*117M"),
    (f"{AR} --init-from model", 2, "--preset tiny and --init-from model: are the same option; give one"),
    (f"{AR.replace('--preset tiny', '--init-from model')} --num-layers 3", 2, "num_layers: model brings its own sizes; drop --num-layers"),
    (f"{AR} --kv-channels 7", 2, "kv_channels: '7' is wrong; give .* divisible by 2"),
    (f"{AR} --max-position-embeddings 16", 2, "max_length: 32 is beyond the 16 positions; use at most"),
    (f"{AR.replace('--preset tiny', '--init-from model')} --seq-length 65", 2, "max_length: 65 is beyond the 64 positions of model; use at most"),
    # batch and length
    (f"{AR} --micro-batch-size 4 --global-batch-size 6", 2, "global_batch_size: 6 is not a multiple of 4.*change --micro-batch-size"),
    (f"{AR} --flops 1e12", 2, "budget: train_samples and flops given; use exactly one"),
    (f"{AR} --train-tokens 6400", 2, "budget: train_samples and train_tokens given; use exactly one"),
    (f"{AR} --unique-tokens 6400 --epochs 2", 2, "budget: train_samples and epochs given; use exactly one"),
    (AR.replace("--train-samples 200", ""), 2, "budget: none given; use exactly one"),
    (AR.replace("--train-samples 200", "--epochs 2"), 2, "epochs: counts passes over --unique-tokens, which is not given; add it"),
    # the schedule
    (f"{AR} --lr-warmup-samples 100 --lr-decay-samples 100", 2, "lr_decay_samples: 100 is not beyond the warm-up of 100; make it longer"),
    (f"{AR} --lr-warmup-samples 200", 2, "warmup: 200 samples are the whole run.*shorten it"),
    (f"{AR} --lr-warmup-samples 201", 2, "warmup: 201 .*shorten"),
    (f"{AR} --min-lr 1e-3", 2, "min_lr: 0.001 is above the peak 0.0002; use a smaller value"),
    # ranges
    (f"{MDM} --ar-ratio 1.5", 2, "ar_ratio: '1.5' is wrong; give .* at most 1"),
    (f"{AR} --randmask-ratio -0.1", 2, "randmask_ratio: '-0.1' is wrong; give .* at least 0"),
    (f"{MDM} --variable-length-ratio 1.1", 2, "variable_length_ratio: '1.1' is wrong; give .* at most 1"),
    (f"{MDM} --low-noise-ratio 2", 2, "low_noise_ratio: '2' is wrong; give .* at most 1"),
    (f"{AR} --attention-dropout 1", 2, "attention_dropout: '1' is wrong; give .* below 1"),
    (f"{MDM} --mask-eps 0", 2, "mask_eps: '0' is wrong; give .* above 0"),
    (f"{MDM} --mask-eps 1", 2, "mask_eps: '1' is wrong; give .* below 1"),
    (f"{MDM} --mask-mode fixed-count --t-sampling shift", 2, "t_sampling: shift .* fixed-count; use stratified or iid"),
    (f"{MDM} --num-mc 0", 2, "num_mc: '0' is wrong; give .* at least 1"),
    ("eval loss --checkpoint model --data synthetic:markov --num-mc 0", 2, "num_mc: '0' is wrong; give .* at least 1"),
    # corpora
    (f"{CORPUS} no-index", 2, r"data: no-index\.idx is missing beside no-index\.bin; both"),
    (f"{CORPUS} no-tokens", 2, r"data: no-tokens\.bin is missing beside no-tokens\.idx; both"),
    (f"{CORPUS} magic", 2, r"data: magic\.idx does not begin with MMIDIDX"),
    (f"{CORPUS} short-index", 2, r"data: short-index\.idx has \d+ bytes, but its header promises \d+; copy"),
    (f"{CORPUS} short-tokens", 2, r"data: short-tokens\.bin has \d+ bytes, but its index needs \d+; copy"),
    (f"{CORPUS} foreign", 2, "holds token 300, but the tokenizer has 259"),
    (f"{CORPUS} empty", 2, r"data: empty\.idx lists no document; tokenise"),
    (f"{CORPUS} good --seq-length 100", 2, "data: good has 100 tokens, fewer than one sample of 100.*lower --seq-length"),
    (f"{PATHS} missing.txt", 2, r"train_data_path_file: missing\.txt cannot be read"),
    (f"{PATHS} empty.txt", 2, r"train_data_path_file: empty\.txt names no corpus; write"),
    (f"{PATHS} odd.txt", 2, r"train_data_path_file: odd\.txt.* no pair"),
    # engines
    (f"{AR} --zero-stage 3 --tensor-model-parallel-size 2 --num-processes 2", 2, "tensor_model_parallel_size: 2 goes with.*drop --engine"),
    (f"{AR} --zero-stage 2 --pipeline-model-parallel-size 2 --num-processes 2", 2, "pipeline_model_parallel_size: 2 goes with.*drop --engine"),
    (
        f"{AR} --deepspeed --zero-stage 1 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-processes 4", 2,
        "tensor_model_parallel_size: 2 goes with.*drop --engine",
    ),
    (f"{AR} --fp16 --bf16", 2, "precision: bf16 and fp16 given; use one"),
    # of fp16 core's engines scale the loss themselves, and DeepSpeed's is the one that is refused
    (f"{AR} --fp16 --zero-stage 2", 2, "precision: fp16 runs in the replicated and sharded engines only; use bf16"),
    # a run that is there
    (f"{AR} {RUN}", 2, "output_dir: run already holds a run; add --resume auto, --overwrite, or choose another"),
    (f"{AR} {RUN} --resume auto --seed 5", 4, "seed: .*5"),
    (f"{MDM} {RUN} --resume auto", 4, "objective: .*mdm"),
    (f"{AR} {RUN} --resume auto --num-layers 3", 4, "num_layers: .*3"),
    # fits
    (f"{FIT} few.csv", 2, "runs: 3 points are too few for 5 parameters; add runs"),
    (f"{FIT} negative.csv", 2, "runs: .*the loss -1.* is not a number above 0; leave"),
    (f"{FIT} nan.csv", 2, "runs: .*the loss nan is not a number above 0; leave"),
    (f"{FIT} unique.csv", 2, "runs: .*unique tokens are more than the .* processed; U is at most D"),
    (f"{FIT} one-size.csv", 2, "runs: all points have the same N; a law needs at least two"),
    # generation
    (f"{GENERATE} --max-new-tokens 8 --block-length 2 --steps 3", 2, "steps: 3 are fewer than the 4 blocks; use at least"),
    (f"{GENERATE} --max-new-tokens 63", 2, r"max_new_tokens: 2 \+ 63 tokens are more than the 64 positions; ask for fewer"),
]  # fmt: skip


def corpora(folder: Path) -> None:
    """One that is whole, and those with one fault each."""
    for name, documents in (("good", [[1] * 100]), ("foreign", [[1] * 99 + [300]])):
        with Writer(folder / name, np.dtype("<u2")) as writer:
            for document in documents:
                writer.add(document)
    for name in ("no-index", "no-tokens", "magic", "short-index", "short-tokens", "empty"):
        for ending in ("bin", "idx"):
            shutil.copy(folder / f"good.{ending}", folder / f"{name}.{ending}")
    (folder / "no-index.idx").unlink()
    (folder / "no-tokens.bin").unlink()
    index, tokens = (folder / "good.idx").read_bytes(), (folder / "good.bin").read_bytes()
    (folder / "magic.idx").write_bytes(b"NOTINDEX" + index[8:])
    (folder / "short-index.idx").write_bytes(index[:-4])
    (folder / "short-tokens.bin").write_bytes(tokens[:-2])
    (folder / "empty.idx").write_bytes(index_bytes([], [0], np.dtype("<u2")))
    (folder / "empty.bin").write_bytes(b"")
    (folder / "empty.txt").write_text("# nothing\n")
    (folder / "odd.txt").write_text('"1.0 good" "0.5"\n')


def tables(folder: Path) -> None:
    """Runs that identify no law."""
    rows = [{"objective": "ar", "N": 1e6 * (1 + n % 3), "D": 1e8 * (n + 1), "U": 1e8 * (n + 1), "best_loss": 3 - 0.1 * n} for n in range(9)]
    faults = {"negative": {"best_loss": -1.0}, "nan": {"best_loss": "nan"}, "unique": {"U": 1e12}}
    for name, fault in faults.items():
        write_table(folder / f"{name}.csv", [{**rows[0], **fault}, *rows[1:]])
    write_table(folder / "few.csv", rows[:3])
    write_table(folder / "one-size.csv", [{**row, "N": 1e6} for row in rows])


def invoke(words: str) -> Result:
    return CliRunner().invoke(cli, words.split())


def listing(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Damaged corpora, a model, tables, and a run of two updates that was told to make 100."""
    made = tmp_path_factory.mktemp("bad")
    corpora(made)
    tables(made)
    network("mdm", vocabulary=259).save_pretrained(made / "model")
    byte_tokenizer().save_pretrained(made / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        started = invoke(f"{AR} {RUN} --exit-interval 2")
    assert started.exit_code == 130, started.output
    return made


@pytest.mark.parametrize(
    ("words", "code", "message"), CASES, ids=[re.sub(".*(--save new|--out).*?--quiet", "", case[0])[:90] for case in CASES]
)
def test_it_is_refused_and_nothing_is_written(words: str, code: int, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = listing(folder)
    result = invoke(words)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert re.search(message, result.output), result.output
    assert not (folder / "new").exists()
    assert listing(folder) == before
