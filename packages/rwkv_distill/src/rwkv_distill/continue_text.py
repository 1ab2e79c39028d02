"""What `rwkv-distill generate` does: a prompt, a student, and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from lm_core.errors import InputError
from lm_core.models import load_tokenizer
from rwkv_distill.command_config import GenerateConfig
from rwkv_distill.export import student_folder
from rwkv_distill.generate import generate
from rwkv_distill.rows import check_messages, render
from rwkv_distill.state_file import load, save
from rwkv_distill.student import load_student


def continue_text(config: GenerateConfig) -> dict[str, Any]:
    """Print the prompt with its continuation; the result holds both, and the bytes that the model remembers."""
    folder = student_folder(Path(config.model))
    model, tokenizer = load_student(folder), load_tokenizer(str(folder))
    model.train(False)
    prompt = config.prompt if config.chat is None else render(tokenizer, chat(config.chat), answer=True)
    encoding: Any = tokenizer(prompt, add_special_tokens=config.chat is None and config.state_in is None)
    before, state, read = list(encoding.input_ids), model.model.new_state(), list[int]()
    if config.state_in is not None:
        state, read = load(config.state_in, model)
        before = read + before
    if not before:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        before = [start or 0]
    ids: Tensor = torch.tensor([before])
    shown: list[int] = []

    def show(token_B: Tensor) -> None:
        # what is only a part of a character waits for the rest
        shown.append(int(token_B[0]))
        text = str(tokenizer.decode(shown, skip_special_tokens=True))
        if text and not text.endswith("\ufffd"):
            click.echo(text, nl=False)
            shown.clear()

    if config.stream:
        click.echo(prompt, nl=False)
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
        state=state,
        stream=show if config.stream else None,
    )[0]
    text = str(tokenizer.decode(written, skip_special_tokens=True))
    click.echo("" if config.stream else prompt + text)
    if config.state_out is not None:
        # the last token was chosen, not read
        save(config.state_out, model, state, written[-1:].tolist())
    return {"prompt": prompt, "text": text, "tokens": written.tolist(), "state_bytes": state.bytes()}


def chat(path: Path) -> list[dict[str, str]]:
    """The turns in a JSON file: a list of roles and contents, or a mapping with them under `messages`."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"chat: {path} cannot be read as JSON ({error}); write a list of role and content") from None
    return check_messages(content["messages"] if isinstance(content, dict) and "messages" in content else content, str(path))
