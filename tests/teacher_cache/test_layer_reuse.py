"""A second build computes the new part only, and says what it reused: smaller and larger k, temperatures, prompts,
teachers.
"""

from __future__ import annotations

from shared.cache.cache import Cache
from shared.cache.layer_choice import layer_of_capture
from teacher_cache.build import teach
from tests.teacher_cache.test_build import model, opened, recipe, tree, write_prompts  # noqa: F401 - fixtures
from tests.tiny_models import make_qwen3


def done(summary) -> tuple[int, int, int]:
    return summary.reused_rows, summary.generated.rows, summary.scored.rows


def test_a_smaller_capture_computes_nothing_and_training_reads_it_cut(tmp_path, model, opened):  # noqa: F811
    wide = {"capture": {"k": 8, "temperatures": [2.0]}}
    name = teach(recipe(tmp_path, model, **wide)).layer
    before = tree(tmp_path / "cache")
    for capture, clause in (
        ({"k": 4, "temperatures": [2.0]}, "k 4 of 8"),
        ({"k": 8}, "temperatures 1 of 1, 2"),
        ({"k": 4, "mass": 0.5}, "k 4 of 8, mass 0.5 of 1, temperatures 1 of 1, 2"),
    ):
        small = recipe(tmp_path, model, capture=capture)
        summary = teach(small)
        assert (done(summary), summary.layer, summary.computed) == ((20, 0, 0), name, False)
        line = f"layer {name} holds this capture ({clause}) and is cut exactly when it is read; no layer is added"
        assert summary.lines()[:2] == ["reused 20 rows (4 parts), generated 0, scored 0", line]
        cache = Cache.open(tmp_path / "cache", layer_of_capture(small))
        assert cache.layer.k == capture["k"]
        assert max(cache[i].targets.counts.max() for i in range(20)) == (2 if "mass" in capture else capture["k"])
    assert len(opened) == 1
    assert tree(tmp_path / "cache") == before


def test_new_prompts_join_the_layer_that_serves(tmp_path, model, opened):  # noqa: F811
    teach(recipe(tmp_path, model, capture={"k": 8}))
    write_prompts(tmp_path / "math.jsonl", 22)
    small = recipe(tmp_path, model)
    summary = teach(small)
    assert done(summary) == (20, 2, 2)
    assert opened[1].capture.k == 8
    cache = Cache.open(tmp_path / "cache", layer_of_capture(small))
    assert (len(cache), list(cache.layers())) == (22, [summary.layer])
    assert {int(cache[i].targets.counts.max()) for i in range(22)} == {4}


def test_double_k_and_another_temperature_score_every_row_once_and_answer_none(tmp_path, model, opened):  # noqa: F811
    first = teach(recipe(tmp_path, model))
    for capture, reason in (({"k": 8}, "k is 4"), ({"k": 4, "temperatures": [2.0]}, "temperatures is (1.0,)")):
        summary = teach(recipe(tmp_path, model, capture=capture))
        assert done(summary) == (20, 0, 20)
        assert opened[-1].generated == []
        told = summary.lines()[1]
        assert told.startswith(
            f"new layer over 20 rows that are there, no answer is generated again ({first.layer}: {reason}"
        )
        assert done(teach(recipe(tmp_path, model, capture=capture))) == (20, 0, 0)


def test_a_tenth_more_prompts_answers_and_scores_those_alone(tmp_path, model, opened):  # noqa: F811
    teach(recipe(tmp_path, model))
    write_prompts(tmp_path / "math.jsonl", 22)
    summary = teach(recipe(tmp_path, model))
    assert done(summary) == (20, 2, 2)
    assert len(opened[1].generated) == opened[1].scored == 2
    assert summary.reuse is None


def test_another_teacher_scores_the_same_answers(tmp_path, model, opened):  # noqa: F811
    teach(recipe(tmp_path, model))
    other = make_qwen3(tmp_path / "other", seed=5)
    summary = teach(recipe(tmp_path, other, prompts=[], generate=None))
    assert done(summary) == (20, 0, 20)
    assert "no answer is generated again" in summary.lines()[1]
    assert "weights_hash is" in summary.lines()[1]
    # A smaller capture by the other teacher is served by its own layer, not by the richer of the first.
    small = teach(recipe(tmp_path, other, prompts=[], generate=None, capture={"k": 3}))
    assert (done(small), small.layer) == ((20, 0, 0), summary.layer)
