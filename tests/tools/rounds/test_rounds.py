"""Rounds of own answers: what is asked, who scores, what is trained on; compared with builds and stages alone."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.errors import IdentityError, PromptError, TrainingError, UsageError
from shared.identity.weights_hash import weights_hash
from shared.keys import is_heldout
from shared.parts.records import list_records
from shared.recipe.recipe import Guards, PromptSource
from student_train.stage.stages import run_stages
from teacher_cache.build import teach
from teacher_cache.teacher.teacher_identity import require_same_teacher
from tests.tiny_models import make_qwen3
from tests.tools.rounds.tiny_run import contents, make_models, rounds_recipe
from tools.plan.planner import plan, plan_text
from tools.plan.preflight.preflight_asked import Asked
from tools.plan.preflight.preflight_rounds import answer_problems
from tools.rounds.chain import rounds_in_processes, train_in_processes
from tools.rounds.guards import repeated_share
from tools.rounds.one_round import Round
from tools.rounds.shares import shares_of
from tools.rounds.steps import GuardError, answer, score, train


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of two rounds, and the teacher's cache as it was before them."""
    directory = tmp_path_factory.mktemp("rounds")
    recipe = rounds_recipe(directory, make_models(directory))
    teach(recipe)
    run_stages(recipe, "kd", "kd")
    before = contents(recipe.cache[0])
    stage = recipe.stage("own")
    rounds = [Round(recipe, stage, number) for number in (1, 2)]
    for one in rounds:
        answer(one)
        score(one)
        train(one)
    return recipe, rounds, before


def test_teachers_cache_stays_as_it_was(done):
    recipe, _, before = done
    assert contents(recipe.cache[0]) == before


def test_rows_are_answers_to_fresh_prompts_that_say_who_answered(done):
    recipe, rounds, _ = done
    cache = Cache.open(rounds[0].own_cache, verify=True)
    assert list(verify_cache(rounds[0].own_cache)) == []
    assert not any(is_heldout(bytes(key.tobytes()), recipe.heldout.fraction) for key in cache.group_keys)
    asked = [{cache[i].prompt for i in range(len(cache)) if cache[i].source == f"own {n}: math"} for n in (1, 2)]
    assert len(asked[0]) == len(asked[1]) == len(cache) / 2 > 2
    assert not asked[0] & asked[1]
    answered = {record.id8: record.software for record in list_records(rounds[0].own_cache / "sequences")}
    models = [recipe.stage_dir("kd") / "model", rounds[0].directory / "model"]
    for one, model in zip(rounds, models, strict=True):
        job = one.job()
        assert job.request["generator"]["weights"] == weights_hash(model) == answered[job.id8]["weights"]
        assert job.request["round"]["number"] == answered[job.id8]["round"] == one.number


def test_answers_and_targets_are_those_of_a_build_that_asks_that_student(done, tmp_path):
    recipe, rounds, _ = done
    own = Cache.open(rounds[1].own_cache)
    wanted = rounds[1].answering().generate.model_copy(update={"model": str(rounds[0].directory / "model")})
    again = recipe.model_copy(update={"cache": (tmp_path / "cache",), "generate": wanted})
    teach(again)
    built = Cache.open(tmp_path / "cache")
    by_key = {built[i].row_key: built[i] for i in range(len(built))}
    rows = [own[i] for i in range(len(own)) if own[i].source == "own 2: math"]
    for row in rows:
        other = by_key[row.row_key]
        assert row.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_array_equal(row.targets.ids, other.targets.ids)
        np.testing.assert_allclose(row.targets.tail_logmass, other.targets.tail_logmass, atol=1e-5)


def test_training_tokens_are_divided_as_the_recipe_says(done):
    recipe, _, _ = done
    lines = [json.loads(line) for line in (recipe.stage_dir("own") / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], line["step"]) for line in lines] == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]
    for number in (1, 2):
        tokens: dict[str, int] = {}
        for line in lines[3 * number - 3 : 3 * number]:
            for source, count in line["tokens_by_source"].items():
                tokens[source] = tokens.get(source, 0) + count
        assert {name for name, count in tokens.items() if count} == {"math", f"own {number}: math"}
        assert tokens[f"own {number}: math"] / sum(tokens.values()) == pytest.approx(0.75, abs=0.1)


