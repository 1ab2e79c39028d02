"""A run from options to result: what every `train` command calls. The loop itself is `train.py`."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from lm_core import checkpoint, dist, plot, record
from lm_core.data.loader import Loader
from lm_core.engine import make_engine
from lm_core.engine.state import write_json
from lm_core.errors import DISK_ERRORS, ConfigError, Interrupted, RunFailed
from lm_core.estimate import Estimate, estimate, peak_bytes, reset_peak
from lm_core.evaluate import Scores, evaluate
from lm_core.export import export
from lm_core.generate import continue_text
from lm_core.metrics import Metrics
from lm_core.models import load_model
from lm_core.progress import Every, LossBelow, Progress, Reason, Rule, Signals, Size, any_of, kill_file, pause, time_limit
from lm_core.train import Report, train
from lm_core.unbuilt import estimate_unbuilt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_core.data import Data
    from lm_core.engine.base import Engine
    from lm_core.method import Method
    from lm_core.options import RunConfig

logger = logging.getLogger(__name__)

# steps without a target, or not finite under --nonfinite drop, that end a run when they follow one another
EMPTY_IN_A_ROW = 3
DROPPED_IN_A_ROW = 10
# more of them in float16, whose scale is halved with each until the gradients fit
HALVINGS = 30


def run(config: RunConfig, method: Method) -> dict[str, Any]:
    """Train as `config` says; returns the content of `result.json`, or the estimate under `dry_run`.

    Raises ConfigError, InputError and ResumeRefused before any training, RunFailed when the run goes
    wrong, and Interrupted after a signal once everything is saved.
    """
    dist.relaunch(config.num_processes)
    device = dist.init(config.device)
    if config.kernels == "cuda" and device.type != "cuda":
        raise ConfigError(f"kernels: cuda needs a GPU, and this run is on the {device.type}; use --kernels auto, or another --device")
    if config.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("precision: this GPU has no arithmetic in bf16; use --precision fp16 or fp32")
    if config.kernels != "auto":
        os.environ["KERNELS_CUDA"] = config.kernels
    torch.use_deterministic_algorithms(config.deterministic)
    folder = config.run_folder()
    start = dist.on_main(starting_point, folder, config.resume, config.overwrite or config.dry_run)
    if not config.dry_run:
        dist.on_main(require_writable, folder)
    with dist.main_first():
        tokenizer = method.tokenizer()
        data = method.data(tokenizer)
    if config.dry_run:
        unbuilt = estimate_unbuilt(config, method, make_loader(config, data, dist.rank(), dist.world()), device)
        if unbuilt is not None:
            print(unbuilt)
            return unbuilt.to_dict()
    torch.manual_seed(config.seed)
    model = method.build()
    flops = method.flops_per_token(model)
    engine = make_engine(config, method, model, device)
    loader = make_loader(config, data, engine.data_rank, engine.data_world)
    foreseen = estimate(engine, method, loader, config.limits(), flops)
    if dist.rank() == 0:
        print(foreseen)
    if config.dry_run:
        return foreseen.to_dict()
    with Signals() as signals:
        state = Run(config, folder, start, tokenizer, data, loader.epoch_samples, flops, foreseen, signals)
        return state.go(method, engine, loader)


def make_loader(config: RunConfig, data: Data, rank: int, world: int) -> Loader:
    """The training batches of one data rank."""
    return Loader(
        data,
        micro_batch=config.micro_batch_size,
        accumulate=config.accumulate,
        rank=rank,
        world=world,
        seed=config.seed,
        shuffle=config.shuffle,
        num_workers=config.num_workers,
        ramp=config.ramp(world),
    )


def starting_point(folder: Path, resume: str, free: bool) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start. Touches nothing.

    Raises ConfigError when the folder holds a run that would be lost, ResumeRefused when there is nothing whole to resume.
    """
    if resume == "auto":
        return checkpoint.latest(folder)
    held = any((folder / name).exists() for name in ("config.yaml", "checkpoints", "metrics.jsonl", "final"))
    if resume != "none":
        path = Path(resume)
        # a run folder stands for its newest checkpoint; whatever else it is, `verified` says what is wrong with it
        path = checkpoint.latest(path) or path if (path / "checkpoints").is_dir() else path
        checkpoint.verified(path)
        if held and not free and path.resolve().parent.parent != folder.resolve():
            raise ConfigError(f"output_dir: {folder} holds another run than the one of {path}; choose another folder")
        return path
    if held and not free:
        raise ConfigError(f"output_dir: {folder} already holds a run; add --resume auto, --overwrite, or choose another folder")
    return None


