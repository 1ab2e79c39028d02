"""Every refusal that the specification names, as a user meets it: exit code, field and value of one command each."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from beacon.attach import attach_beacon
from beacon.cli import cli
from beacon.config import BeaconConfig
from beacon.options import (
    CompressConfig,
    GenerateConfig,
    GridOptions,
    InfbenchConfig,
    LmConfig,
    LongbenchConfig,
    NeedleConfig,
    PasskeyConfig,
    PretrainDataConfig,
    TrainConfig,
)
from beacon.plan import build_plan
from lm_core.config import leaves
from lm_core.errors import ConfigError, InputError
from tests.beacon.small import beacon_model, ids, stock
from tests.beacon.test_method import BeaconConformance

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
FILES = {
    "bad.jsonl": '{"text": "some text"}\n{"body": "x"}\n',
    "broken.jsonl": '{"text": \n',
    "twice.jsonl": json.dumps({"conversations": [CHAT[0], CHAT[0]]}),
    "many.jsonl": json.dumps({"conversations": [*CHAT, *CHAT]}),
    "src/wiki.jsonl": '{"text": "abc def"}\n',
    "shares.json": '{"wiki": 90, "code": 20}',
    "list.json": "[1]",
    "full/x": "x",
    "empty/hidden/x": "x",
    "stock/config.json": '{"model_type": "llama"}',
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with mistakes in them, and a run whose checkpoint holds a model only."""
    folder = tmp_path_factory.mktemp("bad")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    BeaconConformance().run(folder / "run", budget="1 steps", eval_every="never", save_only_model=True)
    return folder


def invoked(words: list[str]) -> tuple[int, str]:
    result = CliRunner().invoke(cli, words)
    return result.exit_code, result.output


