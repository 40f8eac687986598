"""From `results.json` and the pictures beside it to one page."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chipmunk.fidelity.metrics import CAP, INSTALL
from chipmunk.fidelity.report import FidelityError, notes
from chipmunk.fidelity.tables import psnr
from chipmunk.report import charts

PICTURES, VARIANTS = 6, 3
"""The most pictures shown, and of how many variants: a page has to stay small enough to send."""
AMPLIFIED = 8
"""How many times its size a difference is shown at."""

Data = dict[str, Any]


def write(results: Data, folder: Path, path: Path) -> None:
    """Write the page of `results`, whose pictures lie in `folder`, to `path`."""
    path.write_text(render(results, folder), encoding="utf-8")


def render(results: Data, folder: Path) -> str:
    """The page as text. Raises FidelityError where jinja2 or Pillow is missing."""
    try:
        import jinja2
        import PIL  # noqa: F401
    except ImportError as error:
        raise FidelityError(
            f"the report needs {error.name}, which is not installed beside Chipmunk", next_command=INSTALL
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"psnr": psnr, "share": _share, "figure": _figure, "yaml": _yaml}
    return environment.get_template("template.html").render(**page(results, folder))


def page(results: Data, folder: Path) -> Data:
    """Everything that the template shows."""
    variants: list[Data] = results["variants"]
    main = main_variant(variants)
    gpu = not str(results["environment"].get("device", "")).startswith("CPU")
    families = list(dict.fromkeys(variant["family"] for variant in variants))
    return {
        "results": results,
        "main": main,
        "summary": main["summary"],
        "decodes": results["decodes"],
        "gpu": gpu,
        "pairs": list(pairs(results, folder, main)),
        "amplified": AMPLIFIED,
        "steps_chart": _steps_chart(variants),
        "steps_legend": _legend([variant["name"] for variant in _with_steps(variants)]),
        "kinds": [(variant, _kinds_chart(variant, results)) for variant in shown_variants(variants, main)],
        "coverage": _coverage(main, results),
        "curves": [chart for chart in (_curve(results, families, by) for by in _measures(gpu)) if chart],
        "curve_legend": [(n, name) for n, name in _legend(families) if name in _apart(variants)],
        "environment": {name: value for name, value in results["environment"].items() if name != "chipmunk"},
        "notes": notes(results),
        "mean_call": _mean_flops(results),
    }


def main_variant(variants: Sequence[Data]) -> Data:
    """The one that the page is about: the first with a configuration and no step caching."""
    sparse = [variant for variant in variants if variant["config"] is not None]
    plain = [v for v in sparse if v["family"] == "sparse"]
    named = [v for v in plain if v["name"] == "sparse" or len(plain) == 1]
    found: Data = (named or plain or sparse or [*variants])[0]
    return found


def shown_variants(variants: Sequence[Data], main: Data) -> list[Data]:
    """The main one, and the one nearest to half its cost in each other family with a configuration."""
    found = [main]
    for family in dict.fromkeys(v["family"] for v in variants if v["config"] is not None):
        others = [v for v in variants if v["family"] == family and v is not main]
        if family == main["family"] and len(others) < VARIANTS:
            found += others
        elif family != main["family"]:
            found.append(min(others, key=lambda v: abs(v["summary"]["flops"] - 0.5)))
    return found[:VARIANTS]


def pairs(results: Data, folder: Path, main: Data) -> Iterator[Data]:
    """The dense picture and the others of each prompt and seed, as data URIs, with their differences."""
    images: Mapping[str, str] = results["images"]
    for index, picture in enumerate(results["pictures"][:PICTURES]):
        dense = images.get(f"dense/{index}")
        if dense is None:
            continue
        shown: list[Data] = []
        for variant in shown_variants(results["variants"], main):
            name = images.get(f"{variant['name']}/{index}")
            if name is not None:
                shown.append(
                    {
                        "name": variant["name"],
                        "image": _data_uri((folder / name).read_bytes()),
                        "difference": _data_uri(difference(folder / dense, folder / name)),
                        "figures": variant["pictures"][index],
                        "flops": variant["pictures"][index]["flops"] / _mean_flops(results),
                        "id": f"p{index}-{len(shown)}",
                    }
                )
        yield {**picture, "dense": _data_uri((folder / dense).read_bytes()), "others": shown}


def difference(dense: Path, other: Path) -> bytes:
    """A PNG of the absolute difference of two pictures, amplified; black where they are the same."""
    import io

    from PIL import Image, ImageChops

    apart = ImageChops.difference(Image.open(dense).convert("RGB"), Image.open(other).convert("RGB"))
    amplified = apart.point(lambda level: min(level * AMPLIFIED, 255))
    stream = io.BytesIO()
    amplified.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _mean_flops(results: Data) -> float:
    """Of a dense picture."""
    return float(results["dense"]["flops"])


def _with_steps(variants: Sequence[Data]) -> list[Data]:
    """The variants whose latents can be compared step by step: at most as many as there are colours."""
    found = [variant for variant in variants if all(picture["steps"] for picture in variant["pictures"])]
    return found[: charts.COLOURS]


def _steps_chart(variants: Sequence[Data]) -> str:
    series = []
    for number, variant in enumerate(_with_steps(variants)):
        curves = [[step["l2"] for step in picture["steps"]] for picture in variant["pictures"]]
        means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        points = tuple((float(step), value) for step, value in enumerate(means))
        series.append(charts.Series(variant["name"], points, number))
    if not series:
        return ""
    last = ", ".join(f"{line.name} ends at {line.points[-1][1]:.3f}" for line in series)
    return charts.lines(series, "step", "relative L2", f"Error of the latents after each step: {last}", whole=True)


def _kinds_chart(variant: Data, results: Data) -> str:
    dense, whole = results["cost"]["dense_call"], variant["summary"]["flops"] * _mean_flops(results)
    rows = []
    kinds = list(dict.fromkeys(kind for other in results["variants"] for kind in other["kinds"]))
    for kind, found in variant["kinds"].items():
        count = f"{found['steps']:.0f}" if found["steps"] % 1 == 0 else f"{found['steps']:.1f}"
        share = found["flops"] * found["steps"] / whole
        note = f"{count} {'step' if count == '1' else 'steps'}, {share:.0%} of all"
        rows.append((kind.replace("/", " / "), found["flops"] / dense, note, kinds.index(kind)))
    says = "; ".join(f"{name}: {value:.0%} of a dense step, {note}" for name, value, note, _ in rows)
    return charts.bars(rows, "FLOPs of the step, dense step = 100%", says)


def _coverage(main: Data, results: Data) -> list[Data]:
    """A field of layers and steps for attention and for MLPs, where they were measured."""
    found = []
    for part, title, unit in (
        ("attention", "Attention mass on the kept keys", "of the attention mass"),
        ("mlp", "MLP change at the kept neurons", "of the change"),
    ):
        layers = main.get("coverage", {}).get(part, {})
        if not layers:
            continue
        calls = sorted({call for shares in layers.values() for call, _ in shares})
        columns = list(range(calls[-1] + 1))
        values = []
        for shares in layers.values():
            of_call = dict(map(tuple, shares))
            values.append([of_call.get(column) for column in columns])
        names = [results["layers"][int(layer)].replace("_blocks", "") for layer in layers]
        every = [share for shares in layers.values() for _, share in shares]
        mean = sum(every) / len(every)
        says = f"{title}, by layer and step: {mean:.0%} on average, from {min(every):.0%} to {max(every):.0%}"
        found.append({"title": title, "says": says, "chart": charts.heat(names, columns, values, says, unit)})
    return found


def _apart(variants: Sequence[Data]) -> set[str]:
    """Families with a point that is not dense to the bit."""
    return {variant["family"] for variant in variants if _fidelity(variant) < CAP}


def _measures(gpu: bool) -> list[str]:
    return ["flops", "seconds"] if gpu else ["flops"]


def _curve(results: Data, families: Sequence[str], by: str) -> Data | None:
    """Fidelity over cost, a line for each family; None where there is but one point."""
    variants = results["variants"]
    if len(variants) < 2:
        return None
    dense_seconds = sorted(picture["seconds"] for picture in results["dense"]["pictures"])
    base = 1.0 if by == "flops" else dense_seconds[len(dense_seconds) // 2]
    series = []
    for number, family in enumerate(families):
        of_family = [v for v in variants if v["family"] == family and _fidelity(v) < CAP]
        if not of_family:  # all the same as dense, to the bit
            continue
        rows = sorted((100 * v["summary"][by] / base, _fidelity(v), v["name"]) for v in of_family)
        titles = tuple(f"{name}: {cost:.0f}% of dense, {value:.1f} dB" for cost, value, name in rows)
        series.append(charts.Series(family, tuple((c, f) for c, f, _ in rows), number, True, titles))
    if not series:
        return None
    highest = max(y for line in series for _, y in line.points)
    levels = [
        charts.Level(f"dense, {name}", value)
        for name, floor in results["floor"].items()
        if (value := _fidelity(floor)) < min(highest + 20, CAP)
    ]
    of = "pictures" if results["decodes"] else "latents"
    says = "; ".join(title for line in series for title in line.titles)
    what = "FLOPs" if by == "flops" else "seconds"
    chart = charts.lines(
        series, f"{what} of a picture, dense = 100%", f"PSNR of the {of}, dB", says, levels, (0.0, 100.0), None
    )
    return {"chart": chart, "what": what}


def _fidelity(variant: Data) -> float:
    found = variant["summary"]["psnr"]
    value = float(variant["summary"]["latent_psnr"] if found is None else found)
    return value if math.isfinite(value) else CAP


def _legend(names: Sequence[str]) -> list[tuple[int, str]]:
    return [(number % charts.COLOURS, name) for number, name in enumerate(names)]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _figure(value: float | None, places: int = 3) -> str:
    return "–" if value is None else f"{value:.{places}f}"


def _yaml(variant: Data) -> str:
    """What applied, as the results say it; what was set is marked. Defaults of today are not filled in."""
    config: Data = variant["config"]
    values: Data | None = variant.get("settings")
    lines = []
    if values is None:
        lines += ["# written by an older Chipmunk:", "# what was set; its defaults are", "# not known"]
        values = config
    for section in (name for name in _SHOWN if name in values):
        value = values[section]
        if not isinstance(value, dict):
            lines.append(f"{section}: {json.dumps(value)}{'  # set' if section in config else ''}")
            continue
        given = config.get(section) or {}
        lines.append(f"{section}:")
        for key, inside in value.items():
            if key in given or key not in _QUIET:
                lines.append(f"  {key}: {json.dumps(inside)}{'  # set' if key in given else ''}")
    return "\n".join(lines)


_SHOWN = ("implementation", "compile", "min_steps", "mlp", "attn", "patchify", "step_caching")
_QUIET = ("is_fp8", "should_compress_indices", "pad_qkv_before_kernel", "local_voxels", "local_1d_window")
