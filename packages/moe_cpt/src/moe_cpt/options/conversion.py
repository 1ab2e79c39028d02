"""Options of the commands that make a mixture, and of those that turn it into something else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from lm_core.config import Count, config, opt
from lm_core.errors import ConfigError

GateNetwork = Literal["mlp", "linear"]
GateType = Literal[
    "TopKBalancedNoisyGate", "SwitchBalancedGate", "UniformPlainGate", "UniformLearnableGate", "RandomPlainGate", "RandomLearnableGate"
]
CalculatorType = Literal["UniversalCalculator", "UniformCalculator", "SwitchDropTokenCalculator"]
GATE_TYPE = "Which experts see a token: the best K with noise in training, the best one by probability, all of them, or K at random."
CALCULATOR_TYPE = (
    "Experts take all tokens sent to them; Uniform needs all experts selected; SwitchDropToken refuses those beyond a capacity."
)
SAVE_PATH = "Folder to write; an existing one needs --overwrite."


@config
class TrainGateConfig:
    """Routers that are trained to find the experts whose neurons are most active."""

    model_path: str = opt(help="Dense model: a folder, a .gguf file, smollm2-135m or a hub id.")
    split_file_path: Path = opt(help="Split of that model, as written by moe-cpt split.")
    hidden_features_path: Path = opt(help="Folder written by moe-cpt features --what inputs --what act.")
    save_path: Path = opt(help="File to write, for example gate.safetensors.", flags=("-o",))
    gate_network: GateNetwork = opt("mlp", "Shape of the router.", flags=("--gate_network_type",))
    num_selects: int = opt(4, "Experts whose choice is compared on held-out tokens.", ge=1)
    select_criterion: Literal["plain", "positive", "l1_norm", "l2_norm"] = opt(
        "l2_norm", "How active an expert is: the sum of its hidden values, of their positive parts, or their norm."
    )
    epochs: int = opt(100, "Passes over the tokens.", ge=1)
    lr: float = opt(0.1, "Learning rate of the first step; it falls to zero.", gt=0)
    batch_size: int = opt(1024, "Tokens per step.", ge=1)
    train_percent: float = opt(0.95, "Share of the tokens to train on; the others are held out.", gt=0, lt=1)
    seed: int = opt(1227, "Address of all randomness.", ge=0)
    overwrite: bool = opt(False, "Replace what is at --save-path.")


@config
class ConvertConfig:
    """Write the mixture of experts of a dense model and a split."""

    model_path: str = opt(help="Dense model: a folder, a .gguf file, smollm2-135m or a hub id.")
    split_file_path: Path = opt(help="Split of that model, as written by moe-cpt split, or a folder of lists of the original code.")
    save_path: Path = opt(help=SAVE_PATH, flags=("-o",))
    num_selects: int = opt(4, "Experts that see a token.", ge=1)
    score_scale_factor_file_path: Path | None = opt(None, "JSON list with one factor per layer, as written by moe-cpt calibrate-scale.")
    score_scale_factor: float | None = opt(
        None,
        "Factor of the routed experts' output; default: experts over selected experts.",
        gt=0,
        flags=("--moe_calculator_score_scale_factor",),
    )
    gate_network: GateNetwork = opt("mlp", "Shape of the router.", flags=("--gate_network_type",))
    gate_init: Literal["normal", "zeros", "centroid", "ridge", "trained"] = opt(
        "normal",
        "Initial router: random, zero (needs training with noise before it routes), the experts' mean gate rows, a fit to their output on a "
        "text, or that of --select_file_path.",
    )
    select_file_path: Path | None = opt(None, "With --gate_init trained: file written by moe-cpt train-gate.")
    calibration_data: list[str] = opt(help="Text for --gate-init ridge, written like --data of train.", factory=list)
    calibration_tokens: Count = opt(65536, "Tokens for --gate-init ridge.", ge=1)
    text_column: str = opt("text", "Column or key that holds the text.")
    gate_type: GateType = opt("TopKBalancedNoisyGate", GATE_TYPE)
    calculator_type: CalculatorType = opt("UniversalCalculator", CALCULATOR_TYPE)
    moe_layers: str = opt("all", "Layers to convert: all, a comma list such as 2,3,4, or -A-B for all but the first A and the last B.")
    add_noise: bool = opt(True, "Learn the spread of routing noise, used in training.")
    add_weight_norm: bool = opt(False, "Learn the factor of the routed experts' output, one number per layer.")
    use_softmax: bool = opt(True, "Scores are a softmax over the selected logits, not the logits.")
    multiply_gate_scores: bool = opt(True, "Multiply expert outputs by their scores; without it every selected expert has weight 1.")
    dtype: Literal["source", "float32", "bfloat16", "float16"] = opt("source", "Type of the weights that are written.")
    format: Literal["llama_moe", "mixtral", "granitemoeshared"] = opt(
        "llama_moe", "A mixture to train here, or one that stock transformers load: mixtral, or granitemoeshared where experts are shared."
    )
    seed: int = opt(1227, "Address of all randomness.", ge=0)
    overwrite: bool = opt(False, "Replace what is at --save-path.")

    def check(self) -> None:
        if self.score_scale_factor is not None and self.score_scale_factor_file_path is not None:
            raise ConfigError(f"score_scale_factor: {self.score_scale_factor} and a file of factors are both given; drop one of them")
        if (self.gate_init == "trained") != (self.select_file_path is not None):
            raise ConfigError(f"select_file_path: {self.select_file_path} does not go with --gate_init {self.gate_init}; trained needs one")
        if self.format != "llama_moe" and self.gate_network != "linear":
            raise ConfigError(f"format: {self.format} has a linear router; add --gate_network linear")
        self.chosen_layers()

    def chosen_layers(self) -> str | list[int] | dict[str, int]:
        """`moe_layers` as the mixture's config has it."""
        text = self.moe_layers.strip()
        if text == "all":
            return text
        if match := re.fullmatch(r"-(\d{1,9})-(\d{1,9})", text):
            return {"skip_first": int(match[1]), "skip_last": int(match[2])}
        if not re.fullmatch(r"\d{1,9}(\s*,\s*\d{1,9})*", text):
            raise ConfigError(f"moe_layers: {self.moe_layers!r} is not all, a comma list of layers, or -A-B; write for example 2,3,4")
        return [int(part) for part in text.split(",")]


