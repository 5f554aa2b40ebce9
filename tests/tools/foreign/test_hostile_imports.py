"""What strangers put into files of other formats is refused in a sentence, before it takes memory or becomes rows."""

from __future__ import annotations

import copy
import io
import json
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import DamagedError
from tests.tools.foreign.importing import EXACT, run
from tests.tools.foreign.peers import chat_line, samples, write_axolotl, write_distillkit, write_megatron
from tools.cache.foreign.axolotl import AxolotlReader
from tools.cache.foreign.distillkit import DistillKitReader
from tools.cache.foreign.foreign_row import ForeignRow
from tools.cache.foreign.heads import to_targets
from tools.cache.foreign.megatron import MegatronReader
from tools.cache.foreign.openai_json import OpenAIReader

MESSAGES = [{"role": "user", "content": "How many apples are left?"}]
OTHER_KINDS = {
    "texts": lambda rows: [["a"] * len(row) for row in rows],
    "fractions": lambda rows: [[0.5] * len(row) for row in rows],
    "one value": lambda rows: [1] * len(rows),
    "lists too deep": lambda rows: [[[[1]]] for _ in rows],
    "dates": lambda rows: pa.array([[1] * len(row) for row in rows], pa.list_(pa.timestamp("ns"))),
    "bytes": lambda rows: pa.array([[b"x"] * len(row) for row in rows]),
}


def replace(file, column, make):
    table = pq.read_table(file)
    place = table.schema.get_field_index(column)
    values = make(table.column(place).to_pylist())
    pq.write_table(table.set_column(place, column, values if isinstance(values, pa.Array) else pa.array(values)), file)


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("column", ["input_ids", "compressed_logprobs", "bytepacked_indices", "labels"])
def test_distillkit_columns_of_another_kind_are_refused_by_their_type(tmp_path, column, kind):
    made = samples(2)
    write_distillkit(tmp_path / "set", made, EXACT, labels=[sample.token_ids for sample in made])
    replace(tmp_path / "set" / "data_0.parquet", column, OTHER_KINDS[kind])
    with pytest.raises(DamagedError, match=f"a column {column} of .*; expected lists of"):
        list(DistillKitReader(tmp_path / "set", None, ()).rows())


@pytest.mark.parametrize("column", ["input_ids", "labels", "target_token_ids", "target_logprobs", "target_mask"])
def test_axolotl_columns_of_another_kind_are_refused_by_their_type(tmp_path, column):
    write_axolotl(tmp_path / "a.parquet", samples(2), 5, temperature=1.0, shift=1)
    replace(tmp_path / "a.parquet", column, OTHER_KINDS["texts"])
    with pytest.raises(DamagedError, match=f"a column {column} of .*; expected lists of"):
        list(AxolotlReader(tmp_path, 1.0, 1).rows())


def test_texts_in_a_dictionary_are_refused_before_they_unpack(tmp_path):
    rows, long = 3000, pa.array(["A" * 2**20])
    text = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), long)
    ids = pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), text)
    octets = pa.array([[[1]]] * rows, pa.list_(pa.list_(pa.uint8())))
    table = pa.table({"input_ids": ids, "compressed_logprobs": octets, "bytepacked_indices": octets})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", store_schema=False)
    (tmp_path / "compression_config.yaml").write_text(json.dumps(EXACT))
    before = pa.total_allocated_bytes()
    with pytest.raises(DamagedError, match="a column input_ids of"):
        list(DistillKitReader(tmp_path, None, ()).rows())
    assert pa.total_allocated_bytes() - before < 2**20


def test_distillkit_bytes_beyond_a_byte_are_refused(tmp_path):
    write_distillkit(tmp_path / "set", samples(2), EXACT)
    replace(tmp_path / "set" / "data_0.parquet", "bytepacked_indices", lambda rows: [[[300] * 14] * 9] * len(rows))
    with pytest.raises(DamagedError, match="values from 300 to 300 in bytepacked_indices; expected bytes"):
        list(DistillKitReader(tmp_path / "set", None, ()).rows())


