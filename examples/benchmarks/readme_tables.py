"""The tables of the READMEs, from the JSON files that the other benchmarks have written, and from the list of options.

Run, this puts them in place of those that are there: a table is known by its first line.
"""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from largerespatch.options import Options

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
RESULTS = HERE / "results"
MODEL_NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL", "flux": "Flux", "qwen-image": "Qwen-Image", "z-image": "Z-Image"}
ON_GPU = MODEL_NAMES | {"flux": "Flux, 6 blocks"}
GIB, TERA = 2**30, 1e12
GPU_WAYS = {
    "unpatched": ("unpatched", "untiled"),
    "diffusers' tiling": ("diffusers' tiling",),
    "patched": ("patched", "two-pass"),
    "exact": ("exact",),
    "maps on the host": ("patched, unet_offload", "exact, vae_offload"),
}


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def where(report: Any, rounds: int) -> str:
    """How it was measured, as a line below a table."""
    at = report["environment"]
    clock = "CPU seconds of one thread" if at["clock"] == "cpu" else f"wall seconds, {at['torch_threads']} threads"
    return (
        f"{at['device_name']}, {at['cpu_cores']} cores, {at['dtype']}; {clock}, median of {rounds}; "
        f"torch {at['torch']}, diffusers {at['diffusers']}, {at['date'][:10]}."
    )


def unet_table() -> str:
    report = load("unet_step")
    headings = ("image", "seconds unpatched", "patched", "ratio", "of arithmetic", "live GiB unpatched", "patched")
    rows = []
    for result in report["results"]:
        seconds, cost = result["median_seconds"], result["cost"]
        rows.append(
            [
                f"{result['size']}²",
                *(f"{seconds[name]:.0f}" for name in ("unpatched", "patched")),
                f"{result['time_ratio']:.2f}",
                f"{result['arithmetic_ratio']:.2f}",
                *(f"{cost[name]['peak_live_bytes'] / GIB:.2f}" for name in ("unpatched", "patched")),
            ]
        )
    return f"{markdown(headings, rows)}\n\n{where(report, len(report['results'][0]['seconds']['patched']))}"


def vae_table() -> str:
    report = load("vae")
    headings = ("", "image", "method", "seconds", "to untiled", "live GiB")
    rows = [
        [
            cost["direction"],
            f"{cost['size']}²",
            cost["method"],
            f"{cost['median_seconds']:.1f}",
            f"{cost['time_ratio']:.2f}",
            f"{cost['peak_live_bytes'] / GIB:.2f}",
        ]
        for cost in report["cost"]
    ]
    return f"{markdown(headings, rows)}\n\n{where(report, len(report['cost'][0]['seconds']))}"


def vae_fidelity_table() -> str:
    """A row for each direction and method, over all parts of the map."""
    report = load("fidelity")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["vae"]:
        groups.setdefault((row["direction"], row["method"]), []).append(row)
    headings = ("", "method", "PSNR to untiled", "worst", "max. error", "at seams")
    return markdown(headings, [[*names, *fidelity(rows)] for names, rows in groups.items()])


def attention_fidelity_table() -> str:
    """A row for each size of context; the mean over the pictures, the least in brackets."""
    report = load("fidelity")
    ways = [(shape, steps) for shape in ("brick", "tile") for steps in report["options"]["steps"]]
    headings = ("context", *(f"{shape}, {steps} steps" for shape, steps in ways))
    rows = []
    for context in dict.fromkeys(row["context"] for row in report["attention"]):
        cells = []
        for shape, steps in ways:
            asked = {"context": context, "shape": shape, "steps": steps}
            decibels = [row["psnr"] for row in report["attention"] if asked.items() <= row.items()]
            cells.append(f"{statistics.fmean(decibels):.0f} dB ({min(decibels):.0f})")
        rows.append([f"{context} tokens" if context else "none: blocks alone", *cells])
    return markdown(headings, rows)


