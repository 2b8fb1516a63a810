"""Source files and tables as texts: what is found, what is left out, what is refused."""

import json

import pytest

from bakeoff.data.code_files import read_code
from bakeoff.errors import DataError


def test_folders_tables_and_single_files(tmp_path):
    (tmp_path / "src" / "inner").mkdir(parents=True)
    (tmp_path / "src" / "b.py").write_text("b = 1\n")
    (tmp_path / "src" / "inner" / "a.py").write_text("\ufeffa = 'ü'\n", encoding="utf-8")
    (tmp_path / "src" / "blank.py").write_text("\n")
    (tmp_path / "src" / "odd.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "src" / "notes.md").write_text("# not code\n")
    rows = [{"id": 1, "content": "c = 3\n"}, {"id": 2, "content": "B  = 1"}, {"id": 3}]
    table = tmp_path / "rows.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "one.txt").write_text("prose\n")
    paths = [tmp_path / "src", table, tmp_path / "one.txt"]
    texts, notes = read_code(paths)
    assert texts == ("b = 1\n", "a = 'ü'\n", "c = 3\n", "prose\n")
    assert any("odd.py is not UTF-8" in note for note in notes)
    assert "2 texts left out: blank." in notes
    assert "1 text left out: seen before." in notes
    both, _ = read_code([tmp_path / "src"], suffixes=[".py", ".md"])
    assert "# not code\n" in both
    ids, _ = read_code([table], column="content")
    assert ids == ("c = 3\n", "B  = 1")


def test_what_others_wrote_is_no_part_of_a_folder(tmp_path):
    for place in ("src", ".git", "node_modules/x", "env/lib", "lib/site-packages", "a/__pycache__"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "code.py").write_text(f"# of {place}\n")
    (tmp_path / "env" / "pyvenv.cfg").write_text("home = /usr/bin\n")
    hidden = tmp_path / ".project"  # asked for by its name
    hidden.mkdir()
    (hidden / "own.py").write_text("# own\n")
    assert read_code([tmp_path])[0] == ("# of src\n",)
    assert read_code([hidden])[0] == ("# own\n",)


def test_a_sample_depends_on_content_alone(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.py").write_text(f"x = {number}\n")
    some, notes = read_code([tmp_path], max_texts=5, seed=1)
    assert len(some) == 5
    assert notes == ("5 of 20 texts drawn by their content.",)
    for number in range(20):
        (tmp_path / f"{number}.py").rename(tmp_path / f"z{99 - number}.py")
    assert set(read_code([tmp_path], max_texts=5, seed=1)[0]) == set(some)
    assert set(read_code([tmp_path], max_texts=5, seed=2)[0]) != set(some)


def test_what_cannot_be_read_is_refused(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("id,words\n1,x\n")
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": 3}\n')
    (tmp_path / "empty").mkdir()
    odd = tmp_path / "odd.py"
    odd.write_bytes(b"\xff")
    for paths, options, message in (
        ([], {}, "at least one file"),
        ([table], {}, "no column has a usual name for texts .*There are: 'id', 'words'"),
        ([table], {"column": "code"}, "there is no column 'code'"),
        ([numbers], {}, "line 1: text must be text, got int"),
        ([tmp_path / "empty"], {}, r"no file in this folder ends with .*\.py"),
        ([odd], {}, "odd.py is not UTF-8 text: byte 0"),
        ([tmp_path / "missing.py"], {}, "missing.py cannot be read"),
        ([table], {"column": "words", "max_texts": 0}, "max_texts must be at least 1"),
    ):
        with pytest.raises(DataError, match=message):
            read_code(paths, **options)
    table.write_text("text\n \n")
    with pytest.raises(DataError, match="no text in there"):
        read_code([table])
