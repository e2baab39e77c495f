import csv
import io

from recoup.report import write_tables
from tests.study.examples import FOUR, norm_results, results


def read(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_one_row_a_measurement(tmp_path):
    made = results()
    paths = write_tables(made, tmp_path)
    assert [path.name for path in paths] == ["accuracy.csv", "flips.csv", "layers.csv", "cycles.csv", "shifts.csv"]
    accuracy, flips, layers, cycles, shifts = map(read, paths)
    assert (flips[0]["against"], len(flips)) == ("8-bit", len(made.flips))
    assert (len(accuracy), len(layers)) == (len(made.accuracy), len(made.rows("layers")))
    assert (len(cycles), len(shifts)) == (len(made.rows("cycles")), len(made.shifts))
    assert accuracy[0]["seed"] == ""
    assert float(accuracy[-1]["top1"]) == made.accuracy[-1].top1
    assert layers[-1]["config"] == repr(FOUR)
    assert layers[-1]["weight_shape"] == "16x16x3x3"
    assert float(layers[-1]["error"]) == made.rows("layers")[-1].error


def test_names_with_commas_and_quotes_survive(tmp_path):
    paths = write_tables(results(name='a,"b"\n'), tmp_path)
    rows = read(paths[2])
    assert rows[0]["name"] == 'a,"b"\n0'


def test_a_wings_table_without_rows_is_not_written(tmp_path):
    accuracy, _, shifts = write_tables(results(layers=0), tmp_path)
    assert accuracy.name == "accuracy.csv"
    assert shifts.read_text() == "config,layer,mean,variance\n"


def test_traffic_where_there_is_any(tmp_path):
    made = norm_results()
    paths = write_tables(made, tmp_path)
    rows = read({path.name: path for path in paths}["traffic.csv"])
    assert len(rows) == len(made.rows("traffic"))
    assert int(rows[0]["blocks"]) == made.rows("traffic")[0].blocks