def test_rows_of_too_many_entries_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    write_distillkit(tmp_path / "set", samples(2), EXACT)
    monkeypatch.setattr("tools.cache.foreign.foreign_row.MAX_ENTRIES_PER_ROW", 10)
    with pytest.raises(DamagedError, match="positions of up to 12 entries; too many"):
        list(DistillKitReader(tmp_path / "set", None, ()).rows())


@pytest.mark.parametrize("settings", ["d: &a [*a]\nk: 1\n", "d: 0x" + "f" * 10_000 + "\n"], ids=["endless", "long"])
def test_settings_that_cannot_be_written_out_are_refused_in_a_sentence(tmp_path, tokenizer_dir, capsys, settings):
    write_distillkit(tmp_path / "set", samples(2), EXACT)
    (tmp_path / "set" / "compression_config.yaml").write_text(settings)
    error = run(capsys, tmp_path / "set", tmp_path / "cache", "--tokenizer", tokenizer_dir, code=1)
    assert "compression_config.yaml says" in error
    assert len(error) < 1000


def altered(line, *path, to):
    line = copy.deepcopy(line)
    inner = line
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to
    return line


FIRST = ("choices", 0, "logprobs", "content", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("choices", 0, "message", "content"), 5, "the answer is 5, expected a text"),
        (("choices", 0, "message", "content"), ["x"], "expected a text"),
        (("choices", 0, "message", "content"), "a\ud800", "the answer has half a surrogate pair at character 1"),
        (("messages", 0, "content"), "\ud800", "the prompt has half a surrogate pair"),
        (("prompt_token_ids",), [1.7, 2.2], "a token id is 1.7, expected a whole number"),
        (("prompt_token_ids",), ["3"], "a token id is '3', expected a whole number"),
        ((*FIRST, "token"), "token_id: 5", "a token id is ' 5', expected decimal digits"),
        ((*FIRST, "logprob"), "inf", "a log-probability is 'inf', expected a number"),
        ((*FIRST, "logprob"), True, "a log-probability is True, expected a number"),
    ],
)
def test_values_of_another_kind_in_an_answer_are_refused(
    tmp_path, tokenizer, tokenizer_dir, capsys, path, value, message
):
    line = altered(chat_line(tokenizer, MESSAGES, samples(1, seed=3)[0], 5), *path, to=value)
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    error = run(capsys, tmp_path / "a.jsonl", tmp_path / "cache", "--tokenizer", tokenizer_dir, code=1)
    assert message in error
    assert "a.jsonl:1" in error


def test_a_label_above_certainty_is_refused_and_two_values_of_one_token_set_the_answer_aside(
    tmp_path, tokenizer, tokenizer_dir, capsys
):
    line = chat_line(tokenizer, MESSAGES, samples(1, seed=3)[0], 5)
    first = line["choices"][0]["logprobs"]["content"][0]
    alone = altered(line, *FIRST, to={**first, "logprob": 3.0, "top_logprobs": first["top_logprobs"][1:2]})
    alone["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = -5.0
    other = altered(line, *FIRST, to={**first, "logprob": -7.5, "top_logprobs": [{**first, "logprob": -1.0}]})
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(other) + "\n" + json.dumps(line) + "\n")
    result = run(capsys, file, tmp_path / "cache", "--tokenizer", tokenizer_dir, "--max-set-aside", "0.5")
    assert result["set_aside"] == {"a token of the answer has two log-probabilities": 1}
    file.write_text(json.dumps(alone) + "\n")
    error = run(capsys, file, tmp_path / "other", "--tokenizer", tokenizer_dir, "--tail", "derived", code=1)
    assert "no log-probabilities of one distribution" in error
    row = ForeignRow("a:1", np.array([1, 2]), np.array([1]), np.array([[3]]), np.array([[-1.0]]), np.array([0.4]))
    with pytest.raises(DamagedError, match=r"gives token 1 the log-probability 0.4 .* none above 0"):
        to_targets(row, 10, tail="unknown", counts=Counter())


def test_one_wide_position_does_not_widen_a_million_before_it_is_refused(tmp_path, tokenizer, monkeypatch):
    line = chat_line(tokenizer, MESSAGES, samples(1, seed=3)[0], 5)
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr("tools.cache.foreign.foreign_row.MAX_ENTRIES_PER_ROW", 10)
    monkeypatch.setattr("tools.cache.foreign.openai_json.np.full", lambda *_: pytest.fail("allocated before"))
    with pytest.raises(DamagedError, match="entries; too many"):
        OpenAIReader(tmp_path / "a.jsonl", tokenizer, tokenizer.backend_tokenizer.to_str().encode())


