"""Whatever cannot work ends with one message that says what, where and what to do, and with its exit code; and what is fixed in the
guide (flags, choices, defaults, keys of the two JSON files) is what the options say."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from lm_core.config import Leaf, leaves
from lm_core.errors import ConfigError
from lowrank_opt.adamw import AdamW
from lowrank_opt.cli import cli
from lowrank_opt.config import TrainConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 172,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
}  # fmt: skip
LABELS = {"mode": "finetuning", "task": "sst2", "model": "roberta_test", "data": "FOLDER/labels.jsonl"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that rows name as FOLDER/..., and a run of one step."""
    made = tmp_path_factory.mktemp("input")
    lines = {
        "ids.jsonl": [{"input_ids": [1, 2, 60, 3] * 8}] * 40,
        "large.jsonl": [{"input_ids": [1, 600]}] * 40,
        "labels.jsonl": [{"sentence": f"a{n}", "label": n % 2} for n in range(30)],
        "third.jsonl": [{"sentence": "a", "label": n // 29 * 2} for n in range(30)],
    }
    for name, rows in lines.items():
        (made / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    contents = {
        "galore.json": {"rnak": 4},
        "apollo.json": {"apollo": {"rnak": 4}},
        "lora.json": {"lora_alpa": 4},
        "query.json": {"target_modules_by_model": {"llama_test": ["query"]}},
        "names.json": {"target_modules_by_model": {"llama_test": [".*query"]}},
        "open.json": {"target_modules_by_model": {"llama_test": ["(query"]}},
        "run.yaml": {"galore": {"rnak": 4}},
        "deepspeed.json": {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 1}},
        "padded/config.json": {**LLAMA, "pad_token_id": 512},
        "below/config.json": {**LLAMA, "pad_token_id": -1},
        "few/config.json": {**LLAMA, "vocab_size": 100},
        "short/config.json": {**LLAMA, "max_position_embeddings": 32},
    }
    for name, content in contents.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text(json.dumps(content))
    (made / "half/checkpoints/checkpoint-5").mkdir(parents=True)
    done = train(made, {"output_dir": "FOLDER/done", "rank": 8})
    assert done.exit_code == 0, done.output
    return made


def train(folder: Path, values: dict[str, Any]) -> Result:
    """What the command does with a run of one step whose options are changed; an option that is None is left out."""
    options: dict[str, Any] = {
        "mode": "pretraining", "optimizer": "galore", "model": "llama_test", "data": "FOLDER/ids.jsonl", "tokenizer": "bytes",
        "dtype": "fp32", "max_length": 64, "max_steps": 1, "batch_size": 2, "output_dir": "FOLDER/run", **values,
    }  # fmt: skip
    words = ["train"]
    for name, value in options.items():
        words += [] if value is None else [f"--{name}", str(value).replace("FOLDER", str(folder))]
    return CliRunner().invoke(cli, words)


REFUSED: list[tuple[dict[str, Any], str | list[str]]] = [
    # keys
    ({"galore_config": "FOLDER/galore.json"}, "galore.rnak: is not an option; did you mean galore.rank?"),
    ({"galore_config": "FOLDER/apollo.json"}, "apollo.apollo_rnak: is not an option; did you mean apollo.apollo_rank?"),
    ({"lora_config": "FOLDER/lora.json"}, "lora.lora_alpa: is not an option; did you mean lora.lora_alpha?"),
    ({"config": "FOLDER/run.yaml"}, "galore.rnak: is not an option; did you mean galore.rank?"),
    # the projection
    *(({"rank": rank}, f"galore.rank: '{rank}' is wrong; give a number above 0") for rank in (0, -1)),
    ({"rank": 4.5}, "galore.rank: 4.5 is neither a whole number nor a fraction below 1"),
    ({"update_proj_gap": 0}, "galore.update_proj_gap: '0' is wrong; give a whole number of at least 1"),
    *(({"scale": scale}, f"galore.scale: '{scale}' is wrong; give a number above 0") for scale in (0, -1)),
    ({"proj_type": "rigth"}, "give std, reverse_std, right, left or full; did you mean right?"),
    ({"proj_method": "lanczos"}, "give auto, svd, gram, rsvd, subspace or random"),
    ({"optimizer": "apollo", "apollo_rank": 0}, "apollo.apollo_rank: '0' is wrong"),
    ({"optimizer": "apollo", "apollo_update_proj_gap": 0}, "apollo.apollo_update_proj_gap: '0' is wrong"),
    ({"target_modules": "qproj"}, ["target_modules: 'qproj' matches no matrix; the nearest names are ", ".q_proj.weight"]),
    ({"exclude_modules": "qproj"}, ["exclude_modules: 'qproj' matches no matrix; the nearest names are ", ".q_proj.weight"]),
    # adapters
    ({"optimizer": "lora", "r": 0}, "lora.r: '0' is wrong"),
    *(
        (
            {"optimizer": "lora", "lora_config": f"FOLDER/{name}.json"},
            ["no linear layer of this model is called ", "choose from q_proj, k_proj, v_proj, o_proj", "lora.target_modules_by_model"],
        )
        for name in ("query", "names")
    ),
    ({"optimizer": "lora", "lora_config": "FOLDER/open.json"}, "lora.target_modules: '(query' is no regular expression"),
    # modes
    *(({"model": name}, f"model: {name} predicts no next token; use --mode finetuning") for name in ("roberta", "roberta_test")),
    ({"mode": "finetuning", "model": "llama_60m"}, "model: llama_60m has no trained weights; add --init random, --model-path FOLDER"),
    ({"mode": "finetuning", "num_training_tokens": "5M", "max_steps": None}, "num_training_tokens: only pretraining uses"),
    ({"task": "sst2"}, "task: only finetuning uses --task"),
    # lengths
    ({"num_training_tokens": 100, "num_epochs": 1, "max_steps": None}, "num_training_tokens: 100 tokens are less than one update of 128"),
    ({"budget": "100 tokens", "max_steps": None}, "budget: 100 tokens are less than one update of 128 (2 samples of --max-length 64)"),
    ({"total_batch_size": 3}, "total_batch_size: 3 is no multiple of 2 (--batch-size 2 on 1 processes); use 4"),
    ({**LABELS, "max_length": 513}, "max_length: 513 is beyond the 512 positions of roberta_test; use at most 512"),
    ({"model": "gpt2_test", "max_length": 1025}, "max_length: 1025 is beyond the 1024 positions of gpt2_test; use at most 1024"),
    ({"model": "FOLDER/short"}, "max_length: 64 is beyond the 32 positions"),
    # what is not here
    ({"tokenizer": "nobody/none"}, ["tokenizer: nobody/none is neither", "use bytes, bpe:N, a local folder"]),
    ({"tokenizer": None, "model": "llama_60m"}, ["tokenizer: t5-base is neither", "use bytes, bpe:N, a local folder"]),
    ({"data": None}, ["data: 'allenai/c4:en' is no file or folder here", "use a local file, a saved dataset or builtin:python-docs"]),
    ({**LABELS, "data": None}, ["data: 'nyu-mll/glue:sst2:train' is no file", "use a local file"]),
    # finetuning is of sst2 where nothing else is meant
    ({"mode": "finetuning", "data": None}, ["data: 'nyu-mll/glue:sst2:train' is no file", "use a local file"]),
    ({"mode": "finetuning", "data": None, "task": "lm"}, "data: nothing to train on; give --data"),
    ({"mode": "finetuning", "model": "roberta_test", "data": "FOLDER/third.jsonl"}, "third.jsonl:30 has the label 2"),
    ({"data": "FOLDER/none.txt"}, ["none.txt' does not exist", "name a file, a folder or builtin:python-docs"]),
    ({"mode": "finetuning", "model": "gpt2"}, ["model: openai-community/gpt2 is neither", "use a local folder"]),
    ({"mode": "finetuning", "model": "llama_60m", "model_path": "FOLDER/none"}, ["none' does not exist", "use a local folder"]),
    # ids and labels
    ({**LABELS, "data": "FOLDER/third.jsonl"}, "third.jsonl:30 has the label 2, which is not one of 0 to 1; correct it, or --num-labels"),
    ({"data": "FOLDER/large.jsonl"}, ["large.jsonl:1: input_ids: 600 is outside the vocabulary of 259", "another tokenizer?"]),
    ({"model": "FOLDER/few"}, ["tokenizer: it has 259 entries, and ", "has 100; leave --tokenizer out for the model's own"]),
    ({"model": "FOLDER/padded"}, "model: pad_token_id is 512, and ids go from 0 to 511; correct it in config.json"),
    ({"model": "FOLDER/below"}, "model: pad_token_id is -1, and ids go from 0 to 511; correct it in config.json"),
    # engines and types
    ({"per_layer": "true", "engine": "deepspeed"}, "per_layer: zero_stage: 2 keeps no whole gradient; use --engine replicated"),
    ({"per_layer": "true", "engine": "sharded"}, "per_layer: engine: sharded keeps no whole gradient; use --engine replicated"),
    ({"per_layer": "true", "num_processes": 2}, "per_layer: updates inside backward run in one process, not 2"),
    ({"param_dtype": "bf16"}, "param_dtype: bf16 weights need bf16 arithmetic, not fp32; add --precision bf16"),
    (
        {"optimizer": "baseline", "deepspeed_config": "FOLDER/deepspeed.json"},
        ["deepspeed_config: the section optimizer of ", "remove it, use the options of the optimizer"],
    ),
    # folders
    ({"output_dir": "FOLDER/done"}, "already holds a run; add --resume auto, --overwrite, or choose another folder"),
]


def shown(values: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items()) if isinstance(values, dict) else ""


@pytest.mark.parametrize(("values", "messages"), REFUSED, ids=shown)
def test_what_cannot_work_ends_with_2_and_a_way_out(folder: Path, values: dict[str, Any], messages: str | list[str]) -> None:
    refused(train(folder, values), 2, [messages] if isinstance(messages, str) else messages)
    assert not (folder / "run").exists()


def refused(result: Result, code: int, messages: list[str]) -> None:
    """One error as the last line, with everything it has to say, and no traceback."""
    last = result.stderr.splitlines()[-1]
    assert (result.exit_code, last[:7]) == (code, "error: "), result.output
    assert all(message in last for message in messages), last
    assert result.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resume": "FOLDER/nowhere"}, "nowhere is not a complete checkpoint (it has no state.json); name a complete checkpoint folder"),
        ({"resume": "FOLDER/half/checkpoints/checkpoint-5"}, "checkpoint-5 is not a complete checkpoint (it has no state.json)"),
        ({"optimizer": "baseline"}, "optimizer: the checkpoint was written with 'galore', this run asks for 'baseline'"),
        ({"model": "gpt2_test"}, "model: the checkpoint was written with 'llama_test', this run asks for 'gpt2_test'"),
        ({"rank": 4}, "galore.rank: the checkpoint was written with 8.0, this run asks for 4.0; keep it, or start a new run"),
    ],
    ids=shown,
)
def test_a_checkpoint_that_is_incomplete_or_foreign_ends_with_4(folder: Path, values: dict[str, Any], message: str) -> None:
    rank = {} if values.get("optimizer") == "baseline" else {"rank": 8}
    refused(train(folder, {"resume": "FOLDER/done", "max_steps": 2, **rank, **values}), 4, [message])
    assert not (folder / "run").exists()


