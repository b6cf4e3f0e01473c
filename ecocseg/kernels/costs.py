"""What an operator must move and compute at least, whatever computes it, and how long a GPU's peak rates take for that.

Counted are: each input read and each output written once; fused multiply-adds of resizing and its adjoint (4 a value), of
elementwise maths, and of the products with codewords; exp, log and reciprocals, one each. Not counted are what a kernel does
beyond that: padding (40 bits take 48 columns), three parts of every product, windows of cells that tiles share.

Shapes: B batch, N classes, K outputs, h w cells of the logits, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    bytes: int
    fma: int
    """Multiply-adds on the ordinary cores."""
    matrix_fma: int
    """Multiply-adds of products with codewords, which tensor cores can do."""
    special: int
    """exp, log and reciprocals."""

    def seconds(self, peak: Peak) -> dict[str, float]:
        """How long each takes by itself; the longest binds."""
        return {"bytes": self.bytes / peak.bytes, "fma": self.fma / peak.fma,
                "matrix_fma": self.matrix_fma / peak.matrix_fma, "special": self.special / peak.special}

    def bound(self, peak: Peak) -> tuple[str, float]:
        """What binds, and the seconds it takes."""
        seconds = self.seconds(peak)
        name = max(seconds, key=lambda each: seconds[each])
        return name, seconds[name]


@dataclass(frozen=True)
class Peak:
    """Rates of a device, each a second."""

    bytes: float
    fma: float
    matrix_fma: float
    special: float


# NVIDIA's data sheets (SXM): memory; float32 FLOP / 2; dense bfloat16 FLOP / 2; 16 special functions a clock and multiprocessor
# (132 of them at 1.755 GHz)
PEAKS = {"H200": Peak(4.8e12, 33.5e12, 495e12, 3.7e12), "H100": Peak(3.35e12, 33.5e12, 495e12, 3.7e12)}
OPERATORS = ("ecoc_pseudo_label", "one_hot_pseudo_label", "ecoc_loss", "cross_entropy", "ecoc_count", "one_hot_count")


def peak_of(device_name: str) -> Peak | None:
    """Rates of the device that calls itself so; None for one not listed."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


def costs(operator: str, B: int, N: int, K: int, h: int, w: int, H: int, W: int, *, element: int = 4,
          gradient: bool = True) -> Costs:
    """Costs of one call. One-hot operators have N outputs and ignore K. `element`: bytes of a logit; `gradient`: the losses
    give theirs too. Bit mining is counted without its further rounds, which depend on the data."""
    if operator not in OPERATORS:
        raise ValueError(f"operator {operator!r} is none of {', '.join(OPERATORS)}")
    ecoc = operator.startswith("ecoc")
    outputs, words = (K, (K + 63) // 64) if ecoc else (N, 0)
    resize = 0 if (h, w) == (H, W) else 4 * outputs
    products = N * outputs if ecoc else 0
    logits = B * outputs * h * w * element
    if operator.endswith("pseudo_label"):
        per_pixel = (8 + 8 * words + (8 if ecoc else 4), resize + 2 * outputs, products, 2 * outputs if ecoc else N + 1)
    elif operator.endswith("count"):
        per_pixel = (8, resize + 2 * outputs, products, 2 * outputs if ecoc else N + 1)
    elif ecoc:  # |z|, the target's product and cross-entropy, then along target, z and the cross-entropy's slope
        per_pixel = (12 + 8 * words, resize + 5 * outputs + N, products, 3 * outputs + N + 3)
        if gradient:
            per_pixel = (per_pixel[0], per_pixel[1] + resize + 3 * outputs, 2 * products, per_pixel[3])
    else:
        per_pixel = (12, resize + outputs + (resize + outputs if gradient else 0), 0, N + 2)
    pixels = B * H * W
    moved = logits * (2 if gradient and operator in ("ecoc_loss", "cross_entropy") else 1) + pixels * per_pixel[0]
    return Costs(moved, *(pixels * each for each in per_pixel[1:]))
