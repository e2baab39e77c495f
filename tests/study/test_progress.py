from recoup.study.progress import displayed


def test_not_on_a_terminal_a_line_a_measurement_on_standard_error(capsys):
    with displayed(["a", "b", "c"], show=True) as display:
        display.finish()  # measured before
        for name in ("[b] | none", "c | paired"):
            display.begin(name)
            assert list(display.watch([1, 2], "test")) == [1, 2]
            display.finish()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["2 of 3 measured: [b] | none", "3 of 3 measured: c | paired"]


def test_asked_for_nothing_it_says_nothing(capsys):
    with displayed(["a"], show=False) as display:
        display.begin("a")
        display.finish()
    assert capsys.readouterr() == ("", "")
