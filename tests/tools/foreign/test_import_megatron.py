"""Megatron-LM's shards are read in the order of training, and nothing in them is run."""

from __future__ import annotations

import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from shared.cache.cache import Cache
from shared.errors import DamagedError
from tests.tools.foreign.importing import assert_holds, run
from tests.tools.foreign.peers import samples, write_megatron
from tools.cache.foreign.megatron import MegatronReader


@pytest.mark.parametrize("nucleus", [None, 0.8])
def test_megatron_shards_join_their_tokens_in_training_order(tmp_path, tokenizer_dir, capsys, nucleus):
    made = samples(8, least=12, most=13)
    ids_file = write_megatron(tmp_path / "shards", made, 10, nucleus=nucleus)
    reader = MegatronReader(tmp_path / "shards", ids_file)
    for row, sample in zip(reader.rows(), made, strict=True):
        ids, values = sample.top(10)
        stored = np.float16(values[:-1]).astype(np.float64)
        if nucleus is not None:
            cut = np.exp(values).cumsum(1)[:-1] - np.exp(values[:-1]) >= nucleus
            stored[cut] = -np.inf
        assert row.token_ids.tolist() == sample.token_ids
        assert np.array_equal(row.logprobs, stored)
        assert np.array_equal(row.ids[stored > -np.inf], ids[:-1][stored > -np.inf])
    result = run(capsys, tmp_path / "shards", tmp_path / "cache", "--tokenizer", tokenizer_dir, "--token-ids", ids_file)
    assert (result["rows"], result["tail"], result["format"]) == (8, "derived", "Megatron-LM")
    if nucleus is None:
        ids, values = (part[:-1].tolist() for part in made[0].top(10))
        assert_holds(Cache.open(tmp_path / "cache"), 0, ids, np.float16(values).astype(float), tail="derived")


def test_megatron_pickles_are_not_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    import zstandard

    ids_file = write_megatron(tmp_path / "shards", samples(8, least=12, most=13), 4)
    shard = tmp_path / "shards" / "cp0_dp0__11.tar"
    with tarfile.open(shard) as tar:
        meta = tar.extractfile("_meta.json").read()
    with tarfile.open(shard, "w") as tar:
        payload = zstandard.ZstdCompressor().compress(pickle.dumps({"values": Runs()}))
        for name, data in (("_meta.json", meta), ("10.pt.zst", payload)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(DamagedError, match="step 10 is no step of saved log-probabilities"):
        list(MegatronReader(tmp_path / "shards", ids_file).rows())
    assert not (tmp_path / "was-run").exists()
