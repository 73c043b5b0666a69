"""The two charts of check.html as inline SVG: a histogram, and a share with its interval.

Drawn here and not by matplotlib: the page's style sheet colours them for light and dark, and a
bar is one element and not a path of ten.
"""

from html import escape

from ..data.inspection.lengths import Histogram

_WIDTH, _HEIGHT = 340, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 8, 14, 26


def histogram_svg(histogram: Histogram, label: str, unit: str, limit: int | None = None) -> str:
    """A histogram of lengths.

    Args:
        histogram: the bars.
        label: what is counted, for those who hear the page.
        unit: of the lengths.
        limit: a length to mark by a line.

    Returns:
        An SVG element.
    """
    counts, width = histogram.counts, histogram.width
    room, floor = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM
    step, most = room / len(counts), max(counts)
    parts = []
    for i, rows in enumerate(counts):
        if not rows:
            continue
        # A single row among thousands is still to be seen.
        height = max(rows / most * (floor - _TOP), 1.5)
        last = i == len(counts) - 1
        span = f"{i * width} or more" if last else f"{i * width} to {(i + 1) * width - 1}"
        parts.append(
            f'<rect class="bar" x="{_LEFT + i * step + 0.5:.1f}" y="{floor - height:.1f}" '
            f'width="{max(step - 1, 1):.1f}" height="{height:.1f}">'
            f"<title>{span} {escape(unit)}: {rows} rows</title></rect>"
        )
    for i in _ticks(len(counts)):
        anchor = "start" if i == 0 else "middle"
        x = _LEFT + i * step
        parts.append(
            f'<text x="{x:.1f}" y="{floor + 15}" text-anchor="{anchor}">{i * width}</text>'
        )
    end = len(counts) * width
    if limit is not None and limit < end:
        x = _LEFT + limit / width * step
        anchor = "end" if x > _WIDTH / 2 else "start"
        shift = -3 if anchor == "end" else 3
        parts.append(
            f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{floor}"/>'
            f'<text class="limit" x="{x + shift:.1f}" y="11" text-anchor="{anchor}">'
            f"max_length {limit}</text>"
        )
    parts.append(f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{floor}" y2="{floor}"/>')
    return _svg(_HEIGHT, f"Histogram: {label}, in {unit}", parts)


def share_svg(share: float, low: float, high: float, label: str) -> str:
    """A share on a line from 0 to 1, its interval, and a mark at one half.

    Returns:
        An SVG element.
    """

    def at(value: float) -> float:
        return _LEFT + value * (_WIDTH - _LEFT - _RIGHT)

    parts = [
        f'<line class="axis" x1="{at(0)}" x2="{at(1)}" y1="18" y2="18"/>',
        f'<line class="limit" x1="{at(0.5)}" x2="{at(0.5)}" y1="8" y2="28"/>',
        f'<line class="range" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="18" y2="18"/>',
        f'<circle class="bar" cx="{at(share):.1f}" cy="18" r="5.5"/>',
        f'<text x="{at(0)}" y="42">0</text>',
        f'<text x="{at(0.5)}" y="42" text-anchor="middle">0.5 (a coin)</text>',
        f'<text x="{at(1)}" y="42" text-anchor="end">1</text>',
    ]
    return _svg(46, f"{label}: {share:.2f}, between {low:.2f} and {high:.2f}", parts)


def _ticks(bars: int) -> range:
    return range(0, bars, max(round(bars / 5), 1))


def _svg(height: int, label: str, parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
