"""Slurm scripts that contradict themselves are found before they wait in a queue. Imports no torch."""

from __future__ import annotations

import ast
import json
import operator
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_cpt.plan import Plan, steps_of_tokens

_ASSIGNMENT = re.compile(r"^\s*(?:export\s+|readonly\s+|local\s+|declare\s+)?([A-Za-z_]\w*)=(.*)$")
_SHORT = {"N": "nodes", "J": "job-name", "p": "partition", "o": "output", "e": "error", "c": "cpus-per-task", "G": "gpus", "n": "ntasks"}
_REQUIRED = ("job-name", "partition", "output", "error")
_HEADER = {"max_steps": "max_steps", "global batch size": "global_batch", "#tokens/batch": "tokens_per_batch"}
# what the header is computed from
_SIZES = ("num_nodes", "num_gpu_per_node", "per_device_train_batch_size", "gradient_accumulation_steps", "block_size", "num_tokens")
_PATHS = re.compile(r"(?:^|_)(?:path|dir|folder|file|model|data|deepspeed)(?:_|$)", re.IGNORECASE)
_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


@dataclass(frozen=True)
class Value:
    """What a line of the script sets. `text` is None where only the running script knows it."""

    text: str | None
    line: int


@dataclass(frozen=True)
class Finding:
    """One contradiction, and the way out of it."""

    code: str
    severity: Literal["error", "warning"]
    field: str
    lines: list[int]
    found: str
    expected: str
    fix: str

    def __str__(self) -> str:
        return f"{self.code} {self.severity} {self.found}. {self.fix}"


def check_slurm(
    text: str, *, folder: Path = Path(), max_cpus: int = 128, header: str | None = None, make_folders: bool = False
) -> list[Finding]:
    """What is wrong with a script, by line. Relative paths start at `folder`; `header` is the beginning of a run's log."""
    lines = text.splitlines()
    options, variables = directives(lines), assignments(lines)
    found = [
        *_sizes(options, variables),
        *_limits(options, max_cpus),
        *_logs(options, folder, make_folders),
        *_torchrun(lines, variables),
        *_paths(variables, folder),
        *_model_type(variables, folder),
        *(_header(variables, header) if header is not None else []),
    ]
    return sorted(found, key=lambda finding: (finding.lines or [0], finding.code))


def rendered(text: str, nodes: int, gpus: int) -> str:
    """The script for other machines: every line that says how many there are, and how many GPUs each has, says the same.

    >>> rendered("#SBATCH --nodes=2\\n#SBATCH --gres=gpu:h200:8\\nnum_nodes=2", 3, 4)
    '#SBATCH --nodes=3\\n#SBATCH --gres=gpu:h200:4\\nnum_nodes=3'
    """
    for pattern, number in (
        (r"(?m)^(#SBATCH\s+(?:--nodes[= ]|-N\s*))\d+", nodes),
        (r"(?m)^(#SBATCH\s+--(?:gres|gpus-per-node)[= ](?:gpu:)?(?:[A-Za-z]\w*:)?)\d+", gpus),
        (r"(?m)\b(num_nodes=)\d+", nodes),
        (r"(?m)\b(num_gpu_per_node=)\d+", gpus),
    ):
        text = re.sub(pattern, rf"\g<1>{number}", text)
    return text


def directives(lines: list[str]) -> dict[str, Value]:
    """`#SBATCH` options by their long names, the last one of each."""
    found: dict[str, Value] = {}
    for number, line in enumerate(lines, start=1):
        if not line.startswith("#SBATCH"):
            # Slurm stops reading at the first command
            if line.strip() and not line.lstrip().startswith("#"):
                break
            continue
        words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
        while words:
            word = words.pop(0)
            name, equals, value = word.lstrip("-").partition("=")
            if not word.startswith("--") and len(name) > 1 and not equals:
                name, value = name[0], name[1:]
            elif not equals and words and not words[0].startswith("-"):
                value = words.pop(0)
            found[_SHORT.get(name, name)] = Value(value, number)
    return found


def assignments(lines: list[str]) -> dict[str, Value]:
    """Shell variables by name, the last assignment of each; arithmetic of literals and of earlier variables is evaluated."""
    found: dict[str, Value] = {}
    for number, line in enumerate(lines, start=1):
        # several on one line are separated by semicolons or blanks
        for part in re.split(r"[;\s]+(?=[A-Za-z_]\w*=)", line.strip()) if "=" in line and not line.lstrip().startswith("#") else []:
            if match := _ASSIGNMENT.match(part):
                found[match[1]] = Value(literal(match[2], found), number)
    return found


