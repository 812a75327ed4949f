"""Files of equal types are timed in turns, on a tiny model."""

import argparse

from gguf_speed import MEASURES, print_table, run

from optrot_edge.exporters.gguf import export_gguf
from tests.exporters.gguf_models import write_checkpoint
from tests.llama_tools import llama_tool


def test_ours_and_stock_in_turns(tmp_path, capsys):
    llama_tool("llama-quantize")
    export_gguf(write_checkpoint(tmp_path, "wide", "float32", "float32"), tmp_path / "m.gguf")
    options = argparse.Namespace(model=tmp_path / "m.gguf", work=tmp_path / "work", types=["q4_0", "q4_k"], prompt=32,
                                 decode=8, turns=3, threads=1, sdist=None)
    results = run(options)
    assert [(row["type"], row["arm"]) for row in results["rows"]] == [
        ("q4_0", "ours"), ("q4_0", "stock"), ("q4_k", "ours"), ("q4_k", "stock")]
    for row in results["rows"]:
        assert len(row["turns"]) == 3 and all(turn[name] > 1 for turn in row["turns"] for name in MEASURES)
    for ratios in results["ours to stock"].values():
        assert all(0 < ratios[name]["low"] <= ratios[name]["median"] <= ratios[name]["high"] for name in MEASURES)
    print_table(results)
    assert "q4_k" in capsys.readouterr().out
    assert not list((tmp_path / "work").glob("speed-*"))
