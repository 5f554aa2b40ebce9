"""What a report claims: bounds where a cache has only bounds, no interval of one row, questions that are prompts."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.cache.cache import Cache
from shared.cache.groups import question_key
from shared.keys import is_heldout
from shared.recipe.file import load_recipe
from tests.tools.report.fake_run import make_run, write_cache, write_evaluation, write_json
from tools.evaluate.tasks.contamination import among_caches, among_groups, sentence
from tools.report.build import build_report
from tools.report.figures import report_figures
from tools.report.page import _lead
from tools.report.run_files import _sum_stats, read_run
from tools.report.tables import run_rows, table_text
from tools.report.views.schedule_view import schedule_plots, schedule_series


def report_of(mode: str, entropy: float, tail: float) -> dict[str, Any]:
    cache = {"rows": 1, "positions": 1, "mean_entropy_nats": entropy, "mean_tail_mass": tail}
    return {"cache": cache, "layers": [{"mode": mode, "vocab_size": 1000}], "seconds": {}, "models": {}, "stages": {}}


@pytest.mark.parametrize(
    ("mode", "entropy", "tail", "says"),
    [
        ("sample", 0.0, 1.0, "not known"),
        ("top", 0.01, 0.999, "0.01 to 6.91 nats"),
        ("top", 1.5, 0.0, "1.50 nats"),
        ("top+sample", 0.5, 0.1, "0.50 to 1.19 nats"),
    ],
)
def test_the_teachers_entropy_is_a_bound_or_not_known(mode: str, entropy: float, tail: float, says: str) -> None:
    assert dict(run_rows(report_of(mode, entropy, tail)))["teacher's entropy"] == says


def test_the_bounds_hold_for_dense_distributions() -> None:
    """Head and bucket of random distributions of 50 tokens: the dense entropy lies between the bounds."""
    import numpy as np

    rng = np.random.default_rng(0)
    for alpha in (0.05, 0.3, 5.0):
        dense = np.sort(rng.dirichlet(np.full(50, alpha), size=200))[:, ::-1].clip(1e-300)
        kept, tail = dense[:, :5], 1 - dense[:, :5].sum(1)
        parts = np.column_stack([kept, tail]).clip(1e-300)
        least = float(-(parts * np.log(parts)).sum(1).mean())
        full = float(-(dense * np.log(dense)).sum(1).mean())
        assert least - 1e-9 <= full <= least + tail.mean() * math.log(50) + 1e-9


def run_with_questions(root: Path, heldout: float = 0.0) -> Path:
    """Return a run whose math task asks two of the cache's prompts ("prompt 3", ...) and one that it has not."""
    run = make_run(root)
    text = (run / "recipe.yaml").read_text().replace("math.test.jsonl", str(root / "math.jsonl"))
    text = "\n".join(line for line in text.splitlines() if "code.test" not in line and "aiops.test" not in line)
    (run / "recipe.yaml").write_text(text + f"\nheldout: {{fraction: {heldout}}}\n")
    rows = [{"question": question, "answer": "#### 1"} for question in ("prompt 3", "prompt 4", "another")]
    (root / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.mark.slow
def test_questions_that_are_prompts_are_counted(tmp_path: Path) -> None:
    run = run_with_questions(tmp_path / "run")
    report = build_report([run])
    assert report["questions"] == {"math": {"questions": 3, "trained_on": 2, "heldout": 0}}
    for text in (table_text(report), (run / "report.md").read_text(), (run / "report.html").read_text()):
        assert "Task questions that are also prompts" in text
    recipe = load_recipe(run / "recipe.yaml")
    (task,), caches = recipe.evaluate.tasks, [Cache.open(run / "cache")]
    assert among_caches(recipe, task, caches) == report["questions"]["math"]
    assert "2 of 3 questions are also among the prompts" in sentence("math", report["questions"]["math"])
    assert sentence("math", {"questions": 3, "trained_on": 0, "heldout": 0}) == ""


def test_held_out_questions_are_counted_apart(tmp_path: Path) -> None:
    recipe = load_recipe(run_with_questions(tmp_path / "run", heldout=0.5) / "recipe.yaml")
    (task,) = recipe.evaluate.tasks
    keys = {question_key(text, "first question") for text in ("prompt 3", " prompt \n 4", "none")}
    held = sum(is_heldout(question_key(text, "first question"), 0.5) for text in ("prompt 3", "prompt 4"))
    assert among_groups(recipe, task, keys) == {"questions": 3, "trained_on": 2 - held, "heldout": held}


def test_a_run_that_was_moved_is_read_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    text = (run / "recipe.yaml").read_text().replace(str(run), "runs/demo")
    (run / "recipe.yaml").write_text(text)
    shutil.move(run, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "elsewhere", Path("elsewhere")):
        found = read_run(place)
        assert found.missing == []
        assert found.cache["rows"] == 30


@pytest.mark.slow
def test_one_row_has_no_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for low in (None, 0.12):
        result = json.loads((run / "evaluate" / "kd.json").read_text())
        result["heldout"] |= {"rows": 1, "kl_low": low, "kl_high": low}
        write_json(run / "evaluate" / "kd.json", result)
        assert build_report([run])["missing"] == []
        assert "0.1200 (b)<small>one row</small>" in (run / "report.html").read_text()


@pytest.mark.slow
def test_no_figure_is_the_best_where_intervals_overlap(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run"
    )  # scores of kd and sft are 0.16 wide intervals; aiops and math overlap, KL does not
    build_report([run])
    text = (run / "report.html").read_text()
    best = re.findall(r'<td class="best" data-label="([^"]*)">([^<]*)', text)
    assert best == [("held-out KL", "0.1200")]


@pytest.mark.slow
def test_the_headline_says_every_model_and_the_kl(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    build_report([run])
    (scores, kls) = re.findall(r'<p class="lead">(.*?)</p>', (run / "report.html").read_text())
    plain = [re.sub("<[^>]*>", "", lead) for lead in (scores, kls)]
    assert plain[0] == (
        "kd scores, in the mean of the tasks, 63.3 %, against sft 53.0 %, base 8.7 %, teacher 92.3 %: 65 % of the way "
        "from base to teacher."
    )
    assert "0.1200 nats, against sft 0.3300 nats, base 2.4100 nats, teacher 0.0003 nats" in plain[1]


@pytest.mark.slow
def test_no_teacher_counts_as_a_student(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", "other")
    text = (run / "recipe.yaml").read_text().replace("[teacher, base", "[teacher, expert, base")
    (run / "recipe.yaml").write_text(f"{text}teachers: {{expert: {{model: {run}/expert}}}}\n")
    write_evaluation(run, "expert", {"math": 0.99, "code": 0.99, "aiops": 0.99}, 0.0001)
    write_evaluation(other, "teacher", {"math": 0.99, "code": 0.99, "aiops": 0.99}, 0.0001)
    for runs, name in (([run], "expert"), ([make_run(tmp_path / "alone"), other], "other/teacher")):
        report = build_report(runs, tmp_path / "report")
        page = (tmp_path / "report" / "report.html").read_text()
        assert report["models"][name]["role"] == "teacher"
        assert not any(name in lead for lead in re.findall(r'<p class="lead">(.*?)</p>', page))
        assert re.findall(r'<td class="best" data-label="([^"]*)">([^<]*)', page)[-1] == ("held-out KL", "0.1200")
        beside = [pair["other"] for pair in report["differences"] if pair["model"] == name]
        assert beside == ["teacher"] * (name != "expert")
        assert not any(pair["other"] == name for pair in report["differences"])


def test_the_headline_names_of_many_other_students_the_best() -> None:
    scores = {"teacher": 0.9, "base": 0.1, "a": 0.5, "b": 0.7, "c": 0.6, "d": None, "e": 0.2, "kd": 0.65}
    models = {
        name: {
            "role": name if name in ("teacher", "base") else "student",
            "mean_score": score,
            "gap_closed": None,
            "heldout": {"kl_nats": 1 - score} if score else None,
            "tasks": {},
        }
        for name, score in scores.items()
    }
    found = re.sub("<[^>]*>", "", _lead({"models": models}))
    said = "against the best of 4 other students, b, {}, base {}, teacher {}."
    assert said.format("70.0 %", "10.0 %", "90.0 %") in found
    assert said.format("0.3000 nats", "0.9000 nats", "0.1000 nats") in found


def test_a_stage_that_did_not_train_to_its_end_is_said_at_the_top(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    health = json.loads((run / "train" / "kd" / "health.json").read_text())
    health |= {"healthy": False, "checks": {**health["checks"], "all_steps_done": False, "model_saved": False}}
    write_json(run / "train" / "kd" / "health.json", health)
    assert build_report([run])["missing"] == [
        "stage 'kd' did not train to its end (all steps done: no, model saved: no), so figures of it are of what it "
        "had reached"
    ]
    write_json(run / "train" / "kd" / "health.json", {**health, "stopped": "the <b>gradients</b> grew"})
    assert "(the <b>gradients</b> grew)" in build_report([run])["missing"][0]
    page = (run / "report.html").read_text()
    assert "stopped: the &lt;b&gt;gradients&lt;/b&gt; grew" in page
    assert "model_saved (the \\<b\\>gradients" in (run / "report.md").read_text().replace("\\_", "_")


@pytest.mark.slow
def test_figures_of_different_layers_or_rows_carry_letters(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for change in ({"layer": "top8-00000000"}, {"rows": 60}):
        result = json.loads((run / "evaluate" / "kd.json").read_text())
        write_json(run / "evaluate" / "kd.json", {**result, "heldout": {**result["heldout"], **change}})
        report = build_report([run])
        assert "0.1200 (b)" in table_text(report)
        assert "0.3300 (a)" in (run / "report.md").read_text()
        for text in (table_text(report), (run / "report.md").read_text(), (run / "report.html").read_text()):
            assert "do not compare" in text
        assert len(re.findall('<p class="lead">', (run / "report.html").read_text())) == 1
        write_json(run / "evaluate" / "kd.json", result)
    assert "(a)" not in table_text(build_report([run]))


@pytest.mark.slow
def test_a_report_says_when_where_and_how_fast(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    made = {
        "date": "2026-01-02T03:04+00:00",
        "decant": "0.1",
        "machine": "x86_64, 2 cores",
        "peak_memory_bytes": 3 * 10**8,
    }
    result = json.loads((run / "evaluate" / "kd.json").read_text())
    write_json(run / "evaluate" / "kd.json", {**result, "made": {**made, "memory_of": "resident memory"}})
    rates = [{"step": step, "tokens_per_second": rate} for step, rate in ((1, 10.0), (2, 5000.0), (3, 6000.0))]
    (run / "train" / "kd" / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rates))
    said = dict(run_rows(build_report([run])))
    assert said["evaluated"] == "2026-01-02 03:04 UTC"
    assert said["machine"] == "x86_64, 2 cores"
    assert said["peak memory of evaluation"] == "300.0 MB resident memory"
    assert said["train.kd"] == "5,000 tokens/s"


def test_shares_that_only_jitter_are_not_drawn() -> None:
    rng = random.Random(0)
    jitter = [{"step": i, "tokens_by_source": {"a": 500 + rng.randrange(200), "b": 600}} for i in range(400)]
    moving = [{"step": i, "tokens_by_source": {"a": 100 + 2 * i, "b": 600}} for i in range(400)]
    drawn = [
        [title for title, _ in schedule_plots("kd", schedule_series(rows, [])) if "Shares" in title]
        for rows in (jitter, moving)
    ]
    assert drawn == [[], ["Shares of the sources of stage kd"]]


@pytest.mark.slow
def test_the_marked_token_stands_near_the_start_of_its_card(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    result = json.loads((run / "evaluate" / "kd.json").read_text())
    result["heldout"]["partings"][0]["before"] = "a line\n" * 40 + "long words " * 90
    write_json(run / "evaluate" / "kd.json", result)
    build_report([run])
    contexts = re.findall(r'<pre class="context">(.*?)<mark>', (run / "report.html").read_text(), re.DOTALL)
    assert max(map(len, contexts)) <= 170
    assert max(context.count("\n") for context in contexts) <= 2


def with_rows(run: Path, model: str, rows: dict[str, list[float]], layer: str = "top8-00000000") -> None:
    result = json.loads((run / "evaluate" / f"{model}.json").read_text())
    result["heldout"] |= {"row_kl": rows, "layer": layer, "positions": sum(positions for positions, _ in rows.values())}
    write_json(run / "evaluate" / f"{model}.json", result)


@pytest.mark.slow
def test_models_are_compared_on_common_rows_and_questions(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "one", "one"), make_run(tmp_path / "two", "two")
    rng = random.Random(3)
    own = {f"{i:032x}": [10 + i % 3, rng.random()] for i in range(40)}
    better = {key: [positions, kl - 0.1 * positions + rng.random() / 99] for key, (positions, kl) in own.items()}
    with_rows(first, "kd", own)
    with_rows(second, "kd", {**dict(list(better.items())[:30]), "f" * 32: [5, 1.0], list(better)[35]: [99, 0.0]})
    report = build_report([first, second], tmp_path / "both")
    (one,) = [pair for pair in report["differences"] if (pair["model"], pair["other"]) == ("two/kd", "kd")]
    keys = list(own)[:30]
    expected = sum(better[key][1] - own[key][1] for key in keys) / sum(own[key][0] for key in keys)
    assert one["kl_nats"]["difference"] == pytest.approx(expected)
    assert one["kl_nats"]["rows"] == 30
    assert one["kl_nats"]["low"] <= expected <= one["kl_nats"]["high"] < 0
    assert one["scores"]["math"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "rows": 12}
    assert "two/kd − kd" in table_text(report)
    assert not any("row_kl" in (model["heldout"] or {}) for model in report["models"].values())
    with_rows(second, "kd", better, layer="top4-00000000")
    other = build_report([first, second], tmp_path / "both")["differences"]
    assert [pair["kl_nats"] for pair in other if pair["model"] == "two/kd" and pair["other"] == "kd"] == [None]


@pytest.mark.slow
def test_paired_scores_are_the_mean_difference_over_questions(run_of_scores: Path) -> None:
    (pair,) = [pair for pair in build_report([run_of_scores])["differences"] if pair["model"] == "kd"]
    assert pair["other"] == "sft"
    part = pair["scores"]["math"]
    assert (part["difference"], part["rows"]) == (pytest.approx(0.25), 8)
    assert -0.2 <= part["low"] <= 0.25 <= part["high"] <= 0.7


@pytest.fixture
def run_of_scores(tmp_path: Path) -> Path:
    """kd is right where sft is, and on two more of eight questions."""
    run = make_run(tmp_path / "run")
    for model, right in (("sft", 3), ("kd", 5)):
        rows = [
            {"domain": "math", "question": i, "prompt": f"q{i}", "answer": "a", "score": float(i < right), "tokens": 1}
            for i in range(8)
        ]
        path = run / "evaluate" / f"{model}.answers.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_a_cache_without_a_teacher_beside_one_that_was_scored_takes_nothing_off_its_means(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    alone = read_run(run).cache
    write_cache(tmp_path / "given", scored=False)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace(f"cache: {run}/cache", f"cache: [{run}/cache, {tmp_path}/given]"))
    both = read_run(run)
    assert both.cache["positions"] == 2 * alone["positions"]
    for name in ("mean_entropy_nats", "mean_support", "bytes_per_position", "entropy_bin_nats"):
        assert both.cache[name] == pytest.approx(alone[name])
    assert dict(run_rows(report_figures([both])))["teacher's entropy"].endswith(" nats")


def test_shares_of_translated_caches_are_averaged() -> None:
    parts = [{"positions": 10, "share_with_head": 0.5, "rows": 1}, {"positions": 30, "share_with_head": 0.9, "rows": 2}]
    assert _sum_stats(parts) == {"positions": 40, "share_with_head": pytest.approx(0.8), "rows": 3}


def test_peak_memory_of_what_is_not_said_is_shown_all_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    result = json.loads((run / "evaluate" / "kd.json").read_text())
    write_json(run / "evaluate" / "kd.json", {**result, "made": {"peak_memory_bytes": 3 * 10**8}})
    assert ("peak memory of evaluation", "300.0 MB") in run_rows(report_figures([read_run(run)]))