def fidelity(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Mean and least PSNR, largest error, and how much larger the mean error is next to seams than elsewhere."""
    decibels = [row["psnr"] for row in rows]
    largest = max(row["maximum_error"] for row in rows)
    seam, elsewhere = (statistics.fmean(row[key] for row in rows) for key in ("seam_error", "error_elsewhere"))
    return [
        f"{statistics.fmean(decibels):.0f} dB",
        f"{min(decibels):.0f} dB",
        f"{largest:.0e}",
        f"{seam / elsewhere:.1f} x elsewhere",
    ]


# Those that have pipelines of the same names in common, and those whose names say all; others are rows of their own.
FAMILIES = {"Stable Diffusion": "SD", "Stable Diffusion XL": "XL", "others": ""}
QUESTIONS = {"unblocked": "nothing blocked: unpatched result", "blocked": "blocked; restored", "exact": "exact parts"}


def autoencoder_table() -> str:
    """A row for each half of an autoencoder: time, live bytes and distance of each way; what a large picture needs."""
    report = load("autoencoders")
    needs = {row["autoencoder"]: row for row in report["simulated"]}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in report["rows"]:
        found.setdefault((row["autoencoder"], row["half"]), {})[row["way"]] = row
    rows = []
    for (name, half), ways in found.items():
        cells = [_own_tiling(ways.get("own tiling")), *(_in_pieces(ways[way], ways) for way in ("default", "exact"))]
        amounts = (needs[name][f"{half}_bytes"][way] / GIB for way in ("untiled", "two-pass", "exact"))
        size = f"{ways['untiled']['size']}²"
        rows.append([name, half, size, *cells, *(f"{amount:.2f}" for amount in amounts)])
    large = f"GiB, {report['simulated'][0]['large']}²: untiled"
    headings = ("autoencoder", "half", "image", "own tiling", "default", "exact", large, "default", "exact")
    rounds = max(len(row.get("seconds", ())) for row in report["rows"])
    return f"{markdown(headings, rows)}\n\n{where(report, rounds)}"


def _own_tiling(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "fails" in row:
        return "fails"
    return f"{row['time_ratio']:.2f}, " + ("equal" if row["psnr"] is None else f"{row['psnr']:.0f} dB")


def _in_pieces(row: dict[str, Any], ways: dict[str, Any]) -> str:
    memory = row["peak_live_bytes"] / ways["untiled"]["peak_live_bytes"]
    told = f"{row['time_ratio']:.2f}, {memory:.2f}, {row['relative_error']:.0e}"
    if "to_float64" not in row:
        return told
    return told + " (to float64: {exact:.0e}, untiled {untiled:.0e})".format(**row["to_float64"])


def transformer_table() -> str:
    """What a step of a joint-attention transformer costs, where it is cut into blocks."""
    rows = []
    for row in load("transformers")["rows"]:
        if row.get("arithmetic_ratio", 1) == 1:  # nothing is blocked, or upstream knows no positions for it
            continue
        dense, ours = row["dense"], row["in blocks"]
        amounts = [f"{each['flops'] / TERA:.0f}" for each in (dense, ours)]
        gibibytes = [f"{each['activations'] / GIB:.1f}" for each in (dense, ours, row["maps on the host"])]
        rows.append(
            [MODEL_NAMES[row["model"]], f"{row['size']}²", *amounts, f"{row['arithmetic_ratio']:.1f}", *gibibytes]
        )
    headings = (
        "a step, counted",
        "image",
        "TFLOP dense",
        "in blocks",
        "ratio",
        "GiB beside weights, dense",
        "blocks",
        "maps on the host",
    )
    return markdown(headings, rows)


def transformer_times_table() -> str:
    """What a block of each kind takes on the CPU, to dense."""
    report = load("transformers")
    kinds = {"num_layers": "a double block of Flux", "num_single_layers": "a single block of Flux"}
    rows = [
        [
            kinds[row["kind"]],
            str(row["tokens"]),
            *(f"{row[ratio]:.2f}" for ratio in ("time_ratio", "arithmetic_ratio", "defaults_ratio")),
        ]
        for row in report["times"]
    ]
    headings = ("to dense, in float32", "tokens", "time in small tiles", "arithmetic of it", "time with the defaults")
    return f"{markdown(headings, rows)}\n\n{where(report, len(report['times'][0]['seconds']['dense']))}"


def transformer_fidelity_table() -> str:
    """PSNR to dense attention, the worst of all seeds and noise levels, by tokens of context."""
    report = load("transformer_fidelity")["rows"]
    contexts = sorted({row["context"] for row in report})
    cases: dict[str, dict[int, list[float]]] = {}
    for row in report:
        what = "one forward" if row["of"] == "one forward" else f"a picture, {row['steps']} steps"
        name = f"{row['times']} times the training side, {what}"
        name += ", one seed" if len({each["seed"] for each in report if each["times"] == row["times"]}) == 1 else ""
        cases.setdefault(name, {}).setdefault(row["context"], []).append(row["psnr"])
    rows = [
        [name, *(f"{min(found[context]):.0f} dB" if context in found else "" for context in contexts)]
        for name, found in cases.items()
    ]
    return markdown(("demo transformer, tokens of context", *map(str, contexts)), rows)


def pipeline_table() -> str:
    """One row for a pipeline, in all families that have it."""
    rows: dict[str, dict[str, dict[str, str]]] = {}  # answers by row and short name of the family
    for family, pipelines in load("pipelines")["results"].items():
        for name, answers in pipelines.items():
            row = name if family in FAMILIES else f"{family}: {name}"
            rows.setdefault(row, {})[FAMILIES.get(family, "")] = answers
    told = [[row, *(_told(families, question) for question in QUESTIONS)] for row, families in rows.items()]
    return markdown(("pipeline", *QUESTIONS.values()), told)


def _told(families: dict[str, dict[str, str]], question: str) -> str:
    """ "SD yes, XL yes": what every family's test of a pipeline said."""
    return ", ".join(
        f"{family} {'yes' if answers[question] == 'passed' else 'no'}".strip() for family, answers in families.items()
    )


def simulated_peaks() -> dict[tuple[str, int], dict[str, float]]:
    """GiB by way, for each model and size."""
    peaks: dict[tuple[str, int], dict[str, float]] = {}
    for row in load("memory")["rows"]:
        if row["kind"] == "simulated":
            peaks.setdefault((row["model"], row["size"]), {})[row["way"]] = row["peak"] / GIB
    return peaks


def headline_table() -> str:
    """What the other tables show at more length."""
    rows = []
    peaks = simulated_peaks()
    for model, size in (("sd15", 8192), ("sd15", 16384), ("sdxl", 8192)):
        ways = [peaks[model, size][way] for way in ("unpatched", "diffusers' tiling", "every saver")]
        rows.append([f"{MODEL_NAMES[model]}, {size}²: peak, simulated", *(f"{peak:.1f} GiB" for peak in ways)])
    steps = gpu_medians("sd15", "step", 8192)
    unpatched, patched = (f"{steps[way]:.1f} s" for way in ("unpatched", "patched"))
    rows.append(["SD 1.5, 8192²: a U-Net step, H200", unpatched, "", patched])
    decodes = gpu_medians("sd15", "decode", 4096)
    names = ("untiled", "diffusers' tiling", "two-pass", "exact")
    untiled, tiling, two, exact = (f"{decodes[way]:.2f} s" for way in names)
    (flux,) = (row for row in load("transformers")["rows"] if (row["model"], row["size"]) == ("flux", 8192))
    dense, ours = (f"{flux[way]['flops'] / TERA / 1000:.1f} PFLOP" for way in ("dense", "in blocks"))
    rows.append(["Flux, 8192²: arithmetic of a step, counted", dense, "", ours])
    unpatched, least = (f"{flux[way]['activations'] / GIB:.1f} GiB" for way in ("dense", "maps on the host"))
    rows.append(["Flux, 8192²: peak beside weights, simulated", unpatched, "", least])
    rows.append(["VAE decode, 4096²: H200", untiled, tiling, f"{two}; exact mode {exact}"])
    fidelity = load("fidelity")
    decodes = [row for row in fidelity["vae"] if row["direction"] == "decode"]
    tiling, two, exact = (
        f"{min(row['psnr'] for row in decodes if row['method'] == method):.0f} dB"
        for method in ("diffusers' tiling", "2 passes", "exact")
    )
    rows.append(["VAE decode in tiles: PSNR to untiled", "", tiling, f"{two}; exact mode {exact}"])
    pictures = [row for row in fidelity["attention"] if row["steps"] == 20 and row["shape"] == "brick"]
    blocks, context = (f"{min(row['psnr'] for row in pictures if row['context'] == n):.0f} dB" for n in (0, 512))
    rows.append(["attention in blocks, 20 steps: PSNR to dense", "", "", f"{context}; without context {blocks}"])
    return markdown(("", "unpatched", "diffusers' tiling", "largerespatch"), rows)


def gpu_rows(part: str) -> list[dict[str, Any]]:
    return list(load("gpu")["parts"][part]["rows"])


def gpu_medians(model: str, stage: str, size: int) -> dict[str, float]:
    """Seconds by way."""
    asked = {"model": model, "stage": stage, "size": size}
    return {row["way"]: row["median"] for row in gpu_rows("times") if asked.items() <= row.items()}


def gpu_peaks_table() -> str:
    """What was told and what CUDA allocated, weights included. Caps that asked for no saver are left out."""
    rows = []
    told = [row for row in gpu_rows("peaks") if row["settings"] or row["limit"] is None]
    for row in sorted(told, key=lambda row: (row["model"], row["size"], row["limit"] or 0)):
        for stage in ("step", "encode", "decode"):
            if stage in row:
                found = row[stage]
                limit = f"{row['limit']} GiB" if row["limit"] else "none"
                amounts = (f"{found[key] / GIB:.2f}" for key in ("estimated", "allocated", "reserved"))
                name = ON_GPU[row["model"]]
                rows.append([name, f"{row['size']}²", limit, stage, *amounts, f"{found['ratio']:.3f}"])
    return markdown(("H200, GiB", "image", "cap", "stage", "estimate", "allocated", "reserved", "of allocated"), rows)


def gpu_times_table() -> str:
    """Medians, a row for each stage and size, a column for each way."""
    rows = []
    cases = list(dict.fromkeys((row["model"], row["stage"]) for row in gpu_rows("times")))
    for model, stage in sorted(cases, key=lambda case: case[1] != "step"):
        for size in sorted({row["size"] for row in gpu_rows("times")}):
            medians = gpu_medians(model, stage, size)
            name = f"{ON_GPU[model]}, {stage}"
            cells = (next((medians[way] for way in ways if way in medians), None) for ways in GPU_WAYS.values())
            rows.append([name, f"{size}²", *("" if cell is None else f"{cell:.3f}" for cell in cells)])
    return markdown(("H200, seconds", "image", *GPU_WAYS), rows)


def gpu_kernels_table() -> str:
    """Milliseconds of attention of one brick, with the log-weights of its context in several ways."""
    ways = ("no weights (wrong)", "mask", "channels", "mask, efficient", "channels, flash", "flex")
    cases: dict[str, dict[str, float]] = {}
    for row in gpu_rows("kernels"):
        if row["way"] in ways and "milliseconds" in row:
            cases.setdefault(row["case"], {})[row["way"]] = row["milliseconds"]
    rows = [[case, *(f"{each[way]:.2f}" if way in each else "" for way in ways)] for case, each in cases.items()]
    return markdown(("H200, milliseconds", *ways), rows)


def memory_table() -> str:
    """Simulated peaks of whole pipelines: a row for each model and size, a column for each way."""
    peaks = simulated_peaks()
    ways = list(dict.fromkeys(way for each in peaks.values() for way in each))
    rows = [
        [MODEL_NAMES[model], f"{size}²", *(f"{each[way]:.1f}" if way in each else "" for way in ways)]
        for (model, size), each in peaks.items()
    ]
    return markdown(("GiB, simulated", "image", *ways), rows)


def host_table() -> str:
    """What leaves the device, with every saver."""
    rows = [row for row in load("memory")["rows"] if row.get("host") and row["size"] >= 4096]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    cells: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["size"]), []).append(f"{row['host'] / GIB:.1f}")
    found = [[MODEL_NAMES[model], f"{size}²", *each] for (model, size), each in cells.items()]
    return markdown(("GiB of the host's, simulated", "image", *ways), found)


