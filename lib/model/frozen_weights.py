"""How the frozen linear layers below an adapter hold their weights: in float32, in half precision, or in 8 or 4 bits.

8 and 4 bits are those of bitsandbytes, which is imported only when they are used.
"""

import contextlib
import copy
import dataclasses
import importlib.util
import logging
import math
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lib.errors import UserError
from lib.runtime.precision import DTYPES
from lib.runtime.startup import hidden

KEY = "load_in"
"""The key in an adapter's config.json: the --load_in of its training, with which it is loaded again."""

LINEAR = (nn.Linear, Conv1D)
CPU = torch.device("cpu")
BYTES = {"4bit": 0.5, "8bit": 1.0}
PIP = "pip install 'bitsandbytes>=0.50,<0.51'"


@dataclasses.dataclass(frozen=True)
class FrozenWeights:
    """How the linear layers of a frozen backbone hold their weights; all other weights are float32."""

    load_in: str | None = None
    """--load_in."""
    dtype: torch.dtype = torch.float32
    """Where they are not quantized."""
    device: torch.device = CPU
    """Where they are quantized, one after the other."""

    @property
    def bytes(self) -> float:
        """Bytes that a weight takes."""
        return BYTES.get(self.load_in or "", self.dtype.itemsize)

    @contextlib.contextmanager
    def loading(self, prefix: str, spared: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Within, `from_pretrained` with these further arguments holds the linear layers of the backbone `prefix` so.

        `spared` are layers of the backbone that are trained. Quantized are blocks of 64 weights to nf4, whose scales are
        quantized again (Dettmers et al. 2023, arXiv:2305.14314), or rows to int8 (Dettmers et al. 2022, arXiv:2208.07339).
        """
        if self.load_in:
            from transformers import BitsAndBytesConfig

            settings = BitsAndBytesConfig(
                load_in_4bit=self.load_in == "4bit",
                load_in_8bit=self.load_in == "8bit",
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                # Patterns: whatever is not below the backbone, and what is trained in it.
                llm_int8_skip_modules=[rf"(?!{re.escape(prefix)}\.).*", *map(re.escape, spared)],
            )
            yield {"quantization_config": settings, "device_map": {"": self.device}}
            return

        def hold(parent: nn.Module, name: str, child: nn.Module | None) -> None:
            """The backbone is built on the meta device when it becomes a part of the classifier: no weight is read yet."""
            if child is None or not isinstance(parent, PreTrainedModel) or name != parent.base_model_prefix:
                return
            for path, layer in child.named_modules(prefix=name):
                if type(layer) in LINEAR and path not in spared:
                    for parameter in layer.parameters(recurse=False):
                        parameter.data = parameter.data.to(self.dtype)

        handle = register_module_module_registration_hook(hold) if self.dtype != torch.float32 else None
        try:
            yield {}
        finally:
            if handle is not None:
                handle.remove()


FLOAT32 = FrozenWeights()


def frozen_weights(
    load_in: str | None, mixed_precision: str, device: torch.device, weight_norms: bool = False
) -> FrozenWeights:
    """As --load_in asks, else in the dtype in which autocast computes; float32 if the adapter reads `weight_norms`.

    Raises UserError if bitsandbytes is asked for and is not installed.
    """
    if load_in:
        check_package(f"--load_in {load_in}")
        import_bitsandbytes()
    return FrozenWeights(load_in, torch.float32 if weight_norms else DTYPES.get(mixed_precision, torch.float32), device)


def check_package(reason: str) -> None:
    """Raise UserError with the command that installs bitsandbytes, where it is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{reason} needs the package bitsandbytes, which is not installed; run: {PIP}")


def import_bitsandbytes() -> None:
    """Import it without its search for kernels on the Hub, of which it would complain: they are not used here."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with hidden("kernels"):
        importlib.import_module("bitsandbytes")


def load_frozen(
    held: FrozenWeights, kind: Any, folder: str, config: Any, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """What `from_pretrained` of an Auto class returns with `output_loading_info`; weights that the files lack are float32.

    They are known when the rest is loaded, which is done again then, with the same random numbers. A head that is quantized
    in the files is float32, too. Raises UserError where nothing is quantized that was to be, and for code in the model's
    repository, of which the backbone to quantize is not known.
    """
    model_class = kind._model_mapping.get(type(config), None)
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    if held.load_in and model_class is None:
        raise UserError(f"--load_in {held.load_in} works with the architectures of transformers, not with remote code")
    prefix = getattr(model_class, "base_model_prefix", "")
    if prefix and kind is not AutoModel:
        skip_head(config, folder, prefix)
    spared: list[str] = []
    cuda = held.device.type == "cuda"
    while True:
        random = torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None
        with held.loading(prefix, spared) as more:
            model, info = kind.from_pretrained(folder, config=config, **settings, **more, output_loading_info=True)
        new = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
        layers = {name: model.get_submodule(name) for name in {name.rpartition(".")[0] for name in new}}
        new = [name for name, part in layers.items() if (is_quantized(part) or is_half(part)) and name not in spared]
        if not new:
            break
        spared += sorted(new)
        torch.set_rng_state(random[0])
        if random[1] is not None:
            torch.cuda.set_rng_state(random[1])
        del model
    if held.load_in:
        if not any(map(is_quantized, model.modules())):
            raise UserError(
                f"--load_in {held.load_in} has no effect: {model.config.model_type} has no linear layers that can be quantized; "
                "leave it out"
            )
        del model.config.quantization_config  # of the checkpoint it is not
    if model.base_model is not model:
        for name, layer in list(model.named_modules()):
            if is_quantized(layer) and not name.startswith(f"{model.base_model_prefix}."):
                model.set_submodule(name, plain_linear(layer))
    compute_as_others(model)
    return model, info


def skip_head(config: Any, folder: str, prefix: str) -> None:
    """Have layers outside the backbone quantized only where the files of a checkpoint that is quantized already hold them so.

    Those of a language model name its own head, and lack that of a classifier.
    """
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict) and settings.get("quant_method", "bitsandbytes") == "bitsandbytes":
        names = [
            name
            for file in Path(folder).glob("*.safetensors")
            for name in safe_open(file, framework="pt").keys()  # noqa: SIM118 - not a dict
        ]
        scaled = [name.removesuffix(end) for end in (".SCB", ".weight.absmax") for name in names if name.endswith(end)]
        outside = "|".join(re.escape(name) for name in scaled if not name.startswith(f"{prefix}."))
        known, more = settings.get("llm_int8_skip_modules") or (), rf"(?!{re.escape(prefix)}\.|(?:{outside})$).*"
        config.quantization_config = settings | {"llm_int8_skip_modules": list(dict.fromkeys([*known, more]))}


def plain_linear(layer: Any) -> nn.Linear:
    """A float32 linear layer with the restored weights of a quantized one."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight, plain.bias = nn.Parameter(restore(layer, torch.float32)), layer.bias
    return plain


def is_quantized(layer: nn.Module) -> bool:
    """Whether bitsandbytes made the layer; those of peft around it have the same names."""
    return type(layer).__name__ in ("Linear4bit", "Linear8bitLt") and hasattr(layer, "source_cls")


def is_half(layer: nn.Module) -> bool:
    return type(layer) in LINEAR and layer.weight.dtype in DTYPES.values()


def compute_as_others(model: nn.Module) -> None:
    """Have quantized layers compute in the dtype of autocast, as other linear layers do, in training and in evaluation.

    By itself bitsandbytes computes in one dtype whatever its input, quantizes that too with 8 bits, with other numbers for
    other texts in the batch, and rearranges the weights in the first evaluation on a CPU.
    """
    for layer in model.modules():
        if is_quantized(layer):
            layer.forward = types.MethodType(compute, layer)


def compute(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The output of a quantized layer: of the restored weights, which are dropped again."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    output: torch.Tensor = Restored.apply(hidden.to(dtype), layer, bias)
    return output


class Restored(torch.autograd.Function):
    """A linear layer with frozen quantized weights, which are restored anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, layer: Any, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.layer = layer
        return nn.functional.linear(hidden, restore(layer, hidden.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ restore(ctx.layer, gradient.dtype), None, None


def hold_as_4bit(layers: Sequence[Any]) -> None:
    """Treat frozen linear `layers` that have no data as --load_in 4bit would: few bytes, of which weights are restored."""
    for layer in layers:
        if not layer.weight.requires_grad:
            outputs, inputs = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape
            size = outputs * inputs // 2 + outputs * inputs // 64  # with a scale of one byte for each block
            held = torch.empty(size, dtype=torch.uint8, device=layer.weight.device)
            layer.weight, layer.restored = nn.Parameter(held, requires_grad=False), (outputs, inputs)
            layer.forward = types.MethodType(compute, layer)


def restore(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """(outputs, inputs): the weights of a quantized layer."""
    weight = layer.weight
    if type(layer) in LINEAR:  # see hold_as_4bit
        return torch.empty(layer.restored, dtype=dtype, device=weight.device)
    from bitsandbytes import functional

    if type(layer).__name__ == "Linear8bitLt":
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return functional.int8_vectorwise_dequant(weight.data, scales).to(dtype)
    state = copy.copy(weight.quant_state or layer.quant_state)
    shape, count = state.shape, math.prod(state.shape)
    # On a CPU it takes each row for whole blocks, which rows of another width than 64, 128, ... are not.
    whole = count % state.blocksize == 0
    state.shape = torch.Size([count // state.blocksize, state.blocksize] if whole else [count])
    state.dtype = dtype  # rounds as a cast of the float32 weights would
    return functional.dequantize_4bit(weight.data, state).reshape(shape)


@contextlib.contextmanager
def seeming_float32(model: nn.Module) -> Iterator[None]:
    """Within, weights in half precision seem to be float32, and are zeros that take no memory.

    peft gives new weights the dtype of the layer that they adapt, so that it would round them.
    """
    held = [(parameter, parameter.data) for parameter in model.parameters() if parameter.dtype in DTYPES.values()]
    for parameter, data in held:
        parameter.data = torch.zeros((), device=data.device).expand(data.shape)
    try:
        yield
    finally:
        for parameter, data in held:
            parameter.data = data


@contextlib.contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Within, linear layers that hold half precision compute in float32, with a copy of their weights for that time."""
    held: dict[nn.Module, dict[str, Any]] = {}

    def widen(layer: nn.Module, _: Any) -> None:
        held[layer] = dict(layer._parameters)
        layer._parameters.update({name: p if p is None else nn.Parameter(p.float()) for name, p in held[layer].items()})

    def narrow(layer: nn.Module, *_: Any) -> None:
        layer._parameters.update(held.pop(layer, {}))

    layers = [layer for layer in model.modules() if is_half(layer)]
    handles = [layer.register_forward_pre_hook(widen) for layer in layers]
    handles += [layer.register_forward_hook(narrow) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in list(held):  # an error ended its forward
            narrow(layer)
