"""A report of a finished run, an unfinished one and several: its files agree, nothing in it can run, missing parts are
named.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shared.errors import EvaluationError
from tests.tools.report.fake_run import DOMAINS, HOSTILE, KL, SCORES, make_run, write_evaluation, write_json
from tools import cli
from tools.evaluate.results.run_shapes import Evaluation, fault_of
from tools.phases import report as print_report
from tools.report.answer_filter import SCRIPT
from tools.report.build import REPORT_FILES, build_report
from tools.report.run_files import read_run
from tools.report.samples import Sample, SampleAnswer, choose_samples
from tools.report.tables import table_text
from tools.report.views.answers_view import outcomes
from tools.report.views.plots import MOST_POINTS, thinned


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_run(tmp_path_factory.mktemp("report") / "demo")
    build_report([root])
    return root


class Page(HTMLParser):
    """Collects elements, their attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_json_has_the_documented_layout_and_the_figures_on_disk(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert list(report["models"]) == ["teacher", "base", "sft", "kd"]
    for name, figures in report["models"].items():
        assert [figures["tasks"][domain]["score"] for domain in DOMAINS] == list(SCORES[name])
        assert figures["heldout"]["kl_nats"] == KL[name]
        assert {"top1_agreement", "perplexity"} <= figures["heldout"].keys()
    assert report["cache"]["rows"] == 30
    assert report["cache"]["positions"] == 900
    assert report["cache"]["bytes_per_position"] > 1
    assert report["cache"]["mean_support"] > 1
    assert report["seconds"]["train.kd"] == 83.5
    assert report["missing"] == []
    kd, base, teacher = (sum(SCORES[name]) / 3 for name in ("kd", "base", "teacher"))
    assert report["models"]["kd"]["gap_closed"] == pytest.approx((kd - base) / (teacher - base))


def test_every_rendering_shows_the_same_figures(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    page = Page((run / "report.html").read_text())
    for text in (page.text, (run / "report.md").read_text(), table_text(report)):
        for figure in ("55.0 %", "61.0 %", "63.3 %", "0.1200", "3.12", f"{report['cache']['bytes_per_position']:.1f}"):
            assert figure in text
    with (run / "models.csv").open() as stream:
        rows = {row["model"]: row for row in csv.DictReader(stream)}
    assert {name: float(row["math_score"]) for name, row in rows.items()} == {
        name: scores[0] for name, scores in SCORES.items()
    }


def test_held_out_figures_are_shown_by_source_and_bins_are_drawn(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    for text in (page.text, (run / "report.md").read_text()):
        for figure in ("87.6 %", "3.2 %", "73.7 %", "4.7 %", "1,234", "0.2400"):
            assert figure in text
    for axis in ("it is the token that followed", "the model's is the same"):
        assert axis in page.text
    with (run / "models.csv").open() as stream:
        assert {float(row["top1_in_teacher_top5"]) for row in csv.DictReader(stream)} == {0.876}


@pytest.mark.parametrize(
    "change",
    [
        {"calibration": [{"confidence": "high"}]},
        {"by_source": {"math": {"kl_nats": "far"}}},
        {"calibration_error": "big"},
    ],
)
def test_malformed_held_out_details_are_no_evaluation(run: Path, change: dict) -> None:
    result = json.loads((run / "evaluate" / "kd.json").read_text())
    assert not fault_of(Evaluation, result)
    assert fault_of(Evaluation, {**result, "heldout": {**result["heldout"], **change}})
    older = {key: result["heldout"][key] for key in ("kl_nats", "kl_low", "kl_high", "top1_agreement", "perplexity")}
    assert not fault_of(Evaluation, {**result, "heldout": older})


def test_rebuilding_changes_no_byte(run: Path) -> None:
    before = {name: (run / name).read_bytes() for name in REPORT_FILES}
    build_report([run])
    assert {name: (run / name).read_bytes() for name in REPORT_FILES} == before


def test_the_page_is_one_file_that_runs_its_own_script_alone_and_fetches_nothing(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = Page(text)
    assert len(text.encode()) < 3_000_000
    assert not {tag for tag, _ in page.tags} & {"img", "iframe", "object", "embed", "link", "form", "base"}
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert scripts == [SCRIPT]
    attributes = [(tag, name, value or "") for tag, attrs in page.tags for name, value in attrs.items()]
    assert not [name for _, name, _ in attributes if name.startswith("on")]
    assert all(value.startswith("#") for _, name, value in attributes if name in ("href", "xlink:href", "src"))
    policy = next(attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs)
    assert "default-src 'none'" in policy
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert re.search(r"script-src ([^;]*)", policy).group(1) == f"'sha256-{digest}'"
    assert "url(http" not in text


def test_a_models_answer_is_shown_as_text_whatever_it_contains(run: Path) -> None:
    write_json(run / "hostile-is-in-the-answers.json", HOSTILE)
    samples = choose_samples(read_run(run), per_domain=12)
    assert any("<script>" in answer.text for sample in samples for answer in sample.answers.values())
    assert not any(
        "\x1b" in answer.text or "\u202e" in answer.text for sample in samples for answer in sample.answers.values()
    )


def test_hostile_names_and_answers_stay_text_in_the_page(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", name="demo")
    write_evaluation(root, "base", {"<b>math</b>": 0.5, "code|x": 0.25, "ai\u202eops": 0.5}, 1.0)
    for model in SCORES:
        lines = (root / "evaluate" / f"{model}.answers.jsonl").read_text().splitlines()
        (root / "evaluate" / f"{model}.answers.jsonl").write_text("\n".join([*lines[:1], "{torn", *lines[1:]]))
    build_report([root])
    page = Page((root / "report.html").read_text())
    assert "<script>document.title='owned'</script>" in page.text
    assert "<b>math</b>" in page.text
    assert "ai\\u202eops" in page.text and not any(mark in page.text for mark in "\u202e\u2066\x1b")
    assert [tag for tag, _ in page.tags if tag in ("script", "img")] == ["script"]
    assert r"code\|x" in (root / "report.md").read_text()


def test_samples_tell_models_apart_and_do_not_change(run: Path) -> None:
    samples = choose_samples(read_run(run))
    assert samples == choose_samples(read_run(run))
    assert {sample.domain for sample in samples} == set(DOMAINS)
    first = samples[0].answers
    assert (first["base"].score, first["kd"].score) == (0.0, 1.0)


def test_an_unfinished_run_is_reported_with_what_is_missing(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    (root / "evaluate" / "kd.json").unlink()
    (root / "evaluate" / "sft.json").write_text('{"tasks": {"math": {"score": "high"}}}')
    (root / "train" / "kd" / "metrics.jsonl").unlink()
    (root / "train" / "sft" / "health.json").unlink()
    (root / "seconds.json").write_text("{")
    (root / "cache" / "cache.json").unlink()
    report = build_report([root])
    said = " ".join(report["missing"])
    for what in (
        "'kd' was not evaluated",
        "evaluation of 'sft' cannot be read",
        "stage 'kd' has no metrics",
        "stage 'sft' has no health",
    ):
        assert what in said
    assert "seconds.json" in said
    assert "is not a cache" in said
    assert list(report["models"]) == ["teacher", "base"]
    assert "not evaluated" in Page((root / "report.html").read_text()).text
    assert "note:" in table_text(report)


def test_a_run_with_nothing_but_a_recipe_still_has_a_report(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    for path in [*root.glob("evaluate/*"), *root.glob("train/*/*")]:
        path.unlink()
    report = build_report([root])
    assert report["models"] == {}
    assert "no model was evaluated" in table_text(report)
    assert "No model was evaluated yet" in (root / "report.html").read_text()


def test_the_command_prints_the_reports_table_with_mean_cache_and_time(run: Path) -> None:
    report, text = print_report([run])
    assert text.startswith(table_text(report))
    for figure in ("mean", "63.3 %", "bytes per position", "train.kd 1 min 24 s", "0.1200"):
        assert figure in text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no such directory"):
        build_report([tmp_path / "none"])
    with pytest.raises(EvaluationError, match="not a run"):
        build_report([tmp_path])
    with pytest.raises(EvaluationError, match="no run to report on"):
        build_report([])


@pytest.mark.slow
def test_several_runs_share_one_table_and_equal_models_appear_once(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "one", "one"), make_run(tmp_path / "two", "two")
    write_evaluation(second, "kd", dict(zip(DOMAINS, (0.6, 0.6, 0.6), strict=True)), 0.1)
    before = {path: path.read_bytes() for run in (first, second) for path in run.rglob("*") if path.is_file()}
    with pytest.raises(EvaluationError, match="--output DIR"):
        build_report([first, second])
    with pytest.raises(EvaluationError, match="one of the runs"):
        build_report([first, second], second)
    with pytest.raises(EvaluationError, match="a run is named twice"):
        build_report([first, tmp_path / "one" / ".." / "one"], tmp_path / "both")
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="there is a file of that name"):
        build_report([first], tmp_path / "file")
    report = build_report([first, second], tmp_path / "a" / "both")
    assert {name.name for name in (tmp_path / "a" / "both").iterdir()} == set(REPORT_FILES)
    assert {path: path.read_bytes() for run in (first, second) for path in run.rglob("*") if path.is_file()} == before
    assert list(report["models"]) == ["teacher", "base", "sft", "kd", "two/kd"]
    assert set(report["stages"]) == {"sft", "kd", "two/sft", "two/kd"}
    assert not (second / "report.html").exists()


def test_long_curves_are_thinned_by_averages() -> None:
    xs = [float(step) for step in range(100_001)]
    places, means = thinned(xs, [2 * x for x in xs])
    assert len(places) <= MOST_POINTS
    assert (places[0], places[-1]) == (0.0, 100_000.0)
    assert sum(means) / len(means) == pytest.approx(100_000, rel=0.01)
    assert thinned(xs[:5], xs[:5]) == (xs[:5], xs[:5])


def test_a_stage_with_several_terms_shows_each_of_them(run: Path) -> None:
    plots = re.findall(
        r"<figcaption>([^<]*)</figcaption>(.*?)</figure>", (run / "report.html").read_text(), flags=re.DOTALL
    )
    shown = dict(plots)
    assert "forward_kl" in shown["Training loss of stage kd"]
    assert "forward_kl" not in shown["Training loss of stage sft"]


def test_ids_in_plots_are_unique_and_every_reference_has_its_target(run: Path) -> None:
    text = (run / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 20
    assert set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', text)) <= set(ids)


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        ({"teacher": 1, "base": 0, "kd": 1}, ["better"]),
        ({"teacher": 1, "base": 1, "sft": 1, "kd": 0}, ["worse"]),
        ({"teacher": 1, "base": 0, "kd": 0}, ["teacher"]),
        ({"teacher": 0, "base": 0, "kd": 0}, ["wrong"]),
        ({"teacher": 1, "base": 1, "kd": 1}, []),
        ({"teacher": 1, "other": 1, "base": 0, "kd": 0}, ["teacher"]),
        ({"teacher": 1}, []),
    ],
)
def test_an_outcome_says_who_was_right(right: dict[str, int], expected: list[str]) -> None:
    answers = {name: SampleAnswer("", float(score), "") for name, score in right.items()}
    students = tuple(name for name in right if name in ("sft", "kd"))
    assert outcomes(Sample("math", "", "", answers, students)) == expected


def test_partings_stand_in_the_page_as_text_and_broken_ones_are_left_out(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert text.count('class="card parting"') == sum(model != "teacher" for model in SCORES)
    page = Page(text)
    assert "3.25 nats" in page.text
    assert "marked token 12.5 %" in page.text
    assert "not a number" not in page.text


@pytest.mark.slow
def test_words_stand_left_and_models_without_scores_are_not_drawn(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "one", "one"), make_run(tmp_path / "two", "two")
    write_evaluation(second, "kd", {}, 0.1)
    build_report([first, second], tmp_path / "both")
    page = (tmp_path / "both" / "report.html").read_text()
    scores = page.split("Scores per domain")[1].split("</figure>")[0]
    assert "two/kd" in page
    assert "two/kd" not in scores
    assert '<th class="w">model</th><th class="w">source</th><th>positions</th>' in page


def test_the_command_says_what_it_wrote_and_what_comes_next(tmp_path, capsys):
    run = make_run(tmp_path / "my run")
    assert cli.main(["report", str(run)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    wrote, following = last.removeprefix("wrote ").split("; next: ")
    assert [Path(name).name for name in wrote.split(", ")] == ["report.html", "report.md", "models.csv", "report.json"]
    assert Path(wrote.split(", ")[0]) == run / "report.html"
    assert shlex.split(following) == ["decant", "export", str(run)]
