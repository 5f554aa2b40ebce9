"""What moved over a stage's steps, in report.json and as plots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools.report.fake_run import write_stage
from tools.report.build import build_report
from tools.report.views.plots import legend_above, short_names, svg_of
from tools.report.views.schedule_view import schedule_plots, schedule_series

STEPS = 1000


def write_course(root: Path) -> None:
    """A stage whose weight, temperature and shares move, evaluated every 100 steps; one evaluation is broken."""
    write_stage(root / "train/kd", ["forward_kl"], steps=STEPS)
    path = root / "train/kd/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        progress = (row["step"] - 1) / (STEPS - 1)
        row["weights"] = {"forward_kl": 1 - progress, "cross_entropy": 0.5}
        row["temperatures"] = {"forward_kl": 2.0 if progress < 0.5 else 1.0}
        row["tokens_by_source"] = {"general": 1000 * (1 - progress), "medical": 1000 * progress}
    rows[7]["weights"] = {"forward_kl": "much", "cross_entropy": None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        {
            "step": step,
            "kl_nats": 2 - step / 1000,
            "by_source": {"general": {"kl_nats": 1.0}, "medical": {"kl_nats": 3 - step / 500}},
        }
        for step in range(0, STEPS + 1, 100)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1100, "kl_nats": "nan", "by_source": [1]}\n'
    (root / "train/kd/evaluations.jsonl").write_text(text)


def test_series_of_a_run_are_in_the_json_as_configured_and_drawn_in_the_page(tmp_path):
    write_course(tmp_path)
    build_report([tmp_path])
    train = json.loads((tmp_path / "report.json").read_text())["train"]["kd"]
    assert train["steps"] == STEPS
    assert train["evaluations"][3]["kl_nats"] == 1.7
    for title, name, wanted in (
        ("weights", "forward_kl", lambda progress: 1 - progress),
        ("shares", "medical", lambda progress: progress),
    ):
        points = train[title][name]
        assert 300 < len(points) <= 400
        assert (points[0][0], points[-1][0]) == (1, STEPS)
        assert all(value == pytest.approx(wanted((step - 1) / (STEPS - 1)), abs=3 / STEPS) for step, value in points)
    assert {value for _, value in train["temperatures"]["forward_kl"]} == {1.0, 2.0}
    assert [step for step, _ in train["heldout_kl_nats"]["medical"]] == list(range(0, STEPS + 1, 100))
    page = (tmp_path / "report.html").read_text()
    for title in ("Loss weights", "Temperatures", "Shares of the sources", "Held-out KL while training"):
        assert f"{title} of stage kd" in page


def test_what_did_not_move_is_not_drawn():
    steps = [
        {"step": i, "weights": {"a": 1.0}, "temperatures": {"a": 1.0}, "tokens_by_source": {"x": i + 1}}
        for i in range(9)
    ]
    assert schedule_plots("kd", schedule_series(steps, [])) == []
    nothing = {"weights": {}, "temperatures": {}, "shares": {}, "heldout_kl_nats": {}, "answers": {}}
    assert schedule_series([{"step": 1}], []) == nothing


def test_answers_of_rounds_are_drawn_over_the_rounds():
    rounds = [{"round": n, "cut": 0.1 * n, "repeating": "x", "beside_teacher": 1.5, "answers": 9} for n in (1, 2, 3)]
    series = schedule_series([], [], rounds)
    assert series["answers"]["cut by length"] == [(1, 0.1), (2, 0.2), (3, pytest.approx(0.3))]
    assert set(series["answers"]) == {"cut by length", "length beside the teacher's"}
    ((title, plot),) = schedule_plots("own", series)
    assert title == "The student's answers over the rounds of stage own"
    assert plot.startswith("<svg")


@pytest.mark.parametrize("places", [(0, 1), (40, 41), (5, 70)])
def test_long_names_stay_apart_and_their_legend_fits_the_plot(places):
    names = [f"{'x' * place}{index}{'y' * (80 - place)}" for index in range(6) for place in places]
    boxes = []

    def draw(axes):
        for name, label in short_names(names).items():
            axes.plot([0, 1], [0, len(name)], label=label)
        legend_above(axes, 4, 1.2)
        axes.figure.draw_without_rendering()
        boxes.append((axes.get_legend().get_window_extent(), axes.figure.bbox, axes.get_window_extent()))

    svg_of("names", draw)
    shown = short_names(names)
    assert list(shown) and set(shown) == set(names)
    assert len(set(shown.values())) == len(names)
    assert max(map(len, shown.values())) <= 16
    ((legend, figure, plot),) = boxes
    assert figure.x0 <= legend.x0 and legend.x1 <= figure.x1
    assert plot.width > figure.width / 2
