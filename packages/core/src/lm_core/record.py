"""What a run folder says about how the run was made: `config.yaml` reproduces it, `record.json` describes its surroundings.

Imports no torch; the accelerator is described only if the run has loaded torch already.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from lm_core.config import to_dict, to_yaml

# variables that change what a run computes or where it runs; others are nobody's business
_RELEVANT = re.compile(
    r"(ACCELERATE|BLIS|CUBLAS|CUDA|CUDNN|DS|GLOO|GOMP|GROUP|HF|HIP|HUGGING|KERNELS|KMP|LM|LOCAL|MASTER|MKL|NCCL|NUMEXPR|NVIDIA|NVTE|OMP"
    r"|OPENBLAS|PYTHON|PYTORCH|RANK|ROCR|ROLE|SLURM|TOKENIZERS|TORCH|TORCHELASTIC|TORCHINDUCTOR|TRANSFORMERS|TRITON|WANDB|WORLD|XDG|XLA)(_|$)"
)
_SECRET = re.compile(r"key|token(?!s|izer)|secret|passw|passphrase|credential|auth|cookie|private|jwt", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
MASK = "***"


def write(folder: Path, config: Any) -> None:
    """Write `config.yaml` and `record.json` into `folder`, which is made if need be; each file appears whole or not at all.

    A run that is resumed into its folder keeps the earlier records under `earlier`. Raises OSError when the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "config.yaml", to_yaml(config))
    _replace(folder / "record.json", json.dumps({**describe(config), "earlier": _earlier(folder / "record.json")}, indent=2) + "\n")


def config_hash(config: Any) -> str:
    """16 hexadecimal digits that are equal for equal options of the same names, on any machine."""
    canonical = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def describe(config: Any) -> dict[str, Any]:
    """The record of a run that starts now: JSON types only, secrets masked."""
    module = sys.modules.get(type(config).__module__)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": mask_arguments(sys.argv),
        "folder": os.getcwd(),
        "config_class": f"{type(config).__module__}.{type(config).__qualname__}",
        "config_hash": config_hash(config),
        "git": git_state(Path(getattr(module, "__file__", None) or __file__)),
        "python": sys.version.split()[0],
        "packages": dict(sorted({(dist.name, dist.version) for dist in distributions() if dist.name})),
        "platform": _platform(),
        "environment": mask_environment(os.environ),
    }


def mask_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter to a run; values of those that look like secrets, and logins in addresses, are masked."""
    kept = {name: value for name, value in sorted(environment.items()) if _RELEVANT.match(name)}
    return {name: MASK if _SECRET.search(name) and value else _text(value) for name, value in kept.items()}


def mask_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without its secrets: what follows a flag, or stands in a `key=value`, whose name looks like one.

    >>> mask_arguments(["train", "--access-token", "abc", "--set", "api_key=abc", "--tokenizer", "bytes"])
    ['train', '--access-token', '***', '--set', 'api_key=***', '--tokenizer', 'bytes']
    """
    masked: list[str] = []
    hide = False
    for argument in arguments:
        name, sign, _ = argument.partition("=")
        if hide and not argument.startswith("--"):
            masked.append(MASK)
        elif sign and _SECRET.search(name):
            masked.append(f"{_text(name)}={MASK}")
        else:
            masked.append(_text(argument))
        hide = argument.startswith("-") and not sign and bool(_SECRET.search(argument))
    return masked


def git_state(file: Path) -> dict[str, Any] | None:
    """Commit, branch and changed files of the checkout that tracks `file`; None where there is none, or no git."""
    at = file.resolve().parent
    # an installed copy may lie inside some checkout without belonging to it
    if _git(at, "ls-files", "--error-unmatch", file.name) is None:
        return None
    status = _git(at, "status", "--porcelain") or ""
    return {
        "commit": _git(at, "rev-parse", "HEAD"),
        "branch": _git(at, "rev-parse", "--abbrev-ref", "HEAD"),
        "changed": [line[3:] for line in status.splitlines()][:100],
    }


def _git(at: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=at, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return run.stdout.rstrip()


def _platform() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_available()
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "host": platform.node(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch and cuda else [],
    }


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _text(value: str) -> str:
    """Without logins, and without the bytes that UTF-8 cannot hold."""
    return _LOGIN.sub(MASK, value).encode(errors="replace").decode()


def _earlier(path: Path) -> list[Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return [*record.pop("earlier", []), record]
    except (OSError, ValueError, AttributeError, TypeError):  # no record, or one cut short by hand
        return []


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
