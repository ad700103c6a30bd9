"""Which storage format each module of a checkpoint has, from `quantization_config` or `hf_quant_config`."""

import fnmatch
import re
from dataclasses import dataclass, field
from functools import cached_property

from shardwise.sharding.config import Config, ConfigError
from shardwise.sharding.formats import (
    MXFP4_COMPRESSED,
    MXFP8,
    NVFP4,
    NVFP4_COMPRESSED,
    NVFP4_WEIGHT_ONLY,
    PLAIN,
    Awq,
    Format,
    Fp8,
    Gptq,
    Linear,
    Mxfp4Blocks,
    PackedInt,
)
from shardwise.sharding.tensors import TensorSpec

_LAYER = re.compile(r"\.\d+(\.|\*|$)")
_DIGIT = re.compile(r"\d")
_MODELOPT = {
    "FP8": Fp8(static_input=True),
    "NVFP4": NVFP4,
    "W4A16_NVFP4": NVFP4_WEIGHT_ONLY,
    "MXFP8": MXFP8,
    "FP8_PB_WO": Fp8(block=(128, 128)),
    "FP8_PER_CHANNEL_PER_TOKEN": Fp8(channel=True),
}


class NamePatterns:
    """A list of module names, prefixes, globs (`*`) and `re:` expressions, as published configs write them."""

    def __init__(self, patterns: list[str] | tuple[str, ...]):
        self.patterns = tuple(patterns)
        plain = [p for p in self.patterns if not p.startswith("re:") and "*" not in p and "?" not in p]
        self._exact = frozenset(plain)
        starts = [p[:-1] for p in self.patterns if p.endswith("*") and "*" not in p[:-1] and not p.startswith("re:")]
        self._starts = (*(f"{p}." for p in plain), *starts)
        globs = [p for p in self.patterns if "*" in p and not p.startswith("re:") and p[:-1] not in starts]
        expressions = [f"(?:{p[3:]})" for p in self.patterns if p.startswith("re:")]
        # A glob of a module covers what is below it.
        expressions += [f"(?:{fnmatch.translate(p)}|{fnmatch.translate(p + '.*')})" for p in globs]
        self._expression = re.compile("|".join(expressions)) if expressions else None

    @cached_property
    def by_layer(self) -> bool:
        """Whether some pattern names the number of a layer; any digit of an expression may be part of one."""
        return any((_DIGIT if p.startswith("re:") else _LAYER).search(p) for p in self.patterns)

    def match(self, module: str) -> bool:
        """A listed name, something below it, or a name that ends in a listed component."""
        if module in self._exact or module.startswith(self._starts):
            return True
        if any(part in self._exact for part in module.split(".")):
            return True
        return self._expression is not None and self._expression.match(module) is not None


@dataclass(frozen=True)
class Quantization:
    """Picks the format of a module by its name. The head is stored plainly unless it is named."""

    name: str = "none"
    default: Format = PLAIN
    ignored: NamePatterns = field(default_factory=lambda: NamePatterns(()))
    chosen: tuple[tuple[NamePatterns, Format], ...] = ()
    """First match wins, before `ignored` and `default`."""
    head: bool = False

    @cached_property
    def by_layer(self) -> bool:
        """Whether layers that look alike may be stored differently."""
        return self.ignored.by_layer or any(patterns.by_layer for patterns, _ in self.chosen)

    def store(self, linear: Linear, layer: int | None) -> tuple[TensorSpec, ...]:
        """The tensors of a weight in this checkpoint; its name's numbers are `layer` and the first expert."""
        return self.format_of(linear, layer).store(linear)

    def format_of(self, linear: Linear, layer: int | None) -> Format:
        if self.default is PLAIN and not self.chosen:
            return PLAIN
        module = linear.name.replace("{layer}", str(layer)).replace("{expert}", "0")
        for patterns, chosen in self.chosen:
            if patterns.match(module):
                return chosen
        if self.ignored.match(module) or (linear.role == "head" and not self.head):
            return PLAIN
        return self.default


def quantization_of(config: Config) -> Quantization:
    """How the checkpoint stores its weights. ConfigError for a method that the planner does not know, or bad names."""
    try:
        return _quantization_of(config)
    except re.error as error:
        raise ConfigError(f"{config.source}: module names {error.pattern!r} are not a regular expression") from None


