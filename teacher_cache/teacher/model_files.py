"""The teacher's files: a directory or a hub id becomes a local directory, and what its files say becomes plain values.

Everything that an identity needs is read here from files, so that a mismatch is refused before an engine starts.
Cost: small JSON files; a hub id is downloaded once by `huggingface_hub` into its own store.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import EngineError, ModelError, reason_of
from shared.models.config_file import read_config
from shared.remote.hub import ask_hub
from shared.special_files import refuse_links_outside, refuse_special_files

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
SMALL_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model")
MAX_TOKENIZER_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk."""

    name: str
    """As the recipe spells it."""
    directory: Path
    revision: str | None
    """Commit of a hub id; None for a directory."""
    config: dict[str, Any]
    """config.json"""

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config, where it is a part."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def dtype(self) -> str:
        """Type of the stored weights, as `dtype: auto` understands it."""
        found = self.config.get("dtype") or self.config.get("torch_dtype") or self.text_config.get("dtype") or "float32"
        return str(found)

    def dtype_as(self, wanted: str) -> str:
        """Return the type that weights run in where a section wants one: `auto` is the stored type."""
        return self.dtype if wanted == "auto" else wanted

    @property
    def quantization(self) -> str | None:
        """Scheme that the checkpoint itself is quantised with; None where its config says none."""
        found = self.config.get("quantization_config") or self.text_config.get("quantization_config")
        if not isinstance(found, dict) or not found:
            return None
        bits = found.get("bits")
        return str(found.get("quant_method") or "unnamed") + (f"-{bits}bit" if isinstance(bits, int) else "")

    @property
    def vocab_size(self) -> int:
        """Rows of the output head, padding included."""
        return self._integer("vocab_size")

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence that the model knows, in tokens."""
        return self._integer("max_position_embeddings")

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of the model."""
        return self._integer("num_hidden_layers")

    @property
    def hidden_size(self) -> int:
        """Width of its hidden states."""
        return self._integer("hidden_size")

    def _integer(self, key: str) -> int:
        value = self.text_config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{self.directory / 'config.json'}: `{key}` is {value!r}; expected a positive integer")
        return value


def resolve_model(model: str, revision: str | None = None) -> ModelFiles:
    """Find a model on disk, downloading a hub id if need be.

    Raises:
        EngineError: it is neither a model directory nor a hub id that can be fetched.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise ModelError(
                f"{model}: `revision: {revision}` is set but the model is a directory; leave the revision out"
            )
        commit = None
    else:
        directory, commit = _download(model, revision)
    refuse_special_files(directory)
    return ModelFiles(model, directory, commit, read_config(directory / "config.json"))


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Return the files that a tokenizer loads from again, by name: `tokenizer.json`, and templates in a folder, too.

    Raises:
        EngineError: a file is larger than 256 MiB, or the directory for temporary files is full.
        ModelError: a file that the tokenizer was read from is a link that leads elsewhere.
    """
    directory = Path(str(tokenizer.name_or_path))
    if directory.is_dir():
        templates = directory / "additional_chat_templates"
        own = [path for path in directory.iterdir() if path.suffix in TOKENIZER_SUFFIXES]
        refuse_links_outside(directory, [*own, templates, *templates.glob("*.jinja")])
    with tempfile.TemporaryDirectory(prefix="decant-tokenizer-") as scratch:
        try:
            tokenizer.save_pretrained(scratch)
        except Exception as error:  # the tokenizers library raises plain `Exception` for a full disk
            raise EngineError(
                f"{scratch}: the tokenizer's files cannot be written there ({error}); free space, or set TMPDIR to a "
                "larger disk"
            ) from error
        found = sorted(path for path in Path(scratch).rglob("*") if path.suffix in TOKENIZER_SUFFIXES)
        for path in found:
            if path.stat().st_size > MAX_TOKENIZER_BYTES:
                raise EngineError(
                    f"{path.name} of the tokenizer has {path.stat().st_size:,} bytes; at most "
                    f"{MAX_TOKENIZER_BYTES:,} fit"
                )
        files = {path.relative_to(scratch).as_posix(): path.read_bytes() for path in found}
    if b'"auto_map"' in files.get("tokenizer_config.json", b""):  # tokenizer.json needs no code, whoever made it
        config = json.loads(files["tokenizer_config.json"])
        config.pop("auto_map", None)
        files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    return files


def _download(model: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    silent = ask_hub(model)
    try:
        found = Path(snapshot_download(model, revision=revision, allow_patterns=[*WEIGHT_PATTERNS, *SMALL_PATTERNS]))
    except Exception as error:  # offline, missing, forbidden, not a valid id: none of them gives a model
        reason = silent or reason_of(error, 200)
        raise ModelError(f"{model}: neither a model directory nor a hub id that can be fetched ({reason})") from error
    return found, found.name
