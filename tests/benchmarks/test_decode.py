"""benchmarks/decode.py: cases, figures, kernels that are wrong or raise, and cases that do not fit."""

import json
from functools import partial

import pytest
import torch

from benchmarks import decode, decode_contenders
from benchmarks.decode import GPU_CASES, Case

CPU = torch.device("cpu")


def run(folder, *arguments):
    """A CPU run of one small case: exit code, and the JSON it wrote."""
    code = decode.main(["--device", "cpu", "--seconds", "0.01", "--commit", "abc", "--out", str(folder), *arguments])
    return code, json.loads((folder / "decode-cpu.json").read_text())


def test_a_row_has_time_tokens_and_the_share_of_a_copy(tmp_path, capsys):
    code, contents = run(tmp_path, "--cases", "2,4,2,100,32")
    rows = {row["kernel"]: row for row in contents["rows"]}
    assert code == 0
    assert (tmp_path / "decode-cpu.png").stat().st_size > 10_000
    for name in ("ringflash", "SDPA flash", "SDPA math"):
        seconds = rows[name]["timing"]["ms"] / 1e3
        assert rows[name]["tokens_per_second"] == pytest.approx(2 / seconds)
        assert rows[name]["gb_per_second"] == pytest.approx(2 * 2 * 100 * 2 * 32 * 4 / seconds / 1e9)
        assert rows[name]["error"] < 1e-5
    assert rows["FlexAttention"]["reason"] == "needs an NVIDIA GPU"
    last = json.loads(capsys.readouterr().out.splitlines()[-1])["percent_of_copy"]["2,4,2,100,32"]
    assert last["ringflash"] == round(rows["ringflash"]["percent_of_copy"], 1)
    assert last["FA4-CuTe"] == "absent"


def test_a_kernel_that_is_wrong_is_not_timed(tmp_path, monkeypatch):
    good = decode_contenders.flash_decode
    monkeypatch.setattr(decode_contenders, "flash_decode", lambda q, k, v, end: good(q, k, v, end - 1))
    code, contents = run(tmp_path, "--cases", "1,2,2,50,32")
    ours, peer, *_ = contents["rows"]
    assert (code, ours["status"], ours["timing"]) == (1, "WRONG", None)
    assert "is allowed" in ours["reason"]
    assert peer["status"] == "timed"


def test_a_contender_that_raises_leaves_the_others(tmp_path, monkeypatch):
    def broken(q, k, v, end):
        raise RuntimeError("out of shared memory\nand more lines")

    monkeypatch.setattr(decode_contenders, "flash_decode", broken)
    code, contents = run(tmp_path, "--cases", "1,2,2,50,32", "--only", "ringflash", "math")
    ours, peer = contents["rows"]
    assert (code, ours["status"], ours["reason"]) == (1, "failed", "RuntimeError: out of shared memory")
    assert (peer["kernel"], peer["status"]) == ("SDPA math", "timed")


def test_a_peer_that_compiles_for_long_is_left_out_of_later_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "PATIENCE", 0.0)
    _, contents = run(tmp_path, "--cases", "1,2,2,50,32", "1,2,2,40,32", "--only", "ringflash", "math")
    assert [row["status"] for row in contents["rows"]] == ["timed", "timed", "timed", "absent"]
    assert "to compile in earlier cases" in contents["rows"][-1]["reason"]


def test_a_case_that_does_not_fit_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "free_bytes", lambda device: 2**20)
    code, contents = run(tmp_path, "--cases", "1,2,2,1M,64")
    assert code == 0
    assert {row["reason"] for row in contents["rows"]} == {"needs 2.3 GiB of memory, and 0.0 are free"}


def test_a_package_that_is_missing_is_named():
    q, k = torch.zeros(1, 1, 2, 32), torch.zeros(1, 16, 2, 32)
    for build, name in ((decode_contenders._fa4, "flash_attn.cute"), (decode_contenders._flashinfer, "flashinfer")):
        with pytest.raises(decode_contenders.Absent, match=f"{name}.* cannot be imported: ModuleNotFoundError"):
            build(q, k, k)


@pytest.mark.parametrize("text", ["1,32,8,64k", "1,32,5,64k,128", "a", "0,2,2,5,8", "1,2,2,k,8"])
def test_a_case_of_another_form_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        decode.main(["--device", "cpu", "--cases", text])
    assert text in capsys.readouterr().err


def test_a_case_reads_every_key_once():
    case = Case.parse("8,32,8,64k,128")
    assert case.nbytes(torch.bfloat16) == 8 * 65536 * 8 * 128 * 2 * 2
    assert [str(Case.parse(x)) for x in GPU_CASES] == GPU_CASES
    assert Case.parse("1,2,2,1M,8").keys == 2**20
    assert str(Case.parse("1,2,2,100,8")) == "1,2,2,100,8"


def test_runs_on_a_gpu_read_more_than_l2_holds():
    layers = partial(Case.layers, dtype=torch.bfloat16, device=torch.device("cuda"))
    assert [layers(Case.parse(f"1,32,8,{keys},128")) for keys in ("16", "1k", "8k", "64k", "1M")] == [64, 64, 8, 1, 1]
