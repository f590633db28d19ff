"""A Hugging Face checkpoint folder: what is in it, whether it can be run exactly, and loading it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from cpmpi.errors import UserError, one_line
from cpmpi.model.attention_call import ATTENTION
from cpmpi.model.forward import register
from cpmpi.model.stages import stages_of
from cpmpi.model.tensor_parallel import WHOLE, Sharing
from cpmpi.model.transformers_private import is_causal_lm, kept_in_float32, not_to_initialize
from cpmpi.model.weight_files import Stored, stored_tensors
from cpmpi.model.weight_reader import WeightReader
from cpmpi.model.weights import StreamedWeights, Weights

# Layer types of configs that mix tokens by other means than attention; the probe finds those with other names.
UNSUPPORTED_LAYERS = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "ssm", "rwkv", "short_conv")
COUNTS = re.compile(r"(num_|n_)?(\w*_)?(layers?|experts)")  # names of what makes a skeleton large
MOST = 4096  # of them: four times the largest known model
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder with a decoder-only model in safetensors.

    Raises:
        UserError: on construction, when the folder is not one that can be run exactly; before any weight is read.
    """

    folder: Path

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such checkpoint folder")
        if not self.config_file.is_file():
            raise UserError(f"{self.folder}: no config.json in this checkpoint folder")
        self._check_weights()
        self._check_architecture()

    @property
    def config_file(self) -> Path:
        """The model's description."""
        return self.folder / "config.json"

    def _check_weights(self) -> None:
        pickled = [p.name for p in sorted(self.folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth")]
        if pickled and not list(self.folder.glob("*.safetensors*")):
            raise UserError(
                f"{self.folder}: weights only as pickle ({pickled[0]}), which can run code when read; "
                "convert the checkpoint to safetensors"
            )
        if (self.folder / "adapter_config.json").exists():
            raise UserError(
                f"{self.folder}: an adapter (adapter_config.json) is not applied; merge it into the weights"
            )
        _ = self.stored

    def _check_architecture(self) -> None:
        config = self.config
        name = f"{self.folder}: {config.model_type}"
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(f"{name} is an encoder-decoder; cpmpi runs decoder-only models")
        if not is_causal_lm(config):
            raise UserError(f"{name} is not a causal language model of transformers")
        layers = self.text_config_value("num_hidden_layers")
        if isinstance(layers, int) and layers < 1:
            raise UserError(f"{name} has {layers} layers (num_hidden_layers) in its config; it takes at least 1")
        odd = [t for t in dict.fromkeys(self.text_config_value("layer_types") or ()) if t in UNSUPPORTED_LAYERS]
        if odd:
            raise UserError(f"{name} has layers of type {', '.join(odd)}; cpmpi runs layers with attention only")
        quantized = getattr(config, "quantization_config", None) or self.text_config_value("quantization_config")
        if quantized:
            method = quantized.get("quant_method", "") if isinstance(quantized, dict) else quantized.quant_method
            raise UserError(
                f"{name} has quantized weights ({getattr(method, 'value', method)}); cpmpi runs float32, bfloat16 and "
                "float16 weights: dequantize the checkpoint"
            )
        if self.text_config_value("is_causal") is False:
            raise UserError(f"{name} is not causal (is_causal is false in its config)")

    @cached_property
    def config(self) -> Any:
        """The transformers config."""
        from transformers import AutoConfig

        try:
            raw = json.loads(self.config_file.read_text())
            _check_counts(raw, self.config_file)
            if "auto_map" in raw and "AutoModelForCausalLM" in raw["auto_map"]:
                raise UserError(
                    f"{self.folder}: the model needs code from the checkpoint (auto_map), which is never run"
                )
            return AutoConfig.from_pretrained(self.config_file, local_files_only=True, trust_remote_code=False)
        except UserError:
            raise
        except Exception as error:  # of any type: each config class has its own checks
            raise UserError(f"{self.config_file}: {one_line(error)}") from error

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """The tensors of the weight files, by name."""
        return stored_tensors(self.folder)

    def text_config_value(self, name: str) -> Any:
        """A value of the config, or of its text part where it has several."""
        return getattr(self.config.get_text_config(decoder=True), name, None)

    @property
    def max_positions(self) -> int | None:
        """The longest document for which the checkpoint was made, in tokens; None where it does not say."""
        limit: int | None = self.text_config_value("max_position_embeddings")
        return limit

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.text_config_value("vocab_size"))

    def compute_dtype(self, wanted: str, device: torch.device) -> torch.dtype:
        """The type to compute in: ``wanted``, or for ``auto`` float32 on CPUs and the checkpoint's own elsewhere."""
        if wanted != "auto":
            return DTYPES[wanted]
        own = self.text_config_value("dtype") or torch.float32
        return torch.float32 if device.type == "cpu" else own

    def skeleton(self, dtype: torch.dtype, *, probed: bool = True, sharing: Sharing = WHOLE) -> torch.nn.Module:
        """The model without weights: its parameters are on the meta device, its buffers are real.

        Args:
            dtype: type to compute in.
            probed: to learn from, in the probe: experts are then computed in the way that looks least at values.
            sharing: this rank's share of the weights.

        Raises:
            UserError: transformers cannot make it with another attention than its own.
        """
        from transformers import AutoModelForCausalLM

        register()
        options = {"attn_implementation": ATTENTION, **({"experts_implementation": "eager"} if probed else {})}
        try:
            with _parameters_on_meta():
                model: torch.nn.Module = AutoModelForCausalLM.from_config(
                    deepcopy(self.config), dtype=dtype, trust_remote_code=False, **options
                )
        except Exception as error:  # of any type: some models choose their attention from a table of their own
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(
                f"{self.folder}: {self.config.model_type} cannot be made with cpmpi's attention ({reason})"
            ) from error
        _keep_in_float32(model, dtype)
        sharing.narrow(model)
        return model.eval()

    def reader(
        self, probed: Any, device: torch.device, *, sharing: Sharing = WHOLE,
        check_finite: bool = False,
    ) -> WeightReader:  # fmt: skip
        """What reads the weights; the files' headers are checked here.

        Args:
            probed: the model without weights, to learn from, with this rank's share.
            device: where to compute.
            sharing: this rank's share of the weights.
            check_finite: whether weights are searched for NaN and infinities when they are read.

        Raises:
            UserError: tensors are missing, of the wrong shape or of a type that is not read (named), or the weights
                cannot be shared (why).
        """
        model = self.skeleton(probed.config.dtype, probed=False, sharing=sharing)
        return WeightReader(
            model, self.folder, self.stored, device, stages_of(probed), sharing=sharing, check_finite=check_finite
        )

    def weights(self, reader: WeightReader, *, stream: bool) -> Weights:
        """The causal-LM model with cpmpi's attention, in evaluation mode, with its weights.

        Args:
            reader: of the weights, from `reader`.
            stream: whether weights come when they are used, and go.

        Raises:
            UserError: a file is damaged, or a tensor is not finite (named).
        """
        if stream:
            return StreamedWeights(reader)
        reader.load(reader.groups)
        return Weights(reader.model)


def _check_counts(raw: Any, file: Path) -> None:
    """Refuse a config with so many layers or experts that reading it takes minutes; in all parts of the config.

    Raises:
        UserError: naming the field and the bound.
    """
    for name, value in raw.items() if isinstance(raw, dict) else ():
        if isinstance(value, dict):
            _check_counts(value, file)
        elif isinstance(value, int | float) and value > MOST and COUNTS.fullmatch(name):
            raise UserError(f"{file}: {name} is {value:,}; at most {MOST:,} are taken for a real model")


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Make float32 what the model keeps so whatever the type of the rest, as transformers does when it loads."""
    if kept := kept_in_float32(model, dtype):
        for name, tensor in model.state_dict(keep_vars=True).items():
            if kept.search(name):
                tensor.data = tensor.data.float()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within it, modules are made without memory for their parameters."""

    def on_meta(_: torch.nn.Module, __: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter | None:
        if parameter.is_meta:  # tied ones stay one
            return None
        return not_to_initialize(torch.nn.Parameter(parameter.to("meta"), requires_grad=False))

    hook = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]  # it may return one
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Blueprint(Checkpoint):
    """A config alone: a checkpoint folder whose weights need not be there, or the config file itself."""

    def __post_init__(self) -> None:
        if not self.config_file.is_file():
            raise UserError(f"{self.folder}: neither a config file nor a folder with a config.json")
        self._check_architecture()

    @property
    def config_file(self) -> Path:
        """The model's description."""
        return self.folder / "config.json" if self.folder.is_dir() else self.folder
