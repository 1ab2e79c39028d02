"""What reading and writing cost by the length of the context: seconds and bytes of keys and values, beside full attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from beacon.attach import attach_beacon, set_beacon
from beacon.eval.folder import EvalFolder
from beacon.io import model_folder
from beacon.modeling.causal_lm import BeaconMixin
from beacon.options import CostConfig, settings
from beacon.sizes import PRESETS
from lm_core import dist
from lm_core.models import load_model

MEASURES = {"prefill_seconds": "seconds to read it", "decode_seconds": "seconds for one more token", "kv_bytes": "MiB of keys and values"}


def run(config: CostConfig) -> dict[str, Any]:
    """Each length read by each ratio and by the base, and a few tokens written behind it. What the tokens say plays no part."""
    device = dist.init(config.device)
    model: Any = load_model(model_folder(config.model), presets=PRESETS, seed=config.seed)
    if isinstance(model, BeaconMixin):
        set_beacon(model, settings(config, model.beacon))
    else:
        model = attach_beacon(model, settings(config, None))
    model.to(device).eval()
    folder = EvalFolder(config.output_dir, config, config.overwrite)
    ratios = sorted(set(model.beacon.usable()))
    # a text that needs more positions than there are costs the same
    model.config.beacon = model.beacon.changed({"on_capacity": "warn"}).to_dict()
    readers: dict[str, int | None] = {f"ratio {ratio}": ratio for ratio in ratios} | dict.fromkeys(config.baseline)
    print(f"{'tokens':>9}  {'reader':<10}{'prefill s':>11}{'tokens/s':>11}{'decode ms':>11}{'KV MiB':>10}")
    for number, (length, who) in enumerate((length, who) for length in config.lengths for who in readers):
        if number not in folder.items:
            generator = torch.Generator().manual_seed(config.seed)
            ids = torch.randint(0, model.config.vocab_size, (1, length + config.tokens + 1), generator=generator).to(device)
            folder.add({"item": number, "length": length, "reader": who, **measured(model, ids, readers[who], config)})
        item = folder.items[number]
        print(
            f"{length:>9,}  {who:<10}{item['prefill_seconds']:>11.3f}{length / item['prefill_seconds']:>11.0f}"
            f"{1000 * item['decode_seconds']:>11.2f}{item['kv_bytes'] / 2**20:>10.2f}"
        )
    result = {
        who: {name: {str(item["length"]): item[name] for item in folder.items.values() if item["reader"] == who} for name in MEASURES}
        for who in readers
    }
    folder.finish(result, ["item", "length", "reader", *MEASURES])
    if config.output_dir is not None:
        draw(result, config.output_dir / "figures" / "cost.png")
    return result


@torch.no_grad()
def measured(model: Any, ids: torch.Tensor, ratio: int | None, config: CostConfig) -> dict[str, float]:
    """Medians of the device's seconds (on a CPU: of this process); no ratio means the base with full attention."""
    clock = _clock(ids.device)

    def read(piece: torch.Tensor, cache: Any) -> Any:
        if ratio is not None:
            return model(piece, past_key_values=cache, ratios=[ratio], logits_to_keep=1).past_key_values
        with model.beacon_disabled():
            return model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    context, *more = ids.split([ids.shape[1] - config.tokens - 1, *[1] * (config.tokens + 1)], dim=1)
    seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
    kv_bytes = 0
    for _ in range(config.repeats):
        cache = None
        for piece in (context, *more):
            began = clock()
            after = read(piece, cache)
            seconds["prefill" if cache is None else "decode"].append(clock() - began)
            if cache is None:
                kv_bytes = after.nbytes if ratio is not None else sum(layer.keys.nbytes + layer.values.nbytes for layer in after.layers)
            cache = after
    return {**{f"{name}_seconds": statistics.median(taken) for name, taken in seconds.items()}, "kv_bytes": kv_bytes}


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type != "cuda":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def draw(result: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Each cost over the length of the context, one line per reader."""
    from lm_core.plot import COLOURS, MARKERS, drawing

    with drawing(path, width=12.0) as figure:
        for axes, (name, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items()):
            for number, (who, costs) in enumerate(result.items()):
                values = [value / (2**20 if name == "kv_bytes" else 1) for value in costs[name].values()]
                marks = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
                axes.plot([int(length) for length in costs[name]], values, label="full attention" if who == "full" else who, **marks)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("tokens of context")
            axes.set_title(label)
            axes.grid(alpha=0.3)
        axes.legend(frameon=False)
