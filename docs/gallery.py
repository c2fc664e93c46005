"""Every figure once, from a run of the embedded model: `python docs/gallery.py FOLDER [--form png] [--theme dark]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import tn_lens as tn
from tn_lens import figures
from tn_lens.evaluation import dose_response
from tn_lens.inference.manipulation import is_right
from tn_lens.results.comparison import overlap_of, spread_over_depth
from tn_lens.selection.stability import sweep

T, P = 0.01, 0.4


def gallery(theme: figures.Theme = "light") -> dict[str, figures.Figure]:
    """The figures by name."""
    model, questions = tn.load_model("toy"), tn.load_questions("toy")
    prompts = tn.build_prompts(model, questions.part("find"), order="both")
    check = tn.manipulation_check(model, prompts)
    scores = tn.attribute(model, check.prompts)
    right = is_right(check.probabilities, check.asked).tolist()
    mistaken = tn.attribute(model, [p for p, passed in zip(check.asked, right, strict=True) if not passed])
    selection = tn.select_neurons(scores, t=T, p=P)
    stricter = tn.select_neurons(scores, t=0.1, p=P)
    reporting = questions.part("report")
    evaluation = tn.evaluate(model, reporting, selection.neurons)
    elsewhere = [tn.evaluate(model, tn.load_questions(name), selection.neurons) for name in ("toy_four_choice",)]
    spread = [spread_over_depth(one.neurons, one.space.n_layers) for one in (selection, stricter)]
    overlap = np.array([[overlap_of(a, b) for b in spread] for a in spread])
    strongest = selection.candidates[int(selection.mean_difference.argmax())]
    return {
        "layers": figures.plot_layers({"toy": selection}, theme=theme),
        "layers_of_several": figures.plot_layers({"t = 1 %": selection, "t = 10 %": stricter}, theme=theme),
        "overlap": figures.plot_overlap(
            ["t = 1 %", "t = 10 %"],
            overlap,
            title=f"Two thresholds share {100 * overlap[0, 1]:.0f} % of their distribution over depth",
            theme=theme,
        ),
        "accuracies": figures.plot_accuracies(evaluation, theme=theme),
        "accuracies_elsewhere": figures.plot_accuracies([evaluation, *elsewhere], theme=theme),
        "probability_change": figures.plot_probability_change([evaluation, *elsewhere], theme=theme),
        "categories": figures.plot_categories(evaluation, theme=theme),
        "dose_response": figures.plot_dose_response(dose_response(model, reporting, selection.neurons), theme=theme),
        "sweep": figures.plot_sweep(sweep(scores), chosen=(T, P), theme=theme),
        "candidates": figures.plot_candidates(selection, theme=theme),
        "difference": figures.plot_difference(scores, strongest, mistaken=mistaken, theme=theme),
        "attribution": figures.plot_attribution(scores, 0, theme=theme),
        "completeness": figures.plot_completeness(scores, theme=theme),
    }


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--form", choices=("html", "png", "svg", "pdf"), default="html")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--only", nargs="*", help="names of figures; all by default")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    for name, figure in gallery(asked.theme).items():
        if not asked.only or name in asked.only:
            figures.save_figure(figure, asked.folder / f"{name}.{asked.form}")


if __name__ == "__main__":
    main()
