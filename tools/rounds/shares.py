"""How a round's training tokens are shared out among the student's own answers and the recipe's cache.

Cost: columns of the caches without their tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shared.cache.layout import sequences_dir
from shared.errors import UsageError
from shared.parts.records import list_records
from tools.rounds.one_round import Round

if TYPE_CHECKING:
    from student_train.batch.dataset import CacheList


def shares_of(one: Round) -> dict[str, float]:
    """Return the share of every source in a round's training tokens.

    The student's own have `own_share` together, as their tokens are; the others share the rest, as the stage's mixture
    says or as their tokens are.

    Raises:
        UsageError: the two cannot be told apart.
    """
    from student_train.batch.dataset import CacheList
    from student_train.stage.stage_order import open_caches

    require_labels_of_its_own(one)
    settings, fraction = one.settings, one.recipe.heldout.fraction
    kept = range(1, one.number + 1) if settings.keep == "all" else (one.number,)
    labels = {source.source for number in kept for source in one.labelled(number)}
    answered = _tokens(CacheList.open([one.own_cache], None, with_targets=False), fraction)
    own = {name: count for name, count in answered.items() if name in labels}
    shares = {name: settings.own_share * count / sum(own.values()) for name, count in own.items()}
    if settings.own_share < 1:
        if one.stage.mixture is None:
            others = _tokens(open_caches(one.recipe, one.stage), fraction)
        else:
            others = {name: share.value(0.0) for name, share in one.stage.mixture.items()}
        shares |= {name: (1 - settings.own_share) * count / sum(others.values()) for name, count in others.items()}
    return shares


def require_labels_of_its_own(one: Round) -> None:
    """Refuse a recipe whose cache has rows that are labelled as those of a round of the stage, such as the own cache of
    another run.

    Raises:
        UsageError: it has.
    """
    labels = {source.source for number in range(1, one.settings.count + 1) for source in one.labelled(number)}
    for path in one.recipe.cache:
        for record in list_records(sequences_dir(path)):
            for label in sorted(labels & set(record.stats.get("sources", {}))):
                raise UsageError(
                    f"{path} has rows of the source '{label}', which is what stage '{one.stage.name}' calls its own "
                    "answers of that round; give the prompts of the rounds another label, as entries of "
                    "`rounds.sources` with a `source` of their own"
                )


def _tokens(caches: CacheList, heldout_fraction: float) -> dict[str, float]:
    """Return the tokens that may be trained on, by source."""
    rows = caches.training_rows(heldout_fraction)
    counts = np.bincount(caches.sources[rows], caches.num_tokens[rows], minlength=len(caches.source_names))
    return {name: float(count) for name, count in zip(caches.source_names, counts, strict=True) if count}