def literal(text: str, known: Mapping[str, Value]) -> str | None:
    """The value of the right side of an assignment, or None where it is not fixed in the script.

    >>> literal("$((4 * n))", {"n": Value("8", 1)}), literal('"a b"', {}), literal("$(hostname)", {})
    ('32', 'a b', None)
    """
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        return None
    value = " ".join(words)

    def replaced(match: re.Match[str]) -> str:
        variable = known.get(match[1] or match[2])
        return "\0" if variable is None or variable.text is None else variable.text

    value = re.sub(r"\$\{(\w+)\}|\$([A-Za-z_]\w*)", replaced, value)
    if (match := re.fullmatch(r"\$\(\((.*)\)\)", value)) is not None:
        names = re.sub(r"[A-Za-z_]\w*", lambda name: (known[name[0]].text or "\0") if name[0] in known else "\0", match[1])
        number = arithmetic(names)
        return None if number is None else str(number)
    return None if "$" in value or "`" in value or "\0" in value else value


def arithmetic(text: str) -> int | None:
    """An integer expression of literals; `^` is a power, as in the guide's 200*10^9.

    >>> arithmetic("200*10^9"), arithmetic("7 / 2"), arithmetic("nodes"), arithmetic("1e11")
    (200000000000, 3, None, 100000000000)
    """

    def value(node: ast.AST) -> int | None:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and node.value == int(node.value):
            return int(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = value(node.left), value(node.right)
            if left is None or right is None or (right == 0 and isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod)):
                return None
            return _OPERATORS[type(node.op)](left, right) if not isinstance(node.op, ast.Pow) or right <= 64 else None
        return None

    try:
        return value(ast.parse(text.strip().replace("^", "**"), mode="eval"))
    except (SyntaxError, ValueError, OverflowError):
        return None


def plan_of(variables: Mapping[str, Value]) -> Plan | None:
    """The three numbers of the log header, where the script fixes all they are made of."""
    numbers = [_number(variables.get(name)) for name in _SIZES]
    if any(number is None or number < 1 for number in numbers):
        return None
    nodes, gpus, micro, accumulate, block, tokens = (int(number or 0) for number in numbers)
    batch = micro * accumulate * nodes * gpus
    return Plan(steps_of_tokens(tokens, batch * block), batch, batch * block)


def _sizes(options: Mapping[str, Value], variables: Mapping[str, Value]) -> Iterator[Finding]:
    yield from _same("S01", "nodes", "--nodes", options.get("nodes"), _number(options.get("nodes")), "num_nodes", variables)
    named, gpus = _gpus(options)
    if gpus is not None:
        yield from _same("S02", "gpus", named, options[named.removeprefix("--")], gpus, "num_gpu_per_node", variables)
    tasks = options.get("ntasks-per-node")
    if tasks is None or _number(tasks) != 1:
        said = "--ntasks-per-node is missing" if tasks is None else f"--ntasks-per-node (line {tasks.line}: {tasks.text}) != 1"
        fix = "Set --ntasks-per-node=1: torchrun starts the processes of a machine."
        yield Finding("S03", "error", "ntasks-per-node", _lines(tasks), said, "1", fix)


def _same(
    code: str, field: str, option: str, at: Value | None, number: int | None, name: str, variables: Mapping[str, Value]
) -> Iterator[Finding]:
    """An option of Slurm and the variable that repeats it."""
    variable = variables.get(name)
    if at is None or variable is None:
        missing = option if at is None else name
        where = _lines(at, variable)
        fix = f"Set {missing}, so that Slurm and the run mean the same machines."
        yield Finding(code, "error", field, where, f"{missing} is missing", f"{option} = {name}", fix)
    elif number is None or _number(variable) is None:
        said = (
            f"{option} (line {at.line}: {at.text}) or {name} (line {variable.line}: {variable.text or 'not a literal'}) cannot be verified"
        )
        yield Finding(code, "warning", field, _lines(at, variable), said, f"{option} = {name}", "Write both as numbers.")
    elif number != _number(variable):
        said = f"{option} (line {at.line}: {at.text}) != {name} (line {variable.line}: {variable.text})"
        fix = f"Set {name}={number}, or {option}={variable.text}."
        yield Finding(code, "error", field, _lines(at, variable), said, f"{option} = {name}", fix)


def _gpus(options: Mapping[str, Value]) -> tuple[str, int | None]:
    """The option that asks for GPUs per machine, and how many."""
    for name in ("gres", "gpus-per-node"):
        if name in options:
            parts = [part for part in (options[name].text or "").split(",") if name != "gres" or part.split(":")[0] == "gpu"]
            numbers = [1 if part == "gpu" else _integer(part.rpartition(":")[2]) for part in parts]
            if parts and all(number is not None for number in numbers):
                return f"--{name}", sum(number or 0 for number in numbers)
    return "--gres", None


