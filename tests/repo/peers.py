"""What a user would pick otherwise, as programs: each trains some steps on the batches that core's loader gives for the same options.

python -m tests.repo.peers trainer --model FOLDER --tokenizer bytes --data synthetic:markov --length 64 --batch 4 --steps 3 --output DIR

Every step adds a line to DIR/metrics.jsonl, as our runs do, so that both are timed by the same stopwatch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lm_core.config import build
from lm_core.method import IGNORE, Method
from lm_core.models import model_folder
from lm_core.options import RunConfig
from lm_core.run import make_loader

LR, CLIP, RANK, GAP = 1e-4, 1.0, 128, 200
# shapes that are ours and theirs, as configurations of transformers
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8},
    "long": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
}
EXPERTS, SELECTED = 8, 2


def batches(options: argparse.Namespace) -> list[dict[str, Tensor]]:
    """The batches of every step, made before the first one."""
    values = {
        "model": options.model, "tokenizer": options.tokenizer, "data": [options.data], "packing": "stream", "max_length": options.length,
        "micro_batch_size": options.batch, "budget": f"{options.steps} steps",
    }  # fmt: skip
    config = build(RunConfig, values)
    method = Method(config)
    loader = make_loader(config, method.data(method.tokenizer()), rank=0, world=1)
    rows = [next(loader)[0] for _ in range(options.steps)]
    return [{name: row[name] for name in ("input_ids", "labels")} for row in rows]


def note(folder: Path, step: int, loss: float) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "train/loss": loss}) + "\n")


def trainer(model: Any, rows: list[dict[str, Tensor]], folder: Path) -> None:
    """transformers.Trainer with the fused AdamW."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Note(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if "loss" in logs:
                note(folder, state.global_step, float(logs["loss"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(examples)

    examples = [{name: tensor[row] for name, tensor in batch.items()} for batch in rows for row in range(len(batch["labels"]))]
    settings = TrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=len(rows[0]["labels"]), max_steps=len(rows), learning_rate=LR,
        lr_scheduler_type="constant", max_grad_norm=CLIP, optim="adamw_torch_fused", logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    InOrder(model=model, args=settings, train_dataset=examples, callbacks=[Note()]).train()


def loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: Iterable[dict[str, Tensor]], folder: Path, loss_of: Callable[..., Tensor]
) -> None:
    """A dozen lines of PyTorch."""
    for step, batch in enumerate(rows, 1):
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        note(folder, step, loss.item())


def next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """The matrices of attention and MLP in a group of low rank, the rest in another, as the libraries' guides do."""
    low = [module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in f".{name}"]
    chosen = {id(weight) for weight in low}
    return [{"params": [other for other in model.parameters() if id(other) not in chosen]}, {"params": low, **settings}]


def galore_torch(model: Any, rows: list[dict[str, Tensor]], folder: Path) -> None:
    from galore_torch import GaLoreAdamW

    settings = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    loop(model, GaLoreAdamW(groups(model, **settings), lr=LR, no_deprecation_warning=True), rows, folder, next_token)


def apollo_torch(model: Any, rows: list[dict[str, Tensor]], folder: Path) -> None:
    from apollo_torch import APOLLOAdamW

    settings = {"rank": RANK, "update_proj_gap": GAP, "scale": 1.0, "proj": "random", "proj_type": "std", "scale_type": "channel"}
    loop(model, APOLLOAdamW(groups(model, **settings), lr=LR), rows, folder, next_token)


def masked(model: Any, rows: list[dict[str, Tensor]], folder: Path) -> None:
    """Masked diffusion as its paper prints it: a level per row, all logits, the losses of hidden tokens over that level."""
    drawn = torch.Generator().manual_seed(0)
    mask_id = model.config.vocab_size - 1

    def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        level = torch.rand(len(ids), 1, generator=drawn).clamp_min(1e-3)
        hidden = torch.rand(ids.shape, generator=drawn) < level
        everyone = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
        logits = model(input_ids=ids.masked_fill(hidden, mask_id), attention_mask=everyone).logits
        each = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        return (each * hidden / level).sum() / (batch["labels"] != IGNORE).sum()

    loop(model, torch.optim.AdamW(model.parameters(), lr=LR, fused=True), rows, folder, loss_of)


PEERS: dict[str, Callable[[Any, list[dict[str, Tensor]], Path], None]] = {
    "trainer": trainer, "galore-torch": galore_torch, "apollo-torch": apollo_torch, "masked": masked,
}  # fmt: skip


def model_of(name: str, vocabulary: int) -> Any:
    """A folder's weights, or random ones of a named shape."""
    torch.manual_seed(0)
    if name == "mixtral":
        shape = {**SHAPES["dense"], "intermediate_size": SHAPES["dense"]["intermediate_size"] // EXPERTS}
        config = MixtralConfig(
            vocab_size=vocabulary, num_local_experts=EXPERTS, num_experts_per_tok=SELECTED, output_router_logits=True, **shape
        )
        return MixtralForCausalLM(config)
    if name in SHAPES:
        return dense(name, vocabulary)
    return AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32)


def dense(shape: str, vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=8192, pad_token_id=0, **SHAPES[shape]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=[*PEERS])
    for name in ("model", "tokenizer", "data"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("length", "batch", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, help="Rows of the embedding of a random model.", default=49153)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    rows = batches(options)
    PEERS[options.peer](model_of(options.model, options.vocabulary), rows, options.output)


if __name__ == "__main__":
    main()