def _quantization_of(config: Config) -> Quantization:
    first = config.has("compression_config") and not config.has("quantization_config")  # compressed-tensors' first name
    section = config.own("compression_config" if first else "quantization_config")
    modelopt = config.own("hf_quant_config").own("quantization")
    method = section.text("quant_method", default="").lower()
    algorithm = modelopt.text("quant_algo", default="") or section.text("quant_algo", default="")
    if algorithm or method == "modelopt":
        return _modelopt(modelopt if modelopt.data else section, section, algorithm or None)
    if not section.data:
        return Quantization()
    readers = {
        "fp8": _fp8,
        "fbgemm_fp8": _fbgemm,
        "mxfp4": _mxfp4,
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed,
    }
    if method not in readers:
        legal = " or ".join(sorted([*readers, "modelopt"]))
        raise config.error(("quantization_config.quant_method",), method or None, legal)
    return readers[method](section)


def _fp8(c: Config) -> Quantization:
    block = c.list("weight_block_size", default=None, length=None, of=int)
    static = c.text("activation_scheme", default="dynamic") == "static"
    ignored = NamePatterns(c.list("modules_to_not_convert", "ignored_layers", default=[], of=str))
    if block is None:
        return Quantization("fp8", Fp8(static_input=static), ignored)
    rows, columns = _pair(c, "weight_block_size", block)
    form = Fp8(block=(rows, columns), scale="weight_scale_inv", static_input=static)
    return Quantization(f"fp8 {rows}x{columns}", form, ignored)


def _pair(c: Config, name: str, block: list[int] | None) -> tuple[int, int]:
    if block is None or len(block) != 2 or min(block) < 1:
        raise c.error((f"quantization_config.{name}",), block, "two positive integers")
    return block[0], block[1]


def _fbgemm(c: Config) -> Quantization:
    ignored = NamePatterns(c.list("modules_to_not_convert", default=[], of=str))
    form = Fp8(channel=True, static_input=True, input_scale="input_scale_ub", one_element=True)
    return Quantization("fp8 per channel", form, ignored)


def _mxfp4(c: Config) -> Quantization:
    ignored = NamePatterns(c.list("modules_to_not_convert", default=[], of=str))
    return Quantization("mxfp4", Mxfp4Blocks(), ignored)


def _gptq(c: Config) -> Quantization:
    """GPTQ, with GPTQModel's `dynamic` rules: expressions of module names, after `-:` those that stay as they were."""
    _expect(c, "checkpoint_format", c.text("checkpoint_format", default="gptq"), "gptq", "gptq_v2")
    if c.flag("is_marlin_format"):
        raise c.error(("quantization_config.is_marlin_format",), True, "false")
    default, head = _gptq_format(c, c), c.flag("lm_head")
    rules = c.own("dynamic")
    chosen = [] if head else [(NamePatterns(("lm_head",)), PLAIN)]
    for rule in rules.data:
        form = PLAIN if rule.startswith("-:") else _gptq_format(rules.own(rule), c)
        chosen.append((NamePatterns((f"re:{rule.removeprefix('-:').removeprefix('+:')}",)), form))
    return Quantization(f"gptq {default.bits} bit", default, chosen=tuple(chosen) if rules.data else (), head=head)


def _gptq_format(rule: Config, c: Config) -> Gptq:
    """What a rule says, and the whole checkpoint's section where it says nothing."""
    own = Config(rule.data, c.source, c)
    bits, group = own.integer("bits", most=8), _group_size(own, "group_size")
    _whole_words(c, bits)
    first = c.text("checkpoint_format", default="gptq").lower() == "gptq"
    return Gptq(bits, group, own.flag("desc_act"), first)


def _expect(c: Config, name: str, value: str, *legal: str) -> None:
    if value.lower() not in legal:
        raise c.error((f"quantization_config.{name}",), value, " or ".join(legal))


def _awq(c: Config) -> Quantization:
    bits, group = c.integer("bits", "w_bit", most=8), _group_size(c, "group_size", "q_group_size")
    if bits != 4:
        raise c.error(("quantization_config.bits",), bits, "4")
    _expect(c, "version", c.text("version", default="gemm"), "gemm")
    ignored = NamePatterns(c.list("modules_to_not_convert", default=[], of=str))
    return Quantization("awq 4 bit", Awq(group), ignored)


def _group_size(c: Config, *names: str) -> int:
    """Inputs that share a scale; -1: all of a row."""
    size = c.integer(*names, least=-1)
    if size == 0:
        raise c.error(names, size, "a number of inputs, or -1 for whole rows")
    return size