def test_a_smoke_test_may_be_shorter_than_an_update(folder: Path) -> None:
    result = train(folder, {"budget": "100 tokens", "max_steps": None, "test": "true", "dry_run": "true"})
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "more", [{"optimizer": "baseline"}, {"optimizer": "galore"}, {"optimizer": "galore", "per_layer": "true"}], ids=shown
)
def test_numbers_that_are_not_finite_end_with_3_and_name_step_and_checkpoint(folder: Path, tmp_path: Path, more: dict[str, str]) -> None:
    values = {"lr": 1e30, "schedule": "constant", "max_steps": 6, "save_every": 1, "output_dir": tmp_path, **more}
    result = train(folder, values)
    refused(result, 3, ["gradient", "model.", "lower" if "per_layer" not in more else "resume from the last checkpoint with a lower --lr"])
    newest = max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "checkpoints").iterdir())
    assert f"the run failed in step {newest + 1}; the last checkpoint is that of step {newest}" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_absent_is_refused(folder: Path) -> None:
    refused(train(folder, {"device": "cuda"}), 2, ["device: cuda is not available in this process; use --device cpu"])


def test_a_gpu_without_bf16_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_core.dist.init", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    refused(train(folder, {"dtype": "bf16"}), 2, ["precision: this GPU has no arithmetic in bf16; use --precision fp16 or fp32"])


