"""A run's files with any value changed still have a report, or are refused in a sentence; no text becomes a command."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.errors import DecantError
from tests.tools.report.fake_run import make_run, write_evaluation, write_json
from tools.evaluate.results.run_shapes import Bin, Evaluation, fault_of, read_lines, read_object
from tools.evaluate.side_by_side.terms import num_kept, terms_of
from tools.evaluate.tasks.code_answer import program_of
from tools.report.build import build_report
from tools.report.views import confidence_plots, plots, schedule_view

ODD = [
    *(None, True, False, 0, -1, 1e308, -1e308, float("nan"), float("inf"), 10**400, -(10**400), 2**63, "", "x", "1e5"),
    *("\ud800", "\x00", [], {}, [1], {"a": 1}, [[]], [None], 0.1, 10**15, {"": {}}, [{}]),
]
ODD_NAMES = ["\ud800", "x" * 300, "", "$\\frac{$", "\x00"]


def full_run(root: Path) -> Path:
    """Return a run that has every kind of file."""
    run = make_run(root)
    lines = [{"step": i, "kl_nats": 1 / i, "by_source": {"a": {"kl_nats": 0.1}, "b": {"kl_nats": 0.2}}} for i in (1, 2)]
    write_lines(run / "train" / "kd" / "evaluations.jsonl", lines)
    for path in [*run.glob("train/*/metrics.jsonl"), *run.glob("evaluate/*.answers.jsonl")]:
        path.write_text("\n".join(path.read_text().splitlines()[:6]) + "\n")
    cost = dict.fromkeys(
        ("parameters", "weights_bytes", "seconds_to_first_token", "tokens_per_second", "speed_up"), 1.5
    )
    write_json(
        run / "evaluate" / "cost" / "figures.json", {"models": {"teacher": cost, "kd": {**cost, "memory_of": "x"}}}
    )
    harness = {"tasks": {"arc": {"acc": {"value": 0.5, "stderr": 0.1}}}}
    write_json(run / "evaluate" / "lm_eval" / "kd.json", harness)
    (run / "evaluate" / "side_by_side").mkdir()
    for name in ("teacher", "kd"):
        row = {"prompt": "p", "answer": "a 5 ms", "reference": "r", "tokens": 3, "truncated": False}
        rows = [{"temperature": at, "number": i, **row} for at in (0.1, 1.0) for i in range(3)]
        write_lines(run / "evaluate" / "side_by_side" / f"{name}.answers.jsonl", rows)
    alike = {"answers": 3, "cut": 0.1, "repeating": 0.1, "repeated": 0.1, "mean_tokens": 4.0, "beside_teacher": 1.1}
    health = json.loads((run / "train" / "kd" / "health.json").read_text())
    write_json(run / "train" / "kd" / "health.json", {**health, "rounds": [{"round": i, **alike} for i in (1, 2)]})
    write_lines(run / "train" / "kd" / "timing.jsonl", [{"step": i, "tokens_per_second": 9.5} for i in (1, 2)])
    made = {"date": "2026-01-02T03:04+00:00", "decant": "0.1", "machine": "x", "peak_memory_bytes": 5, "memory_of": "y"}
    for path in run.glob("evaluate/*.json"):
        found = json.loads(path.read_text())
        found["heldout"] |= {
            "own": {"kl_nats": 0.5, "kl_low": 0.4, "kl_high": 0.6, "rows": 3, "answers": alike},
            "by_layer": {"teacher": {"kl_nats": 0.1}, "other": {"kl_nats": 0.2}},
            "row_kl": {f"{i:032x}": [10, 0.5 * i] for i in range(3)},
            "layer": "top8-00000000",
        }
        write_json(path, {**found, "made": made})
    pairs = [{"of": of, "to": to, "kl_nats": 0.3} for of, to in (("teacher", "other"), ("other", "teacher"))]
    write_json(run / "evaluate" / "teachers" / "distances.json", {"pairs": pairs, "without_head": ["third"]})
    part = dict.fromkeys(("mean_kl", "worst_kl", "worst_label", "worst_tail", "top1_agreement"), 0.1)
    faithfulness = {"rows": 3, "unfaithful": [], "stored": part, "control": part, "codec": part}
    lost = dict.fromkeys(("mass", "temperature", "kl_lost", "gradient_error", "mean_gradient_error"), 0.5)
    truncation = [{"k": 1, "draws": 0, "bytes_per_position": 1.0, "own": True, **lost}]
    write_json(run / "audit.json", {"faithfulness": faithfulness, "truncation": truncation, "completion": "x"})
    return run


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield before
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*before, key))


def changed(value: Any, rng: random.Random) -> Any:
    """Return the value with one part odd, gone, or under an odd name."""
    place = rng.choice(list(places(value)))
    if not place:
        return rng.choice(ODD)
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    if isinstance(holder, dict) and rng.random() < 0.15:
        kept = holder.pop(place[-1])
        if rng.random() < 0.5:
            holder[rng.choice(ODD_NAMES)] = kept
    else:
        holder[place[-1]] = rng.choice(ODD)
    return value


@pytest.mark.parametrize("trials", [12, pytest.param(600, marks=pytest.mark.slow)])
def test_no_odd_value_ends_the_report_with_a_traceback(
    tmp_path: Path, trials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rng, run = full_run(tmp_path / "base"), random.Random(trials), tmp_path / "run"
    files = [path.relative_to(base) for path in base.rglob("*.json*") if "cache" not in path.parts]
    draw, refused = plots.svg_of, 0
    for trial in range(trials):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(base, run)
        path = run / rng.choice(files)
        if path.suffix == ".json":
            path.write_text(json.dumps(changed(json.loads(path.read_text()), rng)))
        else:
            rows = path.read_text().splitlines()
            number = rng.randrange(len(rows))
            rows[number] = json.dumps(changed(json.loads(rows[number]), rng))
            path.write_text("\n".join(rows))
        for module in (plots, schedule_view, confidence_plots):
            monkeypatch.setattr(module, "svg_of", draw if trial % 10 == 0 else lambda label, made: "<svg></svg>")
        try:
            build_report([run])
        except DecantError:
            refused += 1
    assert refused < trials / 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "it is no JSON"),
        ("[]", "it is a list, expected an object"),
        ('{"tasks": {"math": {"score": 2, "low": 0, "high": 1}}, "heldout": null}', "tasks.math.score is 2: "),
        ('{"tasks": {}}', "heldout is missing"),
        ('{"tasks": {}, "heldout": null, "x": ' + "[" * 60 + "]" * 60 + "}", "nested deeper than"),
        ('{"tasks": {}, "heldout": {"kl_nats": 1' + "0" * 400 + ', "top1_agreement": 1}}', "more than 15 digits"),
        ("{" + " " * 9, "it is no JSON"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "kd.json").write_text(text)
    value, why = read_object(tmp_path / "kd.json", Evaluation)
    assert value is None
    assert says in why


def test_each_line_of_a_file_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"confidence": 0.5, "right": 1}\n\n{"confidence": "0.5", "right": 1}\n{torn')
    rows, faults = read_lines(tmp_path / "a.jsonl", Bin)
    assert rows == [{"confidence": 0.5, "right": 1}]
    assert [fault.split(": ")[0] for fault in faults] == ["a.jsonl:3", "a.jsonl:4"]
    assert read_lines(tmp_path / "none.jsonl", Bin) == ([], [])
    assert read_object(tmp_path / "none.json", Bin) == (None, "")
    assert fault_of(Bin, {"confidence": True, "right": 1}) != ""


def test_what_is_left_out_is_named_in_the_report(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run")
    with (run / "train" / "kd" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "loss": "high"}\n')
    write_json(run / "audit.json", {"faithfulness": {}, "truncation": []})
    said = " ".join(build_report([run])["missing"])
    assert "stage 'kd': one line is left out: metrics.jsonl:7: loss is 'high'" in said
    assert "the audit: audit.json is left out: faithfulness" in said


def test_no_cell_is_a_formula_and_no_text_steers_a_terminal(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_evaluation(run, "x", {'=HYPERLINK("http://e")': 0.5, "\x1b]0;title\x07\x1b[31m": 0.25}, 1.0)
    for name in ("=cmd|' C calc'!A0", "+1", "-1", "@a", "\t=1"):
        shutil.copy(run / "evaluate" / "x.json", run / "evaluate" / f"{name}.json")
    (run / "evaluate" / "x.json").unlink()
    build_report([run])
    with (run / "models.csv").open() as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t"))]
    assert "'+1" in cells
    for name in ("models.csv", "report.md"):
        assert "\x1b" not in (run / name).read_text()
        assert "\x07" not in (run / name).read_text()


DEGENERATE = ["1,", "1.", "a", "a.b", "$1", "`", "A", "Ab ", "x_", "node7 ", " , A", "5 ms,"]


@pytest.mark.parametrize("piece", DEGENERATE)
def test_degenerate_answers_cost_no_more_than_others(piece: str) -> None:
    """A quadratic pattern would take hours here."""
    answer = piece * (300_000 // len(piece))
    (terms,) = terms_of([answer])
    assert num_kept(terms, answer) == len(terms)


@pytest.mark.parametrize("answer", ["```" + " " * 300_000 + "x!", "```py" + " \t" * 150_000 + "!", "def f(" * 50_000])
def test_degenerate_code_costs_no_more_than_other_code(answer: str) -> None:
    assert program_of("def f(x):\n", answer, "f")
