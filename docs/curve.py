"""Draws docs/fidelity-curve.svg from docs/fidelity-reference.json: `python docs/curve.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from chipmunk.report.charts import Level, Series, lines

HERE = Path(__file__).parent
LIGHT = ("#ffffff", "#1b1f26", "#5a6270", "#e8ebf0", "#0072b2", "#c44e00", "#00805c", "#a8538a", "#8a6d00", "#5a6270")
DARK = ("#14171c", "#e9ecf1", "#a3abb8", "#2a2f38", "#56b4e9", "#ff8c42", "#3ecf9b", "#e39bc4", "#e8c547", "#a3abb8")
NAMES = ("ground", "ink", "quiet", "grid", "c0", "c1", "c2", "c3", "c4", "c5")
STYLE = """
text { font: 12px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--quiet); }
.label { fill: var(--ink); } .grid { stroke: var(--grid); } .axis { stroke: var(--quiet); }
.level { stroke: var(--quiet); stroke-dasharray: 4 3; } .leader { opacity: .45; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; } .mark { stroke: var(--ground); stroke-width: 1.2; }
"""


def main() -> None:
    data = json.loads((HERE / "fidelity-reference.json").read_text(encoding="utf-8"))
    series = []
    for number, (name, rows) in enumerate(data["curves"].items()):
        points = tuple(sorted((100 * row["cost"], row["psnr"]) for row in rows))
        series.append(Series(name, points, number, marks=True))
    drawn = lines(
        series,
        "FLOPs of the whole picture, % of dense",
        f"PSNR beside dense, dB, mean of {data['pictures']} pictures",
        "Fidelity over cost on the reference model",
        levels=(Level("30 dB", 30.0),),
        x_range=(20.0, 80.0),
        y_from=0.0,
    )
    wide = re.search(r'<div class="wide"><svg (viewBox="0 0 (\d+) (\d+)")(.*?)</svg></div>', drawn, re.DOTALL)
    assert wide is not None
    colours = "".join(
        f".line.s{n}, .leader.s{n} {{ stroke: var(--c{n}); }} .mark.s{n} {{ fill: var(--c{n}); }} "
        f".t{n} {{ fill: var(--c{n}); }}\n"
        for n in range(6)
    )
    style = f":root {{ {_variables(LIGHT)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}"
    head, body = wide[4].split(">", 1)
    (HERE / "fidelity-curve.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {wide[1]} width="{wide[2]}" height="{wide[3]}"{head}>\n'
        f"<style>{style}{STYLE}{colours}</style>\n"
        f'<rect width="100%" height="100%" fill="var(--ground)"/>{body}</svg>\n',
        encoding="utf-8",
    )


def _variables(colours: tuple[str, ...]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in zip(NAMES, colours, strict=True))


if __name__ == "__main__":
    main()