# further words of `beacon train`, and what it says; exit code 2
TRAIN = {
    "--model nowhere/none": "model: nowhere/none is neither",
    "--output-dir run": "output_dir: .*/run already holds a run",
    "--train-data data:none.json": "train_data: data:none.json does not exist (looked for /",
    "--train-data none.json": "data: 'none.json' does not exist (looked for /",
    "--train-data synthetic:markov[x]": "data: synthetic:markov[x]: 'x' is not a whole number",
    "--train-data synthetic:markov[0]": "data: synthetic:markov[0]: '0' is not a whole number",
    "--train-data HERE/bad.jsonl": "bad.jsonl:2 has no field 'text'",
    "--train-data HERE/broken.jsonl": "broken.jsonl:1 is not valid JSON",
    "--packing document --train-data HERE/twice.jsonl": "twice.jsonl:1: two turns of the user follow one another",
    "--packing document --train-data HERE/many.jsonl": "many.jsonl:1: chat_template: hf, but this tokenizer has no template",
    "--packing document --chat-template no --train-data HERE/many.jsonl": "many.jsonl:1: chat_template: no joins one question",
    "--beacon-window 0": "beacon_window: '0' is wrong",
    "--beacon-stride 16": "stride: 16 is larger than the window (8)",
    "--beacon-ratio 3": "ratio: none of [3] divides the stride (8); its divisors are 1, 2, 4, 8",
    "--beacon-ratio -1": "beacon_ratio[0]: -1 is wrong",
    "--beacon-ratio 0": "ratio: training needs a ratio above 0",
    "--beacon-ratio-mix best": "ratio_mix: 'best' is unknown",
    "--beacon-ratio-mix adapt--1": "ratio_mix: 'adapt--1' is unknown",
    "--beacon-inference-ratio-mix best": "inference_ratio_mix: 'best' is unknown",
    "--beacon-attn all": "beacon_attn: 'all' is wrong; give step-expansion",
    "--beacon-attend-prev maybe": "beacon_attend_prev: 'maybe' is wrong",
    "--beacon-sink-size 9": "sink_size: 9 is larger than the stride (8)",
    "--beacon-sink-size -1": "beacon_sink_size: '-1' is wrong",
    "--beacon-param q": "param: ['q'] holds neither k nor v",
    "--beacon-param k z": "param: 'z' is unknown",
    "--beacon-pos middle": "beacon_pos: 'middle' is wrong",
    "--beacon-pos interleave --beacon-stride 4": "stride: interleaved beacons need a stride equal to the window (8), not 4",
    "--beacon-pos interleave --beacon-attn segmentation": "attn: segmentation cannot be interleaved",
    "--beacon-embed-init pad": "beacon_embed_init: 'pad' is wrong",
    "--memory-budget 0": "memory_budget: '0' is wrong",
    "--memory-budget 2": "memory_budget: 2 does not hold the sinks and one compaction; use at least 4",
    "--on-budget x": "on_budget: 'x' is wrong",
    "--on-capacity x": "on_capacity: 'x' is wrong",
    "--prefill-block-windows 0": "prefill_block_windows: '0' is wrong",
    "--attn-impl x": "attn_impl: 'x' is wrong",
    "--attn-impl flex": "attn_impl: flex has no gradients on a CPU",
    "--beacon-engine x": "beacon_engine: 'x' is wrong",
    "--group-by-stride x": "group_by_stride: 'x' is wrong",
    "--sort-by-stride x": "sort_by_stride: 'x' is wrong",
    "--enable-beacon false --lora-tune --group-by-stride strict": "group_by_stride: a plain model has no windows",
    "--lora-tune --only-train-beacon false": "lora_tune: adapters of a backbone that is trained itself",
    "--lora-tune --lora-targets zzz": "lora_targets: no layer of this model is called zzz",
    "--lora-tune --lora-extra-params zzz": "lora_extra_params: 'zzz' is part of no parameter's name",
    "--lora-rank 0": "lora_rank: '0' is wrong",
    "--lora-dropout 1": "lora_dropout: '1' is wrong",
    "--learning-rate -1": "lr: '-1' is wrong",
    "--lr-scheduler-type x": "schedule: 'x' is wrong",
    "--per-device-train-batch-size 0": "micro_batch_size: '0' is wrong",
    "--gradient-accumulation-steps 0": "accumulate: '0' is wrong",
    "--num-train-epochs 0": "num_train_epochs: '0' is wrong",
    "--max-steps 0": "max_steps: 0 would train nothing",
    "--bf16 --fp16": "bf16: True means precision bf16, but precision is fp16",
    "--dtype int8": "dtype: 'int8' is wrong",
    "--save-strategy x": "save_strategy: 'x' is wrong",
    "--save-steps 0": "save_every: '0' is no interval",
    "--save-total-limit -1": "keep_checkpoints: '-1' is wrong",
    "--save-format x": "save_format: 'x' is wrong",
    "--evaluation-strategy x": "evaluation_strategy: 'x' is wrong",
    "--evaluation-strategy epoch --eval-data none.json": "data: 'none.json' does not exist",
    "--eval-method x": "eval_method: 'x' is wrong",
    "--eval-method generation --beacon-doc-mask true --packing best-fit": "eval_method: generation reads rows of one document",
    "--eval-beacon-ratio 3": "ratio: none of [3] divides the stride (8)",
    "--eval-beacon-ratio-mix best": "ratio_mix: 'best' is unknown",
    "--eval-max-length 1": "eval_max_length: '1' is wrong",
    "--max-eval-num 0": "max_eval_num: '0' is wrong",
    "--logging-steps 0": "log_every: '0' is wrong",
    "--report-to x": "report_to[0]: 'x' is wrong",
    "--deepspeed none.json": "none.json",
    "--distill-weight -1": "distill_weight: '-1' is wrong",
    "--distill-weight 1 --distill-temperature 0": "distill_temperature: '0' is wrong",
    "--rope-method x": "rope_method: 'x' is wrong",
    "--rope-factor 0.5": "rope_factor: '0.5' is wrong",
    "--max-position-embeddings 0": "max_position_embeddings: '0' is wrong",
    "--device-map balanced": "--device-map balanced: cannot be had",
    "--use-fast false": "--use-fast false: cannot be had",
    "--chat-template x": "chat_template: 'x' is wrong",
    "--num-proc 0": "num_proc: '0' is wrong",
    "--memory-dtype int8": "--memory-dtype: is not an option",
    "--set beacon_windw=3": "beacon_windw: is not an option; did you mean beacon_window?",
    "--config-file none.yaml": "configuration file 'none.yaml': cannot be read",
    "--model RUN --beacon-param k v": "param: ['k', 'v'], but the model's beacons were made for",
    "--model RUN --enable-beacon false --only-train-beacon false": "enable_beacon: false, but .* has beacons",
}  # fmt: skip


