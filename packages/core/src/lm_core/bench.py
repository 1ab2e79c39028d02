"""What core's loop costs: `python -m lm_core.bench` trains one model on the same batches by three loops at once.

    core     lm_core.run.run, with its data, log records and stop rules
    bare     a dozen lines of PyTorch, with the batches in memory already
    trainer  transformers.Trainer, logging as often, reporting nowhere

The loops run in threads and take turns step by step, so that whatever else the machine does hits all of them alike. A
step lasts from one forward pass to the next. Ten steps in a row of each (one log record among them) make a pair; the
ratio of a pair is taken before any average is.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import click

from lm_core import record
from lm_core.cli import Command, configured
from lm_core.config import build, config, opt

WINDOW = 10
WARM_UP = 5
PRESETS = {
    "bench": {"model_type": "llama", "vocab_size": 259, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4},
    "quick": {"model_type": "llama", "vocab_size": 259, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 2},
}  # fmt: skip
LR, CLIP = 1e-3, 1.0


@config
class BenchConfig:
    """Cost of a training step in core's loop, beside a bare loop and transformers.Trainer."""

    quick: bool = opt(
        False, "A model of 0.1M parameters at 4 x 64 tokens instead of 4.9M at 8 x 256: shows the loop rather than the model."
    )
    pairs: int = opt(6, "Windows of ten steps per loop.", ge=1)
    threads: int = opt(1, "Threads of the tensor operations.", ge=1)
    precision: Literal["fp32", "bf16"] = opt("fp32", "Arithmetic of forward and backward passes.")

    @property
    def steps(self) -> int:
        return WARM_UP + WINDOW * self.pairs + 1


class Arm(threading.Thread):
    """One loop in a thread, which stops at every forward pass until `step` lets it go on to the next."""

    def __init__(self, name: str, loop: Callable[[Callable[[], None]], list[float]], threads: int) -> None:
        super().__init__(name=name, daemon=True)
        self.loop, self.threads = loop, threads
        self.losses: list[float] = []
        self.error: BaseException | None = None
        self.free = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._began = self._took = (0.0, 0.0)

    def run(self) -> None:
        import torch

        torch.set_num_threads(self.threads)
        self._go.acquire()
        try:
            self.losses = self.loop(self.pause)
        except BaseException as error:
            self.error = error
        self.free = True
        self._stopped.release()

    def pause(self) -> None:
        """Called by the loop at the beginning of a forward pass."""
        if self.free:
            return
        self._took = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        self._stopped.release()
        self._go.acquire()
        self._began = time.perf_counter(), time.process_time()

    def step(self) -> tuple[float, float]:
        """Wall and processor seconds of one step."""
        self._go.release()
        self._stopped.acquire()
        if self.error is not None:
            raise self.error
        return self._took

    def finish(self) -> list[float]:
        """Let the loop run to its end; the losses of all its steps."""
        self.free = True
        self._go.release()
        self.join()
        if self.error is not None:
            raise self.error
        return self.losses


