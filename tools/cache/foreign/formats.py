"""Which format is it, and which of the user's options does it take?

A directory that `decant cache export` wrote is known by its metadata file; the others by endings and columns, or by
`--format`. An option that a format has no use for is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.errors import NamingError, UsageError
from shared.parts.cache_files import list_folder
from shared.text.file_endings import ends_in
from tools.cache.foreign.axolotl import COLUMNS, AxolotlReader
from tools.cache.foreign.distillkit import DistillKitReader
from tools.cache.foreign.foreign_row import ForeignReader
from tools.cache.foreign.import_cache import ImportSettings, foreign_text, import_foreign
from tools.cache.foreign.megatron import MegatronReader
from tools.cache.foreign.openai_json import OpenAIReader
from tools.cache.foreign.parquet_rows import parquet_columns, parquet_files
from tools.cache.parquet_columns import METADATA_FILE

OPTIONS_OF = {
    "decant": set[str](),
    "distillkit": {"compression", "split_at"},
    "axolotl": {"temperature", "shift"},
    "openai": {"max_set_aside"},
    "megatron": {"token_ids"},
}
"""Options that a format takes beside those of all."""
_NO_CONTENT = ("tokenizer", "max_set_aside")
"""Options whose words change nothing of what is made: the tokenizer counts by its content."""
_OF_ALL = ("tokenizer", "teacher", "source", "licence", "tail")


def import_any(args: argparse.Namespace, advance: Callable[[int], None]) -> tuple[dict[str, Any], str]:
    """Import what the command line names; return the result and what people read.

    Raises:
        UsageError: an option is missing or has no meaning for the format.
        CacheError: as for `import_foreign` and `import_parquet`.
    """
    form = args.format or _guessed(args.source_path)
    given = {name for names in OPTIONS_OF.values() for name in names if getattr(args, name) not in (None, [])}
    given |= {name for name in _OF_ALL if getattr(args, name) is not None}
    useless = sorted(given - OPTIONS_OF[form] - (set() if form == "decant" else set(_OF_ALL)))
    if useless:
        raise UsageError(f"--{useless[0].replace('_', '-')} means nothing for the format {form}; leave it out")
    if form == "decant":
        from tools.cache.parquet_import import import_parquet, import_text

        found = import_parquet(args.source_path, args.out, advance)
        return found, import_text(found)
    settings = _import_settings(args, form)
    reader = _reader(form, args, settings)
    from teacher_cache.teacher.teacher_identity import software

    result = import_foreign(reader, args.out, settings, _fingerprint(form, args), software(), advance)
    return result, foreign_text(result)


def _guessed(path: Path) -> str:
    """Return the format of files.

    Raises:
        CacheError: it cannot be told.
    """
    if not path.exists():
        raise NamingError(f"there is no '{path}'; correct the path")
    names = list_folder(path) if path.is_dir() else [path.name]
    if METADATA_FILE in names:
        return "decant"
    if any(ends_in(name, ".tar") for name in names):
        return "megatron"
    if any(ends_in(name, ".jsonl") for name in names):
        return "openai"
    if any(ends_in(name, ".parquet") for name in names):
        return "axolotl" if set(COLUMNS) <= set(parquet_columns(parquet_files(path))) else "distillkit"
    raise NamingError(
        f"{path} holds no {METADATA_FILE}, *.parquet, *.jsonl or *.tar, so its format cannot be told; name it with "
        "--format"
    )


def _import_settings(args: argparse.Namespace, form: str) -> ImportSettings:
    if args.tokenizer is None:
        raise UsageError(
            f"the format {form} does not hold its tokenizer; name the directory of the one that made its ids with "
            "--tokenizer"
        )
    from shared.models.files import load_fast_tokenizer
    from teacher_cache.teacher.model_files import tokenizer_files

    tokenizer = load_fast_tokenizer(args.tokenizer, trust_remote_code=False)
    return ImportSettings(
        tokenizer,
        tokenizer_files(tokenizer),
        str(args.tokenizer),
        args.teacher or "unknown",
        args.source or "imported",
        args.licence,
        args.tail,
    )


def _reader(form: str, args: argparse.Namespace, settings: ImportSettings) -> ForeignReader:
    path = args.source_path
    if form == "distillkit":
        return DistillKitReader(path, args.compression, [_token(settings.tokenizer, text) for text in args.split_at])
    if form == "axolotl":
        return AxolotlReader(path, args.temperature or 1.0, args.shift)
    if form == "openai":
        return OpenAIReader(path, settings.tokenizer, settings.tokenizer_files["tokenizer.json"], args.max_set_aside)
    if args.token_ids is None:
        raise UsageError(
            "shards of Megatron-LM hold no token ids; name a Parquet file with a column input_ids, a sequence a row in "
            "the order of training, with --token-ids"
        )
    return MegatronReader(path, args.token_ids)


def _token(tokenizer: Any, text: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(text)
    if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != text:
        raise UsageError(f"--split-at {text}: the tokenizer has no such token; name one such as <|endoftext|>")
    return int(token_id)


def _fingerprint(form: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what makes two imports the same: files as they are, and every option."""
    options = {name: getattr(args, name) for name in (*OPTIONS_OF[form], *_OF_ALL) if name not in _NO_CONTENT}
    roots = [args.source_path, *(Path(v) for v in (options.get("compression"), options.get("token_ids")) if v)]
    files = [file for root in roots for file in ([root / n for n in list_folder(root)] if root.is_dir() else [root])]
    seen = [(file.name, file.lstat().st_size, file.lstat().st_mtime_ns) for file in files if file.exists()]
    return {
        "format": form,
        "files": [list(each) for each in seen],
        **{name: str(value) if isinstance(value, Path) else value for name, value in sorted(options.items())},
    }