def _limits(options: Mapping[str, Value], max_cpus: int) -> Iterator[Finding]:
    cpus = options.get("cpus-per-task")
    if cpus is not None and (_number(cpus) or 0) > max_cpus:
        said = f"--cpus-per-task (line {cpus.line}: {cpus.text}) > {max_cpus}"
        yield Finding("S04", "error", "cpus-per-task", [cpus.line], said, f"at most {max_cpus}", f"Set --cpus-per-task={max_cpus} or less.")
    for name in _REQUIRED:
        if name not in options:
            yield Finding("S05", "error", name, [], f"--{name} is missing", f"--{name}", f"Add a line #SBATCH --{name}=...")


def _logs(options: Mapping[str, Value], folder: Path, make: bool) -> Iterator[Finding]:
    for name in ("output", "error"):
        value = options.get(name)
        if value is None:
            continue
        logs = folder / Path(value.text or "").parent
        if make:
            logs.mkdir(parents=True, exist_ok=True)
        if not logs.is_dir():
            said = f"--{name} (line {value.line}: {value.text}): {logs} does not exist, so the job would fail without a word"
            yield Finding("S06", "error", name, [value.line], said, f"{logs}/", f"mkdir -p {logs}, or use --fix.")
    output = options.get("output")
    if output is not None and "%j" not in (output.text or ""):
        said = f"--output (line {output.line}: {output.text}) has no %j, so jobs overwrite each other's log"
        yield Finding("S07", "error", "output", [output.line], said, "%j", "Name it for example logs/%x-%j.log.")


def _torchrun(lines: list[str], variables: Mapping[str, Value]) -> Iterator[Finding]:
    for number, line in enumerate(lines, start=1):
        if line.lstrip().startswith("#"):
            continue
        for option, name in (("nproc[_-]per[_-]node", "num_gpu_per_node"), ("nnodes", "num_nodes")):
            match = re.search(rf"--({option})[= ]+(\S+)", line)
            variable = variables.get(name)
            if match is None or variable is None:
                continue
            given = literal(match[2].strip('"'), variables)
            if given is not None and _number(variable) is not None and _integer(given) != _number(variable):
                said = f"--{match[1]} (line {number}: {given}) != {name} (line {variable.line}: {variable.text})"
                yield Finding("S09", "error", match[1], [number, variable.line], said, f"{name}", f'Write --{match[1]} "${name}".')


def _paths(variables: Mapping[str, Value], folder: Path) -> Iterator[Finding]:
    for name, value in variables.items():
        text = value.text or ""
        if _PATHS.search(name) and "/" in text and ":" not in text and not (folder / text).expanduser().exists():
            if name.lower().startswith(("out", "log")):
                continue
            said = f"{name} (line {value.line}: {text}) does not exist"
            yield Finding("S11", "warning", name, [value.line], said, "a path", "Correct it, or check it on the cluster.")


def _model_type(variables: Mapping[str, Value], folder: Path) -> Iterator[Finding]:
    kind = variables.get("model_type")
    for name, value in variables.items():
        path = folder / (value.text or "") / "config.json"
        if kind is None or kind.text is None or not value.text or not path.is_file():
            continue
        stored = json.loads(path.read_text()).get("model_type")
        if stored != kind.text:
            said = f"model_type (line {kind.line}: {kind.text}) != that of {name} (line {value.line}: {stored})"
            yield Finding("S10", "error", "model_type", [kind.line, value.line], said, str(stored), f"Set model_type={stored}.")


def _header(variables: Mapping[str, Value], header: str) -> Iterator[Finding]:
    plan = plan_of(variables)
    found = dict(re.findall(r"^(max_steps|global batch size|#tokens/batch): (\d+)", header, re.MULTILINE))
    if plan is None:
        absent = [name for name in _SIZES if _number(variables.get(name)) is None]
        said = f"the header cannot be verified, since {', '.join(absent)} is no number in the script"
        yield Finding("S08", "warning", "header", [], said, "numbers", f"Assign {', '.join(absent)}.")
        return
    lines = sorted(variables[name].line for name in _SIZES)
    for name, field in _HEADER.items():
        expected = getattr(plan, field)
        if found.get(name) != str(expected):
            said = f"{name} of the log ({found.get(name, 'absent')}) != {expected} by the script (lines {lines[0]} to {lines[-1]})"
            yield Finding("S08", "error", name, lines, said, str(expected), "The log is of other settings: check which ones were meant.")


def _integer(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _number(value: Value | None) -> int | None:
    return None if value is None or value.text is None else arithmetic(value.text)


def _lines(*values: Value | None) -> list[int]:
    return [value.line for value in values if value is not None]