def keep_memory() -> None:
    """Let glibc keep freed memory in one place for all threads: by default each thread has a heap of its own, and which of
    them gives pages back after every step is chance (5000 page faults, one part in a hundred of a step)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in ((-8, 1), (-3, 1 << 25), (-1, 2**31 - 1)):  # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(parameter, value)


def measure(settings: BenchConfig) -> dict[str, Any]:
    """Run the three loops; seconds per step, paired ratios and the first losses, by loop."""
    import torch

    keep_memory()
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        arms = loops(settings, Path(folder))
        for arm in arms:
            arm.start()
        for _ in range(WARM_UP):
            for arm in arms:
                arm.step()
        pairs: dict[str, list[tuple[float, float]]] = {arm.name: [] for arm in arms}
        for pair in range(settings.pairs):
            sums = {arm.name: [0.0, 0.0] for arm in arms}
            for step in range(WINDOW):
                # nobody is always the one that finds the caches warm
                first = (pair + step) % len(arms)
                for arm in arms[first:] + arms[:first]:
                    wall, processor = arm.step()
                    sums[arm.name][0] += wall
                    sums[arm.name][1] += processor
            for name, (wall, processor) in sums.items():
                pairs[name].append((wall / WINDOW, processor / WINDOW))
        losses = {arm.name: arm.finish() for arm in arms}
    return {"pairs": pairs, "losses": losses}


def loops(settings: BenchConfig, folder: Path) -> list[Arm]:
    """The three loops over one model and the same batches."""
    import torch
    from torch import Tensor, nn

    from lm_core.method import IGNORE, Batch, Loss, Method
    from lm_core.models import CausalLoss, load_model
    from lm_core.options import RunConfig
    from lm_core.run import make_loader, run
    from lm_core.sinks import Record, Sink

    run_config = build(
        RunConfig,
        {
            "model": "quick" if settings.quick else "bench",
            "tokenizer": "bytes",
            "data": ["synthetic:markov"],
            "max_length": 64 if settings.quick else 256,
            "micro_batch_size": 4 if settings.quick else 8,
            "precision": settings.precision,
            "lr": LR,
            "schedule": "constant",
            "grad_clip": CLIP,
            "budget": f"{settings.steps} steps",
            "log_every": WINDOW,
            "eval_every": "never",
            "save_every": "never",
            "device": "cpu",
            "output_dir": folder / "core",
        },
    )

    class Paused(nn.Module):
        """The next-token loss, summed; stops at the beginning of its forward pass."""

        def __init__(self, pause: Callable[[], None] = lambda: None) -> None:
            super().__init__()
            self.loss = CausalLoss(load_model(run_config.model, presets=PRESETS, init="random"))
            self.pause = pause

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            self.pause()
            loss: Tensor = self.loss(input_ids, labels)
            return loss

    class NextToken(Method):
        def __init__(self, pause: Callable[[], None] = lambda: None) -> None:
            super().__init__(run_config)
            self.pause = pause
            self.records: list[Record] = []

        def build(self) -> nn.Module:
            return Paused(self.pause)

        def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
            yield Loss(model(batch["input_ids"], batch["labels"]))

        def sinks(self, folder: Path) -> list[Sink]:
            return [self.records.append]

    def batches() -> list[dict[str, Tensor]]:
        method = NextToken()
        loader = make_loader(run_config, method.data(method.tokenizer()), rank=0, world=1)
        return [dict(next(loader)[0]) for _ in range(settings.steps)]

    def core(pause: Callable[[], None]) -> list[float]:
        method = NextToken(pause)
        run(run_config, method)
        return [record["train/loss"] for record in method.records if "train/loss" in record]

    def bare(pause: Callable[[], None]) -> list[float]:
        data = batches()
        model = Paused(pause)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
        losses = []
        for batch in data:
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = model(batch["input_ids"], batch["labels"]) / (batch["labels"] != IGNORE).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    def trainer(pause: Callable[[], None]) -> list[float]:
        return trainer_loop(Paused(pause), batches(), settings, folder / "trainer")

    return [Arm(loop.__name__, loop, settings.threads) for loop in (core, bare, trainer)]


def trainer_loop(model: Any, data: Sequence[Any], settings: BenchConfig, folder: Path) -> list[float]:
    """transformers.Trainer over `data` in order; the losses that it logs."""
    import torch
    from torch import Tensor, nn
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from lm_core.method import IGNORE

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": self.model(input_ids, labels) / (labels != IGNORE).sum()}

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    class Keep(TrainerCallback):
        losses: list[float] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            self.losses += [float(logs["loss"])] if "loss" in logs else []

    rows = [{name: tensor[row] for name, tensor in batch.items()} for batch in data for row in range(len(batch["labels"]))]
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        bf16=settings.precision == "bf16",
        per_device_train_batch_size=len(data[0]["labels"]),
        max_steps=settings.steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        logging_steps=WINDOW,
        logging_first_step=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    keep = Keep()
    loop = InOrder(model=Mean(), args=arguments, train_dataset=rows, callbacks=[keep])
    loop.remove_callback(PrinterCallback)
    loop.train()
    return keep.losses


def summary(pairs: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians of the pairs: milliseconds per step, and core over each other loop with the quartiles of that ratio."""
    found: dict[str, Any] = {
        "milliseconds": {
            name: {
                "wall": 1e3 * statistics.median(wall for wall, _ in times),
                "processor": 1e3 * statistics.median(cpu for _, cpu in times),
            }
            for name, times in pairs.items()
        },
        "core_over": {},
    }
    for name in [name for name in pairs if name != "core"]:
        found["core_over"][name] = {}
        for clock, at in (("wall", 0), ("processor", 1)):
            ratios = sorted(core[at] / other[at] for core, other in zip(pairs["core"], pairs[name]))
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            found["core_over"][name][clock] = {"median": middle, "quartiles": [low, high]}
    return found


@click.command(cls=Command)
@configured(BenchConfig)
def bench(settings: BenchConfig) -> dict[str, Any]:
    """Compare a training step of core with a bare loop and with transformers.Trainer."""
    load = os.getloadavg()[0]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        measured = measure(settings)
    found = summary(measured["pairs"])
    here = record.describe(settings)
    versions = dict(here["packages"])
    found["conditions"] = {
        "processor": here["platform"]["processor"],
        "cores": here["platform"]["cores"],
        "threads": settings.threads,
        "precision": settings.precision,
        "load_before_and_after": [load, os.getloadavg()[0]],
        "commit": (here["git"] or {}).get("commit"),
        "torch": versions.get("torch"),
        "transformers": versions.get("transformers"),
        "pairs": settings.pairs,
    }
    print("; ".join(f"{name} {value}" for name, value in found["conditions"].items()))
    for name, times in found["milliseconds"].items():
        print(f"{name:8} {times['wall']:9.2f} ms wall {times['processor']:9.2f} ms processor per step")
    for name, clocks in found["core_over"].items():
        for clock, ratio in clocks.items():
            low, high = ratio["quartiles"]
            print(f"core / {name:8} {clock:9} {ratio['median']:.4f} (quartiles {low:.4f} to {high:.4f})")
    return found


if __name__ == "__main__":
    bench()
