"""Isotropy is reached, not only asked for: the benchmark's own experiment in small."""

from __future__ import annotations

from pathlib import Path

from benchmarks.reach import reach


def test_every_direction_becomes_gaussian(tmp_path: Path) -> None:
    """From near collapse and from variances 0.1 to 1.9, on directions that the descent never drew."""
    plot = tmp_path / "plot.svg"
    rows = list(reach(plot, steps=300, samples=256, width=8))
    assert len(rows) == 2
    for row in rows:
        assert row["mean before"] > 2 * row["N(0, I) mean"]
        assert row["worst direction after"] < row["N(0, I) worst"]
        assert 0.7 < row["eigenvalues from"] < row["to"] < 1.3
    drawn = plot.read_text()  # matplotlib names every text that it draws in a comment
    assert all(f"<!-- start: {row['case'].partition(':')[0]} -->" in drawn for row in rows)
    assert drawn.count("FillBetweenPolyCollection") >= 2