def test_stage_shows_its_last_round_and_what_the_answers_were_like(done):
    recipe, rounds, _ = done
    stage_dir = recipe.stage_dir("own")
    assert weights_hash(stage_dir / "model") == weights_hash(rounds[1].directory / "model")
    health = json.loads((stage_dir / "health.json").read_text())
    assert [each["round"] for each in health["rounds"]] == [1, 2]
    assert json.loads((stage_dir / "done.json").read_text()) == {"rounds": 2}


def other_rounds(done, directory, **changes):
    """Return the first round of the same run, elsewhere, with other settings of its stage."""
    recipe, _, _ = done
    stage = recipe.stage("own")
    rounds = stage.rounds.model_copy(update=changes)
    stage = stage.model_copy(update={"rounds": rounds, "init_from": str(recipe.stage_dir("kd"))})
    recipe = recipe.model_copy(update={"stages": (stage,), "output_dir": directory})
    return Round(recipe, stage, 1)


def test_student_that_repeats_itself_stops_before_it_is_trained(done, tmp_path):
    recipe, _, _ = done
    repeating = tmp_path / "repeating"
    shutil.copytree(recipe.stage_dir("kd") / "model", repeating)
    weights = load_file(repeating / "model.safetensors")
    weights = {name: torch.zeros_like(value) if "layers" in name else value for name, value in weights.items()}
    save_file(weights, repeating / "model.safetensors", metadata={"format": "pt"})  # what follows is the token itself
    one = other_rounds(done, tmp_path / "run", max_new_tokens=40, temperature=0.0, guards=Guards(cut=1.0))
    stage = one.stage.model_copy(update={"init_from": str(repeating)})
    one = Round(one.recipe.model_copy(update={"stages": (stage,)}), stage, 1)
    for step in (answer, train):
        with pytest.raises(GuardError, match=r"100\.0% of the answers repeat themselves.*last good model.*repeating"):
            step(one)
    assert not one.directory.exists()
    health = json.loads((tmp_path / "run" / "train" / "own" / "health.json").read_text())
    assert not health["healthy"]
    assert health["stopped"].startswith("round 1: 100.0% of the answers repeat themselves")
    assert health["rounds"][0]["repeating"] == 1.0


def test_stage_that_was_trained_without_rounds_is_refused_before_its_student_answers(done, tmp_path):
    one = other_rounds(done, tmp_path / "run")
    shutil.copytree(done[0].stage_dir("kd"), one.recipe.stage_dir("own"))
    with pytest.raises(TrainingError, match="holds a stage that was trained without rounds"):
        answer(one)
    assert not one.own_cache.exists()


@pytest.mark.parametrize(
    ("ids", "share"), [([1, 2, 3], 0.0), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2), ([7] * 13, 0.9), (list(range(40)), 0.0)]
)
def test_repeated_runs_are_counted(ids, share):
    assert repeated_share(np.array(ids, np.int32)) == pytest.approx(share)


def test_several_answers_of_one_prompt_stay_in_one_round(done, tmp_path):
    one = other_rounds(done, tmp_path / "run", samples_per_prompt=3, prompts=2)
    answer(one)
    cache = Cache.open_sequences(one.own_cache)
    prompts = [cache.sequence(i).prompt for i in range(len(cache))]
    assert sorted(prompts.count(prompt) for prompt in set(prompts)) == [3, 3]


