"""`~/` in a recipe is the user's home wherever a path is meant, and nowhere else."""

from __future__ import annotations

from shared.recipe.recipe import Recipe


def test_a_home_directory_is_meant_wherever_a_recipe_names_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    document = {
        "name": "x",
        "output_dir": "~/run",
        "cache": "~/cache",
        "teacher": {"model": "~/teacher", "adapter": "~/lora"},
        "prompts": [
            {"source": "a", "path": "~/a.jsonl", "format": "messages", "chat_template": "~/t.jinja"},
            {"source": "b", "path": "b/~/b.jsonl", "format": "messages", "chat_template": "~{{ messages }}"},
        ],
        "generate": {"model": "~/other"},
        "student": {"model": "~/student"},
        "stages": [{"name": "kd", "init_from": "~/start", "losses": [{"name": "cross_entropy"}]}],
        "evaluate": {
            "models": ["kd"],
            "tasks": [{"name": "gsm8k", "path": "~/q.jsonl"}],
            "side_by_side": {"prompts": ["~/p.jsonl", "tasks"]},
        },
    }
    (tmp_path / "home" / "start").mkdir(parents=True)
    loaded = Recipe.model_validate(document)
    assert loaded.model_dump_json().count("~") == 2
    named = (loaded.output_dir, loaded.cache[0], loaded.student.model, loaded.teacher.model, loaded.prompts[0].path)
    assert [str(path) for path in named] == [
        str(tmp_path / "home" / name) for name in ("run", "cache", "student", "teacher", "a.jsonl")
    ]
    (tmp_path / "~" / "run").mkdir(parents=True)  # what an earlier version made of it
    assert str(Recipe.model_validate(document).output_dir) == "~/run"