@pytest.mark.parametrize("words", TRAIN)
def test_training_that_cannot_work_stops_before_it_begins(words: str, here: Path, tmp_path: Path) -> None:
    base = [
        "train", "--model", "llama_tiny", "--tokenizer", "bytes", "--packing", "stream", "--max-length", "41", "--beacon-window", "8",
        "--max-steps", "1", "--device", "cpu", "--no-tensorboard", "--output-dir", str(tmp_path / "out"),
    ]  # fmt: skip
    more = words.replace("HERE", str(here)).replace("RUN", str(here / "run")).replace("--output-dir run", f"--output-dir {here / 'run'}")
    data = [] if "--train-data" in words else ["--train-data", "synthetic:markov[20]"]
    code, said = invoked([*base, *data, *more.split()])
    assert code == 2, said
    assert re.search(re.escape(TRAIN[words]).replace(r"\.\*", ".*"), said), said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("out/checkpoints/*"))


# a command, its exit code, and what it says
COMMANDS = {
    "train": (2, "model: is required"),
    "train --model llama_tiny --tokenizer bytes --output-dir OUT": (2, "train_data: nothing to train on"),
    "train --model llama_tiny --tokenizer bytes --train-data synthetic:markov --output-dir OUT --resume OUT": (4, "is not a complete checkpoint"),
    "train --model llama_tiny --tokenizer bytes --train-data synthetic:markov --output-dir RUN --resume latest": (4, "no checkpoint in"),
    "PACK": (2, "train_data: .*slimpajama is no folder"),
    "PACK --train-data a": (2, "train_data: a is no folder"),
    "PACK --train-data HERE/empty": (2, "holds no .json or .jsonl file"),
    "PACK --train-data a=none.json --num-token 16:1k": (2, "data: 'none.json' does not exist"),
    "PACK --train-data a=HERE/bad.jsonl --num-token 16:1k": (2, "bad.jsonl:2 has no field 'text'"),
    "PACK --train-data HERE/src --mixture none": (2, "mixture: none is neither a file nor shipped; choose code, even, slimpajama"),
    "PACK --train-data HERE/src --mixture HERE/shares.json": (2, "sum to 110"),
    "PACK --train-data HERE/src --mixture HERE/list.json": (2, "is no JSON object of percentages"),
    "PACK --train-data a=synthetic:markov a=synthetic:markov": (2, "the source a is given twice"),
    "PACK --train-data a=synthetic:markov --num-token 0:2b": (2, "num_token: '0:2b' is no LENGTH:COUNT"),
    "PACK --train-data a=synthetic:markov --num-token 16:0": (2, "num_token: '16:0' is no LENGTH:COUNT"),
    "PACK --train-data a=synthetic:markov --num-token 16:2q": (2, "num_token: '16:2q' is no LENGTH:COUNT"),
    "PACK --train-data a=synthetic:markov --shard-size 5": (2, "shard_size: '5' is wrong"),
    "PACK --train-data a=synthetic:markov --min-doc-length 5": (2, "min_doc_length: 5 has no effect"),
    "PACK --train-data a=synthetic:markov --short-documents x": (2, "short_documents: 'x' is wrong"),
    "PACK --train-data a=synthetic:markov --num-proc 0": (2, "num_proc: '0' is wrong"),
    "PACK --train-data a=synthetic:markov --num-token 16:1k --output-dir HERE/full": (2, "output_dir: .*/full is not empty"),
    "pretrain-data --train-data a=synthetic:markov --output-dir OUT": (2, "model: is required"),
    "generate --prompt a": (2, "model: is required"),
    "generate --model HERE/none --prompt a": (2, "model: .*none' does not exist"),
    "generate --model RUN --prompt a --prompt-file b": (2, "prompt: give the text to go on from, by exactly one"),
    "generate --model RUN --prompt-file none": (2, "prompt_file: none does not exist"),
    "generate --model RUN --prompt a --memory HERE/bad.jsonl": (2, "memory: .*bad.jsonl is no memory file"),
    "generate --model RUN --prompt a --max-new-tokens 0": (2, "max_new_tokens: '0' is wrong"),
    "generate --model RUN --prompt a --temperature 0": (2, "temperature: '0' is wrong"),
    "generate --model RUN --prompt a --top-p 2": (2, "top_p: '2' is wrong"),
    "generate --model RUN --prompt a --beacon-ratio 3": (2, "ratio: none of [3] divides the stride (8)"),
    "generate --model RUN --prompt a --beacon-stride 16": (2, "stride: 16 is larger than the window (8)"),
    "compress --model RUN --input synthetic:markov[1]": (2, "output: is required"),
    "compress --model RUN --output OUT --input none.txt": (2, "data: 'none.txt' does not exist"),
    "compress --model RUN --output OUT --input synthetic:markov --expected-length 0": (2, "expected_length: '0' is wrong"),
    "compress --model RUN --output OUT --input synthetic:markov[1] --memory-budget 9": (3, "need 13 memory entries, the budget is 9"),
    "compress --model RUN --output OUT --input synthetic:markov[99]": (3, "positions, the model has 1024"),
    "inspect HERE/none": (2, "does not exist"),
    "inspect HERE/empty": (2, "model: .*empty has no config.json"),
    "inspect HERE/stock": (2, "has no beacons (model_type llama)"),
    "export --model RUN": (2, "output_dir: is required"),
    "export --model RUN --output-dir OUT --format zip": (2, "format: 'zip' is wrong"),
    "import --from HERE/stock --output-dir OUT": (2, "has no beacon_* settings"),
    "import --from RUN/final --output-dir HERE/full": (2, "output_dir: .*/full is not empty"),
    "bench --only P10": (2, "only[0]: 'P10' is wrong"),
    "bench --repeats 2": (2, "repeats: '2' is wrong"),
    "eval other": (2, "No such command 'other'"),
    "eval lm --model RUN": (2, "eval_data: nothing to read"),
    "eval lm --model RUN --eval-data synthetic:markov --max-length 40 --stride 50": (2, "stride: 50 is larger than max_length (40)"),
    "eval lm --model RUN --eval-data synthetic:markov --baseline half": (2, "baseline[0]: 'half' is wrong"),
    "eval lm --model RUN --eval-data synthetic:markov --min-length 9999": (2, "eval_data: no document of .* has 9999 tokens"),
    "eval lm --model RUN --eval-data synthetic:markov --output-dir HERE/full": (2, "output_dir: .*/full is not empty"),
    "eval needle --model RUN --min-length 5 --max-length 4": (2, "min_length: 5 is larger than max_length (4)"),
    "eval needle --model RUN --min-length 5 --max-length 40": (2, "min_length: 5 tokens do not hold the needle"),
    "eval needle --model RUN --min-depth 60 --max-depth 50": (2, "min_depth: 60 is larger than max_depth (50)"),
    "eval needle --model RUN --test-depth 101": (2, "test_depth[0]: 101 is wrong"),
    "eval needle --model RUN --num-needle 0": (2, "num_needle: '0' is wrong"),
    "eval needle --model RUN --haystack none.txt": (2, "data: 'none.txt' does not exist"),
    "eval passkey --model RUN --min-length 5 --max-length 40": (2, "min_length: 5 tokens do not hold the key"),
    "eval passkey --model RUN --passkey-length 0": (2, "passkey_length: '0' is wrong"),
    "eval topic --model RUN --num-topics 99": (2, "num_topics: 99 is more than the"),
    "eval topic --model RUN --target last": (2, "target: 'last' is wrong"),
    "eval multiturn --model RUN --turns 999": (2, "turns: 999 is more than the"),
    "eval multiturn --model RUN --length 3": (2, "length: 3 tokens do not hold 6 facts"),
    "eval longbench --model RUN --data-dir HERE/empty": (2, "data_dir: .*empty holds none of"),
    "eval longbench --model RUN --tasks zzz": (2, "tasks: zzz is unknown"),
    "eval longbench --model RUN --tasks musique": (2, "tasks: musique has no made-up rows"),
    "eval infbench --model RUN --data-dir HERE/empty --tasks longbook_qa_eng": (2, "tasks: longbook_qa_eng has no file"),
    "eval short --model RUN --data-file none": (2, "data_file: none does not exist"),
    "eval short --model RUN --data-file HERE/bad.jsonl": (2, "bad.jsonl:1 is no question"),
    "eval short --model RUN --batch-size 0": (2, "batch_size: '0' is wrong"),
}  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_names_what_is_wrong(words: str, here: Path, tmp_path: Path) -> None:
    pack = f"pretrain-data --model llama_tiny --tokenizer bytes --output-dir {tmp_path / 'out'}"
    line = words.replace("PACK", pack).replace("RUN", str(here / "run")).replace("HERE", str(here)).replace("OUT", str(tmp_path / "out"))
    expected, message = COMMANDS[words]
    code, said = invoked(line.split())
    assert code == expected, said
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), said), said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


