"""benchmarks/decode.py: cases, figures, and kernels that are wrong."""

import json

import pytest
import torch

from benchmarks import decode
from benchmarks.decode import Case, main


def test_a_row_has_time_tokens_and_the_share_of_a_copy(capsys):
    assert main(["--device", "cpu", "--cases", "2,4,2,100,32", "--seconds", "0.01", "--commit", "abc"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["kernel"] for row in rows] == ["ringflash", "torch SDPA"]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(2e6 / row["us"])
        assert row["gb_per_second"] == pytest.approx(2 * 2 * 100 * 2 * 32 * 4 / row["us"] / 1e3)
        assert row["error"] < 1e-5


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(decode, "flash_decode", lambda q, k, v, end: decode.sdpa(q, k[:, 1:], v[:, 1:], end))
    assert main(["--device", "cpu", "--cases", "1,2,2,50,32", "--seconds", "0.01", "--commit", "abc"]) == 1
    ours, _ = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert "us" not in ours
    assert "times its bound" in ours["wrong"]


@pytest.mark.parametrize("text", ["1,32,8,64k", "1,32,5,64k,128", "a", "0,2,2,5,8"])
def test_a_case_of_another_form_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--cases", text])
    assert text in capsys.readouterr().err


def test_a_case_reads_every_key_once():
    case = Case.parse("8,32,8,64k,128")
    assert str(case) == "8,32,8,64k,128"
    assert case.nbytes(torch.bfloat16) == 8 * 65536 * 8 * 128 * 2 * 2
