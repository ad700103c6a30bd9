"""Which storage format each module of a checkpoint has, from `quantization_config` or `hf_quant_config`."""

from dataclasses import dataclass

from shardwise.sharding.config import Config
from shardwise.sharding.formats import PLAIN, Format, Linear
from shardwise.sharding.spec import TensorSpec


@dataclass(frozen=True)
class Quantization:
    """Picks the format of a module."""

    name: str = "none"
    default: Format = PLAIN

    def store(self, linear: Linear) -> tuple[TensorSpec, ...]:
        return self.default.store(linear)


def quantization_of(config: Config) -> Quantization:
    """ConfigError for a method that the planner does not know."""
    section = config.own("quantization_config")
    method = section.text("quant_method", default="none")
    if method != "none":
        raise config.error(("quantization_config.quant_method",), method, "none")
    return Quantization()
