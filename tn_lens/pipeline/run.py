"""The whole paper in one call: the stages in order, and the run folder that keeps what they made."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tn_lens.attribution import attribute, post_norm_warning
from tn_lens.attribution.attribute import BATCH_SIZE, back_off_warning, choose_engine
from tn_lens.attribution.result import PassSize
from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.evaluation import PAPER_ARMS, evaluate
from tn_lens.evaluation.diagnosis import diagnose
from tn_lens.evaluation.tuning import tune_threshold
from tn_lens.inference.interventions import mean_activations
from tn_lens.inference.manipulation import ManipulationCheck, manipulation_check
from tn_lens.models import Model, backend_of, check_model, neuron_space
from tn_lens.pipeline.settings import Settings, resolve_settings
from tn_lens.prompts import build_prompts
from tn_lens.questions.question import QuestionSet
from tn_lens.report.page import write_report
from tn_lens.results import load_cards, make_cards
from tn_lens.results.found import TruthNeurons
from tn_lens.results.run import load_run
from tn_lens.runs.folder import SCORES, RunFolder, StoredUnits
from tn_lens.runs.seals import fingerprint, read_manifest
from tn_lens.runs.units import Mapper, Tensors, cut_prompts, unit_key, within
from tn_lens.runs.workers import workers
from tn_lens.selection.select import select_neurons
from tn_lens.selection.stability import found_again, stability
from tn_lens.selection.stored import BACKED_OFF, StoredScores, pack_scores

TUNING_SHARE = 0.2
"""Share of a set without parts that t is tuned on."""


def find_truth_neurons(
    model: Model,
    questions: QuestionSet,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    drop_long: bool = False,
    progress: bool = True,
    threads: int | None = None,
    **settings: Any,
) -> TruthNeurons:
    """Find the truth neurons of a model, suppress them, and say what that does (the paper's whole pipeline).

    Started with torchrun, every worker makes this call, and they share the work.

    Args:
        model: from `load_model`, or a HookedTransformer loaded without weight processing.
        questions: from `load_questions`. Where a set has parts (the toy), neurons are found on "find" and the arms are
            evaluated on "report"; elsewhere the whole set serves both, as in the paper.
        out: a run folder to write; it is resumed if it holds the same run.
        overwrite: start over where the folder holds another run.
        drop_long: leave out questions beyond the context window instead of refusing.
        progress: show progress bars.
        threads: of torch, for every worker; the run folder's own, or what torch takes, by default. Numbers differ in their
            last bits between numbers of threads, so it is one of the run's settings.
        settings: any field of `Settings`; what is not given (or None) is what the paper used, or what suits the model.

    Raises:
        BadInput: see the stages; nothing is left in the run folder before the model has answered a question right.
        WorkerLost: another worker has died or failed.
    """
    check_model(model)
    if not isinstance(questions, QuestionSet):
        raise BadInput(f"expected a QuestionSet, got {questions!r:.60}; load one with load_questions(...)")
    if out is not None and not str(out).strip():
        raise BadInput("the run folder's name is empty; give one like runs/mine")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise BadInput(f"threads must be a whole number and at least 1; got {threads!r}")
    resolved = resolve_settings(model, **settings)
    together = workers()
    if out is None and together.n_workers > 1:
        raise BadInput("several workers share their work through the run folder; give one with out=")
    progress = progress and together.is_first
    with (
        fixed_threads(threads or threads_of(out)),
        warnings.catch_warnings(record=True) as raised,
        tempfile.TemporaryDirectory() as scratch,
    ):
        warnings.simplefilter("always", UserWarning)
        finding, reporting, tuning_questions = split_questions(questions, resolved)
        prompts = build_prompts(model, finding, order=resolved.order, seed=resolved.seed, drop_long=drop_long)
        manifest = describe(model, questions, resolved, prompts[0].text)
        together.agree(manifest, str(backend_of(model).device))
        path = Path(scratch) / "run" if out is None else out
        with RunFolder.open(path, manifest, overwrite=overwrite, workers=together) as folder:
            folder.log("start", n_workers=together.n_workers, n_threads=manifest["n_threads"])
            folder.note("model_source", vars(model).get("loaded_from"))
            folder.note("questions_source", questions.source)
            mapper = StoredUnits(folder, fingerprint(manifest))
            check = manipulation_check(model, prompts, progress=progress, mapper=within(mapper, "check"))
            if not check.prompts:
                together.wait()
                folder.remove()
                raise BadInput(
                    f"no question is left after the manipulation check: the model answers none of the {check.n_asked} right"
                    f"{' in both orders' if resolved.order == 'both' else ''} (answer mass {check.answer_mass:.2f}); "
                    "try a model that knows more, other questions, or order='random'"
                )
            options = attribution_options(model, check, resolved, progress=progress, mapper=mapper)
            stored = attribute_into(folder, model, check, options, mapper, resolved, progress=progress)
            if fitted := stored.backed_off():
                options["pass_size"] = fitted
            selecting: dict[str, Any] = {
                name: getattr(resolved, name) for name in ("p", "alpha", "correction", "family")
            }
            tuning = None
            if resolved.t == "auto":
                tuning = tune_threshold(
                    model,
                    stored,
                    tuning_questions,
                    drop_long=drop_long,
                    progress=progress,
                    mapper=within(mapper, "tuning"),
                    seed=resolved.seed,
                    **selecting,
                )
            selecting["t"] = tuning.t if tuning else resolved.t
            selection = select_neurons(stored, seed=resolved.seed, **selecting)
            evaluation = evaluate(
                model,
                reporting,
                selection.neurons,
                n_repetitions=resolved.n_repetitions,
                arms=PAPER_ARMS,
                order="both",
                seed=resolved.seed,
                drop_long=drop_long,
                progress=progress,
                mapper=within(mapper, "evaluation"),
            )
            unseen = None
            if reporting is finding:
                used = {*selection.half_1, *selection.half_2}
                rest = sorted({p.question for p in evaluation.prompts} - used)
                unseen = evaluation.only(rest) if rest else None
            diagnosis = diagnose(
                model,
                selection.neurons,
                check,
                finding,
                tested=set(selection.half_2),
                label_means=stored.label_means(selection.neurons, set(selection.half_2)) if resolved.separate else None,
                n_repetitions=resolved.n_repetitions,
                seed=resolved.seed,
                progress=progress,
                mapper=within(mapper, "diagnosis"),
                **options,
            )
            said = [post_norm_warning(model, resolved.method, resolved.baseline)]
            said += [back_off_warning(fitted)] if fitted else []
            said += [str(w.message) for w in raised if issubclass(w.category, UserWarning)]
            found = TruthNeurons(
                model_name=backend_of(model).name,
                questions_name=questions.name,
                settings=resolved,
                check=check,
                completeness=stored.completeness(),
                selection=selection,
                evaluation=evaluation,
                is_held_out=reporting is not finding,
                unseen=unseen,
                diagnosis=diagnosis,
                stability=stability(stored, **selecting),
                found_again=found_again(stored, selection, seed=resolved.seed),
                tuning=tuning,
                notes=tuple(dict.fromkeys(f"{one[0].upper()}{one[1:]}." for one in said if one)),
                cards=make_cards(
                    model,
                    stored,
                    check,
                    selection=selection,
                    diagnosis=diagnosis,
                    questions=finding,
                    progress=progress,
                    mapper=within(mapper, "cards"),
                ),
            )
            if out is not None and together.is_first:
                write_results(folder, found, manifest)
            together.wait()
            folder.log("end")
    return found


def threads_of(out: str | Path | None) -> int:
    """Threads for a run: those that its folder was begun with, else what torch would take."""
    manifest = Path(out) / "manifest.json" if out is not None else None
    try:
        held = read_manifest(manifest)["settings"].get("n_threads") if manifest and manifest.is_file() else None
    except (BadInput, OSError, ValueError):
        held = None
    return held if type(held) is int and held > 0 else torch.get_num_threads()


@contextmanager
def fixed_threads(n: int) -> Iterator[None]:
    """Let torch use so many threads inside the `with`: sums differ in bits between numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def split_questions(questions: QuestionSet, settings: Settings) -> tuple[QuestionSet, QuestionSet, QuestionSet]:
    """The questions to find neurons on, those to report on, and those to tune t on.

    Parts where the set has them, else the whole set twice; with t = "auto" a share of it, drawn with the seed, tunes only.
    """
    finding, reporting, tuning = (questions.part(name) for name in ("find", "report", "tune"))
    if not finding or not reporting:
        finding = reporting = questions
    if settings.t == "auto" and not tuning:
        shuffled = generator(settings.seed, 5).permutation(len(questions)).tolist()
        n_tuning = max(1, round(TUNING_SHARE * len(questions)))
        tuning, finding = (questions.select(sorted(part)) for part in (shuffled[:n_tuning], shuffled[n_tuning:]))
        if not finding:
            raise BadInput(f"{len(questions)} questions are too few to tune t on some of them; give a t")
        reporting = finding
    if settings.limit is not None and settings.limit < len(finding):
        drawn = generator(settings.seed).choice(len(finding), settings.limit, replace=False)
        limited = finding.select(sorted(drawn.tolist()))
        finding, reporting = limited, limited if reporting is finding else reporting
    return finding, reporting, tuning


def attribution_options(
    model: Model, check: ManipulationCheck, settings: Settings, *, progress: bool, mapper: Mapper
) -> dict[str, Any]:
    """The arguments of `attribute`; a mean baseline is that of the kept prompts."""
    baseline: Any = settings.baseline
    if baseline == "mean":
        baseline = mean_activations(
            model, check.prompts, positions=settings.positions, progress=progress, mapper=within(mapper, "baseline")
        )
    return {"baseline": baseline, **settings.of_attribution()}


def attribute_into(
    folder: RunFolder,
    model: Model,
    check: ManipulationCheck,
    options: Mapping[str, Any],
    mapper: StoredUnits,
    settings: Settings,
    *,
    progress: bool,
) -> StoredScores:
    """Attribute the kept prompts shard by shard.

    Where memory runs out, the size of a pass that fitted serves all further shards, and stands in the manifest.
    """
    shards = cut_prompts(check.prompts)
    noted = folder.noted(BACKED_OFF)
    size = PassSize(**noted) if noted else None

    def compute(index: int) -> Tensors:
        nonlocal size
        found = attribute(model, shards[index], separate=settings.separate, pass_size=size, **options)
        if found.pass_size != found.planned:
            size = found.pass_size
            folder.note(BACKED_OFF, size._asdict())
        return pack_scores(found, size)

    done = mapper(SCORES, [unit_key(shard) for shard in shards], compute, "attribution" if progress else None)
    stored = StoredScores(folder, neuron_space(model), shards, keys=done.keys)
    if folder.workers.is_first:
        stored.save_index()
    if fitted := stored.backed_off():
        folder.note(BACKED_OFF, fitted._asdict())
    return stored


def describe(model: Model, questions: QuestionSet, settings: Settings, example: str) -> dict[str, Any]:
    """The manifest: everything that the numbers depend on, and one rendered prompt."""
    return {
        **asdict(settings),
        "engine": choose_engine(model, settings.engine, settings.positions),
        **describe_model(model),
        "weight_processing": "none",
        "batch_size": BATCH_SIZE,
        "questions": questions.name,
        "questions_sha256": questions.digest,
        "rendered_prompt": example,
    }


def describe_model(model: Model) -> dict[str, Any]:
    """The model, and how this process runs it."""
    backend = backend_of(model)
    return {
        "model": backend.name,
        "backend": backend.kind,
        "architecture": backend.architecture,
        "weights_sha256": weights_digest(model),
        "dtype": str(backend.dtype).removeprefix("torch."),
        "device": backend.device.type,
        "n_threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("tn_lens", "torch", "transformer-lens", "transformers")},
    }


def weights_digest(model: Model) -> str:
    """What tells a model from an edited copy: SHA-256 over the sum and size of every weight."""
    weights = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        total, size = parameter.sum(dtype=torch.float64), torch.linalg.vector_norm(parameter, dtype=torch.float64)
        weights.update(f"{name} {tuple(parameter.shape)} {float(total):.9g} {float(size):.9g};".encode())
    return weights.hexdigest()


def write_results(folder: RunFolder, found: TruthNeurons, manifest: Mapping[str, Any]) -> None:
    """What was found as JSON files, and from them report.html."""
    provenance = {
        key: manifest[key] for key in ("model", "questions", "p", "alpha", "correction", "family", "order", "seed")
    }
    folder.write_json("neurons.json", {**provenance, "t": found.selection.t, "neurons": found.records()})
    folder.write_json("cards.json", {"model": found.model_name, "cards": [card.to_dict() for card in found.cards]})
    folder.write_json("selection.json", found.selection.to_dict())
    folder.write_json("evaluation.json", {**found.evaluation.record(), "warnings": found.warnings()})
    folder.write_json("diagnosis.json", found.checks_to_dict())
    folder.write_json("summary.json", found.to_dict())
    folder.write("report.html", report_of(folder.path))
    folder.note("neurons_sha256", folder.digest("neurons.json"))  # `evaluate` relies on it


def report_of(path: Path) -> bytes:
    """report.html from what a run folder holds, evaluations on other question sets among it; no model is needed.

    Raises:
        BadInput: there is no finished run, or a file of it is damaged.
    """
    return write_report(load_run(path), load_cards(path)).encode(errors="xmlcharrefreplace")
