"""JSON-lines files: read line by line, cut where a run resumes, compared."""

import pytest

from pgpo_jax.errors import InputError
from pgpo_jax.logs import jsonl

NEWER = b'{"step": 3}\n'


def test_every_line_is_read_and_what_is_no_object_is_said(tmp_path):
    path = tmp_path / "some.jsonl"
    lines = [b'{"step": 1, "text": "\xe2\x80\xa8 \xc3\xa9"}', b"", b" ", b"[1]", b'"\xff"', b'{"a']
    path.write_bytes(b"\n".join(lines))
    first, array, bytes_, torn = jsonl.read(path)
    assert first[:3] == (1, lines[0] + b"\n", {"step": 1, "text": "\u2028 é"})
    assert (first.problem, first.torn) == ("", False)
    assert (array.number, array.row, array.problem, array.torn) == (4, {}, "[1]", False)
    assert bytes_.torn and "utf-8" in bytes_.problem
    assert torn.torn and torn.problem == "Unterminated string starting at (column 2)"


def test_a_file_that_is_cut_by_steps_keeps_its_lines_byte_by_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step":0,"x":1.50}\r\n{ "step" : 2, "text": "\\u00e9\xc3\xa9" }\n'
    path.write_bytes(kept + NEWER + b'{"step": 2, "lo')  # killed in the middle of a line
    jsonl.Lines(path, 2, None).close()
    assert path.read_bytes() == kept


@pytest.mark.parametrize("line", [b"[2]\n", b'{"loss": 1.0}\n', b'{"step": null}\n'])
def test_a_file_with_a_row_of_no_step_is_not_cut(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + NEWER)
    with pytest.raises(InputError, match=r"output_dir: .*metrics\.jsonl:1: got .*; must be one"):
        jsonl.Lines(path, 2, None)
    assert path.read_bytes() == line + NEWER


def test_two_runs_differ_in_their_rows_but_for_times(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for run, seconds in ((one, 1.0), (other, 2.0)):
        run.mkdir()
        (run / "metrics.jsonl").write_text(f'{{"step": 1, "x": NaN, "time/train": {seconds}}}\n')
    assert [*jsonl.differences(str(one), str(other))] == []
    (other / "samples.jsonl").write_text("{}\n")
    assert [*jsonl.differences(str(one), str(other))] == ["samples.jsonl differs in line 1"]
    (other / "metrics.jsonl").write_text('{"step"')
    with pytest.raises(InputError, match=r"RUN: .*other/metrics\.jsonl:1: got .*; must be one"):
        [*jsonl.differences(str(one), str(other))]
