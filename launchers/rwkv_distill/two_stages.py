"""Both stages on SmolLM2-135M by preset and initial weights: divergence from the teacher and held-out loss per stage, texts, a picture.

    python launchers/rwkv_distill/two_stages.py runs/two_stages --steps 60 40 --minutes 10

A run of so many updates takes four minutes of one processor, of which half a minute goes on loading and evaluation. What is done is not
done again: call it once more to go on after --minutes; once all runs are there it draws the picture. It drives the package's own parts, since pairs of commands would spend half the time on loading,
exporting and reading back.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from lm_core.config import build
from lm_core.data.loader import eval_batches
from lm_core.engine import make_engine
from lm_core.models import load_model, load_tokenizer
from lm_core.plot import COLOURS, drawing
from lm_core.run import make_loader
from lm_core.train import train_step
from rwkv_distill.align import Align
from rwkv_distill.config import TrainConfig, rate
from rwkv_distill.distill import Distill, DistilledLogits
from rwkv_distill.evaluate import compare
from rwkv_distill.generate import generate

MODEL = "smollm2-135m"
STARTS: dict[str, dict[str, Any]] = {
    "copied, calibrated": {},
    "copied": {"calibrate": False},
    "random": {"init": "random", "calibrate": False},
}
RUNS = [(preset, start) for start in STARTS for preset in ("arwkv", "rad")]
PROMPTS = ("A list is", "The value of the variable", "If the object is a class")
HELD_OUT = 512


def configured(stage: int, preset: str, start: str, given: argparse.Namespace) -> TrainConfig:
    chosen = dict(STARTS[start])
    student = {"preset": preset, "init": chosen.pop("init", "copy")}
    if stage == 2:
        chosen.pop("calibrate", None)
    return build(
        TrainConfig,
        {
            "model": MODEL, "data": ["builtin:python-docs"], "max_length": given.length, "accumulate": 1, "warmup": 2, "budget": f"{given.steps[stage - 1]} steps",
            "stage": stage, "precision": "bf16", "device": "cpu", "gradient_checkpointing": False, "eval_tokens": HELD_OUT,
            "lr": given.rates[stage - 1], "lr_final": given.rates[stage - 1] / 10, "student": student, **chosen,
        },
    )  # fmt: skip


def run_stage(config: Any, weights: Path | None, teacher: Any, record: dict[str, Any]) -> Any:
    """The student behind one stage; what was measured goes into `record`."""
    torch.manual_seed(config.seed)
    tokenizer: Any = load_tokenizer(MODEL)
    method = (Align if config.stage == 1 else Distill)(config)
    data = method.data(tokenizer)
    model: Any = method.build()
    student = model.student
    if weights is not None:
        student.load_state_dict(torch.load(weights, weights_only=True))
    engine = make_engine(config, method, model, torch.device("cpu"))
    loader = make_loader(config, data, 0, 1)
    held: Any = next(iter(data.valid.values()))
    measured: dict[str, Any] = {"losses": [], "tokens": 0}
    steps = int(config.limits().limits["steps"])

    def look(when: str) -> None:
        student.eval()
        with torch.no_grad():
            if config.stage == 1:
                batches = list(eval_batches(held, micro_batch=1, tokens=HELD_OUT))
                total = sum(float(loss.total) for batch in batches for loss in method.losses(model, batch))
                measured[f"distance {when}"] = total / sum(method.targets(batch) for batch in batches)
            if config.stage == 1 or when == "after":
                report = compare(DistilledLogits(student, teacher), held, config)
                measured[when] = {key: report[key] for key in ("positions", "kl", "top_agreement", "loss")}
        student.train()

    look("before")
    began = time.process_time()
    for step in range(steps):
        report = train_step(engine, method, next(loader), lr=rate(step, step / steps, config.lr, config.lr_final, 2, "exp"))
        measured["losses"].append(report.loss)
        measured["tokens"] += report.size.tokens
        print(f"{record['run']}, stage {config.stage}, step {step + 1}: {report.loss:.4f}", flush=True)
    measured["seconds"] = time.process_time() - began
    look("after")
    record[f"stage {config.stage}"] = measured
    return student.eval()


def texts(model: Any, transformer: bool = False) -> list[str]:
    """Greedy continuations of the prompts."""
    tokenizer: Any = load_tokenizer(MODEL)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        if transformer:
            new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)[
                0, ids.shape[1] :
            ]
        else:
            new = generate(model, ids, max_new_tokens=24)[0]
        found.append(prompt + str(tokenizer.decode(new)))
    return found


def run(preset: str, start: str, given: argparse.Namespace, teacher: Any) -> None:
    """Both stages of one student; behind stage 1 its weights are kept until stage 2 is done."""
    name, folder = f"{preset}, {start}", given.folder
    result, half, weights = (folder / f"{name}{suffix}" for suffix in (".json", ".half.json", ".bin"))
    if not half.exists():
        record: dict[str, Any] = {"run": name, "steps": given.steps, "length": given.length, "rates": given.rates}
        student = run_stage(configured(1, preset, start, given), None, teacher, record)
        torch.save({key: value.detach() for key, value in student.state_dict().items()}, weights)
        half.write_text(json.dumps(record))
        del student
    record = json.loads(half.read_text())
    student = run_stage(configured(2, preset, start, given), weights, teacher, record)
    if start == "copied, calibrated":
        record["texts"] = texts(student)
        student.save_pretrained(folder / preset, pytorch_bin=False)
        load_tokenizer(MODEL).save_pretrained(folder / preset)
    result.write_text(json.dumps(record))
    half.unlink()
    weights.unlink()


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Held-out divergence at the start and behind each stage, and the divergence of each update of stage 2."""
    with drawing(path) as figure:
        left, right = figure.subplots(1, 2)
        for place, start in enumerate(STARTS):
            for preset, line in (("arwkv", "-"), ("rad", "--")):
                for found in (r for r in records if r["run"] == f"{preset}, {start}"):
                    one, two = found["stage 1"], found["stage 2"]
                    look = {"color": COLOURS[place], "linestyle": line, "label": found["run"]}
                    left.plot([0, 1, 2], [stage["kl"]["mean"] for stage in (one["before"], one["after"], two["after"])], marker="o", **look)
                    right.plot(range(1, len(two["losses"]) + 1), two["losses"], **look)
        left.set_xticks([0, 1, 2], ["start", "stage 1", "stage 2"])
        left.set_ylabel("held-out KL to the teacher (nats)")
        right.set_xlabel("update of stage 2")
        right.set_ylabel("KL of its rows (nats)")
        for axes in (left, right):
            axes.set_ylim(bottom=0)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, nargs=2, default=[60, 40], help="Updates of stage 1 and of stage 2.")
    parser.add_argument(
        "--rates", type=float, nargs=2, default=[1e-3, 1e-4], help="Peak learning rates of both stages; they end at a tenth."
    )
    parser.add_argument("--length", type=int, default=256, help="Tokens of an update.")
    parser.add_argument("--minutes", type=float, default=1e9, help="Begin no further run after so many minutes.")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="Initial weights that are compared.")
    given = parser.parse_args()
    chosen = [(preset, start) for preset, start in RUNS if start in given.starts]
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    teacher: Any = load_model(MODEL)
    teacher.eval()
    if not (given.folder / "teacher.json").exists():
        (given.folder / "teacher.json").write_text(json.dumps(texts(teacher, transformer=True)))
    for preset, start in chosen:
        if not (given.folder / f"{preset}, {start}.json").exists() and time.monotonic() - began < 60 * given.minutes:
            run(preset, start, given, teacher)
    done = [
        json.loads(path.read_text()) for path in (given.folder / f"{preset}, {start}.json" for preset, start in chosen) if path.exists()
    ]
    if len(done) == len(chosen):
        draw(done, given.folder / "two_stages.png")


if __name__ == "__main__":
    main()
