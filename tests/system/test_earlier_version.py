"""A run of the first version, cache and finished stages, is picked up by the same command: nothing is computed again.

`data/golden/run-1` was made by that version (`decant run recipe.yaml` there) and is never made again; stage `kd` keeps
the checkpoint of its second step, so that continuing a begun stage can be tried too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pydantic import create_model

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.keys import group_key
from shared.parts.jobs import list_jobs
from shared.recipe.file import load_recipe

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden" / "run-1"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, as current directory."""
    shutil.copytree(GOLDEN, tmp_path / "run-1")
    monkeypatch.chdir(tmp_path / "run-1")
    return tmp_path / "run-1"


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_cache_is_continued_and_no_row_is_answered_or_scored_again(run: Path) -> None:
    from teacher_cache.build import teach

    before = files_of(run / "cache")
    summary = teach(load_recipe(Path("recipe.yaml")))
    assert summary.reused_rows == 24
    assert (summary.generated.rows, summary.scored.rows, summary.hidden.rows) == (0, 0, 0)
    assert files_of(run / "cache") == before


def test_more_prompts_make_only_their_own_rows(run: Path) -> None:
    from teacher_cache.build import teach

    prompts = run / "prompts.jsonl"
    more = {"messages": [{"role": "user", "content": "Ben has 9 oranges and eats 2. How many are left?"}]}
    prompts.write_text(prompts.read_text() + json.dumps(more) + "\n")
    summary = teach(load_recipe(Path("recipe.yaml")))
    assert (summary.reused_rows, summary.generated.rows, summary.scored.rows) == (24, 2, 2)
    assert list(verify_cache(run / "cache")) == []


def test_a_cache_that_grows_keeps_the_rule_of_its_groups_and_says_so(run: Path) -> None:
    from teacher_cache.build import teach

    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ben has 9 pears.  How many?"}]
    (run / "prompts.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    header = (run / "cache" / "cache.json").read_bytes()
    summary = teach(load_recipe(Path("recipe.yaml")))
    assert summary.generated.rows == 2
    assert (run / "cache" / "cache.json").read_bytes() == header
    keys = {key.tobytes() for key in Cache.open(run / "cache").group_keys}
    assert group_key("system\nBe brief.\n\nuser\nBen has 9 pears.  How many?") in keys
    assert any("rows belong together by their whole prompt" in line for line in summary.lines())


def test_jobs_keep_their_names() -> None:
    assert [job.id for job in list_jobs(GOLDEN / "cache")] == ["0b285443b2811326c7dfa6d8fb188918"]
    assert Cache.open(GOLDEN / "cache", verify=True).cache_id


def test_finished_stages_are_reused(run: Path) -> None:
    from student_train.stage.stages import run_stages

    before = files_of(run / "run" / "train")
    run_stages(load_recipe(Path("recipe.yaml")))
    assert files_of(run / "run" / "train") == before


def test_a_finished_stage_is_reused_when_the_trainer_has_learnt_an_option(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared.recipe.recipe import Stage, StageTrainer
    from student_train.stage.stage_identity import claim_stage
    from student_train.stage.stage_work import resolve_stage

    recipe = load_recipe(Path("recipe.yaml"))
    grown_trainer = create_model("LaterTrainer", __base__=StageTrainer, fused=(bool, False))
    grown_stage = create_model("LaterStage", __base__=Stage, trainer=(grown_trainer, grown_trainer()))
    for value in (False, True):
        stage = recipe.stage("kd")
        trainer = grown_trainer(
            **{name: getattr(stage.trainer, name) for name in stage.trainer.model_fields_set}, fused=value
        )
        work = resolve_stage(recipe, grown_stage.model_construct(**{**dict(stage), "trainer": trainer}))
        if value:
            with pytest.raises(Exception, match=r"stage\.trainer\.fused null where the recipe now has true"):
                claim_stage(work)
        else:
            assert claim_stage(work)


@pytest.mark.slow
def test_a_begun_stage_is_continued_from_its_checkpoint(run: Path) -> None:
    from student_train.stage.stages import run_stages

    directory = run / "run" / "train" / "kd"
    finished = (directory / "model" / "model.safetensors").read_bytes()
    (directory / "done.json").unlink()
    shutil.rmtree(directory / "model")
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    run_stages(load_recipe(Path("recipe.yaml")))
    again = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert again == steps == [1, 2, 3, 4]
    assert len((directory / "model" / "model.safetensors").read_bytes()) == len(finished)


def test_kept_evaluations_are_reused(run: Path) -> None:
    from tools.evaluate.models.models import model_under_test
    from tools.evaluate.results.results import evaluation_identity, read_result, result_path, same_identity

    recipe = load_recipe(Path("recipe.yaml"))
    for name in ("base", "kd"):
        kept = read_result(result_path(recipe, name))
        assert kept is not None
        assert same_identity(kept["identity"], evaluation_identity(recipe, model_under_test(recipe, name)))


def test_the_recipe_that_a_run_wrote_out_is_read_with_every_option_of_version_1(run: Path) -> None:
    written = load_recipe(Path("run/recipe.yaml"))
    assert [loss.model_dump(exclude={"weight", "weigh"}) for loss in written.stage("kd").losses] == [
        {"name": "forward_kl", "temperature": 2.0},
        {"name": "jsd", "temperature": 1.0, "beta": 0.3},
        {"name": "hidden", "metric": "mse", "normalise": True, "layer_map": None},
    ]
    assert [stage.losses for stage in written.stages] == [s.losses for s in load_recipe(Path("recipe.yaml")).stages]


def test_a_run_is_reported_and_exported_from_anywhere(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools.export.export_run import export_run
    from tools.report.run_files import read_run

    monkeypatch.chdir(tmp_path.parent)
    assert read_run(run / "run").cache["rows"] == 24
    result, _ = export_run(run / "run", "kd", tmp_path / "student", keep_adapter=False)
    assert result["stage"] == "kd"
    assert "- cache: could not be read" not in (tmp_path / "student" / "README.md").read_text()
