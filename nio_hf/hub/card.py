"""The model card of a run: what the Hub reads of it, and what people do."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nio_hf.core.result import InitResult
from nio_hf.errors import OutputError, Problem, one_line
from nio_hf.hub.access import Destination, hub, is_repo_id
from nio_hf.hub.sharing import shareable_run
from nio_hf.report.run import Run
from nio_hf.report.tables import (
    cost_text,
    excluded_text,
    initialisation_rows,
    kept_text,
    markdown_table,
    scale_table,
)
from nio_hf.report.templating import render

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
NO_LICENCE_YET = "unknown"
"""What the card says until the owner of the model has chosen a licence."""
MARKER = "<!-- Written by nio_hf, which writes it anew with each push. Delete this line to keep your changes. -->"
_TASKS = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSemanticSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
}
_PROCESSOR_NAME, _TOKENIZER_NAME = "preprocessor_config.json", "tokenizer_config.json"
_METRIC_NAMES = {"accuracy": "Accuracy", "top5_accuracy": "Accuracy, top 5", "loss": "Loss", "perplexity": "Perplexity"}
_NOT_MEASURED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
_FORMATS = {"digits", "stdlib", "imagefolder", "parquet", "webdataset", "json", "csv", "text", "arrow", "generator"}
"""Names of data sets that are none on the Hub."""


def write_card(
    run: Run,
    directory: Path,
    plots: Mapping[str, Path],
    repo_id: str | None = None,
    former: ModelCard | None = None,
    *,
    license_id: str | None = None,
    tags: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> bool:
    """Write the model card into the folder of a model, unless there is one that somebody has made their own.

    Args:
        run: that made the model.
        directory: of the model.
        plots: {what: PNG file in the directory}.
        repo_id: of the repository that the card is for; None where it is not known.
        former: card that the repository has, whose licence and tags are kept.
        license_id: identifier of the licence on the Hub; None for that of the former card.
        tags: to add.
        given: further fields of [`~huggingface_hub.ModelCardData`], which go before what is known of the run.

    Returns:
        Whether the card of the folder is to be pushed: not where that on the Hub is somebody's own.

    Raises:
        OutputError: where it cannot be written.
    """
    path = directory / CARD_NAME
    try:
        if path.is_file() and MARKER not in path.read_text(encoding="utf-8"):
            logger.info("%s is pushed as it is: it is your own.", path)
            return True
        if former is not None and MARKER not in former.content:
            logger.info("The card of %s is kept: it is your own.", repo_id)
            return False
        license_id = license_id or (former and former.data.get("license")) or NO_LICENCE_YET
        tags = [*tags, *(() if former is None else _kept_tags(former))]
        # Not into a file that a checkpoint shares.
        path.unlink(missing_ok=True)
        path.write_text(card_text(run, directory, plots, repo_id, license_id, tags, given), encoding="utf-8")
        return True
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(Problem(str(path), one_line(error), "Free space or choose another output_dir")) from error


def card_on_hub(destination: Destination) -> ModelCard | None:
    """The card that a repository has, for a branch that is not made yet that of main; None where there is none.

    Raises:
        HfHubHTTPError: where that cannot be found out.
    """
    for revision in (destination.revision, None):
        try:
            path = hub().hf_hub_download(destination.repo_id, CARD_NAME, token=destination.token, revision=revision)
            card: ModelCard = ModelCard.load(path, ignore_metadata_errors=True)
            return card
        except RevisionNotFoundError:
            continue
        except LocalEntryNotFoundError:
            raise
        except (EntryNotFoundError, RepositoryNotFoundError):
            return None
    return None


def card_text(
    run: Run,
    directory: Path,
    plots: Mapping[str, Path],
    repo_id: str | None,
    license_id: str,
    tags: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown with the metadata of the Hub in front; see [`write_card`]."""
    metadata, run = card_metadata(run, license_id, tags, given), shareable_run(run)
    result = run.result
    return render(
        "model_card.md.j2",
        metadata=metadata.to_yaml(),
        run=run,
        facts=run.facts,
        result=result,
        repo_id=repo_id or "USER/NAME",
        title=(repo_id or run.name).rpartition("/")[2],
        headline=_headline(run),
        **({} if result is None else _initialisation(run, result)),
        metrics=evaluation_metrics(run),
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", f"{run.recipe} {run.sample}")), default=0)),
        plots={what: path.relative_to(directory).as_posix() for what, path in plots.items()},
        licence=None if license_id == NO_LICENCE_YET else license_id,
        task=_task(run),
        has_processor=(directory / _PROCESSOR_NAME).is_file(),
        has_tokenizer=(directory / _TOKENIZER_NAME).is_file(),
        marker=MARKER,
    )


