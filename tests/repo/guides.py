"""Runs the commands of docs/from-the-guides.md: `python -m tests.repo.guides FOLDER [SCRIPT...]`, by default those of all scripts.

FOLDER is filled with tiny models and texts where the guides have theirs, and every command gets --dry-run: it builds everything and takes one
micro-batch. What makes data is run, on less of it, and so is what a later command reads.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from lm_core.data.vocab import byte_tokenizer
from mdm_scaling.data.vocabulary import gpt2
from tests.repo.test_commands import SCRIPTS
from tests.repo.test_guides import COMMANDS, settle

SHAPE = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "llama": ["meta-llama/Llama-2-7b-chat-hf", "models/llama_7B", "data/outputs/beacon-llama2-7b-chat-pt/checkpoint-xxxxx"],
    "qwen2": [
        "Qwen/Qwen2-7B-Instruct", "models/Qwen2.5-0.5B-Instruct", "models/Qwen2.5-7B-Instruct",
        "data/outputs/beacon-qwen2-pretrain/checkpoint-xxxxx",
    ],
}  # fmt: skip
SOURCES = ("en_cc", "en_c4", "github", "en_wikipedia", "en_book", "en_arxiv", "en_stack")
TEXTS = [
    "data/redpajama/train.json", "data/slimpajama/arxiv.jsonl", "data/slimpajama/book.jsonl", "data/finemath/part.jsonl",
    "data/dclm-10B/part.jsonl", *(f"data/{kind}/{source}/part.jsonl" for kind in ("pretrain_LLAMA", "SlimPajama") for source in SOURCES),
    *(f"data/val_set/{source}.jsonl" for source in SOURCES),
]  # fmt: skip
CHATS = [f"data/{name}.json" for name in (
    "longalpaca/train", "gpt/one_detail_book.train.8K", "booksum/train.8K", "needle/train.8K", "needle/train.16K",
)]  # fmt: skip
# by script: what stands for sizes that no small machine holds
SMALLER: dict[str, dict[str, str]] = {
    "mdm-scaling": {"--num-layers": "2", "--hidden-size": "64", "--num-attention-heads": "1", "--seq-length": "256", "--eval-iters": "1"},
    "beacon": {"--num_token": "8192:64k"},
}
# what a command needs that is no command of its guide, before the first one of a script that begins so
BEFORE = {
    "rwkv-distill train": [
        "rwkv-distill init -c configs/qwen_0.5b.yaml -M 1 -o output/init",
        "rwkv-distill consolidate output/init -o output/stage1/pytorch_model.bin",
    ],
    "moe-cpt train": [
        "moe-cpt split random --model_path models/llama_7B --num_experts 16 --save_path split.safetensors",
        "moe-cpt convert --model_path models/llama_7B --split_file_path split.safetensors --save_path models/llama_7B_MoE_16Select4-l2_norm",
    ],
    "mdm-scaling pretrain": [
        "mdm-scaling data tokenize --input data/redpajama/train.json --tokenizer models/gpt2 --output-prefix data/c4",
    ],
}  # fmt: skip

UPDATE = ["--train-samples", "256", "--lr-decay-samples", "256", "--lr-warmup-samples", "25", "--eval-interval", "never"]


def furnish(folder: Path) -> None:
    """Models, texts and conversations where the guides have theirs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settle(folder)
    for kind, places in MODELS.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE))
        for place in places:
            model.save_pretrained(folder / place)
            byte_tokenizer().save_pretrained(str(folder / place))
    words = "".join(f"{number} is followed by {number + 1}. " for number in range(310))
    chat = {"conversations": [{"role": "user", "content": words}, {"role": "assistant", "content": "310"}]}
    for rows, places in (([{"text": words[start:]} for start in range(40)], TEXTS), ([chat] * 8, CHATS)):
        for place in places:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("train_c4_100m", "val_c4"):
        (folder / f"data/{name}.txt").write_text('"1.0 c4_text_document"\n')
    # the bytes are the first entries of every vocabulary of GPT-2
    vocabulary = byte_tokenizer().get_vocab()
    bytes_alone = {word: number for word, number in vocabulary.items() if number < 256}
    (folder / "data/gpt2-vocab.json").write_text(json.dumps(bytes_alone | {"<|endoftext|>": 256}))
    (folder / "data/gpt2-merges.txt").write_text("#version: 0.2\n")
    shutil.copytree(gpt2(folder / "data/gpt2-vocab.json", folder / "data/gpt2-merges.txt"), folder / "models/gpt2")


def smaller(words: list[str], sizes: Mapping[str, str]) -> list[str]:
    return [sizes.get(before, word) for before, word in zip(["", *words], words)]


def run(words: list[str], folder: Path) -> None:
    program = [sys.executable, "-m", SCRIPTS[words[0]].partition(".")[0], *words[1:]]
    began = time.monotonic()
    done = subprocess.run(program, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"{time.monotonic() - began:5.0f} s  {' '.join(words)}", flush=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}\nended with {done.returncode}")


def main(folder: Path, scripts: list[str]) -> None:
    furnish(folder)
    known = [words for words in COMMANDS if not scripts or words[0] in scripts]
    prepared: set[str] = set()
    for words in known:
        start = " ".join(words[:2])
        for line in BEFORE.get(start, []) if start not in prepared else []:
            run(line.split(), folder)
        prepared.add(start)
        words = smaller(words, SMALLER.get(words[0], {}))
        if "--skip-train" in words:
            # what it scores is trained first, by one update
            trained = [word for word in words if word != "--skip-train"]
            run([*trained, *UPDATE], folder)
            run(words, folder)
        elif words[1] == "pretrain-data":
            run([*words, "--allow-missing"], folder)
        else:
            run([*words, "--dry-run"], folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
