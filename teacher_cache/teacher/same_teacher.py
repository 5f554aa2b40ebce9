"""Is the recipe's teacher the one that scored its caches? Own answers are scored by that one, or the recipe says so.

A student follows one teacher: what another thinks of its answers pulls it elsewhere than what the cache taught it.
Cost: the teacher's tokenizer is loaded; its weights are sampled, not read.
"""

from __future__ import annotations

from shared.cache.layer_choice import without_capture
from shared.cache.layout import list_layers
from shared.errors import IdentityError
from shared.identity.identity import difference
from shared.recipe.recipe import Recipe
from teacher_cache.teacher.teacher_identity import know_teacher, layer_identity


def require_same_teacher(recipe: Recipe) -> None:
    """Refuse a teacher that has not scored each of the recipe's caches, in whatever capture.

    Raises:
        IdentityError: with both values of what differs.
    """
    assert recipe.teacher is not None
    wanted = without_capture(layer_identity(know_teacher(recipe.teacher), recipe.teacher, recipe.capture))
    for path in recipe.cache:
        found = {name: difference(without_capture(layer.identity), wanted) for name, layer in list_layers(path).items()}
        if None in found.values():
            continue
        name, what = next(iter(found.items()), ("none", "the cache has no targets layer"))
        raise IdentityError(
            f"own answers must be scored by the teacher that scored {path}, and {recipe.teacher.model} is another than "
            f"that of layer {name}: {what}; name that teacher, or say `rounds: {{teacher: other}}`"
        )
