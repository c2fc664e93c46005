"""Write every figure for the embedded model: `python docs/gallery.py FOLDER [--form png] [--theme dark]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import tn_lens as tn
from tn_lens import figures
from tn_lens.results.comparison import overlap_of, spread_over_depth

ADAPTIVE_THRESHOLD, SHARE_THRESHOLD = 0.01, 0.4


def gallery(theme: figures.Theme = "light") -> dict[str, figures.Figure]:
    """The figures by name."""
    model, questions = tn.load_model("toy"), tn.load_questions("toy")
    prompts = tn.build_prompts(model, questions.part("find"), order="both")
    check = tn.manipulation_check(model, prompts)
    scores = tn.attribute(model, check.prompts)
    mistakes = [prompt for prompt, right in zip(check.asked, check.right.tolist(), strict=True) if not right]
    mistaken = tn.attribute(model, mistakes)
    selection, stricter = (
        tn.select_neurons(scores, adaptive_threshold=t, share_threshold=SHARE_THRESHOLD)
        for t in (ADAPTIVE_THRESHOLD, 0.1)
    )
    reporting = questions.part("report")
    evaluation = tn.evaluate(model, reporting, selection.neurons)
    elsewhere = tn.evaluate(model, tn.load_questions("toy_four_choice"), selection.neurons)
    spread = [spread_over_depth(each.neurons, each.space.n_layers) for each in (selection, stricter)]
    overlap = np.array([[overlap_of(a, b) for b in spread] for a in spread])
    chosen = (ADAPTIVE_THRESHOLD, SHARE_THRESHOLD)
    doses = tn.dose_response(model, reporting, selection.neurons)
    strongest = selection.candidates[int(selection.mean_difference.argmax())]
    damage = tn.measure_damage(model, selection.neurons, check.prompts)
    converged = tn.convergence_check(model, check.prompts.sample(8, seed=0), adaptive_threshold=ADAPTIVE_THRESHOLD)
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
        "accuracies_elsewhere": figures.plot_accuracies([evaluation, elsewhere], theme=theme),
        "probability_change": figures.plot_probability_change([evaluation, elsewhere], theme=theme),
        "categories": figures.plot_categories(evaluation, theme=theme),
        "dose_response": figures.plot_dose_response(doses, theme=theme),
        "sweep": figures.plot_sweep(tn.sweep(scores), chosen=chosen, theme=theme),
        "candidates": figures.plot_candidates(selection, theme=theme),
        "difference": figures.plot_difference(scores, strongest, mistaken=mistaken, theme=theme),
        "attribution": figures.plot_attribution(scores, 0, theme=theme),
        "completeness": figures.plot_completeness(scores, theme=theme),
        "damage": figures.plot_damage(damage, theme=theme),
        "convergence": figures.plot_convergence(converged, theme=theme),
    }


def main() -> None:
    """Write the figures to files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write; created if it does not exist")
    parser.add_argument("--form", choices=("html", "png", "svg", "pdf"), default="html", help="file format")
    parser.add_argument("--theme", choices=("light", "dark"), default="light", help="theme of the figures")
    parser.add_argument("--only", nargs="*", help="names of figures; all by default")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, figure in gallery(arguments.theme).items():
        if not arguments.only or name in arguments.only:
            figures.save_figure(figure, arguments.folder / f"{name}.{arguments.form}")


if __name__ == "__main__":
    main()
