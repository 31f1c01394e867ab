"""The card of a quantised checkpoint: README.md beside the numbers of `pagemill-quantization.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagemill.files import written_whole

_FORMS = {
    "int4": "4-bit weights in groups, 16-bit activations (W4A16; pagemill on a CPU: 8-bit activations)",
    "int8": "8-bit weights and activations (W8A8, a scale a row and a token)",
    "fp8": "e4m3 weights and activations (a scale a row and a token)",
}


def write_readme(folder: Path, card: Mapping[str, Any]) -> None:
    """Write README.md, all of it or nothing."""
    with written_whole(folder / "README.md") as file:
        file.write_text(readme(card), "utf-8", "backslashreplace")


def readme(card: Mapping[str, Any]) -> str:
    """The card in Markdown."""
    group = f", groups of {card['group_size']}" if card["group_size"] else ""
    lines = [
        f"# {card['model']}, {card['scheme']}",
        "",
        f"Made by pagemill {card['pagemill']} from {card['model']}; a compressed-tensors checkpoint.",
        "",
        "| part | form |",
        "|---|---|",
        f"| decoder | {_FORMS[card['decoder']]}{group} |",
        f"| vision tower | {_FORMS[card['vision']]} |",
        "| embedding, output layer, patch embedding, merger, norms | as they were |",
        "",
        f"{card['bytes'] / 1e9:.3g} GB, {card['bytes_before'] / 1e9:.3g} before. "
        f"Calibrated on {card['calibration']['pages']} pages, "
        f"{card['calibration']['tokens']} tokens and {card['calibration']['patches']} patches, in {card['seconds']:.0f} s; "
        f"peak memory of that {card['peak_memory_bytes'] / 1e9:.1f} GB.",
        "",
    ]
    mixed = card["scheme"] == "mixed"
    if mixed:
        lines += [
            "`pagemill-wide.safetensors` holds the decoder's layers once more in int8, for many rows at a time.",
            "",
        ]
    if card["plain"]:
        lines += [f"Left as they were, since 8 bits cost too much there: {', '.join(card['plain'])}.", ""]
    if card["key_outliers"]:
        names = ", ".join(card["key_outliers"])
        lines += [f"Keys with outliers, better kept in bfloat16: {names}.", ""]
    if score := card.get("score"):
        lines += [
            f"## Score on {score['pages']} other pages",
            "",
            "| | before | after |",
            "|---|--:|--:|",
            *(
                f"| {title} | {score['before'][key]:.4f} | {score['after'][key]:.4f} |"
                for key, title in (
                    ("benchmark_score", "benchmark_score"),
                    ("cer", "CER"),
                    ("degeneration_rate", "degenerate pages"),
                )
            ),
            "",
        ]
    lines += [
        "## Error by layer",
        "",
        "Squared error of the outputs over their square, on calibration inputs; beside it that of rounding to nearest.",
        "",
        "| layer | form | error | nearest | in int8 |" if mixed else "| layer | form | error | nearest |",
        "|---|---|--:|--:|--:|" if mixed else "|---|---|--:|--:|",
    ]
    for unit, report in card["blocks"].items():
        lines += [
            f"| {unit}.{layer} | {found['form']} | {found['error']:.2e} | {found['nearest']:.2e} |"
            + (f" {found['wide']:.2e} |" if "wide" in found else " |" if mixed else "")
            for layer, found in report["layers"].items()
        ]
    return "\n".join(lines) + "\n"
