"""What `rwkv-distill generate` does: a prompt, a student, and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from lm_core.models import load_tokenizer
from rwkv_distill.command_config import GenerateConfig
from rwkv_distill.export import student_folder
from rwkv_distill.generate import generate
from rwkv_distill.student import load_student


def continue_text(config: GenerateConfig) -> dict[str, Any]:
    """Print the prompt with its continuation; the result holds both, and the bytes that the model remembers."""
    folder = student_folder(Path(config.model))
    model, tokenizer = load_student(folder), load_tokenizer(str(folder))
    model.train(False)
    ids: Any = tokenizer(config.prompt, return_tensors="pt").input_ids.long()
    if ids.shape[1] == 0:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = torch.tensor([[start or 0]])
    shown: list[int] = []

    def show(token_B: Tensor) -> None:
        # what is only a part of a character waits for the rest
        shown.append(int(token_B[0]))
        text = str(tokenizer.decode(shown, skip_special_tokens=True))
        if text and not text.endswith("\ufffd"):
            click.echo(text, nl=False)
            shown.clear()

    if config.stream:
        click.echo(config.prompt, nl=False)
    written = generate(
        model,
        ids,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
        eos_token_id=tokenizer.eos_token_id,
        stream=show if config.stream else None,
    )[0]
    text = str(tokenizer.decode(written, skip_special_tokens=True))
    click.echo("" if config.stream else config.prompt + text)
    return {"prompt": config.prompt, "text": text, "tokens": written.tolist()}
