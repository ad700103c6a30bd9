"""From what a user names to a ModelSpec: a config (`-`: standard input), a folder with headers, a GGUF file, a name."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwise.sharding.config import Config, ConfigError, read_config
from shardwise.sharding.families import ARCHITECTURES, UnknownArchitecture, build
from shardwise.sharding.model import ModelSpec


def load_model(model: Mapping[str, Any] | str | Path, styles: Mapping[str, str] | None = None) -> ModelSpec:
    """The model as its config describes it; where there are tensors beside the config, bound to their headers.

    `styles`: a tp_plan for an architecture that no family describes; ValueError where one does.
    """
    spec = _load(model, styles)
    if styles is not None and spec.architecture in ARCHITECTURES:
        raise ValueError(
            f"{spec.architecture} is described by a family: a tp_plan serves only architectures that are not"
        )
    return spec


def _load(model: Mapping[str, Any] | str | Path, styles: Mapping[str, str] | None) -> ModelSpec:
    if isinstance(model, Mapping):
        meta = model.get("_meta")
        name = meta.get("name") if isinstance(meta, Mapping) else model.get("_name_or_path")
        return build(Config(model, "config"), str(name or "config"))
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"model is {model!r}: give a path, a name, or a config as a dict")
    if model == "-" and sys.stdin is None:
        raise ConfigError("- is standard input, which is closed: pipe a config.json into it, or name the file")
    path = Path("/dev/stdin" if model == "-" else model).expanduser()
    if model == "-" or path.is_fifo() or path.is_file() and path.suffix == ".json":
        config = _with_quantization(read_config(path), path.parent)
        return build(Config(config, str(path)), path.parent.resolve().name if path.stem == "config" else path.stem)
    return _from_checkpoint(model, styles)


def _from_checkpoint(model: str | Path, styles: Mapping[str, str] | None) -> ModelSpec:
    from shardwise.sharding.checkpoint.resolve import open_checkpoint
    from shardwise.sharding.headers import bind

    checkpoint = open_checkpoint(model)
    has_tensors = checkpoint.gguf is not None or any(checkpoint.path.glob("*.safetensors"))
    entries = {name: stored.entry for name, stored in checkpoint.tensors.items()} if has_tensors else None
    fields = _with_quantization(checkpoint.config, checkpoint.path)
    config = Config(fields, str(checkpoint.path), names=entries)
    try:
        spec = build(config, checkpoint.name)
    except UnknownArchitecture:
        if entries is None:
            raise
        from shardwise.sharding.unknown import model_from_headers

        return model_from_headers(config, checkpoint.name, entries, styles)
    return bind(spec, entries) if entries is not None else spec


def _with_quantization(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The config with ModelOpt's `hf_quant_config.json`, which some checkpoints have beside it."""
    path = folder / "hf_quant_config.json"
    return {**config, "hf_quant_config": read_config(path)} if path.is_file() else config
