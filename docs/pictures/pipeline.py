"""Draws `pipeline.svg`, the picture of the README: `python docs/pictures/pipeline.py`.

Needs the standard library only. The background is opaque: the text is readable on light and on dark pages.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN = 980, 550, 20

#: Fill and border of a box by what it stands for.
COLORS = {
    "float": ("#f3f4f6", "#6b7280"),
    "packed": ("#dbeafe", "#1d4ed8"),
    "online": ("#fef3c7", "#b45309"),
    "cache": ("#dcfce7", "#15803d"),
}
TEXT, FAINT = "#111827", "#4b5563"

#: Width of a character of the widest fonts that stand in for sans-serif, in units of the font's size.
CHARACTER = 0.6


class Picture:
    """Elements of the SVG, in the order they are drawn."""

    def __init__(self) -> None:
        self.elements: list[str] = []

    def text(self, x: float, y: float, text: str, size: int = 12, color: str = TEXT, **style: str) -> None:
        attributes = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}"{attributes}>{escape(text)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, kind: str, *lines: str) -> None:
        """A box whose first line is its title; raises ValueError for a line that is wider than the box."""
        fill, border = COLORS[kind]
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" '
            f'stroke="{border}" stroke-width="1.5"/>'
        )
        top = y + height / 2 - 8 * (len(lines) - 1) + 4
        for i, line in enumerate(lines):
            size = 13 if i == 0 else 11
            if len(line) * size * CHARACTER > width:
                raise ValueError(f"{line!r} is wider than its box of {width:g}; shorten the line")
            weight = "bold" if i == 0 else "normal"
            color = TEXT if i == 0 else FAINT
            self.text(
                x + width / 2, top + 16 * i, line, size, color, text_anchor="middle", font_weight=weight
            )

    def arrow(self, *points: tuple[float, float]) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.elements.append(
            f'<polyline points="{path}" fill="none" stroke="{FAINT}" stroke-width="1.5" '
            'marker-end="url(#tip)"/>'
        )

    def row(self, y: float, width: float, height: float, boxes: list[tuple[str, ...]], x: float, gap: float):
        """Boxes side by side with arrows between them; returns the right end of the last one."""
        for i, (kind, *lines) in enumerate(boxes):
            left = x + i * (width + gap)
            if i:
                self.arrow((left - gap + 2, y + height / 2), (left - 3, y + height / 2))
            self.box(left, y, width, height, kind, *lines)
        return x + len(boxes) * (width + gap) - gap

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
            f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, sans-serif" role="img">\n'
            "<title>From a float model to a packed checkpoint, and a decoder layer at run time</title>\n"
            '<defs><marker id="tip" markerWidth="7" markerHeight="7" refX="6" refY="3" orient="auto">'
            f'<path d="M0,0 L6,3 L0,6 z" fill="{FAINT}"/></marker></defs>\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>\n'
        )
        return head + "\n".join(self.elements) + "\n</svg>\n"


def residual(picture: Picture, y: float, boxes: list[tuple[str, ...]]) -> None:
    """Half a decoder layer: what is added to the residual stream, and the stream above it."""
    width, gap, height, left = 122, 22, 44, MARGIN + 46
    end = picture.row(y, width, height, boxes, left, gap)
    middle, plus = y + height / 2, end + 36
    picture.text(MARGIN, middle + 4, "x", 14, font_weight="bold")
    picture.arrow((MARGIN + 14, middle), (left - 3, middle))
    picture.arrow((MARGIN + 24, middle), (MARGIN + 24, y - 14), (plus, y - 14), (plus, middle - 12))
    picture.arrow((end + 2, middle), (plus - 12, middle))
    picture.elements.append(
        f'<circle cx="{plus:g}" cy="{middle:g}" r="9" fill="#ffffff" stroke="{FAINT}" stroke-width="1.5"/>'
    )
    picture.text(plus, middle + 5, "+", 15, text_anchor="middle", font_weight="bold")


def draw() -> str:
    picture = Picture()
    picture.text(MARGIN, 30, "Once: from a model to a checkpoint", 15, font_weight="bold")
    stages = [
        ("float", "Model", "transformers", "or GGUF"),
        ("float", "Rotate", "R1, R2 folded", "into the weights"),
        ("packed", "Fit", "GPTQ, layer after", "layer, 4-bit input"),
        ("packed", "Train", "levels, weights,", "clips (optional)"),
        ("packed", "Pack", "codes, levels,", "scales"),
        ("packed", "Checkpoint", "safetensors,", "manifest"),
    ]
    picture.row(44, 138, 68, stages, MARGIN, 22.4)

    picture.text(MARGIN, 152, "Every token: a decoder layer on packed integers", 15, font_weight="bold")
    residual(
        picture,
        188,
        [
            ("float", "RMSNorm", "to 4 bits"),
            ("packed", "q, k, v", "2-bit weights"),
            ("online", "RoPE, R3"),
            ("cache", "KV cache", "4-bit codes"),
            ("float", "Attention", "to 4 bits"),
            ("packed", "o", "2-bit weights"),
        ],
    )
    residual(
        picture,
        274,
        [
            ("float", "RMSNorm", "to 4 bits"),
            ("packed", "gate, up", "2-bit weights"),
            ("float", "SiLU · up"),
            ("online", "R4", "Hadamard"),
            ("float", "Quantise", "to 4 bits"),
            ("packed", "down", "2-bit weights"),
        ],
    )

    picture.text(MARGIN, 362, "What calls the layer, and what computes it", 15, font_weight="bold")
    callers = ["generate (transformers)", "w2a4.Engine", "torch.compile", "w2a4 eval, generate, chat"]
    kernels = ["CPU: C++, AVX2 to VNNI", "CUDA: 1 to 16 tokens", "Triton: 17 and more", "PyTorch reference"]
    for i, (caller, kernel) in enumerate(zip(callers, kernels, strict=True)):
        left = MARGIN + i * 240
        picture.box(left, 376, 220, 36, "float", caller)
        picture.arrow((left + 110, 414), (left + 110, 431))
        picture.arrow((left + 110, 468), (left + 110, 487))
        picture.box(left, 490, 220, 36, "packed", kernel)
    door = "w2a4.ops: one function an op; device and number of tokens choose the kernel"
    picture.box(MARGIN, 434, WIDTH - 2 * MARGIN, 32, "float", door)
    return picture.svg()


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