def growth_table() -> str:
    """How a patched U-Net step grows between two sizes."""
    cases = load("memory")["growth"]
    sizes = "{small}² to {large}²".format(**cases[0])
    names = MODEL_NAMES | {"tiny": "a U-Net of 32 to 64 channels"}
    rows = [[f"{case['of']}: {names[case['model']]}", f"{case['ratio']:.2f} x"] for case in cases]
    return markdown((f"from {sizes}", "grows by"), rows)


def bands_table() -> str:
    """What each of several processes holds for a step and sends, by kind, and how much faster they are than one."""
    report = load("bands")
    found, at = report["measured"], report["environment"]
    one, everyone = found["peak_live_bytes"].values()
    kinds = list(dict.fromkeys(kind for sent in found["sent"] for kind in sent))
    rows = [
        [str(rank), f"{peak / one:.2f}", *(f"{sent.get(kind, 0) / 2**20:.2f}" for kind in kinds)]
        for rank, (peak, sent) in enumerate(zip(everyone, found["sent"], strict=True))
    ]
    told = (
        f"{MODEL_NAMES[report['model']]}, {found['size']}², one sample: {found['speedup']:.2f} times as fast as one "
        f"process, one thread each, median of {len(found['seconds']['all'])}; the largest difference is "
        f"{found['relative_difference']:.0e} of the largest value. {at['device_name']}, {at['cpu_cores']} cores, "
        f"{at['dtype']}; torch {at['torch']}, diffusers {at['diffusers']}, {at['date'][:10]}."
    )
    headings = ("process", "live bytes, to one alone", *(f"MiB sent: {kind}" for kind in kinds))
    return f"{markdown(headings, rows)}\n\n{told}"


