"""The whole paper in one call: the stages in order, and the run folder that keeps what they made."""

from __future__ import annotations

import hashlib
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import psutil
import torch

from .answers import ask
from .attribution import attribute, mean_activations, post_norm_warning
from .attribution.attribute import BATCH_SIZE, MAX_MEMORY, choose_engine
from .attribution.result import PassSize
from .errors import BadInput
from .evaluation import Evaluation, evaluate
from .figures import plot_layers
from .manipulation import ManipulationCheck, manipulation_check
from .models import Model, check_model, neuron_space
from .neurons import SITES, NeuronSet, NeuronSpace, Site
from .progress import track
from .prompts import build_prompts
from .questions.question import QuestionSet
from .report import write_report
from .seeds import generator
from .selection import Selection, select_neurons
from .settings import Settings, resolve_settings
from .storage import RunFolder, StoredScores, cut_shards

FEW = 20
"""Questions in half 2 below which a result is not to be trusted."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TruthNeurons:
    """What a run found, and whether it matters."""

    model_name: str
    questions_name: str
    settings: Settings
    check: ManipulationCheck
    completeness: Mapping[str, Mapping[str, list[float]]]
    """Per site: mean |gap| and mean |change| of each layer (0 gap: an exact integral)."""
    selection: Selection
    evaluation: Evaluation
    """The arms on the reporting questions of the toy, on the whole set elsewhere (as in the paper)."""
    unseen: Evaluation | None
    """The arms on the questions that selection and test did not use, where `evaluation` holds others too."""
    notes: tuple[str, ...]
    """Warnings of the stages, in sentences."""

    @property
    def neurons(self) -> NeuronSet:
        """The truth neurons."""
        return self.selection.neurons

    @property
    def completeness_gap(self) -> float:
        """Largest mean |gap| of a site and layer over the largest mean |change|."""
        largest = max((max(of["change"]) for of in self.completeness.values()), default=0.0)
        missing = max((max(of["gap"]) for of in self.completeness.values()), default=0.0)
        return missing / largest if largest else 0.0

    def plot_layers(self) -> go.Figure:
        """Figure 5 of this model."""
        return plot_layers(self.selection, title=f"{self.model_name}: {len(self.neurons)} truth neurons by layer")

    def warnings(self) -> list[str]:
        """Everything that should be read before the result is believed."""
        said = list(self.notes)
        if self.check.is_lopsided:
            said.append(self.check.lopsided)
        if not self.neurons:
            said.append(
                f"No truth neurons were found: of {len(self.selection.candidates)} candidates none passed the test. "
                "A model that does not know the answers has none to find; otherwise try a lower t."
            )
        elif len(self.selection.half_2) < FEW:
            said.append(
                f"Only {len(self.selection.half_2)} questions tested the candidates: too few to trust what was found."
            )
        return said + self.evaluation.warnings()

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def summary(self) -> str:
        """What was found and what it does, in a few sentences."""
        return " ".join([self.check.summary(), self.selection.summary(), self.evaluation.summary()])

    def to_dict(self) -> dict[str, Any]:
        """summary.json: accuracies in percent (std with ddof 1), everything else a fraction in [0, 1]."""
        space = self.selection.space
        summary = {
            "model": self.model_name,
            "questions": self.questions_name,
            "n_neurons": len(self.neurons),
            "t": self.settings.t,
            "p": self.settings.p,
            "n_layers": space.n_layers,
            "neurons_by_layer": self.neurons.by_layer(space.n_layers),
            "arms": self.evaluation.to_dict(),
            "welch_p": self.evaluation.welch_p,
        }
        if self.unseen is not None:
            summary["arms_unseen"] = self.unseen.to_dict()
        return summary

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.summary())}</p>{self.evaluation.to_frame().round(3).to_html()}"


def find_truth_neurons(
    model: Model,
    questions: QuestionSet,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    drop_long: bool = False,
    progress: bool = True,
    **settings: Any,
) -> TruthNeurons:
    """Find the truth neurons of a model, suppress them, and say what that does (the paper's whole pipeline).

    Args:
        model: from `load_model`, or a HookedTransformer loaded without weight processing.
        questions: from `load_questions`. Where a set has parts (the toy), neurons are found on "find" and the arms are
            evaluated on "report"; elsewhere the whole set serves both, as in the paper.
        out: a run folder to write; it is resumed if it holds the same run.
        overwrite: start over where the folder holds another run.
        drop_long: leave out questions beyond the context window instead of refusing.
        progress: show progress bars.
        settings: any field of `Settings`; what is not given (or None) is what the paper used, or what suits the model.

    Raises:
        BadInput: see the stages; nothing is written before the model has answered the questions.
    """
    check_model(model)
    if not isinstance(questions, QuestionSet):
        raise BadInput(f"expected a QuestionSet, got {questions!r:.60}; load one with load_questions(...)")
    if out is not None and not str(out).strip():
        raise BadInput("the run folder's name is empty; give one like runs/mine")
    resolved = resolve_settings(model, **settings)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", UserWarning)
        finding, reporting = split_questions(questions, resolved)
        prompts = build_prompts(model, finding, order=resolved.order, seed=resolved.seed, drop_long=drop_long)
        check = manipulation_check(model, prompts, progress=progress)
        if not check.prompts:
            raise BadInput(
                f"no question is left after the manipulation check: the model answers none of the {check.n_asked} right"
                f"{' in both orders' if resolved.order == 'both' else ''} (answer mass {check.answer_mass:.2f}); "
                "try a model that knows more, other questions, or order='random'"
            )
        with tempfile.TemporaryDirectory() as scratch:
            manifest = describe(model, questions, resolved, prompts[0].text)
            folder = RunFolder.open(Path(scratch) / "run" if out is None else out, manifest, overwrite=overwrite)
            stored = attribute_into(folder, model, check, resolved, progress=progress)
            selection = select_neurons(
                stored,
                t=resolved.t,
                p=resolved.p,
                alpha=resolved.alpha,
                correction=resolved.correction,
                seed=resolved.seed,
            )
            evaluation = evaluate(
                model,
                reporting,
                selection.neurons,
                n_repetitions=resolved.n_repetitions,
                seed=resolved.seed,
                drop_long=drop_long,
                progress=progress,
            )
            unseen = None
            if reporting is finding:
                used = {*selection.half_1, *selection.half_2}
                rest = sorted({p.question for p in evaluation.prompts} - used)
                unseen = evaluation.only(rest) if rest else None
            post_norm = post_norm_warning(model, resolved.method, resolved.baseline)
            notes = ([post_norm[0].upper() + post_norm[1:] + "."] if post_norm else []) + [
                str(w.message)[0].upper() + str(w.message)[1:] + "."
                for w in raised
                if issubclass(w.category, UserWarning)
            ]
            found = TruthNeurons(
                model_name=str(model.cfg.model_name),
                questions_name=questions.name,
                settings=resolved,
                check=check,
                completeness=stored.completeness(),
                selection=selection,
                evaluation=evaluation,
                unseen=unseen,
                notes=tuple(dict.fromkeys(notes)),
            )
            if out is not None:
                write_results(folder, found, manifest)
    return found


def split_questions(questions: QuestionSet, settings: Settings) -> tuple[QuestionSet, QuestionSet]:
    """The questions to find neurons on, and those to report on: parts where the set has them, else the whole set twice."""
    finding, reporting = questions.part("find"), questions.part("report")
    if not finding or not reporting:
        finding = reporting = questions
    if settings.limit is not None and settings.limit < len(finding):
        drawn = generator(settings.seed).choice(len(finding), settings.limit, replace=False)
        limited = finding.select(sorted(drawn.tolist()))
        finding, reporting = limited, limited if reporting is finding else reporting
    return finding, reporting


def attribute_into(
    folder: RunFolder, model: Model, check: ManipulationCheck, settings: Settings, *, progress: bool
) -> StoredScores:
    """Attribute the kept prompts shard by shard; shards that are there and whole are not computed again.

    Where memory runs out, the size of a pass that fitted serves all further shards, and stands in the manifest.
    """
    shards = cut_shards(check.prompts)
    todo = [
        index for index in range(len(shards)) if not is_whole(folder, index, len(shards[index]), neuron_space(model))
    ]
    baseline: Any = settings.baseline
    if todo and baseline == "mean":
        baseline = mean_activations(model, check.prompts, positions=settings.positions, progress=progress)
    backed_off = folder.noted("backed_off")
    size = PassSize(**backed_off) if backed_off else None
    for index in track(todo, "attribution" if progress else None):
        attribution = attribute(
            model,
            shards[index],
            n_steps=settings.n_steps,
            method=settings.method,
            baseline=baseline,
            positions=settings.positions,
            target=settings.target,
            engine=settings.engine,
            pass_size=size,
        )
        if attribution.pass_size != attribution.planned:
            size = attribution.pass_size
            folder.note("backed_off", size._asdict())
        folder.write_shard(index, attribution)
    return StoredScores(folder, neuron_space(model), shards)


def is_whole(folder: RunFolder, index: int, n_prompts: int, space: NeuronSpace) -> bool:
    """Whether a shard can be read and holds everything that it should, in the shapes it should have."""
    expected: dict[str, tuple[int, ...]] = {}
    sites: list[Site] = [site for site in SITES if space.width(site)]
    for site in sites:
        expected[site] = (n_prompts, space.n_layers, space.width(site))
        expected[f"{site}.scale"] = (n_prompts,)
        expected[f"{site}.gap"] = expected[f"{site}.change"] = (n_prompts, space.n_layers)
    tensors = folder.read_shard(index)
    return tensors is not None and {name: tuple(value.shape) for name, value in tensors.items()} == expected


def describe(model: Model, questions: QuestionSet, settings: Settings, example: str) -> dict[str, Any]:
    """The manifest: everything that the numbers depend on, and one rendered prompt."""
    weights = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        total, size = parameter.sum(dtype=torch.float64), torch.linalg.vector_norm(parameter, dtype=torch.float64)
        weights.update(f"{name} {tuple(parameter.shape)} {float(total):.9g} {float(size):.9g};".encode())
    return {
        **asdict(settings),
        "engine": choose_engine(model, settings.engine, settings.positions),
        "max_memory": MAX_MEMORY,
        "model": str(model.cfg.model_name),
        "architecture": model.cfg.original_architecture,
        "weights_sha256": weights.hexdigest(),
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "device": str(torch.device(str(model.cfg.device)).type),
        "n_threads": torch.get_num_threads(),
        "weight_processing": "none",
        "batch_size": BATCH_SIZE,
        "questions": questions.name,
        "questions_sha256": questions.digest,
        "rendered_prompt": example,
        "versions": {name: version(name) for name in ("tn_lens", "torch", "transformer-lens", "transformers")},
    }


def write_results(folder: RunFolder, found: TruthNeurons, manifest: Mapping[str, Any]) -> None:
    """neurons.json, evaluation.json, summary.json and report.html."""
    provenance = {
        key: manifest[key] for key in ("model", "questions", "t", "p", "alpha", "correction", "order", "seed")
    }
    folder.write_json("neurons.json", {**provenance, "neurons": found.selection.to_records()})
    evaluation = found.evaluation
    folder.write_json(
        "evaluation.json",
        {
            "questions": evaluation.name,
            "n_questions": evaluation.n_questions,
            "arms": {
                name: {"accuracy": (100 * arm.accuracies).tolist(), **evaluation.to_dict()[name]}
                for name, arm in evaluation.arms.items()
            },
            "welch_p": evaluation.welch_p,
            "probability_change": evaluation.probability_change,
            "warnings": found.warnings(),
        },
    )
    folder.write_json("summary.json", found.to_dict())
    folder.write("report.html", write_report(found, manifest).encode())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would cost on this machine, from a few prompts that were really run."""

    n_questions: int
    n_prompts: int
    longest_prompt: int
    """Tokens."""
    seconds: float
    """Expected, if every question passes the check."""
    memory: int
    """Bytes of this process (of the device, on CUDA) at its peak so far."""

    def summary(self) -> str:
        """One sentence."""
        minutes, seconds = divmod(round(self.seconds), 60)
        return (
            f"{self.n_questions} questions, {self.n_prompts} prompts of up to {self.longest_prompt} tokens; at most about "
            f"{minutes} min {seconds} s on this machine, and {self.memory / 2**30:.1f} GiB of memory."
        )


def plan_run(model: Model, questions: QuestionSet, *, drop_long: bool = False, **settings: Any) -> Plan:
    """Say what `find_truth_neurons` would cost, by running its stages on a few prompts."""
    check_model(model)
    resolved = resolve_settings(model, **settings)
    finding, reporting = split_questions(questions, resolved)
    prompts = build_prompts(model, finding, order=resolved.order, seed=resolved.seed, drop_long=drop_long)
    probe = prompts[:16]
    ask(model, probe)  # whatever is set up once
    started = time.perf_counter()
    attribute(
        model,
        probe,
        n_steps=resolved.n_steps,
        method=resolved.method,
        positions=resolved.positions,
        target=resolved.target,
        engine=resolved.engine,
    )
    per_attribution = (time.perf_counter() - started) / len(probe)
    started = time.perf_counter()
    ask(model, probe)
    per_answer = (time.perf_counter() - started) / len(probe)
    n_answers = len(prompts) + 2 * len(reporting) * (2 + 2 * resolved.n_repetitions)
    on_gpu = str(model.cfg.device).startswith("cuda")
    return Plan(
        n_questions=len(finding),
        n_prompts=len(prompts),
        longest_prompt=max(len(p.token_ids) for p in prompts),
        seconds=per_attribution * len(prompts) + per_answer * n_answers,
        memory=torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss,
    )
