"""`decant cache ...` on a small cache, against what the reader itself returns."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from shared.cache.cache import Cache
from shared.parts.jobs import create_job
from tests.shared.small_cache import HYBRID, TOP, build, targets_of
from tools import cli
from tools.cache import cache_commands
from tools.cache.cache_commands import listing, size
from tools.cache.dataset_card import dataset_card
from tools.cli_cache_parser import CACHE_COMMANDS


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "cache"
    build(path, layers=(TOP, HYBRID))
    return path


def run(capsys, *words, code=0) -> str:
    assert cli.main(["cache", *map(str, words)]) == code
    return capsys.readouterr().out


def test_every_command_has_its_function_and_its_place_in_the_readme():
    assert [name for name in CACHE_COMMANDS.names if not hasattr(cache_commands, f"_{name}")] == []
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    listed = re.findall(r"^\| `decant cache ([\w, ]+)` \|", readme, re.MULTILINE)
    assert sorted(", ".join(listed).split(", ")) == sorted(CACHE_COMMANDS.names)


def test_ls_counts_what_the_reader_reads(both, capsys):
    found = json.loads(run(capsys, "ls", both, "--json"))
    cache = Cache.open(both, TOP.name)
    assert found["rows"] == len(cache)
    assert found["positions"] == sum(cache[i].num_positions for i in range(len(cache)))
    assert {name.rsplit("-", 1)[0] for name in found["layers"]} == {TOP.name, HYBRID.name}
    assert all(layer["rows"] == len(cache) for layer in found["layers"].values())
    assert found["bytes"] == sum(file.stat().st_size for file in (both / "sequences").glob("*.arrow"))
    [job] = found["jobs"].values()
    planned = job.pop("planned")
    assert datetime.fromisoformat(planned).timestamp() == pytest.approx(
        next((both / "jobs").glob("*/plan.arrow")).stat().st_mtime, abs=60
    )
    assert job == {"units": 3, "committed": 3, "rows": len(cache), "generate": None}
    assert found["sources"] == dict(sorted(Counter(cache[i].source for i in range(len(cache))).items()))
    assert found["layers_bytes"] == sum(file.stat().st_size for file in (both / "targets").glob("*/*.arrow"))
    text = run(capsys, "ls", both)
    assert all(part in text for part in (f"{len(cache)} rows", TOP.name, HYBRID.name, "draws 4", "3 of 3 units"))


def test_ls_says_that_labels_are_in_the_head(both, tmp_path, capsys):
    assert "labels in the head" not in run(capsys, "ls", both)
    build(tmp_path / "cache", layers=(replace(TOP, label="head"),))
    assert "labels in the head" in run(capsys, "ls", tmp_path / "cache")


def test_ls_says_how_the_answers_of_each_job_were_drawn(tmp_path, capsys):
    build(tmp_path / "cache")
    for drawn in ({"temperature": 0.7, "top_p": 0.9, "stop": []}, {"temperature": 0.0, "max_new_tokens": 64}):
        create_job(tmp_path / "cache", {"generate": drawn}, [], 4)
    lines = [line for line in run(capsys, "ls", tmp_path / "cache").splitlines() if line.startswith("  job")]
    assert sum("temperature 0.7, top_p 0.9" in line and "stop" not in line for line in lines) == 1
    assert sum("max_new_tokens 64, temperature 0.0" in line for line in lines) == 1
    assert sum("drawn with" not in line for line in lines) == 1


@pytest.mark.parametrize("identity", [TOP, HYBRID])
def test_show_lists_each_supervised_token_with_the_stored_figures(both, capsys, identity):
    cache = Cache.open(both, identity.name)
    row = cache[3]
    shown = json.loads(run(capsys, "show", both, "--targets", identity.name, "--row", 3, "--top", 2, "--json"))
    assert [token["id"] for token in shown["tokens"]] == row.labels().tolist()
    assert [row.token_ids[token["at"]] for token in shown["tokens"]] == row.labels().tolist()
    offsets = row.targets.offsets()
    for s, token in enumerate(shown["tokens"]):
        head = range(offsets[s], offsets[s + 1])
        assert token["kept"] == len(head)
        assert [entry["id"] for entry in token["alternatives"]] == [int(row.targets.ids[i]) for i in head][:2]
        assert token["alternatives"][0]["logprob"] == pytest.approx(float(row.targets.logprobs[offsets[s]]), abs=1e-4)
        assert token["logprob"] == pytest.approx(float(row.targets.label_logprobs[s]), abs=1e-4)
        covered = np.exp(row.targets.logprobs[offsets[s] : offsets[s + 1]].astype(np.float64)).sum()
        assert token["tail_mass"]["1"] == pytest.approx(1 - covered, abs=1e-4)
        if identity.draws:
            assert sum(draw["times"] for draw in token["draws"]) in (0, identity.draws)


def test_show_without_a_row_is_a_page_of_the_cache(both, capsys):
    cache = Cache.open_sequences(both)
    page = json.loads(run(capsys, "show", both, "--json"))
    assert page["tokens"] == int(cache.num_tokens.sum())
    assert page["row_tokens"]["longest"] == int(cache.num_tokens.max())
    assert {sample["source"] for sample in page["samples"]} == set(cache.source_names)
    for sample in page["samples"]:
        assert sample["prompt"] == cache.sequence(sample["row"]).prompt
    assert {tail["kind"] for tail in page["tails"].values()} == {"exact"}
    text = run(capsys, "show", both)
    assert "licence CC0-1.0" in text
    assert f"decant init NAME --cache {both} --student DIR" in text


def test_show_text_has_a_line_per_token_with_probabilities(both, capsys):
    row = Cache.open(both, TOP.name)[0]
    lines = run(capsys, "show", both, "--targets", TOP.name).splitlines()
    start = next(i for i, line in enumerate(lines) if "the teacher would say" in line)
    assert len(lines) - start - 1 == row.num_positions
    assert f"{100 * math.exp(row.targets.label_logprobs[0]):.2f}" in lines[start + 1]


def test_show_writes_tokens_with_the_tokenizer_of_the_cache(tmp_path, capsys):
    from shared.cache.writing.cache_writer import CacheWriter
    from shared.identity.identity import SequencesIdentity
    from shared.parts.sequences import make_row
    from tests.tiny_models import VOCAB_SIZE, make_tokenizer

    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    ids = tokenizer("Anna has 7 apples<|im_end|>")["input_ids"]
    row = make_row(
        row_key=b"r" * 16, group_key=b"g" * 16, source="a", prompt="Anna", response="has 7\x1b apples", reference=None,
        token_ids=ids, spans=[(1, len(ids))], finish_reason="stop",
    )  # fmt: skip
    files = {"tokenizer.json": (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()}
    writer = CacheWriter.create_or_open(
        tmp_path / "cache", SequencesIdentity(tokenizer_hash="t", vocab_size=VOCAB_SIZE), files
    )
    writer.write_sequences("part-00000000-000000", [row], {})
    shown = json.loads(run(capsys, "show", tmp_path / "cache", "--row", 0, "--json"))
    assert [json.loads(token["text"]) for token in shown["tokens"]] == [tokenizer.decode([i]) for i in ids[1:]]
    text = run(capsys, "show", tmp_path / "cache", "--row", 0)
    assert "<|im_end|>" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("words, part", [
    (["show", "--row", "99"], "there is no row 99"), (["show", "--targets", "nothing"], "nothing"),
    (["show", "--top", "1"], "targets"),
])  # fmt: skip
def test_show_of_what_is_not_there_is_one_line(both, capsys, words, part):
    extra = ["--targets", TOP.name] if "--row" in words else []
    assert cli.main(["cache", words[0], str(both), *words[1:], *extra]) == 2
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [
    "ls {no}", "show {no}", "stats {no}", "verify {no}", "gc {no}", "drop {no} --layer x", "push {no} {no}/out",
    "merge {no}/out {both} {no}", "subset {no} {no}/out --count 1", "export {no} {no}/out", "audit {no}",
    "translate {no} {no}/out --tokenizer {no}", "import {no}/nothing {no}/out", "import {no} {no}/out",
    "import {no} {no}/out --format decant", "drop {both} --layer x", "drop {both} --job 1", "drop {both} --source x",
    "export {both} {both}/sequences --targets {top}", "subset {both} {both}/sequences --count 1",
])  # fmt: skip
def test_a_wrong_name_is_a_wrong_request_and_exits_with_2(both, tmp_path, capsys, words):
    (tmp_path / "no").mkdir()
    argv = words.format(no=tmp_path / "no", both=both, top=TOP.name).split()
    assert cli.main(["cache", *argv]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("decant: error: ")
    assert not any((tmp_path / "no").iterdir())


@pytest.mark.parametrize("tail", ["exact", "derived", "unknown"])
def test_what_others_did_not_store_is_not_shown_as_impossible_or_known(tmp_path, capsys, monkeypatch, tail):
    def one_label_missing(row, layer):
        targets = targets_of(row, layer)
        targets.label_logprobs[0] = -np.inf
        return targets

    monkeypatch.setattr("tests.shared.small_cache.targets_of", one_label_missing)
    build(tmp_path / "cache", layers=(replace(TOP, temperatures=(1.0,), tail=tail),))
    line = run(capsys, "show", tmp_path / "cache", "--row", 0).split("the teacher would say")[1].splitlines()[1]
    assert line.split()[2:4] == (["0.00", "-inf"] if tail == "exact" else ["?", "?"])
    stats = run(capsys, "stats", tmp_path / "cache")
    rows = len(Cache.open(tmp_path / "cache"))
    assert f"  {'impossible labels' if tail == 'exact' else 'labels not known'}: {rows}\n" in stats
    assert ("mean tail mass" in stats, "not known without the mass" in stats) == (tail != "unknown", tail == "unknown")
    card = dataset_card(listing(tmp_path / "cache"), "https://host/cache")
    assert (f"tail {tail}" in card) == (tail != "exact")


def test_stats_are_those_of_the_reader(both, capsys):
    found = json.loads(run(capsys, "stats", both, "--targets", HYBRID.name, "--json"))
    cache = Cache.open(both, HYBRID.name)
    kept = [int(count) for i in range(len(cache)) for count in cache[i].targets.counts]
    assert found["mean_support"] == pytest.approx(sum(kept) / len(kept))
    assert (found["rows"], found["positions"]) == (len(cache), len(kept))
    text = run(capsys, "stats", both, "--targets", HYBRID.name)
    assert f"positions: {len(kept)}" in text
    assert f"entropy of head and bucket, {found['mean_entropy_nats']:.4g} nats on average" in text
    assert "source math" in text


def test_verify_advises_to_delete_no_parts_of_a_cache_that_a_later_version_wrote(tmp_path, capsys):
    path = tmp_path / "cache"
    build(path)
    header = json.loads((path / "cache.json").read_text())
    header["identity"]["colour"] = "blue"
    (path / "cache.json").write_text(json.dumps({name: said for name, said in header.items() if name != "checksum"}))
    said = run(capsys, "verify", path, code=1)
    assert "unknown fields (colour)" in said and said.splitlines()[-1] == "1 problem"


def test_verify_says_so_when_everything_is_whole_and_fails_when_a_byte_is_not(tmp_path, capsys):
    path = tmp_path / "cache"
    build(path)
    assert "as they were committed" in run(capsys, "verify", path)
    victim = sorted((path / "targets").rglob("part-*.arrow"))[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0x40
    victim.write_bytes(content)
    said = run(capsys, "verify", path, code=1)
    assert victim.name in said and "1 problem; damaged parts are rebuilt by `decant teach`" in said
    assert json.loads(run(capsys, "verify", path, "--json", code=1))["problems"]


def test_a_missing_part_is_named_once_however_many_layers_score_it_and_with_what_to_do(tmp_path, capsys):
    build(tmp_path / "cache", layers=(TOP, HYBRID))
    victim = sorted((tmp_path / "cache" / "sequences").glob("*.arrow"))[0]
    victim.unlink()
    lost = sorted((tmp_path / "cache" / "targets").glob(f"{TOP.name}*/*.arrow"))[-1]
    lost.unlink()
    said = run(capsys, "verify", tmp_path / "cache", code=1).splitlines()
    assert said[:-1] == [
        f"{path} cannot be read: No such file or directory; restore it from a copy or correct the path"
        for path in (victim, lost)
    ]


def test_gc_removes_only_what_it_lists(tmp_path, capsys):
    path = tmp_path / "cache"
    build(path)
    before = {file for file in path.rglob("*") if file.is_file()}
    leftover = path / "sequences" / ".part-00000000-000009.arrow.tmp-1-abc"
    leftover.write_bytes(b"x" * 1000)
    os.utime(leftover, (0, 0))
    assert "1 files, 1.0 kB would be removed" in run(capsys, "gc", path, "--dry-run")
    assert leftover.exists()
    assert json.loads(run(capsys, "gc", path, "--json"))["files"] == [str(leftover)]
    assert {file for file in path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "num_bytes, text", [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (3 * 10**15, "3000.0 TB")]
)
def test_size_is_in_powers_of_ten(num_bytes, text):
    assert size(num_bytes) == text