def _initialisation(run: Run, result: InitResult) -> dict[str, str]:
    """What the card says of an initialisation."""
    table = scale_table(result)
    return {
        "before_after": markdown_table(("", "before", "after"), initialisation_rows(result)),
        "cost": cost_text(run, result),
        "scales_caption": table.caption,
        "scales": markdown_table(table.columns, table.rows),
        "excluded": excluded_text(result),
    }


def card_metadata(
    run: Run, license_id: str, tags: Sequence[str] = (), given: Mapping[str, Any] | None = None
) -> ModelCardData:
    """What the Hub reads: library, task, tags, data set, licence, and of a trained model its evaluation."""
    is_on_hub = _is_on_hub(run.facts.dataset or "")
    run = shareable_run(run)
    facts, trained = run.facts, run.is_trained
    task = _task(run)
    own_tags = ["nio", "initialization", *([] if trained else ["untrained"]), facts.model_type, *tags]
    known = ModelCardData(
        library_name="transformers" if facts.model_type is not None else None,
        license=license_id,
        # An untrained model is nothing to try on a web page.
        pipeline_tag=task if trained else None,
        tags=list(dict.fromkeys(tag for tag in own_tags if tag is not None)),
        datasets=[facts.dataset] if is_on_hub and facts.dataset is not None else None,
        metrics=["accuracy"] if trained and "accuracy" in evaluation_metrics(run) else None,
        model_name=run.name.rpartition("/")[2] if trained else None,
        eval_results=_eval_results(run, task, (given or {}).get("datasets")) or None,
    )
    for name, value in (given or {}).items():
        known[name] = value
    return known


def evaluation_metrics(run: Run) -> dict[str, float]:
    """The metrics of the evaluation, by their names without `eval_`; empty for a model that is not trained."""
    metrics = {key.removeprefix("eval_"): value for key, value in run.metrics.items() if key.startswith("eval_")}
    return {key: value for key, value in metrics.items() if not key.endswith(_NOT_MEASURED)} if run.is_trained else {}


def _eval_results(run: Run, task: str | None, datasets: Sequence[str] | None = None) -> list[EvalResult]:
    facts, measured = run.facts, evaluation_metrics(run)
    # The loss is a result where there is no other.
    shown = {name: value for name, value in measured.items() if name != "loss"} or measured
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=datasets[0] if datasets else facts.dataset or "unknown",
            dataset_name=facts.dataset or "unknown",
            dataset_config=facts.dataset_config,
            dataset_split=facts.dataset_split,
            metric_type=key,
            metric_name=_METRIC_NAMES.get(key, key),
            metric_value=round(value, 6),
        )
        for key, value in shown.items()
        if math.isfinite(value)
    ]


def _kept_tags(former: ModelCard) -> list[str]:
    return [tag for tag in former.data.get("tags") or [] if tag not in ("untrained", former.data.get("pipeline_tag"))]


def _headline(run: Run) -> str:
    data = f" on `{run.facts.dataset}`" if run.facts.dataset else ""
    if not run.is_trained:
        what = "model is not trained" if run.result is None else "is an initialised checkpoint, not a trained model"
        return f"This {what}. Its predictions mean nothing yet."
    if not run.is_finished:
        return f"This training is not finished: step {run.steps:,} of {run.max_steps:,}{data}."
    steps = f"{run.steps:,} steps" if run.steps >= run.max_steps else f"{run.steps:,} of {run.max_steps:,} steps"
    start = "" if run.result is None else f", from an initialisation by {run.result.title}"
    return f"This model was trained for {steps}{data}{start}.{kept_text(run)}"


def _task(run: Run) -> str | None:
    return next((task for suffix, task in _TASKS.items() if run.facts.model.endswith(suffix)), None)


def _is_on_hub(dataset: str) -> bool:
    return dataset not in _FORMATS and is_repo_id(dataset) and not Path(dataset).exists()
