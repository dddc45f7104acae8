"""The pictures of README.md can be drawn from docs/RESULTS.md as it is."""

from scripts.dev.docs_figures import DRAWN, ROOT, SHOTS, draw_accuracy, draw_method, read_results


def test_every_drawn_method_is_in_the_results():
    results = read_results((ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8"))
    assert set(results) == {"Digits", "Shapes"}
    for methods in results.values():
        assert all(len(methods[name]) == len(SHOTS) for name in DRAWN)
    lines = [axes.get_lines() for axes in draw_accuracy(results).axes]
    assert [len(part) for part in lines] == [len(DRAWN)] * 2
    assert list(lines[0][0].get_ydata()) == results["Digits"][DRAWN[0]]
    assert draw_method().axes