def shares_table() -> str:
    """What two processes take of a step's time and live bytes, to one."""
    report = load("bands")
    found, (case, _) = report["measured"], report["compared"]["cases"]
    ways = case["ways"]
    flux = f"a small Flux, {case['tokens']} tokens"
    rows = [
        [
            f"{MODEL_NAMES[report['model']]}, {found['size']}²",
            f"{1 / found['speedup']:.2f}",
            f"{max(found['peak_live_bytes']['all']) / found['peak_live_bytes']['one']:.2f}",
        ],
        [
            flux,
            f"{ways['bands']['median_seconds'] / ways['one']['median_seconds']:.2f}",
            f"{max(ways['bands']['peak_live_bytes']) / max(ways['one']['peak_live_bytes']):.2f}",
        ],
    ]
    return markdown(("a step by two processes, to one by one (CPU)", "time", "live bytes of each"), rows)


def parallel_table() -> str:
    """Transformers' steps in bands and in diffusers' context parallelism, which do the same work."""
    report = load("bands")["compared"]
    at, cases = report["environment"], report["cases"]
    names = {"one": "one process", "bands": "bands", "ulysses": "diffusers, Ulysses", "ring": "diffusers, ring"}
    rows = []
    for case in cases:
        for way, name in names.items():
            found = case["ways"].get(way)
            if found is None:
                rows.append([MODEL_NAMES[case["model"]], name, f"raises {case['refused'][way]}", "", ""])
                continue
            most = [f"{max(found[each]) / 2**20:.1f}" for each in ("peak_live_bytes", "sent")]
            rows.append([MODEL_NAMES[case["model"]], name, f"{found['median_seconds']:.2f}", *most])
    told = (
        f"{cases[0]['tokens']} tokens and {cases[0]['text_tokens']} of text, dense attention, in turns; median of "
        f"{len(cases[0]['ways']['one']['seconds'])}. {at['device_name']}, {at['cpu_cores']} cores, {at['dtype']}; "
        f"torch {at['torch']}, diffusers {at['diffusers']}, {at['date'][:10]}."
    )
    headings = (
        "a small model's step",
        "two processes, one thread each",
        "seconds",
        "MiB live in each",
        "MiB sent by each",
    )
    return f"{markdown(headings, rows)}\n\n{told}"