def test_a_round_goes_on_without_prompts_that_the_build_judged_and_not_without_many_of_its_own(done, tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = [{"prompt": f"How many apples, number {i}?"} for i in range(20)] + [{"prompt": ""}] * 3
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixed = PromptSource.model_validate({"source": "math", "path": str(path), "format": "prompt_completion"})
    one = other_rounds(done, tmp_path / "run", prompts=2)
    judged = Round(one.recipe.model_copy(update={"prompts": (mixed,)}), one.stage, 1)
    figures, text = answer(judged)
    assert figures["generated"] == 2
    assert "3 rows cannot be used and were set aside, the first:" in text
    own = other_rounds(done, tmp_path / "other", prompts=2, sources=(mixed,))
    with pytest.raises(PromptError, match=r"mixed\.jsonl:21: .*3 of 23 rows.*; correct or remove them$"):
        answer(own)


def test_round_of_other_settings_is_refused_not_mixed_in(done):
    recipe, rounds, _ = done
    warmer = other_rounds(done, recipe.output_dir, temperature=1.5)
    with pytest.raises(IdentityError, match=r"round 1 made otherwise .what differs: how answers are drawn"):
        answer(warmer)
    stems = [record.stem for record in list_records(rounds[0].own_cache / "sequences")]
    assert len(stems) == sum(one.job().num_units for one in rounds)


def test_another_teacher_is_refused_unless_the_stage_says_so(done, tmp_path):
    recipe, rounds, _ = done
    other = make_qwen3(tmp_path / "other", end_scale=1.5, seed=7)
    changed = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"model": str(other)})})
    one = Round(changed, rounds[0].stage, 1)
    with pytest.raises(IdentityError, match=r"must be scored by the teacher that scored .* weights_hash is "):
        score(one)
    stage = one.stage.model_copy(update={"rounds": one.settings.model_copy(update={"teacher": "other"})})
    shutil.copytree(recipe.output_dir / "own", tmp_path / "run" / "own")
    elsewhere = changed.model_copy(update={"output_dir": tmp_path / "run"})
    assert score(Round(elsewhere, stage, 1))[0]["scored"] > 0


def test_a_cache_that_no_teacher_scored_yet_is_not_said_to_be_of_another_teacher(done, tmp_path):
    recipe, _, _ = done
    unscored = tmp_path / "cache"
    shutil.copytree(recipe.cache[0], unscored, ignore=shutil.ignore_patterns("targets"))
    with pytest.raises(IdentityError, match=r"which no teacher has scored yet; .* `decant teach`") as caught:
        require_same_teacher(recipe.model_copy(update={"cache": (unscored,)}))
    assert "another" not in str(caught.value)


def test_rows_that_are_labelled_as_own_answers_are_not_mixed_up_with_them(done, tmp_path):
    recipe, rounds, _ = done
    prompts = [source.model_copy(update={"source": "own 1: math"}) for source in recipe.prompts]
    labelled = recipe.model_copy(update={"prompts": tuple(prompts), "cache": (tmp_path / "labelled",)})
    teach(labelled)
    mixed = recipe.model_copy(update={"cache": labelled.cache})
    with pytest.raises(UsageError, match=r"labelled has rows of the source 'own 1: math', .* another label"):
        shares_of(Round(mixed, rounds[0].stage, 1))
    (problem,) = answer_problems(Asked(mixed, frozenset({"answer"}), False))
    assert "another label" in problem[1]
    own = tuple(source.model_copy(update={"source": "asked"}) for source in recipe.prompts)
    settings = rounds[0].settings.model_copy(update={"sources": own})
    stage = rounds[0].stage.model_copy(update={"rounds": settings})
    assert not list(answer_problems(Asked(mixed.model_copy(update={"stages": (stage,)}), frozenset({"answer"}), False)))


def test_keep_all_trains_on_earlier_rounds_too(done):
    recipe, rounds, _ = done
    stage = rounds[1].stage
    stage = stage.model_copy(update={"rounds": stage.rounds.model_copy(update={"keep": "all", "own_share": 1.0})})
    shares = shares_of(Round(recipe, stage, 2))
    assert set(shares) == {"own 1: math", "own 2: math"}
    assert sum(shares.values()) == pytest.approx(1.0)


