"""The model card of a run: metadata for the Hub and text for people."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from nio_hf.errors import OutputError, Problem, one_line
from nio_hf.hub.push import CARD_NAME, is_repo_id
from nio_hf.hub.run_folder import shareable_run
from nio_hf.report import tables
from nio_hf.report.run import Run
from nio_hf.report.templating import render

logger = logging.getLogger(__name__)

NO_LICENCE_YET = "unknown"
"""Licence in the card until the owner of the model has chosen one."""
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
"""{ending of the name of a class: task on the Hub}."""
_METRIC_NAMES = {"accuracy": "Accuracy", "top5_accuracy": "Accuracy, top 5", "loss": "Loss", "perplexity": "Perplexity"}
_NOT_MEASURED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
_FORMATS = {"digits", "stdlib", "imagefolder", "parquet", "webdataset", "json", "csv", "text", "arrow", "generator"}
"""Values of `dataset_name` that are formats, not data sets on the Hub."""


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
    """Write the model card of a run into the folder of its model, unless the user has edited the card there.

    Args:
        run: Run that the card describes.
        directory: Folder of the model.
        plots: {description: PNG file in the directory}.
        repo_id: Name of the repository; None if it is not known.
        former: Card that the repository has; None without one. Its licence and tags stay valid.
        license_id: Licence; None for the licence of the former card.
        tags: Further tags.
        given: Further fields of [`~huggingface_hub.ModelCardData`].

    Returns:
        Whether the card of the folder should be pushed. A card that the user has edited on the Hub stays as it is.

    Raises:
        OutputError: A card that cannot be written.
    """
    path = directory / CARD_NAME
    known: Any = {} if former is None else former.data
    try:
        if path.is_file() and MARKER not in path.read_text(encoding="utf-8"):
            logger.info("%s is pushed as it is: you have edited it.", path)
            return True
        if former is not None and MARKER not in former.content:
            logger.info("The card of %s is kept: you have edited it.", repo_id)
            return False
        license_id = license_id or known.get("license") or NO_LICENCE_YET
        kept = [tag for tag in known.get("tags") or [] if tag not in ("untrained", known.get("pipeline_tag"))]
        # The old file may be a hard link that a checkpoint shares.
        path.unlink(missing_ok=True)
        path.write_text(card_text(run, directory, plots, repo_id, license_id, [*tags, *kept], given), encoding="utf-8")
        return True
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(Problem(str(path), one_line(error), "Free space or choose another output_dir")) from error


def card_text(
    run: Run,
    directory: Path,
    plots: Mapping[str, Path],
    repo_id: str | None,
    license_id: str,
    tags: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> str:
    """Return the card: metadata for the Hub, then Markdown. The arguments are those of [`write_card`]."""
    metadata, run = card_metadata(run, license_id, tags, given), shareable_run(run)
    return render(
        "model_card.md.j2",
        metadata=metadata.to_yaml(),
        run=run,
        facts=run.facts,
        result=run.result,
        tables=tables,
        repo_id=repo_id or "USER/NAME",
        title=(repo_id or run.name).rpartition("/")[2],
        metrics=evaluation_metrics(run),
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", f"{run.recipe} {run.sample}")), default=0)),
        plots={what: path.relative_to(directory).as_posix() for what, path in plots.items()},
        licence=None if license_id == NO_LICENCE_YET else license_id,
        task=_task(run),
        has_processor=(directory / "preprocessor_config.json").is_file(),
        has_tokenizer=(directory / "tokenizer_config.json").is_file(),
        marker=MARKER,
    )


def card_metadata(
    run: Run, license_id: str, tags: Sequence[str] = (), given: Mapping[str, Any] | None = None
) -> ModelCardData:
    """Return the metadata for the Hub: library, task, tags, data set, licence, evaluation of a trained model."""
    dataset = run.facts.dataset or ""
    is_on_hub = dataset not in _FORMATS and is_repo_id(dataset) and not Path(dataset).exists()
    run = shareable_run(run)
    facts, given, measured = run.facts, given or {}, evaluation_metrics(run)
    task = _task(run)
    all_tags = ["nio", "initialization", *([] if run.is_trained else ["untrained"]), facts.model_type, *tags]
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=[*given.get("datasets", ()), facts.dataset or "unknown"][0],
            dataset_name=facts.dataset or "unknown",
            dataset_config=facts.dataset_config,
            dataset_split=facts.dataset_split,
            metric_type=name,
            metric_name=_METRIC_NAMES.get(name, name),
            metric_value=round(value, 6),
        )
        for name, value in measured.items()
        # The loss is a result where there is no other.
        if math.isfinite(value) and (name != "loss" or len(measured) == 1)
    ]
    known = {
        "library_name": "transformers" if facts.model_type is not None else None,
        "license": license_id,
        "pipeline_tag": task if run.is_trained else None,
        "tags": list(dict.fromkeys(tag for tag in all_tags if tag is not None)),
        "datasets": [facts.dataset] if is_on_hub else None,
        "metrics": ["accuracy"] if "accuracy" in measured else None,
        "model_name": run.name.rpartition("/")[2] if run.is_trained else None,
        "eval_results": results or None,
    }
    return ModelCardData(**{**known, **given})


def evaluation_metrics(run: Run) -> dict[str, float]:
    """Return the metrics of the evaluation by their names without `eval_`; none for a model that is not trained."""
    metrics = {key.removeprefix("eval_"): value for key, value in run.metrics.items() if key.startswith("eval_")}
    return {key: value for key, value in metrics.items() if not key.endswith(_NOT_MEASURED)} if run.is_trained else {}


def _task(run: Run) -> str | None:
    return next((task for suffix, task in _TASKS.items() if run.facts.model.endswith(suffix)), None)