def test_a_parameter_in_two_groups_is_named() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="params: weight stand in an earlier group as well; give each parameter once"):
        AdamW([{"params": [("weight", model.weight)]}, {"params": list(model.named_parameters())}])
    with pytest.raises(ConfigError, match="params: parameter 1 of its group stand in an earlier group"):
        AdamW([{"params": [model.weight]}, {"params": [model.bias, model.weight]}])


# --- what is fixed: flag, default, and choices of section 5 of the specification ---

OPTIMIZERS = "lora galore galore8bit lora+galore lora+galore8bit baseline adamw8bit apollo apollo-mini fira muon qgalore ldadam"
MISSING = "no default"
FIXED: list[tuple[str, Any, str]] = [
    ("mode", MISSING, "pretraining finetuning"),
    ("optimizer", MISSING, OPTIMIZERS),
    ("model", MISSING, ""),
    ("batch_size", 16, ""),
    ("num_epochs", 30, ""),
    ("max_length", 512, ""),
    ("num_training_tokens", 10**9, ""),
    ("shuffle", True, "true false"),
    ("dtype", "fp16", "bf16 fp16 fp32"),
    ("lr", 4e-4, ""),
    ("weight_decay", 0.01, ""),
    ("tmax", 30, ""),
    ("lora_config", Path("config/lora_config.json"), ""),
    ("galore_config", Path("config/galore_config.json"), ""),
    ("test", False, "true false"),
    # further options: data
    ("data", [], ""),
    ("dataset", [], ""),
    ("train_files", [], ""),
    ("eval_data", [], ""),
    ("validation_files", [], ""),
    ("dataset_config", None, ""),
    # sst2 where no data are given, as there; `train` is also called with texts that have no label
    ("task", "lm", "cola mnli mrpc qnli qqp rte sst2 stsb wnli lm"),
    ("text_column", "text", ""),
    ("tokenizer", None, ""),
    ("packing", "document", "document stream best-fit false true"),
    # 2 there; rows are read from mapped files here, for which the training process has the time
    ("num_workers", 0, ""),
    ("streaming", False, "true false"),
    ("shuffle_buffer", 10000, ""),
    # model
    ("init", "auto", "pretrained random auto"),
    ("model_path", None, ""),
    ("num_labels", None, ""),
    ("gradient_checkpointing", False, "true false"),
    ("param_dtype", "auto", "auto fp32 bf16"),
    # optimizer
    ("betas", (0.9, 0.999), ""),
    ("eps", 1e-8, ""),
    ("grad_accumulation", 1, ""),
    ("total_batch_size", None, ""),
    ("grad_clip", 0, ""),
    ("clip_mode", "auto", "auto global delayed per_param"),
    ("per_layer", False, "true false"),
    ("stochastic_rounding", True, "true false"),
    ("nonfinite", "stop", "stop skip"),
    # schedule
    ("schedule", "cosine_tmax", "cosine_tmax cosine linear constant cosine_restarts"),
    ("scheduler", "cosine_tmax", "cosine_tmax cosine linear constant cosine_restarts"),
    ("tmax_unit", "epoch", "epoch step"),
    ("warmup", 0, ""),
    ("min_lr_ratio", 0, ""),
    ("restart_every", None, ""),
    # run
    ("max_steps", None, ""),
    ("output_dir", None, ""),
    ("overwrite", False, "true false"),
    ("resume", "none", ""),
    ("resume_from_checkpoint", "none", ""),
    ("resume_reset_optimizer", False, "true false"),
    ("save_every", "1000", ""),
    ("keep_last", 2, ""),
    ("eval_every", "1000", ""),
    ("eval_tokens", 10_000_000, ""),
    ("log_every", 10, ""),
    ("csv", Path("output.csv"), ""),
    ("wandb", "off", "off online offline"),
    ("wandb_project", "lowrank-opt", ""),
    ("seed", 0, ""),
    ("deterministic", False, "true false"),
    ("device", "auto", "auto cpu cuda"),
    ("engine", "auto", "auto replicated lowrank sharded deepspeed"),
    ("dist", None, "none ddp fsdp"),
    ("deepspeed_config", None, ""),
    ("shard_optimizer", False, "true false"),
    ("verify_replicas_every", 0, ""),
    ("dry_run", False, "true false"),
    ("estimate_only", False, "true false"),
]
# section 6: key of the file, flag, what is shipped, choices
LORA: list[tuple[str, Any, str]] = [
    ("r", 8, ""),
    ("lora_alpha", 8, ""),
    ("lora_dropout", 0.1, ""),
    ("target_modules_finetuning", ["query", "value"], ""),
    ("target_modules_pretraining", ["q_proj", "v_proj"], ""),
    ("target_modules_by_model", {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}, ""),
    ("use_rslora", False, "true false"),
    ("use_dora", False, "true false"),
    ("bias", "none", "none"),
    ("init_lora_weights", "true", ""),
    ("lora_ga_batches", 64, ""),
    ("train_base_modules", "auto", "auto none"),
    ("relora_every", 0, ""),
    ("relora_warmup", 50, ""),
]
GALORE: list[tuple[str, Any, str]] = [
    ("rank", 128, ""),
    ("update_proj_gap", 200, ""),
    ("scale", 0.25, ""),
    ("proj_type", "std", "std reverse_std right left full"),
    ("target_modules", ["auto"], ""),
    ("exclude_modules", [], ""),
    ("proj_method", "auto", "svd gram rsvd subspace random auto"),
    ("oversample", 16, ""),
    ("power_iters", 2, ""),
    ("moment_transfer", "none", "none project reset"),
    ("stagger", True, "true false"),
    ("adaptive", None, "true false"),
    ("adaptive_threshold", 0.4, ""),
    ("adaptive_window", 5, ""),
    ("max_gap", None, ""),
    ("full_rank_policy", "identity", "identity rotate error"),
    ("state_bits", None, "8 32"),
    ("block_size", 256, ""),
    ("min_8bit_size", 4096, ""),
    ("embedding_state_bits", 32, "8 32"),
    ("proj_dtype", None, "param fp32 bf16 int4"),
    ("compat", "none", "none galore_torch"),
    ("weight_dtype", "param", "param int8"),
]
APOLLO: list[tuple[str, Any, str]] = [
    ("rank", None, ""),
    ("scale", None, ""),
    ("scale_type", None, "channel tensor"),
    ("update_proj_gap", 200, ""),
    ("norm_growth", 1.01, ""),
    ("scale_front", False, "true false"),
    ("proj_method", "random", "random"),
]