def test_plan_counts_what_the_rounds_then_ask_answer_and_score(done, tmp_path):
    recipe, rounds, _ = done
    before = plan(recipe.model_copy(update={"output_dir": tmp_path / "elsewhere"}))
    of = before["rounds"]["own"]
    cache = Cache.open(rounds[0].own_cache)
    tokens, positions = int(cache.num_tokens.sum()), sum(len(cache[i].predictor_index()) for i in range(len(cache)))
    assert (of["rounds"], of["prompts_per_round"], of["answers_to_do"]) == (2, len(cache) / 2, len(cache))
    assert of["generate_tokens"]["at_most"] == 12 * len(cache)
    assert of["score_tokens"]["at_most"] - of["generate_tokens"]["at_most"] == pytest.approx(
        tokens - positions, rel=0.05
    )
    assert (before["stages"]["own"]["steps"], before["stages"]["own"]["rounds"]) == (6, 2)
    assert f"rounds own: 2 rounds of {len(cache) // 2} prompts each, {len(cache)} answers to do" in plan_text(before)
    after = plan(recipe)["rounds"]["own"]
    assert (after["rounds_answered"], after["answers_to_do"], after["score_tokens"]["at_most"]) == (2, 0, 0)
    many = recipe.stage("own").rounds.model_copy(update={"prompts": 1000})
    stages = (recipe.stage("kd"), recipe.stage("own").model_copy(update={"rounds": many}))
    with pytest.raises(
        PromptError, match=r"stage 'own': 1,000 prompts .* are there that are not held out.*rounds\.prompts"
    ):
        plan(recipe.model_copy(update={"stages": stages}))


def test_finished_stages_start_no_process_and_an_earlier_round_again_hides_no_later_one(done, monkeypatch, capsys):
    recipe, rounds, _ = done
    begun = []
    monkeypatch.setattr("tools.rounds.chain.run_phase", lambda phase, command, output: begun.append(phase))
    train_in_processes(recipe, recipe.stages, ["recipe.yaml"])
    assert begun == []
    assert "train own: finished before with the same settings" in capsys.readouterr().err
    assert ": all answers were scored before, in layer " in score(rounds[0])[1]
    train(rounds[0])
    stage_dir = recipe.stage_dir("own")
    assert weights_hash(stage_dir / "model") == weights_hash(rounds[1].directory / "model")
    assert json.loads((stage_dir / "done.json").read_text()) == {"rounds": 2}
    for changes in ({"temperature": 0.7}, {"own_share": 0.5}, {"guards": Guards(repeating=0.0, cut=0.0)}, {"count": 3}):
        own = recipe.stage("own").rounds.model_copy(update=changes)
        stage = recipe.stage("own").model_copy(update={"rounds": own})
        changed = recipe.model_copy(update={"stages": (recipe.stage("kd"), stage)})
        rounds_in_processes(changed, stage, [1], ["recipe.yaml"])
        assert begun == [f"round 1 of own, {step}" for step in ("answer", "score", "train")]
        begun.clear()


@pytest.mark.parametrize("copied", ["as a directory", "without links", "without weights"])
def test_a_run_whose_copy_lost_the_link_to_its_model_gets_it_back(done, tmp_path, monkeypatch, capsys, copied):
    recipe, rounds, _ = done
    moved = recipe.model_copy(update={"output_dir": tmp_path / "run"})
    shutil.copytree(recipe.output_dir, moved.output_dir, symlinks=copied != "as a directory")
    model = moved.stage_dir("own") / "model"
    if copied == "without links":
        model.unlink()
    if copied == "without weights":
        (moved.stage_dir("own") / "round-2" / "model" / "model.safetensors").unlink()
    begun: list[str] = []
    monkeypatch.setattr("tools.rounds.chain.run_phase", lambda phase, command, output: begun.append(phase))
    train_in_processes(moved, moved.stages, ["recipe.yaml"])
    assert bool(begun) == (copied != "as a directory"), "a copy is a model; a stage without one is not finished"
    assert ("train own: finished before" in capsys.readouterr().err) == (copied == "as a directory")
    for number in (1, 2):
        train(Round(moved, moved.stage("own"), number))
        assert model.is_symlink()
    assert contents(model) == contents(rounds[1].directory / "model")
    assert not list(model.parent.glob(".model*"))


def test_a_directory_that_no_round_made_is_not_replaced(done, tmp_path):
    recipe, _, _ = done
    moved = recipe.model_copy(update={"output_dir": tmp_path / "run"})
    shutil.copytree(recipe.output_dir, moved.output_dir)
    model = moved.stage_dir("own") / "model"
    (model / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match=r"train/own/model is a directory with a model of none of the rounds"):
        train(Round(moved, moved.stage("own"), 2))
    assert (model / "notes.txt").read_text() == "mine"