# --- refusals of the library, which no command reaches ---


def test_a_token_that_is_missing_is_named() -> None:
    for which, other in (("eos", "bos"), ("bos", "eos")):
        base = stock()
        setattr(base.config, f"{which}_token_id", None)
        with pytest.raises(ConfigError, match=f"embed_init: {which}, but the model's config names no {which} token; use {other}"):
            attach_beacon(base, BeaconConfig(embed_init=which))  # type: ignore[arg-type]


def test_what_the_library_is_given_is_checked() -> None:
    model = beacon_model(torch.float32, ratio=[2, 4], memory_budget=8, on_budget="adapt", inference_ratio_mix="adapt-0")
    # the length of a stream is not known beforehand
    with pytest.raises(ConfigError, match="expected_length: unknown for pieces of a text"):
        model.compress(iter([[1, 2, 3]]))
    assert model.compress(iter([ids(1, 20)[0].tolist()]), expected_length=20).lengths()[0]["seen"] == 20
    with pytest.raises(ConfigError, match="model: has beacons already"):
        attach_beacon(model, BeaconConfig())
    plain = beacon_model(torch.float32)
    for given, message in (([], "ratios: an empty list"), ([2], "ratios: 1 given, but compaction 1")):
        with pytest.raises(ConfigError, match=message):
            plain(ids(1, 30), ratios=given) if not given else build_plan(30, plain.beacon, given)
    for wrong, message in (([], "ids: nothing to read"),):
        with pytest.raises(InputError, match=message):
            plain.compress(wrong)
    with pytest.raises(InputError, match="doc_ids: 2 values for 3 tokens"):
        build_plan(3, plain.beacon, [2], doc_ids=[0, 0])
    with pytest.raises(InputError, match="input_ids: beacon models read token ids, not embeddings"):
        plain(inputs_embeds=torch.zeros(1, 3, 32))