def test_the_prompt_of_many_choices_is_tokenized_once(tmp_path, tokenizer):
    line = chat_line(tokenizer, MESSAGES, samples(1, seed=3)[0], 5)
    line["choices"] *= 50
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    calls = []

    class Counting:
        def __call__(self, text, **settings):
            calls.append(text)
            return tokenizer(text, **settings)

        def decode(self, *args, **settings):
            return tokenizer.decode(*args, **settings)

        def apply_chat_template(self, *args, **settings):
            return tokenizer.apply_chat_template(*args, **settings)

    reader = OpenAIReader(tmp_path / "a.jsonl", Counting(), tokenizer.backend_tokenizer.to_str().encode())
    calls.clear()
    assert len(list(reader.rows())) == 50
    assert len(calls) == 1


def with_step(directory, change=None, payload=None):
    """Shards whose first step is another."""
    import torch
    import zstandard

    ids_file = write_megatron(directory / "shards", samples(8, least=12, most=13), 4)
    shard = directory / "shards" / "cp0_dp0__11.tar"
    with tarfile.open(shard) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    if payload is None:
        data = zstandard.ZstdDecompressor().decompress(members[1][1])
        tensors, buffer = torch.load(io.BytesIO(data), weights_only=True), io.BytesIO()
        torch.save(change(tensors), buffer)
        payload = zstandard.ZstdCompressor().compress(buffer.getvalue())
    with tarfile.open(shard, "w") as tar:
        for name, data in (members[0], (members[1][0], payload), members[2]):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return MegatronReader(directory / "shards", ids_file)


def each(name, change):
    return lambda tensors: {**tensors, name: [change(tensor) for tensor in tensors[name]]}


def repeated(tensors):
    import torch

    return {k: [torch.zeros(1, dtype=v[0].dtype).expand(2**20, 2**10, 2**10)] * 2 for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (each("values", lambda t: t.float().to_sparse()), "no plain one"),
        (each("values", lambda t: t.cfloat()), "no plain one"),
        (each("values", lambda t: t.to("meta")), "no plain one"),
        (each("values", lambda t: t.long()), "values of torch.int64"),
        (each("indices_low", lambda t: t.float() + 0.5), "ids of torch.float32"),
        (each("bit_17", lambda t: t.long() * 0 + 2), "16 bits and a 17th"),
        (repeated, "larger than its numbers"),
        (lambda t: {name: [t.repeat(1, 1, 2) for t in found] for name, found in t.items()}, "8 entries .* k 4"),
    ],
)
def test_tensors_that_hold_no_log_probabilities_are_refused(tmp_path, change, message):
    with pytest.raises(DamagedError, match=f"step 10 .*{message}"):
        list(with_step(tmp_path, change).rows())


def test_steps_that_unpack_to_far_more_than_their_bytes_are_refused_before(tmp_path):
    import torch
    import zstandard

    zeros = zstandard.ZstdCompressor(level=19).compress(bytes(2**28))
    with pytest.raises(DamagedError, match="unpacks to 268,435,456 bytes"):
        list(with_step(tmp_path, payload=zeros).rows())
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save({"values": [torch.zeros(2**20)]}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    (tmp_path / "inside").mkdir()
    payload = zstandard.ZstdCompressor().compress(packed.getvalue())
    with pytest.raises(DamagedError, match="its members are compressed"):
        list(with_step(tmp_path / "inside", payload=payload).rows())


def test_extended_headers_of_a_shard_are_bounded(tmp_path):
    ids_file = write_megatron(tmp_path / "shards", samples(8, least=12, most=13), 4)
    with tarfile.open(tmp_path / "shards" / "cp0_dp0__11.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("_meta.json")
        info.pax_headers = {"comment": "A" * 2**21}
        tar.addfile(info)
    with pytest.raises(DamagedError, match="a header of 2,097"):
        MegatronReader(tmp_path / "shards", ids_file)