def require_writable(folder: Path) -> None:
    """Raise ConfigError when `folder` cannot be made or written, before anything is loaded. Leaves nothing behind."""
    at = folder.absolute()
    while not at.exists() and at != at.parent:
        at = at.parent
    try:
        # only trying tells: permissions say nothing of read-only disks and of what is no disk at all
        with tempfile.TemporaryFile(dir=at):
            return
    except NotADirectoryError:
        reason = f"{at} is not a folder"
    except OSError as error:
        reason = f"{at}: {error.strerror}"
    raise ConfigError(f"output_dir: {folder} cannot be written ({reason}); choose another folder")


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns what the system says about a full or read-only disk, or about a process that is gone, into RunFailed."""
    try:
        yield
    except RuntimeError as error:
        if not dist.lost_a_process(error):
            raise
        raise RunFailed("num_processes: another process of this run has ended; see why there, then go on with --resume auto") from error
    except (OSError, SafetensorError) as error:
        # safetensors reports the system's number in its text only
        found = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number not in DISK_ERRORS:
            raise
        raise RunFailed(
            f"output_dir: {folder} cannot be written ({os.strerror(number)}); make room and go on with --resume auto"
        ) from error


def _best_until(folder: Path, step: int) -> float:
    """The lowest held-out loss that was kept up to a step; one that was reached behind it is forgotten with those steps."""
    with suppress(OSError, ValueError):
        best = json.loads((folder / "best.json").read_text())
        if best["step"] <= step:
            return float(best["loss"])
    return math.inf


class Run:
    """What the loop asks between steps: when to stop, what to log, evaluate and save, and how to finish."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        start: Path | None,
        tokenizer: PreTrainedTokenizerBase,
        data: Data,
        epoch_samples: int,
        flops_per_token: float,
        foreseen: Estimate,
        signals: Signals,
    ) -> None:
        self.config = config
        self.folder = folder
        self.start = start
        self.tokenizer = tokenizer
        self.data = data
        self.epoch_samples = epoch_samples
        self.flops_per_token = flops_per_token
        self.foreseen = foreseen
        self.budget = config.limits()
        self.eval_every = Every.parse(config.eval_every, "eval_every") if data.valid else Every()
        self.save_every = Every.parse(config.save_every, "save_every")
        self.loss_below = LossBelow(config.stop_loss) if config.stop_loss is not None else None
        rules: list[Rule] = [self.budget.rule(epoch_samples), signals]
        if self.loss_below is not None:
            rules.append(self.loss_below)
        if config.kill_file is not None:
            rules.append(kill_file(config.kill_file))
        if config.stop_minutes is not None:
            rules.append(time_limit(config.stop_minutes))
        if config.stop_every is not None:
            rules.append(pause(config.stop_every))
        self.rule = any_of(*rules, agree=dist.agree)
        self.metrics: Metrics
        self.before = Progress()
        self.empty = self.dropped = 0
        self.clock = time.monotonic()
        self.saved_at = self.evaluated_at = -1
        self.peak = 0
        self.scores: Scores | None = None
        self.best = math.inf

    # --- what `run` calls ---

    def go(self, method: Method, engine: Engine, loader: Loader) -> dict[str, Any]:
        """The whole run. A failure is written to `result.json` before it is raised."""
        self.device, self.method, self.loader = engine.device, method, loader
        reset_peak(self.device)
        try:
            with explained(self.folder):
                self.metrics = Metrics.open(self.folder, self.config, self.budget, self.epoch_samples, method, engine)
                with closing(self.metrics):
                    train(self, method, engine, loader)
        except RunFailed as error:
            if dist.rank() == 0:
                last = f"the last checkpoint is that of step {self.saved_at}" if self.saved_at >= 0 else "there is no checkpoint"
                logger.warning("the run failed in step %d; %s", self.before.steps + 1, last)
            # the disk may be what failed, and other processes may be elsewhere
            with suppress(OSError):
                self._write_result("failed", str(error), self.before)
            raise
        return json.loads((self.folder / "result.json").read_text())  # type: ignore[no-any-return]

    def _prepare(self) -> None:
        if self.start is None:
            for name in ("best", "checkpoints", "final", "figures", "runs", "wandb"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in ("best.json", "metrics.jsonl", "result.json", "sample.txt"):
                (self.folder / name).unlink(missing_ok=True)
        record.write(self.folder, self.config)

    # --- what `train` calls, in its order ---

    def resume(self, engine: Engine, method: Method, loader: Loader) -> Progress:
        """Where the run begins: at a checkpoint, or at step 0 with an evaluation of the untrained model."""
        progress = Progress()
        if self.start is not None:
            progress = checkpoint.resume(self.start, engine=engine, method=method, data=loader, config=self.config, allow=method.resumable)
            self.saved_at = self.evaluated_at = progress.steps
            if self.loss_below is not None:
                extra = json.loads((self.start / "state.json").read_text())["extra"]
                self.loss_below.load_state_dict(extra.get("loss_below", {"losses": []}))
            self.best = dist.on_main(_best_until, self.folder, progress.steps)
        # not before: a resume that is refused leaves the folder as it was
        dist.on_main(self._prepare)
        self.metrics.start(progress)
        self.before = progress
        if self.start is None and self.eval_every != Every():
            self.log_scores(progress, self.evaluate(engine, method))
        return progress

    def stop(self, progress: Progress) -> Reason | None:
        """Why to end here, or None; every rank gets the same answer."""
        self.before = progress
        self.clock = time.monotonic()
        reason = self.rule(progress)
        if reason is None and (source := self.loader.before_step()) is not None:
            return Reason("data", f"every sample of {source} was read")
        return reason

    def schedule(self, progress: Progress) -> Callable[[Size], float]:
        """The learning rate as a function of the size of the step about to run."""
        return lambda size: self.config.learning_rate(progress, size, self.epoch_samples)

    def advance(self, progress: Progress, report: Report) -> Progress:
        """Progress after the step. Raises RunFailed when steps without targets or finite numbers follow one another."""
        self.empty = self.empty + 1 if report.size.targets == 0 else 0
        self.dropped = self.dropped + 1 if report.skipped and report.size.targets else 0
        patience = DROPPED_IN_A_ROW + (HALVINGS if self.config.precision == "fp16" and math.isfinite(report.loss) else 0)
        if self.empty:
            logger.warning("step %d has no position with a label; skipped", progress.steps + 1)
        if self.empty == EMPTY_IN_A_ROW:
            raise RunFailed(f"data: {EMPTY_IN_A_ROW} steps in a row had no position with a label; check the labels of --data")
        if self.dropped >= patience:
            raise RunFailed(f"nonfinite: {self.dropped} steps in a row were dropped; lower --lr or resume from an earlier checkpoint")
        seconds = time.monotonic() - self.clock
        if "hours" in self.budget.limits:
            seconds = dist.broadcast_object(seconds)
        flops = self.flops_per_token * report.size.tokens
        return progress.after(report.size, skipped=report.skipped, seconds=seconds, flops=flops)

    def log(self, progress: Progress, report: Report) -> None:
        """Collect one step; every `log_every` steps the means go to the sinks."""
        if not report.skipped:
            self.metrics.average("train/loss", report.loss, report.size.targets)
            for name, total in report.sums.items():
                self.metrics.add(name if "/" in name else f"train/{name}", total, None if total.numel() == 2 else report.size.targets)
            if self.loss_below is not None:
                self.loss_below.add(report.loss)
        if progress.steps > self.before.steps and (
            progress.steps % self.config.log_every == 0 or (progress.steps == 1 and self.config.log_first)
        ):
            values = {"optim/lr": report.lr, "optim/grad_norm": report.grad_norm, "memory/gib": peak_bytes(self.device) / 2**30}
            if len(self.loader.weights) > 1:
                values |= {f"data/weight/{source}": weight for source, weight in self.loader.weights.items()}
            self.metrics.flush(progress, {**values, **self.method.measured()})

    def eval_due(self, progress: Progress) -> bool:
        return self.eval_every.due(self.before, progress, self.budget, self.epoch_samples)

    def evaluate(self, engine: Engine, method: Method) -> Scores:
        """Held-out losses of every source."""
        micro_batch = self.config.eval_micro_batch_size or self.config.micro_batch_size
        return evaluate(engine, method, self.data.valid, micro_batch=micro_batch, tokens=self.config.held_out_tokens_used())

    def log_scores(self, progress: Progress, scores: Scores) -> None:
        self.scores, self.evaluated_at = scores, progress.steps
        self.metrics.log(progress, scores.record())

    def keep_best(self, progress: Progress, engine: Engine, method: Method) -> None:
        """Write the model to `best/` if no evaluation before had a lower mean loss; `best.json` says which step it is."""
        if not self.config.keep_best or self.scores is None or not self.scores.mean < self.best:
            return
        self.best = self.scores.mean
        export(engine, method, self.folder / "best", tokenizer=self.tokenizer, card=self._card(progress))
        dist.on_main(write_json, self.folder / "best.json", {"step": progress.steps, "loss": self.best})

    def save_due(self, progress: Progress) -> bool:
        return self.save_every.due(self.before, progress, self.budget, self.epoch_samples)

    def save(self, progress: Progress, engine: Engine, method: Method, loader: Loader) -> None:
        """A checkpoint of this step, unless there is one."""
        if self.saved_at == progress.steps:
            return
        checkpoint.save(
            self.folder,
            engine=engine,
            method=method,
            data=loader,
            progress=progress,
            keep=self.config.keep_checkpoints,
            keep_optimizer=self.config.keep_optimizer,
            extra={} if self.loss_below is None else {"loss_below": self.loss_below.state_dict()},
            write=partial(export, engine, method, tokenizer=self.tokenizer) if self.config.save_only_model else None,
            beside=method.write_beside,
        )
        self.saved_at = progress.steps

    def finish(self, progress: Progress, reason: Reason, engine: Engine, method: Method, loader: Loader) -> Progress:
        """Save; then, unless interrupted, evaluate, export, sample, draw and write `result.json`."""
        # that of training: reading the export back holds a second model
        self.peak = peak_bytes(self.device)
        self.save(progress, engine, method, loader)
        if reason.kind == "interrupted":
            self._result(reason.kind, reason.text, progress)
            raise Interrupted(f"{reason.text}: saved at step {progress.steps}; go on with --resume auto")
        if self.eval_every != Every() and self.evaluated_at != progress.steps:
            self.log_scores(progress, self.evaluate(engine, method))
            self.keep_best(progress, engine, method)
        final = export(engine, method, self.folder / "final", tokenizer=self.tokenizer, card=self._card(progress))
        if self.config.sample_prompt is not None:
            model = method.final_model(engine.model) if engine.alone else None
            dist.on_main(self._sample, model, final)
        self._result(reason.kind, reason.text, progress)
        dist.on_main(plot.plot_run, self.folder)
        return progress

    # --- how a run ends ---

    def _result(self, kind: str, text: str, progress: Progress) -> None:
        dist.on_main(self._write_result, kind, text, progress)

    def _write_result(self, kind: str, text: str, progress: Progress) -> None:
        """`result.json`, by the first process; predicted and measured peak memory side by side."""
        if dist.rank() != 0:
            return
        result = {
            "reason": {"kind": kind, "text": text},
            "progress": progress.to_dict(),
            "eval": {} if self.scores is None else self.scores.record(),
            "memory": {"predicted_peak_bytes": self.foreseen.memory.peak, "measured_peak_bytes": self.peak or peak_bytes(self.device)},
            "output_dir": str(self.folder),
        }
        write_json(self.folder / "result.json", result)

    def _sample(self, model: PreTrainedModel | None, final: Path) -> None:
        """Continue the prompt, with the exported model where this process holds only a part of the trained one."""
        assert self.config.sample_prompt is not None
        text = continue_text(model or load_model(str(final)), self.tokenizer, self.config.sample_prompt)
        (self.folder / "sample.txt").write_text(text + "\n")
        logger.info("sample: %s", text)

    def _card(self, progress: Progress) -> str:
        """README of the exported folder."""
        held_out = (
            ""
            if self.scores is None
            else f"\nHeld-out loss: {self.scores.mean:.4f} over {sum(s.targets for s in self.scores.values())} targets.\n"
        )
        return (
            f"# {self.folder.name}\n\n{type(self.config).__doc__}\n\n"
            f"Trained from `{self.config.model}` on {', '.join(f'`{source}`' for source in self.config.data)} for {progress.steps} updates "
            f"({progress.tokens} tokens).\n{held_out}\nOptions: `config.yaml` of the run; environment: `record.json`.\n"
        )