def projection_table() -> str:
    """A step on several GPUs, by arithmetic."""
    cases = load("bands")["projected"]
    links = list(cases[0]["rows"][0]["sending_ms"])
    rows = [
        [
            MODEL_NAMES[case["model"]],
            f"{case['size']}²",
            str(row["processes"]),
            f"{row['computing_ms']:.0f}",
            *(f"{row['sending_ms'][link]:.1f}" for link in links),
        ]
        for case in cases
        for row in case["rows"]
    ]
    headings = ("by arithmetic", "image", "GPUs", "ms of computing", *(f"of sending, {link}" for link in links))
    return markdown(headings, rows)


def options_table() -> str:
    """What may be given after the image's size, in the order of the signature."""
    rows = []
    for option in fields(Options):
        unit = re.match("a whole number of (.*?),", option.metadata["accepts"])
        default = f'"{option.default}"' if isinstance(option.default, str) else f"{option.default}"
        told = f"`{default}`" + (f" {unit[1]}" if unit else "")
        rows.append([f"`{option.name}`", told, option.metadata["help"]])
    return markdown(("option", "default", "meaning"), rows)


TABLES = {
    README: (headline_table, options_table, shares_table),
    HERE / "README.md": (
        gpu_peaks_table,
        gpu_times_table,
        gpu_kernels_table,
        memory_table,
        host_table,
        vae_fidelity_table,
        attention_fidelity_table,
        unet_table,
        growth_table,
        vae_table,
        autoencoder_table,
        transformer_times_table,
        transformer_table,
        transformer_fidelity_table,
        bands_table,
        parallel_table,
        projection_table,
        pipeline_table,
    ),
}


def with_table(text: str, table: str) -> str:
    """`text` with `table` in place of the one that begins alike, and of how that was measured if it is said.

    Raises:
        ValueError: there is no such table, or more than one.
    """
    first = re.escape(table.partition("\n")[0])
    rest = r"(?:\n\|.*)*" + (r"\n\n.*" if "\n\n" in table else "")
    changed, count = re.subn(f"^{first}{rest}$", lambda _: table, text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"text must have one table that begins with {table.partition(chr(10))[0]!r}; got {count}")
    return changed


def main() -> None:
    for path, tables in TABLES.items():
        text = path.read_text(encoding="utf-8")
        for table in tables:
            text = with_table(text, table())
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
