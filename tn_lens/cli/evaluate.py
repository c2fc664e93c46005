"""The commands that evaluate neurons on other questions, and have wrong answers written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from tn_lens.cli.console import frame_table, open_console
from tn_lens.core.errors import BadInput


def evaluate(
    folder: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder, whose neurons are taken.")] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(
            help="Question sets: truthfulqa triviaqa mmlu, NAME=PATH for a local copy, or a .csv or .jsonl file."
        ),
    ] = None,
    neurons: Annotated[Path | None, typer.Option(help="A neurons.json, instead of a run.")] = None,
    model: Annotated[str | None, typer.Option(help="'toy', a hub id, or a folder; a run knows its own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; RUN/evaluation by default.")] = None,
    arms: Annotated[
        list[str] | None,
        typer.Option(help="Conditions: baseline suppressed, and random random_matched top_activation; all by default."),
    ] = None,
    mode: Annotated[
        Literal["zero", "scale", "mean", "resample"], typer.Option(help="What is done to the neurons.")
    ] = "zero",
    factor: Annotated[float | None, typer.Option(help="Of --mode scale.")] = None,
    positions: Annotated[Literal["all", "last", "question"], typer.Option(help="Where it is done.")] = "all",
    order: Annotated[
        Literal["both", "given"] | None, typer.Option(help="Orders of the choices; as is usual for the set by default.")
    ] = None,
    control_orders: Annotated[
        Literal["both", "drawn"],
        typer.Option(help="Ask a control's draw in every order, or only in the one drawn (faster)."),
    ] = "both",
    n_shots: Annotated[int, typer.Option(help="Solved examples before each question of MMLU.")] = 0,
    wrong_answers: Annotated[Path | None, typer.Option(help="Wrong answers for TriviaQA's own files.")] = None,
    strict: Annotated[bool, typer.Option(help="Leave out wrong answers of TriviaQA that contain a right one.")] = False,
    repetitions: Annotated[int, typer.Option(help="Draws of orders and control neurons.")] = 10,
    seed: Annotated[int, typer.Option(help="Of orders and control neurons.")] = 0,
    limit: Annotated[int | None, typer.Option(help="At most so many questions of each set.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Plain text for the loss; some paragraphs of our own by default.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    backend: Annotated[
        Literal["hooked", "bridge"] | None,
        typer.Option(
            help="TransformerLens' own model, or Hugging Face's within TransformerLens; the run's own by default."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of torch, for every worker; the run's own by default, or torch's.")
    ] = None,
    drop_long: Annotated[bool, typer.Option(help="Leave out questions beyond the context window.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the checkpoint's own code run.")] = False,
) -> None:
    """Suppress found neurons on other question sets, beside every control: tables 1 and 2."""
    import pandas as pd
    from transformers.utils import logging as hf_logging

    from tn_lens.evaluation import ARMS, table1, table2
    from tn_lens.evaluation.text import paragraphs, plain_texts
    from tn_lens.models import loading
    from tn_lens.neurons.neuron import NeuronSet
    from tn_lens.pipeline import retest
    from tn_lens.pipeline.run import report_of
    from tn_lens.runs.folder import RunFolder
    from tn_lens.runs.workers import workers

    hf_logging.disable_progress_bar()
    if (folder is None) == (neurons is None):
        raise BadInput(
            "expected a run folder, or --neurons FILE with --model NAME; got " + ("both" if folder else "neither")
        )
    settings: dict[str, Any] | None = None
    if folder is not None:
        settings, found, source = retest.run_of(folder)
        known: dict[str, Any] = source or {}
        dtype, revision = dtype or known.get("dtype"), revision or known.get("revision")
        backend = backend or settings.get("backend")
        out = out or folder / "evaluation"
        threads = threads or settings["n_threads"]
    else:
        found, known = NeuronSet.load(str(neurons)), {}
    if model is None and not known:
        raise BadInput("expected a model; give one with --model")
    options = {"n_shots": n_shots, "wrong_answers": wrong_answers, "strict": strict}
    sets = retest.load_sets(on or [], limit=limit, seed=seed, **options)
    together = workers()
    about: dict[str, Any] = {"dtype": dtype, "device": together.device(device), "revision": revision}
    about["backend"] = backend
    if model is None:
        loaded = retest.load_noted(known["model"], **about)
    else:
        loaded = loading.load_model(model, trust_remote_code=trust_remote_code, **about)
    parts = {}
    if folder is not None and settings is not None:
        retest.check_same_model(loaded, settings, folder)
        parts = {questions.name: part for questions in sets if (part := retest.parts_of(folder, settings, questions))}
    texts = None
    if mode in ("zero", "scale") and positions == "all":
        texts = paragraphs(_read(text)) if text is not None else plain_texts(loaded)
    evaluations = retest.retest(
        loaded,
        found,
        sets,
        out=out,
        parts=parts,
        n_repetitions=repetitions,
        arms=arms or ARMS,
        mode=mode,
        factor=factor,
        positions=positions,
        order=order,
        control_orders=control_orders,
        texts=texts,
        seed=seed,
        drop_long=drop_long,
        threads=threads,
    )
    if not together.is_first:
        return
    console = open_console()
    for questions, evaluation in zip(sets, evaluations, strict=True):
        console.print(f"\n[bold]{escape(questions.summary())}[/]", highlight=False)
        console.print(table1([evaluation]))
        for sentence in [*evaluation.explain(), *evaluation.warnings()]:
            console.print(f"- {escape(sentence)}", highlight=False)
        if questions.name in parts:
            frame = evaluation.by_part(parts[questions.name])
            rows = [row for row in frame.to_dict("records") if row["arm"] in ("baseline", "suppressed")]
            shown = ["part", "arm", "n_questions", "accuracy_mean", "order_averaged_accuracy", "answer_mass"]
            console.print(frame_table(pd.DataFrame(rows, columns=shown), title="by part"))
    if len(evaluations) > 1:
        console.print(table2(evaluations))
    if out is not None:
        console.print(f"\nTables and numbers: {out}", highlight=False, soft_wrap=True)
    if folder is not None and out == folder / "evaluation":
        RunFolder(folder).write("report.html", report_of(folder))
        console.print(f"Report, with these evaluations: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def wrong_answers(
    questions: Annotated[str, typer.Argument(help="'truthfulqa', TriviaQA's own .json, or a .csv or .jsonl file.")],
    out: Annotated[Path, typer.Option(help="JSON-lines file; a later call goes on with it.")],
    chat_model: Annotated[str, typer.Option(help="The model's name on the server, or with --local what to load.")],
    base_url: Annotated[
        str, typer.Option(help="Server that speaks OpenAI's chat completions; the key is read from OPENAI_API_KEY.")
    ] = "https://api.openai.com/v1",
    local: Annotated[bool, typer.Option("--local", help="Load the model here instead of asking a server.")] = False,
    seed: Annotated[int, typer.Option(help="Of the replies.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions.")] = None,
) -> None:
    """Let a chat model write tempting wrong answers, as the paper did for TriviaQA."""
    from tn_lens.questions.adversarial import LocalChat, OpenAIChat, load_answered, write_wrong_answers

    asked = load_answered(questions)[:limit]
    if local:
        from tn_lens.models.loading import load_model

        chat = LocalChat(load_model(chat_model))
    else:
        chat = OpenAIChat(name=chat_model, base_url=base_url)
    found = write_wrong_answers(asked, chat, out, seed=seed)
    typer.echo(f"{len(found)} of {len(asked)} questions have a wrong answer now: {out}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {str(path)!r} as UTF-8 text: {error}") from error
