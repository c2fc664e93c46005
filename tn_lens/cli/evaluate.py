"""The command that evaluates neurons on other question sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import typer

from tn_lens.cli import options
from tn_lens.core.errors import BadInput
from tn_lens.core.options import Condition, MetricName, Mode, Where
from tn_lens.core.settings import Settings

Sets: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(help=options.SETS_HELP),
]
Conditions: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar=options.choices(get_args(Condition)),
        help="Conditions to run, including unablated and ablated; all by default.",
    ),
]
Metrics: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar=options.choices(get_args(MetricName)),
        help="Metrics of whole answers to compute as well, as in lm-evaluation-harness.",
    ),
]


@options.with_settings("n_repetitions", "seed", "limit", "format", "n_shots", "symbols", "prefill", "template_kwargs")
def evaluate(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run folder whose neurons to evaluate.")
    ] = None,
    on: Sets = None,
    neurons: Annotated[Path | None, typer.Option(help="A neurons.json to evaluate instead of a run.")] = None,
    model: Annotated[str | None, typer.Option(help="'toy', a hub id, or a folder; by default that of the run.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; RUN/evaluation by default.")] = None,
    conditions: Conditions = None,
    mode: Annotated[
        str, typer.Option(metavar=options.choices(get_args(Mode)), help="Intervention on the neurons, by name.")
    ] = "zero",
    factor: Annotated[float | None, typer.Option(help="Factor of --mode scale.")] = None,
    positions: Annotated[Where, typer.Option(help="Positions at which the intervention acts.")] = "all",
    order: Annotated[
        Literal["both", "given"] | None, typer.Option(help="Orders of the choices; by default the set's standard.")
    ] = None,
    control_orders: Annotated[
        Literal["both", "drawn"],
        typer.Option(help="Ask each draw of a control in every order, or only in the order drawn, which is faster."),
    ] = "both",
    wrong_answers: Annotated[Path | None, typer.Option(help="File of wrong answers for TriviaQA's own files.")] = None,
    strict: Annotated[bool, typer.Option(help="Leave out wrong answers of TriviaQA that contain a right one.")] = False,
    text: options.PlainText = None,
    metrics: Metrics = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    revision: options.Revision = None,
    backend: options.Backend = None,
    threads: options.Threads = None,
    drop_long: options.DropLong = False,
    trust_remote_code: options.TrustRemoteCode = False,
    **settings: Any,
) -> None:
    """Ablate found neurons on other question sets, with every control: tables 1 and 2 of the paper."""
    if (folder is None) == (neurons is None):
        given = "both" if folder else "neither"
        raise BadInput(f"expected a run folder, or --neurons FILE with --model NAME; got {given}")
    # imported here, since torch and transformers take seconds, also for --help and errors in the arguments
    from tn_lens.cli import retest
    from tn_lens.neurons import NeuronSet
    from tn_lens.pipeline.retest import check_same_model, parts_of, run_of
    from tn_lens.pipeline.retest import retest as evaluate_on
    from tn_lens.pipeline.run import rewrite_report
    from tn_lens.results.found import Provenance
    from tn_lens.runs.workers import workers

    provenance, found = run_of(folder) if folder else (Provenance(settings={}), NeuronSet.load(str(neurons)))
    if model is None and not provenance.model_source:
        raise BadInput("expected a model; give one with --model")
    chosen = Settings(**settings)
    intervention = retest.intervention_of(mode, factor=factor, positions=positions, seed=chosen.seed)
    reading = {"n_shots": chosen.n_shots, "wrong_answers": wrong_answers, "strict": strict}
    sets = retest.load_sets(on or [], limit=chosen.limit, seed=chosen.seed, asked_as=chosen.of_format(), **reading)
    loading = {"dtype": dtype, "device": workers().device(device), "revision": revision, "backend": backend}
    loaded = retest.load(model, provenance, trust_remote_code=trust_remote_code, **loading)
    parts = {}
    # without a run there are no model and no questions to compare with
    if folder is not None:
        check_same_model(loaded, provenance.settings, folder)
        parts = {s.name: named for s in sets if (named := parts_of(folder, provenance.settings, s))}
        out = out or folder / "evaluation"
    asking: dict[str, Any] = {"n_repetitions": chosen.n_repetitions, "seed": chosen.seed, "intervention": intervention}
    asking |= {"conditions": conditions or get_args(Condition), "metrics": metrics or ()}
    asking |= {"order": order, "control_orders": control_orders, "drop_long": drop_long}
    asking["texts"] = retest.texts_of(loaded, intervention, text)
    threads = threads or provenance.settings.get("n_threads")
    evaluations = evaluate_on(loaded, found, sets, out=out, parts=parts, threads=threads, **asking)
    if workers().is_first:
        console = retest.print_evaluations(sets, evaluations)
        if out is not None:
            console.print(f"\nTables and numbers: {out}", soft_wrap=True)
        if folder is not None and out == folder / "evaluation":
            rewrite_report(folder)
            console.print(f"Report with these evaluations: {folder / 'report.html'}", soft_wrap=True)