@pytest.fixture(scope="module")
def options() -> dict[str, Leaf]:
    return {flag.lstrip("-").replace("-", "_"): leaf for leaf in leaves(TrainConfig) for flag in (leaf.flag, *leaf.flags)}


def words(kind: Any) -> set[str]:
    """What may be chosen: the words of a Literal (or of one in a union), true and false of a switch.

    >>> sorted(words(Literal["a", "b"] | None))
    ['a', 'b']
    """
    if kind is bool:
        return {"true", "false"}
    if get_origin(kind) is Literal:
        return {str(word) for word in get_args(kind)}
    return {word for inner in get_args(kind) for word in words(inner)} if get_args(kind) and type(None) in get_args(kind) else set()


@pytest.mark.parametrize(("flag", "default", "choices"), FIXED + GALORE + LORA + [(f"apollo_{name}", *rest) for name, *rest in APOLLO])
def test_flags_have_the_choices_and_defaults_of_the_guide(options: dict[str, Leaf], flag: str, default: Any, choices: str) -> None:
    leaf = options[flag]
    assert set(choices.split()) <= words(leaf.type) or not choices
    if default != MISSING:
        assert leaf.default == default


def test_the_packaged_files_have_the_keys_and_values_of_the_guide() -> None:
    def read(name: str) -> dict[str, Any]:
        return json.loads(files("lowrank_opt").joinpath("defaults", name).read_text())  # type: ignore[no-any-return]

    galore = read("galore_config.json")
    del galore["ldadam"]
    shown = {name: default for name, default, _ in GALORE}
    assert galore == {**shown, "target_modules": "auto", "apollo": {name: default for name, default, _ in APOLLO}}
    assert read("lora_config.json") == {name: default for name, default, _ in LORA}
