"""Write figures to files."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from tn_lens.core.errors import BadInput

IMAGES = (".png", ".svg", ".pdf")
WIDTH, SCALE = 1000, 2


def save_figure(figure: go.Figure, path: str | Path, *, width: int = WIDTH, scale: float | int = SCALE) -> None:
    """Write .html (one file that works offline), .png, .svg or .pdf, depending on the file ending.

    Args:
        figure: any plotly figure.
        path: the file to write.
        width: width of an image in pixels; its height is the figure's. An HTML page is as wide as its window, up to the
            1000 pixels for which titles are wrapped.
        scale: pixels of a .png per pixel of the figure.

    Raises:
        BadInput: the file ending is not supported, the file cannot be written, or an image is requested and kaleido or Chrome
            is missing.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending != ".html" and ending not in IMAGES:
        raise BadInput(f"expected a file that ends in .html, {', '.join(IMAGES)}, got {str(path)!r}")
    try:
        if ending == ".html":
            figure.write_html(path, include_plotlyjs=True, default_width=f"min(100%, {WIDTH}px)")
        else:
            path.write_bytes(_image(figure, ending.removeprefix("."), width, scale))
    except OSError as error:
        raise BadInput(f"cannot write {str(path)!r}: {error.strerror or error}; give another path") from error


def _image(figure: go.Figure, form: str, width: int, scale: float | int) -> bytes:
    instead = "or save the figure as .html, which requires neither"
    try:
        import kaleido  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadInput(
            f"a .{form} requires kaleido and Chrome or Chromium: pip install 'truth-neurons[image]', {instead}"
        ) from None
    try:
        return figure.to_image(format=form, width=width, scale=scale)
    except Exception as error:  # kaleido's browser fails in many ways, without a common class
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"kaleido could not draw a .{form}: it requires Chrome or Chromium, and reported {reason!r}; install one (or "
            f"set BROWSER_PATH to it), {instead}"
        ) from error
