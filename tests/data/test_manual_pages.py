"""Manual pages as a citation graph.

What summaries and references ought to be was taken from `lexgrog` and `man` of man-db 2.11, run on
these pages; a sample of 335 pages of Debian 12 agreed with both, but for eight summaries that
lexgrog cuts differently or follows to another file.
"""

import bz2
import gzip
import lzma

import pytest

from bakeoff.data.manual_pages import is_manual, manual_pages
from bakeoff.errors import DataError

# man(7), as written by hand and by help2man.
SIFT = r""".\" A comment, "quoted"
.TH SIFT "1" "May 2024"
.SH NAME
sift, resift \- find \fIlines\fR that do not belong
.SH SYNOPSIS
.B sift
[\fI\,OPTION\/\fR]
.SH DESCRIPTION
.\" nothing here yet
.PP
Reads lines \(em one by one \(em and \fBkeeps\fR
what \f(CWsift\fP was \
not told to drop; see \(lqRules\(rq.\"an aside
.PP
A second paragraph.
.SH "SEE ALSO"
.BR grep (1),
.BR drop "(3)",
\fBkettle\fR(5), \fIresift\fR\|(1)
and
.BR sift (1).
"""
# mdoc(7).
DROP = r""".Dd May 1, 2024
.Dt DROP 3
.Os
.Sh NAME
.Nm drop
.Nd let go of a
.Dq kettle
.Sh DESCRIPTION
The
.Nm
function lets go, as
.Xr sift 1
does with
.Fl v .
.Pp
More.
.Sh SEE ALSO
.Xr sift 1 ,
.Xr kettle 5
"""
# As pod2man and rst2man write: definitions of macros, old encodings, another spelling of a heading.
KETTLE = (
    rb""".de Sp
.if n .sp
..
.de1 INDENT
not a word of text
..
.TH KETTLE 5perl
.SH "Name"
.IX Header "NAME"
kettle \- a vessel for caf"""
    + b"\xe9"
    + rb"""
.
.nr level 0
.SH "Description"
\&\fIKettles\fR hold 1\~l.
.TP
.B size
How large.
.SH "See Also"
.MR sift 1 ,
\fBdrop\fP(3)
"""
)


@pytest.fixture
def folder(tmp_path):
    for name in ("man1", "man3", "man5", "de", "man0p"):
        (tmp_path / name).mkdir()
    (tmp_path / "man1" / "sift.1.gz").write_bytes(gzip.compress(SIFT.encode()))
    (tmp_path / "man3" / "drop.3.xz").write_bytes(lzma.compress(DROP.encode()))
    (tmp_path / "man5" / "kettle.5perl.bz2").write_bytes(bz2.compress(KETTLE))
    (tmp_path / "man1" / "resift.1").write_text(".so man1/sift.1\n")
    (tmp_path / "man1" / "again.1.gz").symlink_to("resift.1")
    (tmp_path / "man3" / "letgo.3.xz").symlink_to("drop.3.xz")
    (tmp_path / "man3" / "gone.3").symlink_to("nowhere.3")
    (tmp_path / "man3" / "empty.3").write_text("")
    (tmp_path / "man3" / "round.3").write_text(".so man3/about.3\n")
    (tmp_path / "man3" / "about.3").write_text(".so man3/round.3\n")
    (tmp_path / "man1" / "README").write_text("no page")
    (tmp_path / "de" / "man1").mkdir()
    return tmp_path


def test_pages_of_both_languages_are_read(folder):
    graph = manual_pages(folder)
    assert graph.texts == {
        "sift(1)": "find lines that do not belong. Reads lines \N{EM DASH} one by one \N{EM DASH} "
        'and keeps what sift was not told to drop; see "Rules".',
        "drop(3)": 'let go of a "kettle". The drop function lets go, as sift(1) does with -v.',
        "kettle(5perl)": "a vessel for café. Kettles hold 1 l.",
    }
    assert graph.domains == {
        "sift(1)": "commands",
        "drop(3)": "library",
        "kettle(5perl)": "files",
    }
    assert "4 pages, 3 of them with a text" in graph.notes[0]


def test_references_go_to_pages_by_any_of_their_names(folder):
    # grep is no page here, kettle(5) is of section 5perl, resift and sift are the page itself.
    assert manual_pages(folder).references == {
        "sift(1)": ["drop(3)", "kettle(5perl)"],
        "drop(3)": ["sift(1)", "kettle(5perl)"],
        "kettle(5perl)": ["sift(1)", "drop(3)"],
        "empty(3)": [],
    }
    (folder / "man1" / "user.1").write_text(
        ".SH SEE ALSO\n.BR again (1),\n.BR letgo (3),\n.BR resift (1)\n"
    )
    graph = manual_pages(folder)
    assert graph.references["user(1)"] == ["sift(1)", "drop(3)"]
    assert "user(1)" not in graph.texts


def test_sections_can_be_chosen(folder):
    graph = manual_pages(folder, sections=[1, "3"])
    assert set(graph.texts) == {"sift(1)", "drop(3)"}
    assert graph.references["kettle(5perl)"] == ["sift(1)", "drop(3)"]
    with pytest.raises(DataError, match="no two of the 1 documents"):
        manual_pages(folder, sections=["5"]).pairs()


def test_bad_input_is_named(folder, tmp_path):
    assert is_manual(folder)
    assert not is_manual(folder / "man1")
    with pytest.raises(DataError, match="man1 holds no manual pages: there are no folders man1"):
        manual_pages(folder / "man1")
    with pytest.raises(DataError, match="sections has '9'; there are '1', '2', '3'"):
        manual_pages(folder, sections=["9"])
    for ending in ("gz", "xz", "bz2"):
        broken = folder / "man1" / f"broken.1.{ending}"
        broken.write_bytes(b"\x1f\x8b no archive")
        with pytest.raises(DataError, match=rf"broken\.1\.{ending} cannot be read"):
            manual_pages(folder)
        broken.unlink()
