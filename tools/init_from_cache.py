"""`decant init --cache`: a recipe that trains a student from a cache, with no teacher on disk.

The losses are those that the cache's targets can give: forward KL, or KL within the head where the tail is unknown,
each beside a little cross-entropy. The share that is held out is the first of a few that holds a row. Cost: the small
files of the cache and its group keys.
"""

from __future__ import annotations

from pathlib import Path

from shared.cache.cache import Cache
from shared.cache.layout import list_layers
from shared.errors import UsageError
from shared.keys import is_heldout
from shared.places import named
from tools.init_recipe import place_of, plain_text, word_of, write_starter, yaml_text

_FRACTIONS = (0.05, 0.1, 0.2, 0.35, 0.5)

_HEAD = """\
# {name}: {student} from the cache {cache}; no teacher is loaded.
# {rows:,} rows, licence {licence}.{layers}
#
#   decant cache show {cache_word}
#   decant run {path}             train, evaluate, report
# Every command continues what is there.
"""


def init_from_cache(name: str, cache: Path, student: str, output: Path | None = None) -> Path:
    """Write the recipe and return its path.

    Raises:
        UsageError: the name cannot be a directory's, the file exists, or the cache holds no rows.
        CacheError: it is no cache.
    """
    place = place_of(name, output)
    opened = Cache.open_sequences(cache)
    if not len(opened):
        raise UsageError(f"{named(cache)} holds no rows to train from; name another cache")
    layers, fraction = list_layers(cache), _fraction(opened)
    layer = next(iter(layers.values()), None)
    terms = [("cross_entropy", 1.0)]
    if layer is not None:
        terms = [("head_kl" if layer.identity.tail == "unknown" else "forward_kl", 0.9), ("cross_entropy", 0.1)]
    described = "".join(
        f"\n# layer {each.full_name}: teacher {plain_text(each.identity.teacher)}, k {each.identity.k}, "
        f"tail {each.identity.tail}"
        for each in layers.values()
    )
    head = _HEAD.format(
        name=name,
        student=plain_text(student),
        cache=plain_text(named(cache)),
        rows=len(opened),
        licence=plain_text(opened.sequences_identity.licence or "not said"),
        layers=described,
        cache_word=word_of(named(cache)),
        path=word_of(place),
    )
    write_starter(
        place,
        name,
        student,
        head=head,
        teacher="",
        cache=yaml_text(named(cache)),
        fraction=fraction,
        whose="cache",
        targets=f"    targets: {layer.full_name}\n" if layer is not None else "",
        losses="".join(f"      - {{name: {term}, weight: {weight}}}\n" for term, weight in terms),
        models="[base, kd]" if fraction else "[]                      # no share of so few prompts can be held out",
    )
    return place


def _fraction(cache: Cache) -> float:
    """Return the smallest share that holds out a row and leaves one; 0 where none does, as of a single prompt."""
    keys = [bytes(key) for key in cache.group_keys]
    for fraction in _FRACTIONS:
        if 0 < sum(is_heldout(key, fraction) for key in keys) < len(keys):
            return fraction
    return 0.0