def _whole_words(c: Config, bits: int) -> None:
    if 32 % bits:
        raise c.error(("quantization_config.bits",), bits, "2, 4 or 8")


def _compressed(c: Config) -> Quantization:
    """compressed-tensors: one format a group of targets."""
    ignored = NamePatterns(c.list("ignore", default=[], of=str))
    _expect(c, "sparsity_config.format", c.own("sparsity_config").text("format", default="dense"), "dense")
    groups = c.own("config_groups")
    if not groups.data:
        raise c.error(("quantization_config.config_groups",), groups.data, "at least one group")
    chosen: list[tuple[NamePatterns, Format]] = []
    default, names = PLAIN, []
    for key in groups.data:
        group = groups.own(key)
        form, name = _compressed_format(group, group.text("format", default="") or c.text("format", default=""))
        names.append(name)
        targets = [t for t in group.list("targets", default=["Linear"], of=str) if t != "Linear"]
        if targets:
            chosen.append((NamePatterns(targets), form))
        else:
            default = form
    return Quantization(" + ".join(dict.fromkeys(names)), default, ignored, tuple(chosen))


def _compressed_format(group: Config, form: str) -> tuple[Format, str]:
    weights = group.own("weights")
    bits, kind = weights.integer("num_bits", default=8, most=8), weights.text("type", default="float")
    if form == "nvfp4-pack-quantized":
        return NVFP4_COMPRESSED, "nvfp4"
    if form == "mxfp4-pack-quantized":
        return MXFP4_COMPRESSED, "mxfp4"
    strategy = weights.text("strategy", default="tensor")
    if form == "pack-quantized":
        if 32 % bits:
            raise weights.error(("quantization_config.num_bits",), bits, "2, 4 or 8 for packed weights")
        size = _group_size(weights, "group_size") if weights.has("group_size") else -1
        ordered = weights.raw("actorder") not in (None, False, "weight", "static")
        packed = PackedInt(bits, size, bool(weights.flag("symmetric", default=True)), ordered)
        return packed, f"int{bits} group {size}"
    if bits != 8:
        raise weights.error(("quantization_config.format",), form, "a packed format for weights below 8 bits")
    static = group.own("input_activations").raw("dynamic") is False
    dtype = "F8_E4M3" if kind == "float" else "I8"
    scale_dtype = "BF16"
    if strategy == "block":
        rows, columns = _pair(weights, "block_structure", weights.list("block_structure", default=None, of=int))
        return Fp8(block=(rows, columns), scale_dtype=scale_dtype, dtype=dtype), f"fp8 {rows}x{columns}"
    if strategy not in ("tensor", "channel"):
        raise weights.error(("quantization_config.strategy",), strategy, "tensor, channel or block")
    channel = strategy == "channel"
    name = f"{'fp8' if kind == 'float' else 'int8'} per {'channel' if channel else 'tensor'}"
    symmetric = bool(weights.flag("symmetric", default=True)) or kind == "float"
    stored = Fp8(
        channel=channel,
        static_input=static,
        scale_dtype=scale_dtype,
        one_element=True,
        dtype=dtype,
        symmetric=symmetric,
    )
    return stored, name


def _modelopt(c: Config, section: Config, algorithm: str | None) -> Quantization:
    """NVIDIA ModelOpt: one algorithm with excluded modules, or a table of modules."""
    excluded = c.list("exclude_modules", "ignore", default=section.list("ignore", default=[], of=str), of=str)
    if algorithm != "MIXED_PRECISION":
        if algorithm not in _MODELOPT:
            raise c.error(("quant_algo",), algorithm, " or ".join([*_MODELOPT, "MIXED_PRECISION"]))
        return Quantization(algorithm.lower(), _MODELOPT[algorithm], NamePatterns(excluded))
    by_format: dict[str, list[str]] = {}
    table = c.own("quantized_layers")
    for module in table.data:
        algo = table.own(module).text("quant_algo")
        if algo not in _MODELOPT:
            raise c.error((f"quantized_layers.{module}.quant_algo",), algo, " or ".join(_MODELOPT))
        by_format.setdefault(algo, []).append(module)
    chosen = tuple((NamePatterns(modules), _MODELOPT[algo]) for algo, modules in by_format.items())
    return Quantization(" + ".join(a.lower() for a in by_format) or "mixed", PLAIN, NamePatterns(excluded), chosen)