# --- defaults ---

# option of the specification -> (its field, its default)
DEFAULTS: dict[type, dict[str, tuple[str, Any]]] = {
    TrainConfig: {
        "--model-name-or-path": ("model", MISSING), "--train-data": ("data", []), "--eval-data": ("eval_data", []),
        "--data-root": ("data_root", None), "--min-length": ("min_length", 0), "--max-length": ("max_length", 4096),
        "--chat-template": ("chat_template", "hf"), "--enable-beacon": ("enable_beacon", True), "--beacon-window": ("beacon_window", None),
        "--beacon-stride": ("beacon_stride", None), "--beacon-attn": ("beacon_attn", None), "--beacon-attend-prev": ("beacon_attend_prev", None),
        "--beacon-sink-size": ("beacon_sink_size", None), "--beacon-ratio": ("beacon_ratio", []), "--beacon-ratio-mix": ("beacon_ratio_mix", None),
        "--beacon-param": ("beacon_param", []), "--beacon-embed-init": ("beacon_embed_init", None), "--beacon-pos": ("beacon_pos", None),
        "--beacon-doc-mask": ("beacon_doc_mask", None), "--beacon-engine": ("beacon_engine", "auto"), "--attn-impl": ("attn_impl", None),
        "--memory-budget": ("memory_budget", None), "--on-budget": ("on_budget", None), "--on-capacity": ("on_capacity", None),
        "--prefill-block-windows": ("prefill_block_windows", None), "--beacon-inference-ratio-mix": ("beacon_inference_ratio_mix", None),
        "--only-train-beacon": ("only_train_beacon", True), "--lora-tune": ("lora_tune", False), "--lora-rank": ("lora_rank", 32),
        "--lora-alpha": ("lora_alpha", 16), "--lora-dropout": ("lora_dropout", 0.0), "--lora-extra-params": ("lora_extra_params", []),
        "--lora-targets": ("lora_targets", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        "--gradient-checkpointing": ("gradient_checkpointing", False), "--use-reentrant": ("use_reentrant", False),
        "--group-by-stride": ("group_by_stride", "none"), "--sort-by-stride": ("sort_by_stride", "none"), "--learning-rate": ("lr", 5e-5),
        "--weight-decay": ("weight_decay", 0.0), "--adam-beta1": ("adam_beta1", None), "--adam-beta2": ("adam_beta2", None),
        "--max-grad-norm": ("grad_clip", 1.0), "--warmup-steps": ("warmup", 0), "--lr-scheduler-type": ("schedule", "linear"),
        "--per-device-train-batch-size": ("micro_batch_size", 1), "--per-device-eval-batch-size": ("eval_micro_batch_size", 1),
        "--gradient-accumulation-steps": ("accumulate", 1), "--num-train-epochs": ("num_train_epochs", 3), "--max-steps": ("max_steps", -1),
        "--bf16": ("bf16", None), "--fp16": ("fp16", None), "--dtype": ("dtype", "auto"), "--save-strategy": ("save_strategy", "steps"),
        "--save-steps": ("save_every", "500"), "--save-total-limit": ("keep_checkpoints", 0), "--save-only-model": ("save_only_model", False),
        "--save-format": ("save_format", "full"), "--evaluation-strategy": ("evaluation_strategy", None),
        "--eval-strategy": ("evaluation_strategy", None), "--eval-steps": ("eval_every", "never"), "--eval-method": ("eval_method", "perplexity"),
        "--eval-beacon-ratio-mix": ("eval_beacon_ratio_mix", None), "--max-eval-num": ("max_eval_num", None), "--report-to": ("report_to", []),
        "--deepspeed": ("deepspeed_config", None), "--resume": ("resume", "none"), "--resume-from-checkpoint": ("resume", "none"),
        "--overwrite": ("overwrite", False), "--distill-weight": ("distill_weight", 0.0), "--distill-temperature": ("distill_temperature", 1.0),
        "--rope-theta": ("rope_theta", None), "--rope-method": ("rope_method", None), "--rope-factor": ("rope_factor", None),
        "--max-position-embeddings": ("max_position_embeddings", None), "--mistral-sliding-window": ("mistral_sliding_window", None),
        "--load-in-4-bit": ("load_in_4_bit", False), "--cpu": ("cpu", False), "--seed": ("seed", 42), "--dry-run": ("dry_run", False),
        # what differs from the specification, on purpose:
        "--output-dir": ("output_dir", None),  # every package of the repository has runs/<model>_<method> for it
        "--logging-steps": ("log_every", 10),  # a line is cheap, and 500 steps without one look like a run that hangs
        "--num-proc": ("num_proc", 1),  # processes are worth their start for large conversations only
        "--eval-max-length": ("eval_max_length", None),  # that of training (4096 by default), which held-out rows are cut from
        "--eval-min-length": ("eval_min_length", 2),  # 512 would leave nothing of short texts
        "--eval-beacon-ratio": ("eval_beacon_ratio", []),  # 32 only where it was trained
        "--tensorboard": ("tensorboard", True),  # core writes it by default; --report-to none turns it off
    },
    PretrainDataConfig: {
        "--train-data": ("train_data", []), "--mixture": ("mixture", None), "--config": ("mixture", None), "--output-dir": ("output_dir", MISSING),
        "--num-token": ("num_token", ["8192:2b"]), "--model-name-or-path": ("model", MISSING), "--add-bos": ("add_bos", True),
        "--add-eos": ("add_eos", True), "--doc-ids": ("doc_ids", True), "--seed": ("seed", 123), "--shard-size": ("shard_size", "500MB"),
        "--allow-missing": ("allow_missing", False), "--short-documents": ("short_documents", "keep"), "--min-doc-length": ("min_doc_length", 0),
        "--num-proc": ("num_proc", 1),
    },
    GenerateConfig: {
        "--prompt": ("prompt", None), "--prompt-file": ("prompt_file", None), "--memory": ("memory", None),
        "--max-new-tokens": ("max_new_tokens", 256), "--do-sample": ("do_sample", False), "--temperature": ("temperature", 1.0),
        "--top-p": ("top_p", 1.0), "--stream": ("stream", False), "--beacon-ratio": ("beacon_ratio", []), "--seed": ("seed", 42),
    },
    CompressConfig: {"--input": ("input", []), "--output": ("output", MISSING), "--expected-length": ("expected_length", None)},
    LmConfig: {
        "--eval-data": ("eval_data", []), "--max-length": ("max_length", 32768), "--stride": ("stride", None),
        "--max-sample-num": ("max_sample_num", 100), "--min-length": ("min_length", 0), "--baseline": ("baseline", []),
        "--output-dir": ("output_dir", None),
    },
    GridOptions: {
        "--min-length": ("min_length", 8192), "--max-length": ("max_length", 131072), "--num-length-interval": ("num_length_interval", 10),
        "--num-depth-interval": ("num_depth_interval", 10), "--test-length": ("test_length", []), "--test-depth": ("test_depth", []),
        "--min-depth": ("min_depth", 0), "--max-depth": ("max_depth", 100), "--batch-size": ("batch_size", 1), "--baseline": ("baseline", []),
    },
    NeedleConfig: {"--haystack": ("haystack", []), "--num-needle": ("num_needle", 1), "--num-length-interval": ("num_length_interval", 10)},
    PasskeyConfig: {
        "--passkey-length": ("passkey_length", 5), "--num-length-interval": ("num_length_interval", 20),
        "--num-depth-interval": ("num_depth_interval", 10),
    },
    LongbenchConfig: {"--max-length": ("max_length", 31500)},
    InfbenchConfig: {"--max-length": ("max_length", 128000)},
    # what a new model has where nothing is given
    BeaconConfig: {
        "--window": ("window", 1024), "--stride": ("stride", 1024), "--ratio": ("ratio", [2, 4, 8, 16, 32]), "--ratio-mix": ("ratio_mix", "step-random"),
        "--inference-ratio-mix": ("inference_ratio_mix", "adapt-1024"), "--attn": ("attn", "step-expansion"), "--attend-prev": ("attend_prev", True),
        "--sink-size": ("sink_size", 0), "--param": ("param", ["q", "k", "v", "o"]), "--pos": ("pos", "append"), "--embed-init": ("embed_init", "eos"),
        "--doc-mask": ("doc_mask", False), "--memory-budget": ("memory_budget", None), "--on-budget": ("on_budget", "error"),
        "--on-capacity": ("on_capacity", "error"), "--prefill-block-windows": ("prefill_block_windows", 8), "--attn-backend": ("attn_backend", "auto"),
        "--format-version": ("format_version", 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("cls", DEFAULTS, ids=lambda cls: cls.__name__)
def test_options_have_the_spellings_and_defaults_of_the_specification(cls: type) -> None:
    known = {flag.replace("_", "-"): leaf for leaf in leaves(cls) for flag in (leaf.flag, *leaf.flags)}
    found = {flag: (known[flag].path, known[flag].default) for flag in DEFAULTS[cls] if flag in known}
    assert found == DEFAULTS[cls]


@pytest.mark.parametrize("written", [["2", "4", "8"], ["2,4,8"], ["2", "--beacon-ratio", "4", "--beacon-ratio", "8"]])
def test_lists_and_switches_are_read_in_every_spelling(written: list[str]) -> None:
    base = ["train", "--model-name-or-path", "m", "--train-data", "d", "--print-config", "--json"]
    code, said = invoked([*base, "--beacon-ratio", *written])
    assert code == 0
    assert json.loads(said)["beacon_ratio"] == [2, 4, 8]
    for words, value in (
        (["--only-train-beacon", "False"], False), (["--no-only-train-beacon"], False), (["--only-train-beacon", "no"], False),
        (["--only-train-beacon", "0"], False), (["--only-train-beacon"], True), (["--only-train-beacon", "YES"], True),
    ):  # fmt: skip
        code, said = invoked([*base, *words])
        assert code == 0, said
        assert json.loads(said)["only_train_beacon"] is value
    assert json.loads(invoked([*base, "--resume-from-checkpoint", "latest"])[1])["resume"] == "auto"
