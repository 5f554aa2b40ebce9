"""Axolotl's columns are read as they stand, in the alignment that they were written with."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from shared.cache.cache import Cache
from shared.errors import CacheError
from tests.tools.foreign.importing import assert_holds, assert_near_float32, run
from tests.tools.foreign.peers import samples, write_axolotl
from tools.cache.foreign.axolotl import AxolotlReader


@pytest.mark.parametrize("shift", [0, 1])
def test_axolotl_rows_are_aligned_by_measuring_and_their_tail_is_unknown(tmp_path, tokenizer_dir, capsys, shift):
    made = samples(5, least=20, most=30)
    write_axolotl(tmp_path / "kd.parquet", made, 6, temperature=2.0, shift=shift)
    words = (tmp_path / "kd.parquet", tmp_path / "cache", "--tokenizer", tokenizer_dir, "--temperature", 2)
    result = run(capsys, *words)
    assert (result["format"], result["tail"]) == ("Axolotl", "unknown")
    assert result["notes"]["rows are about token"] == f"i + {shift}"
    cache = Cache.open(tmp_path / "cache")
    for i, sample in enumerate(made):
        assert cache[i].spans.tolist() == [[3, len(sample.token_ids)]]
        ids, values = sample.top(6)  # p at temperature 1 within the head comes back from p at temperature 2
        values = values - np.log(np.exp(values).sum(1, keepdims=True))
        assert_holds(cache, i, ids[2:-1], values[2:-1], tail="unknown")


def test_axolotl_values_are_read_as_they_stand(tmp_path):
    made = samples(3, least=20, most=30)
    write_axolotl(tmp_path / "kd.parquet", made, 6, temperature=1.0, shift=1)
    for row, said in zip(
        AxolotlReader(tmp_path / "kd.parquet", 1.0, None).rows(),
        pq.read_table(tmp_path / "kd.parquet").to_pylist(),
        strict=True,
    ):
        assert row.ids.tolist() == said["target_token_ids"][2:-1]
        assert_near_float32(row.logprobs, said["target_logprobs"][2:-1])


def test_axolotl_alignment_that_is_not_clear_is_asked_for(tmp_path):
    made = samples(3)
    for sample in made:
        sample.token_ids = [7] * len(sample.token_ids)
    write_axolotl(tmp_path / "kd.parquet", made, 6, temperature=1.0, shift=1)
    with pytest.raises(CacheError, match="say --shift 0 or --shift 1"):
        AxolotlReader(tmp_path / "kd.parquet", 1.0, None)
