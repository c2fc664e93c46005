"""The paper's whole pipeline in one call: its stages in order, and the run folder that stores their results."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tn_lens.attribution.attribute import attribute, attribution_chunks, back_off_warning, space_of
from tn_lens.attribution.baseline import post_norm_warning
from tn_lens.attribution.methods import METHODS
from tn_lens.attribution.result import PassSize
from tn_lens.core.errors import BadInput
from tn_lens.core.sentences import say
from tn_lens.core.settings import Settings
from tn_lens.evaluation.diagnosis import diagnose
from tn_lens.evaluation.text import Text, encode_texts
from tn_lens.evaluation.tuning import THRESHOLDS, Tuning, tune_threshold
from tn_lens.inference.manipulation import ManipulationCheck, manipulation_check
from tn_lens.inference.means import mean_activations
from tn_lens.models import Model, backend_of, check_model
from tn_lens.models.isolation import isolated
from tn_lens.pipeline.effect import effect_of, has_loss
from tn_lens.pipeline.parts import split_questions
from tn_lens.pipeline.provenance import describe, fixed_threads, threads_of
from tn_lens.pipeline.settings import resolve_settings, rules_of
from tn_lens.questions.prompts import PromptSet, build_prompts
from tn_lens.questions.question import QuestionSet
from tn_lens.report.page import write_report
from tn_lens.results.found import Provenance, TruthNeurons, load_run
from tn_lens.results.make_cards import make_cards
from tn_lens.runs.chunks import Tensors, chunk_key
from tn_lens.runs.context import Run, map_chunks, tell
from tn_lens.runs.folder import LATE, SCORES, RunFolder
from tn_lens.runs.seals import fingerprint, read_manifest
from tn_lens.runs.workers import workers
from tn_lens.selection.convergence import ConvergenceCheck, convergence_check
from tn_lens.selection.result import Selection
from tn_lens.selection.stability import SPLIT_SEEDS, found_again, stability_of
from tn_lens.selection.stored import BACKED_OFF, StoredScores, pack_scores
from tn_lens.selection.table import SelectionTable, Split, Threshold

DEFAULTS = Settings()
LEAST_KEPT = 6
"""Minimum number of questions that pass the manipulation check: three in each half, so that a test is possible."""


@isolated
def find_truth_neurons(
    model: Model,
    questions: QuestionSet,
    settings: Settings = DEFAULTS,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    drop_long: bool = False,
    force: bool = False,
    progress: bool = True,
    threads: int | None = None,
    command: Sequence[str] | None = None,
    texts: Sequence[Text] | None = None,
) -> TruthNeurons:
    """Find the truth neurons of a model, ablate them, and measure the effect (the paper's whole pipeline).

    Under torchrun, every worker makes this call, and the workers share the work.

    Args:
        model: a model from `load_model`, or a HookedTransformer loaded without weight processing.
        questions: a set from `load_questions`. Its parts "find" and "report" are used; without parts, the whole set for both.
        settings: settings of the run, for example `Settings(adaptive_threshold=0.02, order="both")`.
        out: run folder to write; the run is resumed if the folder contains the same run.
        overwrite: start over if the folder contains another run.
        drop_long: leave out questions beyond the context window instead of raising.
        force: continue even if the manipulation check keeps too few questions, or the answers have too little probability.
        progress: show progress bars, and print the result of the manipulation check as soon as it is known.
        threads: number of torch threads of every worker; by default that of the run folder, or torch's own.
        command: the command line that started the run, for the report.
        texts: plain texts on which the loss is measured, see `text_loss`; by default paragraphs of this package.

    Raises:
        BadInput: see the stages. If the manipulation check stops the run, the message names the likely cause.
        WorkerLost: another worker has died or failed.
    """
    settings = check_arguments(model, questions, settings, out, threads, texts)
    parts = split_questions(questions, settings)
    with started(out, threads, progress) as run:
        asking = {"order": settings.order, "seed": settings.seed, "drop_long": drop_long}
        prompts = run.stage("prompts", build_prompts, model, parts.finding, **asking)  # 1. ask (paper 2.2, 2.3)
        manifest = describe(model, questions, settings, prompts[0].text, texts)
        folder = keep(run, manifest, out, overwrite, command=command, **sources(model, questions))
        check = run.stage("check", checked, folder, model, prompts, force=force)
        # 2. attribute (2.1, 2.2)
        options = run.stage("baseline", attribution_options, model, check, settings)
        scores = run.stage("attribution", attribute_into, folder, model, check, settings, options)
        # 3. select (2.2, 2.3, A.3)
        table = run.stage("selection", selection_table, scores, settings)
        t, tuning = threshold_of(run, model, scores, table, parts.tuning, settings, drop_long=drop_long)
        selection = table.select(t, Split(settings.seed), rules_of(settings))
        # 4. ablate and evaluate (3.3), on plain text as well
        about = {"texts": texts, "drop_long": drop_long}
        selection, evaluation, damage = effect_of(run, model, selection, check, parts.reporting, settings, **about)
        # 5. diagnose the neurons and make cards
        columns = scores.columns(selection.neurons)
        about = {"tested": selection.half_2, "label_means": scores.label_means(columns, selection.half_2)}
        about |= {"n_repetitions": settings.n_repetitions, "seed": settings.seed, "damage": damage}
        diagnosis = run.stage("diagnosis", diagnose, model, selection.neurons, check, parts.finding, **about, **options)
        about = {"selection": selection, "diagnosis": diagnosis, "questions": parts.finding}
        cards = run.stage("cards", make_cards, model, scores, check, columns=columns["difference"], **about)
        found = TruthNeurons(
            model_name=backend_of(model).name,
            questions_name=questions.name,
            settings=settings,
            check=check,
            completeness=scores.completeness(),
            convergence=scores.convergence(),
            convergence_check=run.stage("convergence", against_converged, model, check, settings, t, options),
            selection=selection,
            evaluation=evaluation,
            is_held_out=parts.is_held_out,
            diagnosis=diagnosis,
            stability=stability_of(table, t, rules_of(settings)),
            found_again=again_with_every_order(table, selection),
            tuning=tuning,
            notes=notes_of(run, model, settings),
            cards=cards,
            provenance=Provenance.of(read_manifest(folder.path / "manifest.json"), folder.path.name),
        )
        return finish(run, found)


def check_arguments(
    model: Model,
    questions: QuestionSet,
    settings: Settings,
    out: str | Path | None,
    threads: int | None,
    texts: Sequence[Text] | None = None,
) -> Settings:
    """Check the arguments, and fill in the settings.

    Raises:
        BadInput: an argument is invalid.
    """
    check_model(model)
    if not isinstance(questions, QuestionSet):
        raise BadInput(f"expected a QuestionSet, got {questions!r:.60}; load one with load_questions(...)")
    if out is not None and not str(out).strip():
        raise BadInput("expected the path of a run folder, got an empty one; give a path such as runs/mine")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise BadInput(f"threads must be a positive integer; got {threads!r}")
    if out is None and workers().n_workers > 1:
        raise BadInput("several workers share their work through the run folder; give one with out=")
    settings = resolve_settings(model, settings)
    if texts is not None:
        encode_texts(model, texts)  # raises if there is nothing to predict
    if (settings.exclude or texts is not None) and not has_loss(model, settings, texts):
        raise BadInput(
            "the loss on plain text needs a tokenizer, and an intervention at all positions that takes no values from other "
            f"prompts; got {settings.intervention!r}; leave out exclude and texts"
        )
    return settings


@contextmanager
def started(out: str | Path | None, threads: int | None, progress: bool) -> Iterator[Run]:
    """Context manager in which the stages of a run may be called; closes the run folder on exit."""
    run = Run(progress=progress and workers().is_first)
    with fixed_threads(threads or threads_of(out)), ExitStack() as run.resources, run:
        yield run


def keep(run: Run, manifest: Mapping[str, Any], out: str | Path | None, overwrite: bool, **notes: Any) -> RunFolder:
    """Open the run folder (or a temporary one), which stores the chunks, and record the origin of the run in it."""
    together = workers()
    together.agree(manifest, str(manifest["device"]))
    path = Path(run.resources.enter_context(tempfile.TemporaryDirectory())) / "run" if out is None else Path(out)
    folder = run.resources.enter_context(RunFolder.open(path, manifest, overwrite=overwrite, workers=together))
    folder.log("start", n_workers=together.n_workers, n_threads=manifest["n_threads"])
    for key, value in notes.items():
        folder.note(key, value)
    basis = {key: value for key, value in manifest.items() if key not in LATE}
    run.folder, run.basis, run.is_kept = folder, fingerprint(basis), out is not None
    return folder


def sources(model: Model, questions: QuestionSet) -> dict[str, Any]:
    """The sources from which model and questions were loaded."""
    return {"model_source": vars(model).get("loaded_from"), "questions_source": questions.source}


def checked(folder: RunFolder, model: Model, prompts: PromptSet, *, force: bool) -> ManipulationCheck:
    """The manipulation check of a run.

    Raises:
        BadInput: the model answers no question correctly (the folder is removed); or, unless `force` is set, too few for
            the test, or the answers have too little probability.
    """
    check = manipulation_check(model, prompts)
    tell(check.explain())
    if not check.prompts:
        folder.workers.wait()
        folder.remove()
    if not check.prompts or (not force and (check.has_little_mass or check.n_kept < LEAST_KEPT)):
        raise BadInput(say("check.stop", check, LEAST_KEPT))
    return check


def attribution_options(model: Model, check: ManipulationCheck, settings: Settings) -> dict[str, Any]:
    """The keyword arguments of `attribute`; a mean baseline is that of the kept prompts.

    The baseline "input" stays a name, since it differs between prompts.
    """
    baseline: Any = settings.baseline
    if baseline == "mean":
        baseline = mean_activations(model, check.prompts, positions=settings.positions, sites=settings.sites)
    return {"baseline": baseline, **settings.of_attribution()}


def attribute_into(
    folder: RunFolder, model: Model, check: ManipulationCheck, settings: Settings, options: dict[str, Any]
) -> StoredScores:
    """Attribute the kept prompts chunk by chunk.

    If memory runs out, the pass size that fitted is used for all further chunks, stored in `options`, and recorded in the
    manifest.
    """
    chunks = attribution_chunks(model, check.prompts)
    # a resumed run continues with the size that fitted before
    noted = folder.noted(BACKED_OFF)
    size = PassSize(**noted) if noted else None

    def compute(index: int) -> Tensors:
        nonlocal size
        scores = attribute(model, chunks[index], separate=settings.separate, internal_batch_size=size, **options)
        if scores.pass_size != scores.planned:
            size = PassSize(*scores.pass_size)
            folder.note(BACKED_OFF, size._asdict())
        return pack_scores(scores, size)

    done = map_chunks(SCORES, [chunk_key(chunk) for chunk in chunks], compute, "attribution")
    scores = StoredScores(folder, space_of(model, settings.sites), chunks, getattr(done, "keys", ()))
    if folder.workers.is_first:
        scores.save_index()
    if fitted := scores.backed_off():
        folder.note(BACKED_OFF, fitted._asdict())
        options["internal_batch_size"] = fitted
    return scores


def selection_table(scores: StoredScores, settings: Settings) -> SelectionTable:
    """Counts and moments for every threshold and split that the run needs, in two passes over the scores."""
    is_tuned = settings.adaptive_threshold == "auto"
    ts: Sequence[Threshold] = THRESHOLDS if is_tuned else [settings.adaptive_threshold]  # pyright: ignore
    # the split of the run and those of the stability check
    splits = [Split(seed) for seed in (settings.seed, *SPLIT_SEEDS)]
    if scores.prompts.n_orders > 1:
        splits.append(Split(settings.seed, drawn=settings.seed))
    return SelectionTable(scores, ts=ts, splits=splits, share_threshold=settings.share_threshold)


def threshold_of(
    run: Run,
    model: Model,
    scores: StoredScores,
    table: SelectionTable,
    questions: QuestionSet,
    settings: Settings,
    *,
    drop_long: bool,
) -> tuple[float, Tuning | None]:
    """The threshold t of the settings, or that tuned on the questions, and the search for it."""
    t = settings.adaptive_threshold
    if t != "auto":
        assert t is not None
        return t, None
    about = {"rules": rules_of(settings), "seed": settings.seed, "drop_long": drop_long, "table": table}
    tuning = run.stage("tuning", tune_threshold, model, scores, questions, **about)
    return tuning.t, tuning


def against_converged(
    model: Model, check: ManipulationCheck, settings: Settings, t: float, options: Mapping[str, Any]
) -> ConvergenceCheck | None:
    """Compare the scores of a quadrature rule with converged ones, on a sample of the kept questions.

    None for other methods, and without a sample.
    """
    if METHODS[settings.method].tolerance != 0 or not settings.convergence_sample:
        return None
    sample = check.prompts.sample(settings.convergence_sample, settings.seed)
    about = {name: value for name, value in options.items() if name not in ("tolerance", "max_nodes")}
    thresholds = {"adaptive_threshold": t, "share_threshold": settings.share_threshold}
    return convergence_check(model, sample, max_nodes=settings.max_nodes, **thresholds, **about)


def again_with_every_order(table: SelectionTable, selection: Selection) -> float | None:
    """Fraction of the neurons found with one order per question that are found again; None if one order was asked."""
    split = Split(selection.seed, drawn=selection.seed)
    if split not in table.halves:
        return None
    once = table.select(selection.adaptive_threshold, split, selection.rules).without(selection.excluded)
    return found_again(once.neurons, selection.neurons)


def notes_of(run: Run, model: Model, settings: Settings) -> tuple[str, ...]:
    """The warnings of a run: about the method, about memory, and those of the stages."""
    assert run.folder is not None
    fitted = run.folder.noted(BACKED_OFF)
    first = Run()
    first.note(post_norm_warning(model, settings.method, settings.baseline, settings.baseline_input))
    first.note(fitted and back_off_warning(PassSize(**fitted)))
    return tuple(first.notes | run.notes)


def finish(run: Run, found: TruthNeurons) -> TruthNeurons:
    """Write the result and its report, unless the run is in memory, and return it; the first worker writes for all."""
    folder = run.folder
    assert folder is not None
    if run.is_kept and folder.workers.is_first:
        for name, content in found.files():
            folder.write(name, content)
        folder.write("report.html", report_bytes(found))
        folder.note("neurons_sha256", folder.digest("neurons.json"))  # `tn-lens evaluate` checks it
    folder.workers.wait()
    folder.log("end")
    return found


def report_bytes(found: TruthNeurons) -> bytes:
    """The content of report.html."""
    return write_report(found).encode(errors="xmlcharrefreplace")


def rewrite_report(path: Path) -> None:
    """Rewrite the report of a run folder, with the evaluations on other question sets that the folder contains.

    Raises:
        BadInput: there is no finished run, or one of its files is damaged.
    """
    RunFolder(path).write("report.html", report_bytes(load_run(path)))