@config
class ScaleConfig:
    """Measure score scale factors on the inputs that the dense model's feed-forward layers see."""

    model_path: str = opt(help="Mixture written by moe-cpt convert.")
    dense_path: str = opt(help="Dense model it was made from: a folder, a .gguf file, smollm2-135m or a hub id.")
    data: list[str] = opt(help="Text to calibrate on, written like --data of train.", min_length=1)
    text_column: str = opt("text", "Column or key that holds the text.")
    mode: Literal["ratio", "lsq", "rms", "unbiased"] = opt(
        "ratio", "N / K; or with the layer's output u at factor 1 and the dense f: <u,f>/<u,u>, |f|/|u|, or <f,f>/<u,f>."
    )
    layerwise: bool = opt(False, "One factor per layer instead of one for all.")
    max_tokens: Count = opt(65536, "Tokens to calibrate on.", ge=1)
    max_length: int = opt(512, "Tokens per sample.", ge=2, flags=("--block_size",))
    save_path: Path = opt(help="JSON file to write: a list with one factor per layer.", flags=("-o",))
    overwrite: bool = opt(False, "Replace what is at --save-path.")


@config
class ExportConfig:
    """A mixture as a folder that stock transformers load."""

    model: str = opt(help="Mixture written by moe-cpt convert or train.")
    save_path: Path = opt(help=SAVE_PATH, flags=("-o",))
    format: Literal["llama_moe", "mixtral", "granitemoeshared", "llama"] = opt(
        help="llama_moe brings its own code; mixtral and granitemoeshared need a linear router, the second one shared experts; llama is the dense model."
    )
    peft_path: Path | None = opt(None, "Adapter of a run with --mode lora, to be merged into --model first.")
    keep_noise: bool = opt(False, "With llama_moe: keep the weights of routing noise.")
    overwrite: bool = opt(False, "Replace what is at --save-path.")

    def check(self) -> None:
        if self.keep_noise and self.format != "llama_moe":
            raise ConfigError(f"keep_noise: {self.format} has no place for noise; use --format llama_moe, or leave it out")


@config
class LegacyConfig:
    """A checkpoint of the original LLaMA-MoE code in this package's layout."""

    model: str = opt(help="Folder of the checkpoint.")
    save_path: Path = opt(help=SAVE_PATH, flags=("-o",))
    overwrite: bool = opt(False, "Replace what is at --save-path.")
